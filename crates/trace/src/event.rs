//! The protocol of an event: who is told what, and in which order with the access.
//!
//! # The order of an access
//! 1. The actor takes the lane, empties its own queue and collects the events: every region that
//!    the access hits, each with the semantics that its kind has now.
//! 2. Pre-write-value: the consumers are told, with what is about to be written.
//! 3. Bracketing: the consumers are held at an instruction boundary.
//! 4. The access.
//! 5. The consumers of all other semantics are told. So those who are held find the notice before
//!    their next instruction.
//! 6. Who is held may go on.
//! 7. The actor applies what it is told itself.
//! 8. Post-write-sync: the actor waits until every consumer has taken the notice out of its queue
//!    or is at an instruction boundary.
//!
//! Each region gets its own semantics, whatever others the same access hits. Locks and orderings
//! are those of [`crate::system`].

use std::time::Instant;

use crate::kind::{Actor, Kind, Range, Semantics, Sense};
use crate::lane::{Event, Lane};
use crate::mutation::Mutation;
use crate::notice::Notice;
use crate::observer::Record;
use crate::regions::Region;
use crate::sync::{Ordering::Relaxed, read};
use crate::system::{Restart, TraceSystem};
use crate::vcpu::{VcpuId, VcpuSet};

/// What the one who makes an access is asked for.
#[derive(Debug)]
pub enum Phase<'a> {
    /// Append the bytes that are about to be written, span by span, and write nothing yet; whoever
    /// cannot tell appends nothing. At most once, and only if a trace wants to know.
    Foresee(&'a mut Vec<u8>),
    /// Perform the access. Once, and last.
    Perform,
}

/// An access that is under way.
struct Access<'a> {
    actor: Actor,
    spans: &'a [Range],
    /// Who is held for other reasons.
    held: VcpuSet,
    /// When it began, by the observer's clock.
    start: u64,
}

impl TraceSystem {
    /// Performs an access that traces may cover. `spans` are the bytes, in at most two pages.
    ///
    /// Called on the actor's thread, at an instruction boundary if it is a VCPU. If no trace covers
    /// the bytes, `perform` is all that happens. Otherwise the consumers of each region are
    /// notified as the semantics of its kind say, of whatever kinds and semantics the others are.
    /// `perform` is called exactly once, unless an error is returned. `handler` gets the notices
    /// for the acting VCPU: those it finds queued (then [`Restart`] is returned) and those of the
    /// access itself, right after it, or under pre-write-value right before it.
    ///
    /// Under pre-write-value the notice carries no value: see [`Self::access_foreseen`].
    ///
    /// # Errors
    /// [`Restart`]: notices reached the acting VCPU meanwhile; nothing has been performed.
    pub fn access(
        &self,
        actor: Actor,
        spans: &[Range],
        sense: Sense,
        handler: &mut dyn FnMut(Notice),
        perform: &mut dyn FnMut(),
    ) -> Result<(), Restart> {
        self.access_foreseen(actor, spans, sense, handler, &mut |phase| {
            if matches!(phase, Phase::Perform) {
                perform();
            }
        })
    }

    /// As [`Self::access`], for an actor that can tell what it will write before it does: traces
    /// with pre-write-value semantics carry it.
    ///
    /// # Errors
    /// As [`Self::access`].
    pub fn access_foreseen(
        &self,
        actor: Actor,
        spans: &[Range],
        sense: Sense,
        handler: &mut dyn FnMut(Notice),
        perform: &mut dyn FnMut(Phase<'_>),
    ) -> Result<(), Restart> {
        let vcpu = match actor {
            Actor::Vcpu(vcpu) => Some(vcpu),
            Actor::Device | Actor::Debugger => None,
        };
        if self.mutated.is(Mutation::WriteOutsideLane) {
            perform(Phase::Perform);
        }
        let start = self.observing.now();
        let mut lane = self.enter_lane(vcpu);
        if self.drain_own(vcpu, handler) {
            return Err(Restart);
        }
        self.find(&mut lane, spans, sense);
        if lane.events.is_empty() {
            self.counters.beside();
            perform(Phase::Perform);
            return Ok(());
        }
        let access = Access {
            actor,
            spans,
            held: VcpuSet::EMPTY,
            start,
        };
        self.notify(&mut lane, access, handler, perform);
        Ok(())
    }

    /// Collects the events of an access. They keep the semantics that hold now.
    fn find(&self, lane: &mut Lane, spans: &[Range], sense: Sense) {
        let all = self.notify_all.load(Relaxed) || self.mutated.is(Mutation::NotifyBystanders);
        let everyone = all.then(|| self.rendezvous.all());
        let semantics = |region: &Region| self.semantics_of(region);
        lane.find(&read(&self.regions), spans, sense, &semantics, everyone);
    }

    /// The protocol of one access, whose events are in the lane.
    fn notify(
        &self,
        lane: &mut Lane,
        access: Access<'_>,
        handler: &mut dyn FnMut(Notice),
        perform: &mut dyn FnMut(Phase<'_>),
    ) {
        let Access {
            actor,
            spans,
            held,
            start,
        } = access;
        let vcpu = match actor {
            Actor::Vcpu(vcpu) => Some(vcpu),
            Actor::Device | Actor::Debugger => None,
        };
        let others = |consumers: VcpuSet| vcpu.map_or(consumers, |v| consumers.without(v));
        let (mut bracketed, mut synchronous) = (VcpuSet::EMPTY, VcpuSet::EMPTY);
        let mut foresee = false;
        for event in &lane.events {
            match event.semantics {
                Semantics::Bracketing => bracketed = bracketed.union(event.consumers),
                Semantics::PostWriteSync => synchronous = synchronous.union(event.consumers),
                Semantics::PostWriteAsync => {}
                Semantics::PreWriteValue => foresee = true,
            }
            self.counters.event(event.kind, event.semantics);
        }
        if let Some(vcpu) = vcpu {
            self.counters.acted(vcpu);
        }
        if foresee {
            lane.foreseen.clear();
            perform(Phase::Foresee(&mut lane.foreseen));
            lane.tell_values(spans);
        }
        let events = lane.events.as_slice();
        if foresee {
            self.tell_others(events, actor, true);
            self.tell_actor(events, actor, true, handler);
        }
        // Who is held has acknowledged, and does so again before it goes on.
        let bracketed = others(bracketed).minus(held);
        let synchronous = others(synchronous).minus(held).minus(bracketed);
        let (mut awaited, mut waited) = (VcpuSet::EMPTY, 0);
        let bracket = (!self.mutated.is(Mutation::WriteWithoutWaiting)).then(|| {
            let start = self.will_wait(bracketed);
            self.travel(events);
            let held = self.hold(bracketed);
            awaited = held.waited_for;
            waited = self.waited(events, Semantics::Bracketing, start, awaited);
            held
        });
        if self.mutated.is(Mutation::NotifyBeforeWrite) {
            self.tell_others(events, actor, false);
        }
        if !self.mutated.is(Mutation::WriteOutsideLane) {
            perform(Phase::Perform);
        }
        if !self.mutated.is(Mutation::NotifyBeforeWrite) {
            self.tell_others(events, actor, false);
        }
        drop(bracket);
        self.tell_actor(events, actor, false, handler);
        if !synchronous.is_empty() && !self.mutated.is(Mutation::GoOnWithoutWaiting) {
            let start = self.will_wait(synchronous);
            let late = self.rendezvous.wait_acknowledged(synchronous);
            waited += self.waited(events, Semantics::PostWriteSync, start, late);
            awaited = awaited.union(late);
        }
        let span = self.observing.since(start);
        for event in events {
            if matches!(
                event.semantics,
                Semantics::Bracketing | Semantics::PostWriteSync
            ) {
                let count = others(event.consumers).len() as u64;
                self.counters
                    .acknowledged(event.kind, event.semantics, count);
            }
            let acted = |span| Record::Acted {
                span,
                notification: event.notification(actor),
                sense: event.sense,
                consumers: event.consumers,
                awaited,
                waited,
            };
            self.observing.record_within(actor, span, acted);
        }
    }

    /// The events that are made known before the write, or the others.
    fn told<'e>(&self, events: &'e [Event], before_write: bool) -> impl Iterator<Item = &'e Event> {
        let late = self.mutated.is(Mutation::NotifyAfterWrite);
        events.iter().filter(move |event| {
            (event.semantics == Semantics::PreWriteValue && !late) == before_write
        })
    }

    /// Queues notices for all consumers but the actor.
    fn tell_others(&self, events: &[Event], actor: Actor, before_write: bool) {
        let twice = self.mutated.is(Mutation::NotifyTwice);
        for event in self.told(events, before_write) {
            let others = event.consumers.iter();
            let others = others.filter(|vcpu| actor != Actor::Vcpu(*vcpu));
            for (nth, consumer) in others.enumerate() {
                self.counters
                    .notified(event.kind, event.semantics, consumer);
                for _ in 0..if twice { 2 } else { 1 } {
                    self.send(event, actor, consumer, nth);
                }
            }
        }
    }

    /// Queues a notification for the `nth` of its consumers. If notifications take time, each
    /// consumer is reached later than the one before it.
    fn send(&self, event: &Event, actor: Actor, consumer: VcpuId, nth: usize) {
        let silently = self.mutated.is(Mutation::PostSilently);
        let mailbox = self.rendezvous.mailbox(consumer);
        let notice = Notice::Notification(event.notification(actor));
        match (self.delays.of(event.kind), event.semantics) {
            (None, _) | (_, Semantics::Bracketing) => mailbox.post(notice, silently),
            (Some(delay), Semantics::PostWriteSync) => {
                std::thread::sleep(delay);
                mailbox.post(notice, silently);
            }
            (Some(delay), Semantics::PostWriteAsync | Semantics::PreWriteValue) => {
                let due = Instant::now() + delay * (nth as u32 + 1);
                mailbox.post_late(due, notice);
            }
        }
    }

    /// Lets those of these events travel that are bracketed.
    fn travel(&self, events: &[Event]) {
        let bracketed = events
            .iter()
            .filter(|event| event.semantics == Semantics::Bracketing);
        if let Some(delay) = bracketed.filter_map(|e| self.delays.of(e.kind)).max() {
            std::thread::sleep(delay);
        }
    }

    /// Hands the actor the notices of its own access.
    fn tell_actor(
        &self,
        events: &[Event],
        actor: Actor,
        before_write: bool,
        handler: &mut dyn FnMut(Notice),
    ) {
        let Actor::Vcpu(vcpu) = actor else { return };
        for event in self.told(events, before_write) {
            if event.consumers.contains(vcpu) {
                self.counters.notified(event.kind, event.semantics, vcpu);
                let notice = Notice::Notification(event.notification(actor));
                self.observing.apply(Some(vcpu), notice, handler);
            }
        }
    }

    /// The time, if an actor that needs these may have to wait for one of them.
    fn will_wait(&self, vcpus: VcpuSet) -> Option<Instant> {
        let runs = |vcpu| !self.rendezvous.mailbox(vcpu).is_stopped();
        vcpus.iter().any(runs).then(Instant::now)
    }

    /// Counts the wait for acknowledgements that began at `start`, for every kind that asked. How
    /// long it was, in nanoseconds.
    fn waited(
        &self,
        events: &[Event],
        semantics: Semantics,
        start: Option<Instant>,
        waited_for: VcpuSet,
    ) -> u64 {
        let Some(start) = start.filter(|_| !waited_for.is_empty()) else {
            return 0;
        };
        let elapsed = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        for kind in Kind::ALL {
            let asks = |event: &Event| {
                (event.kind, event.semantics) == (kind, semantics)
                    && event.consumers.overlaps(waited_for)
            };
            if events.iter().any(asks) {
                self.counters.waited(kind, semantics, elapsed);
            }
        }
        elapsed
    }

    /// Runs `perform`, a write to `spans`, while no other VCPU executes a guest instruction.
    /// Traces on the bytes are notified as by [`Self::access`].
    ///
    /// # Errors
    /// As [`Self::access`].
    pub fn exclusive(
        &self,
        vcpu: VcpuId,
        spans: &[Range],
        handler: &mut dyn FnMut(Notice),
        perform: &mut dyn FnMut(),
    ) -> Result<(), Restart> {
        let start = self.observing.now();
        let mut lane = self.enter_lane(Some(vcpu));
        if self.drain_own(Some(vcpu), handler) {
            return Err(Restart);
        }
        self.find(&mut lane, spans, Sense::BOTH);
        let others = self.rendezvous.all().without(vcpu);
        let held = self.hold(others);
        if lane.events.is_empty() {
            perform();
        } else {
            let access = Access {
                actor: Actor::Vcpu(vcpu),
                spans,
                held: others,
                start,
            };
            self.notify(&mut lane, access, handler, &mut |phase| {
                if matches!(phase, Phase::Perform) {
                    perform();
                }
            });
        }
        drop(held);
        Ok(())
    }
}
