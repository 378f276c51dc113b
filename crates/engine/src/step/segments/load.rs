//! Loading segment registers from selectors (SDM vol. 3, 5.7, 5.6; vol. 2, "MOV").

use trapline_x86::segment::Rights;
use trapline_x86::{Exception, Mode, Segment, SegmentRegister};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::segments::descriptor::{self as descriptors, selector_error, system_type};
use crate::step::transfer::far_return::virtual_segment;
use crate::step::transfer::stack;

/// What a load of `selector` into a data or stack segment register puts there. Sets the
/// descriptor's accessed bit; changes no register.
///
/// # Errors
/// #GP, #NP, #SS, page faults, restart.
pub fn segment<E: Environment>(
    core: &mut Core<'_, E>,
    register: SegmentRegister,
    selector: u16,
) -> Result<Segment, Fault> {
    match core.cpu.mode() {
        // Limit and rights stay: what protected mode loaded goes on to hold.
        Mode::Real => Ok(Segment {
            selector,
            base: u64::from(selector) << 4,
            ..*core.cpu.segment(register)
        }),
        Mode::Virtual8086 => Ok(virtual_segment(selector)),
        _ if register == SegmentRegister::Ss => stack_segment(core, selector),
        _ => data_segment(core, selector),
    }
}

fn stack_segment<E: Environment>(core: &mut Core<'_, E>, selector: u16) -> Result<Segment, Fault> {
    let cpl = core.cpu.cpl();
    let rpl = selector as u8 & 3;
    if descriptors::is_null(selector) {
        if core.cpu.mode() == Mode::Long64 && cpl < 3 && rpl == cpl {
            return Ok(stack::null_stack_segment(cpl));
        }
        return Err(Exception::general_protection(0).into());
    }
    let found = descriptors::fetch(core, selector, Exception::general_protection, 0)?;
    let rights = found.rights();
    let error = selector_error(selector);
    if rpl != cpl || rights.dpl() != cpl || !rights.is_writable_data() {
        return Err(Exception::general_protection(error).into());
    }
    if !rights.has(Rights::P) {
        return Err(Exception::stack_fault(error).into());
    }
    descriptors::mark_accessed(core, &found)?;
    Ok(accessed(found.segment()))
}

fn data_segment<E: Environment>(core: &mut Core<'_, E>, selector: u16) -> Result<Segment, Fault> {
    if descriptors::is_null(selector) {
        return Ok(Segment::null(selector));
    }
    let found = descriptors::fetch(core, selector, Exception::general_protection, 0)?;
    let rights = found.rights();
    let error = selector_error(selector);
    let lowest = core.cpu.cpl().max(selector as u8 & 3);
    if !rights.is_readable() || (!rights.is_conforming() && rights.dpl() < lowest) {
        return Err(Exception::general_protection(error).into());
    }
    if !rights.has(Rights::P) {
        return Err(Exception::segment_not_present(error).into());
    }
    descriptors::mark_accessed(core, &found)?;
    Ok(accessed(found.segment()))
}

fn accessed(mut segment: Segment) -> Segment {
    segment.rights.0 |= Rights::ACCESSED;
    segment
}

/// LLDT: what it puts into LDTR.
///
/// # Errors
/// #GP, #NP, page faults, restart.
pub fn local_table<E: Environment>(
    core: &mut Core<'_, E>,
    selector: u16,
) -> Result<Segment, Fault> {
    if descriptors::is_null(selector) {
        return Ok(Segment::null(selector));
    }
    let found = system_descriptor(core, selector, &[system_type::LDT])?;
    Ok(found.segment())
}

/// LTR: marks the TSS busy in memory and returns what goes into TR.
///
/// # Errors
/// #GP, #NP, page faults, restart.
pub fn task_register<E: Environment>(
    core: &mut Core<'_, E>,
    selector: u16,
) -> Result<Segment, Fault> {
    if descriptors::is_null(selector) {
        return Err(Exception::general_protection(0).into());
    }
    let kinds: &[u8] = if core.cpu.long_mode() {
        &[system_type::TSS_AVAILABLE]
    } else {
        &[system_type::TSS_AVAILABLE, system_type::TSS16_AVAILABLE]
    };
    let found = system_descriptor(core, selector, kinds)?;
    descriptors::write_type(core, &found, found.rights().0 | descriptors::BUSY)?;
    let mut segment = found.segment();
    segment.rights.0 |= descriptors::BUSY;
    Ok(segment)
}

/// A present system descriptor of the GDT of one of `kinds`.
fn system_descriptor<E: Environment>(
    core: &mut Core<'_, E>,
    selector: u16,
    kinds: &[u8],
) -> Result<descriptors::Descriptor, Fault> {
    let error = selector_error(selector);
    let invalid = Err(Exception::general_protection(error).into());
    if selector & 4 != 0 {
        return invalid;
    }
    let found = descriptors::fetch(core, selector, Exception::general_protection, 0)?;
    if !found.is_system() || !kinds.contains(&found.rights().kind()) {
        return invalid;
    }
    // The upper half's type must be zero.
    if found.high >> 40 & 0x1f != 0 {
        return invalid;
    }
    if !found.is_present() {
        return Err(Exception::segment_not_present(error).into());
    }
    Ok(found)
}
