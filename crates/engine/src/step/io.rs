//! IN, OUT, INS, OUTS (SDM vol. 1, chapter 19).

use iced_x86::{Instruction, Mnemonic, OpKind};
use trapline_x86::control::{cr0, rflags};
use trapline_x86::descriptor::SystemType;
use trapline_x86::descriptor::tss::tss32::IOMAP_BASE;
use trapline_x86::{CpuState, Exception, Gpr, Mode, SegmentRegister};

use super::address::{mask, memory_segment, register_value, set_register, set_sized};
use super::{Executed, Flow, address};
use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::tlb::{Access, Privilege};

/// Iterations of a repeated instruction between two polls for interrupts.
const ITERATIONS: u32 = 256;

/// Executes one of them.
///
/// # Errors
/// #GP, #SS, page faults, restart.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    match instr.mnemonic() {
        Mnemonic::In => {
            let to = instr.op0_register();
            let port = port_operand(core.cpu, instr, 1);
            check_permission(core, port, to.size())?;
            let value = core.env.port_read(port, to.size() as u8);
            set_register(core.cpu, to, u64::from(value));
            Ok(Flow::Next)
        }
        Mnemonic::Out => {
            let from = instr.op1_register();
            let port = port_operand(core.cpu, instr, 0);
            check_permission(core, port, from.size())?;
            let value = register_value(core.cpu, from) as u32;
            core.env.port_write(port, from.size() as u8, value);
            // The device may have raised or lowered an interrupt, or stopped the machine.
            Ok(Flow::Leave)
        }
        _ => string(core, instr),
    }
}

fn port_operand(cpu: &CpuState, instr: &Instruction, operand: u32) -> u16 {
    match instr.op_kind(operand) {
        OpKind::Immediate8 => u16::from(instr.immediate8()),
        _ => cpu.gpr(Gpr::Rdx) as u16,
    }
}

/// IOPL, then the I/O permission bitmap (SDM vol. 1, 19.5).
///
/// # Errors
/// #GP(0), page faults, restart.
fn check_permission<E: Environment>(
    core: &mut Core<'_, E>,
    port: u16,
    size: usize,
) -> Result<(), Fault> {
    let cpu = &core.cpu;
    let virtual_mode = cpu.mode() == Mode::Virtual8086;
    if cpu.cr0 & cr0::PE == 0 || (!virtual_mode && cpu.cpl() <= cpu.iopl()) {
        return Ok(());
    }
    let denied = || Err(Exception::general_protection(0).into());
    let tr = cpu.tr;
    let limit = u64::from(tr.limit);
    let wide = matches!(
        SystemType::of(tr.rights.kind(), false),
        Some(SystemType::TssBusy | SystemType::TssAvailable)
    );
    if tr.rights.is_unusable() || !wide || limit < IOMAP_BASE + 1 {
        return denied();
    }
    let base = core.read::<2>(tr.base.wrapping_add(IOMAP_BASE), Privilege::Supervisor)?;
    let at = base + u64::from(port / 8);
    // Two bytes are read always: the ports may straddle a byte.
    if at + 1 > limit {
        return denied();
    }
    let bits = core.read::<2>(tr.base.wrapping_add(at), Privilege::Supervisor)?;
    if bits >> (port & 7) & mask(size as u32) != 0 {
        return denied();
    }
    Ok(())
}

/// The address size in bits of a string instruction, from its implicit operand.
fn index_bits(kind: OpKind) -> u32 {
    match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 16,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 32,
        _ => 64,
    }
}

/// INS and OUTS, repeated or not.
fn string<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let (input, size) = match instr.mnemonic() {
        Mnemonic::Insb => (true, 1),
        Mnemonic::Insw => (true, 2),
        Mnemonic::Insd => (true, 4),
        Mnemonic::Outsb => (false, 1),
        Mnemonic::Outsw => (false, 2),
        _ => (false, 4),
    };
    let bits = index_bits(instr.op_kind(u32::from(!input)));
    let port = core.cpu.gpr(Gpr::Rdx) as u16;
    let repeated = instr.has_rep_prefix() || instr.has_repne_prefix();
    check_permission(core, port, size)?;
    if repeated && core.cpu.gpr(Gpr::Rcx) & mask(bits) == 0 {
        return Ok(Flow::Next);
    }
    // A debug trap comes behind every iteration.
    let most = if core.cpu.rflags & rflags::TF != 0 {
        1
    } else {
        ITERATIONS
    };
    for _ in 0..most {
        if input {
            input_one(core, port, size, bits)?;
        } else {
            output_one(core, memory_segment(core.cpu, instr), port, size, bits)?;
        }
        if !repeated {
            return Ok(Flow::Leave);
        }
        let left = core.cpu.gpr(Gpr::Rcx).wrapping_sub(1) & mask(bits);
        set_sized(core.cpu, Gpr::Rcx, bits, left);
        if left == 0 {
            return Ok(Flow::Leave);
        }
        if core.data_breakpoints != 0 {
            break;
        }
    }
    // It goes on where its registers say.
    Ok(Flow::Again)
}

/// Moves an index register by `size` in the direction of RFLAGS.DF.
fn step(cpu: &mut CpuState, register: Gpr, size: usize, bits: u32) {
    let old = cpu.gpr(register);
    let new = if cpu.rflags & rflags::DF != 0 {
        old.wrapping_sub(size as u64)
    } else {
        old.wrapping_add(size as u64)
    };
    set_sized(cpu, register, bits, new);
}

fn input_one<E: Environment>(
    core: &mut Core<'_, E>,
    port: u16,
    size: usize,
    bits: u32,
) -> Result<(), Fault> {
    let offset = core.cpu.gpr(Gpr::Rdi) & mask(bits);
    let linear = address::linear_for(core, SegmentRegister::Es, offset, size, Access::Write)?;
    let privilege = Privilege::of_data(core.cpu);
    core.check_alignment(linear, size, privilege)?;
    // The port is read only when the value has somewhere to go: reading may have an effect.
    core.probe_write(linear, size, privilege)?;
    let value = core.env.port_read(port, size as u8);
    core.write_bytes_committed(linear, &value.to_le_bytes()[..size], privilege)?;
    step(core.cpu, Gpr::Rdi, size, bits);
    Ok(())
}

fn output_one<E: Environment>(
    core: &mut Core<'_, E>,
    segment: SegmentRegister,
    port: u16,
    size: usize,
    bits: u32,
) -> Result<(), Fault> {
    let offset = core.cpu.gpr(Gpr::Rsi) & mask(bits);
    let linear = address::linear_for(core, segment, offset, size, Access::Read)?;
    let value = core.read_sized(linear, size, Privilege::of_data(core.cpu))?;
    core.env.port_write(port, size as u8, value as u32);
    step(core.cpu, Gpr::Rsi, size, bits);
    Ok(())
}
