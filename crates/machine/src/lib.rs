//! The global VMM: builds a machine from a configuration and coordinates its sub-VMMs.

pub mod config;
pub mod console;
pub mod control;
mod ending;
pub mod events;
pub mod files;
pub mod gdb;
mod jitdump;
pub mod keyed;
pub mod load;
mod machine;
pub mod outcome;
mod platform;
pub mod seccomp;
pub mod semantics;
pub mod sharing;
mod statistics;
pub mod stop;
mod vcpu_thread;
pub mod watch;

pub use config::MachineConfig;
pub use console::Console;
pub use control::Control;
pub use outcome::{Blame, MachineError, Outcome};
pub use stop::{StopHandle, StopReason};

pub use machine::{run, run_sharing};
pub use sharing::PageSharing;
