//! Loading a kernel into guest memory.
//!
//! [`load`] finds out what a kernel file is, puts it, its initramfs, its command line and its
//! boot information into guest memory and says in what state the bootstrap processor begins. The
//! files may be anything: whatever their headers say is checked before it is used.

mod boot_state;
mod bzimage;
mod elf;
mod error;
mod image;
mod initramfs;
mod layout;
mod multiboot;
mod pvh;

use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub use boot_state::{BootState, Protocol};
pub use error::{InitramfsFault, KernelFault, LoadError};
pub use image::Source;
pub use layout::{ACPI_TABLES, DEVICE_HOLE, MemoryRange, RangeKind, memory_map};

use image::{Image, open_regular};
use initramfs::Initramfs;
use layout::{CMDLINE, CMDLINE_BYTES};

/// How much of a kernel is looked at to find out what it is: a Multiboot header ends within it.
const PROBE_BYTES: usize = 8192;

/// What to load.
#[derive(Clone, Copy, Debug)]
pub struct LoadRequest<'a> {
    pub kernel: &'a Path,
    pub initramfs: Option<&'a Path>,
    /// Without a terminating NUL.
    pub cmdline: &'a str,
    /// Guest-physical address of the ACPI RSDP, if the machine has ACPI tables.
    pub acpi_rsdp: Option<u64>,
}

/// What is wrong, not yet tied to the kernel's path.
enum Fault {
    Kernel(KernelFault),
    Other(LoadError),
}

impl From<KernelFault> for Fault {
    fn from(fault: KernelFault) -> Self {
        Self::Kernel(fault)
    }
}
impl From<LoadError> for Fault {
    fn from(error: LoadError) -> Self {
        Self::Other(error)
    }
}

/// What the formats' loaders get beside the image.
struct Context<'a> {
    memory: &'a GuestMemoryMmap<()>,
    initramfs: Option<Initramfs>,
    cmdline: &'a str,
    acpi_rsdp: Option<u64>,
}

impl Context<'_> {
    /// Writes the command line, of which the kernel takes at most `limit` bytes, to [`CMDLINE`].
    fn write_cmdline(&self, limit: usize) -> Result<(), LoadError> {
        let length = self.cmdline.len();
        let limit = limit.min(CMDLINE_BYTES - 1);
        if length > limit {
            return Err(LoadError::CommandLine { length, limit });
        }
        if self.cmdline.contains('\0') {
            return Err(LoadError::CommandLineNul);
        }
        let mut bytes = self.cmdline.as_bytes().to_vec();
        bytes.push(0);
        self.write(CMDLINE, &bytes)
    }

    /// Writes boot information to low memory.
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), LoadError> {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|_| LoadError::NoLowMemory)
    }
}

/// Loads the kernel of `request` into `memory`, whose RAM is [0, min(size, 3 GiB)) and what is
/// left from 4 GiB on. Memory may hold anything before; may be called again after a reset.
pub fn load(
    memory: &GuestMemoryMmap<()>,
    request: &LoadRequest<'_>,
) -> Result<BootState, LoadError> {
    let fail = |fault| LoadError::Kernel {
        path: request.kernel.to_owned(),
        fault,
    };
    let file = open_regular(request.kernel)
        .map_err(|e| fail(KernelFault::Open(e)))?
        .ok_or_else(|| fail(KernelFault::NotRegular))?;
    load_from(memory, file, request)
}

/// As [`load`], with the kernel read from `source`; the request's path only names it in errors.
pub fn load_from(
    memory: &GuestMemoryMmap<()>,
    source: impl Source,
    request: &LoadRequest<'_>,
) -> Result<BootState, LoadError> {
    let mut context = Context {
        memory,
        initramfs: request.initramfs.map(Initramfs::open).transpose()?,
        cmdline: request.cmdline,
        acpi_rsdp: request.acpi_rsdp,
    };
    let state = detect_and_load(&mut context, source).map_err(|fault| match fault {
        Fault::Kernel(fault) => LoadError::Kernel {
            path: request.kernel.to_owned(),
            fault,
        },
        Fault::Other(error) => error,
    })?;
    state.write_tables(memory)?;
    tracing::debug!(protocol = ?state.protocol, entry = format_args!("{:#x}", state.entry), "kernel loaded");
    Ok(state)
}

fn detect_and_load(context: &mut Context<'_>, source: impl Source) -> Result<BootState, Fault> {
    let mut image = Image::new(source)?;
    let beginning = image.beginning(PROBE_BYTES)?;
    if bzimage::detect(&beginning) {
        return bzimage::load(context, &mut image);
    }
    let multiboot = multiboot::find_header(&beginning);
    if elf::detect(&beginning) {
        let elf = elf::Elf::parse(&mut image)?;
        return match (elf.pvh_entry, multiboot) {
            // PVH hands over the ACPI tables too.
            (Some(entry), _) => pvh::load(context, &mut image, &elf, entry),
            (None, Some(header)) => multiboot::load(context, &mut image, &header, Some(&elf)),
            (None, None) => Err(KernelFault::NoEntry.into()),
        };
    }
    match multiboot {
        Some(header) => multiboot::load(context, &mut image, &header, None),
        None => Err(KernelFault::Unknown.into()),
    }
}

#[cfg(test)]
mod tests;
