//! Where things lie in guest memory before the kernel runs.
//!
//! | address | content |
//! | --- | --- |
//! | 0x500 | GDT |
//! | 0x7000 | zero page, PVH start info or Multiboot information |
//! | 0x8000 | its tables: memory map, module list, strings |
//! | 0x9000 | page tables for the 64-bit entry, 6 pages |
//! | 0x20000 | command line, up to 64 KiB |
//! | 0x9fc00 | reserved: extended BIOS data area, video memory, firmware tables |
//! | 0x100000 | the kernel and everything else |

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

pub const GDT: u64 = 0x500;
pub const BOOT_INFO: u64 = 0x7000;
pub const BOOT_TABLES: u64 = 0x8000;
pub const PAGE_TABLES: u64 = 0x9000;
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes for the command line and its terminating NUL.
pub const CMDLINE_BYTES: usize = 0x1_0000;
/// End of the low RAM; from here to [`HIGH_RAM`] everything is reserved.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Where the ACPI tables begin (within the reserved range), the RSDP first.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Where RAM for the kernel begins.
pub const HIGH_RAM: u64 = 0x10_0000;
/// Where RAM below 4 GiB ends at the latest; device registers follow.
pub const DEVICE_HOLE: u64 = 0xc000_0000;

/// What a range of guest-physical memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    Ram,
    Reserved,
}

/// A half-open range [`start`, `end`) of guest-physical memory as the kernel is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    pub start: u64,
    pub end: u64,
    pub kind: RangeKind,
}

/// The memory map for the kernel (e820): RAM and what is reserved of it, in ascending order.
pub fn memory_map(memory: &GuestMemoryMmap<()>) -> Vec<MemoryRange> {
    let mut map = Vec::new();
    let mut push = |start: u64, end: u64, kind| {
        if start < end {
            map.push(MemoryRange { start, end, kind });
        }
    };
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start.saturating_add(region.len());
        push(start, end.min(LOW_RAM_END), RangeKind::Ram);
        push(
            start.max(LOW_RAM_END),
            end.min(HIGH_RAM),
            RangeKind::Reserved,
        );
        push(start.max(HIGH_RAM), end, RangeKind::Ram);
    }
    map
}

/// Where the RAM that begins at address 0 ends: the first byte behind it, or 0 if there is none.
pub fn low_memory_end(memory: &GuestMemoryMmap<()>) -> u64 {
    memory
        .iter()
        .find(|r| r.start_addr().raw_value() == 0)
        .map_or(0, |r| r.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn the_map_has_the_hole_and_both_parts_of_ram() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[
            (GuestAddress(0), 8 << 20),
            (GuestAddress(4 << 30), 4 << 20),
        ])
        .unwrap();
        let range = |start, end, kind| MemoryRange { start, end, kind };
        assert_eq!(
            memory_map(&memory),
            [
                range(0, 0x9_fc00, RangeKind::Ram),
                range(0x9_fc00, 0x10_0000, RangeKind::Reserved),
                range(0x10_0000, 8 << 20, RangeKind::Ram),
                range(4 << 30, (4 << 30) + (4 << 20), RangeKind::Ram),
            ]
        );
        assert_eq!(low_memory_end(&memory), 8 << 20);
    }
}
