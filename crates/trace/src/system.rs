//! The trace subsystem of a machine: establishing traces, sensing accesses, notifying consumers.
//!
//! # The lane
//! One mutex, the *lane*, serializes everything that establishes a trace or accesses a traced
//! location: [`TraceSystem::establish`], and [`TraceSystem::access`] and [`TraceSystem::exclusive`]
//! in [`crate::event`].
//! So there is one order of traced writes, and at most one VCPU waits for acknowledgements at a
//! time. A VCPU that waits for the lane is at an instruction boundary (not running), so the
//! lane's owner never waits for it: any number of simultaneous actors, also on each other's
//! ranges, make progress. A VCPU that has got the lane empties its own queue before it does
//! anything; if there was something in it, its instruction starts again, because the instruction
//! may have been derived from what changed ([`Restart`]).
//!
//! The lane also makes an event cheap: its owner is the only one who queues, holds and counts, so
//! these need no atomic read-modify-write, and what an event needs is kept there for the next.
//!
//! # Lock order
//! lane, then `regions`, then those of [`crate::mailbox`] or `waiting` of [`crate::rendezvous`].
//! No callback is called with `regions` locked, but those of [`Sensor`] and the one of
//! [`TraceSystem::untraced`], which only touch page attributes; `perform` and `handler` are called with the lane
//! locked and must not call back into the trace subsystem except for [`TraceSystem::raise`] and
//! [`TraceSystem::device_at`].
//!
//! # Orderings
//! See [`crate::mailbox`]. The bytes written by `perform` are visible to a consumer before it goes
//! on, because releasing it (a sequentially consistent store that it reads) comes after the write;
//! and to one that is only notified, because its queue's lock does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::delay::Delays;
use crate::kind::{Actor, Kind, Range, Semantics, Sense};
use crate::lane::Lane;
use crate::mailbox::{Attention, TRACE};
use crate::mutation::{Mutated, Mutation};
use crate::notice::{Notice, Notification};
use crate::observer::{Observing, Place, Record};
use crate::regions::{Region, Regions, TraceId, pages};
use crate::rendezvous::{Held, Rendezvous};
use crate::statistics::{Counters, Totals};
use crate::sync::{
    AtomicBool, AtomicU32, Mutex, MutexGuard, Ordering::Relaxed, RwLock, lock, read, write,
};
use crate::vcpu::{VcpuId, VcpuSet};

const PAGE_SHIFT: u32 = 12;

/// Whoever can make accesses to guest memory be sensed: the owner of its page attributes.
pub trait Sensor: Send + Sync {
    /// From now on nobody new may access the page at `gpa` directly in the ways of `sense`.
    /// Returns the VCPUs that may already do so: they have to be told.
    ///
    /// The implementer first stores the attribute and then reads who holds direct access, both
    /// sequentially consistent; a VCPU that takes direct access first stores that it does and then
    /// reads the attribute. So one of the two sees the other.
    fn protect(&self, gpa: u64, sense: Sense) -> VcpuSet;
    /// Accesses to the page at `gpa` need to be sensed only in the ways of `sense` any more.
    fn relax(&self, gpa: u64, sense: Sense);
}

/// A sensor of memory that is always sensed: device registers only.
#[derive(Debug, Default)]
pub struct AlwaysSensed;

impl Sensor for AlwaysSensed {
    fn protect(&self, _gpa: u64, _sense: Sense) -> VcpuSet {
        VcpuSet::EMPTY
    }
    fn relax(&self, _gpa: u64, _sense: Sense) {}
}

/// The access has not been performed, or the trace not been established: while its VCPU waited,
/// something changed that its instruction may have been derived from. Start the instruction again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("start the instruction again")]
pub struct Restart;

/// The trace subsystem.
pub struct TraceSystem {
    lane: Mutex<Lane>,
    pub(crate) regions: RwLock<Regions>,
    pub(crate) rendezvous: Rendezvous,
    sensor: Arc<dyn Sensor>,
    /// Semantics by kind.
    semantics: Vec<AtomicU32>,
    pub(crate) notify_all: AtomicBool,
    pub(crate) delays: Delays,
    pub(crate) counters: Counters,
    pub(crate) observing: Observing,
    pub(crate) mutated: Mutated,
}

impl TraceSystem {
    /// For `vcpus` VCPUs (at least 1 and at most [`crate::MAX_VCPUS`]), none of them running.
    pub fn new(vcpus: usize, sensor: Arc<dyn Sensor>) -> Self {
        Self::with(vcpus, sensor, Mutated::default())
    }

    /// As [`Self::new`], with a step left out: for tests of the tests.
    #[cfg(feature = "shuttle")]
    pub fn mutated(vcpus: usize, sensor: Arc<dyn Sensor>, mutation: Option<Mutation>) -> Self {
        Self::with(vcpus, sensor, Mutated::by(mutation))
    }

    fn with(vcpus: usize, sensor: Arc<dyn Sensor>, mutated: Mutated) -> Self {
        let vcpus = vcpus.clamp(1, crate::MAX_VCPUS);
        Self {
            lane: Mutex::new(Lane::default()),
            regions: RwLock::new(Regions::default()),
            rendezvous: Rendezvous::new(vcpus),
            sensor,
            semantics: Kind::ALL
                .iter()
                .map(|kind| AtomicU32::new(kind.default_semantics() as u32))
                .collect(),
            notify_all: AtomicBool::new(false),
            delays: Delays::default(),
            counters: Counters::new(vcpus),
            observing: Observing::default(),
            mutated,
        }
    }

    /// Makes an observer see, from now on, what happens.
    #[must_use]
    pub fn observed(mut self, observing: Observing) -> Self {
        self.observing = observing;
        self
    }

    /// Whoever observes this trace subsystem.
    pub fn observing(&self) -> &Observing {
        &self.observing
    }

    /// Overrides the semantics of a kind (\[0084\]), from any thread and at any time. An access
    /// that has begun keeps the semantics it began with.
    pub fn set_semantics(&self, kind: Kind, semantics: Semantics) {
        self.semantics[kind as usize].store(semantics as u32, Relaxed);
    }

    pub fn semantics(&self, kind: Kind) -> Semantics {
        let word = self.semantics[kind as usize].load(Relaxed);
        Semantics::ALL[(word as usize).min(Semantics::ALL.len() - 1)]
    }

    /// Gives one trace semantics of its own, instead of those of its kind.
    pub fn set_trace_semantics(&self, id: TraceId, semantics: Semantics) {
        self.regions
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .set_semantics(id, semantics);
    }

    /// The semantics of the events of a trace.
    pub(crate) fn semantics_of(&self, region: &Region) -> Semantics {
        region
            .semantics
            .unwrap_or_else(|| self.semantics(region.kind))
    }

    /// Makes every VCPU a consumer of every event: the null-trace embodiment (\[0075\]).
    pub fn set_notify_all(&self, all: bool) {
        self.notify_all.store(all, Relaxed);
    }

    /// Makes notifications of a kind take this long to reach their consumers, so that a guest can
    /// see what weak semantics allow. For tests.
    pub fn set_notice_delay(&self, kind: Kind, delay: Duration) {
        self.delays.set(kind, delay);
    }

    /// The attention word of a VCPU, to be polled at its instruction boundaries.
    pub fn attention(&self, vcpu: VcpuId) -> &Attention {
        &self.rendezvous.mailbox(vcpu).attention
    }

    /// Sets attention bits of a VCPU and wakes it if it sleeps. From any thread, also from within
    /// `perform`.
    pub fn raise(&self, vcpu: VcpuId, bits: u32) {
        self.rendezvous.mailbox(vcpu).raise(bits);
    }

    /// The VCPU is at an instruction boundary and executes nothing until [`Self::leave_safe`].
    pub fn enter_safe(&self, vcpu: VcpuId) {
        self.rendezvous.stop(vcpu);
    }

    /// The VCPU wants to execute again; waits while an actor holds it. The caller looks at its
    /// attention word, and so drains its queue, before it executes a guest instruction.
    pub fn leave_safe(&self, vcpu: VcpuId) {
        let start = self.observing.now();
        if self.rendezvous.start(vcpu) {
            self.stalled(vcpu, start);
        }
    }

    /// Tells the observer that a VCPU stalled from `start` to now.
    fn stalled(&self, vcpu: VcpuId, start: u64) {
        self.observing
            .record(Some(vcpu), start, |span| Record::Stalled { span });
    }

    /// Hands every notice in the VCPU's queue to `handler`; whether there was any.
    fn drain(&self, vcpu: VcpuId, handler: &mut dyn FnMut(Notice)) -> bool {
        self.drain_queue(vcpu, false, handler)
    }

    /// Called by a running VCPU at an instruction boundary before it completes what orders its
    /// notices by the guest's own rules, such as a TLB flush: hands over every notice that was
    /// posted before, however long it would travel, and those of writes that could be seen before,
    /// even if they were not posted yet. Returns whether there was any.
    pub fn settle(&self, vcpu: VcpuId, handler: &mut dyn FnMut(Notice)) -> bool {
        // A write that can be seen but has not been posted is still being performed in the lane.
        drop(self.enter_lane(Some(vcpu)));
        self.drain_queue(vcpu, true, handler)
    }

    fn drain_queue(&self, vcpu: VcpuId, settle: bool, handler: &mut dyn FnMut(Notice)) -> bool {
        let mut apply = |notice| self.observing.apply(Some(vcpu), notice, handler);
        let taken = || self.rendezvous.tell_owner();
        let mailbox = self.rendezvous.mailbox(vcpu);
        mailbox.drain(settle, &mut apply, &taken)
    }

    /// Sleeps, at an instruction boundary, until an attention bit other than [`TRACE`] is set or
    /// `until` has passed. Notices do not wake it, unless there are very many: it finds them
    /// before its next instruction.
    pub fn sleep(&self, vcpu: VcpuId, until: Option<Instant>) {
        self.enter_safe(vcpu);
        self.rendezvous.mailbox(vcpu).sleep(until);
        self.leave_safe(vcpu);
    }

    /// Called by a running VCPU at an instruction boundary when its attention word is set:
    /// acknowledges by stalling while an actor holds it, then hands every notice to `handler`.
    /// Returns whether there was any.
    pub fn boundary(&self, vcpu: VcpuId, handler: &mut dyn FnMut(Notice)) -> bool {
        let mailbox = self.rendezvous.mailbox(vcpu);
        if mailbox.attention.take(TRACE) == 0 {
            return false;
        }
        while self.rendezvous.is_held(vcpu) {
            let start = self.observing.now();
            self.rendezvous.stop(vcpu);
            if self.mutated.is(Mutation::ResumeEarly) {
                mailbox.start_running();
            } else {
                self.rendezvous.start(vcpu);
            }
            self.stalled(vcpu, start);
            // What was queued meanwhile is taken out below. The bit may also be the request of the
            // next actor, who does not repeat it: so look again whether the VCPU is held.
            mailbox.attention.take(TRACE);
            let forgets = self.mutated.is(Mutation::ForgetRequest);
            if forgets || self.mutated.is(Mutation::ResumeEarly) {
                break;
            }
        }
        self.drain(vcpu, handler)
    }

    /// Takes the lane. A VCPU waits for it at an instruction boundary.
    pub(crate) fn enter_lane(&self, vcpu: Option<VcpuId>) -> MutexGuard<'_, Lane> {
        let Some(vcpu) = vcpu else {
            return lock(&self.lane);
        };
        if self.mutated.is(Mutation::WaitRunning) {
            return lock(&self.lane);
        }
        if let Ok(guard) = self.lane.try_lock() {
            return guard;
        }
        let start = self.observing.now();
        self.rendezvous.stop(vcpu);
        let guard = lock(&self.lane);
        // Nobody can hold this VCPU now: only the lane's owner does.
        self.rendezvous.start_in_lane(vcpu);
        self.observing
            .record(Some(vcpu), start, |span| Record::Queued { span });
        guard
    }

    /// Empties the VCPU's own queue; whether there was something in it. The caller has the lane, so
    /// nothing is queued meanwhile.
    pub(crate) fn drain_own(&self, vcpu: Option<VcpuId>, handler: &mut dyn FnMut(Notice)) -> bool {
        let Some(vcpu) = vcpu else { return false };
        if self.mutated.is(Mutation::NoRestart) {
            return false;
        }
        let attention = &self.rendezvous.mailbox(vcpu).attention;
        attention.pending() && attention.take(TRACE) != 0 && self.drain(vcpu, handler)
    }

    /// Brings `vcpus` to an instruction boundary and keeps them there; the caller has the lane.
    pub(crate) fn hold(&self, vcpus: VcpuSet) -> Held<'_> {
        if self.mutated.is(Mutation::WaitForSleepers) {
            for vcpu in vcpus.iter() {
                let mailbox = self.rendezvous.mailbox(vcpu);
                mailbox.ask();
                self.rendezvous.owner_waits(|| !mailbox.attention.pending());
            }
        }
        self.rendezvous.hold(vcpus)
    }

    /// Establishes a trace on `range` for `consumers`. When it returns, no VCPU, device or debugger
    /// can reach the range in a way of `sense` any more without being sensed: only then may the
    /// caller read the bytes that it derives something from (invariant 1).
    ///
    /// `by` is the VCPU on whose thread this runs, at an instruction boundary; `handler` gets the
    /// notices for it.
    ///
    /// # Errors
    /// [`Restart`]: notices reached `by` meanwhile; nothing has been established.
    #[allow(clippy::too_many_arguments)]
    pub fn establish(
        &self,
        by: Option<VcpuId>,
        consumers: VcpuSet,
        range: Range,
        kind: Kind,
        sense: Sense,
        cookie: u64,
        handler: &mut dyn FnMut(Notice),
    ) -> Result<TraceId, Restart> {
        let lo = range.lo.min(u64::MAX - 1);
        let range = Range::new(lo, range.hi.max(lo + 1));
        let start = self.observing.now();
        let mut lane = self.enter_lane(by);
        if self.drain_own(by, handler) {
            return Err(Restart);
        }
        let revocations = &mut lane.revocations;
        revocations.clear();
        let id = {
            let mut regions = write(&self.regions);
            let id = regions.add(range, kind, sense, cookie, consumers);
            // Under the lock, so that a removal cannot take the protection away in between.
            for page in pages(&range) {
                let holders = self.sensor.protect(page << PAGE_SHIFT, sense);
                if !holders.is_empty() {
                    revocations.push((page << PAGE_SHIFT, holders));
                }
            }
            id
        };
        let established = |held| {
            self.observing
                .record(by, start, |span| Record::Established {
                    span,
                    range,
                    kind,
                    sense,
                    consumers,
                    held,
                });
        };
        if revocations.is_empty() {
            established(VcpuSet::EMPTY);
            return Ok(id);
        }
        let holders = revocations
            .iter()
            .fold(VcpuSet::EMPTY, |sum, (_, holders)| sum.union(*holders));
        let others = by.map_or(holders, |by| holders.without(by));
        let held = (!self.mutated.is(Mutation::EstablishWithoutWaiting)).then(|| self.hold(others));
        for (page, holders) in revocations.drain(..) {
            for vcpu in holders.iter() {
                let notice = Notice::Revoke { page, sense };
                if Some(vcpu) == by {
                    self.observing.apply(by, notice, handler);
                } else {
                    self.rendezvous.mailbox(vcpu).post(notice, false);
                }
            }
        }
        established(held.map_or(VcpuSet::EMPTY, |held| held.waited_for));
        Ok(id)
    }

    /// Takes a VCPU out of a trace; the last one takes the trace along. May be called from
    /// anywhere except from within `perform` or `handler`. Of an access that is under way, the VCPU
    /// may still be notified.
    pub fn remove(&self, vcpu: VcpuId, id: TraceId) {
        let mut regions = write(&self.regions);
        if let Some(gone) = regions.drop_consumer(id, vcpu) {
            self.observing
                .record(Place::Machine, 0, |span| Record::Removed {
                    at: span.end,
                    range: gone.range,
                    kind: gone.kind,
                    sense: gone.sense,
                });
            for page in pages(&gone.range) {
                self.relax(&regions, page);
            }
        }
    }

    /// Takes the bytes of `range` out of the traces of this kind and cookie, for all their consumers.
    /// What is left on either side of it stays traced all the time, under a new name. May be called
    /// where [`Self::remove`] may; of an access that is under way, consumers may still be notified.
    pub fn exclude(&self, range: Range, kind: Kind, cookie: u64) {
        if range.is_empty() {
            return;
        }
        let mut regions = write(&self.regions);
        for gone in regions.exclude(range, kind, cookie) {
            let part = Range::new(range.lo.max(gone.range.lo), range.hi.min(gone.range.hi));
            self.observing
                .record(Place::Machine, 0, |span| Record::Removed {
                    at: span.end,
                    range: part,
                    kind,
                    sense: gone.sense,
                });
            for page in pages(&part) {
                self.relax(&regions, page);
            }
        }
    }

    /// Lets the accesses to a page go unsensed that no trace senses any more.
    fn relax(&self, regions: &Regions, page: u64) {
        let sense = match self.mutated.is(Mutation::RelaxTooMuch) {
            true => Sense::default(),
            false => regions.sense_of_page(page),
        };
        self.sensor.relax(page << PAGE_SHIFT, sense);
    }

    /// The device whose registers `actor` is about to access at `range`, by its cookie, with the
    /// range of its registers: an event of kind `device`. Takes no lane; reading a device's
    /// registers changes no derived structure.
    pub fn device_at(&self, actor: Actor, range: Range, sense: Sense) -> Option<(u64, Range)> {
        let start = self.observing.now();
        let mut device = None;
        read(&self.regions).hits(range, sense, &mut |region| {
            if region.kind == Kind::Device && device.is_none() {
                device = Some(*region);
            }
        });
        let region = device?;
        let semantics = self.semantics(Kind::Device);
        let sequence = self.counters.device_event(semantics);
        self.observing.record(actor, start, |span| Record::Acted {
            span,
            notification: Notification {
                id: region.id,
                kind: Kind::Device,
                semantics,
                region: region.range,
                cookie: region.cookie,
                written: range,
                sense,
                value: None,
                actor,
                sequence,
            },
            sense,
            consumers: VcpuSet::EMPTY,
            awaited: VcpuSet::EMPTY,
            waited: 0,
        });
        Some((region.cookie, region.range))
    }

    /// Runs `take` if no trace senses accesses of this kind to the bytes, while none can be
    /// established: a trace that is established later finds what `take` did. Returns what it
    /// returned, or `false`. `take` must not call back.
    pub fn untraced(&self, range: Range, sense: Sense, take: &mut dyn FnMut() -> bool) -> bool {
        let regions = read(&self.regions);
        let mut traced = range.is_empty();
        regions.hits(range, sense, &mut |_| traced = true);
        if self.mutated.is(Mutation::TakeUnlocked) {
            drop(regions);
            return !traced && take();
        }
        !traced && take()
    }

    /// A snapshot of the statistics.
    pub fn totals(&self) -> Totals {
        self.counters.totals()
    }

    /// The number of regions.
    pub fn region_count(&self) -> usize {
        read(&self.regions).len()
    }
}
