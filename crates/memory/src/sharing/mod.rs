//! Page sharing: pages with the same bytes, of one machine or of several machines in one process,
//! are kept once in host memory (\[0061\]).
//!
//! - [`SharingPool`] holds the copies, and knows which page of which machine is mapped to which.
//! - [`Scanner`] finds pages to share. Its owner decides when and how fast it works.
//! - A [`GuestMemory`](crate::GuestMemory) that has joined a pool asks it before every sensed write.
//!
//! # How a page becomes shared
//! 1. It is *protecting*: a write trace of kind `share` is established for all VCPUs, one for its
//!    whole run. From then on
//!    every write, of a VCPU, a device or a debugger, is sensed, and [`Member::before_write`] is
//!    called before it. Protect, then read: what was read before, to find a candidate, is a hint.
//! 2. Under the pool's lock its bytes are read and compared with the copy. If it was written
//!    meanwhile, or differs, it is let go.
//! 3. The copy is mapped in its place. The host address stays the same, so pointers in TLBs stay
//!    valid, and the bytes are the same, so whoever reads meanwhile sees no change. The page's own
//!    memory goes back to the host.
//!
//! # How it becomes private again
//! The mapping is a private one: the host's kernel copies the page at the first store. The trace
//! makes that store an event: with all VCPUs stopped (under bracketing, the default) the pool has
//! the page copied, counts it as the machine's own again, and then the store is performed, on the
//! private page, whole. So no semantics of kind `share`, and no mistake in the bookkeeping here,
//! can let one machine's store reach another machine. After the write the page is taken out of its
//! run's trace ([`trapline_trace::TraceSystem::exclude`]); the other pages stay traced all the time.
//!
//! # Mappings
//! A process has a limited number of mappings. Neighbouring pages that map to neighbouring copies
//! take one together, so runs are shared, long ones first, and there is a bound on the number of
//! places where one mapping ends and another begins.
//!
//! # Lock order
//! The trace subsystem's lane, then the pool's lock. So nobody calls the trace subsystem while
//! holding the pool's lock. The lock is held for the work on one run (at most [`RUN`] pages).
//!
//! # Orderings
//! A page's state is read by a writer in the lane, without the pool's lock. It leaves *own* only
//! before [`trapline_trace::TraceSystem::establish`] takes the lane: a writer that still saw *own*
//! has finished before the trace exists, and the bytes are read after that.

mod mapping;
mod member;
mod merge;
mod pages_of;
mod pool;
mod scan;
mod slots;
#[cfg(test)]
mod tests;

pub(crate) use member::Member;
pub use member::MemberStatistics;
pub use pool::{PoolStatistics, SharingPool};
pub use scan::{Scanner, Step};

/// The longest run of pages that is shared at once.
pub const RUN: usize = 64;

const PAGE: usize = 4096;

/// A page's bytes.
type Bytes = [u64; PAGE / 8];
