//! What a VCPU is told.

use std::sync::Arc;

use crate::kind::{Actor, Kind, Range, Semantics, Sense};
use crate::regions::TraceId;

/// That a traced location was accessed, or is about to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    pub id: TraceId,
    pub kind: Kind,
    pub semantics: Semantics,
    /// The region that was hit.
    pub region: Range,
    pub cookie: u64,
    /// The bytes that were accessed, or are about to be.
    pub written: Range,
    /// Whether they were read or written.
    pub sense: Sense,
    /// Under [`Semantics::PreWriteValue`] what is about to be written to `written`, if the actor
    /// can tell (\[0081\]).
    pub value: Option<Arc<[u8]>>,
    pub actor: Actor,
    /// Counts the events of the machine.
    pub sequence: u64,
}

/// What a VCPU finds in its queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    Notification(Notification),
    /// Accesses of these kinds to the page at this guest-physical address are sensed from now on:
    /// drop every direct translation that allows them.
    Revoke {
        page: u64,
        sense: Sense,
    },
}
