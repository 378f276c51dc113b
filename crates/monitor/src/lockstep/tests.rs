//! That a difference is found, and random blocks without one.
//!
//! `TRAPLINE_BLOCKS` says how many pieces of translated code are compared, `TRAPLINE_SEED` from
//! which seed; a failure prints the seed that repeats it.
#![allow(unsafe_code)]

use std::sync::Arc;

use trapline_engine::translate::Context;
use trapline_memory::GuestMemory;
use trapline_trace::{Actor, TraceSystem, VcpuId};
use trapline_x86::control::{cr0, cr4, efer};
use trapline_x86::cpuid::{CpuidConfig, CpuidModel};
use trapline_x86::paging::entry::{P, RW, US};
use trapline_x86::segment::Rights;
use trapline_x86::state::Activity;
use trapline_x86::{CpuState, Gpr, Segment, SegmentRegister};

use crate::debug::Breakpoints;
use crate::fetch::Wanted;
use crate::shadow_pages::tests::Nothing;
use crate::signals::Signals;
use crate::surroundings::Surroundings;
use crate::vcpu::{Execution, Vcpu};

const PAGE: u64 = 4096;
const RAM: u64 = 4 << 20;
/// Linear and guest-physical: code, then data. Every fourth page of the data is absent, every
/// fourth read-only.
const CODE: u64 = 0x8_0000;
const CODE_PAGES: u64 = 8;
const DATA: u64 = 0x10_0000;
const DATA_PAGES: u64 = 16;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
    fn pick(&mut self, from: &[u8]) -> u8 {
        from[self.below(from.len() as u64) as usize]
    }
}

struct Rig {
    vcpu: Vcpu,
    memory: Arc<GuestMemory>,
    trace: Arc<TraceSystem>,
    template: CpuState,
}

impl Rig {
    /// A VCPU in 64-bit mode at this privilege level.
    fn new(level: u8) -> Self {
        let memory = Arc::new(GuestMemory::new(RAM).unwrap());
        let trace = Arc::new(TraceSystem::new(1, memory.clone()));
        let cpuid = Arc::new(CpuidModel::from_host(CpuidConfig {
            vcpus: 1,
            tsc_khz: None,
            apic_bus_khz: None,
        }));
        let id = VcpuId::new(0);
        let around = Surroundings::new(
            id,
            Arc::clone(&trace),
            Arc::clone(&memory),
            Arc::new(Nothing),
            Arc::new(Nothing),
            cpuid,
        );
        let signals = Signals::new(Arc::clone(&trace), id, Arc::new(Breakpoints::default()));
        let template = template(level);
        let cpu = template.clone();
        let vcpu = Vcpu::new(cpu, around, Arc::new(signals), true, Execution::Lockstep).unwrap();
        let rig = Self {
            vcpu,
            memory,
            trace,
            template,
        };
        let all = P | RW | US;
        rig.write(0x1000, &(0x2000 | all).to_le_bytes());
        rig.write(0x2000, &(0x3000 | all).to_le_bytes());
        rig.write(0x3000, &(0x4000 | all).to_le_bytes());
        for page in 0..CODE_PAGES {
            rig.map(CODE + page * PAGE, all);
        }
        for page in 0..DATA_PAGES {
            match page % 4 {
                1 => {}
                3 => rig.map(DATA + page * PAGE, P | US),
                _ => rig.map(DATA + page * PAGE, all),
            }
        }
        rig
    }

    fn map(&self, linear: u64, bits: u64) {
        self.write(0x4000 + linear / PAGE * 8, &(linear | bits).to_le_bytes());
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        assert!(self.memory.write(&self.trace, Actor::Debugger, gpa, bytes));
    }

    /// Compares one piece of code, or steps an instruction; whether the VCPU can go on by itself.
    fn go(&mut self) -> bool {
        if !self.vcpu.may_run_translated() {
            return false;
        }
        self.vcpu.run_lockstep();
        self.vcpu.surroundings.boundary(&mut self.vcpu.tlb);
        self.vcpu.undelivered.take().is_none()
            && self.vcpu.cpu.activity == Activity::Active
            && self.vcpu.difference().is_none()
    }
}

fn template(level: u8) -> CpuState {
    let mut cpu = CpuState::reset();
    cpu.cr0 = cr0::PG | cr0::PE | cr0::WP | cr0::ET | cr0::NE;
    cpu.cr3 = 0x1000;
    cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXSAVE | cr4::OSXMMEXCPT;
    cpu.efer = efer::LME | efer::LMA | efer::SCE;
    cpu.xcr0 = 7;
    let segment = |selector, rights| Segment {
        base: 0,
        limit: 0xffff_ffff,
        rights: Rights(rights).with_dpl(level),
        selector,
    };
    for seg in &mut cpu.seg {
        *seg = segment(0x23, 0xc093);
    }
    cpu.seg[SegmentRegister::Cs as usize] = segment(0x08 | u16::from(level), 0xa09b);
    cpu.cpl = level;
    cpu.rip = CODE;
    cpu.set_gpr(Gpr::Rsp, DATA + PAGE / 2);
    cpu
}

/// Runs `code` with RAX clear and RBX leading to data, after its translation was made from
/// `translated`, which is just as long.
fn run_wrongly(code: &[u8], translated: &[u8]) -> Rig {
    let mut rig = Rig::new(3);
    rig.write(CODE, translated);
    rig.vcpu.cpu.set_gpr(Gpr::Rbx, DATA);
    let context = Context::of(&rig.vcpu.cpu);
    rig.vcpu.fetch(Wanted::Translated(context, false)).unwrap();
    // Behind the back of the trace.
    let place = rig.memory.host_address(CODE).unwrap();
    for (n, &byte) in code.iter().enumerate() {
        // SAFETY: guest RAM of another page than its end, and nothing runs.
        unsafe { place.add(n).write(byte) };
    }
    for _ in 0..4 {
        if !rig.go() {
            break;
        }
    }
    rig
}

/// add $1,%rax; mov %rax,(%rbx); jmp to itself.
const CODE_RIGHT: [u8; 9] = [0x48, 0x83, 0xc0, 0x01, 0x48, 0x89, 0x03, 0xeb, 0xfe];

#[test]
fn equal_results_are_no_difference() {
    let rig = run_wrongly(&CODE_RIGHT, &CODE_RIGHT);
    assert!(rig.vcpu.difference().is_none());
    let statistics = rig.vcpu.statistics().lockstep.unwrap();
    assert!(statistics.compared > 0, "{statistics:?}");
    assert_eq!(rig.memory.read_u64(DATA), Some(1));
}

#[test]
fn a_wrong_translation_is_found() {
    let mut wrong = CODE_RIGHT;
    wrong[3] = 2;
    let rig = run_wrongly(&CODE_RIGHT, &wrong);
    let difference = rig.vcpu.difference().unwrap();
    let text = difference.to_string();
    assert!(text.contains("rax:"), "{text}");
    assert!(text.contains("translated 0x2"), "{text}");
    assert!(text.contains("stepped    0x1"), "{text}");
    assert!(text.contains("$1,%rax"), "{text}");
    let place = difference.memory[0];
    assert_eq!((place.gpa, place.first[0], place.second[0]), (DATA, 2, 1));
}

#[test]
fn every_kind_of_result_is_compared() {
    let pairs: [(&str, &[u8], &[u8]); 5] = [
        ("flag", &[0xf8, 0x90, 0xeb, 0xfe], &[0xf9, 0x90, 0xeb, 0xfe]),
        ("way", &[0xeb, 0x02, 0x90, 0x90], &[0xeb, 0x04, 0x90, 0x90]),
        // pcmpeqd %xmm0,%xmm0 and pxor %xmm0,%xmm0
        (
            "vector",
            &[0x66, 0x0f, 0x76, 0xc0, 0xeb, 0xfe],
            &[0x66, 0x0f, 0xef, 0xc0, 0xeb, 0xfe],
        ),
        // movb $1,(%rbx) and movb $1,2(%rbx), which both store
        (
            "place",
            &[0xc6, 0x43, 0x00, 0x01, 0xeb, 0xfe],
            &[0xc6, 0x43, 0x02, 0x01, 0xeb, 0xfe],
        ),
        // A store that is not made.
        (
            "store",
            &[0xc6, 0x43, 0x00, 0x01, 0xeb, 0xfe],
            &[0x0f, 0x1f, 0x40, 0x00, 0xeb, 0xfe],
        ),
    ];
    for (name, right, wrong) in pairs {
        let rig = run_wrongly(right, wrong);
        assert!(rig.vcpu.difference().is_some(), "{name}");
    }
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.trim().parse().ok()
}

/// ModRM (with SIB and displacement) of a memory operand near a register, or of a register.
fn operand(random: &mut Random, code: &mut Vec<u8>, memory: bool) {
    let register = (random.below(8) as u8) << 3;
    if !memory {
        code.push(0xc0 | register | random.below(8) as u8);
        return;
    }
    match random.below(8) {
        0 => {
            // RIP-relative, into the data from anywhere in the code, or nearby.
            code.push(register | 5);
            let distance = DATA - CODE + random.below(8 * PAGE) - 4 * PAGE;
            code.extend_from_slice(&(distance as i32).to_le_bytes());
        }
        1 => {
            // Base, index and scale.
            code.push(0x40 | register | 4);
            code.push(random.next() as u8);
            code.push(random.next() as u8);
        }
        2 => {
            code.push(0x80 | register | random.pick(&[0, 1, 2, 3, 5, 6, 7]));
            let displacement = random.below(4 * PAGE) as i32 - 2 * PAGE as i32;
            code.extend_from_slice(&displacement.to_le_bytes());
        }
        _ => {
            code.push(0x40 | register | random.pick(&[0, 1, 2, 3, 5, 6, 7]));
            code.push(random.next() as u8);
        }
    }
}

/// Appends an instruction; where it lies in its page matters for branches.
fn instruction(random: &mut Random, code: &mut Vec<u8>) {
    const ARITHMETIC: [u8; 40] = [
        0x00, 0x01, 0x02, 0x03, 0x08, 0x09, 0x0a, 0x0b, 0x10, 0x11, 0x12, 0x13, 0x18, 0x19, 0x1a,
        0x1b, 0x20, 0x21, 0x22, 0x23, 0x28, 0x29, 0x2a, 0x2b, 0x30, 0x31, 0x32, 0x33, 0x38, 0x39,
        0x3a, 0x3b, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b,
    ];
    const OTHERS: [u8; 40] = [
        0x40, 0x42, 0x44, 0x45, 0x4c, 0x4f, 0x94, 0x95, 0x9c, 0xa3, 0xab, 0xa5, 0xad, 0xaf, 0xb0,
        0xb1, 0xb6, 0xb7, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0x10, 0x11, 0x28, 0x29, 0x54, 0x57,
        0x58, 0x59, 0x5c, 0x6f, 0x7f, 0xd4, 0xef, 0xfe, 0xeb, 0xc6,
    ];
    let memory = random.chance(60);
    let rex = |random: &mut Random, code: &mut Vec<u8>| {
        if random.chance(60) {
            code.push(0x40 | random.below(16) as u8);
        }
    };
    match random.below(20) {
        0..=7 => {
            if random.chance(10) {
                code.push(0x66);
            } else if memory && random.chance(5) {
                code.push(0xf0);
            }
            rex(random, code);
            code.push(random.pick(&ARITHMETIC));
            operand(random, code, memory);
        }
        8..=10 => {
            let prefixed = random.chance(50);
            if prefixed {
                code.push(random.pick(&[0x66, 0xf2, 0xf3]));
            }
            rex(random, code);
            code.push(0x0f);
            code.push(random.pick(&OTHERS));
            operand(random, code, memory);
        }
        11 => {
            // Immediate forms, shifts, and groups 3 to 5.
            rex(random, code);
            let opcode = random.pick(&[0x80, 0x83, 0xc0, 0xc1, 0xd1, 0xd3, 0xf6, 0xf7, 0xfe, 0xff]);
            code.push(opcode);
            operand(random, code, memory);
            if matches!(opcode, 0x80 | 0x83 | 0xc0 | 0xc1) {
                code.push(random.next() as u8);
            }
        }
        12 => {
            rex(random, code);
            code.push(random.pick(&[0x50, 0x53, 0x55, 0x57, 0x58, 0x5b, 0x5d, 0x5e]));
        }
        13..=14 => {
            // Conditional, unconditional and call, not far.
            match random.below(6) {
                0 => code.extend([0xeb, random.next() as u8]),
                1 => {
                    code.push(random.pick(&[0xe8, 0xe9]));
                    let distance = random.below(2 * PAGE) as i32 - PAGE as i32;
                    code.extend_from_slice(&distance.to_le_bytes());
                }
                _ => code.extend([0x70 | random.below(16) as u8, random.next() as u8]),
            }
        }
        15 => match random.below(4) {
            0 => code.push(0xc3),
            1 => {
                code.push(0xff);
                operand_of_branch(random, code);
            }
            2 => code.extend([random.pick(&[0xe0, 0xe1, 0xe2, 0xe3]), random.next() as u8]),
            _ => code.push(0xc9),
        },
        16 => {
            // LEA.
            rex(random, code);
            code.push(0x8d);
            operand(random, code, true);
        }
        17 => {
            if random.chance(50) {
                code.push(random.pick(&[0xf2, 0xf3]));
            }
            rex(random, code);
            code.push(random.pick(&[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf]));
        }
        18 => code.push(random.pick(&[
            0xf5, 0xf8, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd, 0x9c, 0x9d, 0x9e, 0x9f, 0x90, 0x98, 0x99,
            0xcc, 0xf4,
        ])),
        _ => (0..1 + random.below(6)).for_each(|_| code.push(random.next() as u8)),
    }
}

fn operand_of_branch(random: &mut Random, code: &mut Vec<u8>) {
    let way = random.pick(&[2, 4, 6]) << 3;
    if random.chance(50) {
        code.push(0xc0 | way | random.below(8) as u8);
    } else {
        code.push(0x40 | way | random.pick(&[0, 1, 2, 3, 5, 6, 7]));
        code.push(random.next() as u8);
    }
}

/// Registers that lead to data more often than not: near the edges of pages, to code too.
fn registers(random: &mut Random, cpu: &mut CpuState) {
    for n in 0..16 {
        cpu.gpr[n] = match random.below(10) {
            0 if random.chance(20) => random.next(),
            1 if random.chance(30) => random.below(256),
            2 if random.chance(30) => CODE + random.below(CODE_PAGES * PAGE),
            3 => DATA + random.below(DATA_PAGES * PAGE),
            4 | 5 => DATA + random.below(DATA_PAGES + 1) * PAGE + random.below(160) - 80,
            // Where loads and stores work.
            _ => DATA + random.below(DATA_PAGES / 4) * 4 * PAGE + random.below(PAGE),
        };
    }
    if random.chance(80) {
        cpu.gpr[4] = DATA + PAGE / 2;
    }
    if random.chance(80) {
        // Else strings are long.
        cpu.gpr[1] = random.below(64);
    }
    cpu.rflags = 2 | random.next() & 0x8d5 | u64::from(random.chance(10)) << 10;
    for register in cpu.vector.zmm.iter_mut().take(16) {
        for byte in &mut register.0[..32] {
            *byte = random.next() as u8;
        }
    }
}

#[test]
fn random_blocks_are_equal() {
    const BATCH: u64 = 20_000;
    let wanted = number("TRAPLINE_BLOCKS").unwrap_or(20_000);
    let first = number("TRAPLINE_SEED").unwrap_or(1);
    let mut total = crate::statistics::LockstepStatistics::default();
    let mut faults = 0u64;
    let mut seed = first;
    while total.compared < wanted {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut rig = Rig::new(if seed.is_multiple_of(2) { 0 } else { 3 });
        let mut code = Vec::new();
        let mut starts = Vec::new();
        while code.len() < (CODE_PAGES * PAGE) as usize - 32 {
            starts.push(CODE + code.len() as u64);
            instruction(&mut random, &mut code);
        }
        code.truncate((CODE_PAGES * PAGE) as usize);
        rig.write(CODE, &code);
        let data: Vec<u8> = (0..DATA_PAGES * PAGE)
            .map(|_| random.next() as u8)
            .collect();
        rig.write(DATA, &data);
        for _ in 0..BATCH {
            if rig.vcpu.statistics().lockstep.unwrap().compared + total.compared >= wanted
                && total.compared + BATCH > wanted
            {
                break;
            }
            *rig.vcpu.cpu = rig.template.clone();
            rig.vcpu.tlb.flush_all();
            registers(&mut random, &mut rig.vcpu.cpu);
            rig.vcpu.cpu.rip = starts[random.below(starts.len() as u64) as usize];
            for _ in 0..4 {
                if !rig.go() {
                    faults += 1;
                    break;
                }
            }
            if let Some(difference) = rig.vcpu.difference() {
                panic!("TRAPLINE_SEED={seed} repeats it:\n{difference}");
            }
        }
        let done = rig.vcpu.statistics().lockstep.unwrap();
        total.compared += done.compared;
        total.instructions += done.instructions;
        total.alone += done.alone;
        total.given_up += done.given_up;
        seed += 1;
    }
    println!(
        "seeds {first} to {}: {total:?}, {faults} ended by a fault or a halt",
        seed - 1
    );
    assert!(total.compared >= wanted && total.given_up < total.compared / 4);
}
