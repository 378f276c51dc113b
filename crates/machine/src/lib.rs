//! The global VMM: builds a machine from a configuration and coordinates its sub-VMMs.
//!
//! [`run`] is the way of a machine (machine.rs): it checks the [`config`], opens what it is to write,
//! confines the process ([`seccomp`]), builds memory, devices and VCPUs, [`load`]s the kernel, starts
//! a thread for each VCPU (vcpu_thread.rs) and waits for the end, whoever brings it about (ending.rs).
//! A reset builds a new machine. [`StopHandle`] and [`Control`] reach into a machine that
//! runs: for signals, the API socket and the monitor console; [`gdb`], [`watch`] and [`events`] show
//! what happens in it.

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
