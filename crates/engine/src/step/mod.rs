//! The stepping engine: executes predecoded operations one guest instruction at a time.

use crate::access::Fault;

pub mod address;
mod bits;
pub mod control;
pub mod events;
mod events_return;
#[cfg(test)]
mod events_tests;
mod host;
mod io;
mod masked;
pub mod run;
mod segments;
mod segments_descriptor;
mod segments_load;
#[cfg(test)]
mod segments_tests;
pub mod stack;
pub mod stack_access;
mod strings;
mod syscall;
mod system;
mod system_control;
mod system_debug;
mod system_flags;
#[cfg(test)]
mod system_fuzz;
#[cfg(test)]
mod system_tests;
mod system_translation;
#[cfg(test)]
mod tests_support;
mod transfer;
mod transfer_return;
mod transfer_stack;
mod transfer_task;
pub mod xstate;
mod xstate_image;
#[cfg(test)]
mod xstate_tests;

pub use system::{execute, handles};

/// What follows an instruction that completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The next instruction in memory.
    Next,
    /// RIP has been set.
    Jump,
    /// A repeated instruction stopped between two iterations: it goes on at the same RIP.
    Again,
    /// The next instruction in memory, but look it up anew: the mode, privilege, translation or
    /// interrupt flag may have changed.
    Leave,
    /// The processor stopped: its `activity` says how. RIP goes to the next instruction.
    Stop,
}

/// The result of one instruction.
pub type Executed = Result<Flow, Fault>;
