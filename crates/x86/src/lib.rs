//! Architectural state and rules of the x86-64 processor, with no execution in them.
//!
//! What is here is what the processor manuals define independently of how instructions are run:
//! the register file ([`state`]), segments and descriptors ([`segment`], [`descriptor`]),
//! exceptions ([`exception`]), the page walk ([`paging`]), CPUID ([`cpuid`]) and the
//! model-specific registers ([`msr`]). Manual sections are those of the Intel SDM, volume 3,
//! unless a comment names AMD's APM.

pub mod control;
pub mod cpuid;
pub mod descriptor;
pub mod exception;
pub mod msr;
pub mod paging;
pub mod segment;
pub mod state;
pub mod vector;

pub use exception::{Exception, Vector};
pub use segment::{Segment, SegmentRegister};
pub use state::{CpuState, Gpr, Mode};
