//! What a file's events sum up to: busiest regions, totals by kind, distributions of waits.

use std::collections::HashMap;

use trapline_trace::{Kind, Range, Semantics};

use super::events_file::{Category, Events};
use super::roles;

/// A region and what happened there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionTotals {
    pub reads: u64,
    pub writes: u64,
    pub notifications: u64,
    pub longest_wait: u64,
}

/// The regions that were hit, busiest first.
pub fn regions(events: &Events) -> Vec<(Range, Kind, RegionTotals)> {
    let mut totals: HashMap<(Range, u8), (Kind, RegionTotals)> = HashMap::new();
    for event in events.of(Category::Actor) {
        let (Some(region), Some(kind)) = (event.region, event.kind) else {
            continue;
        };
        let (_, total) = totals
            .entry((region, kind as u8))
            .or_insert_with(|| (kind, RegionTotals::default()));
        total.reads += u64::from(event.read);
        total.writes += u64::from(!event.read);
        total.notifications += event.consumers.len() as u64;
        total.longest_wait = total.longest_wait.max(event.waited);
    }
    let mut regions: Vec<_> = totals
        .into_iter()
        .map(|((region, _), (kind, total))| (region, kind, total))
        .collect();
    regions.sort_by_key(|(region, _, t)| (std::cmp::Reverse(t.reads + t.writes), *region));
    regions
}

/// Totals of one kind under one semantics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KindTotals {
    pub kind: Kind,
    pub semantics: Semantics,
    pub events: u64,
    pub notifications: u64,
    pub awaited: u64,
    pub invalidated: u64,
}

/// Totals by kind and semantics, for those with events.
pub fn kinds(events: &Events) -> Vec<KindTotals> {
    let mut all = Vec::new();
    for kind in Kind::ALL {
        for semantics in Semantics::ALL {
            let mut total = KindTotals {
                kind,
                semantics,
                events: 0,
                notifications: 0,
                awaited: 0,
                invalidated: 0,
            };
            let of = |e: &&super::events_file::Event| {
                e.kind == Some(kind) && e.semantics == Some(semantics)
            };
            for event in events.events.iter().filter(of) {
                match event.category {
                    Category::Actor => {
                        total.events += 1;
                        total.notifications += event.consumers.len() as u64;
                        total.awaited += event.awaited.len() as u64;
                    }
                    Category::Invalidation => total.invalidated += event.count,
                    _ => {}
                }
            }
            if total.events > 0 || total.invalidated > 0 {
                all.push(total);
            }
        }
    }
    all
}

/// A distribution of lengths of time, in nanoseconds.
pub struct Waits {
    pub what: &'static str,
    /// Ascending.
    pub lengths: Vec<u64>,
}

/// Bars of a histogram: each bound is twice the one before.
pub struct Bar {
    /// Lengths from half of this, up to and without this.
    pub below: u64,
    pub count: u64,
}

impl Waits {
    fn new(what: &'static str, lengths: impl Iterator<Item = u64>) -> Self {
        let mut lengths: Vec<u64> = lengths.collect();
        lengths.sort_unstable();
        Self { what, lengths }
    }

    /// The least length that at least `percent` of all do not exceed; 0 of none.
    pub fn percentile(&self, percent: u64) -> u64 {
        let count = self.lengths.len() as u64;
        let rank = (count * percent).div_ceil(100).max(1);
        self.lengths.get(rank as usize - 1).copied().unwrap_or(0)
    }

    pub fn max(&self) -> u64 {
        self.lengths.last().copied().unwrap_or(0)
    }

    /// Bars from the first to the last that is not empty.
    pub fn bars(&self) -> Vec<Bar> {
        let bound = |length: u64| length.saturating_add(1).checked_next_power_of_two();
        let mut bars: Vec<Bar> = Vec::new();
        for length in &self.lengths {
            let Some(below) = bound(*length) else {
                continue;
            };
            while bars.last().is_some_and(|bar| bar.below < below) {
                let next = bars.last().map_or(below, |bar| bar.below * 2);
                bars.push(Bar {
                    below: next,
                    count: 0,
                });
            }
            match bars.last_mut() {
                Some(bar) => bar.count += 1,
                None => bars.push(Bar { below, count: 1 }),
            }
        }
        bars
    }
}

/// The waits that there were, of each sort.
pub fn waits(events: &Events) -> Vec<Waits> {
    let actors = roles::accesses(events);
    // Only where someone other than the actor had to acknowledge is there anything to wait for.
    let acknowledged = actors.iter().filter_map(|access| {
        let waited = access.hits.iter().map(|hit| hit.waited).max()?;
        (waited > 0).then_some(waited)
    });
    let lengths = |category| events.of(category).map(|e| e.length);
    [
        Waits::new("Actors, for acknowledgements", acknowledged),
        Waits::new("Consumers, held by an actor", lengths(Category::Stall)),
        Waits::new("Actors, for another actor", lengths(Category::Queue)),
    ]
    .into_iter()
    .filter(|waits| !waits.lengths.is_empty())
    .collect()
}

#[cfg(test)]
mod tests {
    use super::super::events_file::tests::{acted, file};
    use super::*;

    #[test]
    fn percentiles_are_lengths_that_occurred() {
        let waits = Waits::new("", (1..=200).rev());
        let of = |percent| waits.percentile(percent);
        assert_eq!((of(50), of(90), of(99), waits.max()), (100, 180, 198, 200));
        assert_eq!(Waits::new("", [7].into_iter()).percentile(99), 7);
        assert_eq!(Waits::new("", [].into_iter()).percentile(50), 0);
    }

    #[test]
    fn bars_have_no_gaps() {
        let waits = Waits::new("", [3, 4, 5, 40, u64::MAX].into_iter());
        let bars: Vec<_> = waits.bars().iter().map(|b| (b.below, b.count)).collect();
        assert_eq!(bars, [(4, 1), (8, 2), (16, 0), (32, 0), (64, 1)]);
    }

    #[test]
    fn one_wait_for_an_access_that_hits_two_regions() {
        let events = [
            acted(0, 1.0, (0x1000, 0x1010), (0x1000, 0x1008), &[1]),
            acted(0, 1.0, (0x1004, 0x1010), (0x1000, 0x1008), &[2]),
        ];
        let events = file(3, &events.join(",")).unwrap();
        let waits = waits(&events);
        assert_eq!(waits.len(), 1);
        assert_eq!(waits[0].lengths, [1250]);
        let total = &kinds(&events)[0];
        assert_eq!((total.events, total.notifications), (2, 2));
        let regions = regions(&events);
        assert_eq!(regions.len(), 2);
        assert_eq!((regions[0].2.writes, regions[0].2.notifications), (1, 1));
    }
}
