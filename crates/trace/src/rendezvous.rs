//! Where an actor meets its consumers: holding them at instruction boundaries, and waiting for
//! their acknowledgements.
//!
//! Only the lane's owner holds, so one word says who is held, and a VCPU that sleeps costs its
//! actor no more than a look.
//!
//! # Orderings
//! See [`crate::mailbox`]. The owner that waits for a VCPU sets `owner_asleep` and then looks at
//! the VCPU; a VCPU that stops or takes its queue says so and then looks at `owner_asleep`.

use crate::mailbox::Mailbox;
use crate::sync::{AtomicBool, AtomicU64, Condvar, Mutex, Ordering::SeqCst, SPINS, lock, relax};
use crate::vcpu::{VcpuId, VcpuSet};

/// All VCPUs' ends of the protocol.
#[derive(Debug)]
pub struct Rendezvous {
    mailboxes: Box<[Mailbox]>,
    /// Who must not leave an instruction boundary. Written by the lane's owner only.
    held: AtomicU64,
    /// The lane's owner sleeps until a VCPU stops or takes its queue.
    waiting: Mutex<()>,
    acknowledged: Condvar,
    owner_asleep: AtomicBool,
}

/// Keeps VCPUs at an instruction boundary until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it lets them go on"]
pub struct Held<'a> {
    rendezvous: &'a Rendezvous,
    vcpus: VcpuSet,
    /// Who ran and was waited for.
    pub waited_for: VcpuSet,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.vcpus.is_empty() {
            return;
        }
        self.rendezvous.held.store(0, SeqCst);
        for vcpu in self.vcpus.iter() {
            self.rendezvous.mailbox(vcpu).go_on();
        }
    }
}

impl Rendezvous {
    pub fn new(vcpus: usize) -> Self {
        Self {
            mailboxes: (0..vcpus).map(|_| Mailbox::default()).collect(),
            held: AtomicU64::new(0),
            waiting: Mutex::new(()),
            acknowledged: Condvar::new(),
            owner_asleep: AtomicBool::new(false),
        }
    }

    pub fn mailbox(&self, vcpu: VcpuId) -> &Mailbox {
        &self.mailboxes[vcpu.index() % self.mailboxes.len()]
    }

    pub fn all(&self) -> VcpuSet {
        VcpuSet::first(self.mailboxes.len())
    }

    /// Lane owner's side: brings `vcpus` to an instruction boundary and keeps them there. It holds
    /// nobody yet.
    pub fn hold(&self, vcpus: VcpuSet) -> Held<'_> {
        let mut held = Held {
            rendezvous: self,
            vcpus,
            waited_for: VcpuSet::EMPTY,
        };
        if vcpus.is_empty() {
            return held;
        }
        self.held.store(vcpus.bits(), SeqCst);
        held.waited_for = self.wait_for(vcpus, Mailbox::is_stopped);
        held
    }

    /// Lane owner's side: waits until each of `vcpus` has taken out what is in its queue, or is at
    /// an instruction boundary and so takes it out before its next instruction. Who was waited
    /// for.
    pub fn wait_acknowledged(&self, vcpus: VcpuSet) -> VcpuSet {
        self.wait_for(vcpus, Mailbox::has_acknowledged)
    }

    fn wait_for(&self, vcpus: VcpuSet, there: fn(&Mailbox) -> bool) -> VcpuSet {
        let late: VcpuSet = vcpus
            .iter()
            .filter(|vcpu| !there(self.mailbox(*vcpu)))
            .collect();
        for vcpu in late.iter() {
            self.mailbox(vcpu).ask();
        }
        for vcpu in late.iter() {
            self.owner_waits(|| there(self.mailbox(vcpu)));
        }
        late
    }

    /// Waits until `done`, which a VCPU makes true before it calls [`Self::tell_owner`].
    pub fn owner_waits(&self, done: impl Fn() -> bool) {
        for _ in 0..SPINS {
            if done() {
                return;
            }
            relax();
        }
        let mut guard = lock(&self.waiting);
        self.owner_asleep.store(true, SeqCst);
        while !done() {
            guard = self
                .acknowledged
                .wait(guard)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        self.owner_asleep.store(false, SeqCst);
        drop(guard);
    }

    /// VCPU's side: it has stopped or taken its queue.
    pub fn tell_owner(&self) {
        if self.owner_asleep.load(SeqCst) {
            drop(lock(&self.waiting));
            self.acknowledged.notify_all();
        }
    }

    pub fn is_held(&self, vcpu: VcpuId) -> bool {
        VcpuSet::from_bits(self.held.load(SeqCst)).contains(vcpu)
    }

    /// VCPU's side: it is at an instruction boundary and executes nothing until [`Self::start`].
    pub fn stop(&self, vcpu: VcpuId) {
        self.mailbox(vcpu).stop_running();
        self.tell_owner();
    }

    /// VCPU's side: goes on as soon as nobody holds it; whether it had to wait for that.
    pub fn start(&self, vcpu: VcpuId) -> bool {
        let mailbox = self.mailbox(vcpu);
        let mut stalled = false;
        loop {
            mailbox.start_running();
            if !self.is_held(vcpu) {
                return stalled;
            }
            stalled = true;
            self.stop(vcpu);
            mailbox.stall(&|| self.is_held(vcpu));
        }
    }

    /// VCPU's side, while it has the lane: nobody can hold it.
    pub fn start_in_lane(&self, vcpu: VcpuId) {
        debug_assert!(!self.is_held(vcpu));
        self.mailbox(vcpu).start_running();
    }
}
