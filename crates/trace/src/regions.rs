//! The traced regions of a machine: which bytes, of which kind, for which VCPUs.
//!
//! A look-up, an addition and a removal take time that grows with the logarithm of the number of
//! regions on the pages concerned and not at all with regions elsewhere; a region of many pages is
//! kept apart and takes part in every look-up, but logarithmically too.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use crate::intervals::Intervals;
use crate::kind::{Kind, Range, Semantics, Sense};
use crate::vcpu::{VcpuId, VcpuSet};

const PAGE_SHIFT: u32 = 12;
/// Regions of more pages than this are kept apart, not per page: most regions have fewer, but for
/// runs of shared pages.
const WIDE: u64 = 2;

/// Names a region. A name is not used again when its region is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TraceId(u64);

impl TraceId {
    const fn new(slot: u32, generation: u32) -> Self {
        Self((generation as u64) << 32 | slot as u64)
    }
    const fn slot(self) -> u32 {
        self.0 as u32
    }
}

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
    /// Its own, instead of those of its kind.
    pub semantics: Option<Semantics>,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    region: Option<Region>,
}

/// What lies on one page.
#[derive(Debug, Default)]
struct Page {
    /// Slots of the regions that touch the page, the wide ones excepted.
    regions: Intervals,
    /// How many of them sense reads, and writes.
    readers: u32,
    writers: u32,
}

impl Page {
    fn sense(&self) -> Sense {
        Sense {
            read: self.readers > 0,
            write: self.writers > 0,
        }
    }
}

/// All regions.
#[derive(Debug)]
pub struct Regions {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_page: HashMap<u64, Page>,
    wide: Intervals,
    /// State of the generator of the trees' priorities, which a guest must not foresee.
    random: u64,
    len: usize,
}

impl Default for Regions {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_page: HashMap::new(),
            wide: Intervals::default(),
            random: RandomState::new().hash_one(0) | 1,
            len: 0,
        }
    }
}

/// The numbers of the pages that a range touches.
pub fn pages(range: &Range) -> std::ops::RangeInclusive<u64> {
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
        if let Some(slot) = self.find(range, kind, sense, cookie)
            && let Some(region) = &mut self.slots[slot as usize].region
        {
            region.consumers = region.consumers.union(consumers);
            return region.id;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                region: None,
            });
            self.slots.len() as u32 - 1
        });
        let place = &mut self.slots[slot as usize];
        let id = TraceId::new(slot, place.generation);
        place.region = Some(Region {
            id,
            range,
            kind,
            sense,
            cookie,
            consumers,
            semantics: None,
        });
        self.len += 1;
        if is_wide(&range) {
            let priority = self.priority();
            self.wide.insert(range, slot, priority);
        } else {
            for number in pages(&range) {
                let priority = self.priority();
                let page = self.by_page.entry(number).or_default();
                page.regions.insert(range, slot, priority);
                page.readers += u32::from(sense.read);
                page.writers += u32::from(sense.write);
            }
        }
        id
    }

    /// The slot of the region with exactly this range, kind, sense and cookie.
    fn find(&self, range: Range, kind: Kind, sense: Sense, cookie: u64) -> Option<u32> {
        let regions = if is_wide(&range) {
            &self.wide
        } else {
            &self.by_page.get(pages(&range).start())?.regions
        };
        let mut found = None;
        regions.same(range, &mut |slot| {
            let place = self.slots.get(slot as usize);
            let region = place.and_then(|place| place.region.as_ref());
            if region.is_some_and(|r| (r.kind, r.sense, r.cookie) == (kind, sense, cookie)) {
                found = Some(slot);
            }
        });
        found
    }

    /// The next number of a xorshift generator.
    fn priority(&mut self) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 32) as u32
    }

    /// The region of this name.
    pub fn get(&self, id: TraceId) -> Option<&Region> {
        let region = self.slots.get(id.slot() as usize)?.region.as_ref()?;
        (region.id == id).then_some(region)
    }

    /// Takes a consumer from a region. Returns the region if that was its last one: it is gone.
    pub fn drop_consumer(&mut self, id: TraceId, vcpu: VcpuId) -> Option<Region> {
        let region = self.slots.get_mut(id.slot() as usize)?.region.as_mut()?;
        if region.id != id {
            return None;
        }
        region.consumers = region.consumers.without(vcpu);
        if !region.consumers.is_empty() {
            return None;
        }
        self.remove(id)
    }

    /// Gives a region semantics of its own.
    pub fn set_semantics(&mut self, id: TraceId, semantics: Semantics) {
        let place = self.slots.get_mut(id.slot() as usize);
        let region = place.and_then(|place| place.region.as_mut());
        if let Some(region) = region.filter(|region| region.id == id) {
            region.semantics = Some(semantics);
        }
    }

    /// Removes a region.
    pub fn remove(&mut self, id: TraceId) -> Option<Region> {
        self.get(id)?;
        let slot = id.slot();
        let place = &mut self.slots[slot as usize];
        let region = place.region.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(slot);
        self.len -= 1;
        if is_wide(&region.range) {
            self.wide.remove(region.range, slot);
            return Some(region);
        }
        for number in pages(&region.range) {
            let Some(page) = self.by_page.get_mut(&number) else {
                continue;
            };
            page.regions.remove(region.range, slot);
            page.readers -= u32::from(region.sense.read);
            page.writers -= u32::from(region.sense.write);
            if page.regions.is_empty() {
                self.by_page.remove(&number);
            }
        }
        Some(region)
    }

    /// Takes the bytes of `range` out of the regions of this kind and cookie. What is left of a
    /// region on either side stays one, with the same consumers, under a new name. Returns the
    /// regions as they were.
    pub fn exclude(&mut self, range: Range, kind: Kind, cookie: u64) -> Vec<Region> {
        let mut hit = Vec::new();
        self.hits(range, Sense::BOTH, &mut |region| {
            if region.kind == kind && region.cookie == cookie {
                hit.push(*region);
            }
        });
        for region in &hit {
            self.remove(region.id);
            let before = Range::new(region.range.lo, range.lo);
            let behind = Range::new(range.hi, region.range.hi);
            for rest in [before, behind].into_iter().filter(|rest| !rest.is_empty()) {
                let id = self.add(rest, kind, region.sense, cookie, region.consumers);
                if let Some(semantics) = region.semantics {
                    self.set_semantics(id, semantics);
                }
            }
        }
        hit
    }

    /// Calls `found` with every region that an access of kind `sense` to `range` hits, once each.
    pub fn hits(&self, range: Range, sense: Sense, found: &mut impl FnMut(&Region)) {
        if range.is_empty() {
            return;
        }
        let first = *pages(&range).start();
        for number in pages(&range) {
            let Some(page) = self.by_page.get(&number) else {
                continue;
            };
            if !page.sense().meets(sense) {
                continue;
            }
            page.regions.overlaps(range, &mut |slot| {
                if let Some(region) = self.slots.get(slot as usize).and_then(|s| s.region.as_ref())
                    // One that began on an earlier page of the access has been found there.
                    && (number == first || region.range.lo >> PAGE_SHIFT == number)
                    && region.sense.meets(sense)
                {
                    found(region);
                }
            });
        }
        self.wide.overlaps(range, &mut |slot| {
            if let Some(region) = self
                .slots
                .get(slot as usize)
                .and_then(|s| s.region.as_ref())
                && region.sense.meets(sense)
            {
                found(region);
            }
        });
    }

    /// What the regions on a page sense together.
    pub fn sense_of_page(&self, number: u64) -> Sense {
        let mut sense = self
            .by_page
            .get(&number)
            .map(Page::sense)
            .unwrap_or_default();
        let at = Range::new(number << PAGE_SHIFT, (number + 1) << PAGE_SHIFT);
        self.wide.overlaps(at, &mut |slot| {
            if let Some(region) = self
                .slots
                .get(slot as usize)
                .and_then(|s| s.region.as_ref())
            {
                sense = sense.union(region.sense);
            }
        });
        sense
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
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

    fn hits(regions: &Regions, lo: u64, hi: u64, sense: Sense) -> Vec<Region> {
        let mut hits = Vec::new();
        regions.hits(Range::new(lo, hi), sense, &mut |region| hits.push(*region));
        hits
    }

    fn consumers(regions: &Regions, lo: u64, hi: u64) -> VcpuSet {
        hits(regions, lo, hi, Sense::WRITE)
            .iter()
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
        let hits = hits(&regions, 0x800, 0x4000, Sense::WRITE);
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
        let hits = hits(&regions, 0x1000, 0x1001, Sense::READ);
        assert_eq!(hits.len(), 1);
    }

    #[test]
    fn a_part_is_taken_out() {
        let mut regions = Regions::default();
        let range = Range::new(0x1_0000, 0x5_0000);
        for cookie in [7, 8] {
            let id = regions.add(range, Kind::Share, Sense::WRITE, cookie, set(&[A, C]));
            regions.set_semantics(id, Semantics::PreWriteValue);
        }
        let part = Range::new(0x2_0000, 0x2_1000);
        let was = regions.exclude(part, Kind::Share, 7);
        assert_eq!(was.iter().map(|r| r.range).collect::<Vec<_>>(), [range]);
        let ranges = |regions: &Regions, lo, hi| -> Vec<_> {
            let hits = hits(regions, lo, hi, Sense::WRITE);
            hits.iter()
                .filter(|r| r.cookie == 7)
                .map(|r| (r.range.lo, r.range.hi, r.consumers, r.semantics))
                .collect()
        };
        let rest = (set(&[A, C]), Some(Semantics::PreWriteValue));
        assert_eq!(
            ranges(&regions, 0, 1 << 20),
            [
                (0x1_0000, 0x2_0000, rest.0, rest.1),
                (0x2_1000, 0x5_0000, rest.0, rest.1)
            ]
        );
        assert_eq!(ranges(&regions, 0x2_0000, 0x2_1000), []);
        // The other cookie's is whole.
        assert_eq!(regions.sense_of_page(0x20), Sense::WRITE);
        assert!(regions.exclude(part, Kind::Share, 7).is_empty());
        // From the edges inward; nothing remains.
        regions.exclude(Range::new(0, 0x1_1000), Kind::Share, 7);
        regions.exclude(Range::new(0x3_0000, 0x9_0000), Kind::Share, 7);
        assert_eq!(ranges(&regions, 0, 1 << 20).len(), 2);
        regions.exclude(range, Kind::Share, 7);
        assert_eq!(regions.len(), 1);
        regions.exclude(range, Kind::Share, 8);
        assert!(regions.is_empty());
        assert_eq!(regions.sense_of_page(0x20), Sense::default());
    }

    #[test]
    fn wide_regions_are_found_like_others() {
        let mut regions = Regions::default();
        let range = Range::new(1 << 30, 1 << 31);
        let id = regions.add(range, Kind::Device, Sense::BOTH, 7, set(&[A]));
        let hits = hits(&regions, (1 << 31) - 4, 1 << 31, Sense::READ);
        assert_eq!(hits.iter().map(|h| h.cookie).collect::<Vec<_>>(), [7]);
        assert!(regions.remove(id).is_some());
        assert_eq!(regions.sense_of_page(1 << 18), Sense::default());
    }
}
