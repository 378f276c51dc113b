//! The timer service: one thread that sleeps until the earliest deadline of all devices.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};

use crate::clock::TimeSource;

/// What a deadline reaches. It is called without any lock of the service. A call can be late and
/// can cross with [`Timer::arm`] or [`Timer::cancel`] on another thread, so the target compares
/// `now` with the deadline that it holds under its own lock and ignores a call that it does not
/// expect.
pub trait TimerTarget: Send + Sync {
    fn expired(&self, now: u64);
}

/// All timers of a machine.
pub struct Timers {
    time: Arc<dyn TimeSource>,
    queue: Mutex<Queue>,
    earlier: Condvar,
}

#[derive(Default)]
struct Queue {
    /// (deadline, slot), earliest first.
    armed: BTreeSet<(u64, usize)>,
    slots: Vec<Slot>,
    /// What the thread sleeps until; zero while it does not sleep.
    sleeping_until: u64,
    stop: bool,
}

struct Slot {
    target: Weak<dyn TimerTarget>,
    deadline: Option<u64>,
}

/// One deadline of one device.
pub struct Timer {
    timers: Arc<Timers>,
    slot: usize,
}

impl Timers {
    #[must_use]
    pub fn new(time: Arc<dyn TimeSource>) -> Arc<Self> {
        Arc::new(Self {
            time,
            queue: Mutex::default(),
            earlier: Condvar::new(),
        })
    }

    #[must_use]
    pub fn now(&self) -> u64 {
        self.time.now()
    }

    /// See [`TimeSource::thread_time`].
    #[must_use]
    pub fn thread_time(&self) -> u64 {
        self.time.thread_time()
    }

    /// A timer for `target`, not armed. The service does not keep the target alive.
    pub fn timer(self: &Arc<Self>, target: Weak<dyn TimerTarget>) -> Timer {
        let mut queue = self.lock();
        queue.slots.push(Slot {
            target,
            deadline: None,
        });
        Timer {
            timers: Arc::clone(self),
            slot: queue.slots.len() - 1,
        }
    }

    /// The earliest deadline.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        self.lock().armed.first().map(|&(deadline, _)| deadline)
    }

    /// Calls every target whose deadline has passed, in the order of the deadlines.
    pub fn fire_due(&self) {
        let now = self.now();
        let mut queue = self.lock();
        while let Some(&(deadline, slot)) = queue.armed.first() {
            if deadline > now {
                break;
            }
            queue.armed.pop_first();
            let target = queue.slots.get_mut(slot).and_then(|slot| {
                slot.deadline = None;
                slot.target.upgrade()
            });
            drop(queue);
            if let Some(target) = target {
                target.expired(now);
            }
            queue = self.lock();
        }
    }

    /// Starts the thread that calls [`Self::fire_due`] in time; it ends when the handle drops.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn spawn(self: &Arc<Self>) -> std::io::Result<TimerThread> {
        let timers = Arc::clone(self);
        let thread = thread::Builder::new()
            .name("timers".into())
            .spawn(move || timers.run())?;
        Ok(TimerThread {
            timers: Arc::clone(self),
            thread: Some(thread),
        })
    }

    fn run(&self) {
        // The default slack of 50 µs would be on top of every deadline. Without the permission to
        // change it, timers are merely later.
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1_000));
        loop {
            self.fire_due();
            let mut queue = self.lock();
            if queue.stop {
                return;
            }
            let until = queue.armed.first().map_or(u64::MAX, |&(first, _)| first);
            let pause = until.saturating_sub(self.now());
            if pause == 0 {
                continue;
            }
            queue.sleeping_until = until;
            let mut queue = if until == u64::MAX {
                self.earlier
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner)
            } else {
                self.earlier
                    .wait_timeout(queue, self.time.host_duration(pause))
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            };
            queue.sleeping_until = 0;
        }
    }

    fn set(&self, slot: usize, deadline: Option<u64>) {
        let mut guard = self.lock();
        let queue = &mut *guard;
        let Some(entry) = queue.slots.get_mut(slot) else {
            return;
        };
        if entry.deadline == deadline {
            return;
        }
        if let Some(old) = entry.deadline {
            queue.armed.remove(&(old, slot));
        }
        entry.deadline = deadline;
        if let Some(deadline) = deadline {
            queue.armed.insert((deadline, slot));
            // A sleeper that wakes too early goes back to sleep, so only earlier deadlines count.
            if deadline < queue.sleeping_until {
                self.earlier.notify_one();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Timer {
    /// Replaces the deadline by `deadline` (nanoseconds of the time source). One that has passed
    /// is called soon, from the service's thread.
    pub fn arm(&self, deadline: u64) {
        self.timers.set(self.slot, Some(deadline));
    }

    /// Forgets the deadline. A call that is already under way still arrives.
    pub fn cancel(&self) {
        self.timers.set(self.slot, None);
    }

    #[must_use]
    pub fn now(&self) -> u64 {
        self.timers.now()
    }

    /// See [`TimeSource::thread_time`].
    #[must_use]
    pub fn thread_time(&self) -> u64 {
        self.timers.thread_time()
    }
}

/// Keeps the service's thread running; dropping it ends and joins the thread.
pub struct TimerThread {
    timers: Arc<Timers>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for TimerThread {
    fn drop(&mut self) {
        self.timers.lock().stop = true;
        self.timers.earlier.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Instant;

    use super::*;
    use std::time::Duration;

    use trapline_monitor::clock::Pace;

    use crate::clock::{HostClock, VirtualClock};

    /// Timers on virtual time, and the way to let it pass.
    pub(crate) struct Bench {
        pub clock: Arc<VirtualClock>,
        pub timers: Arc<Timers>,
    }

    impl Bench {
        pub fn new() -> Self {
            // 2024-02-29 23:59:58 UTC.
            let clock = Arc::new(VirtualClock::new(Duration::from_secs(1_709_251_198)));
            let timers = Timers::new(clock.clone());
            Self { clock, timers }
        }

        /// Lets time pass until `until`, stopping at every deadline in between.
        pub fn run_until(&self, until: u64) {
            while let Some(deadline) = self.timers.next_deadline().filter(|&next| next <= until) {
                self.clock.set(deadline);
                self.timers.fire_due();
            }
            self.clock.set(until);
        }
    }

    struct Log(Mutex<Vec<u64>>);

    impl TimerTarget for Log {
        fn expired(&self, now: u64) {
            self.0.lock().unwrap().push(now);
        }
    }

    fn log() -> Arc<Log> {
        Arc::new(Log(Mutex::default()))
    }

    fn weak(log: &Arc<Log>) -> Weak<dyn TimerTarget> {
        let weak: Weak<Log> = Arc::downgrade(log);
        weak
    }

    #[test]
    fn deadlines_fire_in_order_and_once() {
        let bench = Bench::new();
        let target = log();
        let a = bench.timers.timer(weak(&target));
        let b = bench.timers.timer(weak(&target));
        a.arm(300);
        b.arm(100);
        a.arm(200);
        bench.run_until(1_000);
        assert_eq!(*target.0.lock().unwrap(), [100, 200]);
        a.arm(2_000);
        a.cancel();
        bench.run_until(3_000);
        assert_eq!(target.0.lock().unwrap().len(), 2);
    }

    #[test]
    fn a_dropped_target_is_passed_over() {
        let bench = Bench::new();
        let target = log();
        let timer = bench.timers.timer(weak(&target));
        timer.arm(5);
        drop(target);
        bench.run_until(10);
        assert_eq!(bench.timers.next_deadline(), None);
    }

    #[test]
    fn the_thread_wakes_for_an_earlier_deadline_and_ends() {
        let timers = Timers::new(Arc::new(HostClock::new(Pace::HOST)));
        let target = log();
        let late = timers.timer(weak(&target));
        let soon = timers.timer(weak(&target));
        let thread = timers.spawn().unwrap();
        late.arm(timers.now() + 3_600_000_000_000);
        thread::sleep(Duration::from_millis(20));
        soon.arm(timers.now() + 2_000_000);
        let start = Instant::now();
        while target.0.lock().unwrap().is_empty() {
            assert!(start.elapsed() < Duration::from_secs(10), "never fired");
            thread::sleep(Duration::from_millis(1));
        }
        drop(thread);
        assert_eq!(target.0.lock().unwrap().len(), 1);
    }
}
