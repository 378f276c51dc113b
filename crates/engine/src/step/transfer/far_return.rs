//! Returns through a saved code segment: what IRET and far RET have in common, and far RET
//! (SDM vol. 2, "RET", "IRET/IRETD").

use iced_x86::{Code, Instruction};
use trapline_x86::descriptor::{Selector, check_return, survives_return};
use trapline_x86::segment::Rights;
use trapline_x86::{CpuState, Exception, Gpr, Mode, Segment, SegmentRegister};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::address::mask;
use crate::step::segments::descriptor::{self as descriptors, Descriptor};
use crate::step::segments::load;
use crate::step::stack::access::Stack;
use crate::step::{Executed, Flow, events};

/// A code segment in its table, and what CS holds once it is loaded.
pub type CodeSegment = (Descriptor, Segment);

/// Reads and checks the code segment that a return goes to. The selector's RPL is the privilege
/// level returned to.
///
/// # Errors
/// #GP, #NP, page faults, restart.
pub fn code_segment<E: Environment>(
    core: &mut Core<'_, E>,
    selector: Selector,
) -> Result<CodeSegment, Fault> {
    if selector.is_null() {
        return Err(Exception::general_protection(0).into());
    }
    let found = descriptors::fetch(core, selector, Exception::general_protection, 0)?;
    let cs = check_return(found.raw, selector, core.cpu.cpl(), core.cpu.long_mode())?;
    Ok((found, cs))
}

/// Whether a code segment makes 64-bit mode.
pub fn is_long_code(cpu: &CpuState, cs: &Segment) -> bool {
    cpu.long_mode() && cs.rights.has(Rights::L)
}

/// Checks an instruction pointer against the code segment that it is loaded with.
///
/// # Errors
/// #GP(0).
pub fn check_target(cpu: &CpuState, cs: &Segment, rip: u64) -> Result<u64, Exception> {
    if is_long_code(cpu, cs) {
        return if CpuState::is_canonical(rip) {
            Ok(rip)
        } else {
            Err(Exception::general_protection(0))
        };
    }
    let rip = rip & 0xffff_ffff;
    if rip > u64::from(cs.limit) {
        Err(Exception::general_protection(0))
    } else {
        Ok(rip)
    }
}

/// Makes CS current, at the privilege level that its selector says; data segments too privileged
/// for that level become null.
pub fn enter_code(cpu: &mut CpuState, cs: Segment, rip: u64) {
    let level = cs.rpl();
    let outer = level > cpu.cpl;
    *cpu.segment_mut(SegmentRegister::Cs) = cs;
    cpu.cpl = level;
    cpu.rip = rip;
    if outer {
        use SegmentRegister::{Ds, Es, Fs, Gs};
        for s in [Es, Ds, Fs, Gs] {
            let segment = cpu.segment_mut(s);
            if !survives_return(segment, level) {
                *segment = Segment::null(0);
            }
        }
    }
}

/// RETF, with the bytes of parameters to release.
///
/// # Errors
/// #GP, #SS, #NP, page faults, restart.
pub fn far_return<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let (size, release) = match instr.code() {
        Code::Retfw => (2, 0),
        Code::Retfd => (4, 0),
        Code::Retfq => (8, 0),
        Code::Retfw_imm16 => (2, instr.immediate16()),
        Code::Retfd_imm16 => (4, instr.immediate16()),
        _ => (8, instr.immediate16()),
    };
    let release = u64::from(release);
    let mut stack = Stack::current(core.cpu);
    let rip = stack.pop(core, size)?;
    let selector = stack.pop(core, size)? as u16;
    if !events::is_protected(core.cpu) {
        if rip > u64::from(core.cpu.cs().limit) {
            return Err(Exception::general_protection(0).into());
        }
        stack.skip(release);
        stack.commit_pointer(core.cpu);
        enter_real_code(core.cpu, selector, rip);
        return Ok(Flow::Jump);
    }
    let (code, cs) = code_segment(core, Selector(selector))?;
    let rip = check_target(core.cpu, &cs, rip)?;
    stack.skip(release);
    if cs.rpl() == core.cpu.cpl() {
        descriptors::mark_accessed(core, &code)?;
        stack.commit_pointer(core.cpu);
        enter_code(core.cpu, cs, rip);
        return Ok(Flow::Jump);
    }
    let pointer = stack.pop(core, size)?;
    let ss = Selector(stack.pop(core, size)? as u16);
    let long_code = is_long_code(core.cpu, &cs);
    let ss = load::stack_segment(core, ss, cs.rpl(), long_code)?;
    descriptors::mark_accessed(core, &code)?;
    set_outer_stack(core.cpu, ss, pointer, long_code, release);
    enter_code(core.cpu, cs, rip);
    Ok(Flow::Jump)
}

/// Loads SS and the stack pointer of the code returned to, `release` bytes further up.
pub fn set_outer_stack(
    cpu: &mut CpuState,
    ss: Segment,
    pointer: u64,
    long_code: bool,
    release: u64,
) {
    let bits = match (long_code, ss.rights.has(Rights::DB)) {
        (true, _) => 64,
        (false, true) => 32,
        (false, false) => 16,
    };
    *cpu.segment_mut(SegmentRegister::Ss) = ss;
    let moved = pointer.wrapping_add(release) & mask(bits);
    cpu.set_gpr(Gpr::Rsp, pointer & !mask(bits) | moved);
}

/// CS as real and virtual-8086 mode load it.
pub fn enter_real_code(cpu: &mut CpuState, selector: u16, rip: u64) {
    let virtual_mode = cpu.mode() == Mode::Virtual8086;
    let cs = cpu.segment_mut(SegmentRegister::Cs);
    cs.selector = selector;
    cs.base = u64::from(selector) << 4;
    if virtual_mode {
        *cs = virtual_segment(selector);
    }
    cpu.rip = rip;
}

/// A segment as virtual-8086 mode loads it (SDM vol. 3, 20.2.1).
pub fn virtual_segment(selector: u16) -> Segment {
    let mut segment = Segment::real(selector);
    segment.rights = segment.rights.with_dpl(3);
    segment
}
