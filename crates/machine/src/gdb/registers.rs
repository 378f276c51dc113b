//! Between the registers of a VCPU and those of gdb's x86-64 description.

use gdbstub_arch::x86::reg::X86_64CoreRegs;
use trapline_x86::{CpuState, Gpr, SegmentRegister};

/// gdb's order of the general-purpose registers.
const ORDER: [Gpr; 16] = [
    Gpr::Rax,
    Gpr::Rbx,
    Gpr::Rcx,
    Gpr::Rdx,
    Gpr::Rsi,
    Gpr::Rdi,
    Gpr::Rbp,
    Gpr::Rsp,
    Gpr::R8,
    Gpr::R9,
    Gpr::R10,
    Gpr::R11,
    Gpr::R12,
    Gpr::R13,
    Gpr::R14,
    Gpr::R15,
];

/// Where ST0 lies in an FXSAVE image, and how far apart the registers are.
const ST: usize = 32;
const ST_STRIDE: usize = 16;

pub fn read(cpu: &CpuState, regs: &mut X86_64CoreRegs) {
    for (to, from) in regs.regs.iter_mut().zip(ORDER) {
        *to = cpu.gpr(from);
    }
    regs.rip = cpu.rip;
    regs.eflags = cpu.rflags as u32;
    let selector = |s| u32::from(cpu.segment(s).selector);
    regs.segments.cs = selector(SegmentRegister::Cs);
    regs.segments.ss = selector(SegmentRegister::Ss);
    regs.segments.ds = selector(SegmentRegister::Ds);
    regs.segments.es = selector(SegmentRegister::Es);
    regs.segments.fs = selector(SegmentRegister::Fs);
    regs.segments.gs = selector(SegmentRegister::Gs);
    for (n, st) in regs.st.iter_mut().enumerate() {
        let at = ST + ST_STRIDE * n;
        st.copy_from_slice(&cpu.vector.x87.0[at..at + 10]);
    }
    for (to, from) in regs.xmm.iter_mut().zip(&cpu.vector.zmm) {
        let mut low = [0; 16];
        low.copy_from_slice(&from.0[..16]);
        *to = u128::from_le_bytes(low);
    }
    regs.mxcsr = cpu.vector.mxcsr;
}

/// Takes over what a debugger may change: general-purpose registers, RIP, the flags and XMM.
/// Selectors keep their hidden parts, so they are not changed.
pub fn write(regs: &X86_64CoreRegs, cpu: &mut CpuState) {
    for (from, to) in regs.regs.iter().zip(ORDER) {
        cpu.set_gpr(to, *from);
    }
    cpu.rip = regs.rip;
    cpu.rflags = u64::from(regs.eflags) | trapline_x86::control::rflags::ONE;
    for (from, to) in regs.xmm.iter().zip(&mut cpu.vector.zmm) {
        to.0[..16].copy_from_slice(&from.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_round_trip() {
        let mut cpu = CpuState::reset();
        for (n, r) in cpu.gpr.iter_mut().enumerate() {
            *r = 0x1000 + n as u64;
        }
        cpu.vector.zmm[3].0[..16].fill(7);
        let mut regs = X86_64CoreRegs::default();
        read(&cpu, &mut regs);
        assert_eq!(regs.regs[1], 0x1000 + Gpr::Rbx as u64);
        assert_eq!(regs.segments.cs, 0xf000);
        let mut other = CpuState::reset();
        write(&regs, &mut other);
        assert_eq!(other.gpr, cpu.gpr);
        assert_eq!(other.vector.zmm[3].0[..16], [7; 16]);
    }
}
