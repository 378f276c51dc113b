//! The stepping engine: executes predecoded operations one guest instruction at a time.

use crate::access::Fault;

pub mod address;
pub mod events;

/// What follows an instruction that completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The next instruction in memory.
    Next,
    /// RIP has been set.
    Jump,
    /// The next instruction in memory, but look it up anew: the mode, privilege, translation or
    /// interrupt flag may have changed.
    Leave,
    /// The processor stopped: its `activity` says how. RIP goes to the next instruction.
    Stop,
}

/// The result of one instruction.
pub type Executed = Result<Flow, Fault>;
