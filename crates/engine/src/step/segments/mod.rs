//! Instructions on segment registers and descriptor tables (SDM vol. 3, chapters 2, 3 and 5).

pub mod descriptor;
pub mod load;
#[cfg(test)]
mod tests;

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use trapline_x86::control::{cr0, cr4, rflags};
use trapline_x86::descriptor::{Selector, SystemType};
use trapline_x86::segment::TableRegister;
use trapline_x86::state::InterruptShadow;
use trapline_x86::{CpuState, Exception, Mode, SegmentRegister};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::address::{self, register_value, segment_register, set_register};
use crate::step::segments::descriptor::{self as descriptors, Descriptor};
use crate::step::stack;
use crate::step::stack::access::Stack;
use crate::step::{Executed, Flow, events, transfer};
use crate::tlb::{Access, Privilege};

/// Executes one of them.
///
/// # Errors
/// #UD, #GP, #NP, #SS, page faults, restart.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    match instr.mnemonic() {
        Mnemonic::Mov => mov(core, instr),
        Mnemonic::Push => push(core, instr),
        Mnemonic::Pop => pop(core, instr),
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
            load_far_pointer(core, instr)
        }
        Mnemonic::Lldt | Mnemonic::Ltr => load_system_segment(core, instr),
        Mnemonic::Sldt | Mnemonic::Str => store_system_segment(core, instr),
        Mnemonic::Sgdt | Mnemonic::Sidt => store_table(core, instr),
        Mnemonic::Lgdt | Mnemonic::Lidt => load_table(core, instr),
        Mnemonic::Lar | Mnemonic::Lsl => load_from_descriptor(core, instr),
        Mnemonic::Verr | Mnemonic::Verw => verify(core, instr),
        Mnemonic::Arpl => adjust_rpl(core, instr),
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            segment_base(core, instr)
        }
        _ => swap_gs(core),
    }
}

/// #GP(0) above privilege 0.
///
/// # Errors
/// #GP(0).
pub fn require_kernel(cpu: &CpuState) -> Result<(), Exception> {
    if cpu.cpl() == 0 {
        Ok(())
    } else {
        Err(Exception::general_protection(0))
    }
}

/// CR4.UMIP forbids user code to see where system structures lie.
fn check_umip(cpu: &CpuState) -> Result<(), Exception> {
    if cpu.umip() && cpu.cpl() != 0 {
        Err(Exception::general_protection(0))
    } else {
        Ok(())
    }
}

/// A 16-bit register or memory operand.
///
/// # Errors
/// #GP, #SS, page faults, restart.
pub fn read_operand16<E: Environment>(
    core: &mut Core<'_, E>,
    instr: &Instruction,
    operand: u32,
) -> Result<u16, Fault> {
    if instr.op_kind(operand) == OpKind::Register {
        return Ok(register_value(core.cpu, instr.op_register(operand)) as u16);
    }
    let linear = address::linear(core, instr, 2, Access::Read)?;
    Ok(core.read::<2>(linear, Privilege::of_data(core.cpu))? as u16)
}

/// Stores to the first operand: all of a register, 16 bits of memory.
///
/// # Errors
/// #GP, #SS, page faults, restart.
pub fn write_operand16<E: Environment>(
    core: &mut Core<'_, E>,
    instr: &Instruction,
    value: u64,
) -> Executed {
    if instr.op0_kind() == OpKind::Register {
        set_register(core.cpu, instr.op0_register(), value);
        return Ok(Flow::Next);
    }
    let linear = address::linear(core, instr, 2, Access::Write)?;
    core.write::<2>(linear, value, Privilege::of_data(core.cpu))?;
    Ok(Flow::Next)
}

/// Loads a segment register.
fn load<E: Environment>(
    core: &mut Core<'_, E>,
    register: SegmentRegister,
    selector: u16,
) -> Executed {
    *core.cpu.segment_mut(register) = load::segment(core, register, selector)?;
    Ok(if register == SegmentRegister::Ss {
        Flow::Leave
    } else {
        Flow::Next
    })
}

fn mov<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    if matches!(
        instr.code(),
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg
    ) {
        let selector = core
            .cpu
            .segment(segment_register(instr.op1_register()))
            .selector;
        return write_operand16(core, instr, u64::from(selector));
    }
    if instr.op0_register() == Register::CS {
        return Err(Exception::invalid_opcode().into());
    }
    let register = segment_register(instr.op0_register());
    let selector = read_operand16(core, instr, 1)?;
    let flow = load(core, register, selector)?;
    if register == SegmentRegister::Ss {
        core.cpu.shadow = InterruptShadow::MovSs;
    }
    Ok(flow)
}

/// The operand size in bytes of a PUSH or POP of a segment register.
fn push_size(code: Code) -> usize {
    use Code::*;
    match code {
        Pushw_ES | Pushw_CS | Pushw_SS | Pushw_DS | Pushw_FS | Pushw_GS | Popw_ES | Popw_CS
        | Popw_SS | Popw_DS | Popw_FS | Popw_GS => 2,
        Pushq_FS | Pushq_GS | Popq_FS | Popq_GS => 8,
        _ => 4,
    }
}

fn push<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let selector = core
        .cpu
        .segment(segment_register(instr.op0_register()))
        .selector;
    stack::push(core, push_size(instr.code()), u64::from(selector))?;
    Ok(Flow::Next)
}

fn pop<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let register = segment_register(instr.op0_register());
    let mut stack = Stack::current(core.cpu);
    let selector = stack.pop(core, push_size(instr.code()))? as u16;
    let flow = load(core, register, selector)?;
    // The width of the stack pointer was that of the old SS.
    stack.commit_pointer(core.cpu);
    if register == SegmentRegister::Ss {
        core.cpu.shadow = InterruptShadow::MovSs;
    }
    Ok(flow)
}

fn load_far_pointer<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let to = instr.op0_register();
    let (selector, offset) = transfer::far_pointer(core, instr, to.size())?;
    let register = match instr.mnemonic() {
        Mnemonic::Lds => SegmentRegister::Ds,
        Mnemonic::Les => SegmentRegister::Es,
        Mnemonic::Lfs => SegmentRegister::Fs,
        Mnemonic::Lgs => SegmentRegister::Gs,
        _ => SegmentRegister::Ss,
    };
    let flow = load(core, register, selector)?;
    set_register(core.cpu, to, offset);
    Ok(flow)
}

fn load_system_segment<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    if !events::is_protected(core.cpu) {
        return Err(Exception::invalid_opcode().into());
    }
    require_kernel(core.cpu)?;
    let selector = Selector(read_operand16(core, instr, 0)?);
    if instr.mnemonic() == Mnemonic::Lldt {
        core.cpu.ldtr = load::local_table(core, selector)?;
    } else {
        core.cpu.tr = load::task_register(core, selector)?;
    }
    Ok(Flow::Next)
}

fn store_system_segment<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    if !events::is_protected(core.cpu) {
        return Err(Exception::invalid_opcode().into());
    }
    check_umip(core.cpu)?;
    let segment = if instr.mnemonic() == Mnemonic::Sldt {
        core.cpu.ldtr
    } else {
        core.cpu.tr
    };
    write_operand16(core, instr, u64::from(segment.selector))
}

fn store_table<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    check_umip(core.cpu)?;
    let table = if instr.mnemonic() == Mnemonic::Sgdt {
        core.cpu.gdtr
    } else {
        core.cpu.idtr
    };
    let len = if core.cpu.mode() == Mode::Long64 {
        10
    } else {
        6
    };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let linear = address::linear(core, instr, len, Access::Write)?;
    core.check_alignment(linear, 4, Privilege::of_data(core.cpu))?;
    core.write_bytes(linear, &bytes[..len], Privilege::of_data(core.cpu))?;
    Ok(Flow::Next)
}

fn load_table<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    require_kernel(core.cpu)?;
    let (len, base_mask) = match (core.cpu.mode(), instr.code()) {
        (Mode::Long64, _) => (10, u64::MAX),
        (_, Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) => (6, 0xff_ffff),
        _ => (6, 0xffff_ffff),
    };
    let mut bytes = [0; 10];
    let linear = address::linear(core, instr, len, Access::Read)?;
    core.read_bytes(linear, &mut bytes[..len], Privilege::of_data(core.cpu))?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let base = bytes[2..]
        .iter()
        .rev()
        .fold(0, |base, b| base << 8 | u64::from(*b))
        & base_mask;
    if !CpuState::is_canonical(base) {
        return Err(Exception::general_protection(0).into());
    }
    let table = TableRegister { base, limit };
    if instr.mnemonic() == Mnemonic::Lgdt {
        core.cpu.gdtr = table;
    } else {
        core.cpu.idtr = table;
    }
    Ok(Flow::Next)
}

/// The descriptor that LAR, LSL, VERR or VERW looks at, if its privilege permits.
fn visible_descriptor<E: Environment>(
    core: &mut Core<'_, E>,
    selector: Selector,
) -> Result<Option<Descriptor>, Fault> {
    if selector.is_null() {
        return Ok(None);
    }
    let Some(found) = descriptors::lookup(core, selector)? else {
        return Ok(None);
    };
    let lowest = core.cpu.cpl().max(selector.rpl());
    let visible = found.rights().is_conforming() || found.dpl() >= lowest;
    Ok(visible.then_some(found))
}

fn set_zero_flag(cpu: &mut CpuState, zero: bool) {
    cpu.rflags = cpu.rflags & !rflags::ZF | if zero { rflags::ZF } else { 0 };
}

fn load_from_descriptor<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    if !events::is_protected(core.cpu) {
        return Err(Exception::invalid_opcode().into());
    }
    let selector = Selector(read_operand16(core, instr, 1)?);
    let long = core.cpu.long_mode();
    let limit = instr.mnemonic() == Mnemonic::Lsl;
    let found = visible_descriptor(core, selector)?.filter(|found| {
        use SystemType::*;
        !found.is_system()
            || match found.system_type(long) {
                Some(Ldt | TssAvailable | TssBusy | Tss16Available | Tss16Busy) => true,
                Some(CallGate | CallGate16 | TaskGate) => !limit,
                _ => false,
            }
    });
    if let Some(found) = found {
        let value = if limit {
            u64::from(found.limit())
        } else {
            found.raw.0 >> 32 & 0x00ff_ff00
        };
        set_register(core.cpu, instr.op0_register(), value);
    }
    set_zero_flag(core.cpu, found.is_some());
    Ok(Flow::Next)
}

fn verify<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    if !events::is_protected(core.cpu) {
        return Err(Exception::invalid_opcode().into());
    }
    let selector = Selector(read_operand16(core, instr, 0)?);
    let found = visible_descriptor(core, selector)?;
    let verified = found.is_some_and(|found| match instr.mnemonic() {
        Mnemonic::Verr => found.rights().is_readable(),
        _ => found.rights().is_writable_data(),
    });
    set_zero_flag(core.cpu, verified);
    Ok(Flow::Next)
}

fn adjust_rpl<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    if !events::is_protected(core.cpu) {
        return Err(Exception::invalid_opcode().into());
    }
    let old = read_operand16(core, instr, 0)?;
    let rpl = register_value(core.cpu, instr.op1_register()) as u16 & 3;
    let raise = old & 3 < rpl;
    if raise {
        let value = old & !3 | rpl;
        if instr.op0_kind() == OpKind::Register {
            let full = register_value(core.cpu, instr.op0_register()) & !0xffff;
            set_register(core.cpu, instr.op0_register(), full | u64::from(value));
        } else {
            write_operand16(core, instr, u64::from(value))?;
        }
    }
    set_zero_flag(core.cpu, raise);
    Ok(Flow::Next)
}

fn segment_base<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let cpu = &mut *core.cpu;
    if cpu.mode() != Mode::Long64 || cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(Exception::invalid_opcode().into());
    }
    let segment = match instr.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => SegmentRegister::Fs,
        _ => SegmentRegister::Gs,
    };
    let register = instr.op0_register();
    if matches!(instr.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        let base = cpu.segment(segment).base;
        set_register(cpu, register, base);
    } else {
        let base = register_value(cpu, register);
        if !CpuState::is_canonical(base) {
            return Err(Exception::general_protection(0).into());
        }
        cpu.segment_mut(segment).base = base;
    }
    Ok(Flow::Next)
}

fn swap_gs<E: Environment>(core: &mut Core<'_, E>) -> Executed {
    let cpu = &mut *core.cpu;
    if cpu.mode() != Mode::Long64 {
        return Err(Exception::invalid_opcode().into());
    }
    require_kernel(cpu)?;
    let gs = &mut cpu.seg[SegmentRegister::Gs as usize];
    std::mem::swap(&mut gs.base, &mut cpu.msr.kernel_gs_base);
    Ok(Flow::Next)
}

/// SMSW.
///
/// # Errors
/// #GP, #SS, page faults, restart.
pub fn store_machine_status<E: Environment>(
    core: &mut Core<'_, E>,
    instr: &Instruction,
) -> Executed {
    check_umip(core.cpu)?;
    write_operand16(core, instr, core.cpu.cr0)
}

/// LMSW: the value for CR0. It can set PE but not clear it.
///
/// # Errors
/// #GP, #SS, page faults, restart.
pub fn machine_status<E: Environment>(
    core: &mut Core<'_, E>,
    instr: &Instruction,
) -> Result<u64, Fault> {
    require_kernel(core.cpu)?;
    let value = u64::from(read_operand16(core, instr, 0)?);
    let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    Ok(core.cpu.cr0 & !(low & !cr0::PE) | value & low)
}
