//! The walk itself.

use super::entry::{A, D, G, P, PS, RW, US, XD, bits};
use super::{Page, PhysicalMemory, Request};
use crate::control::{cr0, cr4, efer};
use crate::exception::page_fault;
use crate::{CpuState, Exception};

const PAGE_MASK: u64 = !0xfff;

/// One level of a paging mode.
struct Level {
    /// The lowest linear-address bit that indexes this level's table.
    shift: u32,
    /// Bits of the index.
    width: u32,
    kind: Kind,
}

/// What an entry of a level can be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
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
struct Format {
    levels: &'static [Level],
    /// The first table.
    root: u64,
    /// Entries have 4 bytes.
    narrow: bool,
    /// Bits reserved in every present entry.
    reserved: u64,
    /// Bits of the physical address in an entry.
    address: u64,
    address_bits: u32,
}

impl Format {
    fn of(cpu: &CpuState, address_bits: u32) -> Self {
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
    fn reserved(&self, level: &Level, page: bool) -> u64 {
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

/// An entry that a translation used.
#[derive(Clone, Copy, Default)]
struct Used {
    gpa: u64,
    value: u64,
    /// Bits to be set in it.
    set: u64,
}

/// Translates `linear` for an access as the current paging mode does, sets the accessed bit in
/// every entry used and, for a write, the dirty bit in the last one. Outside long mode the upper 32
/// bits of `linear` are ignored; in long mode the caller has checked that it is canonical.
///
/// No entry is written when the access faults.
///
/// # Errors
/// #PF with its error code and CR2.
pub fn walk(
    cpu: &CpuState,
    memory: &mut impl PhysicalMemory,
    linear: u64,
    request: Request,
) -> Result<Page, Exception> {
    let linear = if cpu.long_mode() {
        linear
    } else {
        linear & 0xffff_ffff
    };
    if !cpu.paging() {
        return Ok(Page {
            gpa: linear & PAGE_MASK,
            size: 4096,
            user: true,
            writable: true,
            executable: true,
            global: false,
            dirty: true,
            paged: false,
        });
    }
    let format = Format::of(cpu, memory.address_bits());
    loop {
        // A lost race means that another VCPU changed the entry: what it says now counts.
        if let Some(page) = attempt(cpu, memory, &format, linear, request)? {
            return Ok(page);
        }
    }
}

/// One walk; `None` if an entry changed before its bits were set.
fn attempt(
    cpu: &CpuState,
    memory: &mut impl PhysicalMemory,
    format: &Format,
    linear: u64,
    request: Request,
) -> Result<Option<Page>, Exception> {
    let fault = |bits| page_fault_of(cpu, linear, request, bits);
    let mut used = [Used::default(); 4];
    let mut table = format.root;
    let mut rights = RW | US;
    let mut execute_disable = false;
    for (depth, level) in format.levels.iter().enumerate() {
        let index = (linear >> level.shift) & bits(0, level.width);
        let gpa = table + index * if format.narrow { 4 } else { 8 };
        let value = read(memory, format, gpa);
        if value & P == 0 {
            return Err(fault(0));
        }
        let is_page = match level.kind {
            Kind::Page => true,
            Kind::TableOrPage => value & PS != 0,
            Kind::Table | Kind::TableIgnoringSize | Kind::Pointer => false,
        };
        if value & format.reserved(level, is_page) != 0 {
            return Err(fault(page_fault::PRESENT | page_fault::RESERVED));
        }
        if level.kind != Kind::Pointer {
            rights &= value;
            execute_disable |= value & XD != 0;
            used[depth] = Used {
                gpa,
                value,
                set: A & !value,
            };
        }
        if !is_page {
            table = value & format.address;
            continue;
        }
        let mut page = Page {
            gpa: format.page_base(value, level) | (linear & bits(12, level.shift)),
            size: 1 << level.shift,
            user: rights & US != 0,
            writable: rights & RW != 0,
            executable: !execute_disable,
            global: value & G != 0 && cpu.cr4 & cr4::PGE != 0,
            dirty: value & D != 0,
            paged: true,
        };
        if !page.permits(cpu, request) {
            return Err(fault(page_fault::PRESENT));
        }
        if request.write {
            used[depth].set |= D & !value;
            page.dirty = true;
        }
        let changed = used[..=depth]
            .iter()
            .any(|entry| !update(memory, format, entry));
        return Ok((!changed).then_some(page));
    }
    // Every format ends with a level whose entries map pages.
    Err(fault(0))
}

fn read(memory: &mut impl PhysicalMemory, format: &Format, gpa: u64) -> u64 {
    if format.narrow {
        memory.read_u32(gpa).unwrap_or(u32::MAX) as u64
    } else {
        memory.read_u64(gpa).unwrap_or(u64::MAX)
    }
}

/// Sets an entry's bits; false if it has changed since it was read.
fn update(memory: &mut impl PhysicalMemory, format: &Format, entry: &Used) -> bool {
    if entry.set == 0 {
        return true;
    }
    let new = entry.value | entry.set;
    let found = if format.narrow {
        memory
            .compare_exchange_u32(entry.gpa, entry.value as u32, new as u32)
            .map_err(|found| found as u64)
    } else {
        memory.compare_exchange_u64(entry.gpa, entry.value, new)
    };
    // `Err(value)`: memory that cannot be written.
    found.map_or_else(|found| found == entry.value, |()| true)
}

/// A page fault's error code (SDM vol. 3, 4.7): `bits` plus what the access was.
fn page_fault_of(cpu: &CpuState, linear: u64, request: Request, bits: u32) -> Exception {
    debug_assert!(cpu.cr0 & cr0::PG != 0);
    let mut error = bits;
    if request.write {
        error |= page_fault::WRITE;
    }
    if request.user {
        error |= page_fault::USER;
    }
    let pae = cpu.cr4 & cr4::PAE != 0;
    let reports_fetch = cpu.cr4 & cr4::SMEP != 0 || (pae && cpu.efer & efer::NXE != 0);
    if request.fetch && reports_fetch {
        error |= page_fault::FETCH;
    }
    Exception::page_fault(linear, error)
}
