//! Making a run of pages shared: protect, compare, exchange the mapping.

use std::sync::Arc;

use trapline_trace::{Kind, Range, Sense, TraceSystem};

use super::mapping::Run;
use super::member::{Backing, FILE, Member, OWN, PROTECTING, SHARED, ZEROS};
use super::pool::{Inner, SharingPool};
use super::slots::{self, Slots};
use super::{Bytes, PAGE};
use crate::GuestMemory;

/// A machine, held while something is done with it.
#[derive(Clone)]
pub struct Machine {
    pub memory: Arc<GuestMemory>,
    pub trace: Arc<TraceSystem>,
}

impl Machine {
    pub fn member(&self) -> Option<&Member> {
        self.memory.member()
    }
}

/// What the pages of a run are to be mapped to.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    Zeros,
    /// Copies that exist, from this slot on.
    Copies(u32),
    /// Copies that are made of the run's own bytes, into slots that were taken from this one on,
    /// where the bytes still have these hashes. Slots that stay unused are given back.
    Made(u32, &'a [u64]),
}

impl Target<'_> {
    fn backing(&self, n: usize) -> Backing {
        match self {
            Self::Zeros => ZEROS,
            Self::Copies(slot) | Self::Made(slot, _) => slot + n as u32,
        }
    }

    /// Whether a page with these bytes may be mapped to the `n`th place.
    fn takes(
        &self,
        slots: &mut Slots,
        n: usize,
        bytes: &Bytes,
        hash: impl Fn(&Bytes) -> u64,
    ) -> bool {
        match self {
            Self::Zeros => bytes.iter().all(|word| *word == 0),
            Self::Copies(_) => {
                let slot = self.backing(n);
                slots.is_used(slot) && slots.holds(slot, bytes)
            }
            Self::Made(_, hashes) => {
                let expected = hashes.get(n).copied();
                expected == Some(hash(bytes))
                    && slots
                        .fill(self.backing(n), expected.unwrap_or(0), bytes)
                        .is_ok()
            }
        }
    }
}

impl SharingPool {
    /// Makes the pages `first..first + count` of a machine shared, as far as they are its own, are
    /// not written meanwhile, and have the right bytes. Returns how many became so. Only the
    /// scanner calls this.
    pub(super) fn share(
        &self,
        machine: &Machine,
        first: usize,
        count: usize,
        target: Target,
        hash: impl Fn(&Bytes) -> u64,
    ) -> usize {
        let Some(member) = machine.member() else {
            return 0;
        };
        let done = if self.protect(machine, member, first, count) {
            self.exchange(machine, member, first, count, target, hash)
        } else {
            0
        };
        if let Target::Made(slot, _) = target {
            let mut inner = self.lock();
            for slot in (slot..).take(count) {
                if !inner.slots.is_used(slot) {
                    inner.slots.give_back(slot);
                }
            }
        }
        self.remove_released(&machine.memory, member, &machine.trace);
        done
    }

    /// Establishes one trace for a run's pages. When it returns true, writes to those pages whose
    /// state is still *protecting* have been sensed from some moment on, and none has happened
    /// since that moment.
    fn protect(&self, machine: &Machine, member: &Member, first: usize, count: usize) -> bool {
        let Some(gpa) = machine.memory.gpa_of_page(first) else {
            return false;
        };
        let everyone = {
            let inner = self.lock();
            let Some(records) = inner.members.get(&member.id) else {
                return false;
            };
            if (first..first + count).any(|page| member.state(page) != OWN) {
                return false;
            }
            for page in first..first + count {
                member.set_state(page, PROTECTING);
            }
            records.everyone
        };
        let cookie = self.cookie();
        let range = Range::new(gpa, gpa + (count * PAGE) as u64);
        let (kind, sense) = (Kind::Share, Sense::WRITE);
        let trace = &machine.trace;
        let established = trace.establish(None, everyone, range, kind, sense, cookie, &mut |_| {});
        let mut inner = self.lock();
        let Some(records) = inner.members.get_mut(&member.id) else {
            return false;
        };
        if established.is_err() {
            for page in first..first + count {
                member.set_state(page, OWN);
            }
            return false;
        }
        records.traced.insert(first, (count, cookie));
        for page in first..first + count {
            // Written meanwhile.
            if member.state(page) == OWN {
                records.statistics.abandoned += 1;
                records.release_trace(member, page);
            }
        }
        true
    }

    /// Maps the run's pages that are *protecting* and have the right bytes; lets the others go.
    fn exchange(
        &self,
        machine: &Machine,
        member: &Member,
        first: usize,
        count: usize,
        target: Target,
        hash: impl Fn(&Bytes) -> u64,
    ) -> usize {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let fits: Vec<bool> = (0..count)
            .map(|n| {
                let page = first + n;
                member.state(page) == PROTECTING
                    && machine
                        .memory
                        .read_page(page)
                        .is_some_and(|bytes| target.takes(&mut inner.slots, n, &bytes, &hash))
            })
            .collect();
        let mut done = 0;
        let mut n = 0;
        while n < count {
            let length = fits[n..].iter().take_while(|fit| **fit).count();
            if length > 0 && map(inner, machine, member, first, n, length, target) {
                done += length;
            }
            n += length.max(1);
        }
        let Some(records) = inner.members.get_mut(&member.id) else {
            return done;
        };
        for page in first..first + count {
            if member.state(page) == PROTECTING {
                member.set_state(page, OWN);
                records.statistics.abandoned += 1;
                records.release_trace(member, page);
            }
        }
        done
    }
}

/// Maps `length` pages, from the `n`th of the run at `first` on, and notes it.
fn map(
    inner: &mut Inner,
    machine: &Machine,
    member: &Member,
    first: usize,
    n: usize,
    length: usize,
    target: Target,
) -> bool {
    let page = first + n;
    let Some(records) = inner.members.get_mut(&member.id) else {
        return false;
    };
    let Some(run) = Run::new(&machine.memory, page, length) else {
        return false;
    };
    let mapped = match target {
        Target::Zeros => run.map_zeros(),
        Target::Copies(slot) | Target::Made(slot, _) => {
            run.map_copies(inner.slots.file(), slots::offset(slot + n as u32))
        }
    };
    if mapped.is_err() {
        // The host is short of something; the kernel may have unmapped the run before it found out.
        // Its bytes are known: back to the machine's own file with them.
        for k in 0..length {
            inner
                .slots
                .restore(machine.memory.file(), page + k, target.backing(n + k));
        }
        if run.map_own().is_ok() {
            let grown = records.set_backing(page, length, |_| FILE);
            inner.mappings = inner.mappings.saturating_add_signed(grown);
            for page in page..page + length {
                records.private.remove(&page);
            }
        }
        return false;
    }
    // The pages' own memory: unreachable now.
    slots::punch(machine.memory.file(), page, length);
    let grown = records.set_backing(page, length, |k| target.backing(n + k));
    inner.mappings = inner.mappings.saturating_add_signed(grown);
    for k in 0..length {
        records.private.remove(&(page + k));
        match target {
            Target::Zeros => records.statistics.zero_pages += 1,
            Target::Copies(_) | Target::Made(..) => {
                inner.slots.add_user(target.backing(n + k));
                records.statistics.shared_pages += 1;
            }
        }
        member.set_state(page + k, SHARED);
    }
    records.statistics.merged += length as u64;
    true
}
