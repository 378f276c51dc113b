//! The device on a small board, with its thread.

use std::time::{Duration, Instant};

use trapline_memory::GuestMemory;
use trapline_monitor::interrupt::LocalInterrupts;
use trapline_trace::{Kind, Range, Sense, TraceSystem, VcpuId, VcpuSet};

use super::*;
use crate::board::Board;

struct Rig {
    board: Board,
    port: DmaPort,
    probe: Arc<DmaProbe>,
    _thread: DmaThread,
}

const RAM: u64 = 64 * PAGE;

impl Rig {
    fn new() -> Self {
        let board = Board::new();
        let memory = Arc::new(GuestMemory::new(RAM).unwrap());
        let trace = Arc::new(TraceSystem::new(1, memory.clone()));
        let port = DmaPort { memory, trace };
        let probe = DmaProbe::new(board.lines.clone());
        let thread = probe.spawn(port.clone()).unwrap();
        Self {
            board,
            port,
            probe,
            _thread: thread,
        }
    }

    fn set(&self, offset: u64, value: u64) {
        self.probe
            .write(Initiator::Vcpu(0), offset, &value.to_le_bytes());
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.probe.read(Initiator::Vcpu(0), offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Runs one command to its end; the status.
    fn copy(&self, source: u64, destination: u64, length: u32, command: u32) -> u32 {
        self.set(0x08, source);
        self.set(0x10, destination);
        // Length and command in one store, as a driver may.
        self.set(0x18, u64::from(length) | u64::from(command) << 32);
        let start = Instant::now();
        while self.get(0x20) & 0xff == 1 {
            assert!(start.elapsed() < Duration::from_secs(60), "never done");
            std::thread::yield_now();
        }
        self.get(0x20)
    }

    fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        assert!(self.port.memory.read(gpa, &mut data));
        data
    }

    fn fill(&self, gpa: u64, data: &[u8]) {
        let DmaPort { memory, trace } = &self.port;
        assert!(memory.write(trace, trapline_trace::Actor::Debugger, gpa, data));
    }
}

#[test]
fn it_copies_across_pages_at_any_alignment() {
    let rig = Rig::new();
    assert_eq!(rig.get(0), IDENT);
    let data: Vec<u8> = (0..3 * PAGE + 7).map(|n| (n % 251) as u8).collect();
    rig.fill(0x1003, &data);
    let len = data.len() as u32;
    assert_eq!(rig.copy(0x1003, 0x9ffe, len, 1), 2);
    assert_eq!(rig.bytes(0x9ffe, data.len()), data);
    assert_eq!(rig.get(0x24), len);
    assert_eq!(rig.get(0x28), 1);
    assert_eq!(rig.copy(0x1003, 0x9ffe, 0, 1), 2);
    assert_eq!(rig.get(0x24), 0);
    assert_eq!(rig.get(0x28), 2);
}

#[test]
fn hostile_values_fail_and_harm_nothing() {
    let rig = Rig::new();
    rig.fill(RAM - 8, &[7; 8]);
    for (source, destination, length, copied) in [
        (RAM, 0, 1, 0),
        (0, RAM, 1, 0),
        (u64::MAX, 0, 1, 0),
        (u64::MAX - 3, 0, 8, 0),
        (0, u64::MAX, 2, 0),
        (0, BASE, 8, 0),
        (BASE, 0x100, 8, 0),
        (0, 0x100, MAX_LENGTH + 1, 0),
        (0, 0x100, u32::MAX, 0),
        (RAM - 8, 0x100, 16, 8),
        (0x1000, RAM - PAGE, 2 * PAGE as u32, PAGE as u32),
    ] {
        assert_eq!(rig.copy(source, destination, length, 1), 3, "{source:#x}");
        assert_eq!(rig.get(0x24), copied, "{source:#x}");
    }
    assert_eq!(rig.bytes(0x100, 8), [7; 8]);
    // Odd sizes, places and commands.
    rig.probe.write(Initiator::Vcpu(0), 0x1c, &[1]);
    rig.probe.write(Initiator::Vcpu(0), 0x1d, &[1, 0, 0, 0]);
    rig.probe.write(Initiator::Vcpu(0), u64::MAX - 3, &[1; 8]);
    let mut data = [9; 64];
    rig.probe.read(Initiator::Vcpu(0), u64::MAX - 3, &mut data);
    assert_eq!(rig.get(0x28), 11);
}

#[test]
fn the_interrupt_stays_until_taken_back() {
    let rig = Rig::new();
    // Pin 16 to vector 0x61, level-triggered, at the local APIC 0.
    rig.board.redirect(0x10 + 2 * PIN + 1, 0);
    rig.board.redirect(0x10 + 2 * PIN, 0x8061);
    assert_eq!(rig.copy(0, 0x100, 8, 1), 2);
    assert!(rig.board.local().acknowledge().is_none());
    assert_eq!(rig.copy(0, 0x100, 8, 3), 0x102);
    assert_eq!(rig.board.local().acknowledge(), Some(0x61));
    rig.set(0x18, 4 << 32);
    assert_eq!(rig.get(0x20), 2);
}

#[test]
fn its_write_is_an_event() {
    let rig = Rig::new();
    let vcpu = VcpuId::new(0);
    let trace = &rig.port.trace;
    trace
        .establish(
            None,
            VcpuSet::one(vcpu),
            Range::new(0x2100, 0x2110),
            Kind::Code,
            Sense::WRITE,
            0,
            &mut |_| {},
        )
        .unwrap();
    assert_eq!(rig.copy(0x5000, 0x2000, 0x100, 1), 2);
    assert!(!trace.attention(vcpu).pending());
    assert_eq!(rig.copy(0x5000, 0x2000, 0x101, 1), 2);
    assert!(trace.attention(vcpu).pending());
}

#[test]
fn a_busy_device_waits_for_a_running_consumer_and_its_registers_do_not() {
    let rig = Rig::new();
    let vcpu = VcpuId::new(0);
    let trace = &rig.port.trace;
    trace
        .establish(
            None,
            VcpuSet::one(vcpu),
            Range::new(0x2000, 0x2008),
            Kind::Code,
            Sense::WRITE,
            0,
            &mut |_| {},
        )
        .unwrap();
    // This thread plays the VCPU: it executes, and reads the status in between.
    trace.leave_safe(vcpu);
    rig.fill(0x5000, &[1; 8]);
    rig.set(0x08, 0x5000);
    rig.set(0x10, 0x2000);
    rig.set(0x18, 8 | 1 << 32);
    while !trace.attention(vcpu).pending() {
        assert_eq!(rig.get(0x20), 1);
        std::thread::yield_now();
    }
    assert_eq!(rig.get(0x20), 1);
    assert_eq!(rig.bytes(0x2000, 8), [0; 8]);
    let mut notices = 0;
    while rig.get(0x20) == 1 {
        trace.boundary(vcpu, &mut |_| notices += 1);
    }
    trace.boundary(vcpu, &mut |_| notices += 1);
    trace.enter_safe(vcpu);
    assert_eq!(notices, 1);
    assert_eq!(rig.bytes(0x2000, 8), [1; 8]);
}

#[test]
fn a_reset_forgets() {
    let rig = Rig::new();
    assert_eq!(rig.copy(0, 0x100, 8, 3), 0x102);
    rig.probe.reset();
    for offset in (4..0x30).step_by(4) {
        assert_eq!(rig.get(offset), 0, "{offset:#x}");
    }
    assert_eq!(rig.copy(0, 0x100, 8, 1), 2);
}
