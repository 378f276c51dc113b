//! Stacks for more privileged code, from the task-state segment (SDM vol. 3, 5.8.5, 7.7).

use trapline_x86::descriptor::tss::{tss16, tss32, tss64};
use trapline_x86::descriptor::{Selector, SystemType, check_stack_switch};
use trapline_x86::segment::Rights;
use trapline_x86::{CpuState, Exception, Segment};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::segments::descriptor as descriptors;
use crate::system_item::{Decoded, SystemItem};

/// SS as a switch to more privileged code of long mode leaves it: null, with its RPL the new
/// privilege level.
pub fn null_stack_segment(level: u8) -> Segment {
    Segment {
        rights: Rights(Rights::UNUSABLE).with_dpl(level),
        ..Segment::null(u16::from(level))
    }
}

/// Reads `size` (2, 4 or 8) bytes of the current TSS.
fn read_tss<E: Environment>(
    core: &mut Core<'_, E>,
    offset: u64,
    size: u8,
    ext: u32,
) -> Result<u64, Fault> {
    let tr = core.cpu.tr;
    if tr.rights.is_unusable() || offset + u64::from(size) - 1 > u64::from(tr.limit) {
        return Err(Exception::invalid_tss(Selector(tr.selector).error() | ext).into());
    }
    let item = SystemItem::Stack(size);
    match descriptors::read_item(core, tr.base.wrapping_add(offset), item)? {
        Decoded::Stack(value) => Ok(value),
        Decoded::Segment { .. } | Decoded::Gate(_) => Ok(0),
    }
}

fn canonical(pointer: u64, ext: u32) -> Result<u64, Fault> {
    if CpuState::is_canonical(pointer) {
        Ok(pointer)
    } else {
        Err(Exception::stack_fault(ext).into())
    }
}

/// Long mode: the stack pointer for privilege `level` (0 to 2).
///
/// # Errors
/// #TS, #SS, page faults, restart.
pub fn inner_pointer<E: Environment>(
    core: &mut Core<'_, E>,
    level: u8,
    ext: u32,
) -> Result<u64, Fault> {
    let pointer = read_tss(core, tss64::rsp(level), 8, ext)?;
    canonical(pointer, ext)
}

/// Long mode: the stack pointer of entry `ist` (1 to 7) of the interrupt stack table.
///
/// # Errors
/// #TS, #SS, page faults, restart.
pub fn interrupt_stack<E: Environment>(
    core: &mut Core<'_, E>,
    ist: u8,
    ext: u32,
) -> Result<u64, Fault> {
    let pointer = read_tss(core, tss64::ist(ist), 8, ext)?;
    canonical(pointer, ext)
}

/// Protected mode: stack segment and pointer for privilege `level` (0 to 2), checked.
///
/// # Errors
/// #TS, #SS, page faults, restart.
pub fn inner_stack<E: Environment>(
    core: &mut Core<'_, E>,
    level: u8,
    ext: u32,
) -> Result<(Segment, u64), Fault> {
    let (size, pointer_at, selector_at) = match SystemType::of(core.cpu.tr.rights.kind(), false) {
        Some(SystemType::TssBusy | SystemType::TssAvailable) => {
            (4, tss32::esp(level), tss32::ss(level))
        }
        _ => (2, tss16::sp(level), tss16::ss(level)),
    };
    // The selector's end is the last byte that must lie within the limit.
    let selector = Selector(read_tss(core, selector_at, 2, ext)? as u16);
    let pointer = read_tss(core, pointer_at, size, ext)?;
    if selector.is_null() {
        return Err(Exception::invalid_tss(ext).into());
    }
    let found = descriptors::fetch(core, selector, Exception::invalid_tss, ext)?;
    let segment = check_stack_switch(found.raw, selector, level, ext)?;
    descriptors::mark_accessed(core, &found)?;
    Ok((segment, pointer))
}
