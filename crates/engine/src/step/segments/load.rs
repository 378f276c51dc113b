//! Loading segment registers from selectors (SDM vol. 3, 5.7, 5.6; vol. 2, "MOV").

use trapline_x86::descriptor::{
    Selector, check_data_load, check_ldt_load, check_stack_load, check_task_load, null_stack_load,
};
use trapline_x86::{Exception, Mode, Segment, SegmentRegister};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::segments::descriptor::{self as descriptors, Descriptor};
use crate::step::transfer::far_return::virtual_segment;

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
        mode if register == SegmentRegister::Ss => {
            let level = core.cpu.cpl();
            stack_segment(core, Selector(selector), level, mode == Mode::Long64)
        }
        _ => data_segment(core, Selector(selector)),
    }
}

/// What SS holds when code of privilege `level` runs with it, 64-bit code if `long64`: by a load at
/// that level, or by a return to it.
///
/// # Errors
/// #GP, #SS, page faults, restart.
pub fn stack_segment<E: Environment>(
    core: &mut Core<'_, E>,
    selector: Selector,
    level: u8,
    long64: bool,
) -> Result<Segment, Fault> {
    if selector.is_null() {
        return Ok(null_stack_load(selector, level, long64)?);
    }
    let found = descriptors::fetch(core, selector, Exception::general_protection, 0)?;
    let segment = check_stack_load(found.raw, selector, level)?;
    descriptors::mark_accessed(core, &found)?;
    Ok(segment)
}

fn data_segment<E: Environment>(
    core: &mut Core<'_, E>,
    selector: Selector,
) -> Result<Segment, Fault> {
    if selector.is_null() {
        return Ok(Segment::null(selector.0));
    }
    let found = descriptors::fetch(core, selector, Exception::general_protection, 0)?;
    let segment = check_data_load(found.raw, selector, core.cpu.cpl())?;
    descriptors::mark_accessed(core, &found)?;
    Ok(segment)
}

/// LLDT: what it puts into LDTR.
///
/// # Errors
/// #GP, #NP, page faults, restart.
pub fn local_table<E: Environment>(
    core: &mut Core<'_, E>,
    selector: Selector,
) -> Result<Segment, Fault> {
    if selector.is_null() {
        return Ok(Segment::null(selector.0));
    }
    let found = system_descriptor(core, selector)?;
    Ok(check_ldt_load(
        found.wide(),
        selector,
        core.cpu.long_mode(),
    )?)
}

/// LTR: marks the TSS busy in memory and returns what goes into TR.
///
/// # Errors
/// #GP, #NP, page faults, restart.
pub fn task_register<E: Environment>(
    core: &mut Core<'_, E>,
    selector: Selector,
) -> Result<Segment, Fault> {
    if selector.is_null() {
        return Err(Exception::general_protection(0).into());
    }
    let found = system_descriptor(core, selector)?;
    let segment = check_task_load(found.wide(), selector, core.cpu.long_mode())?;
    descriptors::write_type(core, &found, segment.rights.0)?;
    Ok(segment)
}

/// A descriptor of the GDT, the only table whose system segments can be loaded.
fn system_descriptor<E: Environment>(
    core: &mut Core<'_, E>,
    selector: Selector,
) -> Result<Descriptor, Fault> {
    if selector.ti() {
        return Err(Exception::general_protection(selector.error()).into());
    }
    descriptors::fetch(core, selector, Exception::general_protection, 0)
}
