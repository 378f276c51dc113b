//! The bootstrap processor's state when the kernel begins.

use trapline_x86::control::{cr0, cr4, efer, rflags};
use trapline_x86::segment::{Rights, TableRegister};
use trapline_x86::state::{Activity, InterruptShadow};
use trapline_x86::{CpuState, Gpr, Segment, SegmentRegister};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::LoadError;
use super::layout::{GDT, PAGE_TABLES};

/// `__BOOT_CS` of the Linux boot protocol.
const CODE_SELECTOR: u16 = 0x10;
/// `__BOOT_DS` of the Linux boot protocol.
const DATA_SELECTOR: u16 = 0x18;
/// Accessed, readable code.
const CODE_TYPE: u32 = Rights::CODE | Rights::WRITABLE_OR_READABLE | Rights::ACCESSED;
/// Accessed, writable data.
const DATA_TYPE: u32 = Rights::WRITABLE_OR_READABLE | Rights::ACCESSED;
const COMMON: u32 = Rights::P | Rights::S | Rights::G;

/// How the kernel was asked to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// The Linux 64-bit boot protocol: 64-bit mode, the first 4 GiB mapped one to one.
    Linux64,
    /// Xen's PVH: 32-bit protected mode without paging.
    Pvh,
    /// Multiboot 1: 32-bit protected mode without paging.
    Multiboot,
}

/// Where the bootstrap processor begins and with what in its registers. The GDT and page tables
/// it refers to are in guest memory already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootState {
    pub protocol: Protocol,
    /// Guest-physical address of the first instruction.
    pub entry: u64,
    /// General registers that are not zero.
    pub registers: Vec<(Gpr, u64)>,
}

impl BootState {
    fn is_64_bit(&self) -> bool {
        self.protocol == Protocol::Linux64
    }

    /// Writes the GDT and, for a 64-bit entry, the page tables to guest memory.
    pub(super) fn write_tables(&self, memory: &GuestMemoryMmap<()>) -> Result<(), LoadError> {
        let gdt = [0, 0, descriptor(&self.code()), descriptor(&self.data())];
        write_quadwords(memory, GDT, &gdt)?;
        if self.is_64_bit() {
            write_identity_map(memory)?;
        }
        Ok(())
    }

    fn code(&self) -> Segment {
        let size = if self.is_64_bit() {
            Rights::L
        } else {
            Rights::DB
        };
        let rights = Rights(COMMON | CODE_TYPE | size);
        Segment {
            base: 0,
            limit: u32::MAX,
            rights,
            selector: CODE_SELECTOR,
        }
    }

    fn data(&self) -> Segment {
        let rights = Rights(COMMON | DATA_TYPE | Rights::DB);
        Segment {
            base: 0,
            limit: u32::MAX,
            rights,
            selector: DATA_SELECTOR,
        }
    }

    /// Puts the bootstrap processor into this state. What the boot protocols leave open (MSRs,
    /// vector state, debug registers) stays as it is.
    pub fn apply(&self, cpu: &mut CpuState) {
        cpu.gpr = [0; 16];
        for (register, value) in &self.registers {
            cpu.set_gpr(*register, *value);
        }
        cpu.rip = self.entry;
        cpu.rflags = rflags::ONE;
        cpu.seg = [self.data(); 6];
        *cpu.segment_mut(SegmentRegister::Cs) = self.code();
        cpu.cpl = 0;
        cpu.gdtr = TableRegister {
            base: GDT,
            limit: 4 * 8 - 1,
        };
        // Nothing may be taken before the kernel has set its own.
        cpu.idtr = TableRegister { base: 0, limit: 0 };
        let busy_tss = Rights(Rights::P | 11);
        cpu.tr = Segment {
            base: 0,
            limit: 0x67,
            rights: busy_tss,
            selector: 0,
        };
        cpu.ldtr = Segment::null(0);
        cpu.cr2 = 0;
        if self.is_64_bit() {
            cpu.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::PG;
            cpu.cr3 = PAGE_TABLES;
            cpu.cr4 = cr4::PAE;
            cpu.efer = efer::LME | efer::LMA;
        } else {
            cpu.cr0 = cr0::PE | cr0::ET;
            cpu.cr3 = 0;
            cpu.cr4 = 0;
            cpu.efer = 0;
        }
        cpu.activity = Activity::Active;
        cpu.shadow = InterruptShadow::None;
        cpu.nmi_blocked = false;
    }
}

/// The descriptor (SDM vol. 3, 3.4.5) from which a load gives `segment`; its limit is 4 GiB - 1.
fn descriptor(segment: &Segment) -> u64 {
    let rights = u64::from(segment.rights.0 & 0xf0ff);
    let limit = u64::from(segment.limit >> 12);
    let base = segment.base & 0xffff_ffff;
    (limit & 0xffff)
        | ((base & 0xff_ffff) << 16)
        | (rights << 40)
        | ((limit >> 16) << 48)
        | ((base >> 24) << 56)
}

/// Maps the first 4 GiB one to one with pages of 2 MiB: one PML4, one PDPT, four page directories.
fn write_identity_map(memory: &GuestMemoryMmap<()>) -> Result<(), LoadError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const PAGE: u64 = 4096;
    let table = |n: u64| PAGE_TABLES + n * PAGE;
    let mut entries = [0; 512];
    entries[0] = table(1) | PRESENT_WRITABLE;
    write_quadwords(memory, table(0), &entries)?;
    for (n, entry) in (0..).zip(&mut entries[..4]) {
        *entry = table(2 + n) | PRESENT_WRITABLE;
    }
    write_quadwords(memory, table(1), &entries)?;
    for directory in 0..4 {
        for (n, entry) in (0..).zip(&mut entries) {
            *entry = ((directory * 512 + n) << 21) | LARGE | PRESENT_WRITABLE;
        }
        write_quadwords(memory, table(2 + directory), &entries)?;
    }
    Ok(())
}

fn write_quadwords(
    memory: &GuestMemoryMmap<()>,
    address: u64,
    values: &[u64],
) -> Result<(), LoadError> {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    memory
        .write_slice(&bytes, GuestAddress(address))
        .map_err(|_| LoadError::NoLowMemory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use trapline_x86::Mode;

    fn state(protocol: Protocol) -> BootState {
        BootState {
            protocol,
            entry: 0x10_0200,
            registers: vec![(Gpr::Rsi, 0x7000)],
        }
    }

    #[test]
    fn the_linux_entry_is_64_bit_with_interrupts_off() {
        let mut cpu = CpuState::reset();
        cpu.gpr = [9; 16];
        state(Protocol::Linux64).apply(&mut cpu);
        assert_eq!(cpu.mode(), Mode::Long64);
        assert!(cpu.paging() && !cpu.interrupts_enabled());
        assert_eq!(
            (cpu.rip, cpu.gpr(Gpr::Rsi), cpu.gpr(Gpr::Rax)),
            (0x10_0200, 0x7000, 0)
        );
        assert_eq!((cpu.cs().selector, cpu.ss().selector), (0x10, 0x18));
    }

    #[test]
    fn the_other_entries_are_32_bit_without_paging() {
        for protocol in [Protocol::Pvh, Protocol::Multiboot] {
            let mut cpu = CpuState::reset();
            state(protocol).apply(&mut cpu);
            assert_eq!(cpu.mode(), Mode::Protected32);
            assert!(!cpu.paging() && !cpu.long_mode());
            assert_eq!(cpu.cs().limit, u32::MAX);
        }
    }

    #[test]
    fn the_gdt_in_memory_matches_the_hidden_parts() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let read = |at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        state(Protocol::Linux64).write_tables(&memory).unwrap();
        assert_eq!(
            (read(GDT + 0x10), read(GDT + 0x18)),
            (0xaf_9b00_0000_ffff, 0xcf_9300_0000_ffff)
        );
        state(Protocol::Pvh).write_tables(&memory).unwrap();
        assert_eq!(read(GDT + 0x10), 0xcf_9b00_0000_ffff);
    }

    #[test]
    fn the_page_tables_map_4_gib_one_to_one() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let read = |at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        state(Protocol::Linux64).write_tables(&memory).unwrap();
        for linear in [0u64, 0x10_0000, 0x1234_5678, 0xffff_f000] {
            let mut table = PAGE_TABLES;
            for shift in [39, 30, 21] {
                let entry = read(table + ((linear >> shift) & 511) * 8);
                assert_eq!(entry & 0b11, 0b11);
                table = entry & 0x000f_ffff_ffff_f000;
            }
            assert_eq!(table, linear & !0x1f_ffff);
        }
        assert_eq!(read(PAGE_TABLES + 8), 0);
    }
}
