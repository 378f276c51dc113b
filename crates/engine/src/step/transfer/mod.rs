//! Far jumps and calls: to code segments, through call gates, to tasks (SDM vol. 3, 5.8).

pub mod far_return;
pub mod stack;
pub mod task;

use iced_x86::{Code, Instruction, OpKind};
use trapline_x86::descriptor::{
    Gate, GateKind, GateUse, Selector, SystemType, check_far_transfer, check_gate_target,
};
use trapline_x86::{CpuState, Exception, Gpr, SegmentRegister};

use self::far_return as returns;
use self::task::TaskSwitch;
use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::segments::descriptor::{self as descriptors, Descriptor};
use crate::step::stack::access::Stack;
use crate::step::{Executed, Flow, address, events};
use crate::tlb::{Access, Privilege};

/// A far transfer to be made.
struct Transfer {
    selector: Selector,
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
        selector: Selector(selector),
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
    if selector.is_null() {
        return Err(Exception::general_protection(0).into());
    }
    let found = descriptors::fetch(core, selector, Exception::general_protection, 0)?;
    if found.is_system() {
        return through_gate(core, transfer, &found);
    }
    let (cpl, long) = (core.cpu.cpl(), core.cpu.long_mode());
    let cs = check_far_transfer(found.raw, selector, cpl, long)?;
    let rip = returns::check_target(core.cpu, &cs, transfer.offset)?;
    let stack = transfer.push_return(core)?;
    descriptors::mark_accessed(core, &found)?;
    if transfer.call {
        stack.commit_pointer(core.cpu);
    }
    returns::enter_code(core.cpu, cs, rip);
    Ok(())
}

/// The target is a system descriptor: a call gate, a task gate or a TSS.
fn through_gate<E: Environment>(
    core: &mut Core<'_, E>,
    transfer: &Transfer,
    found: &Descriptor,
) -> Result<(), Fault> {
    use SystemType::{Tss16Available, TssAvailable};
    let long = core.cpu.long_mode();
    let invalid = || Err(Exception::general_protection(found.error()).into());
    if found.dpl() < core.cpu.cpl().max(transfer.selector.rpl()) {
        return invalid();
    }
    let kind = found.system_type(long);
    if !long && matches!(kind, Some(TssAvailable | Tss16Available)) {
        return task(core, transfer, transfer.selector);
    }
    let gate = match Gate::parse(found.raw.0, found.high, long) {
        Some(gate) if gate.kind == GateKind::Task || !gate.kind.is_event() => gate,
        _ => return invalid(),
    };
    if !gate.present {
        return Err(Exception::segment_not_present(found.error()).into());
    }
    match gate.kind {
        GateKind::Task => task(core, transfer, gate.selector),
        _ => call_gate(core, transfer, &gate),
    }
}

fn task<E: Environment>(
    core: &mut Core<'_, E>,
    transfer: &Transfer,
    selector: Selector,
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
    gate: &Gate,
) -> Result<(), Fault> {
    if gate.selector.is_null() {
        return Err(Exception::general_protection(0).into());
    }
    let code = descriptors::fetch(core, gate.selector, Exception::general_protection, 0)?;
    let through = if transfer.call {
        GateUse::Call
    } else {
        GateUse::Jump
    };
    let (cpl, long) = (core.cpu.cpl(), core.cpu.long_mode());
    let (cs, level) = check_gate_target(code.raw, gate.selector, cpl, through, long)?;
    let size = gate.kind.bits() as usize / 8;
    let rip = returns::check_target(core.cpu, &cs, gate.offset)?;
    if transfer.call && level < cpl {
        return inner_call(core, transfer, gate, (code, cs), rip);
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
    returns::enter_code(core.cpu, cs, rip);
    Ok(())
}

/// A call to more privileged code: on its own stack, with the gate's parameters copied.
fn inner_call<E: Environment>(
    core: &mut Core<'_, E>,
    transfer: &Transfer,
    gate: &Gate,
    (code, cs): returns::CodeSegment,
    rip: u64,
) -> Result<(), Fault> {
    let level = cs.rpl();
    let size = gate.kind.bits() as usize / 8;
    let old = Stack::current(core.cpu);
    let mut frame = [0; 4 + 31];
    frame[0] = u64::from(core.cpu.ss().selector);
    frame[1] = core.cpu.gpr(Gpr::Rsp);
    let mut n = 2;
    let long = size == 8;
    let parameters = usize::from(gate.parameters);
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
        let error = Selector(segment.selector).error();
        Stack::in_segment(core.cpu, segment, pointer, level, error)
    };
    stack.push_all(core, size, &frame[..n])?;
    descriptors::mark_accessed(core, &code)?;
    let cpu: &mut CpuState = core.cpu;
    *cpu.segment_mut(SegmentRegister::Ss) = if long {
        stack::null_stack_segment(level)
    } else {
        stack.segment
    };
    stack.commit_pointer(cpu);
    returns::enter_code(cpu, cs, rip);
    Ok(())
}
