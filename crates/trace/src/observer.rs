//! Whoever wants to see what the trace subsystem does, event by event.
//!
//! An observer is given to the trace subsystem when it is made ([`crate::TraceSystem::observed`]);
//! without one each hook is one branch on a word that never changes, and the way of an access to
//! untraced memory has no hook at all. Times are the observer's own, in nanoseconds of one
//! monotonic clock.

use std::sync::Arc;

use crate::kind::{Actor, Kind, Range, Sense};
use crate::notice::{Notice, Notification};
use crate::vcpu::{VcpuId, VcpuSet};

/// From when to when something took place, in nanoseconds of the observer's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub start: u64,
    pub end: u64,
}

/// On whose behalf something took place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Recorded on this VCPU's thread, and by no other thread meanwhile.
    Vcpu(VcpuId),
    /// Recorded by any thread.
    Device,
    Debugger,
    /// The machine as a whole. Recorded by any thread.
    Machine,
}

impl From<Actor> for Place {
    fn from(actor: Actor) -> Self {
        match actor {
            Actor::Vcpu(vcpu) => Self::Vcpu(vcpu),
            Actor::Device => Self::Device,
            Actor::Debugger => Self::Debugger,
        }
    }
}

impl From<Option<VcpuId>> for Place {
    fn from(vcpu: Option<VcpuId>) -> Self {
        vcpu.map_or(Self::Machine, Self::Vcpu)
    }
}

/// Something that took place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An actor accessed a traced location. One record for each region that the access hit, all
    /// with the same span, which includes waiting.
    Acted {
        span: Span,
        notification: Notification,
        sense: Sense,
        /// Those who were notified. All other VCPUs were bystanders.
        consumers: VcpuSet,
        /// Those who were executing when they were asked to acknowledge; the others had
        /// acknowledged by being at an instruction boundary.
        awaited: VcpuSet,
        /// How much of the span the actor waited for acknowledgements, in nanoseconds.
        waited: u64,
    },
    /// A VCPU found a notice in its queue and applied it to what it had derived.
    Applied { span: Span, notice: Notice },
    /// A VCPU acknowledged, at the start of the span, and was held at an instruction boundary to
    /// its end. What for follows: the next notice that it applies.
    Stalled { span: Span },
    /// A VCPU waited for another actor to finish, at an instruction boundary.
    Queued { span: Span },
    /// A trace was established; `held` had to stop meanwhile.
    Established {
        span: Span,
        range: Range,
        kind: Kind,
        sense: Sense,
        consumers: VcpuSet,
        held: VcpuSet,
    },
    /// The last consumer of a trace left it, on any thread.
    Removed {
        at: u64,
        range: Range,
        kind: Kind,
        sense: Sense,
    },
    /// A VCPU invalidated `count` structures derived from `range`.
    Invalidated {
        span: Span,
        range: Range,
        kind: Kind,
        count: u64,
    },
}

/// Receives the records. Both functions are called at instruction boundaries of VCPUs and with
/// locks of the trace subsystem held: they must not block, nor call back.
pub trait Observer: Send + Sync {
    /// The time, in nanoseconds of a monotonic clock.
    fn now(&self) -> u64;
    /// Something took place.
    fn record(&self, place: Place, record: &Record);
}

/// An observer, or none.
#[derive(Clone, Default)]
pub struct Observing(Option<Arc<dyn Observer>>);

impl From<Arc<dyn Observer>> for Observing {
    fn from(observer: Arc<dyn Observer>) -> Self {
        Self(Some(observer))
    }
}

impl Observing {
    /// The time if someone observes, else 0.
    #[inline]
    pub fn now(&self) -> u64 {
        self.0.as_ref().map_or(0, |observer| observer.now())
    }

    /// The time since `start`, if someone observes.
    #[inline]
    pub fn since(&self, start: u64) -> Option<Span> {
        let end = self.0.as_ref()?.now().max(start);
        Some(Span { start, end })
    }

    /// Hands over the record that `record` makes of the time since `start`, if someone observes.
    #[inline]
    pub fn record(&self, place: impl Into<Place>, start: u64, record: impl FnOnce(Span) -> Record) {
        self.record_within(place, self.since(start), record);
    }

    /// Hands over the record that `record` makes of a time from [`Self::since`].
    #[inline]
    pub fn record_within(
        &self,
        place: impl Into<Place>,
        span: Option<Span>,
        record: impl FnOnce(Span) -> Record,
    ) {
        if let (Some(observer), Some(span)) = (&self.0, span) {
            observer.record(place.into(), &record(span));
        }
    }

    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Hands a notice to `handler`, as something that `vcpu` applies.
    pub fn apply(&self, vcpu: Option<VcpuId>, notice: Notice, handler: &mut dyn FnMut(Notice)) {
        if !self.is_on() {
            return handler(notice);
        }
        let start = self.now();
        handler(notice.clone());
        self.record(vcpu, start, |span| Record::Applied { span, notice });
    }
}

/// Sees, for one VCPU, what happens to what was derived on its behalf.
#[derive(Clone)]
pub struct Witness {
    observing: Observing,
    vcpu: VcpuId,
}

impl Witness {
    pub fn new(observing: Observing, vcpu: VcpuId) -> Self {
        Self { observing, vcpu }
    }

    /// A witness that nobody asks.
    pub fn none() -> Self {
        Self::new(Observing::default(), VcpuId::new(0))
    }

    /// To be handed to [`Self::invalidated`] as its `start`.
    #[inline]
    pub fn now(&self) -> u64 {
        self.observing.now()
    }

    /// `count` structures derived from `range` are gone, or were derived again.
    pub fn invalidated(&self, start: u64, kind: Kind, range: Range, count: u64) {
        self.observing
            .record(Some(self.vcpu), start, |span| Record::Invalidated {
                span,
                range,
                kind,
                count,
            });
    }
}
