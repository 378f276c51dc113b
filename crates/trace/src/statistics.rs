//! What the trace subsystem counts.
//!
//! # Orderings
//! The counters order nothing: relaxed. Only the lane's owner counts, so it counts by loading and
//! storing; events of kind `device` are counted by anyone, with atomic additions, in a counter of
//! their own.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::histogram::Histogram;
use crate::kind::{Kind, Semantics};
use crate::vcpu::VcpuId;

/// A counter that only the lane's owner increments.
#[derive(Debug, Default)]
struct Count(AtomicU64);

impl Count {
    fn add(&self, count: u64) {
        self.0.store(self.0.load(Relaxed) + count, Relaxed);
    }
    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

#[derive(Debug, Default)]
struct Cell {
    events: Count,
    notifications: Count,
    acknowledgements: Count,
    waits: Histogram,
}

/// The roles that one VCPU played. On cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Roles {
    actor: Count,
    consumer: Count,
}

/// The live counters.
#[derive(Debug)]
pub struct Counters {
    /// By kind and semantics.
    cells: Vec<Cell>,
    /// Events of kind `device`, by semantics.
    device: Vec<AtomicU64>,
    /// Events of all other kinds.
    memory_events: Count,
    roles: Vec<Roles>,
    beside: Count,
}

/// Totals of one kind under one semantics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KindTotals {
    pub kind: Kind,
    pub semantics: Semantics,
    pub events: u64,
    pub notifications: u64,
    /// Of other VCPUs than the actor, those that were at an instruction boundary anyway included.
    pub acknowledgements: u64,
    /// Waits of actors for the acknowledgement of VCPUs that were executing.
    pub waits: u64,
    /// The median wait, the 99th percentile and the longest, in nanoseconds. The percentiles are
    /// at most an eighth too long.
    pub wait_p50_ns: u64,
    pub wait_p99_ns: u64,
    pub wait_max_ns: u64,
}

/// The roles that one VCPU played, in events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoleTotals {
    /// Accesses that hit at least one region.
    pub actor: u64,
    pub consumer: u64,
    pub bystander: u64,
}

/// A snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Only those with events.
    pub kinds: Vec<KindTotals>,
    /// Per VCPU.
    pub roles: Vec<RoleTotals>,
    /// Sensed accesses that hit no region: bytes beside a trace on its page.
    pub beside: u64,
}

impl Counters {
    pub fn new(vcpus: usize) -> Self {
        Self {
            cells: (0..Kind::ALL.len() * Semantics::ALL.len())
                .map(|_| Cell::default())
                .collect(),
            device: Semantics::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
            memory_events: Count::default(),
            roles: (0..vcpus).map(|_| Roles::default()).collect(),
            beside: Count::default(),
        }
    }

    fn cell(&self, kind: Kind, semantics: Semantics) -> &Cell {
        &self.cells[kind as usize * Semantics::ALL.len() + semantics as usize]
    }

    /// Counts an access to device registers: how many there were before. From any thread; all
    /// others need the lane.
    pub fn device_event(&self, semantics: Semantics) -> u64 {
        self.device[semantics as usize].fetch_add(1, Relaxed)
    }

    pub fn event(&self, kind: Kind, semantics: Semantics) {
        self.cell(kind, semantics).events.add(1);
        self.memory_events.add(1);
    }

    pub fn beside(&self) {
        self.beside.add(1);
    }

    pub fn notified(&self, kind: Kind, semantics: Semantics, vcpu: VcpuId) {
        self.cell(kind, semantics).notifications.add(1);
        if let Some(roles) = self.roles.get(vcpu.index()) {
            roles.consumer.add(1);
        }
    }

    pub fn acknowledged(&self, kind: Kind, semantics: Semantics, count: u64) {
        self.cell(kind, semantics).acknowledgements.add(count);
    }

    pub fn acted(&self, vcpu: VcpuId) {
        if let Some(roles) = self.roles.get(vcpu.index()) {
            roles.actor.add(1);
        }
    }

    pub fn waited(&self, kind: Kind, semantics: Semantics, nanoseconds: u64) {
        self.cell(kind, semantics).waits.count(nanoseconds);
    }

    pub fn totals(&self) -> Totals {
        let mut kinds = Vec::new();
        for kind in Kind::ALL {
            for semantics in Semantics::ALL {
                let cell = self.cell(kind, semantics);
                let events = match kind {
                    Kind::Device => self.device[semantics as usize].load(Relaxed),
                    _ => cell.events.get(),
                };
                if events == 0 {
                    continue;
                }
                kinds.push(KindTotals {
                    kind,
                    semantics,
                    events,
                    notifications: cell.notifications.get(),
                    acknowledgements: cell.acknowledgements.get(),
                    waits: cell.waits.total(),
                    wait_p50_ns: cell.waits.percentile(50),
                    wait_p99_ns: cell.waits.percentile(99),
                    wait_max_ns: cell.waits.longest(),
                });
            }
        }
        let events = self.memory_events.get();
        let roles = self
            .roles
            .iter()
            .map(|roles| {
                let consumer = roles.consumer.get();
                RoleTotals {
                    actor: roles.actor.get(),
                    consumer,
                    bystander: events.saturating_sub(consumer),
                }
            })
            .collect();
        Totals {
            kinds,
            roles,
            beside: self.beside.get(),
        }
    }
}
