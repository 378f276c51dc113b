//! A machine's membership in a pool, and what the pool knows of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst};
use std::sync::{Arc, Weak};

use trapline_trace::{TraceSystem, VcpuSet};

use super::pool::SharingPool;
use crate::GuestMemory;

/// The page is the machine's own: writes need no care.
pub const OWN: u8 = 0;
/// A trace is being established, or is there, and the page is not shared yet.
pub const PROTECTING: u8 = 1;
/// The page's bytes are those of a copy.
pub const SHARED: u8 = 2;

/// One machine in a pool; part of its memory.
pub(crate) struct Member {
    pub pool: Arc<SharingPool>,
    pub id: u64,
    /// By page. Stored under the pool's lock, read by writers in the lane.
    pub states: Box<[AtomicU8]>,
    /// Whether there are traces to remove.
    pub released: AtomicBool,
}

impl Member {
    pub fn new(pool: Arc<SharingPool>, id: u64, pages: usize) -> Self {
        Self {
            pool,
            id,
            states: (0..pages).map(|_| AtomicU8::new(OWN)).collect(),
            released: AtomicBool::new(false),
        }
    }

    pub fn state(&self, page: usize) -> u8 {
        self.states.get(page).map_or(OWN, |s| s.load(SeqCst))
    }

    pub fn set_state(&self, page: usize, state: u8) {
        if let Some(s) = self.states.get(page) {
            s.store(state, SeqCst);
        }
    }

    /// Called in the lane before a write to `page`: afterwards it is the machine's own.
    pub fn before_write(&self, memory: &GuestMemory, page: usize) {
        if self.state(page) != OWN {
            self.pool.make_private(memory, self, page);
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.pool.leave(self);
    }
}

/// What a page is mapped to, as a number: a slot, or one of the two below.
pub type Backing = u32;
/// The machine's own file.
pub const FILE: Backing = u32::MAX;
/// Zeros.
pub const ZEROS: Backing = u32::MAX - 1;

/// Whether a page mapped to `b` right behind one mapped to `a` needs no new mapping.
pub fn continues(a: Backing, b: Backing) -> bool {
    if a >= ZEROS { a == b } else { b == a + 1 }
}

/// Counted for one machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemberStatistics {
    /// Pages that the host copied because they were written, and that have not become shared again.
    pub private_pages: u64,
    /// Pages that are mapped to a copy now.
    pub shared_pages: u64,
    /// Pages that are mapped to zeros now.
    pub zero_pages: u64,
    /// Pages that became shared, ever.
    pub merged: u64,
    /// Pages that became private by a write, ever.
    pub unshared_by_write: u64,
    /// Candidates that were written before they could be shared, or turned out to differ.
    pub abandoned: u64,
}

/// What the pool's lock protects of one machine.
pub struct Records {
    pub memory: Weak<GuestMemory>,
    pub trace: Weak<TraceSystem>,
    /// All VCPUs: the consumers of its traces.
    pub everyone: VcpuSet,
    /// What each page's host address is mapped to. A page that became private by a write is still
    /// mapped so, and has been copied by the kernel.
    pub backing: Vec<Backing>,
    /// Own pages that are not in the machine's file.
    pub private: BTreeSet<usize>,
    /// The pages that are protecting or shared, in runs that one trace covers: by the first page, how
    /// many pages, and the trace's cookie, which no other trace of the pool has.
    pub traced: BTreeMap<usize, (usize, u64)>,
    /// Pages to be taken out of the trace with this cookie.
    pub released: Vec<(usize, u64)>,
    pub statistics: MemberStatistics,
}

impl Records {
    pub fn new(
        memory: Weak<GuestMemory>,
        trace: Weak<TraceSystem>,
        everyone: VcpuSet,
        pages: usize,
    ) -> Self {
        Self {
            memory,
            trace,
            everyone,
            backing: vec![FILE; pages],
            private: BTreeSet::new(),
            traced: BTreeMap::new(),
            released: Vec::new(),
            statistics: MemberStatistics::default(),
        }
    }

    /// How many mappings end between the page before `first` and the one behind `end`.
    fn edges(&self, first: usize, end: usize) -> usize {
        let lo = first.saturating_sub(1);
        let hi = (end + 1).min(self.backing.len());
        let around = self.backing.get(lo..hi).unwrap_or_default();
        let pairs = around.windows(2);
        pairs.filter(|pair| !continues(pair[0], pair[1])).count()
    }

    /// All mappings beyond the first.
    pub fn all_edges(&self) -> usize {
        self.edges(0, self.backing.len())
    }

    /// Notes what the pages from `first` on are mapped to. Returns by how much the number of
    /// mappings has grown.
    pub fn set_backing(
        &mut self,
        first: usize,
        count: usize,
        backing: impl Fn(usize) -> Backing,
    ) -> isize {
        let end = first + count;
        let before = self.edges(first, end);
        for page in first..end.min(self.backing.len()) {
            self.backing[page] = backing(page - first);
        }
        self.edges(first, end) as isize - before as isize
    }

    /// Whether pages from `first` on, mapped to `backing` and so on, join a neighbour's mapping.
    pub fn joins(&self, first: usize, count: usize, backing: Backing) -> bool {
        let last = match backing {
            ZEROS => ZEROS,
            slot => slot.saturating_add(count as u32 - 1),
        };
        let before = first.checked_sub(1).and_then(|p| self.backing.get(p));
        let behind = self.backing.get(first + count);
        before.is_some_and(|b| continues(*b, backing))
            || behind.is_some_and(|b| continues(last, *b))
    }

    /// The trace of a page is no longer needed.
    pub fn release_trace(&mut self, member: &Member, page: usize) {
        let Some((&first, &(count, cookie))) = self.traced.range(..=page).next_back() else {
            return;
        };
        let end = first + count;
        if page >= end {
            return;
        }
        self.traced.remove(&first);
        for (first, end) in [(first, page), (page + 1, end)] {
            if first < end {
                self.traced.insert(first, (end - first, cookie));
            }
        }
        self.released.push((page, cookie));
        member.released.store(true, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_counted_as_pages_change() {
        let mut records = Records::new(Weak::new(), Weak::new(), VcpuSet::EMPTY, 10);
        let mut mappings = 0;
        for (first, count, backing, expected) in [
            (4, 2, 100, 2),
            (6, 1, 102, 2),
            (8, 2, 104, 3),
            (7, 1, 103, 1),
            (0, 1, ZEROS, 2),
            (5, 1, 900, 4),
            (0, 10, ZEROS, 0),
            (0, 10, 7, 0),
        ] {
            mappings += records.set_backing(first, count, |n| {
                if backing == ZEROS {
                    ZEROS
                } else {
                    backing + n as u32
                }
            });
            assert_eq!(mappings, expected, "{first} {count} {backing}");
            assert_eq!(records.all_edges() as isize, mappings);
        }
        // Now page n is mapped to slot 7 + n.
        assert!(records.joins(3, 2, 10));
        assert!(!records.joins(3, 2, 50));
        records.set_backing(3, 2, |_| FILE);
        assert!(records.joins(3, 1, 10));
        assert!(records.joins(4, 1, 11));
        assert!(!records.joins(4, 1, 10));
        assert!(!records.joins(3, 2, ZEROS));
    }
}
