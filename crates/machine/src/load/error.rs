//! Why a kernel cannot be loaded.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::outcome::Blame;

/// A kernel, its initramfs or its command line cannot be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    #[error("cannot boot {path}: {fault}", path = .path.display())]
    Kernel { path: PathBuf, fault: KernelFault },
    #[error("cannot use {path} as initramfs: {fault}", path = .path.display())]
    Initramfs {
        path: PathBuf,
        fault: InitramfsFault,
    },
    #[error(
        "the kernel command line has {length} bytes, but this kernel takes at most {limit}: shorten --cmdline"
    )]
    CommandLine { length: usize, limit: usize },
    #[error("the kernel command line contains a NUL byte: remove it")]
    CommandLineNul,
    /// The machine has less memory than any kernel's boot information takes.
    #[error(
        "the machine has too little memory for boot information: give at least --memory size=2M"
    )]
    NoLowMemory,
}

impl LoadError {
    /// Whose fault it is; decides the exit status.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Kernel { .. } | Self::Initramfs { .. } => Blame::Input,
            Self::CommandLine { .. } | Self::CommandLineNul | Self::NoLowMemory => Blame::Usage,
        }
    }
}

/// What is wrong with a kernel file.
#[derive(Debug, Error)]
pub enum KernelFault {
    #[error("{0}; give the path of a kernel file that can be read")]
    Open(io::Error),
    #[error("it is not a regular file; give the path of a kernel file")]
    NotRegular,
    #[error("reading it failed: {0}; check the file")]
    Read(io::Error),
    #[error(
        "it is neither a bzImage nor an ELF or Multiboot image; give a kernel such as Debian's /boot/vmlinuz"
    )]
    Unknown,
    #[error("it ends after {have} bytes, but its headers promise {need}; copy it again")]
    Truncated { have: u64, need: u64 },
    #[error("it is damaged: {0}; copy or build it again")]
    Damaged(&'static str),
    #[error("it is {0}; give a kernel for x86-64 that has a 64-bit entry point")]
    Unsuitable(&'static str),
    #[error(
        "it is an ELF file with neither a PVH entry note nor a Multiboot header; give its bzImage or build it with CONFIG_PVH=y"
    )]
    NoEntry,
    #[error(
        "it occupies guest memory up to {end:#x}, but the machine's ends at {ram_end:#x}; give at least --memory size={advice}M",
        advice = .end.div_ceil(1 << 20)
    )]
    TooLittleMemory { end: u64, ram_end: u64 },
    #[error(
        "it asks to be loaded at {start:#x}, but kernels go to 0x100000 and above; link it to a higher address"
    )]
    TooLow { start: u64 },
    #[error(
        "it asks to be loaded up to {end:#x}, but a machine's memory below 4 GiB ends at 0xc0000000; link it to a lower address"
    )]
    TooHigh { end: u64 },
}

/// What is wrong with an initramfs.
#[derive(Debug, Error)]
pub enum InitramfsFault {
    #[error("{0}; give the path of a file that can be read")]
    Open(io::Error),
    #[error("it is not a regular file; give the path of a cpio archive")]
    NotRegular,
    #[error("it is empty; give a cpio archive or leave --initramfs away")]
    Empty,
    #[error("reading it failed: {0}; check the file")]
    Read(io::Error),
    #[error(
        "its {size} bytes do not fit into guest memory between the kernel's end at {low:#x} and {high:#x}; give more --memory"
    )]
    DoesNotFit { size: u64, low: u64, high: u64 },
}
