//! Who played which role where (\[0068\] to \[0072\], figure 4 of the seed): traced memory is cut
//! where regions begin and end, and each piece has, for every VCPU, how often it was actor, consumer
//! and bystander of an access there.

use std::collections::HashMap;

use trapline_trace::{Kind, Range, VcpuSet};

use super::events_file::{Category, Event, Events, Track};

/// The roles that one VCPU played.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    pub actor: u64,
    pub consumer: u64,
    pub bystander: u64,
}

/// A piece of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub range: Range,
    /// The kinds of the traces that were hit, without repetition.
    pub kinds: Vec<Kind>,
    pub accesses: u64,
    /// Per VCPU.
    pub roles: Vec<Roles>,
}

/// An access with all the regions that it hit. The actor's track tells who it was.
pub struct Access<'a> {
    pub track: Track,
    pub hits: Vec<&'a Event>,
    pub consumers: VcpuSet,
}

/// The accesses of a file, those to device registers left out.
pub fn accesses(events: &Events) -> Vec<Access<'_>> {
    let mut accesses: Vec<Access<'_>> = Vec::new();
    // The events of one access have the same span on the same track.
    let mut open: HashMap<Track, usize> = HashMap::new();
    for event in events.of(Category::Actor) {
        if event.kind == Some(Kind::Device) {
            continue;
        }
        let same = open.get(&event.track).copied().filter(|&n| {
            let first = accesses[n].hits[0];
            (first.start, first.length) == (event.start, event.length)
        });
        match same {
            Some(n) => {
                let access = &mut accesses[n];
                access.hits.push(event);
                access.consumers = access.consumers.union(event.consumers);
            }
            None => {
                open.insert(event.track, accesses.len());
                accesses.push(Access {
                    track: event.track,
                    hits: vec![event],
                    consumers: event.consumers,
                });
            }
        }
    }
    accesses
}

/// Where regions begin and end, ascending.
fn cuts(events: &Events) -> Vec<u64> {
    let mut cuts: Vec<u64> = events
        .events
        .iter()
        .filter(|e| matches!(e.category, Category::Actor | Category::Establish))
        .filter(|e| e.kind != Some(Kind::Device))
        .filter_map(|e| e.region)
        .flat_map(|region| [region.lo, region.hi])
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}

/// The piece, or pieces, of memory around what an access touched within its regions.
fn piece(access: &Access<'_>, cuts: &[u64]) -> Option<Range> {
    let touched = access.hits.iter().filter_map(|hit| {
        let (region, range) = (hit.region?, hit.range?);
        Some((region.lo.max(range.lo), region.hi.min(range.hi)))
    });
    let (lo, hi) = touched.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))?;
    let before = cuts.partition_point(|cut| *cut <= lo).checked_sub(1)?;
    let after = cuts.partition_point(|cut| *cut < hi);
    Some(Range::new(*cuts.get(before)?, *cuts.get(after)?))
}

/// The table, by address.
pub fn table(events: &Events) -> Vec<Row> {
    let cuts = cuts(events);
    let mut rows: HashMap<Range, Row> = HashMap::new();
    for access in accesses(events) {
        let Some(range) = piece(&access, &cuts) else {
            continue;
        };
        let row = rows.entry(range).or_insert_with(|| Row {
            range,
            kinds: Vec::new(),
            accesses: 0,
            roles: vec![Roles::default(); events.vcpus.into()],
        });
        row.accesses += 1;
        for hit in &access.hits {
            if let Some(kind) = hit.kind
                && !row.kinds.contains(&kind)
            {
                row.kinds.push(kind);
            }
        }
        for (n, roles) in row.roles.iter_mut().enumerate() {
            roles.actor += u64::from(usize::from(access.track) == n);
            let consumer = access.consumers.bits() >> n & 1;
            roles.consumer += consumer;
            roles.bystander += 1 - consumer;
        }
    }
    let mut rows: Vec<Row> = rows.into_values().collect();
    rows.sort_by_key(|row| row.range);
    rows
}

/// The `top` rows with the most accesses, by address, and how many others there are.
pub fn busiest(mut rows: Vec<Row>, top: usize) -> (Vec<Row>, usize) {
    rows.sort_by_key(|row| (std::cmp::Reverse(row.accesses), row.range));
    let others = rows.len().saturating_sub(top);
    rows.truncate(top);
    rows.sort_by_key(|row| row.range);
    (rows, others)
}

#[cfg(test)]
mod tests {
    use super::super::events_file::tests::{acted, file};
    use super::*;

    const M: [u64; 7] = [0, 0x100, 0x200, 0x300, 0x400, 0x500, 0x600];

    /// The figure's regions, hit by VCPU 3.
    fn hits(at: f64, lo: u64, hi: u64) -> Vec<String> {
        let regions = [(M[1], M[3], 0), (M[2], M[4], 1), (M[5], M[6], 2)];
        regions
            .iter()
            .filter(|(from, to, _)| lo < *to && *from < hi)
            .map(|(from, to, vcpu)| acted(3, at, (*from, *to), (lo, hi), &[*vcpu]))
            .collect()
    }

    fn roles(actor: u64, consumer: u64, bystander: u64) -> Roles {
        Roles {
            actor,
            consumer,
            bystander,
        }
    }

    #[test]
    fn figure_4() {
        let events = [
            hits(1.0, M[1], M[1] + 8),
            hits(10.0, M[2], M[2] + 8),
            hits(20.0, M[3] - 8, M[3]),
            hits(30.0, M[3], M[4]),
            hits(40.0, M[4], M[5]),
            hits(50.0, M[5], M[5] + 1),
        ]
        .concat()
        .join(",");
        let rows = table(&file(4, &events).unwrap());
        let (consumer, bystander) = (|n| roles(0, n, 0), |n| roles(0, 0, n));
        let expected = [
            ((M[1], M[2]), 1, [consumer(1), bystander(1), bystander(1)]),
            ((M[2], M[3]), 2, [consumer(2), consumer(2), bystander(2)]),
            ((M[3], M[4]), 1, [bystander(1), consumer(1), bystander(1)]),
            ((M[5], M[6]), 1, [bystander(1), bystander(1), consumer(1)]),
        ];
        assert_eq!(rows.len(), expected.len(), "{rows:#x?}");
        for (row, ((lo, hi), accesses, others)) in rows.iter().zip(expected) {
            assert_eq!(row.range, Range::new(lo, hi));
            assert_eq!(row.accesses, accesses);
            assert_eq!(row.roles[..3], others, "{row:#x?}");
            assert_eq!(row.roles[3], roles(accesses, 0, accesses));
        }
    }

    #[test]
    fn an_actor_can_be_its_own_consumer() {
        let event = acted(0, 1.0, (0x1000, 0x1010), (0xff8, 0x1004), &[0, 1]);
        let rows = table(&file(3, &event).unwrap());
        assert_eq!(rows[0].range, Range::new(0x1000, 0x1010));
        assert_eq!(
            rows[0].roles,
            [roles(1, 1, 0), roles(0, 1, 0), roles(0, 0, 1)]
        );
    }

    #[test]
    fn the_busiest_rows_are_kept_in_order() {
        let events = [
            acted(0, 1.0, (0x1000, 0x1010), (0x1000, 0x1001), &[1]),
            acted(0, 5.0, (0x2000, 0x2010), (0x2000, 0x2001), &[1]),
            acted(0, 9.0, (0x2000, 0x2010), (0x2000, 0x2001), &[1]),
            acted(0, 13.0, (0x500, 0x510), (0x500, 0x501), &[1]),
        ];
        let rows = table(&file(2, &events.join(",")).unwrap());
        let (kept, others) = busiest(rows, 2);
        let starts: Vec<_> = kept.iter().map(|row| row.range.lo).collect();
        assert_eq!((starts, others), (vec![0x500, 0x2000], 1));
    }
}
