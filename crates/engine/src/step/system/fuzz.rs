//! Whatever bytes and registers a guest has, executing them ends in a result, not in a panic.

use iced_x86::{Decoder, DecoderOptions};
use trapline_x86::control::{cr0, cr4, efer, rflags};
use trapline_x86::segment::Rights;
use trapline_x86::{Exception, SegmentRegister};

use crate::access::Fault;
use crate::step::events::Event;
use crate::step::tests_support::*;

/// A xorshift generator: the same cases every time.
struct Cases(u64);

impl Cases {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }
    /// Small, at an edge, or anything.
    fn value(&mut self) -> u64 {
        match self.next() % 6 {
            0 => self.next() % 0x80,
            1 => self.next() % RAM as u64,
            2 => (0x7fff_ffff_fff0 + self.next() % 32) & !(self.next() % 2),
            3 => u64::MAX - self.next() % 32,
            4 => 0xffff_fff0 + self.next() % 32,
            _ => self.next(),
        }
    }
}

/// Opcodes with most of the system instructions behind them.
const OPENINGS: &[&[u8]] = &[
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x0f, 0x20],
    &[0x0f, 0x21],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0x0f, 0xb2],
    &[0x48, 0x0f, 0xae],
    &[0x48, 0x0f, 0xc7],
    &[0x66, 0x0f, 0x38, 0x82],
    &[0xf3, 0x6c],
    &[0xf3, 0x6f],
    &[0x8e],
    &[0x9a],
    &[0xea],
    &[0xff],
    &[0xca],
    &[0xcb],
    &[0xcd],
    &[0xcf],
    &[0x48, 0xcf],
    &[0x9d],
    &[0x1f],
    &[0xc4],
    &[0x62],
];

fn disturb(rig: &mut Rig, cases: &mut Cases) {
    for r in 0..16 {
        rig.cpu.gpr[r] = cases.value();
    }
    if cases.one_in(3) {
        rig.set_level(3);
    }
    rig.cpu.rflags = cases.next() & 0x3f_7fd5 | rflags::ONE;
    if rig.is_long() || cases.one_in(2) {
        rig.cpu.rflags &= !rflags::VM;
    }
    if rig.cpu.rflags & rflags::VM != 0 {
        rig.cpu.cpl = 3;
    }
    for _ in 0..4 {
        let at = cases.next() as usize % 0x10;
        rig.write64(GDT + 8 * at as u64, cases.value());
        let at = cases.next() % 0x200;
        rig.write64(IDT + 8 * at, cases.value());
        rig.write64(TSS + cases.next() % 0x100, cases.value());
        rig.write64(cases.next() % (RAM as u64 - 8), cases.value());
    }
    let s = cases.next() as usize % 6;
    if s != SegmentRegister::Cs as usize && cases.one_in(2) {
        rig.cpu.seg[s].base = cases.value();
        rig.cpu.seg[s].limit = cases.value() as u32;
        rig.cpu.seg[s].rights = Rights(cases.next() as u32 & 0x1_f0ff);
    }
    if cases.one_in(4) {
        rig.cpu.tr.base = cases.value();
        rig.cpu.tr.limit = cases.value() as u32;
        rig.cpu.gdtr.base = cases.value();
        rig.cpu.idtr.base = cases.value();
    }
    rig.cpu.cr0 |= cases.next() & (cr0::TS | cr0::AM | cr0::WP);
    rig.cpu.cr4 |= cases.next() & (cr4::UMIP | cr4::FSGSBASE | cr4::PCIDE | cr4::DE);
    rig.cpu.xcr0 = [1, 3, 7, 0xe7][cases.next() as usize % 4];
    rig.cpu.efer |= cases.next() & efer::SCE;
    rig.cpu.dr7 |= cases.next() & 0xffff_2003;
    if cases.one_in(2) {
        rig.cpu.rip = cases.value();
    }
}

#[test]
fn nothing_panics() {
    let mut cases = Cases(0x1234_5678_9abc_def1);
    let fresh: [fn() -> Rig; 3] = [Rig::real, Rig::protected, Rig::long];
    let mut executed = 0;
    let mut rigs = fresh.map(|new| new());
    for n in 0..60_000 {
        let which = n % 3;
        let mut bytes = [0; 15];
        bytes.iter_mut().for_each(|b| *b = cases.next() as u8);
        let opening = OPENINGS[cases.next() as usize % OPENINGS.len()];
        bytes[..opening.len()].copy_from_slice(opening);
        let rig = &mut rigs[which];
        if n % 300 < 3 {
            *rig = fresh[which]();
        }
        let initial = fresh_registers(which);
        rig.cpu = initial;
        disturb(rig, &mut cases);
        let bits = rig.cpu.mode().bits();
        let instr = Decoder::with_ip(bits, &bytes, rig.cpu.rip, DecoderOptions::NONE).decode();
        if instr.is_invalid() || !crate::step::handles(&instr) {
            continue;
        }
        executed += 1;
        let result = crate::step::execute(&mut rig.core(), &instr);
        let event = match result {
            Err(Fault::Exception(e)) => Event::Exception(e),
            _ => match cases.next() % 3 {
                0 => Event::Interrupt(cases.next() as u8),
                1 => Event::Nmi,
                _ => Event::Exception(Exception::page_fault(cases.value(), 2)),
            },
        };
        let _ = rig.raise(event);
    }
    assert!(executed > 20_000, "{executed}");
}

/// The registers of a new rig, without its memory.
fn fresh_registers(which: usize) -> trapline_x86::CpuState {
    use std::sync::OnceLock;
    static REGISTERS: OnceLock<[trapline_x86::CpuState; 3]> = OnceLock::new();
    REGISTERS.get_or_init(|| [Rig::real().cpu, Rig::protected().cpu, Rig::long().cpu])[which]
        .clone()
}
