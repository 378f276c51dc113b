//! What reaches one VCPU: its attention word, its run state and its queue of notices.
//!
//! # Orderings
//! Three handshakes decide everything, all of the form "store mine, then look at the other's", so
//! both sides use sequentially consistent operations: of two that store and then look, at least
//! one sees the other's store.
//!
//! - *held* (in [`crate::rendezvous`]) and *running*: an actor says whom it holds, then looks at
//!   `running`; a VCPU that goes on sets `running`, then looks whether it is held. So either the
//!   actor waits or the VCPU stays where it is.
//! - *attention* and *running*: an actor queues a notice and sets the bit, then looks at `running`;
//!   a VCPU that goes on sets `running`, then looks at the word. So an actor that finds a VCPU not
//!   running need not wait for it: it finds the notice before its next instruction.
//! - *attention* and *asleep*: whoever raises a bit sets it, then looks at `asleep`; a VCPU that
//!   goes to sleep sets `asleep`, then looks at the word. So no wake-up is lost.
//!
//! The word's poll at instruction boundaries is a relaxed load: seeing a bit late only means
//! acknowledging late.
//!
//! # Locks
//! `taken_out`, then `queue`; `queue` and the one of [`Travelling`] are leaves: nothing is called
//! and no other lock is taken under them. Only the VCPU's own thread takes `taken_out`; the handler of its notices runs under it.

use std::time::Instant;

use crate::delay::Travelling;
use crate::notice::Notice;
use crate::sync::{
    AtomicBool, AtomicU8, AtomicU32, AtomicU64, Condvar, Mutex, Ordering::Relaxed,
    Ordering::SeqCst, SPINS, lock, relax,
};

/// The attention bit of this crate; the others are free for the layers above.
pub const TRACE: u32 = 1;

/// A sleeper whose queue has grown this long is woken to empty it, so that a guest cannot make the
/// queue grow for ever.
pub const WAKE_AT: usize = 256;
/// A queue that grew longer than this gives its memory back when it is empty again.
const KEEP: usize = 4 * WAKE_AT;

/// One VCPU's word of attention. Polled with one relaxed load.
#[derive(Debug, Default)]
pub struct Attention(AtomicU32);

impl Attention {
    /// Whether any bit is set.
    #[inline(always)]
    pub fn pending(&self) -> bool {
        self.0.load(Relaxed) != 0
    }

    /// The word, for generated code that polls it by itself.
    #[cfg(not(feature = "shuttle"))]
    pub fn as_ptr(&self) -> *const u32 {
        self.0.as_ptr()
    }

    /// Clears the bits of `mask`; those that were set.
    pub fn take(&self, mask: u32) -> u32 {
        self.0.fetch_and(!mask, SeqCst) & mask
    }

    fn set(&self, bits: u32) {
        self.0.fetch_or(bits, SeqCst);
    }

    fn has(&self, bits: u32) -> bool {
        self.0.load(SeqCst) & bits != 0
    }
}

/// Values of [`Mailbox::asleep`].
mod asleep {
    pub const AWAKE: u8 = 0;
    /// Halted, until an attention bit is set.
    pub const HALTED: u8 = 1;
    /// Stalled, until the actor lets it go on.
    pub const STALLED: u8 = 2;
}

/// One VCPU's end of the protocol. On cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Mailbox {
    pub attention: Attention,
    /// Executes guest instructions, or will without further asking. Clear: at an instruction
    /// boundary (halted, waiting, stalled, not started).
    running: AtomicBool,
    /// Waits on `wake`, and what for.
    asleep: AtomicU8,
    /// Notices that were ever queued; written by the lane's owner only.
    posted: AtomicU64,
    /// How many of these its VCPU has taken out of the queue.
    taken: AtomicU64,
    queue: Mutex<Vec<Notice>>,
    /// The notices that are being handled; empty in between. Changes places with `queue`, so that
    /// neither allocates again.
    taken_out: Mutex<Vec<Notice>>,
    travelling: Travelling,
    wake: Condvar,
}

impl Mailbox {
    /// Sets attention bits and wakes a sleeper.
    pub fn raise(&self, bits: u32) {
        self.attention.set(bits);
        if self.asleep.load(SeqCst) != asleep::AWAKE {
            self.wake_up();
        }
    }

    fn wake_up(&self) {
        // The sleeper looks and waits under the lock, so after this it is not in between.
        drop(lock(&self.queue));
        self.wake.notify_all();
    }

    /// Lane owner's side: queues a notice. Sleepers are left asleep: they are at a boundary and
    /// look before they go on.
    pub fn post(&self, notice: Notice, silently: bool) {
        let length = {
            let mut queue = lock(&self.queue);
            queue.push(notice);
            // Under the lock, so that who takes the queue out knows how much it took.
            self.posted.store(self.posted.load(Relaxed) + 1, Relaxed);
            queue.len()
        };
        // The bit is cleared before the queue is taken out. So if it is set here, after the lock,
        // it announces this notice too.
        if !silently && !self.attention.has(TRACE) {
            self.attention.set(TRACE);
        }
        if length >= WAKE_AT && self.asleep.load(SeqCst) == asleep::HALTED {
            self.wake_up();
        }
    }

    /// As [`Self::post`], but the notice is found only once it is due.
    pub fn post_late(&self, due: Instant, notice: Notice) {
        self.travelling.post(due, notice);
        self.attention.set(TRACE);
    }

    /// Hands every queued notice to `handler`; whether there was any. The caller clears the
    /// attention bit first, so a notice that comes meanwhile sets it again. Notices that travel
    /// are found if they are due, or if the VCPU must `settle`. `taken` is called when the others
    /// are out of the queue and not yet handled: that is the acknowledgement.
    pub fn drain(&self, settle: bool, handler: &mut dyn FnMut(Notice), taken: &dyn Fn()) -> bool {
        let (arrived, others) = self.travelling.take(settle);
        if others {
            self.attention.set(TRACE);
        }
        let mut out = lock(&self.taken_out);
        {
            let mut queue = lock(&self.queue);
            if queue.is_empty() && arrived.is_empty() {
                return false;
            }
            std::mem::swap(&mut *out, &mut *queue);
            self.taken.store(self.posted.load(Relaxed), SeqCst);
        }
        taken();
        out.drain(..).chain(arrived).for_each(handler);
        if out.capacity() > KEEP {
            out.shrink_to(0);
        }
        true
    }

    /// Whether the VCPU is at an instruction boundary.
    pub fn is_stopped(&self) -> bool {
        !self.running.load(SeqCst)
    }

    /// Lane owner's side: whether the VCPU has acknowledged everything that was queued.
    pub fn has_acknowledged(&self) -> bool {
        self.taken.load(SeqCst) == self.posted.load(Relaxed) || self.is_stopped()
    }

    /// Actor's side: a stalled VCPU that is no longer held may go on.
    pub fn go_on(&self) {
        if self.asleep.load(SeqCst) == asleep::STALLED {
            self.wake_up();
        }
    }

    /// Actor's side: asks a running VCPU for an acknowledgement.
    pub fn ask(&self) {
        if !self.attention.has(TRACE) {
            self.attention.set(TRACE);
        }
    }

    /// VCPU's side: declares that it is at an instruction boundary and stays there.
    pub fn stop_running(&self) {
        self.running.store(false, SeqCst);
    }

    /// VCPU's side: goes on; the caller looks afterwards whether it is held.
    pub fn start_running(&self) {
        self.running.store(true, SeqCst);
    }

    /// VCPU's side, stopped: waits until `held` is false.
    pub fn stall(&self, held: &dyn Fn() -> bool) {
        for _ in 0..SPINS {
            if !held() {
                return;
            }
            relax();
        }
        let mut queue = lock(&self.queue);
        self.asleep.store(asleep::STALLED, SeqCst);
        while held() {
            queue = self
                .wake
                .wait(queue)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        self.asleep.store(asleep::AWAKE, SeqCst);
        drop(queue);
    }

    /// VCPU's side, stopped: sleeps until an attention bit other than [`TRACE`] is set, the queue
    /// is long or `until` has passed.
    pub fn sleep(&self, until: Option<Instant>) {
        let mut queue = lock(&self.queue);
        self.asleep.store(asleep::HALTED, SeqCst);
        while !self.attention.has(!TRACE) && queue.len() < WAKE_AT {
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
        self.asleep.store(asleep::AWAKE, SeqCst);
        drop(queue);
    }
}
