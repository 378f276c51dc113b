//! The page walk (SDM vol. 3, chapter 4): from a linear address and the kind of access to a
//! guest-physical page, or a page fault with its exact error code.
//!
//! The walk keeps no state: it reads the paging structures through [`PhysicalMemory`], so an
//! implementer sees each entry that a translation depends on and each accessed or dirty bit that is
//! set.

pub mod entry;
mod format;
mod walk;

#[cfg(test)]
mod tests;

pub use format::{Format, Level};
pub use walk::{Path, Used, walk, walk_path};

use crate::CpuState;
use crate::control::{cr0, cr4};

/// The physical-address width that [`PhysicalMemory::address_bits`] gives unless overridden.
pub const DEFAULT_ADDRESS_BITS: u32 = 46;

/// Guest-physical memory as the page walk sees it. Addresses are multiples of the access size.
pub trait PhysicalMemory {
    /// Reads a paging-structure entry in one access; `None` where nothing is mapped (the walk then
    /// sees all ones, as on a bus that nobody answers).
    fn read_u64(&mut self, gpa: u64) -> Option<u64>;
    /// As [`Self::read_u64`], for 32-bit paging.
    fn read_u32(&mut self, gpa: u64) -> Option<u32>;

    /// Replaces `old` by `new` atomically: an accessed or dirty bit is being set, which is a write
    /// to guest memory like any other.
    ///
    /// # Errors
    /// The value found when it was not `old`: the walk starts again. `Err(old)` says that the
    /// memory cannot be written (ROM, a hole): the walk goes on without the bit.
    fn compare_exchange_u64(&mut self, gpa: u64, old: u64, new: u64) -> Result<(), u64>;
    /// As [`Self::compare_exchange_u64`], for 32-bit paging.
    fn compare_exchange_u32(&mut self, gpa: u64, old: u32, new: u32) -> Result<(), u32>;

    /// The physical-address width in bits, 36 to 52, which must be that of CPUID leaf 0x8000_0008:
    /// address bits from there on are reserved in paging-structure entries.
    fn address_bits(&self) -> u32 {
        DEFAULT_ADDRESS_BITS
    }
}

/// What is known of an access when its address is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Request {
    /// A write or read-modify-write.
    pub write: bool,
    /// An instruction fetch.
    pub fetch: bool,
    /// A user-mode access: CPL 3, and not an implicit access to a system structure.
    pub user: bool,
    /// A supervisor-mode data access to which SMAP applies if CR4.SMAP is set: an implicit one, or
    /// an explicit one with RFLAGS.AC clear.
    pub smap_closed: bool,
}

impl Request {
    pub const fn read(user: bool) -> Self {
        Self {
            write: false,
            fetch: false,
            user,
            smap_closed: false,
        }
    }
    pub const fn write(user: bool) -> Self {
        Self {
            write: true,
            ..Self::read(user)
        }
    }
    pub const fn fetch(user: bool) -> Self {
        Self {
            fetch: true,
            ..Self::read(user)
        }
    }
    /// The same access, subject to SMAP.
    pub const fn smap_closed(self) -> Self {
        Self {
            smap_closed: true,
            ..self
        }
    }
}

/// A translation: everything that decides later accesses to the same page without another walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Guest-physical address of the 4 KiB page that holds the linear address.
    pub gpa: u64,
    /// Bytes that the leaf entry maps: 4 KiB, 2 MiB, 4 MiB or 1 GiB; 4 KiB without paging.
    pub size: u64,
    /// U/S is set in every entry: a user-mode address.
    pub user: bool,
    /// R/W is set in every entry.
    pub writable: bool,
    /// No entry forbids execution (XD).
    pub executable: bool,
    /// The translation survives a change of CR3.
    pub global: bool,
    /// The dirty bit is set: writes need no walk. Always set without paging.
    pub dirty: bool,
    /// The access is translated by paging (CR0.PG): permissions apply.
    pub paged: bool,
}

impl Page {
    /// Whether an access is permitted by the rights of the page (SDM vol. 3, 4.6.1). A write may
    /// be permitted and still need a walk because [`Self::dirty`] is clear.
    pub fn permits(&self, cpu: &CpuState, request: Request) -> bool {
        if !self.paged {
            return true;
        }
        if request.user {
            return self.user
                && (!request.write || self.writable)
                && (!request.fetch || self.executable);
        }
        if request.fetch {
            return self.executable && !(self.user && cpu.cr4 & cr4::SMEP != 0);
        }
        if self.user && request.smap_closed && cpu.cr4 & cr4::SMAP != 0 {
            return false;
        }
        !request.write || self.writable || cpu.cr0 & cr0::WP == 0
    }

    /// Whether a TLB entry for accesses of this kind may be made: permitted, and for writes with
    /// the dirty bit set already.
    pub fn cacheable(&self, cpu: &CpuState, request: Request) -> bool {
        (!request.write || self.dirty) && self.permits(cpu, request)
    }
}
