//! Sets of vectors (IRR, ISR, TMR) and the priorities that decide what is delivered.

use std::sync::atomic::{AtomicU32, Ordering};

use super::Apic;
use super::delivery::DeliveryMode;
use super::register::{Lvt, MASKED};

/// 256 bits that any thread may set and clear.
#[derive(Default)]
pub(super) struct VectorSet([AtomicU32; 8]);

impl VectorSet {
    fn bit(vector: u8) -> u32 {
        1 << (vector % 32)
    }

    /// Adds `vector`; false when it was there.
    pub fn insert(&self, vector: u8) -> bool {
        let bit = Self::bit(vector);
        self.0[usize::from(vector / 32)].fetch_or(bit, Ordering::SeqCst) & bit == 0
    }

    /// Takes `vector` out; false when it was not there.
    pub fn remove(&self, vector: u8) -> bool {
        let bit = Self::bit(vector);
        self.0[usize::from(vector / 32)].fetch_and(!bit, Ordering::SeqCst) & bit != 0
    }

    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 32)].load(Ordering::SeqCst) & Self::bit(vector) != 0
    }

    pub fn highest(&self) -> Option<u8> {
        (0..8u8).rev().find_map(|word| {
            let bits = self.word(word);
            (bits != 0).then(|| word * 32 + bits.ilog2() as u8)
        })
    }

    /// Vectors `32 * index` and up, as the registers show them.
    pub fn word(&self, index: u8) -> u32 {
        self.0[usize::from(index % 8)].load(Ordering::SeqCst)
    }

    pub fn clear_all(&self) {
        for word in &self.0 {
            word.store(0, Ordering::SeqCst);
        }
    }
}

impl Apic {
    /// PPR: the task priority or the class in service, whichever is higher.
    pub(super) fn processor_priority(&self) -> u8 {
        let task = self.task_priority.load(Ordering::SeqCst);
        let service = self.in_service.highest().unwrap_or(0);
        if task >> 4 >= service >> 4 {
            task
        } else {
            service & 0xf0
        }
    }

    /// The highest request, if its class is above the processor's.
    pub(super) fn deliverable(&self) -> Option<u8> {
        let vector = self.requested.highest()?;
        (vector >> 4 > self.processor_priority() >> 4).then_some(vector)
    }

    /// Whether the 8259's request reaches the VCPU: through LINT0 as ExtINT, or straight to the
    /// INTR pin while the APIC is switched off.
    pub(super) fn external_waits(&self) -> bool {
        if !self.pins[0].load(Ordering::SeqCst) {
            return false;
        }
        let lint0 = self.lvt(Lvt::Lint0);
        self.mode() == super::base::Mode::Disabled
            || lint0 & MASKED == 0 && DeliveryMode::of(lint0) == Some(DeliveryMode::ExtInt)
    }

    /// TPR.
    pub(super) fn set_task_priority(&self, priority: u8) {
        self.task_priority.store(priority, Ordering::SeqCst);
        self.announce();
    }

    /// Signals the VCPU if an interrupt could be taken.
    pub(super) fn announce(&self) {
        if self.deliverable().is_some() || self.external_waits() {
            self.signals.interrupt();
        }
    }
}
