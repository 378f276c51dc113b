//! The per-VCPU translation look-aside buffer: its layout is the contract between whoever fills it
//! (the monitor) and whoever looks things up in it (the engine, inline).
//!
//! An entry exists only for pages of RAM that may be accessed directly, without being sensed: a
//! page with a write trace has no write entry, a device page has none at all. So a look-up that
//! hits needs no further check, and untraced memory costs nothing extra.

use trapline_x86::CpuState;
use trapline_x86::control::{cr4, rflags};

use crate::frame::{Frame, SLOTS, TLB_TABLES, empty, tlb_hosts, tlb_pages};
use foldhash::HashSet;

use crate::gaps::Gaps;
use crate::jumps::Jumps;

const PAGE_SHIFT: u32 = 12;
const PAGE: u64 = 4096;
const PAGE_MASK: u64 = !0xfff;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Access {
    Read = 0,
    /// A write or a read-modify-write.
    Write = 1,
    Fetch = 2,
}

/// The privilege that an access is made with, as far as permission checks tell it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Privilege {
    /// Supervisor, and SMAP (if enabled) forbids user pages: also all implicit accesses.
    Supervisor = 0,
    /// Supervisor, explicit, with RFLAGS.AC set or SMAP disabled.
    SupervisorOpen = 1,
    User = 2,
}

impl Privilege {
    /// The privilege of an explicit data access in the current state.
    #[inline]
    pub fn of_data(cpu: &CpuState) -> Self {
        if cpu.cpl() == 3 {
            Self::User
        } else if cpu.rflags & rflags::AC != 0 || cpu.cr4 & cr4::SMAP == 0 {
            Self::SupervisorOpen
        } else {
            Self::Supervisor
        }
    }
    /// The privilege of an instruction fetch in the current state.
    #[inline]
    pub fn of_fetch(cpu: &CpuState) -> Self {
        if cpu.cpl() == 3 {
            Self::User
        } else {
            Self::Supervisor
        }
    }
    /// Whether permission checks treat it as a user-mode access.
    pub fn is_user(self) -> bool {
        self == Self::User
    }
}

/// What a look-up gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The host address of the byte asked for.
    pub host: *mut u8,
    /// Its guest-physical address.
    pub gpa: u64,
}

/// What is kept beside a slot of the inline tables, in the low bits of the guest-physical page.
mod mark {
    /// Survives a flush of non-global translations.
    pub const GLOBAL: u64 = 1 << 0;
    pub const PRESENT: u64 = 1 << 1;
}

/// One translation for fetches, which generated code does not look up.
#[derive(Clone, Copy, Default)]
struct FetchEntry {
    /// The linear page address with bit 0 set; 0 for an empty entry.
    tag: u64,
    host: u64,
    /// The guest-physical page with its marks.
    gpa: u64,
    /// [`Tlb::generation`] when it was filled, unless it is global.
    generation: u64,
}

/// Entries of the fetch table for each privilege; a power of two.
const FETCH_ENTRIES: usize = 1024;
/// Slots noted as filled before the list is looked through for those that were emptied meanwhile.
const MANY_FILLED: usize = 1 << 17;

/// The translations of one VCPU: tables in its [`Frame`], where generated code looks them up, and
/// what only the filler needs beside them.
pub struct Tlb {
    frame: Frame,
    /// The guest-physical page of each slot with its marks, table after table.
    gpas: Vec<u64>,
    /// Slots (table and index) that were filled since they were last all empty, by whether what
    /// they hold is global. A slot that changed sides is in both.
    filled: [Vec<u32>; 2],
    fetches: Box<[[FetchEntry; FETCH_ENTRIES]; 3]>,
    jumps: Jumps,
    gaps: Gaps,
    /// What the jumps of each privilege were entered for: a number of the engine's.
    contexts: [Option<u8>; 3],
    /// Regions of 2 MiB and of 1 GiB (their numbers) of which splinters of a large page may be
    /// present: an INVLPG there must flush more, since one page's invalidation covers the whole
    /// large page (SDM vol. 3, 4.10.4.1).
    splinters: [HashSet<u64>; 2],
    /// Non-global fetch translations of earlier generations are void.
    generation: u64,
    /// Counts everything that removed or could have changed a fetch translation. What is derived
    /// from a linear address (the jump cache) compares it.
    epoch: u64,
    /// Fills since start, for statistics.
    pub fills: u64,
}

impl Default for Tlb {
    fn default() -> Self {
        Self {
            frame: Frame::default(),
            gpas: vec![0; TLB_TABLES * SLOTS],
            filled: Default::default(),
            fetches: Box::new([[FetchEntry::default(); FETCH_ENTRIES]; 3]),
            jumps: Jumps::default(),
            gaps: Gaps::default(),
            contexts: [None; 3],
            splinters: Default::default(),
            generation: 1,
            epoch: 1,
            fills: 0,
        }
    }
}

/// The inline table for data accesses.
pub fn data_table(privilege: Privilege, write: bool) -> usize {
    privilege as usize * 2 + usize::from(write)
}

fn index(linear: u64) -> usize {
    (linear >> PAGE_SHIFT) as usize & (SLOTS - 1)
}

impl Tlb {
    /// The tables and fields that generated code uses.
    pub fn frame(&self) -> &Frame {
        &self.frame
    }

    /// As [`Self::frame`], to set fields.
    pub fn frame_mut(&mut self) -> &mut Frame {
        &mut self.frame
    }

    /// The translation of `linear`, if present.
    #[inline]
    pub fn lookup(&self, linear: u64, privilege: Privilege, access: Access) -> Option<Hit> {
        let write = match access {
            Access::Read => false,
            Access::Write => true,
            Access::Fetch => {
                let entry = &self.fetches[privilege as usize][index(linear) % FETCH_ENTRIES];
                return self.is_valid(entry, linear).then(|| Hit {
                    host: entry.host.wrapping_add(linear & !PAGE_MASK) as *mut u8,
                    gpa: entry.gpa & PAGE_MASK | linear & !PAGE_MASK,
                });
            }
        };
        let (table, slot) = (data_table(privilege, write), index(linear));
        let offset = linear.wrapping_add(self.frame.slot(tlb_pages(table), slot));
        (offset < PAGE).then(|| Hit {
            host: offset.wrapping_add(self.frame.slot(tlb_hosts(table), slot)) as *mut u8,
            gpa: self.gpas[table * SLOTS + slot] & PAGE_MASK | offset,
        })
    }

    #[inline]
    fn is_valid(&self, entry: &FetchEntry, linear: u64) -> bool {
        entry.tag == (linear & PAGE_MASK) | 1
            && (entry.generation == self.generation || entry.gpa & mark::GLOBAL != 0)
    }

    /// The host address for a data access, if present.
    #[inline(always)]
    pub fn host(&self, linear: u64, privilege: Privilege, write: bool) -> Option<*mut u8> {
        let (table, slot) = (data_table(privilege, write), index(linear));
        let offset = linear.wrapping_add(self.frame.slot(tlb_pages(table), slot));
        (offset < PAGE)
            .then(|| offset.wrapping_add(self.frame.slot(tlb_hosts(table), slot)) as *mut u8)
    }

    /// Adds a translation of the page of `linear` to the page of `gpa`, which the host sees at
    /// `host` (the page's first byte). `size`: bytes of the guest's page that it is a part of.
    #[allow(clippy::too_many_arguments)]
    pub fn insert(
        &mut self,
        linear: u64,
        privilege: Privilege,
        access: Access,
        gpa: u64,
        host: *mut u8,
        global: bool,
        size: u64,
    ) {
        let page = linear & PAGE_MASK;
        let marked = gpa & PAGE_MASK | mark::PRESENT | if global { mark::GLOBAL } else { 0 };
        if size > PAGE {
            let (set, region) = if size > 2 << 20 {
                (1, linear >> 30)
            } else {
                (0, linear >> 21)
            };
            self.splinters[set].insert(region);
        }
        self.fills += 1;
        if access == Access::Fetch {
            self.fetches[privilege as usize][index(linear) % FETCH_ENTRIES] = FetchEntry {
                tag: page | 1,
                host: host as u64,
                gpa: marked,
                generation: self.generation,
            };
            return;
        }
        let table = data_table(privilege, access == Access::Write);
        let slot = index(linear);
        let flat = table * SLOTS + slot;
        if (self.gpas[flat] ^ marked) & (mark::PRESENT | mark::GLOBAL) != 0 {
            let side = &mut self.filled[usize::from(global)];
            side.push(flat as u32);
            if side.len() >= MANY_FILLED {
                self.tidy();
            }
        }
        self.gpas[flat] = marked;
        self.frame
            .set_slot(tlb_pages(table), slot, page.wrapping_neg());
        self.frame.set_slot(tlb_hosts(table), slot, host as u64);
    }

    /// Forgets slots that are empty again or changed sides, and those noted twice.
    fn tidy(&mut self) {
        for (global, side) in self.filled.iter_mut().enumerate() {
            let mark = mark::PRESENT | if global == 1 { mark::GLOBAL } else { 0 };
            side.sort_unstable();
            side.dedup();
            side.retain(|&flat| self.gpas[flat as usize] & (mark::PRESENT | mark::GLOBAL) == mark);
        }
    }

    fn clear_slot(frame: &mut Frame, gpas: &mut [u64], flat: usize) {
        gpas[flat] = 0;
        let (table, slot) = (flat / SLOTS, flat % SLOTS);
        frame.set_slot(tlb_pages(table), slot, empty(slot));
    }

    /// Empties the slots of one side whose contents are as told; the others stay noted.
    fn clear_if(&mut self, global: bool, mut wanted: impl FnMut(usize, u64) -> bool) {
        let (frame, gpas) = (&mut self.frame, &mut self.gpas);
        self.filled[usize::from(global)].retain(|&flat| {
            let flat = flat as usize;
            let gpa = gpas[flat];
            if gpa == 0 || (gpa & mark::GLOBAL != 0) != global {
                return false;
            }
            let clear = wanted(flat / SLOTS, gpa);
            if clear {
                Self::clear_slot(frame, gpas, flat);
            }
            !clear
        });
    }

    /// A value that changes whenever a fetch translation may have changed.
    #[inline]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Makes everything that compares the epoch look again.
    pub fn bump_epoch(&mut self) {
        self.epoch += 1;
    }

    /// Removes every translation.
    pub fn flush_all(&mut self) {
        self.clear_if(false, |_, _| true);
        self.clear_if(true, |_, _| true);
        self.gaps.close(&mut self.frame);
        for table in self.fetches.iter_mut() {
            table.fill(FetchEntry::default());
        }
        self.jumps.clear(&mut self.frame);
        self.splinters.iter_mut().for_each(HashSet::clear);
        self.epoch += 1;
    }

    /// Removes every translation that is not global.
    pub fn flush_non_global(&mut self) {
        self.clear_if(false, |_, _| true);
        self.gaps.close(&mut self.frame);
        self.generation += 1;
        self.jumps.clear_non_global(&mut self.frame);
        self.epoch += 1;
    }

    /// Removes the translations of one linear page, global or not (INVLPG).
    pub fn flush_page(&mut self, linear: u64) {
        let of_large = |set: usize, shift: u32| self.splinters[set].contains(&(linear >> shift));
        if of_large(0, 21) || of_large(1, 30) {
            return self.flush_all();
        }
        self.gaps.close(&mut self.frame);
        let slot = index(linear);
        for table in 0..TLB_TABLES {
            let offset = linear.wrapping_add(self.frame.slot(tlb_pages(table), slot));
            if offset < PAGE {
                Self::clear_slot(&mut self.frame, &mut self.gpas, table * SLOTS + slot);
            }
        }
        let tag = (linear & PAGE_MASK) | 1;
        for table in self.fetches.iter_mut() {
            let entry = &mut table[slot % FETCH_ENTRIES];
            if entry.tag == tag {
                *entry = FetchEntry::default();
            }
        }
        self.jumps.clear_page(&mut self.frame, linear & PAGE_MASK);
        self.epoch += 1;
    }

    /// Removes the translation of a data access to one linear page, of one privilege. The guest cannot
    /// tell.
    pub fn forget(&mut self, linear: u64, privilege: Privilege, access: Access) {
        let (table, slot) = (
            data_table(privilege, access == Access::Write),
            index(linear),
        );
        let offset = linear.wrapping_add(self.frame.slot(tlb_pages(table), slot));
        if offset < PAGE {
            Self::clear_slot(&mut self.frame, &mut self.gpas, table * SLOTS + slot);
        }
    }

    /// Removes the entries that allow `access` to a guest-physical page directly: from now on such
    /// accesses are sensed.
    pub fn revoke(&mut self, gpa: u64, access: Access) {
        let page = gpa & PAGE_MASK;
        let write = match access {
            Access::Read => 0,
            Access::Write => 1,
            Access::Fetch => return,
        };
        if access == Access::Write {
            self.gaps.revoke(&mut self.frame, gpa);
        }
        for global in [false, true] {
            self.clear_if(global, |table, gpa| {
                table % 2 == write && gpa & PAGE_MASK == page
            });
        }
    }

    /// Notes that a store by generated code missed; whether [`Self::open_gap`] is worth it there.
    pub fn wants_gap(&mut self, linear: u64, kind: u32) -> bool {
        self.gaps.is_wanted(linear, kind)
    }

    /// Lets generated code make accesses of this kind at `linear` directly, until a revocation or a
    /// flush. The caller may access the bytes so, though not the whole page.
    pub fn open_gap(&mut self, linear: u64, kind: u32, gpa: u64, host: *mut u8) {
        self.gaps
            .open(&mut self.frame, linear, kind, gpa, host as u64);
    }

    /// Lets generated code that runs with `privilege` jump from the linear address `target` to
    /// `host` without asking, until the translation of the target's page may have changed. Call
    /// after a fetch from there was translated.
    pub fn insert_jump(&mut self, privilege: Privilege, target: u64, host: u64) {
        let global = self.is_fetched_global(privilege, target);
        self.jumps
            .insert(&mut self.frame, privilege as usize, target, host, global);
    }

    /// Whether the page of `target`, from which was just fetched, is known to be global.
    fn is_fetched_global(&self, privilege: Privilege, target: u64) -> bool {
        let fetch = match privilege {
            Privilege::User => Privilege::User,
            _ => Privilege::Supervisor,
        };
        let entry = &self.fetches[fetch as usize][index(target) % FETCH_ENTRIES];
        self.is_valid(entry, target) && entry.gpa & mark::GLOBAL != 0
    }

    /// The cell through which generated code of the context with this number jumps to a constant
    /// target. Until [`Self::fill_cell`] it leads to `leave`. `None`: there are too many.
    pub fn jump_cell(&mut self, number: u8, target: u64, leave: u64) -> Option<u32> {
        self.jumps.cell(&mut self.frame, number, target, leave)
    }

    /// As [`Self::insert_jump`], for what jumps through a cell; in vain if the cell is not for this
    /// context and target.
    pub fn fill_cell(
        &mut self,
        cell: u32,
        privilege: Privilege,
        number: u8,
        target: u64,
        host: u64,
    ) {
        let global = self.is_fetched_global(privilege, target);
        self.jumps
            .fill(&mut self.frame, cell, number, target, host, global);
    }

    /// Forgets what cells are for. No generated code may use them any more.
    pub fn forget_cells(&mut self) {
        self.jumps.forget_cells(&mut self.frame);
    }

    /// From now on code with `privilege` runs in the context with this number. Jumps that were
    /// entered for another one go.
    #[inline]
    pub fn set_context(&mut self, privilege: Privilege, number: u8) {
        let context = &mut self.contexts[privilege as usize];
        if *context != Some(number) {
            *context = Some(number);
            self.jumps.clear(&mut self.frame);
        }
    }

    /// Where [`Self::insert_jump`] said that code for `target` lies, if that still holds in the
    /// context with this number.
    #[inline]
    pub fn jump(&self, privilege: Privilege, number: u8, target: u64) -> Option<u64> {
        if self.contexts[privilege as usize] != Some(number) {
            return None;
        }
        crate::jumps::find(&self.frame, privilege as usize, target)
    }

    /// Removes the jumps to `target`.
    pub fn remove_jump(&mut self, target: u64) {
        self.jumps.remove(&mut self.frame, target);
    }

    /// Removes every jump: what generated code is chosen by has changed, or all of it goes.
    pub fn remove_jumps(&mut self) {
        self.jumps.clear(&mut self.frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tlb_with(linear: u64, gpa: u64, global: bool, size: u64) -> Tlb {
        let mut tlb = Tlb::default();
        let host = 0x10_0000 as *mut u8;
        tlb.insert(
            linear,
            Privilege::User,
            Access::Write,
            gpa,
            host,
            global,
            size,
        );
        tlb
    }

    fn present(tlb: &Tlb, linear: u64) -> bool {
        tlb.lookup(linear, Privilege::User, Access::Write).is_some()
    }

    #[test]
    fn a_hit_gives_the_host_address() {
        let tlb = tlb_with(0x7000, 0x3000, false, PAGE);
        let entry = tlb.lookup(0x7123, Privilege::User, Access::Write).unwrap();
        assert_eq!((entry.host as u64, entry.gpa), (0x10_0123, 0x3123));
        assert!(tlb.lookup(0x7123, Privilege::User, Access::Read).is_none());
        assert!(
            tlb.lookup(0x7123, Privilege::Supervisor, Access::Write)
                .is_none()
        );
        assert!(!present(&tlb, 0x8000));
    }

    #[test]
    fn flushes_respect_global_entries() {
        let mut tlb = tlb_with(0x7000, 0x3000, true, PAGE);
        tlb.flush_non_global();
        assert!(present(&tlb, 0x7000));
        tlb.flush_page(0x7fff);
        assert!(!present(&tlb, 0x7000));
    }

    #[test]
    fn one_page_of_a_large_page_flushes_all_of_it() {
        let mut tlb = tlb_with(0x7000, 0x3000, false, 2 << 20);
        tlb.flush_page(0x20_0000);
        assert!(present(&tlb, 0x7000));
        tlb.flush_page(0x9000);
        assert!(!present(&tlb, 0x7000));
        let mut tlb = tlb_with(0x7000, 0x3000, false, 1 << 30);
        tlb.flush_page(1 << 30);
        assert!(present(&tlb, 0x7000));
        tlb.flush_page(0x20_0000);
        assert!(!present(&tlb, 0x7000));
    }

    #[test]
    fn a_slot_may_change_sides() {
        let mut tlb = tlb_with(0x7000, 0x3000, true, PAGE);
        let insert = |tlb: &mut Tlb, global| {
            let host = 0x10_0000 as *mut u8;
            tlb.insert(
                0x7000,
                Privilege::User,
                Access::Write,
                0x3000,
                host,
                global,
                PAGE,
            );
        };
        insert(&mut tlb, false);
        tlb.tidy();
        tlb.flush_non_global();
        assert!(!present(&tlb, 0x7000));
        insert(&mut tlb, false);
        insert(&mut tlb, true);
        tlb.flush_non_global();
        assert!(present(&tlb, 0x7000));
        tlb.flush_all();
        assert!(!present(&tlb, 0x7000));
    }

    #[test]
    fn fetches_go_with_their_flushes() {
        let mut tlb = Tlb::default();
        let host = 0x10_0000 as *mut u8;
        for (linear, global) in [(0x7000, false), (0x8000, true)] {
            tlb.insert(
                linear,
                Privilege::User,
                Access::Fetch,
                0x3000,
                host,
                global,
                PAGE,
            );
        }
        let found =
            |tlb: &Tlb, linear| tlb.lookup(linear, Privilege::User, Access::Fetch).is_some();
        assert!(found(&tlb, 0x7000) && found(&tlb, 0x8000));
        tlb.flush_non_global();
        assert!(!found(&tlb, 0x7000) && found(&tlb, 0x8000));
        tlb.flush_all();
        assert!(!found(&tlb, 0x8000));
    }

    #[test]
    fn revoking_removes_only_that_access_to_that_page() {
        let mut tlb = tlb_with(0x7000, 0x3000, false, PAGE);
        tlb.revoke(0x3000, Access::Read);
        tlb.revoke(0x4000, Access::Write);
        assert!(present(&tlb, 0x7000));
        tlb.revoke(0x3fff, Access::Write);
        assert!(!present(&tlb, 0x7000));
    }
}
