//! The sub-VMM of one VCPU: run loop, fault analysis, TLB fills, decoded code and its traces.
//!
//! - The run loop is [`vcpu::Vcpu::run`]. It finds code or derives it (fetch.rs), steps it, or enters
//!   its translation and does what that leaves for (translated.rs). What is executed often becomes a
//!   path (path/). [`lockstep`] runs both engines and compares.
//! - The way of a fault is in [`surroundings`]: TLB miss, [`shadow_pages`] or page walk, sensed
//!   access, device. Exceptions are delivered by the run loop, through [`shadow_descriptors`].
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
