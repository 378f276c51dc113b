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

/// Builds the machine and runs it to its end.
pub fn run(
    config: &MachineConfig,
    _console: Console,
    _stop: StopHandle,
) -> Result<Outcome, MachineError> {
    config.validate()?;
    Err(MachineError::Unsupported {
        what: "running a machine",
        remedy: "use a build that has an engine",
    })
}
