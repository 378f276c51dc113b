//! The gdb stub: one client at a time sees every VCPU as a thread.
//!
//! Software breakpoints do not change guest memory: a VCPU compares its instruction pointer.
//! Watchpoints are traces of kind `watch`, so there is no limit to their number or length. Memory
//! is read and written by linear address, through the page tables of the chosen VCPU; writes are
//! those of an actor, so code that is derived from the bytes is invalidated.

mod memory;
mod registers;
mod server;
mod target;

pub use server::{GdbAddress, GdbServer};
pub use target::Debugger;
