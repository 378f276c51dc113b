//! Starting small kernels by Multiboot 1 (Multiboot Specification 0.6.96).

use trapline_x86::Gpr;

use super::elf::Elf;
use super::error::KernelFault;
use super::image::{Image, Source, require_ram, u32_at};
use super::initramfs::Side;
use super::layout::{
    BOOT_INFO, BOOT_TABLES, CMDLINE, CMDLINE_BYTES, HIGH_RAM, LOW_RAM_END, RangeKind,
    low_memory_end, memory_map,
};
use super::{BootState, Context, Fault, Protocol};

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What EAX holds at the entry point.
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// Header flags a loader must know or refuse; modules on page boundaries, memory information and
/// a video mode (a wish that the serial line cannot grant) are known.
const REQUIREMENTS: u32 = 0xffff;
const KNOWN_REQUIREMENTS: u32 = 0b111;
/// Header flag: the address fields are valid and used rather than ELF headers.
const ADDRESS_FIELDS: u32 = 1 << 16;

/// Information flags: which fields are valid.
const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
/// Bytes of the information structure up to the framebuffer fields.
const INFO_BYTES: usize = 88;

/// Where the tables lie: one module, the loader's name, the memory map.
const MODULES: u64 = BOOT_TABLES;
const LOADER_NAME: u64 = BOOT_TABLES + 0x20;
const MEMORY_MAP: u64 = BOOT_TABLES + 0x40;

/// A Multiboot header found in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its offset in the file.
    offset: u64,
    flags: u32,
    addresses: Addresses,
}

/// The header's address fields, meaningful with [`ADDRESS_FIELDS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
struct Addresses {
    header: u32,
    load: u32,
    /// 0: the whole file.
    load_end: u32,
    /// 0: nothing to clear.
    bss_end: u32,
    entry: u32,
}

/// Finds the header in a file's first 8 KiB, on a boundary of 4 bytes.
pub fn find_header(beginning: &[u8]) -> Option<Header> {
    (0..beginning.len()).step_by(4).find_map(|offset| {
        let field = |n: usize| u32_at(beginning, offset + 4 * n);
        let (magic, flags, checksum) = (field(0)?, field(1)?, field(2)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            return None;
        }
        let addresses = match flags & ADDRESS_FIELDS {
            0 => Addresses::default(),
            _ => Addresses {
                header: field(3)?,
                load: field(4)?,
                load_end: field(5)?,
                bss_end: field(6)?,
                entry: field(7)?,
            },
        };
        Some(Header {
            offset: offset as u64,
            flags,
            addresses,
        })
    })
}

pub fn load<S: Source>(
    context: &mut Context<'_>,
    image: &mut Image<S>,
    header: &Header,
    elf: Option<&Elf>,
) -> Result<BootState, Fault> {
    if header.flags & REQUIREMENTS & !KNOWN_REQUIREMENTS != 0 {
        let what = "a Multiboot kernel that requires features unknown to Multiboot 1";
        return Err(KernelFault::Unsuitable(what).into());
    }
    let (entry, kernel_end) = if header.flags & ADDRESS_FIELDS != 0 {
        load_by_addresses(context, image, header)?
    } else if let Some(elf) = elf {
        let outside = KernelFault::Damaged("its entry point is outside what it loads");
        let entry = elf.physical_entry().ok_or(outside)?;
        (entry, elf.load(context, image)?)
    } else {
        let what = "its Multiboot header has no load addresses and it is no ELF file";
        return Err(KernelFault::Damaged(what).into());
    };
    context.write_cmdline(CMDLINE_BYTES)?;
    write_info(context, kernel_end)?;
    Ok(BootState {
        protocol: Protocol::Multiboot,
        entry,
        registers: vec![(Gpr::Rax, LOADER_MAGIC), (Gpr::Rbx, BOOT_INFO)],
    })
}

/// Loads what the header's address fields say; returns the entry point and the kernel's end.
fn load_by_addresses<S: Source>(
    context: &Context<'_>,
    image: &mut Image<S>,
    header: &Header,
) -> Result<(u64, u64), KernelFault> {
    let a = header.addresses;
    let before = a.header.checked_sub(a.load).map(u64::from);
    let offset = before
        .and_then(|n| header.offset.checked_sub(n))
        .ok_or(KernelFault::Damaged(
            "its Multiboot header lies before the load address",
        ))?;
    let load = u64::from(a.load);
    let file_bytes = match a.load_end {
        0 => image.length().saturating_sub(offset),
        end => u64::from(end)
            .checked_sub(load)
            .ok_or(KernelFault::Damaged(
                "its Multiboot load address is behind the load end",
            ))?,
    };
    let memory_bytes = match a.bss_end {
        0 => file_bytes,
        end => u64::from(end)
            .checked_sub(load)
            .filter(|n| *n >= file_bytes)
            .ok_or(KernelFault::Damaged(
                "its Multiboot load end is behind the bss end",
            ))?,
    };
    let kernel_end = require_ram(context.memory, load, memory_bytes)?;
    let entry = u64::from(a.entry);
    if !(load..kernel_end).contains(&entry) {
        return Err(KernelFault::Damaged(
            "its entry point is outside what it loads",
        ));
    }
    image.load(context.memory, offset, file_bytes, load, memory_bytes)?;
    Ok((entry, kernel_end))
}

/// Writes the information structure and what it refers to, and loads the initramfs as module 0.
fn write_info(context: &mut Context<'_>, kernel_end: u64) -> Result<(), Fault> {
    let ram_end = low_memory_end(context.memory);
    let mut info = [0; INFO_BYTES];
    let mut set = |offset: usize, value: u64| {
        // Everything told here lies below 4 GiB.
        info[offset..offset + 4].copy_from_slice(&(value as u32).to_le_bytes());
    };
    let mut flags = INFO_MEMORY | INFO_CMDLINE | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    // In KiB: from address 0, and from 1 MiB to the first hole.
    set(4, LOW_RAM_END / 1024);
    set(8, ram_end.saturating_sub(HIGH_RAM) / 1024);
    set(16, CMDLINE);

    if let Some(initramfs) = &mut context.initramfs {
        let placed = initramfs.place(context.memory, kernel_end, ram_end, Side::Low)?;
        flags |= INFO_MODULES;
        set(20, 1);
        set(24, MODULES);
        let mut module = Vec::new();
        for value in [placed.start, placed.start + placed.size, EMPTY_STRING, 0] {
            module.extend((value as u32).to_le_bytes());
        }
        context.write(MODULES, &module)?;
    }

    let mut map = Vec::new();
    for range in memory_map(context.memory) {
        let kind: u32 = match range.kind {
            RangeKind::Ram => 1,
            RangeKind::Reserved => 2,
        };
        // The size of what follows comes first.
        map.extend(20u32.to_le_bytes());
        map.extend(range.start.to_le_bytes());
        map.extend((range.end - range.start).to_le_bytes());
        map.extend(kind.to_le_bytes());
    }
    context.write(MEMORY_MAP, &map)?;
    set(44, map.len() as u64);
    set(48, MEMORY_MAP);

    context.write(LOADER_NAME, b"trapline\0")?;
    set(64, LOADER_NAME);
    set(0, flags.into());
    context.write(BOOT_INFO, &info)?;
    Ok(())
}

/// A module's string: an empty one, the NUL behind the loader's name.
const EMPTY_STRING: u64 = LOADER_NAME + "trapline".len() as u64;
