//! What reaches one VCPU: its attention word, its run state and its queue of notices.
//!
//! # Orderings
//! Two handshakes decide everything, both of the form "store mine, then look at the other's", so
//! both sides use sequentially consistent operations: of two VCPUs that store and then look, at
//! least one sees the other's store.
//!
//! - *hold* and *running*: an actor sets `held`, then looks at `running`; a VCPU that goes on sets
//!   `running`, then looks at `held`. So either the actor waits or the VCPU stays where it is.
//! - *attention* and *asleep*: whoever raises a bit sets it, then looks at `asleep`; a VCPU that
//!   goes to sleep sets `asleep`, then looks at the word. So no wake-up is lost.
//!
//! The word's poll at instruction boundaries is a relaxed load: seeing a bit late only means
//! acknowledging late.
//!
//! # Locks
//! `queue` is a leaf: nothing is called and no other lock is taken under it.

use std::collections::VecDeque;
use std::time::Instant;

use crate::delay::Travelling;
use crate::kind::{Actor, Kind, Range, Semantics, Sense};
use crate::regions::TraceId;
use crate::sync::{
    AtomicBool, AtomicU32, Condvar, Mutex, Ordering::Relaxed, Ordering::SeqCst, SPINS, lock, relax,
};

/// The attention bit of this crate; the others are free for the layers above.
pub const TRACE: u32 = 1;

/// A sleeper whose queue has grown this long is woken to empty it, so that a guest cannot make the
/// queue grow for ever.
const WAKE_AT: usize = 256;

/// That a traced location was accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notification {
    pub id: TraceId,
    pub kind: Kind,
    pub semantics: Semantics,
    /// The region that was hit.
    pub region: Range,
    pub cookie: u64,
    /// The bytes that were accessed.
    pub written: Range,
    pub actor: Actor,
    /// Counts the events of the machine.
    pub sequence: u64,
}

/// What a VCPU finds in its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    Notification(Notification),
    /// Accesses of these kinds to the page at this guest-physical address are sensed from now on:
    /// drop every direct translation that allows them.
    Revoke {
        page: u64,
        sense: Sense,
    },
}

/// One VCPU's word of attention. Polled with one relaxed load.
#[derive(Debug, Default)]
pub struct Attention(AtomicU32);

impl Attention {
    /// Whether any bit is set.
    #[inline(always)]
    pub fn pending(&self) -> bool {
        self.0.load(Relaxed) != 0
    }

    /// Clears the bits of `mask`; those that were set.
    pub fn take(&self, mask: u32) -> u32 {
        self.0.fetch_and(!mask, SeqCst) & mask
    }
}

/// One VCPU's end of the protocol.
#[derive(Debug, Default)]
pub struct Mailbox {
    pub attention: Attention,
    /// Executes guest instructions, or will without further asking. Clear: at an instruction
    /// boundary (halted, waiting, stalled, not started).
    running: AtomicBool,
    /// An actor or establisher wants it at an instruction boundary until further notice.
    held: AtomicBool,
    /// Waits on `wake`.
    asleep: AtomicBool,
    queue: Mutex<VecDeque<Notice>>,
    travelling: Travelling,
    wake: Condvar,
}

impl Mailbox {
    /// Sets attention bits and wakes a sleeper.
    pub fn raise(&self, bits: u32) {
        self.attention.0.fetch_or(bits, SeqCst);
        self.wake_up();
    }

    fn wake_up(&self) {
        if self.asleep.load(SeqCst) {
            // The sleeper looks and waits under the lock, so after this it is not in between.
            drop(lock(&self.queue));
            self.wake.notify_all();
        }
    }

    /// Queues a notice. Sleepers are left asleep: they are at a boundary and look before they go
    /// on.
    pub fn post(&self, notice: Notice) {
        let length = {
            let mut queue = lock(&self.queue);
            queue.push_back(notice);
            queue.len()
        };
        self.attention.0.fetch_or(TRACE, SeqCst);
        if length >= WAKE_AT {
            self.wake_up();
        }
    }

    /// As [`Self::post`], but the notice is found only once it is due.
    pub fn post_late(&self, due: Instant, notice: Notice) {
        self.travelling.post(due, notice);
        self.attention.0.fetch_or(TRACE, SeqCst);
    }

    /// Hands every queued notice to `handler`; whether there was any. The caller clears the
    /// attention bit first, so a notice that comes meanwhile sets it again. Notices that travel
    /// are found if they are due, or if the VCPU must `settle`.
    pub fn drain(&self, settle: bool, handler: &mut dyn FnMut(Notice)) -> bool {
        let (arrived, others) = self.travelling.take(settle);
        if others {
            self.attention.0.fetch_or(TRACE, SeqCst);
        }
        let notices = std::mem::take(&mut *lock(&self.queue));
        let any = !notices.is_empty() || !arrived.is_empty();
        notices.into_iter().chain(arrived).for_each(handler);
        any
    }

    pub fn is_running(&self) -> bool {
        self.running.load(SeqCst)
    }

    pub fn is_held(&self) -> bool {
        self.held.load(SeqCst)
    }

    /// Actor's side: from now on the VCPU does not leave an instruction boundary.
    pub fn hold(&self) {
        self.held.store(true, SeqCst);
        self.attention.0.fetch_or(TRACE, SeqCst);
    }

    /// Actor's side: the VCPU may go on.
    pub fn release(&self) {
        self.held.store(false, SeqCst);
        self.wake_up();
    }

    /// VCPU's side: declares that it is at an instruction boundary and stays there.
    pub fn stop_running(&self) {
        self.running.store(false, SeqCst);
    }

    /// VCPU's side: goes on as soon as nobody holds it; whether it had to wait for that.
    /// `acknowledge` is called whenever it has declared itself stopped, for actors that wait.
    pub fn start_running(&self, acknowledge: &dyn Fn()) -> bool {
        let mut stalled = false;
        loop {
            self.running.store(true, SeqCst);
            if !self.held.load(SeqCst) {
                return stalled;
            }
            stalled = true;
            self.running.store(false, SeqCst);
            acknowledge();
            self.wait_released();
        }
    }

    /// VCPU's side, while it has the lane: nobody can hold it.
    pub fn start_running_in_lane(&self) {
        debug_assert!(!self.held.load(SeqCst));
        self.running.store(true, SeqCst);
    }

    fn wait_released(&self) {
        for _ in 0..SPINS {
            if !self.held.load(SeqCst) {
                return;
            }
            relax();
        }
        let mut queue = lock(&self.queue);
        self.asleep.store(true, SeqCst);
        while self.held.load(SeqCst) {
            queue = self
                .wake
                .wait(queue)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        self.asleep.store(false, SeqCst);
        drop(queue);
    }

    /// VCPU's side, stopped: sleeps until an attention bit is set or `until` has passed.
    pub fn sleep(&self, until: Option<Instant>) {
        let mut queue = lock(&self.queue);
        self.asleep.store(true, SeqCst);
        while self.attention.0.load(SeqCst) == 0 {
            queue = match until {
                None => self
                    .wake
                    .wait(queue)
                    .unwrap_or_else(std::sync::PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    let waited = self.wake.wait_timeout(queue, left);
                    waited.unwrap_or_else(std::sync::PoisonError::into_inner).0
                }
            };
        }
        self.asleep.store(false, SeqCst);
        drop(queue);
    }
}
