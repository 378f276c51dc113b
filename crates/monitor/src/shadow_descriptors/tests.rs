use std::sync::Arc;

use trapline_trace::{AlwaysSensed, Sense, TraceSystem, VcpuId, VcpuSet};

use super::*;

const LINEAR: u64 = 0xffff_8000_0000_1000;
const GPA: u64 = 0x3000;

struct Rig {
    trace: TraceSystem,
    tlb: Tlb,
    shadows: ShadowDescriptors,
}

impl Rig {
    fn new() -> Self {
        let mut rig = Self {
            trace: TraceSystem::new(1, Arc::new(AlwaysSensed)),
            tlb: Tlb::default(),
            shadows: ShadowDescriptors::new(Witness::none()),
        };
        rig.map(GPA);
        rig
    }

    /// Lets the page of `LINEAR` lead to `gpa`.
    fn map(&mut self, gpa: u64) {
        let (privilege, access) = (Privilege::Supervisor, Access::Read);
        let host = 0x10_0000 as *mut u8;
        self.tlb
            .insert(LINEAR, privilege, access, gpa, host, false, 4096);
    }

    /// Derives what stands at `offset` of the page and looks it up once.
    fn derive(&mut self, offset: u64, item: SystemItem, low: u64) -> Decoded {
        let vcpu = VcpuId::new(0);
        let gpa = GPA + offset;
        let range = Range::new(gpa, gpa + item.bytes() as u64);
        let trace = self
            .trace
            .establish(
                Some(vcpu),
                VcpuSet::one(vcpu),
                range,
                Kind::Descriptor,
                Sense::WRITE,
                0,
                &mut |_| {},
            )
            .unwrap();
        let decoded = item.decode(low, 0);
        self.shadows.insert(gpa, item, trace, decoded);
        let known = self.shadows.look_up(&self.tlb, LINEAR + offset, gpa, item);
        assert_eq!(known, Known::Shadow(decoded));
        decoded
    }

    fn recent(&mut self, offset: u64, item: SystemItem) -> Option<Option<Decoded>> {
        self.shadows.recent(&self.tlb, LINEAR + offset, item)
    }
}

const SEGMENT: SystemItem = SystemItem::Segment;
const STACK: SystemItem = SystemItem::Stack(8);

#[test]
fn only_what_was_written_is_derived_again() {
    let mut rig = Rig::new();
    let a = rig.derive(0x10, SEGMENT, 0x00af_9b00_0000_ffff);
    let b = rig.derive(0x18, SEGMENT, 0x00cf_9300_0000_ffff);
    rig.shadows
        .invalidate(Range::new(GPA + 0xf, GPA + 0x10), true);
    assert_eq!(rig.recent(0x10, SEGMENT), Some(Some(a)));
    rig.shadows
        .invalidate(Range::new(GPA + 0x17, GPA + 0x18), true);
    assert_eq!(rig.recent(0x10, SEGMENT), None);
    let look_up = |rig: &mut Rig, offset| {
        rig.shadows
            .look_up(&rig.tlb, LINEAR + offset, GPA + offset, SEGMENT)
    };
    assert_eq!(look_up(&mut rig, 0x10), Known::Unknown);
    assert_eq!(look_up(&mut rig, 0x18), Known::Shadow(b));
    let c = rig.derive(0x10, SEGMENT, 0x00cf_fb00_0000_ffff);
    assert_ne!(c, a);
    assert_eq!(rig.recent(0x10, SEGMENT), Some(Some(c)));
    let s = rig.shadows.statistics;
    assert_eq!((s.derived, s.invalidated, s.rederived), (3, 1, 1));
    assert!(!rig.shadows.has_released());
}

#[test]
fn readings_of_the_same_bytes_are_told_apart() {
    let mut rig = Rig::new();
    let gate = rig.derive(0, SystemItem::Gate, 0x8e00_0008_1000);
    let segment = rig.derive(0, SEGMENT, 0x8e00_0008_1000);
    assert_ne!(gate, segment);
    assert_eq!(rig.recent(0, SystemItem::Gate), None);
    assert_eq!(rig.recent(0, SEGMENT), Some(Some(segment)));
}

#[test]
fn a_flush_asks_for_the_translation_again() {
    let mut rig = Rig::new();
    let a = rig.derive(4, STACK, 0x8000);
    rig.tlb.flush_page(LINEAR);
    assert_eq!(rig.recent(4, STACK), None, "no translation");
    rig.map(GPA);
    assert_eq!(rig.recent(4, STACK), Some(Some(a)));
    rig.tlb.flush_non_global();
    rig.map(GPA + 0x1000);
    assert_eq!(rig.recent(4, STACK), None, "another page");
    // Until the flush the old translation counts, as in a TLB.
    rig.tlb.flush_non_global();
    rig.map(GPA);
    assert_eq!(rig.recent(4, STACK), Some(Some(a)));
    rig.map(GPA + 0x1000);
    assert_eq!(rig.recent(4, STACK), Some(Some(a)));
}

#[test]
fn a_page_that_is_written_often_rests_and_comes_back() {
    let mut rig = Rig::new();
    rig.derive(0x10, SEGMENT, 1);
    rig.derive(0x18, SEGMENT, 2);
    let mut writes = 0;
    while !rig.shadows.has_released() {
        rig.shadows.note_write(GPA + 0x800);
        writes += 1;
        assert!(writes < 1000);
    }
    assert_eq!(rig.shadows.take_released().len(), 2);
    assert_eq!(rig.recent(0x10, SEGMENT), None);
    let look_up = |rig: &mut Rig| {
        rig.shadows
            .look_up(&rig.tlb, LINEAR + 0x10, GPA + 0x10, SEGMENT)
    };
    assert_eq!(look_up(&mut rig), Known::Resting);
    let mut reads = 0;
    while let Some(answer) = rig.recent(0x10, SEGMENT) {
        assert_eq!(answer, None);
        reads += 1;
    }
    assert!(reads > 100);
    assert_eq!(look_up(&mut rig), Known::Unknown);
    rig.derive(0x10, SEGMENT, 1);
    assert_eq!(rig.shadows.statistics.rests, 1);
}

#[test]
fn other_pages_do_not_tire_a_page() {
    let mut rig = Rig::new();
    let a = rig.derive(0x10, SEGMENT, 1);
    for _ in 0..1000 {
        rig.shadows.note_write(GPA + 0x1000);
    }
    assert_eq!(rig.recent(0x10, SEGMENT), Some(Some(a)));
}

#[test]
fn sensed_reads_are_not_answered() {
    let mut rig = Rig::new();
    rig.derive(0x10, SEGMENT, 1);
    rig.shadows.reads_are_sensed(GPA + 0x1000);
    assert!(rig.recent(0x10, SEGMENT).is_some());
    rig.shadows.reads_are_sensed(GPA);
    assert_eq!(rig.recent(0x10, SEGMENT), None);
    assert_eq!(rig.shadows.take_released().len(), 1);
}

#[test]
fn the_bound_drops_everything() {
    let mut rig = Rig::new();
    for n in 0..MOST_ENTRIES as u64 {
        assert!(!rig.shadows.is_full());
        rig.derive(n, SystemItem::Stack(1), n);
    }
    assert!(rig.shadows.is_full());
    rig.shadows.clear();
    assert_eq!(rig.recent(0, SystemItem::Stack(1)), None);
    assert_eq!(rig.shadows.take_released().len(), MOST_ENTRIES);
}
