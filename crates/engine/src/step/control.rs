//! Near control transfers (SDM vol. 1, 6.4 and 7.3.8).

use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind as Operand};
use trapline_x86::control::rflags;
use trapline_x86::{CpuState, Exception, Gpr, Mode};

use super::{Executed, Flow, address, events, stack};
use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::tlb::{Access, Privilege};

/// Whether the status flags satisfy a condition.
#[inline]
pub fn condition(flags: u64, code: ConditionCode) -> bool {
    use rflags::{CF, OF, PF, SF, ZF};
    let has = |bit| flags & bit != 0;
    match code {
        ConditionCode::o => has(OF),
        ConditionCode::no => !has(OF),
        ConditionCode::b => has(CF),
        ConditionCode::ae => !has(CF),
        ConditionCode::e => has(ZF),
        ConditionCode::ne => !has(ZF),
        ConditionCode::be => has(CF) || has(ZF),
        ConditionCode::a => !has(CF) && !has(ZF),
        ConditionCode::s => has(SF),
        ConditionCode::ns => !has(SF),
        ConditionCode::p => has(PF),
        ConditionCode::np => !has(PF),
        ConditionCode::l => has(SF) != has(OF),
        ConditionCode::ge => has(SF) == has(OF),
        ConditionCode::le => has(ZF) || has(SF) != has(OF),
        ConditionCode::g => !has(ZF) && has(SF) == has(OF),
        ConditionCode::None => true,
    }
}

/// Checks a near branch target: canonical in 64-bit mode, within the CS limit elsewhere.
#[inline]
pub fn check_target(cpu: &CpuState, target: u64) -> Result<(), Exception> {
    let good = if cpu.mode() == Mode::Long64 {
        CpuState::is_canonical(target)
    } else {
        target <= u64::from(cpu.cs().limit)
    };
    if good {
        Ok(())
    } else {
        Err(Exception::general_protection(0))
    }
}

/// Sets RIP to a near target after checking it.
#[inline]
pub fn jump<E: Environment>(core: &mut Core<'_, E>, target: u64) -> Executed {
    check_target(core.cpu, target)?;
    core.cpu.rip = target;
    Ok(Flow::Jump)
}

/// Bytes of a near target: the operand size, 8 in 64-bit mode.
fn target_bytes(i: &Instruction) -> usize {
    match i.op0_kind() {
        Operand::NearBranch16 => 2,
        Operand::NearBranch32 => 4,
        Operand::NearBranch64 => 8,
        Operand::Register => i.op0_register().size(),
        _ => i.memory_size().size(),
    }
}

/// JMP through a register or memory.
pub fn jump_indirect<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Executed {
    let target = operand_value(core, i)?;
    jump(core, target)
}

/// CALL with its target known.
pub fn call<E: Environment>(core: &mut Core<'_, E>, i: &Instruction, target: u64) -> Executed {
    let bytes = target_bytes(i);
    if let Err(exception) = check_target(core.cpu, target) {
        // The stack comes first.
        stack::probe_push(core, bytes)?;
        return Err(exception.into());
    }
    stack::push(core, bytes, events::next_rip(core.cpu, i.len()))?;
    core.cpu.rip = target;
    Ok(Flow::Jump)
}

/// CALL through a register or memory.
pub fn call_indirect<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Executed {
    let target = operand_value(core, i)?;
    call(core, i, target)
}

/// Near RET, releasing `extra` more bytes.
pub fn ret<E: Environment>(core: &mut Core<'_, E>, i: &Instruction, extra: u16) -> Executed {
    let bytes = (i.stack_pointer_increment() - i32::from(extra)).clamp(2, 8) as usize;
    let target = stack::peek(core, bytes)?;
    check_target(core.cpu, target)?;
    stack::add_to_pointer(core.cpu, bytes as u64 + u64::from(extra));
    core.cpu.rip = target;
    Ok(Flow::Jump)
}

/// LOOP, LOOPE, LOOPNE and JCXZ: the counter's width is the address size.
pub fn loop_or_jcxz<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Executed {
    use Mnemonic as M;
    let bits = match i.code().op_code().address_size() {
        16 => 16,
        32 => 32,
        _ => 64,
    };
    let mask = if bits == 64 {
        u64::MAX
    } else {
        (1 << bits) - 1
    };
    let count = core.cpu.gpr(Gpr::Rcx) & mask;
    let zero = core.cpu.rflags & rflags::ZF != 0;
    let (taken, left) = match i.mnemonic() {
        M::Jcxz | M::Jecxz | M::Jrcxz => (count == 0, None),
        m => {
            let left = count.wrapping_sub(1) & mask;
            let flag = match m {
                M::Loope => zero,
                M::Loopne => !zero,
                _ => true,
            };
            (left != 0 && flag, Some(left))
        }
    };
    if taken {
        check_target(core.cpu, i.near_branch_target())?;
    }
    if let Some(left) = left {
        address::set_sized(core.cpu, Gpr::Rcx, bits, left);
    }
    if taken {
        core.cpu.rip = i.near_branch_target();
        return Ok(Flow::Jump);
    }
    Ok(Flow::Next)
}

fn operand_value<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Result<u64, Fault> {
    if i.op0_kind() == Operand::Register {
        return Ok(address::register_value(core.cpu, i.op0_register()));
    }
    let size = i.memory_size().size();
    let linear = address::linear(core, i, size, Access::Read)?;
    core.read_sized(linear, size, Privilege::of_data(core.cpu))
}
