//! The per-VCPU translation look-aside buffer: its layout is the contract between whoever fills it
//! (the monitor) and whoever looks things up in it (the engine, inline).
//!
//! An entry exists only for pages of RAM that may be accessed directly, without being sensed: a
//! page with a write trace has no write entry, a device page has none at all. So a look-up that
//! hits needs no further check, and untraced memory costs nothing extra.

use trapline_x86::CpuState;
use trapline_x86::control::{cr4, rflags};

/// Entries per table; a power of two.
pub const ENTRIES: usize = 256;
const PAGE_SHIFT: u32 = 12;
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

/// One translation.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub struct Entry {
    /// The linear page address with bit 0 set; 0 for an empty entry.
    pub tag: u64,
    /// Host address minus linear address, wrapping.
    pub addend: u64,
    /// Guest-physical page address.
    pub gpa: u64,
    /// See [`flags`].
    pub flags: u64,
}

/// Bits of [`Entry::flags`].
pub mod flags {
    /// Survives a flush of non-global translations.
    pub const GLOBAL: u64 = 1 << 0;
}

type Table = [Entry; ENTRIES];

/// The translations of one VCPU.
pub struct Tlb {
    /// Indexed by privilege times 3 plus access.
    tables: Box<[Table; 9]>,
    /// A splinter of a large page may be present: an INVLPG must then flush everything, since one
    /// page's invalidation covers the whole large page (SDM vol. 3, 4.10.4.1).
    splinters: bool,
    /// Counts everything that removed or could have changed a fetch translation. What is derived
    /// from a linear address (the jump cache) compares it.
    epoch: u64,
    /// Fills since start, for statistics.
    pub fills: u64,
}

impl Default for Tlb {
    fn default() -> Self {
        Self {
            tables: Box::new([[Entry::default(); ENTRIES]; 9]),
            splinters: false,
            epoch: 1,
            fills: 0,
        }
    }
}

impl Tlb {
    #[inline]
    fn slot(linear: u64) -> usize {
        (linear >> PAGE_SHIFT) as usize & (ENTRIES - 1)
    }

    /// The entry for `linear`, if present.
    #[inline]
    pub fn lookup(&self, linear: u64, privilege: Privilege, access: Access) -> Option<&Entry> {
        let entry = &self.tables[privilege as usize * 3 + access as usize][Self::slot(linear)];
        (entry.tag == (linear & PAGE_MASK) | 1).then_some(entry)
    }

    /// Adds a translation of the page of `linear` to the page of `gpa`, which the host sees at
    /// `host` (the page's first byte).
    #[allow(clippy::too_many_arguments)]
    pub fn insert(
        &mut self,
        linear: u64,
        privilege: Privilege,
        access: Access,
        gpa: u64,
        host: *mut u8,
        global: bool,
        large: bool,
    ) {
        let page = linear & PAGE_MASK;
        self.tables[privilege as usize * 3 + access as usize][Self::slot(linear)] = Entry {
            tag: page | 1,
            addend: (host as u64).wrapping_sub(page),
            gpa: gpa & PAGE_MASK,
            flags: if global { flags::GLOBAL } else { 0 },
        };
        self.splinters |= large;
        self.fills += 1;
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
        for table in self.tables.iter_mut() {
            table.fill(Entry::default());
        }
        self.splinters = false;
        self.epoch += 1;
    }

    /// Removes every translation that is not global.
    pub fn flush_non_global(&mut self) {
        for entry in self.tables.iter_mut().flatten() {
            if entry.flags & flags::GLOBAL == 0 {
                *entry = Entry::default();
            }
        }
        self.epoch += 1;
    }

    /// Removes the translations of one linear page, global or not (INVLPG).
    pub fn flush_page(&mut self, linear: u64) {
        if self.splinters {
            return self.flush_all();
        }
        let tag = (linear & PAGE_MASK) | 1;
        for table in self.tables.iter_mut() {
            let entry = &mut table[Self::slot(linear)];
            if entry.tag == tag {
                *entry = Entry::default();
            }
        }
        self.epoch += 1;
    }

    /// Removes the entries that allow `access` to a guest-physical page directly: from now on such
    /// accesses are sensed.
    pub fn revoke(&mut self, gpa: u64, access: Access) {
        let page = gpa & PAGE_MASK;
        for privilege in 0..3 {
            for entry in &mut self.tables[privilege * 3 + access as usize] {
                if entry.tag != 0 && entry.gpa == page {
                    *entry = Entry::default();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tlb_with(linear: u64, gpa: u64, global: bool, large: bool) -> Tlb {
        let mut tlb = Tlb::default();
        let host = 0x10_0000 as *mut u8;
        tlb.insert(
            linear,
            Privilege::User,
            Access::Write,
            gpa,
            host,
            global,
            large,
        );
        tlb
    }

    fn present(tlb: &Tlb, linear: u64) -> bool {
        tlb.lookup(linear, Privilege::User, Access::Write).is_some()
    }

    #[test]
    fn a_hit_gives_the_host_address() {
        let tlb = tlb_with(0x7000, 0x3000, false, false);
        let entry = tlb.lookup(0x7123, Privilege::User, Access::Write).unwrap();
        assert_eq!(entry.addend.wrapping_add(0x7123), 0x10_0123);
        assert!(tlb.lookup(0x7123, Privilege::User, Access::Read).is_none());
        assert!(
            tlb.lookup(0x7123, Privilege::Supervisor, Access::Write)
                .is_none()
        );
        assert!(!present(&tlb, 0x8000));
    }

    #[test]
    fn flushes_respect_global_entries() {
        let mut tlb = tlb_with(0x7000, 0x3000, true, false);
        tlb.flush_non_global();
        assert!(present(&tlb, 0x7000));
        tlb.flush_page(0x7fff);
        assert!(!present(&tlb, 0x7000));
    }

    #[test]
    fn one_page_of_a_large_page_flushes_all_of_it() {
        let mut tlb = tlb_with(0x7000, 0x3000, false, true);
        tlb.flush_page(0x9000);
        assert!(!present(&tlb, 0x7000));
    }

    #[test]
    fn revoking_removes_only_that_access_to_that_page() {
        let mut tlb = tlb_with(0x7000, 0x3000, false, false);
        tlb.revoke(0x3000, Access::Read);
        tlb.revoke(0x4000, Access::Write);
        assert!(present(&tlb, 0x7000));
        tlb.revoke(0x3fff, Access::Write);
        assert!(!present(&tlb, 0x7000));
    }
}
