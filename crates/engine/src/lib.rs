//! Executes guest instructions, in two ways: 64-bit code is translated to host code
//! ([`translate`]), everything else, and whatever that leaves, is stepped ([`step`]). The stepping
//! engine is the reference.
//!
//! The way of one guest instruction begins in [`decode`], which turns a run of bytes into a block of
//! predecoded operations. Then
//!
//! - translated: [`translate::Translator::translate`] emits host code for the block, or for a path
//!   over several, once. [`translate::run()`] enters it: guest registers and flags are in the host's,
//!   and memory operands are looked up inline in the tables of the [`tlb`], which the [`frame`]
//!   lays out. A look-up that misses and an instruction that is not emitted call helpers;
//!   [`translate::Left`] tells why the code was left.
//! - stepped: [`step::run::run`] executes the operations one by one. What may run as it is runs on the
//!   real processor ([`native`] re-encodes it with only its memory operand replaced); what is
//!   privileged, sensitive or control flow is Rust. [`access`] turns memory operands into host
//!   pointers.
//!
//! Both go the slow way (page crossing, sensed page, device register) through the
//! [`env::Environment`], which the layer above implements.

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
