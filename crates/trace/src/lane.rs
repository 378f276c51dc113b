//! What the owner of the lane works with: the events of one access, collected without allocating.

use std::sync::Arc;

use crate::kind::{Actor, Kind, Range, Semantics, Sense};
use crate::notice::Notification;
use crate::regions::{Region, Regions, TraceId};
use crate::vcpu::VcpuSet;

/// That an access hits a region.
#[derive(Clone, Debug)]
pub struct Event {
    id: TraceId,
    pub kind: Kind,
    /// As it was when the access began: a change meanwhile concerns later accesses only.
    pub semantics: Semantics,
    region: Range,
    cookie: u64,
    written: Range,
    pub sense: Sense,
    pub consumers: VcpuSet,
    /// Under pre-write-value what is about to be written, if the actor can tell.
    value: Option<Arc<[u8]>>,
    sequence: u64,
}

impl Event {
    /// What its consumers are told.
    pub fn notification(&self, actor: Actor) -> Notification {
        Notification {
            id: self.id,
            kind: self.kind,
            semantics: self.semantics,
            region: self.region,
            cookie: self.cookie,
            written: self.written,
            sense: self.sense,
            value: self.value.clone(),
            actor,
            sequence: self.sequence,
        }
    }
}

/// The state that the lane protects.
#[derive(Debug, Default)]
pub struct Lane {
    /// The events of the access that is under way.
    pub events: Vec<Event>,
    /// The pages that a trace is being established on, with those who access them directly.
    pub revocations: Vec<(u64, VcpuSet)>,
    /// What is about to be written, span by span.
    pub foreseen: Vec<u8>,
    /// The next event's number.
    sequence: u64,
}

impl Lane {
    /// Collects the events of an access to `spans`: one for each region and contiguous piece of
    /// the access. `semantics` tells how a region is notified now; with `everyone`, all of these are
    /// consumers. Traces of kind `device` are no events of memory.
    pub fn find(
        &mut self,
        regions: &Regions,
        spans: &[Range],
        sense: Sense,
        semantics: &impl Fn(&Region) -> Semantics,
        everyone: Option<VcpuSet>,
    ) {
        let Self {
            events, sequence, ..
        } = self;
        events.clear();
        let mut rest = spans;
        while let Some((first, tail)) = rest.split_first() {
            let mut written = *first;
            rest = tail;
            // Neighbouring pages in order are one piece.
            while let Some((next, tail)) = rest.split_first()
                && next.lo == written.hi
            {
                written.hi = next.hi;
                rest = tail;
            }
            regions.hits(written, sense, &mut |region: &Region| {
                if region.kind == Kind::Device {
                    return;
                }
                events.push(Event {
                    id: region.id,
                    kind: region.kind,
                    semantics: semantics(region),
                    region: region.range,
                    cookie: region.cookie,
                    written,
                    sense,
                    consumers: everyone.unwrap_or(region.consumers),
                    value: None,
                    sequence: *sequence,
                });
                *sequence += 1;
            });
        }
    }

    /// Hands the events that ask for it the bytes in `foreseen`, which are those of `spans`.
    pub fn tell_values(&mut self, spans: &[Range]) {
        let total: u64 = spans.iter().map(|span| span.hi - span.lo).sum();
        if self.foreseen.len() as u64 != total {
            return;
        }
        let foreseeing = |event: &&mut Event| event.semantics == Semantics::PreWriteValue;
        for event in self.events.iter_mut().filter(foreseeing) {
            let mut at = 0;
            for span in spans {
                if span.lo == event.written.lo {
                    break;
                }
                at += (span.hi - span.lo) as usize;
            }
            let len = (event.written.hi - event.written.lo) as usize;
            event.value = self.foreseen.get(at..at + len).map(Arc::from);
        }
    }
}
