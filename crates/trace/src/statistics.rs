//! What the trace subsystem counts. All counters are relaxed: they order nothing.

use crate::kind::{Kind, Semantics};
use crate::sync::{AtomicU64, Ordering::Relaxed};
use crate::vcpu::{MAX_VCPUS, VcpuId};

/// Buckets of the waits' histogram: bucket `n` counts waits of up to 2^n ns.
pub const BUCKETS: usize = 40;

#[derive(Debug)]
struct Waits {
    buckets: [AtomicU64; BUCKETS],
    longest: AtomicU64,
}

#[derive(Debug)]
struct Cell {
    events: AtomicU64,
    notifications: AtomicU64,
    acknowledgements: AtomicU64,
    waits: Waits,
}

fn zero() -> AtomicU64 {
    AtomicU64::new(0)
}

impl Cell {
    fn new() -> Self {
        let waits = Waits {
            buckets: std::array::from_fn(|_| zero()),
            longest: zero(),
        };
        Self {
            events: zero(),
            notifications: zero(),
            acknowledgements: zero(),
            waits,
        }
    }
}

/// The live counters.
#[derive(Debug)]
pub struct Counters {
    cells: Vec<Cell>,
    /// Events of memory kinds (all but `device`).
    memory_events: AtomicU64,
    actor: Vec<AtomicU64>,
    consumer: Vec<AtomicU64>,
    neither: AtomicU64,
}

/// Totals of one kind under one semantics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KindTotals {
    pub kind: Kind,
    pub semantics: Semantics,
    pub events: u64,
    pub notifications: u64,
    pub acknowledgements: u64,
    /// Waits of actors for acknowledgements.
    pub waits: u64,
    /// Upper bounds, in nanoseconds, of the median and the 99th percentile (powers of two).
    pub wait_p50_ns: u64,
    pub wait_p99_ns: u64,
    pub wait_max_ns: u64,
}

/// The roles that one VCPU played, in events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoleTotals {
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

impl Default for Counters {
    fn default() -> Self {
        Self {
            cells: (0..Kind::ALL.len() * Semantics::ALL.len())
                .map(|_| Cell::new())
                .collect(),
            memory_events: zero(),
            actor: (0..MAX_VCPUS).map(|_| zero()).collect(),
            consumer: (0..MAX_VCPUS).map(|_| zero()).collect(),
            neither: zero(),
        }
    }
}

impl Counters {
    fn cell(&self, kind: Kind, semantics: Semantics) -> &Cell {
        &self.cells[kind as usize * Semantics::ALL.len() + semantics as usize]
    }

    pub fn event(&self, kind: Kind, semantics: Semantics) {
        self.cell(kind, semantics).events.fetch_add(1, Relaxed);
        if kind != Kind::Device {
            self.memory_events.fetch_add(1, Relaxed);
        }
    }

    pub fn beside(&self) {
        self.neither.fetch_add(1, Relaxed);
    }

    pub fn notified(&self, kind: Kind, semantics: Semantics, vcpu: VcpuId) {
        self.cell(kind, semantics)
            .notifications
            .fetch_add(1, Relaxed);
        self.consumer[vcpu.index()].fetch_add(1, Relaxed);
    }

    pub fn acknowledged(&self, kind: Kind, semantics: Semantics, count: u64) {
        self.cell(kind, semantics)
            .acknowledgements
            .fetch_add(count, Relaxed);
    }

    pub fn acted(&self, vcpu: VcpuId) {
        self.actor[vcpu.index()].fetch_add(1, Relaxed);
    }

    pub fn waited(&self, kind: Kind, semantics: Semantics, nanoseconds: u64) {
        let waits = &self.cell(kind, semantics).waits;
        let bucket = (64 - nanoseconds.leading_zeros() as usize).min(BUCKETS - 1);
        waits.buckets[bucket].fetch_add(1, Relaxed);
        waits.longest.fetch_max(nanoseconds, Relaxed);
    }

    pub fn totals(&self, vcpus: usize) -> Totals {
        let mut totals = Totals {
            beside: self.neither.load(Relaxed),
            ..Totals::default()
        };
        for kind in Kind::ALL {
            for semantics in Semantics::ALL {
                let cell = self.cell(kind, semantics);
                let events = cell.events.load(Relaxed);
                if events == 0 {
                    continue;
                }
                let buckets: Vec<u64> =
                    cell.waits.buckets.iter().map(|b| b.load(Relaxed)).collect();
                totals.kinds.push(KindTotals {
                    kind,
                    semantics,
                    events,
                    notifications: cell.notifications.load(Relaxed),
                    acknowledgements: cell.acknowledgements.load(Relaxed),
                    waits: buckets.iter().sum(),
                    wait_p50_ns: percentile(&buckets, 50),
                    wait_p99_ns: percentile(&buckets, 99),
                    wait_max_ns: cell.waits.longest.load(Relaxed),
                });
            }
        }
        let events = self.memory_events.load(Relaxed);
        totals.roles = (0..vcpus.min(MAX_VCPUS))
            .map(|n| {
                let consumer = self.consumer[n].load(Relaxed);
                RoleTotals {
                    actor: self.actor[n].load(Relaxed),
                    consumer,
                    bystander: events.saturating_sub(consumer),
                }
            })
            .collect();
        totals
    }
}

/// The upper bound of the bucket that holds the given percentile.
fn percentile(buckets: &[u64], percent: u64) -> u64 {
    let total: u64 = buckets.iter().sum();
    let mut seen = 0;
    for (n, count) in buckets.iter().enumerate() {
        seen += count;
        if total > 0 && seen * 100 >= total * percent {
            return 1 << n;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_bucket_bounds() {
        let mut buckets = [0; BUCKETS];
        assert_eq!(percentile(&buckets, 50), 0);
        buckets[3] = 98;
        buckets[9] = 2;
        assert_eq!(percentile(&buckets, 50), 8);
        assert_eq!(percentile(&buckets, 99), 512);
    }
}
