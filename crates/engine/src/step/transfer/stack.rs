//! Stacks for more privileged code, from the task-state segment (SDM vol. 3, 5.8.5, 7.7).

use trapline_x86::segment::Rights;
use trapline_x86::{CpuState, Exception, Segment};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::segments::descriptor::{self as descriptors, selector_error, system_type};
use crate::system_item::{Decoded, SystemItem};

/// Offset of RSP0 in a 64-bit TSS.
const RSP0: u64 = 4;
/// Offset of IST1 in a 64-bit TSS.
const IST1: u64 = 36;

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
        return Err(Exception::invalid_tss(selector_error(tr.selector) | ext).into());
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
    let pointer = read_tss(core, RSP0 + 8 * u64::from(level), 8, ext)?;
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
    let pointer = read_tss(
        core,
        IST1 + 8 * (u64::from(ist).wrapping_sub(1) & 7),
        8,
        ext,
    )?;
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
    let kind = core.cpu.tr.rights.kind();
    let wide = matches!(kind, system_type::TSS_BUSY | system_type::TSS_AVAILABLE);
    let (size, at) = if wide {
        (4, 4 + 8 * u64::from(level))
    } else {
        (2, 2 + 4 * u64::from(level))
    };
    // The selector's end is the last byte that must lie within the limit.
    let selector = read_tss(core, at + u64::from(size), 2, ext)? as u16;
    let pointer = read_tss(core, at, size, ext)?;
    if descriptors::is_null(selector) {
        return Err(Exception::invalid_tss(ext).into());
    }
    let found = descriptors::fetch(core, selector, Exception::invalid_tss, ext)?;
    let rights = found.rights();
    let error = selector_error(selector) | ext;
    if selector & 3 != u16::from(level) || rights.dpl() != level || !rights.is_writable_data() {
        return Err(Exception::invalid_tss(error).into());
    }
    if !rights.has(Rights::P) {
        return Err(Exception::stack_fault(error).into());
    }
    descriptors::mark_accessed(core, &found)?;
    let mut segment = found.segment();
    segment.rights.0 |= Rights::ACCESSED;
    Ok((segment, pointer))
}
