//! PUSH, POP and the stack-frame instructions (SDM vol. 1, 6.2).

pub mod access;

use iced_x86::{Instruction, Mnemonic, OpKind as Operand};
use trapline_x86::segment::Rights;
use trapline_x86::{CpuState, Gpr, Mode, SegmentRegister};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::address::mask;
use crate::step::{Executed, Flow, address};
use crate::tlb::{Access, Privilege};

/// The stack-address size in bits (SDM vol. 1, 6.2.3): 64 in 64-bit mode, else by SS.B, which
/// real mode keeps as protected mode left it.
#[inline]
pub fn address_bits(cpu: &CpuState) -> u32 {
    match cpu.mode() {
        Mode::Long64 => 64,
        _ if cpu.ss().rights.has(Rights::DB) => 32,
        _ => 16,
    }
}

/// Adds to the stack pointer, wrapping at the stack-address size.
#[inline]
pub fn add_to_pointer(cpu: &mut CpuState, bytes: u64) {
    let bits = address_bits(cpu);
    let value = cpu.gpr(Gpr::Rsp).wrapping_add(bytes);
    address::set_sized(cpu, Gpr::Rsp, bits, value);
}

/// Reads or writes the stack `distance` bytes from its pointer.
fn linear_at<E: Environment>(
    core: &Core<'_, E>,
    distance: u64,
    bytes: usize,
    access: Access,
) -> Result<u64, Fault> {
    let offset = core.cpu.gpr(Gpr::Rsp).wrapping_add(distance) & mask(address_bits(core.cpu));
    address::linear_for(core, SegmentRegister::Ss, offset, bytes, access)
}

/// Pushes the low `bytes` (2, 4 or 8) of `value`.
#[inline]
pub fn push<E: Environment>(core: &mut Core<'_, E>, bytes: usize, value: u64) -> Result<(), Fault> {
    let distance = (bytes as u64).wrapping_neg();
    let linear = linear_at(core, distance, bytes, Access::Write)?;
    core.write_sized(linear, bytes, value, Privilege::of_data(core.cpu))?;
    add_to_pointer(core.cpu, distance);
    Ok(())
}

/// Raises what a push of `bytes` would.
pub fn probe_push<E: Environment>(core: &mut Core<'_, E>, bytes: usize) -> Result<(), Fault> {
    let linear = linear_at(core, (bytes as u64).wrapping_neg(), bytes, Access::Write)?;
    core.check_alignment(linear, bytes, Privilege::of_data(core.cpu))?;
    core.probe_write(linear, bytes, Privilege::of_data(core.cpu))
}

/// Reads the top of the stack without releasing it.
#[inline]
pub fn peek<E: Environment>(core: &mut Core<'_, E>, bytes: usize) -> Result<u64, Fault> {
    let linear = linear_at(core, 0, bytes, Access::Read)?;
    core.read_sized(linear, bytes, Privilege::of_data(core.cpu))
}

/// Pops a value of `bytes` (2, 4 or 8).
pub fn pop<E: Environment>(core: &mut Core<'_, E>, bytes: usize) -> Result<u64, Fault> {
    let value = peek(core, bytes)?;
    add_to_pointer(core.cpu, bytes as u64);
    Ok(value)
}

/// PUSH of a register, an immediate or memory.
pub fn execute_push<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Executed {
    let bytes = i.stack_pointer_increment().unsigned_abs() as usize;
    let value = match i.op0_kind() {
        Operand::Register => address::register_value(core.cpu, i.op0_register()),
        Operand::Memory => {
            let linear = address::linear(core, i, bytes, Access::Read)?;
            core.read_sized(linear, bytes, Privilege::of_data(core.cpu))?
        }
        _ => i.immediate(0),
    };
    push(core, bytes, value)?;
    Ok(Flow::Next)
}

/// POP to a register or memory.
pub fn execute_pop<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Executed {
    let bytes = i.stack_pointer_increment().unsigned_abs() as usize;
    let value = peek(core, bytes)?;
    if i.op0_kind() == Operand::Register {
        add_to_pointer(core.cpu, bytes as u64);
        address::set_register(core.cpu, i.op0_register(), value);
        return Ok(Flow::Next);
    }
    // The address of a memory operand is computed with the pointer already moved.
    let before = core.cpu.gpr(Gpr::Rsp);
    add_to_pointer(core.cpu, bytes as u64);
    let result = address::linear(core, i, bytes, Access::Write)
        .and_then(|l| core.write_sized(l, bytes, value, Privilege::of_data(core.cpu)));
    result.inspect_err(|_| core.cpu.set_gpr(Gpr::Rsp, before))?;
    Ok(Flow::Next)
}

/// PUSHA, POPA, ENTER and LEAVE.
pub fn execute_frame<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Executed {
    match i.mnemonic() {
        Mnemonic::Leave => leave(core, i),
        Mnemonic::Enter => enter(core, i),
        Mnemonic::Pusha => push_all(core, 2),
        Mnemonic::Pushad => push_all(core, 4),
        Mnemonic::Popa => pop_all(core, 2),
        _ => pop_all(core, 4),
    }
}

fn leave<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Executed {
    let bits = address_bits(core.cpu);
    let bytes = match i.code() {
        iced_x86::Code::Leavew => 2,
        iced_x86::Code::Leaved => 4,
        _ => 8,
    };
    let frame = core.cpu.gpr(Gpr::Rbp) & mask(bits);
    let linear = address::linear_for(core, SegmentRegister::Ss, frame, bytes, Access::Read)?;
    let value = core.read_sized(linear, bytes, Privilege::of_data(core.cpu))?;
    address::set_sized(core.cpu, Gpr::Rsp, bits, frame.wrapping_add(bytes as u64));
    address::set_sized(core.cpu, Gpr::Rbp, bytes as u32 * 8, value);
    Ok(Flow::Next)
}

fn enter<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Executed {
    let bytes = match i.code() {
        iced_x86::Code::Enterw_imm16_imm8 => 2,
        iced_x86::Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let (size, level) = (
        u64::from(i.immediate16()),
        u64::from(i.immediate8_2nd()) & 31,
    );
    let bits = address_bits(core.cpu);
    let (rsp, rbp) = (core.cpu.gpr(Gpr::Rsp), core.cpu.gpr(Gpr::Rbp));
    let result = (|| {
        push(core, bytes, rbp)?;
        let frame = core.cpu.gpr(Gpr::Rsp);
        for n in 1..level {
            let offset = rbp.wrapping_sub(n * bytes as u64) & mask(bits);
            let linear =
                address::linear_for(core, SegmentRegister::Ss, offset, bytes, Access::Read)?;
            let value = core.read_sized(linear, bytes, Privilege::of_data(core.cpu))?;
            push(core, bytes, value)?;
        }
        if level > 0 {
            push(core, bytes, frame)?;
        }
        add_to_pointer(core.cpu, size.wrapping_neg());
        // The new frame must be writable (SDM vol. 2, "ENTER").
        let linear = linear_at(core, 0, bytes, Access::Write)?;
        core.check_alignment(linear, bytes, Privilege::of_data(core.cpu))?;
        core.probe_write(linear, bytes, Privilege::of_data(core.cpu))?;
        Ok(frame)
    })();
    match result {
        Ok(frame) => {
            address::set_sized(core.cpu, Gpr::Rbp, bytes as u32 * 8, frame);
            Ok(Flow::Next)
        }
        Err(fault) => {
            core.cpu.set_gpr(Gpr::Rsp, rsp);
            Err(fault)
        }
    }
}

fn push_all<E: Environment>(core: &mut Core<'_, E>, bytes: usize) -> Executed {
    let before = core.cpu.gpr(Gpr::Rsp);
    for r in 0..8 {
        let value = if r == Gpr::Rsp as usize {
            before
        } else {
            core.cpu.gpr[r]
        };
        push(core, bytes, value).inspect_err(|_| core.cpu.set_gpr(Gpr::Rsp, before))?;
    }
    Ok(Flow::Next)
}

fn pop_all<E: Environment>(core: &mut Core<'_, E>, bytes: usize) -> Executed {
    let mut values = [0; 8];
    for (n, value) in values.iter_mut().enumerate() {
        let linear = linear_at(core, (n * bytes) as u64, bytes, Access::Read)?;
        *value = core.read_sized(linear, bytes, Privilege::of_data(core.cpu))?;
    }
    for (n, value) in values.into_iter().enumerate() {
        let r = 7 - n;
        if r != Gpr::Rsp as usize {
            let full = &mut core.cpu.gpr[r];
            *full = if bytes == 2 {
                *full & !0xffff | value
            } else {
                value
            };
        }
    }
    add_to_pointer(core.cpu, 8 * bytes as u64);
    Ok(Flow::Next)
}
