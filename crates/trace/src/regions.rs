//! The traced regions of a machine: which bytes, of which kind, for which VCPUs.

use std::collections::HashMap;

use crate::kind::{Kind, Range, Sense};
use crate::vcpu::{VcpuId, VcpuSet};

const PAGE_SHIFT: u32 = 12;
/// Regions of more pages than this are kept apart, not per page.
const WIDE: u64 = 64;

/// Names a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TraceId(u64);

/// A traced region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub id: TraceId,
    pub range: Range,
    pub kind: Kind,
    pub sense: Sense,
    /// What its owner wants to know it by; for kind `device`, which device.
    pub cookie: u64,
    pub consumers: VcpuSet,
}

type Key = (Range, Kind, Sense, u64);

/// All regions. Look-ups touch only the regions of the pages asked for, and the wide ones.
#[derive(Debug, Default)]
pub struct Regions {
    next: u64,
    by_id: HashMap<TraceId, Region>,
    by_key: HashMap<Key, TraceId>,
    by_page: HashMap<u64, Vec<TraceId>>,
    wide: Vec<TraceId>,
}

fn pages(range: &Range) -> std::ops::RangeInclusive<u64> {
    range.lo >> PAGE_SHIFT..=(range.hi - 1) >> PAGE_SHIFT
}

fn is_wide(range: &Range) -> bool {
    (range.hi - range.lo) >> PAGE_SHIFT > WIDE
}

impl Regions {
    /// Adds consumers to the region with exactly this range, kind, sense and cookie, which is made
    /// if there is none. `range` must not be empty.
    pub fn add(
        &mut self,
        range: Range,
        kind: Kind,
        sense: Sense,
        cookie: u64,
        consumers: VcpuSet,
    ) -> TraceId {
        let key = (range, kind, sense, cookie);
        if let Some(id) = self.by_key.get(&key) {
            if let Some(region) = self.by_id.get_mut(id) {
                region.consumers = region.consumers.union(consumers);
            }
            return *id;
        }
        let id = TraceId(self.next);
        self.next += 1;
        self.by_key.insert(key, id);
        self.by_id.insert(
            id,
            Region {
                id,
                range,
                kind,
                sense,
                cookie,
                consumers,
            },
        );
        if is_wide(&range) {
            self.wide.push(id);
        } else {
            for page in pages(&range) {
                self.by_page.entry(page).or_default().push(id);
            }
        }
        id
    }

    /// Takes a consumer from a region. Returns the region if that was its last one: it is gone.
    pub fn drop_consumer(&mut self, id: TraceId, vcpu: VcpuId) -> Option<Region> {
        let region = self.by_id.get_mut(&id)?;
        region.consumers = region.consumers.without(vcpu);
        if !region.consumers.is_empty() {
            return None;
        }
        self.remove(id)
    }

    /// Removes a region.
    pub fn remove(&mut self, id: TraceId) -> Option<Region> {
        let region = self.by_id.remove(&id)?;
        self.by_key
            .remove(&(region.range, region.kind, region.sense, region.cookie));
        if is_wide(&region.range) {
            self.wide.retain(|w| *w != id);
        } else {
            for page in pages(&region.range) {
                if let Some(ids) = self.by_page.get_mut(&page) {
                    ids.retain(|i| *i != id);
                    if ids.is_empty() {
                        self.by_page.remove(&page);
                    }
                }
            }
        }
        Some(region)
    }

    /// The regions that an access of kind `sense` to `range` hits, each once.
    pub fn hits(&self, range: Range, sense: Sense, out: &mut Vec<Region>) {
        if range.is_empty() {
            return;
        }
        let first = *pages(&range).start();
        for page in pages(&range) {
            for id in self.by_page.get(&page).into_iter().flatten() {
                let Some(region) = self.by_id.get(id) else {
                    continue;
                };
                // A region that began on an earlier page of the access has been seen there.
                let seen = page != first && region.range.lo >> PAGE_SHIFT < page;
                if !seen && region.range.overlaps(&range) && region.sense.meets(sense) {
                    out.push(*region);
                }
            }
        }
        for id in &self.wide {
            if let Some(region) = self.by_id.get(id)
                && region.range.overlaps(&range)
                && region.sense.meets(sense)
            {
                out.push(*region);
            }
        }
    }

    /// What the regions on a page sense together.
    pub fn sense_of_page(&self, page: u64) -> Sense {
        let at = Range::new(page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT);
        let own = self.by_page.get(&page).into_iter().flatten();
        own.chain(&self.wide)
            .filter_map(|id| self.by_id.get(id))
            .filter(|region| region.range.overlaps(&at))
            .fold(Sense::default(), |sum, region| sum.union(region.sense))
    }

    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: VcpuId = VcpuId::new(0);
    const B: VcpuId = VcpuId::new(1);
    const C: VcpuId = VcpuId::new(2);

    fn set(vcpus: &[VcpuId]) -> VcpuSet {
        vcpus.iter().copied().collect()
    }

    fn consumers(regions: &Regions, lo: u64, hi: u64) -> VcpuSet {
        let mut hits = Vec::new();
        regions.hits(Range::new(lo, hi), Sense::WRITE, &mut hits);
        hits.iter()
            .fold(VcpuSet::EMPTY, |sum, hit| sum.union(hit.consumers))
    }

    #[test]
    fn figure_3() {
        let mut regions = Regions::default();
        let (m1, m2, m3, m4) = (0x1000, 0x1800, 0x9000, 0xb010);
        regions.add(
            Range::new(m1, m2),
            Kind::Descriptor,
            Sense::WRITE,
            0,
            set(&[A]),
        );
        regions.add(
            Range::new(m1, m2),
            Kind::Descriptor,
            Sense::WRITE,
            0,
            set(&[C]),
        );
        regions.add(Range::new(m3, m4), Kind::Code, Sense::WRITE, 0, set(&[B]));
        assert_eq!(regions.len(), 2);
        assert_eq!(consumers(&regions, m1, m1 + 8), set(&[A, C]));
        assert_eq!(consumers(&regions, m2 - 1, m2), set(&[A, C]));
        assert_eq!(consumers(&regions, m2, m3), VcpuSet::EMPTY);
        assert_eq!(consumers(&regions, m4 - 1, m4), set(&[B]));
        assert_eq!(consumers(&regions, m1, m4), set(&[A, B, C]));
    }

    #[test]
    fn figure_4() {
        let mut regions = Regions::default();
        let m = [0, 0x100, 0x200, 0x300, 0x400, 0x500, 0x600];
        regions.add(
            Range::new(m[1], m[3]),
            Kind::Descriptor,
            Sense::WRITE,
            0,
            set(&[A]),
        );
        regions.add(
            Range::new(m[2], m[4]),
            Kind::Code,
            Sense::WRITE,
            0,
            set(&[B]),
        );
        regions.add(
            Range::new(m[5], m[6]),
            Kind::Code,
            Sense::WRITE,
            0,
            set(&[C]),
        );
        assert_eq!(consumers(&regions, m[1], m[2]), set(&[A]));
        assert_eq!(consumers(&regions, m[2], m[3]), set(&[A, B]));
        assert_eq!(consumers(&regions, m[3], m[4]), set(&[B]));
        assert_eq!(consumers(&regions, m[4], m[5]), VcpuSet::EMPTY);
        assert_eq!(consumers(&regions, m[5], m[6]), set(&[C]));
    }

    #[test]
    fn a_region_over_several_pages_is_hit_once() {
        let mut regions = Regions::default();
        regions.add(
            Range::new(0xff0, 0x3010),
            Kind::Code,
            Sense::WRITE,
            0,
            set(&[A]),
        );
        let mut hits = Vec::new();
        regions.hits(Range::new(0x800, 0x4000), Sense::WRITE, &mut hits);
        assert_eq!(hits.len(), 1);
    }

    #[test]
    fn the_last_consumer_takes_the_region_along() {
        let mut regions = Regions::default();
        let range = Range::new(0x1000, 0x1010);
        let id = regions.add(range, Kind::Code, Sense::WRITE, 0, set(&[A, B]));
        assert!(regions.drop_consumer(id, A).is_none());
        assert_eq!(regions.sense_of_page(1), Sense::WRITE);
        assert_eq!(regions.drop_consumer(id, B).map(|r| r.range), Some(range));
        assert_eq!(regions.sense_of_page(1), Sense::default());
        assert!(regions.is_empty());
    }

    #[test]
    fn reads_and_writes_are_told_apart() {
        let mut regions = Regions::default();
        regions.add(
            Range::new(0x1000, 0x1010),
            Kind::Watch,
            Sense::READ,
            0,
            set(&[A]),
        );
        assert_eq!(consumers(&regions, 0x1000, 0x1001), VcpuSet::EMPTY);
        let mut hits = Vec::new();
        regions.hits(Range::new(0x1000, 0x1001), Sense::READ, &mut hits);
        assert_eq!(hits.len(), 1);
    }

    #[test]
    fn wide_regions_are_found_like_others() {
        let mut regions = Regions::default();
        let range = Range::new(1 << 30, 1 << 31);
        let id = regions.add(range, Kind::Device, Sense::BOTH, 7, set(&[A]));
        let mut hits = Vec::new();
        regions.hits(Range::new((1 << 31) - 4, 1 << 31), Sense::READ, &mut hits);
        assert_eq!(hits.iter().map(|h| h.cookie).collect::<Vec<_>>(), [7]);
        assert!(regions.remove(id).is_some());
        assert_eq!(regions.sense_of_page(1 << 18), Sense::default());
    }
}
