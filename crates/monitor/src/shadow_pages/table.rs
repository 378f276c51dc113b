//! One shadow table: copies of the entries of a guest table.

use trapline_trace::Range;
use trapline_x86::paging::entry::{A, D, P, bits};
use trapline_x86::paging::{Format, Level};

/// Where a copy of an entry that refers to a table has the number of that table's shadow: bits
/// that processors ignore (4-level paging) or that must be clear (the other formats).
const LINK: u64 = bits(LINK_SHIFT, 63);
const LINK_SHIFT: u32 = 52;
/// Leads nowhere.
pub const NO_LINK: u16 = (LINK >> LINK_SHIFT) as u16;

const _: () = assert!(super::MAX_TABLES <= NO_LINK as usize);

/// Names a shadow table: the guest table's address, the format and the depth at which it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag(u64);

impl Tag {
    /// Of no table: tables are aligned.
    const NONE: Self = Self(u64::MAX);

    /// `base` is a multiple of 32, `number` below 8 and `depth` below 4.
    #[inline]
    pub fn new(base: u64, number: u8, depth: usize) -> Self {
        Self(base | u64::from(number) << 2 | depth as u64)
    }
}

/// The number of the shadow table that a copy leads to.
#[inline]
pub fn link(copy: u64) -> u16 {
    ((copy & LINK) >> LINK_SHIFT) as u16
}

/// The guest's entry, as far as it was copied.
#[inline]
pub fn without_link(copy: u64) -> u64 {
    copy & !LINK
}

/// Used since the last write to the guest table.
const BETWEEN_WRITES: u8 = 1;
/// Used since room was last looked for.
const SECOND_CHANCE: u8 = 2;

#[derive(Debug)]
pub struct Table {
    pub tag: Tag,
    uses: u8,
    /// Entries have rights, accessed and dirty bits.
    has_rights: bool,
    /// Changes of these bits make a copy invalid.
    significant: u64,
    entry_bytes: u64,
    /// The guest table.
    pub range: Range,
    /// 0: no copy.
    entries: Box<[u64]>,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            tag: Tag::NONE,
            uses: 0,
            has_rights: false,
            significant: !0,
            entry_bytes: 8,
            range: Range::new(0, 0),
            entries: Box::default(),
        }
    }
}

impl Table {
    /// Makes it the empty shadow of another guest table.
    pub fn reset(&mut self, tag: Tag, range: Range, format: &Format, level: &Level) {
        let has_rights = level.has_rights();
        let mut significant = !0;
        if has_rights {
            significant &= !(A | D);
        }
        // Bits where the link is: ignored by 4-level paging, else reserved or not there.
        if format.levels().len() == 4 {
            significant &= !LINK;
        }
        self.tag = tag;
        self.uses = SECOND_CHANCE;
        self.has_rights = has_rights;
        self.significant = significant;
        self.entry_bytes = format.entry_bytes();
        self.range = range;
        if self.entries.len() == level.entries() {
            self.entries.fill(0);
        } else {
            self.entries = vec![0; level.entries()].into();
        }
    }

    /// Removes all copies and the tag; how many copies there were.
    pub fn empty(&mut self) -> u64 {
        let count = self.entries.iter().filter(|e| **e != 0).count();
        self.entries.fill(0);
        self.tag = Tag::NONE;
        count as u64
    }

    /// The copy of an entry, with its link, if there is one.
    #[inline]
    pub fn entry(&self, index: usize) -> Option<u64> {
        self.entries.get(index).copied().filter(|e| *e != 0)
    }

    /// Copies a guest entry, if it may be copied; if it refers to a table, `link` is the number of
    /// that table's shadow.
    pub fn set(&mut self, index: usize, value: u64, link: u16) {
        let may = value & P != 0 && (!self.has_rights || value & A != 0);
        if let Some(entry) = self.entries.get_mut(index) {
            *entry = if may {
                without_link(value) | u64::from(link) << LINK_SHIFT
            } else {
                0
            };
        }
    }

    #[inline]
    pub fn note_use(&mut self) {
        self.uses = BETWEEN_WRITES | SECOND_CHANCE;
    }

    /// Whether it was used since this was last asked.
    pub fn take_use(&mut self) -> bool {
        let used = self.uses & BETWEEN_WRITES != 0;
        self.uses &= !BETWEEN_WRITES;
        used
    }

    /// Whether it was used since this was last asked.
    pub fn take_second_chance(&mut self) -> bool {
        let used = self.uses & SECOND_CHANCE != 0;
        self.uses &= !SECOND_CHANCE;
        used
    }

    /// Reads again the guest entries that were copied and of which a byte lies in `written`. A
    /// copy stays, with the new accessed and dirty bits, if nothing else changed and the accessed
    /// bit is set. Returns how many went and how many were changed.
    pub fn derive_again(
        &mut self,
        written: Range,
        read: impl Fn(u64, u64) -> Option<u64>,
    ) -> (u64, u64) {
        let (lo, hi) = (
            written.lo.max(self.range.lo) - self.range.lo,
            written.hi.min(self.range.hi).saturating_sub(self.range.lo),
        );
        let (mut invalidated, mut updated) = (0, 0);
        let first = (lo / self.entry_bytes) as usize;
        let end = hi.div_ceil(self.entry_bytes) as usize;
        let end = end.min(self.entries.len());
        for index in first..end {
            let copy = self.entries[index];
            if copy == 0 {
                continue;
            }
            let gpa = self.range.lo + index as u64 * self.entry_bytes;
            let now = read(gpa, self.entry_bytes).unwrap_or(0);
            let same = (now ^ without_link(copy)) & self.significant == 0;
            if !same || (self.has_rights && now & A == 0) {
                self.entries[index] = 0;
                invalidated += 1;
            } else {
                let new = without_link(now) | copy & LINK;
                updated += u64::from(new != copy);
                self.entries[index] = new;
            }
        }
        (invalidated, updated)
    }
}
