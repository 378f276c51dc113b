//! A machine without devices: guest memory, traces, one VCPU that stores and others that consume.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;

use trapline_engine::access::Core;
use trapline_engine::tlb::{Privilege, Tlb};
use trapline_memory::GuestMemory;
use trapline_monitor::interrupt::LocalInterrupts;
use trapline_monitor::platform::Platform;
use trapline_monitor::surroundings::Surroundings;
use trapline_trace::{Actor, Kind, Range, Semantics, Sense, TraceId, TraceSystem, VcpuId, VcpuSet};
use trapline_x86::CpuState;
use trapline_x86::control::{cr0, cr4, efer};
use trapline_x86::cpuid::{CpuidConfig, CpuidModel};

const BYTES: u64 = 256 << 20;
/// Page tables: identical addresses, in pages of 2 MiB.
const TABLES: u64 = 0x1000;
pub const UNTRACED: u64 = 0x20_0000;
pub const TRACED: u64 = 0x20_1000;
/// On the same page.
pub const BESIDE: u64 = TRACED + 0x100;
/// Where other traces lie, four on each page.
const ELSEWHERE: u64 = 0x40_0000;
/// The attention bit that ends a consumer.
const END: u32 = 1 << 31;

const ACTOR: VcpuId = VcpuId::new(0);

struct NoInterrupts;

impl LocalInterrupts for NoInterrupts {
    fn pending(&self) -> bool {
        false
    }
    fn acknowledge(&self) -> Option<u8> {
        None
    }
    fn read_msr(&self, _index: u32) -> Option<u64> {
        None
    }
    fn write_msr(&self, _index: u32, _value: u64, _tsc: u64) -> Option<()> {
        None
    }
    fn task_priority_class(&self) -> u8 {
        0
    }
    fn set_task_priority_class(&self, _class: u8) {}
    fn id(&self) -> u32 {
        0
    }
    fn init(&self) {}
}

struct NoDevices;

impl Platform for NoDevices {
    fn port_read(&self, _vcpu: u8, _port: u16, _size: u8) -> u32 {
        u32::MAX
    }
    fn port_write(&self, _vcpu: u8, _port: u16, _size: u8, _value: u32) {}
    fn device_read(&self, _vcpu: u8, _cookie: u64, _offset: u64, _data: &mut [u8]) {}
    fn device_write(&self, _vcpu: u8, _cookie: u64, _offset: u64, _data: &[u8]) {}
}

pub struct Guest {
    memory: Arc<GuestMemory>,
    trace: Arc<TraceSystem>,
    elsewhere: Vec<TraceId>,
}

impl Guest {
    pub fn new(vcpus: usize) -> Self {
        let memory = Arc::new(GuestMemory::new(BYTES).expect("guest memory"));
        let trace = Arc::new(TraceSystem::new(vcpus, Arc::clone(&memory) as _));
        let entry = |at: u64, value: u64| {
            assert!(memory.write(&trace, Actor::Debugger, at, &value.to_le_bytes()));
        };
        // Present, writable, accessed, dirty.
        entry(TABLES, (TABLES + 0x1000) | 0x63);
        entry(TABLES + 0x1000, (TABLES + 0x2000) | 0x63);
        for n in 0..BYTES >> 21 {
            entry(TABLES + 0x2000 + n * 8, n << 21 | 0xe3);
        }
        Self {
            memory,
            trace,
            elsewhere: Vec::new(),
        }
    }

    pub fn set_semantics(&mut self, kind: Kind, semantics: Semantics) {
        self.trace.set_semantics(kind, semantics);
    }

    /// Traces the 8 bytes at `gpa` for the VCPUs of a bit set.
    pub fn trace(&mut self, gpa: u64, kind: Kind, consumers: u64) -> TraceId {
        let consumers = VcpuSet::from_bits(consumers);
        let range = Range::new(gpa, gpa + 8);
        self.trace
            .establish(None, consumers, range, kind, Sense::WRITE, 0, &mut |_| {})
            .expect("nobody else is there")
    }

    pub fn trace_elsewhere(&mut self, count: u64) {
        for n in 0..count {
            let id = self.trace(ELSEWHERE + n * 0x400, Kind::Code, 1);
            self.elsewhere.push(id);
        }
    }

    pub fn remove_elsewhere(&mut self) {
        for id in self.elsewhere.drain(..) {
            self.trace.remove(ACTOR, id);
        }
    }

    /// The VCPU that stores, running on this thread.
    pub fn actor(&self) -> ActingVcpu {
        let mut cpu = CpuState::reset();
        cpu.cr0 |= cr0::PE | cr0::PG;
        cpu.cr4 |= cr4::PAE;
        cpu.efer |= efer::LME | efer::LMA;
        cpu.cr3 = TABLES;
        let config = CpuidConfig {
            vcpus: 1,
            tsc_khz: None,
            apic_bus_khz: None,
        };
        let surroundings = Surroundings::new(
            ACTOR,
            Arc::clone(&self.trace),
            Arc::clone(&self.memory),
            Arc::new(NoInterrupts),
            Arc::new(NoDevices),
            Arc::new(CpuidModel::from_host(config)),
        );
        self.trace.leave_safe(ACTOR);
        ActingVcpu {
            trace: Arc::clone(&self.trace),
            cpu,
            tlb: Tlb::default(),
            surroundings,
        }
    }
}

pub struct ActingVcpu {
    trace: Arc<TraceSystem>,
    cpu: CpuState,
    tlb: Tlb,
    surroundings: Surroundings,
}

impl ActingVcpu {
    /// One instruction that stores 8 bytes, and the boundary before it.
    #[inline(never)]
    pub fn store(&mut self, linear: u64) {
        if self.trace.attention(ACTOR).pending() {
            self.surroundings.boundary(&mut self.tlb);
        }
        let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.surroundings);
        while core.write::<8>(linear, 7, Privilege::Supervisor).is_err() {}
    }
}

impl ActingVcpu {
    /// As [`Self::store`], after the TLB has forgotten the page.
    #[inline(never)]
    pub fn store_forgotten(&mut self, linear: u64) {
        self.tlb.flush_page(linear);
        self.store(linear);
    }

    /// Misses of the TLB so far that the shadow page tables answered, and walks.
    pub fn misses(&self) -> (u64, u64) {
        let statistics = self.surroundings.shadow.statistics;
        (statistics.hits, statistics.walks)
    }
}

impl Drop for ActingVcpu {
    fn drop(&mut self) {
        self.trace.enter_safe(ACTOR);
    }
}

/// What the consumers do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Running,
    Halted,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Halted => "halted",
        })
    }
}

/// Threads that do what sub-VMMs do at instruction boundaries; they end with this.
pub struct Consumers {
    trace: Arc<TraceSystem>,
    threads: Vec<(Arc<AtomicU64>, JoinHandle<()>)>,
    way: Way,
}

impl Consumers {
    pub fn start(guest: &Guest, count: usize, way: Way) -> Self {
        let trace = Arc::clone(&guest.trace);
        let threads = (1..=count)
            .map(|n| {
                let turns = Arc::new(AtomicU64::new(0));
                let (trace, counted) = (Arc::clone(&trace), Arc::clone(&turns));
                let consumer = move || consume(&trace, VcpuId::new(n), way, &counted);
                (turns, std::thread::spawn(consumer))
            })
            .collect();
        let consumers = Self {
            trace,
            threads,
            way,
        };
        if way == Way::Halted {
            // Until they sleep.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        consumers.go_on();
        consumers
    }

    /// Waits until those that run have executed something since the last event. Whether this
    /// thread gave its processor up meanwhile.
    pub fn go_on(&self) -> bool {
        let mut gave_up = false;
        if self.way == Way::Halted {
            return gave_up;
        }
        for (turns, _) in &self.threads {
            let before = turns.load(Relaxed);
            let mut looks = 0u32;
            while turns.load(Relaxed) < before + 8 {
                looks += 1;
                if looks.is_multiple_of(1000) {
                    std::thread::yield_now();
                    gave_up = true;
                }
                std::hint::spin_loop();
            }
        }
        gave_up
    }
}

fn consume(trace: &TraceSystem, vcpu: VcpuId, way: Way, turns: &AtomicU64) {
    trace.leave_safe(vcpu);
    loop {
        if trace.attention(vcpu).pending() {
            if trace.attention(vcpu).take(END) != 0 {
                break;
            }
            trace.boundary(vcpu, &mut |_| {});
        }
        match way {
            Way::Halted => trace.sleep(vcpu, None),
            Way::Running => turns.store(turns.load(Relaxed) + 1, Relaxed),
        }
    }
    trace.enter_safe(vcpu);
}

impl Drop for Consumers {
    fn drop(&mut self) {
        for n in 1..=self.threads.len() {
            self.trace.raise(VcpuId::new(n), END);
        }
        for (_, thread) in self.threads.drain(..) {
            thread.join().expect("a consumer ends");
        }
    }
}
