//! Starting ELF kernels by Xen's PVH protocol (Xen, docs/misc/pvh.pandoc, and its
//! public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use trapline_x86::Gpr;
use vm_memory::ByteValued;

use super::elf::Elf;
use super::error::KernelFault;
use super::image::{Image, Source};
use super::initramfs::Side;
use super::layout::{
    BOOT_INFO, BOOT_TABLES, CMDLINE, CMDLINE_BYTES, RangeKind, low_memory_end, memory_map,
};
use super::{BootState, Context, Fault, Protocol};

/// The module list has one entry; the memory map follows.
const MODULES: u64 = BOOT_TABLES;
const MEMORY_MAP: u64 = BOOT_TABLES + size_of::<hvm_modlist_entry>() as u64;

pub fn load<S: Source>(
    context: &mut Context<'_>,
    image: &mut Image<S>,
    elf: &Elf,
    entry: u32,
) -> Result<BootState, Fault> {
    if !elf.holds(entry.into()) {
        let what = "its PVH entry point is outside what it loads";
        return Err(KernelFault::Damaged(what).into());
    }
    let kernel_end = elf.load(context, image)?;
    context.write_cmdline(CMDLINE_BYTES)?;

    let map: Vec<_> = memory_map(context.memory)
        .into_iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.end - range.start,
            type_: match range.kind {
                RangeKind::Ram => XEN_HVM_MEMMAP_TYPE_RAM,
                RangeKind::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
            },
            reserved: 0,
        })
        .collect();
    let map_bytes: Vec<u8> = map.iter().flat_map(|e| e.as_slice()).copied().collect();
    context.write(MEMORY_MAP, &map_bytes)?;

    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: context.acpi_rsdp.unwrap_or(0),
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some(initramfs) = &mut context.initramfs {
        let high = low_memory_end(context.memory);
        let placed = initramfs.place(context.memory, kernel_end, high, Side::High)?;
        let module = hvm_modlist_entry {
            paddr: placed.start,
            size: placed.size,
            ..Default::default()
        };
        context.write(MODULES, module.as_slice())?;
        info.modlist_paddr = MODULES;
        info.nr_modules = 1;
    }
    context.write(BOOT_INFO, info.as_slice())?;

    Ok(BootState {
        protocol: Protocol::Pvh,
        entry: entry.into(),
        registers: vec![(Gpr::Rbx, BOOT_INFO)],
    })
}
