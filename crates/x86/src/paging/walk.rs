//! The walk itself.

use super::entry::{A, D, P, RW, US};
use super::format::Format;
use super::{Page, PhysicalMemory, Request};
use crate::control::{cr0, cr4, efer};
use crate::exception::page_fault;
use crate::{CpuState, Exception};

const PAGE_MASK: u64 = !0xfff;

/// An entry that a translation used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Guest-physical address of the entry's table.
    pub table: u64,
    /// Which of its entries.
    pub index: usize,
    /// What it said when it was read.
    pub value: u64,
    /// Bits that the walk has set in it since, where the memory can be written.
    pub set: u64,
}

/// The entries that a translation used, from the root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    used: [Used; 4],
    depth: usize,
}

impl Path {
    /// Empty without paging.
    pub fn entries(&self) -> &[Used] {
        &self.used[..self.depth]
    }
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
    walk_path(cpu, memory, linear, request).map(|(page, _)| page)
}

/// As [`walk`], with the entries used: for whoever derives something from them.
///
/// # Errors
/// As [`walk`].
pub fn walk_path(
    cpu: &CpuState,
    memory: &mut impl PhysicalMemory,
    linear: u64,
    request: Request,
) -> Result<(Page, Path), Exception> {
    let linear = if cpu.long_mode() {
        linear
    } else {
        linear & 0xffff_ffff
    };
    if !cpu.paging() {
        let page = Page {
            gpa: linear & PAGE_MASK,
            size: 4096,
            user: true,
            writable: true,
            executable: true,
            global: false,
            dirty: true,
            paged: false,
        };
        return Ok((page, Path::default()));
    }
    let format = Format::of(cpu, memory.address_bits());
    loop {
        // A lost race means that another VCPU changed the entry: what it says now counts.
        if let Some(found) = attempt(cpu, memory, &format, linear, request)? {
            return Ok(found);
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
) -> Result<Option<(Page, Path)>, Exception> {
    let fault = |bits| page_fault_of(cpu, linear, request, bits);
    let mut used = [Used::default(); 4];
    let mut table = format.root();
    let mut rights = RW | US;
    let mut any = 0;
    for (depth, level) in format.levels().iter().enumerate() {
        let index = level.index(linear);
        let value = read(memory, format, address(format, table, index));
        if value & P == 0 {
            return Err(fault(0));
        }
        let is_page = level.maps_page(value);
        if value & format.reserved(level, is_page) != 0 {
            return Err(fault(page_fault::PRESENT | page_fault::RESERVED));
        }
        used[depth] = Used {
            table,
            index,
            value,
            set: 0,
        };
        if level.has_rights() {
            rights &= value;
            any |= value;
            used[depth].set = A & !value;
        }
        if !is_page {
            table = format.table(value);
            continue;
        }
        let mut page = format.page(cpu, level, value, linear, rights, any);
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
        let path = Path {
            used,
            depth: depth + 1,
        };
        return Ok((!changed).then_some((page, path)));
    }
    // Every format ends with a level whose entries map pages.
    Err(fault(0))
}

fn address(format: &Format, table: u64, index: usize) -> u64 {
    table + index as u64 * format.entry_bytes()
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
    let gpa = address(format, entry.table, entry.index);
    let new = entry.value | entry.set;
    let found = if format.narrow {
        memory
            .compare_exchange_u32(gpa, entry.value as u32, new as u32)
            .map_err(|found| found as u64)
    } else {
        memory.compare_exchange_u64(gpa, entry.value, new)
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
