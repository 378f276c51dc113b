//! Whether traces on a page of descriptor tables pay.
//!
//! A look-up that a shadow answers saves little; a store to a page with a trace on it goes through
//! the trace subsystem, even beside the traced bytes, and costs as much as many look-ups save. Task
//! registers and thread-local segments share their pages with what an operating system writes at
//! every switch of threads.

use super::Key;

/// Look-ups that pay for one sensed store (docs/coherence.md has the measurement).
const HITS_PER_WRITE: u32 = 64;
/// Stores in a row that were not paid for, after which the page rests.
const PATIENCE: u32 = 8;
/// Look-ups for which a page rests the first time; each time twice as long.
const FIRST_REST: u32 = 1 << 12;
/// How often the rest is doubled.
const DOUBLINGS: u32 = 10;

/// A page of guest memory with entries of shadow tables, or without because it rests.
#[derive(Default)]
pub struct Page {
    pub keys: Vec<Key>,
    /// Since the last store.
    hits: u32,
    /// Stores in a row with too few look-ups between them.
    unpaid: u32,
    /// Look-ups for which the page still rests.
    rest: u32,
    rests: u32,
}

impl Page {
    pub fn rests(&self) -> bool {
        self.rest > 0
    }

    /// A shadow answered.
    #[inline]
    pub fn hit(&mut self) {
        self.hits = self.hits.saturating_add(1);
    }

    /// A look-up while it rests; whether the rest ends with it.
    #[inline]
    pub fn passed_by(&mut self) -> bool {
        self.rest = self.rest.saturating_sub(1);
        self.rest == 0
    }

    /// A sensed store; whether the page rests from now on.
    pub fn written(&mut self) -> bool {
        if self.rests() {
            return false;
        }
        self.unpaid = if self.hits < HITS_PER_WRITE {
            self.unpaid + 1
        } else {
            0
        };
        self.hits = 0;
        if self.unpaid < PATIENCE {
            return false;
        }
        self.unpaid = 0;
        self.rest = FIRST_REST << self.rests.min(DOUBLINGS);
        self.rests = self.rests.saturating_add(1);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_written_often_rests_longer_each_time() {
        let mut page = Page::default();
        for rest in [FIRST_REST, 2 * FIRST_REST] {
            for _ in 1..PATIENCE {
                assert!(!page.written());
            }
            assert!(page.written());
            assert!(page.rests());
            assert!(!page.written());
            for _ in 1..rest {
                assert!(!page.passed_by());
            }
            assert!(page.passed_by());
            assert!(!page.rests());
        }
    }

    #[test]
    fn look_ups_pay_for_writes() {
        let mut page = Page::default();
        for _ in 0..10 * PATIENCE {
            for _ in 0..HITS_PER_WRITE {
                page.hit();
            }
            assert!(!page.written());
        }
        for _ in 1..PATIENCE {
            assert!(!page.written());
        }
        for _ in 0..HITS_PER_WRITE {
            page.hit();
        }
        assert!(!page.written());
        assert!(!page.written());
    }
}
