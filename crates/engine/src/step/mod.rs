//! The stepping engine: executes predecoded operations one guest instruction at a time.

use crate::access::Fault;

pub mod address;
mod bits;
pub mod control;
pub mod events;
mod host;
mod io;
mod masked;
pub mod run;
mod segments;
pub mod stack;
mod strings;
mod syscall;
mod system;
#[cfg(test)]
mod tests_support;
mod transfer;
pub mod xstate;

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
