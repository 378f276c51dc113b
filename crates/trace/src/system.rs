//! The trace subsystem of a machine: establishing traces, sensing accesses, notifying consumers.
//!
//! # The lane
//! One mutex, the *lane*, serializes everything that changes what is traced or writes a traced
//! location: [`TraceSystem::establish`], [`TraceSystem::access`] and [`TraceSystem::exclusive`].
//! So there is one order of traced writes, and at most one VCPU waits for acknowledgements at a
//! time. A VCPU that waits for the lane is at an instruction boundary (not running), so the
//! lane's owner never waits for it: any number of simultaneous actors, also on each other's
//! ranges, make progress. A VCPU that has got the lane empties its own queue before it does
//! anything; if there was something in it, its instruction starts again, because the instruction
//! may have been derived from what changed ([`Restart`]).
//!
//! # Lock order
//! lane, then `regions`, then a mailbox's queue or `waiting`. No callback is called with `regions`
//! or a queue locked; `perform` and `handler` are called with the lane locked and must not call
//! back into the trace subsystem except for [`TraceSystem::raise`] and [`TraceSystem::device_at`].
//!
//! # Orderings
//! See [`crate::mailbox`]. The bytes written by `perform` are visible to a consumer before it goes
//! on, because releasing it (a sequentially consistent store that it reads) comes after the write.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::delay::Delays;
use crate::kind::{Actor, Kind, Range, Semantics, Sense};
use crate::mailbox::{Attention, Mailbox, Notice, Notification, TRACE};
use crate::observer::{Observing, Place, Record};
use crate::regions::{Region, Regions, TraceId};
use crate::statistics::{Counters, Totals};
use crate::sync::{
    AtomicBool, AtomicU32, AtomicU64, Condvar, Mutex, MutexGuard, Ordering::Relaxed,
    Ordering::SeqCst, RwLock, SPINS, lock, relax,
};
use crate::vcpu::{VcpuId, VcpuSet};

const PAGE_SHIFT: u32 = 12;
const PAGE: u64 = 1 << PAGE_SHIFT;

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

/// Steps of the protocol that a test leaves out to see that its checks notice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mutation {
    /// Establish without waiting for those who may write directly: breaks invariant 1.
    pub establish_without_waiting: bool,
    /// Write before the consumers have stalled: breaks invariants 2 and 3.
    pub write_without_waiting: bool,
    /// Do not drain the own queue after waiting for the lane: breaks invariant 4.
    pub no_restart: bool,
    /// Wait for the lane while counting as running: breaks freedom from deadlock (7).
    pub wait_running: bool,
    /// Notify twice: breaks invariant 5.
    pub notify_twice: bool,
    /// Let a VCPU go on before the completion: breaks invariant 2.
    pub resume_early: bool,
}

/// The trace subsystem.
pub struct TraceSystem {
    lane: Mutex<()>,
    regions: RwLock<Regions>,
    mailboxes: Vec<Mailbox>,
    sensor: Arc<dyn Sensor>,
    /// Semantics by kind.
    semantics: Vec<AtomicU32>,
    notify_all: AtomicBool,
    delays: Delays,
    sequence: AtomicU64,
    counters: Counters,
    /// The lane's owner sleeps until a VCPU stops running.
    waiting: Mutex<()>,
    stopped: Condvar,
    owner_asleep: AtomicBool,
    observing: Observing,
    mutation: Mutation,
}

impl TraceSystem {
    /// For `vcpus` VCPUs (at most [`crate::MAX_VCPUS`]), none of them running.
    pub fn new(vcpus: usize, sensor: Arc<dyn Sensor>) -> Self {
        Self::mutated(vcpus, sensor, Mutation::default())
    }

    /// As [`Self::new`], with steps left out: for tests of the tests.
    #[doc(hidden)]
    pub fn mutated(vcpus: usize, sensor: Arc<dyn Sensor>, mutation: Mutation) -> Self {
        Self {
            lane: Mutex::new(()),
            regions: RwLock::new(Regions::default()),
            mailboxes: (0..vcpus.min(crate::MAX_VCPUS))
                .map(|_| Mailbox::default())
                .collect(),
            sensor,
            semantics: Kind::ALL
                .iter()
                .map(|kind| AtomicU32::new(kind.default_semantics() as u32))
                .collect(),
            notify_all: AtomicBool::new(false),
            delays: Delays::default(),
            sequence: AtomicU64::new(0),
            counters: Counters::default(),
            waiting: Mutex::new(()),
            stopped: Condvar::new(),
            owner_asleep: AtomicBool::new(false),
            observing: Observing::default(),
            mutation,
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

    /// Overrides the semantics of a kind (\[0084\]).
    pub fn set_semantics(&self, kind: Kind, semantics: Semantics) {
        self.semantics[kind as usize].store(semantics as u32, Relaxed);
    }

    pub fn semantics(&self, kind: Kind) -> Semantics {
        let word = self.semantics[kind as usize].load(Relaxed);
        Semantics::ALL[(word as usize).min(Semantics::ALL.len() - 1)]
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
        &self.mailbox(vcpu).attention
    }

    /// Sets attention bits of a VCPU and wakes it if it sleeps. From any thread, also from within
    /// `perform`.
    pub fn raise(&self, vcpu: VcpuId, bits: u32) {
        self.mailbox(vcpu).raise(bits);
    }

    fn mailbox(&self, vcpu: VcpuId) -> &Mailbox {
        &self.mailboxes[vcpu.index() % self.mailboxes.len()]
    }

    fn all(&self) -> VcpuSet {
        VcpuSet::first(self.mailboxes.len())
    }

    /// The VCPU is at an instruction boundary and executes nothing until [`Self::leave_safe`].
    pub fn enter_safe(&self, vcpu: VcpuId) {
        self.mailbox(vcpu).stop_running();
        self.wake_owner();
    }

    /// The VCPU wants to execute again; waits while an actor holds it. The caller looks at its
    /// attention word, and so drains its queue, before it executes a guest instruction.
    pub fn leave_safe(&self, vcpu: VcpuId) {
        self.start_running(vcpu, self.observing.now());
    }

    /// As [`Self::leave_safe`], for a VCPU that acknowledged at `start`.
    fn start_running(&self, vcpu: VcpuId, start: u64) {
        if self.mailbox(vcpu).start_running(&|| self.wake_owner()) {
            self.observing
                .record(Some(vcpu), start, |span| Record::Stalled { span });
        }
    }

    /// Hands every notice in the VCPU's queue to `handler`; whether there was any.
    fn drain(&self, vcpu: VcpuId, handler: &mut dyn FnMut(Notice)) -> bool {
        self.drain_queue(vcpu, false, handler)
    }

    /// Called by a running VCPU at an instruction boundary before it completes what orders its
    /// notices by the guest's own rules, such as a TLB flush: hands over every notice that was
    /// posted before, however long it would travel. Returns whether there was any.
    pub fn settle(&self, vcpu: VcpuId, handler: &mut dyn FnMut(Notice)) -> bool {
        self.drain_queue(vcpu, true, handler)
    }

    fn drain_queue(&self, vcpu: VcpuId, settle: bool, handler: &mut dyn FnMut(Notice)) -> bool {
        let mailbox = self.mailbox(vcpu);
        if !self.observing.is_on() {
            return mailbox.drain(settle, handler);
        }
        mailbox.drain(settle, &mut |notice| {
            self.observing.apply(Some(vcpu), notice, handler);
        })
    }

    /// Sleeps, at an instruction boundary, until an attention bit is set or `until` has passed.
    pub fn sleep(&self, vcpu: VcpuId, until: Option<Instant>) {
        self.enter_safe(vcpu);
        self.mailbox(vcpu).sleep(until);
        self.leave_safe(vcpu);
    }

    /// Called by a running VCPU at an instruction boundary when its attention word is set:
    /// acknowledges by stalling while an actor holds it, then hands every notice to `handler`.
    /// Returns whether there was any.
    pub fn boundary(&self, vcpu: VcpuId, handler: &mut dyn FnMut(Notice)) -> bool {
        let mailbox = self.mailbox(vcpu);
        if mailbox.attention.take(TRACE) == 0 {
            return false;
        }
        if mailbox.is_held() && !self.mutation.resume_early {
            let start = self.observing.now();
            mailbox.stop_running();
            self.wake_owner();
            self.start_running(vcpu, start);
        } else if self.mutation.resume_early && mailbox.is_held() {
            mailbox.stop_running();
            self.wake_owner();
        }
        self.drain(vcpu, handler)
    }

    /// Tells the lane's owner, if it sleeps, that a VCPU has stopped running.
    fn wake_owner(&self) {
        if self.owner_asleep.load(SeqCst) {
            drop(lock(&self.waiting));
            self.stopped.notify_all();
        }
    }

    /// Takes the lane. A VCPU waits for it at an instruction boundary.
    fn enter_lane(&self, vcpu: Option<VcpuId>) -> MutexGuard<'_, ()> {
        let Some(vcpu) = vcpu else {
            return lock(&self.lane);
        };
        if self.mutation.wait_running {
            return lock(&self.lane);
        }
        if let Ok(guard) = self.lane.try_lock() {
            return guard;
        }
        let start = self.observing.now();
        let mailbox = self.mailbox(vcpu);
        mailbox.stop_running();
        self.wake_owner();
        let guard = lock(&self.lane);
        // Nobody can hold this VCPU now: only the lane's owner does.
        mailbox.start_running_in_lane();
        self.observing
            .record(Some(vcpu), start, |span| Record::Queued { span });
        guard
    }

    /// Empties the VCPU's own queue; whether there was something in it.
    fn drain_own(&self, vcpu: Option<VcpuId>, handler: &mut dyn FnMut(Notice)) -> bool {
        let Some(vcpu) = vcpu else { return false };
        if self.mutation.no_restart {
            return false;
        }
        self.mailbox(vcpu).attention.take(TRACE);
        self.drain(vcpu, handler)
    }

    /// Brings `vcpus` to an instruction boundary and keeps them there; the caller has the lane.
    /// Returns those that were not at one already.
    fn hold(&self, vcpus: VcpuSet) -> VcpuSet {
        for vcpu in vcpus.iter() {
            self.mailbox(vcpu).hold();
        }
        vcpus
            .iter()
            .filter(|vcpu| self.wait_stopped(self.mailbox(*vcpu)))
            .collect()
    }

    /// Waits until the VCPU has stopped; whether it was running.
    fn wait_stopped(&self, mailbox: &Mailbox) -> bool {
        for round in 0..SPINS {
            if !mailbox.is_running() {
                return round > 0;
            }
            relax();
        }
        let mut guard = lock(&self.waiting);
        self.owner_asleep.store(true, SeqCst);
        while mailbox.is_running() {
            guard = self
                .stopped
                .wait(guard)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        self.owner_asleep.store(false, SeqCst);
        drop(guard);
        true
    }

    fn release(&self, vcpus: VcpuSet) {
        for vcpu in vcpus.iter() {
            self.mailbox(vcpu).release();
        }
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
        let range = Range::new(range.lo, range.hi.max(range.lo + 1));
        let start = self.observing.now();
        let _lane = self.enter_lane(by);
        if self.drain_own(by, handler) {
            return Err(Restart);
        }
        let mut revocations = Vec::new();
        let id = {
            let mut regions = self
                .regions
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let id = regions.add(range, kind, sense, cookie, consumers);
            // Under the lock, so that a removal cannot take the protection away in between.
            for page in range.lo >> PAGE_SHIFT..=(range.hi - 1) >> PAGE_SHIFT {
                let holders = self.sensor.protect(page << PAGE_SHIFT, sense);
                if !holders.is_empty() {
                    revocations.push((page << PAGE_SHIFT, holders));
                }
            }
            id
        };
        let mut others = VcpuSet::EMPTY;
        for (_, holders) in &revocations {
            others = others.union(*holders);
        }
        let own = by.filter(|v| others.contains(*v));
        if let Some(own) = own {
            others = others.without(own);
        }
        let mut held = VcpuSet::EMPTY;
        if !others.is_empty() && !self.mutation.establish_without_waiting {
            held = self.hold(others);
        }
        for (page, holders) in revocations {
            let notice = Notice::Revoke { page, sense };
            for vcpu in holders.iter() {
                if Some(vcpu) == own {
                    self.observing.apply(own, notice, handler);
                } else {
                    self.mailbox(vcpu).post(notice);
                }
            }
        }
        if !others.is_empty() && !self.mutation.establish_without_waiting {
            self.release(others);
        }
        self.observing
            .record(by, start, |span| Record::Established {
                span,
                range,
                kind,
                sense,
                consumers,
                held,
            });
        Ok(id)
    }

    /// Takes a VCPU out of a trace; the last one takes the trace along. May be called from
    /// anywhere except from within `perform` or `handler`.
    pub fn remove(&self, vcpu: VcpuId, id: TraceId) {
        let mut regions = self
            .regions
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(gone) = regions.drop_consumer(id, vcpu) {
            self.observing
                .record(Place::Machine, 0, |span| Record::Removed {
                    at: span.end,
                    range: gone.range,
                    kind: gone.kind,
                    sense: gone.sense,
                });
            for page in gone.range.lo >> PAGE_SHIFT..=(gone.range.hi - 1) >> PAGE_SHIFT {
                self.sensor.relax(page * PAGE, regions.sense_of_page(page));
            }
        }
    }

    /// The device whose registers `actor` is about to access at `range`, by its cookie, with the
    /// range of its registers: an event of kind `device`. Takes no lane; reading a device's
    /// registers changes no derived structure.
    pub fn device_at(&self, actor: Actor, range: Range, sense: Sense) -> Option<(u64, Range)> {
        let start = self.observing.now();
        let mut hits = Vec::new();
        self.regions
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .hits(range, sense, &mut hits);
        let hit = hits.iter().find(|hit| hit.kind == Kind::Device)?;
        let semantics = self.semantics(Kind::Device);
        self.counters.event(Kind::Device, semantics);
        self.observing.record(actor, start, |span| Record::Acted {
            span,
            notification: Notification {
                id: hit.id,
                kind: Kind::Device,
                semantics,
                region: hit.range,
                cookie: hit.cookie,
                written: range,
                actor,
                sequence: self.sequence.fetch_add(1, Relaxed),
            },
            sense,
            consumers: VcpuSet::EMPTY,
            awaited: VcpuSet::EMPTY,
            waited: 0,
        });
        Some((hit.cookie, hit.range))
    }

    /// Performs an access that traces may cover. `spans` are the bytes, in at most two pages.
    ///
    /// Called on the actor's thread, at an instruction boundary if it is a VCPU. If no trace covers
    /// the bytes, `perform` is all that happens. Otherwise the consumers are notified as the
    /// semantics of each kind say; of several semantics, the strictest holds for the write. The
    /// actor, if it is a consumer itself, gets its notifications through `handler` right after the
    /// write.
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
        let vcpu = match actor {
            Actor::Vcpu(vcpu) => Some(vcpu),
            Actor::Device | Actor::Debugger => None,
        };
        let start = self.observing.now();
        let _lane = self.enter_lane(vcpu);
        if self.drain_own(vcpu, handler) {
            return Err(Restart);
        }
        let mut hits: Vec<(Region, Range)> = Vec::new();
        {
            let regions = self
                .regions
                .read()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let mut found = Vec::new();
            for span in spans {
                found.clear();
                regions.hits(*span, sense, &mut found);
                for region in &found {
                    // A region that both spans hit is one event.
                    if !hits.iter().any(|(known, _)| known.id == region.id) {
                        hits.push((*region, *span));
                    }
                }
            }
        }
        hits.retain(|(region, _)| region.kind != Kind::Device);
        if hits.is_empty() {
            self.counters.beside();
            perform();
            return Ok(());
        }
        if let Some(vcpu) = vcpu {
            self.counters.acted(vcpu);
        }
        self.notify(actor, sense, &hits, start, handler, perform);
        Ok(())
    }

    /// Performs an access that hits these regions, of which there is at least one, in the lane.
    /// The observer is told that it began at `start`.
    fn notify(
        &self,
        actor: Actor,
        sense: Sense,
        hits: &[(Region, Range)],
        start: u64,
        handler: &mut dyn FnMut(Notice),
        perform: &mut dyn FnMut(),
    ) {
        let vcpu = match actor {
            Actor::Vcpu(vcpu) => Some(vcpu),
            Actor::Device | Actor::Debugger => None,
        };
        let (mut awaited, mut waited) = (VcpuSet::EMPTY, 0);
        let everyone = self.notify_all.load(Relaxed);
        let mut bracketed = VcpuSet::EMPTY;
        let mut synchronous = VcpuSet::EMPTY;
        let mut posts: Vec<(VcpuSet, Notification)> = Vec::new();
        for (region, written) in hits {
            let semantics = self.semantics(region.kind);
            let consumers = if everyone {
                self.all()
            } else {
                region.consumers
            };
            let others = vcpu.map_or(consumers, |v| consumers.without(v));
            match semantics {
                Semantics::Bracketing => bracketed = bracketed.union(others),
                Semantics::PostWriteSync => synchronous = synchronous.union(others),
                Semantics::PostWriteAsync | Semantics::PreWriteValue => {}
            }
            self.counters.event(region.kind, semantics);
            let notification = Notification {
                id: region.id,
                kind: region.kind,
                semantics,
                region: region.range,
                cookie: region.cookie,
                written: *written,
                actor,
                sequence: self.sequence.fetch_add(1, Relaxed),
            };
            posts.push((consumers, notification));
        }
        if !bracketed.is_empty() && !self.mutation.write_without_waiting {
            waited += self.timed(hits, Semantics::Bracketing, bracketed, || {
                self.travel(&posts);
                awaited = awaited.union(self.hold(bracketed));
            });
        }
        let post = |before_write: bool| {
            for (consumers, notification) in &posts {
                if (notification.semantics == Semantics::PreWriteValue) != before_write {
                    continue;
                }
                let others = consumers.iter().filter(|c| Some(*c) != vcpu);
                for (nth, consumer) in others.enumerate() {
                    let times = if self.mutation.notify_twice { 2 } else { 1 };
                    for _ in 0..times {
                        self.send(consumer, nth, *notification);
                    }
                    self.counters
                        .notified(notification.kind, notification.semantics, consumer);
                }
            }
        };
        post(true);
        perform();
        post(false);
        if !bracketed.is_empty() && !self.mutation.write_without_waiting {
            self.release(bracketed);
        }
        if !synchronous.is_empty() {
            // An instruction boundary after the notice is queued is the acknowledgement.
            waited += self.timed(hits, Semantics::PostWriteSync, synchronous, || {
                awaited = awaited.union(self.hold(synchronous));
                self.release(synchronous);
            });
        }
        if let Some(vcpu) = vcpu {
            for (_, notification) in posts.iter().filter(|(c, _)| c.contains(vcpu)) {
                self.counters
                    .notified(notification.kind, notification.semantics, vcpu);
                self.observing
                    .apply(Some(vcpu), Notice::Notification(*notification), handler);
            }
        }
        for (consumers, notification) in &posts {
            self.observing.record(actor, start, |span| Record::Acted {
                span,
                notification: *notification,
                sense,
                consumers: *consumers,
                awaited,
                waited,
            });
        }
    }

    /// Lets those of these notifications travel that are bracketed.
    fn travel(&self, posts: &[(VcpuSet, Notification)]) {
        let bracketed = posts
            .iter()
            .filter(|(_, n)| n.semantics == Semantics::Bracketing);
        if let Some(delay) = bracketed.filter_map(|(_, n)| self.delays.of(n.kind)).max() {
            std::thread::sleep(delay);
        }
    }

    /// Queues a notification for the `nth` of its consumers. If notifications take time, each
    /// consumer is reached later than the one before it.
    fn send(&self, consumer: VcpuId, nth: usize, notification: Notification) {
        let mailbox = self.mailbox(consumer);
        let notice = Notice::Notification(notification);
        let delay = self.delays.of(notification.kind);
        match (delay, notification.semantics) {
            (None, _) | (_, Semantics::Bracketing) => mailbox.post(notice),
            (Some(delay), Semantics::PostWriteSync) => {
                std::thread::sleep(delay);
                mailbox.post(notice);
            }
            (Some(delay), Semantics::PostWriteAsync | Semantics::PreWriteValue) => {
                let due = Instant::now() + delay * (nth as u32 + 1);
                mailbox.post_late(due, notice);
            }
        }
    }

    /// Runs a wait for acknowledgements and counts it for the kind that asked for it. Returns how
    /// long it took, in nanoseconds.
    fn timed(
        &self,
        hits: &[(Region, Range)],
        semantics: Semantics,
        waited_for: VcpuSet,
        wait: impl FnOnce(),
    ) -> u64 {
        let start = Instant::now();
        wait();
        let elapsed = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let asked = hits
            .iter()
            .find(|(r, _)| self.semantics(r.kind) == semantics);
        if let Some((region, _)) = asked {
            self.counters.waited(region.kind, semantics, elapsed);
            self.counters
                .acknowledged(region.kind, semantics, waited_for.len() as u64);
        }
        elapsed
    }

    /// Runs `perform`, an access to `spans`, while no other VCPU executes a guest instruction.
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
        {
            let _lane = self.enter_lane(Some(vcpu));
            if self.drain_own(Some(vcpu), handler) {
                return Err(Restart);
            }
            let mut found = Vec::new();
            let regions = self
                .regions
                .read()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            for span in spans {
                regions.hits(*span, Sense::WRITE, &mut found);
            }
            drop(regions);
            let hits: Vec<(Region, Range)> = found
                .into_iter()
                .filter(|r| r.kind != Kind::Device)
                .map(|r| {
                    let span = spans
                        .iter()
                        .find(|s| s.overlaps(&r.range))
                        .unwrap_or(&r.range);
                    (r, *span)
                })
                .collect();
            let others = self.all().without(vcpu);
            self.hold(others);
            if hits.is_empty() {
                perform();
            } else {
                self.counters.acted(vcpu);
                // Everyone is stopped already: waiting for consumers costs nothing, and they stay
                // held until the end.
                let actor = Actor::Vcpu(vcpu);
                self.notify(actor, Sense::WRITE, &hits, start, handler, perform);
            }
            self.release(others);
        }
        Ok(())
    }

    /// A snapshot of the statistics.
    pub fn totals(&self) -> Totals {
        self.counters.totals(self.mailboxes.len())
    }

    /// The number of regions.
    pub fn region_count(&self) -> usize {
        self.regions
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .len()
    }
}
