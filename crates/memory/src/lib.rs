//! Guest-physical memory: its bytes, the attributes of its pages, and the one path by which
//! anything outside a VCPU writes it.
//!
//! - [`GuestMemory`] maps the bytes and gives host addresses to those who may access directly.
//! - [`pages`] holds which pages are sensed and which VCPUs hold direct access to them; it is the
//!   [`trapline_trace::Sensor`] of the machine.
//! - [`sharing`] keeps pages with the same bytes once.
//! - [`watch`] reports accesses to bytes that a user watches.
//! - [`GuestMemory::write`] is how devices and debuggers write: as actors.

mod atomic;
mod guest;
pub mod pages;
pub mod sharing;
pub mod watch;

pub use guest::{GuestMemory, MemoryError, guest_ram};
