//! IRET in all modes (SDM vol. 2, "IRET/IRETD/IRETQ").

use iced_x86::{Code, Instruction};
use trapline_x86::control::rflags;
use trapline_x86::descriptor::Selector;
use trapline_x86::state::InterruptShadow;
use trapline_x86::{CpuState, Exception, Gpr, Mode, SegmentRegister};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::segments::{descriptor as descriptors, load};
use crate::step::stack::access::Stack;
use crate::step::transfer::far_return::{self as returns, virtual_segment};
use crate::step::transfer::task;
use crate::step::{Executed, Flow, events};

/// Flags that any IRET may change.
const ANYONE: u64 = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;

/// IRET, IRETD or IRETQ.
///
/// # Errors
/// #GP, #SS, #NP, #TS, page faults, restart.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let size = match instr.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        _ => 8,
    };
    let returned = match core.cpu.mode() {
        Mode::Real => real(core, size),
        Mode::Virtual8086 if core.cpu.iopl() < 3 => Err(Exception::general_protection(0).into()),
        Mode::Virtual8086 => real(core, size),
        _ => {
            let next = events::next_rip(core.cpu, instr.len());
            protected(core, size, next)
        }
    };
    // Even one that faults (SDM vol. 3, 6.7.1).
    if !matches!(returned, Err(Fault::Restart)) {
        core.cpu.nmi_blocked = false;
    }
    returned?;
    core.cpu.shadow = InterruptShadow::None;
    Ok(Flow::Jump)
}

/// The flags after an IRET of `size` bytes at privilege `cpl` that popped `popped`.
fn merged_flags(cpu: &CpuState, popped: u64, size: usize) -> u64 {
    let mut changeable = ANYONE;
    if size > 2 {
        changeable |= rflags::RF | rflags::AC | rflags::ID;
    }
    if cpu.cpl() <= cpu.iopl() {
        changeable |= rflags::IF;
    }
    if cpu.cpl() == 0 {
        changeable |= rflags::IOPL;
        if size > 2 {
            changeable |= rflags::VIF | rflags::VIP;
        }
    }
    cpu.rflags & !changeable | popped & changeable | rflags::ONE
}

/// Real mode, and virtual-8086 mode with IOPL 3.
fn real<E: Environment>(core: &mut Core<'_, E>, size: usize) -> Executed {
    let mut stack = Stack::current(core.cpu);
    let rip = stack.pop(core, size)?;
    let cs = stack.pop(core, size)? as u16;
    let popped = stack.pop(core, size)?;
    if rip > u64::from(core.cpu.cs().limit) {
        return Err(Exception::general_protection(0).into());
    }
    let cpu = &mut *core.cpu;
    let mut changeable = ANYONE | rflags::IF;
    if size > 2 {
        changeable |= rflags::RF | rflags::AC | rflags::ID;
    }
    if cpu.mode() == Mode::Real {
        changeable |= rflags::IOPL;
    }
    stack.commit_pointer(cpu);
    returns::enter_real_code(cpu, cs, rip);
    cpu.rflags = cpu.rflags & !changeable | popped & changeable | rflags::ONE;
    Ok(Flow::Jump)
}

/// Protected, compatibility and 64-bit mode; `next` is behind the instruction.
fn protected<E: Environment>(core: &mut Core<'_, E>, size: usize, next: u64) -> Executed {
    if core.cpu.rflags & rflags::NT != 0 {
        if core.cpu.long_mode() {
            return Err(Exception::general_protection(0).into());
        }
        task::return_to_caller(core, next)?;
        return Ok(Flow::Jump);
    }
    let mut stack = Stack::current(core.cpu);
    let rip = stack.pop(core, size)?;
    let selector = Selector(stack.pop(core, size)? as u16);
    let popped = stack.pop(core, size)?;
    let to_virtual = size == 4 && popped & rflags::VM != 0 && !core.cpu.long_mode();
    if to_virtual && core.cpu.cpl() == 0 {
        return to_virtual_8086(core, stack, rip, selector.0, popped);
    }
    // The outer stack is popped before the checks: they must not depend on it being there when
    // it is not used, so compatibility mode pops it only for an outer return.
    let (code, cs) = returns::code_segment(core, selector)?;
    let level = cs.rpl();
    let long_code = returns::is_long_code(core.cpu, &cs);
    let from_long = core.cpu.mode() == Mode::Long64;
    let outer_stack = if from_long || level != core.cpu.cpl() {
        let pointer = stack.pop(core, size)?;
        let ss = Selector(stack.pop(core, size)? as u16);
        Some((load::stack_segment(core, ss, level, long_code)?, pointer))
    } else {
        None
    };
    let rip = returns::check_target(core.cpu, &cs, rip)?;
    descriptors::mark_accessed(core, &code)?;
    let cpu = &mut *core.cpu;
    cpu.rflags = merged_flags(cpu, popped, size);
    match outer_stack {
        Some((ss, pointer)) => returns::set_outer_stack(cpu, ss, pointer, long_code, 0),
        None => stack.commit_pointer(cpu),
    }
    returns::enter_code(cpu, cs, rip);
    Ok(Flow::Jump)
}

/// From privilege 0 of protected mode to virtual-8086 mode.
fn to_virtual_8086<E: Environment>(
    core: &mut Core<'_, E>,
    mut stack: Stack,
    rip: u64,
    cs: u16,
    popped: u64,
) -> Executed {
    let pointer = stack.pop(core, 4)?;
    let mut selectors = [0; 5];
    for selector in &mut selectors {
        *selector = stack.pop(core, 4)? as u16;
    }
    let cpu = &mut *core.cpu;
    use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
    for (s, selector) in [Ss, Es, Ds, Fs, Gs].into_iter().zip(selectors) {
        *cpu.segment_mut(s) = virtual_segment(selector);
    }
    *cpu.segment_mut(Cs) = virtual_segment(cs);
    cpu.rflags = popped & 0x003f_7fd7 | rflags::VM | rflags::ONE;
    cpu.cpl = 3;
    cpu.set_gpr(Gpr::Rsp, pointer);
    cpu.rip = rip & 0xffff;
    Ok(Flow::Jump)
}
