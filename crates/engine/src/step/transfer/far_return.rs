//! Returns through a saved code segment: what IRET and far RET have in common, and far RET
//! (SDM vol. 2, "RET", "IRET/IRETD").

use iced_x86::{Code, Instruction};
use trapline_x86::segment::Rights;
use trapline_x86::{CpuState, Exception, Gpr, Mode, Segment, SegmentRegister};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::address::mask;
use crate::step::segments::descriptor::{self as descriptors, Descriptor, selector_error};
use crate::step::stack::access::Stack;
use crate::step::transfer::stack;
use crate::step::{Executed, Flow, events};

/// Reads and checks the code segment that a return goes to. The selector's RPL is the privilege
/// level returned to.
///
/// # Errors
/// #GP, #NP, page faults, restart.
pub fn code_segment<E: Environment>(
    core: &mut Core<'_, E>,
    selector: u16,
) -> Result<Descriptor, Fault> {
    if descriptors::is_null(selector) {
        return Err(Exception::general_protection(0).into());
    }
    let code = descriptors::fetch(core, selector, Exception::general_protection, 0)?;
    let error = selector_error(selector);
    let rights = code.rights();
    let level = selector as u8 & 3;
    let privileged = if rights.is_conforming() {
        rights.dpl() > level
    } else {
        rights.dpl() != level
    };
    let both_sizes = core.cpu.long_mode() && rights.has(Rights::L) && rights.has(Rights::DB);
    if !rights.is_code() || level < core.cpu.cpl() || privileged || both_sizes {
        return Err(Exception::general_protection(error).into());
    }
    if !rights.has(Rights::P) {
        return Err(Exception::segment_not_present(error).into());
    }
    Ok(code)
}

/// Whether `code` makes 64-bit mode.
pub fn is_long_code<E: Environment>(core: &Core<'_, E>, code: &Descriptor) -> bool {
    core.cpu.long_mode() && code.rights().has(Rights::L)
}

/// Checks an instruction pointer against the code segment that it is loaded with.
///
/// # Errors
/// #GP(0).
pub fn check_target<E: Environment>(
    core: &Core<'_, E>,
    code: &Descriptor,
    rip: u64,
) -> Result<u64, Exception> {
    if is_long_code(core, code) {
        return if CpuState::is_canonical(rip) {
            Ok(rip)
        } else {
            Err(Exception::general_protection(0))
        };
    }
    let rip = rip & 0xffff_ffff;
    if rip > u64::from(code.limit()) {
        Err(Exception::general_protection(0))
    } else {
        Ok(rip)
    }
}

/// Reads and checks the stack segment that a return to privilege `level` loads.
///
/// # Errors
/// #GP, #SS, page faults, restart.
pub fn stack_segment<E: Environment>(
    core: &mut Core<'_, E>,
    selector: u16,
    level: u8,
    long_code: bool,
) -> Result<Segment, Fault> {
    if descriptors::is_null(selector) {
        if long_code && level < 3 && selector & 3 == u16::from(level) {
            let mut null = stack::null_stack_segment(level);
            null.selector = selector;
            return Ok(null);
        }
        return Err(Exception::general_protection(0).into());
    }
    let found = descriptors::fetch(core, selector, Exception::general_protection, 0)?;
    let rights = found.rights();
    let error = selector_error(selector);
    if selector & 3 != u16::from(level) || rights.dpl() != level || !rights.is_writable_data() {
        return Err(Exception::general_protection(error).into());
    }
    if !rights.has(Rights::P) {
        return Err(Exception::stack_fault(error).into());
    }
    descriptors::mark_accessed(core, &found)?;
    let mut segment = found.segment();
    segment.rights.0 |= Rights::ACCESSED;
    Ok(segment)
}

/// Makes CS current after a return to `level`; data segments too privileged for it become null.
pub fn enter_code(cpu: &mut CpuState, code: &Descriptor, level: u8, rip: u64) {
    let mut cs = code.segment();
    cs.selector = cs.selector & !3 | u16::from(level);
    cs.rights.0 |= Rights::ACCESSED;
    let outer = level > cpu.cpl;
    *cpu.segment_mut(SegmentRegister::Cs) = cs;
    cpu.cpl = level;
    cpu.rip = rip;
    if outer {
        use SegmentRegister::{Ds, Es, Fs, Gs};
        for s in [Es, Ds, Fs, Gs] {
            let segment = cpu.segment_mut(s);
            let rights = segment.rights;
            if !rights.is_unusable() && !rights.is_conforming() && rights.dpl() < level {
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
    let code = code_segment(core, selector)?;
    let level = selector as u8 & 3;
    let rip = check_target(core, &code, rip)?;
    stack.skip(release);
    if level == core.cpu.cpl() {
        descriptors::mark_accessed(core, &code)?;
        stack.commit_pointer(core.cpu);
        enter_code(core.cpu, &code, level, rip);
        return Ok(Flow::Jump);
    }
    let pointer = stack.pop(core, size)?;
    let ss = stack.pop(core, size)? as u16;
    let long_code = is_long_code(core, &code);
    let ss = stack_segment(core, ss, level, long_code)?;
    descriptors::mark_accessed(core, &code)?;
    set_outer_stack(core.cpu, ss, pointer, long_code, release);
    enter_code(core.cpu, &code, level, rip);
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
