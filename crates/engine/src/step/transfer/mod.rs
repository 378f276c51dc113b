//! Far jumps and calls: to code segments, through call gates, to tasks (SDM vol. 3, 5.8).

pub mod far_return;
pub mod stack;
pub mod task;

use iced_x86::{Code, Instruction, OpKind};
use trapline_x86::segment::Rights;
use trapline_x86::{CpuState, Exception, Gpr, SegmentRegister};

use self::far_return as returns;
use self::task::TaskSwitch;
use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::segments::descriptor::{
    self as descriptors, Descriptor, selector_error, system_type,
};
use crate::step::stack::access::Stack;
use crate::step::{Executed, Flow, address, events};
use crate::tlb::{Access, Privilege};

/// A far transfer to be made.
struct Transfer {
    selector: u16,
    offset: u64,
    /// Operand size in bytes.
    size: usize,
    call: bool,
    /// RIP behind the instruction.
    next: u64,
}

impl Transfer {
    /// Pushes the return address on the current stack; the caller commits the pointer.
    fn push_return<E: Environment>(&self, core: &mut Core<'_, E>) -> Result<Stack, Fault> {
        let mut stack = Stack::current(core.cpu);
        if self.call {
            let cs = u64::from(core.cpu.cs().selector);
            stack.push_all(core, self.size, &[cs, self.next])?;
        }
        Ok(stack)
    }
}

/// JMP or CALL with a far pointer, immediate or in memory.
///
/// # Errors
/// #GP, #NP, #SS, #TS, page faults, restart.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let size = match instr.code() {
        Code::Jmp_ptr1616 | Code::Jmp_m1616 | Code::Call_ptr1616 | Code::Call_m1616 => 2,
        Code::Jmp_m1664 | Code::Call_m1664 => 8,
        _ => 4,
    };
    let call = matches!(
        instr.code(),
        Code::Call_ptr1616
            | Code::Call_ptr1632
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
    );
    let (selector, offset) = match instr.op0_kind() {
        OpKind::FarBranch16 => (instr.far_branch_selector(), u64::from(instr.far_branch16())),
        OpKind::FarBranch32 => (instr.far_branch_selector(), u64::from(instr.far_branch32())),
        _ => far_pointer(core, instr, size)?,
    };
    let next = events::next_rip(core.cpu, instr.len());
    let transfer = Transfer {
        selector,
        offset,
        size,
        call,
        next,
    };
    if events::is_protected(core.cpu) {
        protected(core, &transfer)?;
    } else {
        if offset > u64::from(core.cpu.cs().limit) {
            return Err(Exception::general_protection(0).into());
        }
        let stack = transfer.push_return(core)?;
        stack.commit_pointer(core.cpu);
        returns::enter_real_code(core.cpu, selector, offset);
    }
    Ok(Flow::Jump)
}

/// Reads a far pointer in memory: the offset of `size` bytes, then the selector.
///
/// # Errors
/// #GP, #SS, page faults, restart.
pub fn far_pointer<E: Environment>(
    core: &mut Core<'_, E>,
    instr: &Instruction,
    size: usize,
) -> Result<(u16, u64), Fault> {
    let privilege = Privilege::of_data(core.cpu);
    let first = address::linear(core, instr, size, Access::Read)?;
    let second = address::linear_at(core, instr, size as u64, 2, Access::Read)?;
    let offset = core.read_sized(first, size, privilege)?;
    let selector = core.read::<2>(second, privilege)? as u16;
    Ok((selector, offset))
}

fn protected<E: Environment>(core: &mut Core<'_, E>, transfer: &Transfer) -> Result<(), Fault> {
    let selector = transfer.selector;
    if descriptors::is_null(selector) {
        return Err(Exception::general_protection(0).into());
    }
    let found = descriptors::fetch(core, selector, Exception::general_protection, 0)?;
    if found.is_system() {
        return through_gate(core, transfer, &found);
    }
    let rights = found.rights();
    let cpl = core.cpu.cpl();
    let error = selector_error(selector);
    let permitted = if rights.is_conforming() {
        rights.dpl() <= cpl
    } else {
        selector as u8 & 3 <= cpl && rights.dpl() == cpl
    };
    let both_sizes = core.cpu.long_mode() && rights.has(Rights::L) && rights.has(Rights::DB);
    if !rights.is_code() || !permitted || both_sizes {
        return Err(Exception::general_protection(error).into());
    }
    if !rights.has(Rights::P) {
        return Err(Exception::segment_not_present(error).into());
    }
    let rip = returns::check_target(core, &found, transfer.offset)?;
    let stack = transfer.push_return(core)?;
    descriptors::mark_accessed(core, &found)?;
    if transfer.call {
        stack.commit_pointer(core.cpu);
    }
    returns::enter_code(core.cpu, &found, cpl, rip);
    Ok(())
}

/// The target is a system descriptor: a call gate, a task gate or a TSS.
fn through_gate<E: Environment>(
    core: &mut Core<'_, E>,
    transfer: &Transfer,
    gate: &Descriptor,
) -> Result<(), Fault> {
    let long = core.cpu.long_mode();
    let error = gate.error();
    let kind = gate.rights().kind();
    use system_type::*;
    let known = match kind {
        CALL_GATE => true,
        CALL_GATE16 | TASK_GATE | TSS_AVAILABLE | TSS16_AVAILABLE => !long,
        _ => false,
    };
    // The second half of a 16-byte gate has a type of zero.
    let malformed = long && gate.high >> 40 & 0x1f != 0;
    let lowest = core.cpu.cpl().max(transfer.selector as u8 & 3);
    if !known || malformed || gate.dpl() < lowest {
        return Err(Exception::general_protection(error).into());
    }
    let is_task = matches!(kind, TSS_AVAILABLE | TSS16_AVAILABLE) && !long;
    if !is_task && !gate.is_present() {
        return Err(Exception::segment_not_present(error).into());
    }
    match kind {
        TSS_AVAILABLE | TSS16_AVAILABLE => task(core, transfer, transfer.selector),
        TASK_GATE => task(core, transfer, gate.gate_selector()),
        _ => call_gate(core, transfer, gate),
    }
}

fn task<E: Environment>(
    core: &mut Core<'_, E>,
    transfer: &Transfer,
    selector: u16,
) -> Result<(), Fault> {
    let rip = transfer.next;
    let reason = if transfer.call {
        TaskSwitch::Call { rip }
    } else {
        TaskSwitch::Jump { rip }
    };
    task::switch(core, reason, selector)
}

fn call_gate<E: Environment>(
    core: &mut Core<'_, E>,
    transfer: &Transfer,
    gate: &Descriptor,
) -> Result<(), Fault> {
    let selector = gate.gate_selector();
    if descriptors::is_null(selector) {
        return Err(Exception::general_protection(0).into());
    }
    let code = descriptors::fetch(core, selector, Exception::general_protection, 0)?;
    let long = core.cpu.long_mode();
    let rights = code.rights();
    let cpl = core.cpu.cpl();
    let error = selector_error(selector);
    let wrong_size = long && (!rights.has(Rights::L) || rights.has(Rights::DB));
    let jump_inward = !transfer.call && !rights.is_conforming() && rights.dpl() != cpl;
    if !rights.is_code() || rights.dpl() > cpl || wrong_size || jump_inward {
        return Err(Exception::general_protection(error).into());
    }
    if !rights.has(Rights::P) {
        return Err(Exception::segment_not_present(error).into());
    }
    let wide = gate.rights().kind() == system_type::CALL_GATE;
    let size = match (long, wide) {
        (true, _) => 8,
        (false, true) => 4,
        (false, false) => 2,
    };
    let offset = if wide {
        gate.gate_offset()
    } else {
        gate.gate_offset() & 0xffff
    };
    let rip = returns::check_target(core, &code, offset)?;
    let level = if rights.is_conforming() {
        cpl
    } else {
        rights.dpl()
    };
    if transfer.call && level < cpl {
        return inner_call(core, transfer, gate, &code, size, rip);
    }
    let sized = Transfer { size, ..*transfer };
    let stack = sized.push_return(core)?;
    descriptors::mark_accessed(core, &code)?;
    if transfer.call {
        if long {
            core.cpu.set_gpr(Gpr::Rsp, stack.pointer);
        } else {
            stack.commit_pointer(core.cpu);
        }
    }
    returns::enter_code(core.cpu, &code, level, rip);
    Ok(())
}

/// A call to more privileged code: on its own stack, with the gate's parameters copied.
fn inner_call<E: Environment>(
    core: &mut Core<'_, E>,
    transfer: &Transfer,
    gate: &Descriptor,
    code: &Descriptor,
    size: usize,
    rip: u64,
) -> Result<(), Fault> {
    let level = code.dpl();
    let old = Stack::current(core.cpu);
    let mut frame = [0; 4 + 31];
    frame[0] = u64::from(core.cpu.ss().selector);
    frame[1] = core.cpu.gpr(Gpr::Rsp);
    let mut n = 2;
    let long = size == 8;
    let parameters = if long {
        0
    } else {
        (gate.raw >> 32 & 0x1f) as usize
    };
    let mut from = old;
    for k in 0..parameters {
        frame[2 + parameters - 1 - k] = from.pop(core, size)?;
    }
    n += parameters;
    frame[n] = u64::from(core.cpu.cs().selector);
    frame[n + 1] = transfer.next;
    n += 2;
    let mut stack = if long {
        let pointer = stack::inner_pointer(core, level, 0)?;
        Stack::long(core.cpu, pointer, level)
    } else {
        let (segment, pointer) = stack::inner_stack(core, level, 0)?;
        let error = selector_error(segment.selector);
        Stack::in_segment(core.cpu, segment, pointer, level, error)
    };
    stack.push_all(core, size, &frame[..n])?;
    descriptors::mark_accessed(core, code)?;
    let cpu: &mut CpuState = core.cpu;
    *cpu.segment_mut(SegmentRegister::Ss) = if long {
        stack::null_stack_segment(level)
    } else {
        stack.segment
    };
    stack.commit_pointer(cpu);
    returns::enter_code(cpu, code, level, rip);
    Ok(())
}
