//! Executes guest instructions.
//!
//! Guest instructions that may run as they are run on the real processor: [`native`] re-encodes
//! them with only their memory operand replaced. Everything that is privileged, sensitive or
//! control flow is Rust, in [`step`].
//!
//! The way of one guest instruction: [`decode`] turns a run of bytes into a block of predecoded
//! operations; [`step`] executes them one by one; [`access`] turns each memory operand into a host
//! pointer through the [`tlb`], or goes the slow way (page crossing, sensed page, device register)
//! through the [`env::Environment`], which the layer above implements.

pub mod access;
pub mod decode;
pub mod env;
mod exchange;
pub mod frame;
mod gaps;
mod jumps;
pub mod native;
pub mod step;
pub mod system_item;
pub mod tlb;
pub mod translate;
