//! The global VMM: builds a machine from a configuration and coordinates its sub-VMMs.

pub mod config;
pub mod console;
pub mod load;
pub mod outcome;
pub mod stop;

pub use config::MachineConfig;
pub use console::Console;
pub use outcome::{Blame, MachineError, Outcome};
pub use stop::{StopHandle, StopReason};

use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Builds the machine and runs it to its end.
pub fn run(
    config: &MachineConfig,
    _console: Console,
    _stop: StopHandle,
) -> Result<Outcome, MachineError> {
    config.validate()?;
    let below = config.memory_bytes.min(load::DEVICE_HOLE);
    let mut ranges = vec![(GuestAddress(0), below as usize)];
    if config.memory_bytes > below {
        ranges.push((
            GuestAddress(1 << 32),
            (config.memory_bytes - below) as usize,
        ));
    }
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).map_err(|e| MachineError::Host {
        what: format!("{} MiB of guest memory", config.memory_bytes >> 20),
        remedy: "give less --memory",
        source: std::io::Error::other(e),
    })?;
    let request = load::LoadRequest {
        kernel: &config.kernel,
        initramfs: config.initramfs.as_deref(),
        cmdline: &config.cmdline,
        acpi_rsdp: Some(load::ACPI_TABLES),
    };
    load::load(&memory, &request)?;
    Err(MachineError::Unsupported {
        what: "running a machine",
        remedy: "use a build that has an engine",
    })
}
