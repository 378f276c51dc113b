//! The local timer: one-shot, periodic and TSC-deadline.
//!
//! The timer service may call long after a count has ended. Its end is an event of its time all
//! the same: whatever the guest does to the timer or its entry comes after it, so each such access
//! first carries out an end that has passed ([`Apic::settle`]). Otherwise a count that ended masked
//! could interrupt after the guest has unmasked it.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, Weak};

use super::register::{Lvt, MASKED};
use super::{Apic, LocalApics};
use crate::clock::scale_up;
use crate::lock;
use crate::timer::TimerTarget;

/// What the counter counts before division, in Hz. A guest that finds a crystal frequency in CPUID
/// leaf 15h takes it for this one, so they must agree.
pub const BUS_FREQUENCY: u64 = 1_000_000_000;

/// The length of one tick of [`BUS_FREQUENCY`] in nanoseconds.
const TICK: u64 = 1_000_000_000 / BUS_FREQUENCY;

/// A periodic timer fires no oftener than this many nanoseconds, whatever the guest writes: more
/// interrupts could not be taken, and the host would only burn its time.
const SHORTEST_PERIOD: u64 = 50_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl TimerMode {
    fn of(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

/// What the timer counts towards.
#[derive(Default)]
pub(super) struct Countdown {
    initial: u32,
    divide: u32,
    /// When the count reaches zero (nanoseconds), or `None` while it stands still.
    expiry: Option<u64>,
    /// IA32_TSC_DEADLINE; zero when disarmed.
    tsc_deadline: u64,
}

impl Countdown {
    fn divisor(&self) -> u64 {
        let code = (self.divide >> 1 & 4) | (self.divide & 3);
        1 << ((code + 1) & 7)
    }

    /// The time in nanoseconds of a full count.
    fn period(&self) -> u64 {
        u64::from(self.initial) * self.divisor() * TICK
    }

    fn remaining(&self, now: u64, mode: TimerMode) -> u32 {
        let Some(expiry) = self.expiry else {
            return 0;
        };
        let left = match (expiry.checked_sub(now), mode) {
            (Some(left), _) => left,
            // Late, and already counting the next period.
            (None, TimerMode::Periodic) => {
                let period = self.period().max(1);
                period - (now - expiry) % period
            }
            (None, _) => 0,
        };
        u32::try_from(left.div_ceil(self.divisor() * TICK))
            .unwrap_or(u32::MAX)
            .min(self.initial)
    }
}

/// The end of one VCPU's countdown, as the timer service sees it.
pub(super) struct Expiry {
    apics: Weak<LocalApics>,
    vcpu: usize,
}

impl Expiry {
    pub fn new(apics: Weak<LocalApics>, vcpu: usize) -> Self {
        Self { apics, vcpu }
    }
}

impl TimerTarget for Expiry {
    fn expired(&self, now: u64) {
        if let Some(apics) = self.apics.upgrade()
            && let Some(apic) = apics.apic(self.vcpu)
        {
            apic.count_ended(now);
        }
    }
}

impl Apic {
    fn timer_mode(&self) -> TimerMode {
        TimerMode::of(self.lvt(Lvt::Timer))
    }

    pub(super) fn initial_count(&self) -> u32 {
        lock(&self.timer).initial
    }

    pub(super) fn current_count(&self, now: u64) -> u32 {
        match self.timer_mode() {
            TimerMode::OneShot => self.settled(now).remaining(now, TimerMode::OneShot),
            // Reading must not make interrupts more frequent than they are bound to be.
            TimerMode::Periodic => lock(&self.timer).remaining(now, TimerMode::Periodic),
            _ => 0,
        }
    }

    pub(super) fn divide_configuration(&self) -> u32 {
        lock(&self.timer).divide
    }

    pub(super) fn set_initial_count(&self, count: u32, now: u64) {
        let mut timer = self.settled(now);
        if self.timer_mode() == TimerMode::TscDeadline {
            return;
        }
        timer.initial = count;
        timer.expiry = (count != 0).then(|| now.saturating_add(timer.period()));
        self.arm(&timer, now);
    }

    /// A running count goes on at the new rate from where it is.
    pub(super) fn set_divide_configuration(&self, divide: u32, now: u64) {
        let mut timer = self.settled(now);
        let mode = self.timer_mode();
        let remaining = u64::from(timer.remaining(now, mode));
        timer.divide = divide & 0xb;
        if timer.expiry.is_some() && mode != TimerMode::TscDeadline {
            timer.expiry = Some(now.saturating_add(remaining * timer.divisor() * TICK));
            self.arm(&timer, now);
        }
    }

    /// IA32_TSC_DEADLINE, which reads as zero outside its mode and after it fired.
    pub(super) fn tsc_deadline(&self, now: u64) -> u64 {
        self.settled(now).tsc_deadline
    }

    /// Zero disarms; a deadline that `tsc` has reached fires at once.
    pub(super) fn set_tsc_deadline(&self, deadline: u64, tsc: u64, now: u64, frequency: u64) {
        let mut timer = self.settled(now);
        if self.timer_mode() != TimerMode::TscDeadline {
            return;
        }
        if deadline != 0 && deadline <= tsc {
            timer.tsc_deadline = 0;
            timer.expiry = None;
            self.deadline.cancel();
            self.local_event(Lvt::Timer);
            return;
        }
        timer.tsc_deadline = deadline;
        timer.expiry = (deadline != 0)
            .then(|| now.saturating_add(scale_up(deadline - tsc, 1_000_000_000, frequency)));
        self.arm(&timer, now);
    }

    /// Writes the timer's entry. Going into or out of TSC-deadline mode disarms the timer.
    pub(super) fn write_timer_entry(&self, value: u32, now: u64) {
        let mut timer = self.settled(now);
        let (old, new) = (self.timer_mode(), TimerMode::of(value));
        self.set_lvt(Lvt::Timer, value);
        let counts = |mode| matches!(mode, TimerMode::OneShot | TimerMode::Periodic);
        if old != new && !(counts(old) && counts(new)) {
            timer.expiry = None;
            timer.initial = 0;
            timer.tsc_deadline = 0;
            self.deadline.cancel();
        }
    }

    /// The APIC is disabled by software: every entry becomes masked.
    pub(super) fn mask_all(&self, now: u64) {
        let _timer = self.settled(now);
        for lvt in &self.lvt {
            lvt.fetch_or(MASKED, Ordering::SeqCst);
        }
    }

    fn count_ended(&self, now: u64) {
        drop(self.settled(now));
    }

    /// The timer, of whose counts none has ended unnoticed before `now`.
    fn settled(&self, now: u64) -> MutexGuard<'_, Countdown> {
        let mut timer = lock(&self.timer);
        self.settle(&mut timer, now);
        timer
    }

    fn settle(&self, timer: &mut Countdown, now: u64) {
        let Some(expiry) = timer.expiry.filter(|&expiry| expiry <= now) else {
            return;
        };
        timer.tsc_deadline = 0;
        timer.expiry = match self.timer_mode() {
            TimerMode::Periodic => {
                // Periods that went by unseen are one interrupt: the request bit holds no more.
                let period = timer.period().max(1);
                let late = (now - expiry) / period;
                Some(expiry.saturating_add(period.saturating_mul(late + 1)))
            }
            _ => None,
        };
        self.arm(timer, now);
        self.local_event(Lvt::Timer);
    }

    fn arm(&self, timer: &Countdown, now: u64) {
        match timer.expiry {
            Some(expiry) if self.timer_mode() == TimerMode::Periodic => {
                let soonest = now.saturating_add(SHORTEST_PERIOD);
                self.deadline.arm(expiry.max(soonest));
            }
            Some(expiry) => self.deadline.arm(expiry),
            None => self.deadline.cancel(),
        }
    }
}
