//! SYSCALL, SYSRET, SYSENTER, SYSEXIT (SDM vol. 2; APM vol. 2, 6.1).

use iced_x86::{Code, Instruction, Mnemonic};
use trapline_x86::control::{cr0, efer, rflags};
use trapline_x86::segment::Rights;
use trapline_x86::{CpuState, Exception, Gpr, Mode, Segment, SegmentRegister};

use super::{Executed, Flow, events};
use crate::access::Core;
use crate::env::Environment;

/// Rights of a flat, present, accessed, readable code segment of privilege 0 without a size.
const CODE: u32 = 0x809b;
/// Rights of a flat, present, accessed, writable data segment of privilege 0.
const DATA: u32 = 0xc093;

/// Executes one of the four.
///
/// # Errors
/// #UD, #GP.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    match instr.mnemonic() {
        Mnemonic::Syscall => syscall(core, instr),
        Mnemonic::Sysret | Mnemonic::Sysretq => sysret(core, instr),
        Mnemonic::Sysenter => sysenter(core),
        _ => sysexit(core, instr),
    }
}

/// Whether CPUID names AMD (or its licensee) as the vendor: some rules differ.
fn is_amd<E: Environment>(core: &mut Core<'_, E>) -> bool {
    let [_, ebx, _, _] = core.env.cpuid(core.cpu, 0, 0);
    matches!(&ebx.to_le_bytes(), b"Auth" | b"Hygo")
}

/// Loads CS and SS with the fixed, flat attributes that these instructions give them.
fn load_flat(cpu: &mut CpuState, cs: u16, ss: u16, level: u8, size: u32) {
    let flat = |selector: u16, rights: u32| Segment {
        base: 0,
        limit: 0xffff_ffff,
        rights: Rights(rights).with_dpl(level),
        selector: selector & !3 | u16::from(level),
    };
    *cpu.segment_mut(SegmentRegister::Cs) = flat(cs, CODE | size);
    *cpu.segment_mut(SegmentRegister::Ss) = flat(ss, DATA);
    cpu.cpl = level;
}

fn syscall<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let mode = core.cpu.mode();
    if core.cpu.efer & efer::SCE == 0 || !events::is_protected(core.cpu) {
        return Err(Exception::invalid_opcode().into());
    }
    if mode != Mode::Long64 && !is_amd(core) {
        return Err(Exception::invalid_opcode().into());
    }
    let next = events::next_rip(core.cpu, instr.len());
    let cpu = &mut *core.cpu;
    let star = cpu.msr.star;
    let cs = (star >> 32) as u16 & !3;
    cpu.set_gpr(Gpr::Rcx, next);
    if cpu.long_mode() {
        cpu.set_gpr(Gpr::R11, cpu.rflags & !rflags::RF);
        cpu.rip = if mode == Mode::Long64 {
            cpu.msr.lstar
        } else {
            cpu.msr.cstar
        };
        cpu.rflags = cpu.rflags & !cpu.msr.sfmask & !rflags::RF | rflags::ONE;
        load_flat(cpu, cs, cs.wrapping_add(8), 0, Rights::L);
    } else {
        cpu.rip = star & 0xffff_ffff;
        cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
        load_flat(cpu, cs, cs.wrapping_add(8), 0, Rights::DB);
    }
    Ok(Flow::Jump)
}

fn sysret<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let mode = core.cpu.mode();
    if core.cpu.efer & efer::SCE == 0 || !events::is_protected(core.cpu) {
        return Err(Exception::invalid_opcode().into());
    }
    if mode != Mode::Long64 && !is_amd(core) {
        return Err(Exception::invalid_opcode().into());
    }
    if core.cpu.cpl() != 0 {
        return Err(Exception::general_protection(0).into());
    }
    let to_long = instr.code() == Code::Sysretq;
    let rcx = core.cpu.gpr(Gpr::Rcx);
    // Intel's processors fault before they leave privilege 0, AMD's behind it.
    if to_long && !CpuState::is_canonical(rcx) && !is_amd(core) {
        return Err(Exception::general_protection(0).into());
    }
    let cpu = &mut *core.cpu;
    let base = (cpu.msr.star >> 48) as u16;
    let ss = base.wrapping_add(8);
    if cpu.long_mode() {
        cpu.rflags = cpu.gpr(Gpr::R11) & 0x003c_7fd7 | rflags::ONE;
    } else {
        cpu.rflags |= rflags::IF;
    }
    if to_long {
        cpu.rip = rcx;
        load_flat(cpu, base.wrapping_add(16), ss, 3, Rights::L);
    } else {
        cpu.rip = rcx & 0xffff_ffff;
        load_flat(cpu, base, ss, 3, Rights::DB);
    }
    Ok(Flow::Jump)
}

/// AMD's processors have SYSENTER and SYSEXIT outside long mode only.
fn check_fast_entry<E: Environment>(core: &mut Core<'_, E>) -> Result<(), Exception> {
    if core.cpu.long_mode() && is_amd(core) {
        return Err(Exception::invalid_opcode());
    }
    if core.cpu.cr0 & cr0::PE == 0 || core.cpu.msr.sysenter_cs & 0xfffc == 0 {
        return Err(Exception::general_protection(0));
    }
    Ok(())
}

fn sysenter<E: Environment>(core: &mut Core<'_, E>) -> Executed {
    check_fast_entry(core)?;
    let cpu = &mut *core.cpu;
    let cs = cpu.msr.sysenter_cs as u16;
    let long = cpu.long_mode();
    let width = if long { u64::MAX } else { 0xffff_ffff };
    cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    cpu.rip = cpu.msr.sysenter_eip & width;
    cpu.set_gpr(Gpr::Rsp, cpu.msr.sysenter_esp & width);
    load_flat(
        cpu,
        cs,
        cs.wrapping_add(8),
        0,
        if long { Rights::L } else { Rights::DB },
    );
    Ok(Flow::Jump)
}

fn sysexit<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    // AMD's processors too raise #GP first.
    if core.cpu.cpl() != 0 {
        return Err(Exception::general_protection(0).into());
    }
    check_fast_entry(core)?;
    let to_long = instr.code() == Code::Sysexitq;
    let cpu = &mut *core.cpu;
    let (rip, rsp) = (cpu.gpr(Gpr::Rdx), cpu.gpr(Gpr::Rcx));
    if to_long && !(CpuState::is_canonical(rip) && CpuState::is_canonical(rsp)) {
        return Err(Exception::general_protection(0).into());
    }
    let cs = cpu.msr.sysenter_cs as u16;
    if to_long {
        cpu.rip = rip;
        cpu.set_gpr(Gpr::Rsp, rsp);
        load_flat(cpu, cs.wrapping_add(32), cs.wrapping_add(40), 3, Rights::L);
    } else {
        cpu.rip = rip & 0xffff_ffff;
        cpu.set_gpr(Gpr::Rsp, rsp & 0xffff_ffff);
        load_flat(cpu, cs.wrapping_add(16), cs.wrapping_add(24), 3, Rights::DB);
    }
    Ok(Flow::Jump)
}
