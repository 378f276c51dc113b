//! The shadow page tables of one VCPU: copies of the guest's paging-structure entries that survive
//! switches of the address space and full flushes, kept coherent by traces of kind `mmu`.
//!
//! # What is kept
//! A shadow table holds copies of the entries of one guest table, as read by a guest with certain
//! paging-mode bits at a certain level ([`Format::number`]; WP, SMEP, SMAP, PGE are looked at when
//! the copy is used, so they need not be). The tables form trees like the guest's, and guest
//! tables that several address spaces share (a kernel's half) are shadowed once. A look-up walks
//! these copies from the root of the current address space; it reads no guest memory. An entry is
//! copied only if it is present and has its accessed bit set, and a write is answered only with
//! the dirty bit set too; everything else, and every page fault, is decided by a walk of guest
//! memory. So nothing needs a flush that needs none on a processor: neither not-present to
//! present nor more rights.
//!
//! # How it stays true
//! Before the entries of a guest table are copied, the table gets a write trace, and the entries
//! are read after that. A notification makes the copies of the entries concerned be read again: a
//! copy stays if nothing changed but its accessed and dirty bits, else it goes. With asynchronous
//! post-write a notification may reach this VCPU late, as a change of a page table may reach a
//! processor's TLB late; before the guest's own flush completes, [`TraceSystem::settle`] brings
//! everything that was written before (\[0085\]). So after a flush every copy says what the guest's
//! entry said at the flush or later, and the flush need not empty anything here.
//!
//! # Which tables
//! A trace costs its establishing and every later write of the page, a walk costs little, so the
//! [`policy`] traces only what is walked often and not written often. While a table is untraced
//! nothing is derived from it but what the TLB holds, which a flush empties.
//!
//! # Bounds
//! At most [`MAX_TABLES`] shadow tables; then the one goes that was not used for longest (second
//! chance). Links between tables are checked where they are followed, so one that goes leaves
//! nothing to be repaired. There are no more traces than tables, but for a few that are about to
//! go.
//!
//! Everything belongs to the VCPU's thread: no locks, no atomics.
//!
//! [`TraceSystem::settle`]: trapline_trace::TraceSystem::settle

pub mod policy;
mod table;

#[cfg(test)]
pub(crate) mod tests;

use std::collections::HashMap;

use trapline_trace::observer::Witness;
use trapline_trace::{Actor, Kind, Notification, Range, Semantics, TraceId, VcpuId};
use trapline_x86::CpuState;
use trapline_x86::paging::entry::{RW, US};
use trapline_x86::paging::{Format, Level, Page, Path};

use policy::Heat;
use table::{NO_LINK, Table, Tag, without_link};

/// The most shadow tables of a VCPU, of 4 KiB each (8 KiB for 32-bit paging).
pub const MAX_TABLES: usize = 1024;

/// What a VCPU's shadow page tables did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowStatistics {
    /// Translations found here.
    pub hits: u64,
    /// Translations by a walk of guest memory, page faults included.
    pub walks: u64,
    /// Traces established.
    pub traced_pages: u64,
    /// Notifications of writes to guest tables.
    pub writes: u64,
    /// Copies removed because their entry changed.
    pub invalidated_entries: u64,
    /// Copies of which only accessed or dirty bits changed.
    pub updated_entries: u64,
    /// Pages that went untraced because they were written often.
    pub untraced_pages: u64,
    /// Tables removed to make room.
    pub evicted_tables: u64,
    /// Flushes by the guest.
    pub flushes: u64,
}

/// A traced guest table.
#[derive(Debug)]
struct Traced {
    id: TraceId,
    /// The shadow tables derived from it: one for each format and level it is used at.
    slots: Vec<u16>,
    /// Writes since it was last used.
    writes: u32,
    /// The count of flushes when it was established.
    since: u64,
}

/// The address space that the registers select, with what they said when that was found out.
struct Space {
    registers: [u64; 4],
    format: Format,
    root: u16,
}

/// What `fill` wants to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Nothing: what may be copied has been.
    Done,
    /// This guest table shall be traced; then walk again.
    Trace(Range),
}

/// The shadow page tables of one VCPU.
pub struct ShadowPages {
    vcpu: VcpuId,
    address_bits: u32,
    tables: Vec<Table>,
    free: Vec<u16>,
    /// Where the search for a table to remove goes on.
    hand: usize,
    index: HashMap<Tag, u16>,
    traced: HashMap<Range, Traced>,
    space: Option<Space>,
    heat: Heat,
    /// Traces to be removed at the next opportunity.
    released: Vec<TraceId>,
    /// The walker is setting accessed or dirty bits: its write does not count as one.
    pub updating: bool,
    witness: Witness,
    pub statistics: ShadowStatistics,
}

fn registers(cpu: &CpuState) -> [u64; 4] {
    [cpu.cr3, cpu.cr0, cpu.cr4, cpu.efer]
}

/// The bytes of the guest table at `base`.
fn table_range(format: &Format, level: &Level, base: u64) -> Range {
    let bytes = level.entries() as u64 * format.entry_bytes();
    Range::new(base, base + bytes)
}

impl ShadowPages {
    /// Of a VCPU with this physical-address width; `witness` sees what is invalidated.
    pub fn new(vcpu: VcpuId, address_bits: u32, witness: Witness) -> Self {
        Self {
            vcpu,
            address_bits,
            tables: Vec::new(),
            free: Vec::new(),
            hand: 0,
            index: HashMap::new(),
            traced: HashMap::new(),
            space: None,
            heat: Heat::default(),
            released: Vec::new(),
            updating: false,
            witness,
            statistics: ShadowStatistics::default(),
        }
    }

    /// Whether there is nothing that a notification could concern.
    pub fn is_empty(&self) -> bool {
        self.traced.is_empty()
    }

    /// The translation of `linear` by the copies, if they are all there. Whether it suffices for
    /// an access, [`Page::cacheable`] tells; where it does not, only a walk can say what happens.
    #[inline]
    pub fn lookup(&mut self, cpu: &CpuState, linear: u64) -> Option<Page> {
        let current = registers(cpu);
        if self.space.as_ref().is_none_or(|s| s.registers != current) {
            self.enter(cpu)?;
        }
        let space = self.space.as_ref()?;
        let format = &space.format;
        let number = format.number();
        let (mut slot, mut base) = (space.root, format.root());
        let (mut rights, mut any) = (RW | US, 0);
        for (depth, level) in format.levels().iter().enumerate() {
            let table = self.tables.get_mut(usize::from(slot))?;
            if table.tag != Tag::new(base, number, depth) {
                return None;
            }
            let entry = table.entry(level.index(linear))?;
            table.note_use();
            if level.has_rights() {
                rights &= entry;
                any |= entry;
            }
            if level.maps_page(entry) {
                let entry = without_link(entry);
                return Some(format.page(cpu, level, entry, linear, rights, any));
            }
            base = format.table(entry);
            slot = table::link(entry);
        }
        None
    }

    /// Finds out which address space the registers select; `None` without paging.
    #[cold]
    fn enter(&mut self, cpu: &CpuState) -> Option<()> {
        self.space = None;
        if !cpu.paging() {
            return None;
        }
        let format = Format::of(cpu, self.address_bits);
        let tag = Tag::new(format.root(), format.number(), 0);
        self.space = Some(Space {
            registers: registers(cpu),
            format,
            root: self.index.get(&tag).copied().unwrap_or(NO_LINK),
        });
        Some(())
    }

    /// To be called before a walk, whose [`Self::fill`]s then add at most one trace for each
    /// level.
    pub fn before_walk(&mut self) {
        self.statistics.walks += 1;
        if self.traced.len() <= MAX_TABLES {
            return;
        }
        // Those of walks that ended with a page fault or a restart after the establishing.
        let released = &mut self.released;
        self.traced.retain(|_, traced| {
            let useful = !traced.slots.is_empty();
            if !useful {
                released.push(traced.id);
            }
            useful
        });
    }

    /// Copies the entries of a walk that was made after `lookup` for the same registers, as far as
    /// their tables are traced. `is_ram` tells where guest memory is: elsewhere writes have no
    /// effect and nothing is traced.
    ///
    /// Between the walk's first reading and this call no notification may have been applied but
    /// those of the walk's own writes.
    pub fn fill(&mut self, path: &Path, is_ram: impl Fn(u64) -> bool) -> Fill {
        let Some(space) = &self.space else {
            return Fill::Done;
        };
        let format = space.format;
        let number = format.number();
        let used = path.entries();
        for (step, level) in used.iter().zip(format.levels()) {
            let range = table_range(&format, level, step.table);
            if !self.traced.contains_key(&range)
                && self.heat.is_wanted(step.table)
                && is_ram(range.hi - 1)
            {
                return Fill::Trace(range);
            }
        }
        let mut below = NO_LINK;
        let steps = used.iter().zip(format.levels()).enumerate();
        for (depth, (step, level)) in steps.rev() {
            let range = table_range(&format, level, step.table);
            if !self.traced.contains_key(&range) {
                below = NO_LINK;
                continue;
            }
            let tag = Tag::new(step.table, number, depth);
            let slot = self.slot_for(tag, range, &format, level);
            if let Some(table) = self.tables.get_mut(usize::from(slot)) {
                table.set(step.index, step.value | step.set, below);
            }
            below = slot;
        }
        if let Some(space) = &mut self.space {
            space.root = below;
        }
        Fill::Done
    }

    /// Notes that a guest table is traced, by this trace.
    pub fn add_trace(&mut self, range: Range, id: TraceId) {
        // It may have been given out again before it was removed.
        self.released.retain(|released| *released != id);
        self.statistics.traced_pages += 1;
        self.heat.cool(range.lo);
        let traced = Traced {
            id,
            slots: Vec::new(),
            writes: 0,
            since: self.statistics.flushes,
        };
        self.traced.insert(range, traced);
    }

    /// The shadow table of that tag; makes it if need be.
    fn slot_for(&mut self, tag: Tag, range: Range, format: &Format, level: &Level) -> u16 {
        if let Some(slot) = self.index.get(&tag) {
            return *slot;
        }
        let slot = self.allocate();
        let Some(traced) = self.traced.get_mut(&range) else {
            // The room was made by removing the last table of this very trace.
            self.free.push(slot);
            return NO_LINK;
        };
        traced.slots.push(slot);
        if let Some(table) = self.tables.get_mut(usize::from(slot)) {
            table.reset(tag, range, format, level);
        }
        self.index.insert(tag, slot);
        slot
    }

    fn allocate(&mut self) -> u16 {
        if let Some(slot) = self.free.pop() {
            return slot;
        }
        if self.tables.len() < MAX_TABLES {
            self.tables.push(Table::default());
            return (self.tables.len() - 1) as u16;
        }
        // Each table is given its second chance at most once on the way.
        loop {
            self.hand = (self.hand + 1) % MAX_TABLES;
            if !self.tables[self.hand].take_second_chance() {
                break;
            }
        }
        let slot = self.hand as u16;
        self.statistics.evicted_tables += 1;
        let range = self.tables[self.hand].range;
        self.clear(slot);
        if let Some(traced) = self.traced.get_mut(&range) {
            traced.slots.retain(|s| *s != slot);
            if traced.slots.is_empty() {
                self.released.push(traced.id);
                self.traced.remove(&range);
            }
        }
        slot
    }

    /// Empties a table, so that no link leads to it any more.
    fn clear(&mut self, slot: u16) -> u64 {
        let Some(table) = self.tables.get_mut(usize::from(slot)) else {
            return 0;
        };
        self.index.remove(&table.tag);
        table.empty()
    }

    /// Applies a notification of kind `mmu`: of its region if that is one of ours. `read` reads a
    /// guest entry of so many bytes.
    pub fn apply(&mut self, n: &Notification, read: impl Fn(u64, u64) -> Option<u64>) {
        let Some(traced) = self.traced.get_mut(&n.region) else {
            return;
        };
        self.statistics.writes += 1;
        let start = self.witness.now();
        let (mut removed, mut used) = (0, false);
        for slot in &traced.slots {
            let Some(table) = self.tables.get_mut(usize::from(*slot)) else {
                continue;
            };
            used |= table.take_use();
            let (invalidated, updated) = table.derive_again(n.written, &read);
            removed += invalidated;
            self.statistics.updated_entries += updated;
        }
        let own_update = self.updating && n.actor == Actor::Vcpu(self.vcpu);
        traced.writes = if used { 0 } else { traced.writes } + u32::from(!own_update);
        let flooded = traced.writes >= policy::WRITES;
        // What was announced may not have been written yet. It will be before the next flush
        // completes, so until then nothing may be derived.
        if flooded || n.semantics == Semantics::PreWriteValue {
            removed += self.untrace(n.region);
        }
        self.statistics.invalidated_entries += removed;
        if removed > 0 {
            self.witness
                .invalidated(start, Kind::Mmu, n.written, removed);
        }
    }

    /// Lets a guest table go untraced, with all that was derived from it; how many copies that
    /// were.
    fn untrace(&mut self, range: Range) -> u64 {
        let Some(traced) = self.traced.remove(&range) else {
            return 0;
        };
        self.statistics.untraced_pages += 1;
        let lasted = self.statistics.flushes - traced.since;
        self.heat.written_often(range.lo, lasted);
        self.released.push(traced.id);
        let mut removed = 0;
        for slot in traced.slots {
            removed += self.clear(slot);
            self.free.push(slot);
        }
        removed
    }

    /// The guest has flushed, and all notices from before have been applied.
    pub fn flushed(&mut self) {
        self.statistics.flushes += 1;
    }

    /// Traces that are not needed any more.
    pub fn take_released(&mut self) -> Vec<TraceId> {
        std::mem::take(&mut self.released)
    }

    pub fn has_released(&self) -> bool {
        !self.released.is_empty()
    }
}
