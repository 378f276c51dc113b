//! Shadow descriptor tables of one VCPU: what its processor reads of the guest's GDT, LDT, IDT and
//! task-state segments, decoded once and kept coherent by traces of kind `descriptor`
//! (\[0036\] to \[0038\] of the seed).
//!
//! An entry has a trace on exactly its bytes, established before they are read ([`mod@derive`]). A
//! notification *invalidates*: the entry is decoded again at its next use, under a trace that is
//! established again, so that no semantics of the kind lets it read before the write.
//!
//! Entries are known by guest-physical address, so no change of a translation makes one wrong. The
//! tables lie at linear addresses: in front stands a small cache by linear address. What it holds
//! counts as long as the TLB's epoch is the same, which every flush changes; then the address is
//! translated again and the guest-physical address compared. So the cache keeps a translation just
//! as long as a TLB may.
//!
//! A trace makes every store to its page slower. [`page::Page`] tells when a page is written so
//! often that its tables are better read each time.
//!
//! All of it belongs to its VCPU's thread; nobody else touches it.

mod derive;
mod page;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use trapline_engine::system_item::{Decoded, SystemItem};
use trapline_engine::tlb::{Access, Privilege, Tlb};
use trapline_trace::observer::Witness;
use trapline_trace::{Kind, Range, TraceId};

use page::Page;

/// The most entries kept: then all go. Bounds the memory that a guest can make the VMM use.
const MOST_ENTRIES: usize = 4096;
/// The most pages with entries, or with a memory of how they are written: then all go.
const MOST_PAGES: usize = 256;
/// Slots by linear address; a power of two.
const RECENT: usize = 256;
const PAGE_SHIFT: u32 = 12;

/// What an entry is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    gpa: u64,
    item: SystemItem,
}

impl Key {
    fn range(&self) -> Range {
        Range::new(self.gpa, self.gpa + self.item.bytes() as u64)
    }
}

struct Entry {
    trace: TraceId,
    /// `None` once it was written to.
    decoded: Option<Decoded>,
}

/// A slot of the cache by linear address.
#[derive(Clone, Copy)]
struct Recent {
    linear: u64,
    item: SystemItem,
    gpa: u64,
    /// The TLB's epoch when the linear address was translated.
    epoch: u64,
    generation: u64,
    page: usize,
    /// `None`: the page rests, read the tables.
    decoded: Option<Decoded>,
}

/// What is known of an item at a guest-physical address.
#[derive(Debug, PartialEq, Eq)]
enum Known {
    Shadow(Decoded),
    /// Its page rests.
    Resting,
    /// It is to be derived.
    Unknown,
}

/// Statistics of shadow descriptor tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorStatistics {
    /// Look-ups answered by a shadow.
    pub hits: u64,
    /// Look-ups of pages that rest.
    pub unshadowed: u64,
    pub derived: u64,
    pub invalidated: u64,
    /// Entries decoded again after they had been invalidated.
    pub rederived: u64,
    /// Pages that went untraced because they were written often.
    pub rests: u64,
}

/// The shadow descriptor tables of one VCPU.
pub struct ShadowDescriptors {
    recent: Box<[Recent; RECENT]>,
    entries: HashMap<Key, Entry>,
    pages: Vec<Page>,
    page_numbers: HashMap<u64, usize>,
    /// Changes whenever something that [`Self::recent`] holds may have become wrong.
    generation: u64,
    /// Traces that lost their entry, to be removed where that is possible.
    released: Vec<TraceId>,
    witness: Witness,
    pub statistics: DescriptorStatistics,
}

fn slot(linear: u64) -> usize {
    // The distances within tables and between them are powers of two: spread them.
    ((linear >> 2).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - RECENT.ilog2())) as usize
}

impl ShadowDescriptors {
    /// No shadows; `witness` sees their invalidations.
    pub fn new(witness: Witness) -> Self {
        let nothing = Recent {
            linear: 0,
            item: SystemItem::Segment,
            gpa: 0,
            epoch: 0,
            generation: 0,
            page: 0,
            decoded: None,
        };
        Self {
            recent: Box::new([nothing; RECENT]),
            entries: HashMap::new(),
            pages: Vec::new(),
            page_numbers: HashMap::new(),
            generation: 1,
            released: Vec::new(),
            witness,
            statistics: DescriptorStatistics::default(),
        }
    }

    /// What is remembered of the item at a linear address: `None` if nothing, `Some(None)` if it is
    /// to be read from its table.
    #[inline]
    pub fn recent(&mut self, tlb: &Tlb, linear: u64, item: SystemItem) -> Option<Option<Decoded>> {
        let recent = &mut self.recent[slot(linear)];
        if recent.linear != linear || recent.item != item || recent.generation != self.generation {
            return None;
        }
        if recent.epoch != tlb.epoch() {
            let hit = tlb.lookup(linear, Privilege::Supervisor, Access::Read)?;
            if hit.gpa != recent.gpa {
                return None;
            }
            recent.epoch = tlb.epoch();
        }
        let page = &mut self.pages[recent.page];
        if recent.decoded.is_some() {
            self.statistics.hits += 1;
            page.hit();
        } else {
            self.statistics.unshadowed += 1;
            if page.passed_by() {
                self.generation += 1;
            }
        }
        Some(recent.decoded)
    }

    /// What is known of an item; remembered for the linear address that led there.
    fn look_up(&mut self, tlb: &Tlb, linear: u64, gpa: u64, item: SystemItem) -> Known {
        let Some(&page) = self.page_numbers.get(&(gpa >> PAGE_SHIFT)) else {
            return Known::Unknown;
        };
        let known = if self.pages[page].rests() {
            Known::Resting
        } else {
            match self.entries.get(&Key { gpa, item }) {
                Some(Entry {
                    decoded: Some(decoded),
                    ..
                }) => Known::Shadow(*decoded),
                _ => return Known::Unknown,
            }
        };
        let decoded = match known {
            Known::Shadow(decoded) => Some(decoded),
            Known::Resting | Known::Unknown => None,
        };
        self.recent[slot(linear)] = Recent {
            linear,
            item,
            gpa,
            epoch: tlb.epoch(),
            generation: self.generation,
            page,
            decoded,
        };
        known
    }

    /// Adds what was read under `trace`.
    fn insert(&mut self, gpa: u64, item: SystemItem, trace: TraceId, decoded: Decoded) {
        let key = Key { gpa, item };
        self.statistics.derived += 1;
        if let Some(entry) = self.entries.get_mut(&key) {
            self.statistics.rederived += 1;
            *entry = Entry {
                trace,
                decoded: Some(decoded),
            };
            return;
        }
        let number = gpa >> PAGE_SHIFT;
        let page = *self.page_numbers.entry(number).or_insert_with(|| {
            self.pages.push(Page::default());
            self.pages.len() - 1
        });
        self.pages[page].keys.push(key);
        self.entries.insert(
            key,
            Entry {
                trace,
                decoded: Some(decoded),
            },
        );
    }

    fn is_full(&self) -> bool {
        self.entries.len() >= MOST_ENTRIES || self.pages.len() >= MOST_PAGES
    }

    /// Bytes were written, by another VCPU or a device if `foreign`.
    pub fn invalidate(&mut self, written: Range, foreign: bool) {
        let start = self.witness.now();
        let mut count = 0;
        for number in written.lo >> PAGE_SHIFT..=(written.hi.max(written.lo + 1) - 1) >> PAGE_SHIFT
        {
            let Some(&page) = self.page_numbers.get(&number) else {
                continue;
            };
            for key in &self.pages[page].keys {
                if key.range().overlaps(&written)
                    && let Some(entry) = self.entries.get_mut(key)
                    && entry.decoded.take().is_some()
                {
                    count += 1;
                }
            }
            if foreign {
                self.written(number);
            }
        }
        if count > 0 {
            self.generation += 1;
            self.statistics.invalidated += count;
            self.witness
                .invalidated(start, Kind::Descriptor, written, count);
        }
    }

    /// A sensed write of this VCPU to a page of that number, whether to a table or beside one.
    pub fn note_write(&mut self, gpa: u64) {
        if !self.entries.is_empty() {
            self.written(gpa >> PAGE_SHIFT);
        }
    }

    fn written(&mut self, number: u64) {
        if let Some(&page) = self.page_numbers.get(&number)
            && self.pages[page].written()
        {
            self.statistics.rests += 1;
            self.forget(page);
        }
    }

    /// Reads of a page are sensed from now on: they must be made.
    pub fn reads_are_sensed(&mut self, gpa: u64) {
        if let Some(&page) = self.page_numbers.get(&(gpa >> PAGE_SHIFT)) {
            self.forget(page);
        }
    }

    /// Drops the entries of a page.
    fn forget(&mut self, page: usize) {
        for key in std::mem::take(&mut self.pages[page].keys) {
            if let Some(entry) = self.entries.remove(&key) {
                self.released.push(entry.trace);
            }
        }
        self.generation += 1;
    }

    /// Drops everything.
    fn clear(&mut self) {
        self.released
            .extend(self.entries.drain().map(|(_, entry)| entry.trace));
        self.pages.clear();
        self.page_numbers.clear();
        self.generation += 1;
    }

    pub fn has_released(&self) -> bool {
        !self.released.is_empty()
    }

    /// Traces that no entry needs any more, to be removed before anything new is derived: the same
    /// bytes under another reading have the same trace.
    pub fn take_released(&mut self) -> Vec<TraceId> {
        std::mem::take(&mut self.released)
    }
}
