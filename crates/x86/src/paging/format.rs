//! The paging modes: what their levels are and what the bits of their entries mean (SDM vol. 3,
//! tables 4-2 to 4-20).

use super::Page;
use super::entry::{D, G, PS, RW, US, XD, bits};
use crate::CpuState;
use crate::control::{cr4, efer};

/// One level of a paging mode.
#[derive(Debug)]
pub struct Level {
    /// The lowest linear-address bit that indexes this level's table.
    pub(super) shift: u32,
    /// Bits of the index.
    width: u32,
    pub(super) kind: Kind,
}

impl Level {
    /// Which entry of this level's table a linear address uses.
    #[inline]
    pub fn index(&self, linear: u64) -> usize {
        ((linear >> self.shift) & bits(0, self.width)) as usize
    }
    /// Entries of a table.
    pub fn entries(&self) -> usize {
        1 << self.width
    }
    /// Whether an entry that is present maps a page, rather than to refer to a table.
    #[inline]
    pub fn maps_page(&self, entry: u64) -> bool {
        match self.kind {
            Kind::Page => true,
            Kind::TableOrPage => entry & PS != 0,
            Kind::Table | Kind::TableIgnoringSize | Kind::Pointer => false,
        }
    }
    /// Whether entries have rights and an accessed bit; those of PAE paging's first level have not.
    #[inline]
    pub fn has_rights(&self) -> bool {
        self.kind != Kind::Pointer
    }
}

/// What an entry of a level can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Refers to a table; PS is reserved.
    Table,
    /// Maps a page if PS is set, else refers to a table.
    TableOrPage,
    /// Refers to a table; PS is ignored (32-bit paging without CR4.PSE).
    TableIgnoringSize,
    /// A page-directory-pointer-table entry of PAE paging: no rights, no accessed bit.
    Pointer,
    /// Maps a 4 KiB page.
    Page,
}

const fn level(shift: u32, width: u32, kind: Kind) -> Level {
    Level { shift, width, kind }
}

const FOUR_LEVEL: [Level; 4] = [
    level(39, 9, Kind::Table),
    level(30, 9, Kind::TableOrPage),
    level(21, 9, Kind::TableOrPage),
    level(12, 9, Kind::Page),
];
const PAE: [Level; 3] = [
    level(30, 2, Kind::Pointer),
    level(21, 9, Kind::TableOrPage),
    level(12, 9, Kind::Page),
];
const TWO_LEVEL: [Level; 2] = [
    level(22, 10, Kind::TableIgnoringSize),
    level(12, 10, Kind::Page),
];
const TWO_LEVEL_PSE: [Level; 2] = [level(22, 10, Kind::TableOrPage), level(12, 10, Kind::Page)];

/// A paging mode: its levels and what its entries look like.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    levels: &'static [Level],
    /// The first table.
    pub(super) root: u64,
    /// Entries have 4 bytes.
    pub(super) narrow: bool,
    /// Bits reserved in every present entry.
    reserved: u64,
    /// Bits of the physical address in an entry.
    address: u64,
    address_bits: u32,
}

impl Format {
    /// The mode that the registers select, which must have paging enabled.
    pub fn of(cpu: &CpuState, address_bits: u32) -> Self {
        let width = address_bits.clamp(32, 52);
        let mut reserved = bits(width, 52);
        if cpu.efer & efer::NXE == 0 {
            reserved |= XD;
        }
        let address = bits(12, width);
        let wide = |levels, root| Self {
            levels,
            root,
            narrow: false,
            reserved,
            address,
            address_bits: width,
        };
        if cpu.long_mode() {
            wide(&FOUR_LEVEL, cpu.cr3 & address)
        } else if cpu.cr4 & cr4::PAE != 0 {
            // Bits 62 to 52 are ignored in 4-level paging but reserved in PAE paging.
            Self {
                reserved: reserved | bits(52, 63),
                ..wide(&PAE, cpu.cr3 & bits(5, 32))
            }
        } else {
            let pse = cpu.cr4 & cr4::PSE != 0;
            Self {
                levels: if pse { &TWO_LEVEL_PSE } else { &TWO_LEVEL },
                root: cpu.cr3 & bits(12, 32),
                narrow: true,
                reserved: 0,
                address: bits(12, 32),
                address_bits: width,
            }
        }
    }

    /// The reserved bits of an entry of `level`; `page`: it maps a page.
    pub(super) fn reserved(&self, level: &Level, page: bool) -> u64 {
        match level.kind {
            // SDM table 4-8, and all bits above the address width (also 63).
            Kind::Pointer => self.reserved | bits(1, 3) | bits(5, 9) | XD,
            Kind::Table => self.reserved | PS,
            Kind::TableOrPage if !page => self.reserved,
            // A 4 MiB page: bits 20 to 13 are address bits 39 to 32 (PSE-36), as far as there are
            // such.
            Kind::TableOrPage if self.narrow => {
                bits(13, 22) & !bits(13, 13 + (self.address_bits.min(40) - 32))
            }
            // Bit 12 belongs to the PAT index.
            Kind::TableOrPage => self.reserved | bits(13, level.shift),
            Kind::TableIgnoringSize | Kind::Page => self.reserved,
        }
    }

    /// From the root to the last; an entry of any but the last may map a page.
    #[inline]
    pub fn levels(&self) -> &'static [Level] {
        self.levels
    }
    /// Guest-physical address of the first table.
    #[inline]
    pub fn root(&self) -> u64 {
        self.root
    }
    /// Guest-physical address of the table that an entry refers to.
    #[inline]
    pub fn table(&self, entry: u64) -> u64 {
        entry & self.address
    }
    /// Bytes of an entry.
    pub fn entry_bytes(&self) -> u64 {
        if self.narrow { 4 } else { 8 }
    }
    /// A number for everything that decides what the bits of a present entry mean, except
    /// CR4.PGE and the address width: entries of two formats of the same number read the same.
    #[inline]
    pub fn number(&self) -> u8 {
        let mode = match self.levels.len() {
            4 => 0,
            3 => 1,
            _ if self.levels[0].kind == Kind::TableOrPage => 2,
            _ => 3,
        };
        mode | u8::from(self.reserved & XD != 0) << 2
    }

    /// What a leaf entry of `level` says of the page of `linear`. `rights` are the entries of all
    /// levels with rights, ANDed; `any` the same, ORed.
    #[inline]
    pub fn page(
        &self,
        cpu: &CpuState,
        level: &Level,
        entry: u64,
        linear: u64,
        rights: u64,
        any: u64,
    ) -> Page {
        Page {
            gpa: self.page_base(entry, level) | (linear & bits(12, level.shift)),
            size: 1 << level.shift,
            user: rights & US != 0,
            writable: rights & RW != 0,
            executable: any & XD == 0,
            global: entry & G != 0 && cpu.cr4 & cr4::PGE != 0,
            dirty: entry & D != 0,
            paged: true,
        }
    }

    /// The first byte that a leaf entry maps.
    fn page_base(&self, entry: u64, level: &Level) -> u64 {
        if self.narrow && level.shift == 22 {
            (entry & bits(22, 32))
                | (((entry >> 13) & bits(0, self.address_bits.min(40) - 32)) << 32)
        } else {
            entry & self.address & !bits(0, level.shift)
        }
    }
}
