use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::mmio::{Initiator, MmioDevice};
use crate::timer::tests::Bench;

const BASE: u32 = 0x1b;
const DEADLINE: u32 = 0x6e0;
const GHZ: u64 = 1_000_000_000;

#[derive(Default)]
struct Signals {
    interrupted: AtomicBool,
    others: Mutex<Vec<String>>,
}

impl Signals {
    fn note(&self, what: String) {
        self.others.lock().unwrap().push(what);
    }
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.others.lock().unwrap())
    }
    fn interrupted(&self) -> bool {
        self.interrupted.swap(false, Ordering::SeqCst)
    }
}

impl VcpuSignals for Signals {
    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::SeqCst);
    }
    fn nmi(&self) {
        self.note("nmi".into());
    }
    fn init(&self) {
        self.note("init".into());
    }
    fn startup(&self, vector: u8) {
        self.note(format!("startup {vector:#x}"));
    }
}

struct Machine {
    bench: Bench,
    signals: Vec<Arc<Signals>>,
    apics: Arc<LocalApics>,
    page: LocalApicPage,
}

/// `count` VCPUs whose APICs are enabled by software.
fn machine(count: usize) -> Machine {
    let bench = Bench::new();
    let signals: Vec<Arc<Signals>> = (0..count).map(|_| Arc::default()).collect();
    let abstract_signals: Vec<Arc<dyn VcpuSignals>> = signals
        .iter()
        .map(|signals| signals.clone() as Arc<dyn VcpuSignals>)
        .collect();
    let apics = LocalApics::new(&abstract_signals, &bench.timers, 2 * GHZ);
    let page = LocalApicPage::new(apics.clone());
    let machine = Machine {
        bench,
        signals,
        apics,
        page,
    };
    for vcpu in 0..count {
        machine.store(vcpu, 0xf0, 0x1ff);
    }
    machine
}

impl Machine {
    fn load(&self, vcpu: usize, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.page
            .read(Initiator::Vcpu(vcpu as u8), offset, &mut data);
        u32::from_le_bytes(data)
    }
    fn store(&self, vcpu: usize, offset: u64, value: u32) {
        self.page
            .write(Initiator::Vcpu(vcpu as u8), offset, &value.to_le_bytes());
    }
    fn local(&self, vcpu: usize) -> Arc<LocalApic> {
        self.apics.of(vcpu).unwrap()
    }
    fn wrmsr(&self, vcpu: usize, index: u32, value: u64) -> Option<()> {
        self.local(vcpu).write_msr(index, value, self.tsc())
    }
    fn rdmsr(&self, vcpu: usize, index: u32) -> Option<u64> {
        self.local(vcpu).read_msr(index)
    }
    fn tsc(&self) -> u64 {
        2 * self.bench.timers.now()
    }
    fn x2apic(&self, vcpu: usize) {
        let base = self.rdmsr(vcpu, BASE).unwrap();
        self.wrmsr(vcpu, BASE, base | 1 << 10).unwrap();
    }
    /// Acknowledges and ends everything that waits on `vcpu`.
    fn drain(&self, vcpu: usize) -> Vec<u8> {
        let local = self.local(vcpu);
        let mut vectors = Vec::new();
        while let Some(vector) = local.acknowledge() {
            vectors.push(vector);
            self.apics.end_of_interrupt(vcpu);
        }
        vectors
    }
    fn receivers(&self) -> Vec<usize> {
        (0..self.apics.count())
            .filter(|&vcpu| !self.drain(vcpu).is_empty())
            .collect()
    }
}

#[test]
fn priorities_nest_and_eoi_uncovers_the_next() {
    let machine = machine(1);
    let local = machine.local(0);
    for vector in [0x31, 0x52, 0x55, 0x21] {
        machine.store(0, 0x300, 1 << 18 | vector);
    }
    assert!(machine.signals[0].interrupted());
    assert_eq!(local.acknowledge(), Some(0x55));
    assert!(!local.pending(), "0x52 is in the class in service");
    assert_eq!(machine.load(0, 0xa0), 0x50);
    machine.store(0, 0x300, 1 << 18 | 0x61);
    assert_eq!(local.acknowledge(), Some(0x61));
    machine.store(0, 0xb0, 0);
    assert_eq!(local.acknowledge(), None);
    machine.signals[0].interrupted();
    machine.store(0, 0xb0, 0);
    assert!(machine.signals[0].interrupted(), "0x52 can be taken now");
    assert_eq!(machine.drain(0), [0x52, 0x31, 0x21]);
}

#[test]
fn task_priority_holds_back_and_lets_go() {
    let machine = machine(1);
    let local = machine.local(0);
    local.set_task_priority_class(5);
    assert_eq!(machine.load(0, 0x80), 0x50);
    machine.store(0, 0x300, 1 << 18 | 0x5f);
    assert!(!local.pending());
    machine.signals[0].interrupted();
    machine.store(0, 0x80, 0x4f);
    assert!(machine.signals[0].interrupted());
    assert_eq!(local.task_priority_class(), 4);
    assert_eq!(local.acknowledge(), Some(0x5f));
}

#[test]
fn physical_destinations_and_shorthands() {
    let machine = machine(4);
    machine.store(1, 0x310, 3 << 24);
    machine.store(1, 0x300, 0x40);
    assert_eq!(machine.load(1, 0x310), 3 << 24);
    assert_eq!(machine.receivers(), [3]);
    machine.store(1, 0x310, 0xff << 24);
    machine.store(1, 0x300, 0x40);
    assert_eq!(machine.receivers(), [0, 1, 2, 3]);
    machine.store(1, 0x300, 2 << 18 | 0x40);
    assert_eq!(machine.receivers(), [0, 1, 2, 3]);
    machine.store(1, 0x300, 3 << 18 | 0x40);
    assert_eq!(machine.receivers(), [0, 2, 3]);
    machine.store(1, 0x300, 1 << 18 | 0x40);
    assert_eq!(machine.receivers(), [1]);
    machine.store(1, 0x310, 9 << 24);
    machine.store(1, 0x300, 0x40);
    assert!(machine.receivers().is_empty());
}

#[test]
fn logical_destinations_of_xapic() {
    let machine = machine(4);
    for vcpu in 0..4 {
        machine.store(vcpu, 0xd0, 1 << (24 + vcpu));
    }
    machine.store(0, 0x310, 0b1010 << 24);
    machine.store(0, 0x300, 1 << 11 | 0x40);
    assert_eq!(machine.receivers(), [1, 3]);
    // Cluster model: two clusters of two.
    for vcpu in 0..4usize {
        machine.store(vcpu, 0xe0, 0x0fff_ffff);
        let member = (vcpu as u32 / 2) << 4 | 1 << (vcpu % 2);
        machine.store(vcpu, 0xd0, member << 24);
    }
    machine.store(0, 0x310, 0x13 << 24);
    machine.store(0, 0x300, 1 << 11 | 0x40);
    assert_eq!(machine.receivers(), [2, 3]);
}

#[test]
fn logical_destinations_of_x2apic() {
    let machine = machine(18);
    for vcpu in 0..18 {
        machine.x2apic(vcpu);
    }
    assert_eq!(machine.rdmsr(17, 0x80d), Some(1 << 16 | 2));
    assert_eq!(machine.rdmsr(17, 0x802), Some(17));
    let command = |destination: u64| destination << 32 | 1 << 11 | 0x40;
    machine.wrmsr(0, 0x830, command(1 << 16 | 3)).unwrap();
    assert_eq!(machine.receivers(), [16, 17]);
    machine.wrmsr(0, 0x830, command(0x8001)).unwrap();
    assert_eq!(machine.receivers(), [0, 15]);
    machine.wrmsr(0, 0x830, command(0xffff_ffff)).unwrap();
    assert_eq!(machine.receivers().len(), 18);
    machine.wrmsr(0, 0x830, 17 << 32 | 0x40).unwrap();
    assert_eq!(machine.receivers(), [17]);
    machine.wrmsr(5, 0x83f, 0x99).unwrap();
    assert_eq!(machine.drain(5), [0x99]);
    // The I/O APIC has 8 bits: cluster 0 only, and 0xff is everybody.
    machine.apics.deliver(Message {
        destination: Destination::narrow(0xff, false),
        mode: DeliveryMode::Fixed,
        vector: 0x40,
        level: false,
    });
    assert_eq!(machine.receivers().len(), 18);
}

#[test]
fn lowest_priority_finds_the_idlest() {
    let machine = machine(3);
    for vcpu in 0..3 {
        machine.store(vcpu, 0xd0, 0x0100_0000);
    }
    machine.local(0).set_task_priority_class(3);
    machine.local(2).set_task_priority_class(2);
    for _ in 0..5 {
        machine.store(0, 0x310, 1 << 24);
        machine.store(0, 0x300, 1 << 11 | 1 << 8 | 0x40);
        assert_eq!(machine.receivers(), [1]);
    }
    machine.store(1, 0xf0, 0xff);
    machine.store(0, 0x300, 1 << 11 | 1 << 8 | 0x40);
    assert_eq!(
        machine.receivers(),
        [2],
        "a disabled APIC does not take part"
    );
}

#[test]
fn nmi_init_and_startup_reach_disabled_apics() {
    let machine = machine(2);
    machine.store(1, 0xf0, 0xff);
    machine.store(0, 0x310, 1 << 24);
    for command in [0x400, 0xc500, 0x8500, 0x069f] {
        machine.store(0, 0x300, command);
    }
    assert_eq!(
        machine.signals[1].take(),
        ["nmi", "init", "startup 0x9f"],
        "the INIT de-assert does nothing"
    );
    machine.store(0, 0x300, 0x40);
    assert!(
        machine.receivers().is_empty(),
        "fixed needs an enabled APIC"
    );
}

#[test]
fn init_resets_all_but_identity() {
    let machine = machine(2);
    machine.store(1, 0x320, 0x20030);
    machine.store(1, 0x380, 1_000_000);
    machine.store(1, 0x300, 1 << 18 | 0x40);
    machine.store(1, 0xd0, 0x0200_0000);
    machine.local(1).init();
    assert!(!machine.local(1).pending());
    assert_eq!(machine.load(1, 0xf0), 0xff);
    assert_eq!(machine.load(1, 0x320), 0x1_0000);
    assert_eq!(machine.load(1, 0xd0), 0);
    assert_eq!(machine.load(1, 0x20), 1 << 24);
    machine.bench.run_until(5_000_000);
    assert!(!machine.local(1).pending());
    machine.x2apic(1);
    machine.local(1).init();
    assert_eq!(machine.rdmsr(1, 0x802), Some(1), "still in x2APIC mode");
}

#[test]
fn modes_follow_the_architecture() {
    let machine = machine(2);
    let base = machine.rdmsr(0, BASE).unwrap();
    assert_eq!(base, 0xfee0_0900);
    assert_eq!(machine.rdmsr(1, BASE), Some(0xfee0_0800));
    assert_eq!(machine.rdmsr(0, 0x802), None, "no x2APIC register yet");
    assert_eq!(machine.wrmsr(0, BASE, base & !0x800 | 0x400), None);
    assert_eq!(machine.wrmsr(0, BASE, base | 1), None);
    assert_eq!(machine.wrmsr(0, BASE, base | 1 << 52), None);
    machine.x2apic(0);
    assert_eq!(machine.load(0, 0x20), 0xffff_ffff, "the page is gone");
    assert_eq!(machine.wrmsr(0, BASE, base), None, "no way back");
    machine.wrmsr(0, BASE, base & !0x800).unwrap();
    assert_eq!(machine.wrmsr(0, BASE, base | 0x400), None, "xAPIC first");
    machine.wrmsr(0, BASE, base).unwrap();
    assert_eq!(machine.load(0, 0xf0), 0xff, "reset on the way");
}

#[test]
fn x2apic_registers_check_their_bits() {
    let machine = machine(1);
    machine.x2apic(0);
    for (register, good, bad) in [
        (0x808, 0xffu64, 0x100u64),
        (0x80b, 0, 1),
        (0x80f, 0x1ff, 0x1000),
        (0x828, 0, 1),
        (0x830, 0xc4300 | 0x40, 1 << 13),
        (0x832, 0x5_00ff, 1 << 8),
        (0x835, 0x1_a7ff, 1 << 17),
        (0x837, 0x1_00ff, 1 << 8),
        (0x838, 0xffff_ffff, 1 << 32),
        (0x83e, 0xb, 4),
        (0x83f, 0xff, 0x100),
    ] {
        assert_eq!(machine.wrmsr(0, register, good), Some(()), "{register:#x}");
        assert_eq!(machine.wrmsr(0, register, bad), None, "{register:#x}");
    }
    for read_only in [0x802, 0x803, 0x80a, 0x80d, 0x810, 0x818, 0x827, 0x839] {
        assert!(machine.rdmsr(0, read_only).is_some(), "{read_only:#x}");
        assert_eq!(machine.wrmsr(0, read_only, 0), None, "{read_only:#x}");
    }
    for absent in [
        0x80b, 0x83f, 0x809, 0x80c, 0x80e, 0x82f, 0x831, 0x840, 0x8ff,
    ] {
        assert_eq!(machine.rdmsr(0, absent), None, "{absent:#x}");
    }
}

#[test]
fn illegal_vectors_show_in_the_error_status() {
    let machine = machine(1);
    machine.store(0, 0x370, 0x50);
    machine.store(0, 0x300, 1 << 18 | 0x0f);
    assert_eq!(machine.load(0, 0x280), 0, "not latched yet");
    machine.store(0, 0x280, 0);
    assert_eq!(machine.load(0, 0x280), 1 << 5);
    assert_eq!(machine.drain(0), [0x50]);
    machine.store(0, 0x280, 0);
    assert_eq!(machine.load(0, 0x280), 0);
    machine.load(0, 0x3f0);
    machine.store(0, 0x280, 0);
    assert_eq!(machine.load(0, 0x280), 1 << 7);
    // An error entry with an illegal vector does not recurse.
    machine.store(0, 0x370, 0x5);
    machine.load(0, 0x3f0);
}

#[test]
fn software_disable_masks_the_table() {
    let machine = machine(1);
    machine.store(0, 0x350, 0x700);
    machine.store(0, 0xf0, 0xff);
    assert_eq!(machine.load(0, 0x350), 0x1_0700);
    machine.store(0, 0x350, 0x700);
    assert_eq!(machine.load(0, 0x350), 0x1_0700, "it stays masked");
}

#[test]
fn one_shot_counts_down_once() {
    let machine = machine(1);
    machine.store(0, 0x320, 0x30);
    machine.store(0, 0x3e0, 0b1011);
    machine.store(0, 0x380, 1_000);
    machine.bench.run_until(400);
    assert_eq!(machine.load(0, 0x390), 600);
    assert!(!machine.local(0).pending());
    machine.bench.run_until(999);
    assert!(!machine.local(0).pending());
    machine.bench.run_until(1_000);
    assert_eq!(machine.drain(0), [0x30]);
    assert_eq!(machine.load(0, 0x390), 0);
    machine.bench.run_until(10_000);
    assert!(!machine.local(0).pending());
    // Divided by 16, stopped half-way.
    machine.store(0, 0x3e0, 0b0011);
    machine.store(0, 0x380, 1_000);
    machine.bench.run_until(18_000);
    assert_eq!(machine.load(0, 0x390), 500);
    machine.store(0, 0x380, 0);
    machine.bench.run_until(100_000);
    assert!(!machine.local(0).pending());
}

#[test]
fn changing_the_divisor_keeps_the_count() {
    let machine = machine(1);
    machine.store(0, 0x320, 0x30);
    machine.store(0, 0x3e0, 0b1011);
    machine.store(0, 0x380, 1_000);
    machine.bench.run_until(500);
    machine.store(0, 0x3e0, 0b0000);
    assert_eq!(machine.load(0, 0x390), 500);
    machine.bench.run_until(1_499);
    assert!(!machine.local(0).pending());
    machine.bench.run_until(1_500);
    assert!(machine.local(0).pending());
}

#[test]
fn periodic_goes_on_and_does_not_pile_up() {
    let machine = machine(1);
    machine.store(0, 0x320, 0x2_0030);
    machine.store(0, 0x3e0, 0b1011);
    machine.store(0, 0x380, 1_000_000);
    for period in 1..=3 {
        machine.bench.run_until(period * 1_000_000 - 1);
        assert!(!machine.local(0).pending());
        machine.bench.run_until(period * 1_000_000);
        assert_eq!(machine.drain(0), [0x30]);
    }
    // A late call is one interrupt, and the phase stays.
    machine.bench.clock.set(5_500_000);
    assert_eq!(machine.load(0, 0x390), 500_000);
    machine.bench.timers.fire_due();
    assert_eq!(machine.drain(0), [0x30]);
    machine.bench.run_until(5_999_999);
    assert!(!machine.local(0).pending());
    machine.bench.run_until(6_000_000);
    assert!(machine.local(0).pending());
}

#[test]
fn a_tiny_period_does_not_burn_the_host() {
    let machine = machine(1);
    machine.store(0, 0x320, 0x2_0030);
    machine.store(0, 0x3e0, 0b1011);
    machine.store(0, 0x380, 1);
    let mut wakes = 0;
    while let Some(next) = machine.bench.timers.next_deadline() {
        if next > 10_000_000 {
            break;
        }
        machine.bench.clock.set(next);
        machine.bench.timers.fire_due();
        wakes += 1;
    }
    assert!((1..=200).contains(&wakes), "{wakes} wakes in 10 ms");
}

#[test]
fn tsc_deadline_fires_once_at_its_time() {
    let machine = machine(1);
    assert_eq!(machine.wrmsr(0, DEADLINE, 5_000), Some(()));
    assert_eq!(
        machine.rdmsr(0, DEADLINE),
        Some(0),
        "ignored in other modes"
    );
    machine.store(0, 0x320, 0x4_0030);
    machine.wrmsr(0, DEADLINE, 5_001).unwrap();
    assert_eq!(machine.rdmsr(0, DEADLINE), Some(5_001));
    machine.store(0, 0x380, 7);
    assert_eq!(machine.load(0, 0x390), 0);
    machine.bench.run_until(2_500);
    assert!(!machine.local(0).pending(), "half a nanosecond is missing");
    machine.bench.run_until(2_501);
    assert_eq!(machine.drain(0), [0x30]);
    assert_eq!(machine.rdmsr(0, DEADLINE), Some(0));
    // Past: at once. Zero: never.
    machine.wrmsr(0, DEADLINE, 1).unwrap();
    assert_eq!(machine.drain(0), [0x30]);
    machine.wrmsr(0, DEADLINE, 50_000).unwrap();
    machine.wrmsr(0, DEADLINE, 0).unwrap();
    machine.bench.run_until(100_000);
    assert!(!machine.local(0).pending());
    // Leaving the mode disarms.
    machine.wrmsr(0, DEADLINE, 300_000).unwrap();
    machine.store(0, 0x320, 0x30);
    machine.bench.run_until(1_000_000);
    assert!(!machine.local(0).pending());
    // The far future does not overflow.
    machine.store(0, 0x320, 0x4_0030);
    machine.wrmsr(0, DEADLINE, u64::MAX).unwrap();
    assert!(!machine.local(0).pending());
}

struct External(AtomicBool);

impl ExternalInterrupts for External {
    fn acknowledge(&self) -> u8 {
        self.0.store(true, Ordering::SeqCst);
        0x08
    }
}

#[test]
fn the_8259_comes_through_lint0() {
    let machine = machine(2);
    let external = Arc::new(External(AtomicBool::new(false)));
    let weak: Weak<External> = Arc::downgrade(&external);
    machine.apics.connect_external(weak);
    let local = machine.local(0);
    machine.apics.set_pin(0, 0, true);
    assert!(!local.pending(), "masked after reset");
    machine.signals[0].interrupted();
    machine.apics.enter_virtual_wire_mode();
    assert!(local.pending());
    assert_eq!(local.acknowledge(), Some(0x08));
    assert!(external.0.load(Ordering::SeqCst));
    machine.apics.set_pin(0, 0, false);
    assert!(!local.pending());
    machine.signals[0].interrupted();
    machine.apics.set_pin(0, 0, true);
    assert!(machine.signals[0].interrupted());
    machine.store(0, 0x350, 0x1_0700);
    assert!(!local.pending());
    // Switched off, the pin is INTR.
    machine.wrmsr(0, BASE, 0xfee0_0100).unwrap();
    assert!(local.pending());
    machine.store(0, 0x360, 0x400);
}

#[test]
fn lint_pins_deliver_what_their_entries_say() {
    let machine = machine(1);
    machine.store(0, 0x360, 0x400);
    machine.apics.set_pin(0, 1, true);
    assert_eq!(machine.signals[0].take(), ["nmi"]);
    // A level-triggered fixed interrupt asks again after its EOI.
    machine.store(0, 0x350, 0x8041);
    machine.apics.set_pin(0, 0, true);
    assert_eq!(machine.load(0, 0x350), 0xc041);
    let local = machine.local(0);
    assert_eq!(local.acknowledge(), Some(0x41));
    machine.store(0, 0xb0, 0);
    assert_eq!(local.acknowledge(), Some(0x41));
    machine.apics.set_pin(0, 0, false);
    machine.store(0, 0xb0, 0);
    assert!(!local.pending());
    assert_eq!(machine.load(0, 0x350), 0x8041);
}

#[test]
fn the_page_survives_odd_accesses() {
    let machine = machine(1);
    let mut wide = [0xaa; 8];
    machine.page.read(Initiator::Vcpu(0), 0x30, &mut wide);
    assert_eq!(wide, [0x14, 0, 5, 0, 0, 0, 0, 0]);
    let mut byte = [0];
    machine.page.read(Initiator::Vcpu(0), 0x32, &mut byte);
    assert_eq!(byte, [5]);
    machine.page.read(Initiator::Vcpu(9), 0x30, &mut byte);
    machine.page.read(Initiator::Other, 0x30, &mut byte);
    assert_eq!(byte, [0xff]);
    for offset in 0..0x1000 {
        for size in 0..=8 {
            machine
                .page
                .read(Initiator::Vcpu(0), offset, &mut wide[..size]);
            machine
                .page
                .write(Initiator::Vcpu(0), offset, &wide[..size]);
        }
    }
}

#[test]
fn posting_races_lose_nothing() {
    let machine = machine(2);
    let apics = &machine.apics;
    let local = machine.local(1);
    let mut taken = 0u32;
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || {
            for round in 0..20_000u32 {
                let vector = 0x20 + (round % 0xc0) as u8;
                while !apics.apics[1].requested.insert(vector) {
                    std::hint::spin_loop();
                }
            }
        });
        while taken < 20_000 {
            if local.acknowledge().is_some() {
                taken += 1;
                apics.end_of_interrupt(1);
            } else if sender.is_finished() && !local.pending() {
                break;
            }
        }
    });
    assert_eq!(taken, 20_000);
}

#[test]
fn what_the_guest_does_comes_after_an_end_that_has_passed() {
    // The service has not called yet in any of these.
    let machine = machine(1);
    let late = |by: u64| {
        let clock = &machine.bench.clock;
        clock.set(machine.bench.timers.now() + by);
    };
    machine.store(0, 0x3e0, 0b1011);
    machine.store(0, 0x320, 0x1_0030);
    machine.store(0, 0x380, 1_000);
    late(2_000);
    machine.store(0, 0x320, 0x30);
    machine.bench.timers.fire_due();
    assert!(!machine.local(0).pending(), "it ended masked");

    machine.store(0, 0x380, 1_000);
    late(2_000);
    machine.store(0, 0x320, 0x1_0030);
    assert_eq!(machine.drain(0), [0x30], "it ended before the mask");

    machine.store(0, 0x320, 0x30);
    machine.store(0, 0x380, 1_000);
    late(2_000);
    assert_eq!(machine.load(0, 0x390), 0);
    assert_eq!(machine.drain(0), [0x30], "zero has been seen");
    machine.bench.timers.fire_due();
    assert!(!machine.local(0).pending());

    machine.store(0, 0x380, 1_000);
    late(2_000);
    machine.store(0, 0x380, 0);
    assert_eq!(machine.drain(0), [0x30], "it ended before it was stopped");

    machine.store(0, 0x320, 0x4_0030);
    let deadline = 2 * machine.bench.timers.now() + 1_000;
    machine.wrmsr(0, DEADLINE, deadline).unwrap();
    late(2_000);
    assert_eq!(machine.rdmsr(0, DEADLINE), Some(0));
    assert_eq!(machine.drain(0), [0x30]);

    machine
        .wrmsr(0, DEADLINE, 2 * machine.bench.timers.now() + 1_000)
        .unwrap();
    late(2_000);
    machine.store(0, 0xf0, 0xff);
    assert_eq!(machine.drain(0), [0x30], "it ended before the APIC did");
}
