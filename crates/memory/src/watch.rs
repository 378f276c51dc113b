//! Watches: who accessed the bytes that a user wants to know about, and what they were and became.
//!
//! A watch is a trace of kind `watch` ([`trapline_trace`]) and an entry here. The trace makes
//! accesses to its bytes be sensed; whoever performs a sensed access does so through
//! [`Watches::perform`], which reports it to the sinks. As traced accesses are performed one at a
//! time, the events' sequence numbers give their order.
//!
//! `table` is a leaf lock, held to copy or replace one pointer. `any` is read relaxed: a watch is
//! entered before its trace is established, and whoever could access the bytes unsensed has passed
//! an instruction boundary since.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use trapline_trace::{Actor, Range, Sense, VcpuSet};

use crate::guest::GuestMemory;

/// How many bytes of an access are reported at most.
pub const MOST_BYTES: usize = 64;

/// A watched range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Unlike that of any other watch, also of those that are gone.
    pub number: u64,
    pub name: Arc<str>,
    pub range: Range,
    pub sense: Sense,
    /// The VCPUs whose accesses are reported. Devices and the debugger always are.
    pub vcpus: VcpuSet,
}

impl Watch {
    fn concerns(&self, actor: Actor) -> bool {
        match actor {
            Actor::Vcpu(vcpu) => self.vcpus.contains(vcpu),
            Actor::Device | Actor::Debugger => true,
        }
    }
}

/// Bytes of guest memory, at most [`MOST_BYTES`] of them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Glimpse {
    bytes: [u8; MOST_BYTES],
    len: u8,
}

impl Glimpse {
    fn of(memory: &GuestMemory, range: Range) -> Self {
        let len = (range.hi - range.lo).min(MOST_BYTES as u64) as usize;
        let mut bytes = [0; MOST_BYTES];
        // What is no RAM stays zero.
        let _ = memory.read(range.lo, &mut bytes[..len]);
        let len = len as u8;
        Self { bytes, len }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl std::fmt::Debug for Glimpse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x?}", self.bytes())
    }
}

/// One access to watched bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// The watch's name.
    pub watch: Arc<str>,
    /// Counts the events of the machine's watches.
    pub sequence: u64,
    /// Since the machine was built.
    pub time: Duration,
    pub actor: Actor,
    /// The address of the instruction that a VCPU executed.
    pub rip: Option<u64>,
    /// All bytes of the access, also those beside the watched range.
    pub range: Range,
    pub write: bool,
    /// The first bytes of the range before and after the access.
    pub old: Glimpse,
    pub new: Glimpse,
}

/// Receives the events, on the actor's thread while other actors wait: it must not block.
pub trait WatchSink: Send + Sync {
    fn touched(&self, event: &Arc<WatchEvent>);
}

/// An access that is about to be performed.
#[derive(Clone, Copy, Debug)]
pub struct Touch<'a> {
    pub actor: Actor,
    pub rip: Option<u64>,
    pub ranges: &'a [Range],
    pub sense: Sense,
}

#[derive(Clone, Default)]
struct Table {
    watches: Vec<Watch>,
    sinks: Vec<Arc<dyn WatchSink>>,
}

/// All watches of a machine, and those who hear of accesses. They outlive a reset.
pub struct Watches {
    any: AtomicBool,
    table: RwLock<Arc<Table>>,
    sequence: AtomicU64,
    start: Instant,
}

impl Default for Watches {
    fn default() -> Self {
        Self {
            any: AtomicBool::new(false),
            table: RwLock::default(),
            sequence: AtomicU64::new(0),
            start: Instant::now(),
        }
    }
}

impl Watches {
    fn change<R>(&self, change: impl FnOnce(&mut Table) -> R) -> R {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let mut new = Table::clone(&table);
        let result = change(&mut new);
        self.any.store(!new.watches.is_empty(), Relaxed);
        *table = Arc::new(new);
        result
    }

    fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Enters a watch; its trace is established afterwards.
    pub fn add(&self, watch: Watch) {
        self.change(|table| table.watches.push(watch));
    }

    /// Removes the watch with this number, after its trace.
    pub fn remove(&self, number: u64) {
        self.change(|table| table.watches.retain(|w| w.number != number));
    }

    /// All watches, in the order in which they were entered.
    pub fn list(&self) -> Vec<Watch> {
        self.table().watches.clone()
    }

    pub fn add_sink(&self, sink: Arc<dyn WatchSink>) {
        self.change(|table| table.sinks.push(sink));
    }

    /// Lets all sinks go.
    pub fn close(&self) {
        self.change(|table| table.sinks.clear());
    }

    /// Performs a sensed access to `memory` and reports it for each watch that it hits; an access
    /// to two pages is reported for each page.
    pub fn perform(&self, memory: &GuestMemory, touch: Touch<'_>, perform: &mut dyn FnMut()) {
        if !self.any.load(Relaxed) {
            return perform();
        }
        let table = self.table();
        let hits: Vec<(&Watch, Range, Glimpse)> = table
            .watches
            .iter()
            .filter(|watch| watch.sense.meets(touch.sense) && watch.concerns(touch.actor))
            .flat_map(|watch| {
                let hit = touch.ranges.iter().filter(|r| r.overlaps(&watch.range));
                hit.map(move |range| (watch, *range, Glimpse::of(memory, *range)))
            })
            .collect();
        perform();
        for (watch, range, old) in hits {
            let event = Arc::new(WatchEvent {
                watch: Arc::clone(&watch.name),
                sequence: self.sequence.fetch_add(1, Relaxed),
                time: self.start.elapsed(),
                actor: touch.actor,
                rip: touch.rip,
                range,
                write: touch.sense.write,
                old,
                new: Glimpse::of(memory, range),
            });
            table.sinks.iter().for_each(|sink| sink.touched(&event));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use trapline_trace::{Kind, TraceSystem, VcpuId};

    #[derive(Default)]
    struct Seen(Mutex<Vec<Arc<WatchEvent>>>);

    impl WatchSink for Seen {
        fn touched(&self, event: &Arc<WatchEvent>) {
            self.0.lock().unwrap().push(Arc::clone(event));
        }
    }

    fn watch(number: u64, lo: u64, hi: u64, sense: Sense) -> Watch {
        Watch {
            number,
            name: format!("w{number}").into(),
            range: Range::new(lo, hi),
            sense,
            vcpus: VcpuSet::one(VcpuId::new(1)),
        }
    }

    /// Memory with a watch and its trace, and what is seen.
    fn watched(watch: Watch) -> (GuestMemory, Arc<Seen>) {
        let seen = Arc::new(Seen::default());
        let watches = Arc::new(Watches::default());
        watches.add_sink(Arc::clone(&seen) as _);
        watches.add(watch);
        let memory = GuestMemory::new(4 * 4096).unwrap().watched_by(watches);
        (memory, seen)
    }

    fn touch(memory: &GuestMemory, vcpu: usize, range: Range, sense: Sense) {
        let actor = Actor::Vcpu(VcpuId::new(vcpu));
        let (ranges, rip) = ([range], Some(7));
        let touch = Touch {
            actor,
            rip,
            ranges: &ranges,
            sense,
        };
        memory.watches().perform(memory, touch, &mut || {
            if sense.write {
                memory
                    .compare_exchange_u64(range.lo & !7, 0, 0x0102)
                    .ok_or(())
                    .unwrap()
                    .unwrap();
            }
        });
    }

    #[test]
    fn an_access_is_reported_with_what_it_did() {
        let (memory, seen) = watched(watch(3, 0x1004, 0x1008, Sense::BOTH));
        touch(&memory, 1, Range::new(0x1000, 0x1008), Sense::WRITE);
        touch(&memory, 1, Range::new(0x1007, 0x1009), Sense::READ);
        let seen = seen.0.lock().unwrap();
        assert_eq!(seen.len(), 2);
        let event = &seen[0];
        assert_eq!(
            (&*event.watch, event.sequence, event.write),
            ("w3", 0, true)
        );
        assert_eq!(
            (event.rip, event.range),
            (Some(7), Range::new(0x1000, 0x1008))
        );
        assert_eq!(event.old.bytes(), [0; 8]);
        assert_eq!(event.new.bytes(), [2, 1, 0, 0, 0, 0, 0, 0]);
        assert!(!seen[1].write && seen[1].sequence == 1);
    }

    #[test]
    fn bytes_beside_other_accesses_and_other_vcpus_raise_nothing() {
        let (memory, seen) = watched(watch(0, 0x1008, 0x1009, Sense::WRITE));
        touch(&memory, 1, Range::new(0x1000, 0x1008), Sense::WRITE);
        touch(&memory, 1, Range::new(0x1008, 0x1009), Sense::READ);
        touch(&memory, 0, Range::new(0x1008, 0x1009), Sense::WRITE);
        assert!(seen.0.lock().unwrap().is_empty());
        memory.watches().remove(0);
        assert!(memory.watches().list().is_empty());
    }

    #[test]
    fn devices_and_the_debugger_are_reported_as_such() {
        let (memory, seen) = watched(watch(0, 0x1008, 0x100c, Sense::BOTH));
        let memory = Arc::new(memory);
        let trace = TraceSystem::new(2, Arc::clone(&memory) as _);
        let vcpus = VcpuSet::first(2);
        let range = Range::new(0x1008, 0x100c);
        trace
            .establish(None, vcpus, range, Kind::Watch, Sense::BOTH, 0, &mut |_| {})
            .unwrap();
        assert!(memory.write(&trace, Actor::Device, 0x1000, &[9; 200]));
        assert!(memory.read_sensed(&trace, Actor::Debugger, 0x1008, &mut [0; 1]));
        assert!(memory.write(&trace, Actor::Debugger, 0x100c, &[9; 9]));
        let seen = seen.0.lock().unwrap();
        let actors: Vec<Actor> = seen.iter().map(|e| e.actor).collect();
        assert_eq!(actors, [Actor::Device, Actor::Debugger]);
        assert_eq!(seen[0].new.bytes(), [9; MOST_BYTES]);
        assert_eq!(seen[0].rip, None);
    }
}
