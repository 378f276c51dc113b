//! Page attributes: which accesses to a page are sensed, and which VCPUs may access it directly.
//!
//! # Orderings
//! Establishing a trace stores the attribute and then reads the holders; taking direct access
//! stores the holder and then reads the attribute. All of it is sequentially consistent, so of the
//! two at least one sees the other: either the VCPU finds the page sensed, or the establisher finds
//! the VCPU among the holders and has it give up its access. No locks.
//!
//! Who writes *beside* traces, to bytes of a sensed page that none covers, looks at the traces
//! themselves under the trace subsystem's lock of them ([`trapline_trace::TraceSystem::untraced`])
//! and is noted while it has that lock. Establishing adds the trace and reads who is noted under the
//! same lock, exclusively: so it finds the VCPU, or the VCPU finds the trace.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::SeqCst};

use trapline_trace::{Sense, VcpuId, VcpuSet};

const READ: u8 = 1;
const WRITE: u8 = 2;

fn bits(sense: Sense) -> u8 {
    (u8::from(sense.read) * READ) | (u8::from(sense.write) * WRITE)
}

/// Attributes of all pages of RAM, by page index.
pub struct Pages {
    sensed: Box<[AtomicU8]>,
    readers: Box<[AtomicU64]>,
    writers: Box<[AtomicU64]>,
    /// VCPUs that may write some bytes directly though writes to the page are sensed.
    beside: Box<[AtomicU64]>,
}

impl Pages {
    pub fn new(count: usize) -> Self {
        let zeros = || (0..count).map(|_| AtomicU64::new(0)).collect();
        Self {
            sensed: (0..count).map(|_| AtomicU8::new(0)).collect(),
            readers: zeros(),
            writers: zeros(),
            beside: zeros(),
        }
    }

    /// Senses accesses of these kinds; the VCPUs that may hold direct access of such a kind.
    pub fn protect(&self, page: usize, sense: Sense) -> VcpuSet {
        let Some(sensed) = self.sensed.get(page) else {
            return VcpuSet::EMPTY;
        };
        let fresh = bits(sense) & !sensed.fetch_or(bits(sense), SeqCst);
        let mut holders = 0;
        if fresh & READ != 0 {
            holders |= self.readers[page].load(SeqCst);
        }
        if fresh & WRITE != 0 {
            holders |= self.writers[page].load(SeqCst);
        }
        if sense.write {
            // Whoever writes between traces may do so where a trace is set now.
            holders |= self.beside[page].load(SeqCst);
        }
        VcpuSet::from_bits(holders)
    }

    /// Senses only accesses of these kinds any more.
    pub fn relax(&self, page: usize, sense: Sense) {
        if let Some(sensed) = self.sensed.get(page) {
            sensed.store(bits(sense), SeqCst);
        }
    }

    /// Takes direct access for a VCPU; whether it may have it.
    pub fn hold(&self, page: usize, vcpu: VcpuId, sense: Sense) -> bool {
        let Some(sensed) = self.sensed.get(page) else {
            return false;
        };
        let bit = VcpuSet::one(vcpu).bits();
        let mut had = u64::MAX;
        if sense.read {
            had &= self.readers[page].fetch_or(bit, SeqCst);
        }
        if sense.write {
            had &= self.writers[page].fetch_or(bit, SeqCst);
        }
        if sensed.load(SeqCst) & bits(sense) == 0 {
            return true;
        }
        // Only this VCPU sets its bit, so taking back what it just set races with nobody. A bit
        // that was set before belongs to a translation whose revocation is under way.
        if had & bit == 0 {
            self.give_up(page, vcpu, sense);
        }
        false
    }

    /// A VCPU will write bytes of the page directly that no trace covers, though the page is
    /// sensed. The caller makes sure that this comes before any further trace on the page.
    pub fn hold_beside(&self, page: usize, vcpu: VcpuId) -> bool {
        let Some(beside) = self.beside.get(page) else {
            return false;
        };
        beside.fetch_or(VcpuSet::one(vcpu).bits(), SeqCst);
        true
    }

    /// The VCPU has dropped its direct translations of the page.
    pub fn release(&self, page: usize, vcpu: VcpuId, sense: Sense) {
        self.give_up(page, vcpu, sense);
        if let Some(beside) = self.beside.get(page).filter(|_| sense.write) {
            beside.fetch_and(!VcpuSet::one(vcpu).bits(), SeqCst);
        }
    }

    fn give_up(&self, page: usize, vcpu: VcpuId, sense: Sense) {
        if page >= self.sensed.len() {
            return;
        }
        let mask = !VcpuSet::one(vcpu).bits();
        if sense.read {
            self.readers[page].fetch_and(mask, SeqCst);
        }
        if sense.write {
            self.writers[page].fetch_and(mask, SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: VcpuId = VcpuId::new(0);
    const B: VcpuId = VcpuId::new(5);

    #[test]
    fn holders_are_told_once() {
        let pages = Pages::new(4);
        assert!(pages.hold(1, A, Sense::WRITE));
        assert!(pages.hold(1, B, Sense::READ));
        assert_eq!(pages.protect(1, Sense::WRITE), VcpuSet::one(A));
        assert_eq!(pages.protect(1, Sense::WRITE), VcpuSet::EMPTY);
        assert!(!pages.hold(1, B, Sense::WRITE));
        assert!(pages.hold(1, B, Sense::READ));
        assert!(pages.hold(2, B, Sense::WRITE));
    }

    #[test]
    fn a_refused_hold_leaves_no_holder() {
        let pages = Pages::new(1);
        pages.protect(0, Sense::WRITE);
        assert!(!pages.hold(0, A, Sense::WRITE));
        pages.relax(0, Sense::default());
        assert_eq!(pages.protect(0, Sense::WRITE), VcpuSet::EMPTY);
    }

    #[test]
    fn a_hold_under_revocation_stays_until_released() {
        let pages = Pages::new(1);
        assert!(pages.hold(0, A, Sense::WRITE));
        pages.protect(0, Sense::WRITE);
        assert!(!pages.hold(0, A, Sense::WRITE));
        pages.relax(0, Sense::default());
        assert_eq!(pages.protect(0, Sense::WRITE), VcpuSet::one(A));
        pages.release(0, A, Sense::WRITE);
        pages.relax(0, Sense::default());
        assert_eq!(pages.protect(0, Sense::WRITE), VcpuSet::EMPTY);
    }

    #[test]
    fn who_writes_beside_traces_is_told_of_each_new_one() {
        let pages = Pages::new(1);
        pages.protect(0, Sense::WRITE);
        assert!(pages.hold_beside(0, A));
        assert!(!pages.hold(0, A, Sense::WRITE));
        assert_eq!(pages.protect(0, Sense::WRITE), VcpuSet::one(A));
        pages.release(0, A, Sense::READ);
        assert_eq!(pages.protect(0, Sense::WRITE), VcpuSet::one(A));
        pages.release(0, A, Sense::WRITE);
        assert_eq!(pages.protect(0, Sense::WRITE), VcpuSet::EMPTY);
        assert!(!pages.hold_beside(1, A));
    }

    #[test]
    fn pages_outside_are_never_direct() {
        let pages = Pages::new(1);
        assert!(!pages.hold(1, A, Sense::READ));
        assert_eq!(pages.protect(9, Sense::BOTH), VcpuSet::EMPTY);
        pages.release(9, A, Sense::BOTH);
        pages.relax(9, Sense::BOTH);
    }
}
