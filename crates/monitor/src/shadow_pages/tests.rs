//! The shadow page tables against plain walks, with changes of every origin.

use std::sync::Arc;

use proptest::prelude::*;
use trapline_engine::access::Fault;
use trapline_engine::env::{Environment, Span, Translation};
use trapline_engine::tlb::{Access, Privilege, Tlb};
use trapline_memory::GuestMemory;
use trapline_trace::{Actor, Kind, Semantics, Sense, TraceSystem, VcpuId};
use trapline_x86::control::{cr0, cr4, efer};
use trapline_x86::cpuid::{CpuidConfig, CpuidModel};
use trapline_x86::paging::entry::{A, D, G, P, PS, RW, US, XD};
use trapline_x86::paging::{self, PhysicalMemory, Request};
use trapline_x86::{CpuState, Exception};

use super::*;
use crate::interrupt::LocalInterrupts;
use crate::platform::Platform;
use crate::surroundings::Surroundings;

const PAGE: u64 = 4096;
const RAM: u64 = 16 * PAGE;

/// Nothing lies around these VCPUs but memory.
pub(crate) struct Nothing;

impl Platform for Nothing {
    fn port_read(&self, _: u8, _: u16, _: u8) -> u32 {
        0
    }
    fn port_write(&self, _: u8, _: u16, _: u8, _: u32) {}
    fn device_read(&self, _: u8, _: u64, _: u64, _: &mut [u8]) {}
    fn device_write(&self, _: u8, _: u64, _: u64, _: &[u8]) {}
}

impl LocalInterrupts for Nothing {
    fn pending(&self) -> bool {
        false
    }
    fn acknowledge(&self) -> Option<u8> {
        None
    }
    fn read_msr(&self, _: u32) -> Option<u64> {
        None
    }
    fn write_msr(&self, _: u32, _: u64, _: u64) -> Option<()> {
        None
    }
    fn task_priority_class(&self) -> u8 {
        0
    }
    fn set_task_priority_class(&self, _: u8) {}
    fn id(&self) -> u32 {
        0
    }
    fn init(&self) {}
}

/// A copy of guest memory for the walk that tells what is right.
struct Copy {
    bytes: Vec<u8>,
    address_bits: u32,
}

impl PhysicalMemory for Copy {
    fn address_bits(&self) -> u32 {
        self.address_bits
    }
    fn read_u64(&mut self, gpa: u64) -> Option<u64> {
        let at = self.bytes.get(usize::try_from(gpa).ok()?..)?.get(..8)?;
        Some(u64::from_le_bytes(at.try_into().unwrap()))
    }
    fn read_u32(&mut self, gpa: u64) -> Option<u32> {
        let at = self.bytes.get(usize::try_from(gpa).ok()?..)?.get(..4)?;
        Some(u32::from_le_bytes(at.try_into().unwrap()))
    }
    fn compare_exchange_u64(&mut self, gpa: u64, old: u64, new: u64) -> Result<(), u64> {
        let found = self.read_u64(gpa).ok_or(old)?;
        if found != old {
            return Err(found);
        }
        self.bytes[gpa as usize..][..8].copy_from_slice(&new.to_le_bytes());
        Ok(())
    }
    fn compare_exchange_u32(&mut self, gpa: u64, old: u32, new: u32) -> Result<(), u32> {
        let found = self.read_u32(gpa).ok_or(old)?;
        if found != old {
            return Err(found);
        }
        self.bytes[gpa as usize..][..4].copy_from_slice(&new.to_le_bytes());
        Ok(())
    }
}

struct Processor {
    cpu: CpuState,
    tlb: Tlb,
    surroundings: Surroundings,
}

impl Processor {
    fn boundary(&mut self) {
        self.surroundings.boundary(&mut self.tlb);
    }

    /// As the engine does it: the TLB first, and again after a restart.
    fn translate(
        &mut self,
        linear: u64,
        privilege: Privilege,
        access: Access,
    ) -> Result<u64, Exception> {
        for _ in 0..32 {
            if let Some(hit) = self.tlb.lookup(linear, privilege, access) {
                return Ok(hit.gpa);
            }
            let (s, tlb) = (&mut self.surroundings, &mut self.tlb);
            match s.translate(&self.cpu, tlb, linear, privilege, access) {
                Ok(Translation { gpa, .. }) => return Ok(gpa),
                Err(Fault::Exception(e)) => return Err(e),
                Err(Fault::Restart) => self.boundary(),
            }
        }
        panic!("restarts without end");
    }

    /// A store to guest-physical memory, direct where that is allowed.
    fn store(&mut self, gpa: u64, value: u64) {
        let memory = Arc::clone(&self.surroundings.memory);
        let vcpu = self.surroundings.vcpu;
        let perform = || {
            let old = memory.read_u64(gpa).unwrap();
            memory
                .compare_exchange_u64(gpa, old, value)
                .unwrap()
                .unwrap();
        };
        while !memory.hold(vcpu, gpa, Sense::WRITE) {
            let span = [Span { gpa, len: 8 }];
            let (s, tlb) = (&mut self.surroundings, &mut self.tlb);
            match s.sensed(tlb, 0, &span, Access::Write, &mut || perform()) {
                Ok(()) => return,
                Err(_) => self.boundary(),
            }
        }
        perform();
    }

    fn shadow(&self) -> &ShadowPages {
        &self.surroundings.shadow
    }
}

/// Two VCPUs that trace at the first opportunity.
struct Rig {
    memory: Arc<GuestMemory>,
    trace: Arc<TraceSystem>,
    vcpus: Vec<Processor>,
}

impl Rig {
    fn new(cpu: &CpuState) -> Self {
        let memory = Arc::new(GuestMemory::new(RAM).unwrap());
        let trace = Arc::new(TraceSystem::new(2, memory.clone()));
        let cpuid = Arc::new(CpuidModel::from_host(CpuidConfig {
            vcpus: 2,
            tsc_khz: None,
            apic_bus_khz: None,
        }));
        let vcpus = (0..2)
            .map(|n| {
                let mut surroundings = Surroundings::new(
                    VcpuId::new(n),
                    trace.clone(),
                    memory.clone(),
                    Arc::new(Nothing),
                    Arc::new(Nothing),
                    cpuid.clone(),
                );
                surroundings.shadow.heat.walks = 1;
                Processor {
                    cpu: cpu.clone(),
                    tlb: Tlb::default(),
                    surroundings,
                }
            })
            .collect();
        Self {
            memory,
            trace,
            vcpus,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM as usize];
        assert!(self.memory.read(0, &mut bytes));
        bytes
    }

    /// What VCPU `n` sees must be what a plain walk of memory finds, accessed and dirty bits too.
    fn check(&mut self, n: usize, linear: u64, privilege: Privilege, access: Access) {
        let vcpu = &mut self.vcpus[n];
        let linear = if vcpu.cpu.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        };
        let request = Request {
            write: access == Access::Write,
            fetch: access == Access::Fetch,
            user: privilege == Privilege::User,
            smap_closed: privilege == Privilege::Supervisor && access != Access::Fetch,
        };
        let address_bits = vcpu.surroundings.cpuid.physical_address_bits();
        let mut copy = Copy {
            bytes: vec![0; RAM as usize],
            address_bits,
        };
        assert!(self.memory.read(0, &mut copy.bytes));
        let expected = paging::walk(&vcpu.cpu, &mut copy, linear, request)
            .map(|page| page.gpa | linear & (PAGE - 1));
        let found = vcpu.translate(linear, privilege, access);
        assert_eq!(found, expected, "{linear:#x} {privilege:?} {access:?}");
        assert!(self.bytes() == copy.bytes, "accessed and dirty bits");
    }
}

fn long_mode() -> CpuState {
    let mut cpu = CpuState::reset();
    cpu.cr0 = cr0::PG | cr0::PE | cr0::WP | cr0::ET;
    cpu.cr3 = PAGE;
    cpu.cr4 = cr4::PAE | cr4::PGE;
    cpu.efer = efer::LME | efer::LMA | efer::NXE;
    cpu
}

fn of_mode(mode: u8) -> CpuState {
    let mut cpu = long_mode();
    if mode > 0 {
        cpu.efer = efer::NXE;
    }
    if mode > 1 {
        cpu.cr4 = cr4::PGE | cr4::PSE;
    }
    cpu
}

/// The address of a page.
fn page(number: u64) -> u64 {
    number * PAGE
}

const TABLE: u64 = P | RW | US;
/// Table 1 is the root; 2, 3 and 4 lead to each other.
fn map(rig: &mut Rig, page: u64, entry: u64) {
    for (table, value) in [(1, 2 * PAGE), (2, 3 * PAGE), (3, 4 * PAGE)] {
        rig.vcpus[0].store(table * PAGE, value | TABLE);
    }
    rig.vcpus[0].store(4 * PAGE + 8 * page, entry);
}

fn read(rig: &mut Rig, linear: u64) -> Result<u64, Exception> {
    rig.vcpus[0].boundary();
    rig.vcpus[0].translate(linear, Privilege::User, Access::Read)
}

fn flush(rig: &mut Rig, n: usize) {
    let vcpu = &mut rig.vcpus[n];
    vcpu.surroundings.before_flush(&mut vcpu.tlb);
    vcpu.tlb.flush_all();
}

#[test]
fn copies_survive_a_flush() {
    let mut rig = Rig::new(&long_mode());
    map(&mut rig, 0, page(7) | TABLE);
    assert_eq!(read(&mut rig, 0), Ok(7 * PAGE));
    for _ in 0..3 {
        flush(&mut rig, 0);
        let before = rig.vcpus[0].shadow().statistics;
        assert_eq!(read(&mut rig, 5), Ok(7 * PAGE + 5));
        let after = rig.vcpus[0].shadow().statistics;
        assert_eq!((after.hits, after.walks), (before.hits + 1, before.walks));
    }
}

#[test]
fn a_change_is_deferred_to_the_flush_and_not_longer() {
    let mut rig = Rig::new(&long_mode());
    map(&mut rig, 0, page(7) | TABLE);
    assert_eq!(read(&mut rig, 0), Ok(7 * PAGE));
    let entry = page(8) | TABLE | A;
    rig.vcpus[1].store(4 * PAGE, entry);
    // The TLB still has it.
    assert_eq!(read(&mut rig, 0), Ok(7 * PAGE));
    flush(&mut rig, 0);
    assert_eq!(read(&mut rig, 0), Ok(8 * PAGE));
    rig.vcpus[0].boundary();
    rig.vcpus[0].surroundings.before_flush(&mut Tlb::default());
    let device = page(9) | TABLE;
    rig.memory
        .write(&rig.trace, Actor::Device, 4 * PAGE, &device.to_le_bytes());
    flush(&mut rig, 0);
    assert_eq!(read(&mut rig, 0), Ok(9 * PAGE));
}

#[test]
fn what_becomes_present_needs_no_flush() {
    let mut rig = Rig::new(&long_mode());
    map(&mut rig, 0, page(7) | TABLE);
    assert_eq!(read(&mut rig, 0), Ok(7 * PAGE));
    for (table, value) in [(1, 2 * PAGE), (2, 3 * PAGE), (3, 4 * PAGE), (4, 7 * PAGE)] {
        rig.vcpus[0].store(table * PAGE, 0);
        flush(&mut rig, 0);
        assert!(read(&mut rig, 0).is_err());
        rig.vcpus[1].store(table * PAGE, value | TABLE);
        assert_eq!(read(&mut rig, 0), Ok(7 * PAGE));
    }
}

#[test]
fn accessed_and_dirty_bits_are_set_again() {
    let mut rig = Rig::new(&long_mode());
    map(&mut rig, 0, page(7) | TABLE);
    let write = |rig: &mut Rig| {
        rig.vcpus[0].boundary();
        rig.vcpus[0].translate(0, Privilege::User, Access::Write)
    };
    for actor in [0, 1, 0] {
        assert_eq!(read(&mut rig, 0), Ok(7 * PAGE));
        assert_eq!(write(&mut rig), Ok(7 * PAGE));
        assert_eq!(write(&mut rig), Ok(7 * PAGE));
        assert_eq!(rig.memory.read_u64(4 * PAGE).unwrap() & (A | D), A | D);
        rig.vcpus[actor].store(4 * PAGE, page(7) | TABLE | A);
        flush(&mut rig, 0);
        assert_eq!(read(&mut rig, 0), Ok(7 * PAGE));
        assert_eq!(rig.memory.read_u64(4 * PAGE).unwrap() & (A | D), A);
        assert_eq!(write(&mut rig), Ok(7 * PAGE));
        assert_eq!(rig.memory.read_u64(4 * PAGE).unwrap() & (A | D), A | D);
        rig.vcpus[actor].store(4 * PAGE, page(7) | TABLE);
        flush(&mut rig, 0);
        assert_eq!(read(&mut rig, 0), Ok(7 * PAGE));
        assert_eq!(rig.memory.read_u64(4 * PAGE).unwrap() & (A | D), A);
    }
}

#[test]
fn another_walker_s_bits_leave_the_copy() {
    let mut rig = Rig::new(&long_mode());
    map(&mut rig, 0, page(7) | TABLE);
    assert_eq!(read(&mut rig, 0), Ok(7 * PAGE));
    let found = rig.vcpus[1].translate(0, Privilege::User, Access::Write);
    assert_eq!(found, Ok(7 * PAGE));
    flush(&mut rig, 0);
    let before = rig.vcpus[0].shadow().statistics;
    assert!(before.updated_entries > 0);
    assert_eq!(before.invalidated_entries, 0);
    // The dirty bit that the other set serves this one too.
    let found = rig.vcpus[0].translate(0, Privilege::User, Access::Write);
    assert_eq!(found, Ok(7 * PAGE));
    assert_eq!(rig.vcpus[0].shadow().statistics.walks, before.walks);
}

#[test]
fn a_table_that_becomes_data_goes_untraced() {
    let mut rig = Rig::new(&long_mode());
    map(&mut rig, 0, page(7) | TABLE);
    assert_eq!(read(&mut rig, 0), Ok(7 * PAGE));
    let regions = rig.trace.region_count();
    for word in 0..512 {
        rig.vcpus[1].store(4 * PAGE + 8 * word, word << 20);
        rig.vcpus[0].boundary();
    }
    let statistics = rig.vcpus[0].shadow().statistics;
    assert_eq!(statistics.untraced_pages, 1);
    assert_eq!(statistics.writes, u64::from(policy::WRITES));
    flush(&mut rig, 0);
    assert_eq!(rig.trace.region_count(), regions - 1);
    assert!(read(&mut rig, 0).is_err());
}

#[test]
fn what_is_announced_before_the_write_is_not_derived_from() {
    let mut rig = Rig::new(&long_mode());
    rig.trace.set_semantics(Kind::Mmu, Semantics::PreWriteValue);
    map(&mut rig, 0, page(7) | TABLE);
    assert_eq!(read(&mut rig, 0), Ok(7 * PAGE));
    rig.vcpus[1].store(4 * PAGE, page(8) | TABLE | A);
    flush(&mut rig, 0);
    assert_eq!(rig.vcpus[0].shadow().statistics.untraced_pages, 1);
    assert_eq!(read(&mut rig, 0), Ok(8 * PAGE));
}

/// Traces and copies of a VCPU whose guest uses ever more tables stay within their bounds.
#[test]
fn the_bounds_hold() {
    let cpu = long_mode();
    let mut shadow = ShadowPages::new(VcpuId::new(0), 46, Witness::none());
    shadow.heat.walks = 1;
    let trace = TraceSystem::new(1, Arc::new(trapline_trace::AlwaysSensed));
    let mut memory = Copy {
        bytes: vec![0; 8192 * 4096],
        address_bits: 46,
    };
    let set = |memory: &mut Copy, gpa: u64, value: u64| {
        memory.bytes[gpa as usize..][..8].copy_from_slice(&value.to_le_bytes());
    };
    let vcpu = VcpuId::new(0);
    for root in 1..2000u64 {
        let base = root * 4 * PAGE;
        for level in 0..4 {
            set(
                &mut memory,
                base + level * PAGE,
                (base + (level + 1) * PAGE) | TABLE,
            );
        }
        let cpu = CpuState {
            cr3: base,
            ..cpu.clone()
        };
        for _ in 0..2 {
            shadow.lookup(&cpu, 0);
            shadow.before_walk();
            loop {
                let walked = paging::walk_path(&cpu, &mut memory, 0, Request::read(true));
                let Fill::Trace(range) = shadow.fill(&walked.unwrap().1, |_| true) else {
                    break;
                };
                let id = trace.establish(
                    Some(vcpu),
                    trapline_trace::VcpuSet::one(vcpu),
                    range,
                    Kind::Mmu,
                    Sense::WRITE,
                    0,
                    &mut |_| {},
                );
                shadow.add_trace(range, id.unwrap());
            }
        }
        assert_eq!(shadow.lookup(&cpu, 0).map(|p| p.gpa), Some(base + 4 * PAGE));
        for id in shadow.take_released() {
            trace.remove(vcpu, id);
        }
        assert!(shadow.tables.len() <= MAX_TABLES);
        assert!(shadow.index.len() <= MAX_TABLES);
        assert!(shadow.traced.len() <= MAX_TABLES + 4);
        assert_eq!(trace.region_count(), shadow.traced.len());
    }
    assert!(shadow.statistics.evicted_tables > 4000);
}

#[derive(Clone, Debug)]
enum Step {
    /// By VCPU 0 or 1, or a device: an entry of a table.
    Write {
        actor: u8,
        at: u64,
        value: u64,
    },
    /// Clears the accessed and dirty bits of an entry.
    Age {
        actor: u8,
        at: u64,
    },
    Access {
        vcpu: usize,
        at: Where,
    },
    /// Flushes everything and looks at all these places.
    Flush {
        vcpu: usize,
        at: Vec<Where>,
    },
    /// Invalidates one page and looks at it.
    Page {
        vcpu: usize,
        at: Where,
    },
    /// Another address space or other mode bits, with what flush they need; then looks.
    Switch {
        vcpu: usize,
        root: u64,
        bits: u64,
        at: Vec<Where>,
    },
}

type Where = (u64, Privilege, Access);

fn place() -> impl Strategy<Value = u64> {
    (
        prop_oneof![4 => 1u64..7, 1 => POINTERS + 1..POINTERS + 4],
        0u64..2,
    )
        .prop_map(|(table, index)| table * PAGE + 8 * index)
}

fn entry() -> impl Strategy<Value = u64> {
    let flags = P | RW | US | A | D | G | XD;
    let near = (1u64..12, any::<u64>(), any::<u64>()).prop_map(move |(table, some, rare)| {
        let strange = if rare.is_multiple_of(8) {
            rare & !(PAGE - 1)
        } else {
            0
        };
        let large = if rare % 8 == 1 { PS } else { 0 };
        // Mostly present, writable and user.
        let flags = some & flags | (some >> 12) & TABLE | (some >> 16) & TABLE;
        // Narrow entries are two in one word.
        page(table) | flags & !XD | (some >> 24) & XD & some << 1 | strange | large
    });
    let narrow = (1u64..15, 1u64..12, any::<u64>()).prop_map(move |(low, high, some)| {
        let flags = |some: u64| some & 0x167 | (some >> 12) & TABLE;
        (page(low) | flags(some)) | (page(high) | flags(some >> 32)) << 32
    });
    let pointer = (2u64..7).prop_map(|table| page(table) | P);
    let good = (2u64..9, any::<bool>())
        .prop_map(|(table, used)| page(table) | TABLE | if used { A | D } else { 0 });
    prop_oneof![2 => near, 2 => narrow, 4 => good, 1 => pointer, 1 => Just(0)]
}

fn location() -> impl Strategy<Value = Where> {
    let privilege = prop_oneof![
        Just(Privilege::User),
        Just(Privilege::Supervisor),
        Just(Privilege::SupervisorOpen)
    ];
    let access = prop_oneof![Just(Access::Read), Just(Access::Write), Just(Access::Fetch)];
    (any::<[u8; 4]>(), any::<bool>(), privilege, access).prop_map(|(i, narrow, p, a)| {
        let linear = if narrow {
            u64::from(i[0] & 3) << 22 | u64::from(i[1] & 3) << 12
        } else {
            i.iter().fold(0, |l, i| l << 9 | u64::from(i & 1)) << 12
        };
        (
            linear,
            p,
            if p == Privilege::SupervisorOpen && a == Access::Fetch {
                Access::Read
            } else {
                a
            },
        )
    })
}

fn step() -> impl Strategy<Value = Step> {
    let many = || proptest::collection::vec(location(), 1..6);
    prop_oneof![
        6 => (0u8..3, place(), entry()).prop_map(|(actor, at, value)| Step::Write { actor, at, value }),
        2 => (0u8..3, place()).prop_map(|(actor, at)| Step::Age { actor, at }),
        6 => (0usize..2, location()).prop_map(|(vcpu, at)| Step::Access { vcpu, at }),
        3 => (0usize..2, many()).prop_map(|(vcpu, at)| Step::Flush { vcpu, at }),
        1 => (0usize..2, location()).prop_map(|(vcpu, at)| Step::Page { vcpu, at }),
        1 => (0usize..2, 1u64..4, any::<u64>(), many())
            .prop_map(|(vcpu, root, bits, at)| Step::Switch { vcpu, root, bits, at }),
    ]
}

/// Roots of PAE paging lie behind this page, where no entry leads: a walk sets accessed bits in what
/// it uses as another table, and in its pointers that bit is reserved.
const POINTERS: u64 = 11;

/// Tables that lead on everywhere, so that few addresses are translated often.
fn prefill(rig: &mut Rig, mode: u8) {
    for table in (1..7).chain(POINTERS + 1..POINTERS + 4) {
        for index in 0..2u64 {
            // Pointers of PAE paging have no rights.
            let flags = if table > POINTERS { P } else { TABLE };
            let entry = page(2 + (2 * table + index) % 6) | flags;
            let both = if mode == 2 {
                entry | entry << 32
            } else {
                entry
            };
            rig.vcpus[0].store(page(table) + 8 * index, both);
        }
    }
    if mode == 1 {
        for vcpu in &mut rig.vcpus {
            vcpu.cpu.cr3 = page(POINTERS + 1);
        }
    }
}

fn perform(rig: &mut Rig, step: Step) {
    let write = |rig: &mut Rig, actor: u8, at: u64, value: u64| match actor {
        0 | 1 => {
            rig.vcpus[usize::from(actor)].boundary();
            rig.vcpus[usize::from(actor)].store(at, value);
        }
        _ => {
            let bytes = value.to_le_bytes();
            // A device reaches memory when VCPUs are told to keep off it.
            assert!(rig.memory.write(&rig.trace, Actor::Device, at, &bytes));
        }
    };
    match step {
        Step::Write { actor, at, value } => write(rig, actor, at, value),
        Step::Age { actor, at } => {
            let value = rig.memory.read_u64(at).unwrap() & !(A | D | A << 32 | D << 32);
            write(rig, actor, at, value);
        }
        Step::Access { vcpu, at } => {
            rig.vcpus[vcpu].boundary();
            let _ = rig.vcpus[vcpu].translate(at.0, at.1, at.2);
        }
        Step::Flush { vcpu, at } => {
            flush(rig, vcpu);
            for (linear, privilege, access) in at {
                rig.check(vcpu, linear, privilege, access);
            }
        }
        Step::Page { vcpu, at } => {
            let v = &mut rig.vcpus[vcpu];
            v.surroundings.before_flush(&mut v.tlb);
            let mask = if v.cpu.long_mode() { !0 } else { 0xffff_ffff };
            v.tlb.flush_page(at.0 & mask);
            rig.check(vcpu, at.0, at.1, at.2);
        }
        Step::Switch {
            vcpu,
            root,
            bits,
            at,
        } => {
            let v = &mut rig.vcpus[vcpu];
            let pae = v.cpu.cr4 & cr4::PAE != 0 && !v.cpu.long_mode();
            v.cpu.cr3 = page(root + if pae { POINTERS } else { 0 });
            v.cpu.cr4 ^= bits & (cr4::SMEP | cr4::SMAP | cr4::PGE);
            v.cpu.cr0 ^= bits & cr0::WP;
            v.cpu.efer ^= bits & efer::NXE;
            if v.cpu.cr4 & cr4::PAE == 0 {
                v.cpu.cr4 ^= bits & cr4::PSE;
            }
            flush(rig, vcpu);
            for (linear, privilege, access) in at {
                rig.check(vcpu, linear, privilege, access);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// After a flush nothing differs from a walk of what memory says then.
    #[test]
    fn flushed_translations_are_those_of_a_walk(
        mode in 0u8..3,
        semantics in 0usize..4,
        steps in proptest::collection::vec(step(), 1..150),
    ) {
        let mut rig = Rig::new(&of_mode(mode));
        rig.trace.set_semantics(Kind::Mmu, Semantics::ALL[semantics]);
        prefill(&mut rig, mode);
        for step in steps {
            perform(&mut rig, step);
        }
    }
}
