//! Traces on guest memory: who is told, with which consistency, that a location was accessed.
//!
//! This crate knows nothing of processors, devices or host memory. Whoever owns guest memory
//! implements [`Sensor`], so that accesses to traced pages are sensed; whoever runs a VCPU polls
//! its [`Attention`] word at instruction boundaries and calls [`TraceSystem::boundary`].
//!
//! The way of a notification: [`TraceSystem::access`] is called by the actor with the bytes and a
//! closure that performs the access. It looks up the regions, holds the consumers at instruction
//! boundaries if the semantics ask for it, performs the access, queues the notifications and lets
//! the consumers go on. Each drains its queue before its next guest instruction.
//!
//! Requirements and how they are met, by invariant of the design brief:
//!
//! 1. Protect, then read: [`TraceSystem::establish`] returns only when every VCPU that might write
//!    directly has reached an instruction boundary with a revocation in its queue.
//! 2. No consumer executes between acknowledgement and completion: it is *held*.
//! 3. and 4. The notification is queued before a consumer is released, and a queue is emptied
//!    before the next guest instruction; an instruction that had to wait starts again.
//! 5. Each region that is hit notifies each of its VCPUs once; the others are not touched.
//! 6. A VCPU that is not running counts as having acknowledged.
//! 7. One lane, waited for at an instruction boundary ([`system`]).

mod delay;
pub mod event;
mod histogram;
mod intervals;
pub mod kind;
mod lane;
pub mod mailbox;
#[cfg(feature = "shuttle")]
pub mod mutation;
#[cfg(not(feature = "shuttle"))]
mod mutation;
pub mod notice;
pub mod observer;
pub mod regions;
mod rendezvous;
pub mod statistics;
mod sync;
pub mod system;
pub mod vcpu;

pub use event::Phase;
pub use kind::{Actor, Kind, Range, Semantics, Sense};
pub use mailbox::{Attention, TRACE};
pub use notice::{Notice, Notification};
pub use observer::{Observer, Observing};
pub use regions::TraceId;
pub use system::{AlwaysSensed, Restart, Sensor, TraceSystem};
pub use vcpu::{MAX_VCPUS, VcpuId, VcpuSet};
