//! Watches on guest memory: how a user asks for them, and where their events go.

pub mod event;
mod reader;
mod spec;

pub use reader::{WatchLog, WatchQueue};
pub use spec::{WatchError, WatchSpec, shown, shown_sense, shown_vcpus};
