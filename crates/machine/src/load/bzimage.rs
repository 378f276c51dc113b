//! Linux bzImages by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst).

use std::mem::size_of;

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bzimage::BzImage;
use trapline_x86::Gpr;
use vm_memory::{ByteValued, GuestAddress};

use super::error::KernelFault;
use super::image::{Image, Source, require_ram, u16_at, u32_at};
use super::initramfs::Side;
use super::layout::{BOOT_INFO, CMDLINE, RangeKind, low_memory_end, memory_map};
use super::{BootState, Context, Fault, Protocol};

/// The setup header's offset in the file and in the zero page.
const HEADER: usize = 0x1f1;
/// "HdrS", at offset 0x202.
const MAGIC: u32 = 0x5372_6448;
/// The protocol version that brought `xloadflags`.
const VERSION_2_12: u16 = 0x020c;
/// `loadflags`: the protected-mode part is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry point at 0x200.
const KERNEL_64: u16 = 1 << 0;
/// The 64-bit entry point's offset from the load address.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader` of loaders without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `vid_mode`: the normal text mode.
const VIDEO_NORMAL: u16 = 0xffff;
const SECTOR: u64 = 512;

/// Whether a file that begins so is a bzImage.
pub fn detect(beginning: &[u8]) -> bool {
    u16_at(beginning, 0x1fe) == Some(0xaa55) && u32_at(beginning, 0x202) == Some(MAGIC)
}

pub fn load<S: Source>(
    context: &mut Context<'_>,
    image: &mut Image<S>,
) -> Result<BootState, Fault> {
    let header = read_header(image)?;
    let code_offset = check_extent(&header, image)?;

    // A relocatable kernel would move itself from a lower address to this one.
    let load = header.pref_address;
    let code_bytes = image.length() - code_offset;
    let kernel_end = require_ram(
        context.memory,
        load,
        code_bytes.max(header.init_size.into()),
    )?;
    BzImage::load(
        context.memory,
        Some(GuestAddress(load)),
        &mut image.source,
        None,
    )
    .map_err(|e| KernelFault::Read(std::io::Error::other(e)))?;

    context.write_cmdline(header.cmdline_size as usize)?;
    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.vid_mode = VIDEO_NORMAL;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.acpi_rsdp_addr = context.acpi_rsdp.unwrap_or(0);
    if let Some(initramfs) = &mut context.initramfs {
        let limit = u64::from(header.initrd_addr_max) + 1;
        let high = low_memory_end(context.memory).min(limit);
        let placed = initramfs.place(context.memory, kernel_end, high, Side::High)?;
        // Below 4 GiB as initrd_addr_max is.
        params.hdr.ramdisk_image = placed.start as u32;
        params.hdr.ramdisk_size = placed.size as u32;
    }
    for (entry, range) in params.e820_table.iter_mut().zip(memory_map(context.memory)) {
        let kind = match range.kind {
            RangeKind::Ram => 1,
            RangeKind::Reserved => 2,
        };
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.end - range.start,
            r#type: kind,
        };
        params.e820_entries += 1;
    }
    context.write(BOOT_INFO, params.as_slice())?;

    Ok(BootState {
        protocol: Protocol::Linux64,
        entry: load + ENTRY_64,
        registers: vec![(Gpr::Rsi, BOOT_INFO)],
    })
}

/// Reads the setup header and refuses kernels that the 64-bit protocol cannot start. Fields behind
/// the header's own end are zero, as the protocol wants them in the zero page.
fn read_header<S: Source>(image: &mut Image<S>) -> Result<setup_header, KernelFault> {
    let mut bytes = [0; size_of::<setup_header>()];
    image.read(HEADER as u64, &mut bytes)?;
    // The jump at 0x200 skips the header: its second byte tells the end.
    let end = 0x202 + usize::from(bytes[0x201 - HEADER]);
    if let Some(behind) = bytes.get_mut(end - HEADER..) {
        behind.fill(0);
    }
    let mut header = setup_header::default();
    header.as_mut_slice().copy_from_slice(&bytes);

    let (version, flags) = (header.version, header.xloadflags);
    if version < VERSION_2_12 || flags & KERNEL_64 == 0 {
        return Err(KernelFault::Unsuitable(
            "a kernel without the 64-bit boot protocol",
        ));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelFault::Unsuitable(
            "a zImage, which is loaded below 1 MiB",
        ));
    }
    Ok(header)
}

/// Checks that the file has everything its header speaks of, and returns the offset of the
/// protected-mode part.
fn check_extent<S: Source>(header: &setup_header, image: &Image<S>) -> Result<u64, KernelFault> {
    let sectors = match header.setup_sects {
        0 => 4,
        n => u64::from(n),
    };
    let code_offset = (sectors + 1) * SECTOR;
    // The size is in units of 16 bytes.
    let code_bytes = u64::from(header.syssize) * 16;
    let payload_end = u64::from(header.payload_offset) + u64::from(header.payload_length);
    let least = code_bytes.max(payload_end).max(ENTRY_64 + 1);
    image.require(code_offset, least)?;
    Ok(code_offset)
}
