//! The stepping engine: executes predecoded operations one guest instruction at a time.

use crate::access::Fault;

pub mod address;
mod strings;
pub mod stack;
pub mod run;
mod masked;
mod host;
pub mod control;
mod bits;
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

/// Stub until the system instructions land.
pub fn handles(_i: &iced_x86::Instruction) -> bool { false }
/// Stub.
pub fn execute<E: crate::env::Environment>(_c: &mut crate::access::Core<'_, E>, _i: &iced_x86::Instruction) -> Executed { Err(trapline_x86::Exception::invalid_opcode().into()) }
