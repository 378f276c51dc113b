//! The pool: all machines that share pages, and the copies.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use trapline_trace::{Kind, Range, TraceSystem, VcpuSet};

use super::PAGE;
use super::member::{FILE, Member, MemberStatistics, OWN, PROTECTING, Records, SHARED, ZEROS};
use super::slots::Slots;
use crate::GuestMemory;

/// Where the host says how many mappings a process may have.
const MAX_MAP_COUNT: &str = "/proc/sys/vm/max_map_count";
/// The default of Linux.
const USUAL_MAP_COUNT: usize = 65_530;

/// Copies of pages that several machines of this process may use.
pub struct SharingPool {
    inner: Mutex<Inner>,
    /// The next cookie: it makes every trace of kind `share` a region of its own, and names what is
    /// left of it.
    cookie: AtomicU64,
    /// The most places where one mapping ends and another begins.
    most_mappings: usize,
}

pub(super) struct Inner {
    pub slots: Slots,
    pub members: BTreeMap<u64, Records>,
    next_id: u64,
    /// Places where one mapping ends and another begins.
    pub mappings: usize,
    pub passes: u64,
}

/// Counted for the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStatistics {
    /// Copies that are in use, each a page of host memory.
    pub copies: u64,
    /// Pages of all machines that are mapped to copies.
    pub shared_pages: u64,
    /// Pages of all machines that are mapped to zeros.
    pub zero_pages: u64,
    /// Pages of all machines that the host copied because they were written.
    pub private_pages: u64,
    /// Mappings of the host that sharing takes.
    pub mappings: u64,
    /// How often all machines have been scanned.
    pub passes: u64,
}

impl PoolStatistics {
    /// Host memory that the machines do not take.
    pub fn bytes_saved(&self) -> u64 {
        (self.shared_pages + self.zero_pages).saturating_sub(self.copies) * PAGE as u64
    }
}

impl SharingPool {
    /// A pool without machines. It takes up to half of the mappings that the host gives a process.
    ///
    /// # Errors
    /// The host has no file to give.
    pub fn new() -> io::Result<Arc<Self>> {
        let text = std::fs::read_to_string(MAX_MAP_COUNT).unwrap_or_default();
        Self::with_mappings(text.trim().parse().unwrap_or(USUAL_MAP_COUNT) / 2)
    }

    /// As [`Self::new`], with a bound on the mappings that sharing takes.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_mappings(most_mappings: usize) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            inner: Mutex::new(Inner {
                slots: Slots::new()?,
                members: BTreeMap::new(),
                next_id: 0,
                mappings: 0,
                passes: 0,
            }),
            cookie: AtomicU64::new(0),
            most_mappings,
        }))
    }

    /// Makes a machine's pages candidates. `trace` is its trace subsystem, with `vcpus` VCPUs. The
    /// machine leaves when its memory is dropped. Whether it has joined: it may be in one pool only.
    pub fn join(
        self: &Arc<Self>,
        memory: &Arc<GuestMemory>,
        trace: &Arc<TraceSystem>,
        vcpus: usize,
    ) -> bool {
        let id = {
            let mut inner = self.lock();
            let id = inner.next_id;
            inner.next_id += 1;
            let records = Records::new(
                Arc::downgrade(memory),
                Arc::downgrade(trace),
                VcpuSet::first(vcpus),
                memory.page_count(),
            );
            inner.members.insert(id, records);
            id
        };
        memory.join(Member::new(Arc::clone(self), id, memory.page_count()))
    }

    pub(super) fn leave(&self, member: &Member) {
        let mut inner = self.lock();
        let Some(records) = inner.members.remove(&member.id) else {
            return;
        };
        inner.mappings = inner.mappings.saturating_sub(records.all_edges());
        for (page, backing) in records.backing.iter().enumerate() {
            if member.state(page) == SHARED && *backing < ZEROS {
                inner.slots.drop_user(*backing);
            }
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn cookie(&self) -> u64 {
        self.cookie.fetch_add(1, Relaxed)
    }

    /// The room for more mappings, and the bound.
    pub(super) fn mappings(&self) -> (usize, usize) {
        let used = self.lock().mappings;
        (self.most_mappings.saturating_sub(used), self.most_mappings)
    }

    /// In the lane, before a write: gives the machine a page of its own.
    pub(super) fn make_private(&self, memory: &GuestMemory, member: &Member, page: usize) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let Some(records) = inner.members.get_mut(&member.id) else {
            return;
        };
        match member.state(page) {
            PROTECTING => {}
            SHARED => {
                // Before anything else may use the slot: a write that turns out to store nothing
                // must not leave the page mapped to it.
                memory.touch(page);
                match records.backing.get(page) {
                    Some(&ZEROS) => records.statistics.zero_pages -= 1,
                    Some(&FILE) | None => {}
                    Some(&slot) => {
                        records.statistics.shared_pages -= 1;
                        inner.slots.drop_user(slot);
                    }
                }
                records.private.insert(page);
                records.statistics.unshared_by_write += 1;
            }
            _ => return,
        }
        member.set_state(page, OWN);
        // While the trace is being established it is not known here; `protect` then sees the state.
        records.release_trace(member, page);
    }

    /// Takes pages that have become the machine's own out of their traces. Without any lock held.
    pub(crate) fn remove_released(
        &self,
        memory: &GuestMemory,
        member: &Member,
        trace: &TraceSystem,
    ) {
        if !member.released.swap(false, SeqCst) {
            return;
        }
        let released = {
            let mut inner = self.lock();
            let Some(records) = inner.members.get_mut(&member.id) else {
                return;
            };
            std::mem::take(&mut records.released)
        };
        for (page, cookie) in released {
            if let Some(gpa) = memory.gpa_of_page(page) {
                let range = Range::new(gpa, gpa + PAGE as u64);
                trace.exclude(range, Kind::Share, cookie);
            }
        }
    }

    pub fn statistics(&self) -> PoolStatistics {
        let inner = self.lock();
        let sum = |of: fn(&MemberStatistics) -> u64| {
            let members = inner.members.values();
            members.map(|records| of(&records.statistics)).sum()
        };
        PoolStatistics {
            copies: inner.slots.used() as u64,
            shared_pages: sum(|s| s.shared_pages),
            zero_pages: sum(|s| s.zero_pages),
            private_pages: inner.members.values().map(|r| r.private.len() as u64).sum(),
            mappings: inner.mappings as u64,
            passes: inner.passes,
        }
    }

    pub(crate) fn member_statistics(&self, member: &Member) -> MemberStatistics {
        let inner = self.lock();
        let records = inner.members.get(&member.id);
        records.map_or_else(MemberStatistics::default, |r| MemberStatistics {
            private_pages: r.private.len() as u64,
            ..r.statistics
        })
    }
}
