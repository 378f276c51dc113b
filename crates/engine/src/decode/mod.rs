//! From guest bytes to blocks of predecoded operations.
//!
//! A block is derived from guest memory: whoever keeps it must have a trace on its bytes *before*
//! they are read for the last time (invariant "protect, then read"); see [`block`].

pub mod block;
pub mod features;
pub mod op;

pub use block::{Block, DecodeEnd, decode};
pub use features::Features;
pub use op::{Op, OpKind};
