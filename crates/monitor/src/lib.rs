//! The sub-VMM of one VCPU: run loop, fault analysis, TLB fills, decoded code and its traces.
//!
//! - The run loop is [`vcpu::Vcpu::run`].
//! - The way of a fault is in [`surroundings`]: TLB miss, page walk, sensed access, device.
//! - The way of a notification: another VCPU's sensed access (or a device's) reaches this VCPU's
//!   mailbox in the trace subsystem and raises its attention word; the run loop sees the word at an
//!   instruction boundary, acknowledges, and applies the notice to
//!   the [`code_cache`], the TLB and the other derived structures (surroundings/derived.rs).

pub mod clock;
pub mod code_cache;
pub mod debug;
mod earlier;
mod fetch;
pub mod interrupt;
pub mod lockstep;
mod patches;
mod path;
pub mod platform;
pub mod shadow_descriptors;
pub mod shadow_pages;
pub mod signals;
pub mod statistics;
pub mod surroundings;
mod translated;
mod translated_code;
mod turn;
pub mod vcpu;

pub use translated_code::{CodeObserver, TranslatedCode};
