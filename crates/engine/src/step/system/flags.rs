//! RFLAGS: CLI, STI, CLAC, STAC, PUSHF, POPF (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};
use trapline_x86::control::rflags;
use trapline_x86::state::InterruptShadow;
use trapline_x86::{Exception, Mode};

use crate::access::Core;
use crate::env::Environment;
use crate::step::stack;
use crate::step::system::general_protection;
use crate::step::{Executed, Flow};

/// Executes one of them.
///
/// # Errors
/// #GP, #SS, #UD, page faults, restart.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    match instr.mnemonic() {
        Mnemonic::Cli | Mnemonic::Sti if core.cpu.cpl() > core.cpu.iopl() => general_protection(),
        Mnemonic::Cli => {
            core.cpu.rflags &= !rflags::IF;
            Ok(Flow::Next)
        }
        Mnemonic::Sti => {
            if !core.cpu.interrupts_enabled() {
                core.cpu.shadow = InterruptShadow::Sti;
            }
            core.cpu.rflags |= rflags::IF;
            Ok(Flow::Leave)
        }
        Mnemonic::Clac | Mnemonic::Stac => {
            if core.cpu.cpl() != 0 {
                return Err(Exception::invalid_opcode().into());
            }
            core.cpu.rflags &= !rflags::AC;
            if instr.mnemonic() == Mnemonic::Stac {
                core.cpu.rflags |= rflags::AC;
            }
            Ok(Flow::Leave)
        }
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => push_flags(core, instr),
        _ => pop_flags(core, instr),
    }
}

/// Bytes of a PUSHF or POPF.
fn size(instr: &Instruction) -> usize {
    match instr.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Popf => 2,
        Mnemonic::Pushfd | Mnemonic::Popfd => 4,
        _ => 8,
    }
}

fn push_flags<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    if core.cpu.mode() == Mode::Virtual8086 && core.cpu.iopl() < 3 {
        return general_protection();
    }
    let value = core.cpu.rflags & !(rflags::RF | rflags::VM) | rflags::ONE;
    stack::push(core, size(instr), value)?;
    Ok(Flow::Next)
}

fn pop_flags<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let cpu = &core.cpu;
    let virtual_mode = cpu.mode() == Mode::Virtual8086;
    if virtual_mode && cpu.iopl() < 3 {
        return general_protection();
    }
    let size = size(instr);
    let mut changeable = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if cpu.cpl() <= cpu.iopl() {
        changeable |= rflags::IF;
    }
    if cpu.cpl() == 0 {
        changeable |= rflags::IOPL;
    }
    if size > 2 {
        changeable |= rflags::AC | rflags::ID;
    }
    let popped = stack::pop(core, size)?;
    let cpu = &mut *core.cpu;
    // RF is cleared whatever was popped.
    let kept = cpu.rflags & !changeable & !if size > 2 { rflags::RF } else { 0 };
    cpu.rflags = kept | popped & changeable | rflags::ONE;
    Ok(Flow::Leave)
}
