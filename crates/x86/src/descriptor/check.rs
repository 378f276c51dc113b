//! What loading a descriptor into a segment register gives, or which exception.
//!
//! The caller has dealt with null selectors and with selectors past their table's limit. A segment
//! returned has its accessed bit set; the caller sets it in the table if it is not there yet.

use super::{RawDescriptor, Selector, SystemType, WideDescriptor};
use crate::exception::selector_error;
use crate::segment::{Rights, Segment};
use crate::{CpuState, Exception};

fn loaded(raw: RawDescriptor, selector: Selector) -> Segment {
    let segment = raw.segment(selector);
    Segment {
        rights: Rights(segment.rights.0 | Rights::ACCESSED),
        ..segment
    }
}

/// Loads DS, ES, FS or GS (SDM vol. 2, MOV).
///
/// # Errors
/// #GP(selector), #NP(selector).
pub fn check_data_load(
    raw: RawDescriptor,
    selector: Selector,
    cpl: u8,
) -> Result<Segment, Exception> {
    let rights = raw.rights();
    let privileged = !rights.is_conforming() && raw.dpl() < cpl.max(selector.rpl());
    if !rights.is_readable() || privileged {
        return Err(Exception::general_protection(selector.error()));
    }
    if !raw.is_present() {
        return Err(Exception::segment_not_present(selector.error()));
    }
    Ok(loaded(raw, selector))
}

/// Loads SS by MOV, POP, LSS, or by a return to privilege level `cpl`.
///
/// # Errors
/// #GP(selector), #SS(selector).
pub fn check_stack_load(
    raw: RawDescriptor,
    selector: Selector,
    cpl: u8,
) -> Result<Segment, Exception> {
    if selector.rpl() != cpl || !raw.rights().is_writable_data() || raw.dpl() != cpl {
        return Err(Exception::general_protection(selector.error()));
    }
    if !raw.is_present() {
        return Err(Exception::stack_fault(selector.error()));
    }
    Ok(loaded(raw, selector))
}

/// Loads a null selector into SS: `long64` says that the code which will run with it is 64-bit,
/// at level `cpl`; there it is allowed below level 3.
///
/// # Errors
/// #GP(0).
pub fn null_stack_load(selector: Selector, cpl: u8, long64: bool) -> Result<Segment, Exception> {
    if long64 && cpl < 3 && selector.rpl() == cpl {
        let segment = Segment::null(selector.0);
        Ok(Segment {
            rights: segment.rights.with_dpl(cpl),
            ..segment
        })
    } else {
        Err(Exception::general_protection(0))
    }
}

/// Loads SS from a TSS for a transfer to the inner level `new_cpl`; `external` is
/// [`selector_error::EXT`] or 0.
///
/// # Errors
/// #TS(selector), #SS(selector).
pub fn check_stack_switch(
    raw: RawDescriptor,
    selector: Selector,
    new_cpl: u8,
    external: u32,
) -> Result<Segment, Exception> {
    let error = selector.error() | (external & selector_error::EXT);
    if selector.rpl() != new_cpl || raw.dpl() != new_cpl || !raw.rights().is_writable_data() {
        return Err(Exception::invalid_tss(error));
    }
    if !raw.is_present() {
        return Err(Exception::stack_fault(error));
    }
    Ok(loaded(raw, selector))
}

/// Both 64-bit and 32-bit: reserved in long mode.
fn is_reserved_code(rights: Rights, long_mode: bool) -> bool {
    long_mode && rights.has(Rights::L) && rights.has(Rights::DB)
}

/// Loads CS by a far JMP or CALL straight to a code segment. The level stays; the segment's
/// selector has it as its RPL.
///
/// # Errors
/// #GP(selector), #NP(selector).
pub fn check_far_transfer(
    raw: RawDescriptor,
    selector: Selector,
    cpl: u8,
    long_mode: bool,
) -> Result<Segment, Exception> {
    let rights = raw.rights();
    let allowed = if rights.is_conforming() {
        raw.dpl() <= cpl
    } else {
        selector.rpl() <= cpl && raw.dpl() == cpl
    };
    if !rights.is_code() || is_reserved_code(rights, long_mode) || !allowed {
        return Err(Exception::general_protection(selector.error()));
    }
    if !raw.is_present() {
        return Err(Exception::segment_not_present(selector.error()));
    }
    Ok(loaded(raw, selector.with_rpl(cpl)))
}

/// How a gate is gone through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateUse {
    Jump,
    Call,
    /// Delivery of an interrupt or exception.
    Event {
        /// The event is external to the program: sets EXT in error codes.
        external: bool,
        /// RFLAGS.VM was set: only level 0 may handle it.
        virtual8086: bool,
    },
}

/// Loads CS through a gate that has itself been checked. The second value is the new privilege
/// level; if it is less than `cpl` the stack must be switched.
///
/// # Errors
/// #GP(selector), #NP(selector).
pub fn check_gate_target(
    raw: RawDescriptor,
    selector: Selector,
    cpl: u8,
    through: GateUse,
    long_mode: bool,
) -> Result<(Segment, u8), Exception> {
    let error = match through {
        GateUse::Event { external: true, .. } => selector.error() | selector_error::EXT,
        _ => selector.error(),
    };
    let rights = raw.rights();
    let conforming = rights.is_conforming();
    let wrong_size = long_mode && (!rights.has(Rights::L) || rights.has(Rights::DB));
    let allowed = match through {
        GateUse::Jump if !conforming => raw.dpl() == cpl,
        _ => raw.dpl() <= cpl,
    };
    if !rights.is_code() || wrong_size || !allowed {
        return Err(Exception::general_protection(error));
    }
    if !raw.is_present() {
        return Err(Exception::segment_not_present(error));
    }
    let new_cpl = if conforming { cpl } else { raw.dpl() };
    let from_virtual = matches!(
        through,
        GateUse::Event {
            virtual8086: true,
            ..
        }
    );
    if from_virtual && new_cpl != 0 {
        return Err(Exception::general_protection(error));
    }
    Ok((loaded(raw, selector.with_rpl(new_cpl)), new_cpl))
}

/// Loads CS by a far RET or IRET within protected or long mode. The new privilege level is the
/// selector's RPL.
///
/// # Errors
/// #GP(selector), #NP(selector).
pub fn check_return(
    raw: RawDescriptor,
    selector: Selector,
    cpl: u8,
    long_mode: bool,
) -> Result<Segment, Exception> {
    let rights = raw.rights();
    let rpl = selector.rpl();
    let allowed = if rights.is_conforming() {
        raw.dpl() <= rpl
    } else {
        raw.dpl() == rpl
    };
    if rpl < cpl || !rights.is_code() || is_reserved_code(rights, long_mode) || !allowed {
        return Err(Exception::general_protection(selector.error()));
    }
    if !raw.is_present() {
        return Err(Exception::segment_not_present(selector.error()));
    }
    Ok(loaded(raw, selector))
}

/// Whether DS, ES, FS or GS keeps `segment` on a return to the outer level `new_cpl`; if not, it
/// becomes null.
pub fn survives_return(segment: &Segment, new_cpl: u8) -> bool {
    segment.rights.is_unusable()
        || segment.rights.is_conforming()
        || segment.rights.dpl() >= new_cpl
}

/// Loads LDTR (LLDT).
///
/// # Errors
/// #GP(selector), also for a base that is not canonical; #NP(selector).
pub fn check_ldt_load(
    descriptor: WideDescriptor,
    selector: Selector,
    long_mode: bool,
) -> Result<Segment, Exception> {
    system_load(descriptor, selector, long_mode, |kind| {
        kind == SystemType::Ldt
    })
}

/// Loads TR (LTR). The segment returned is busy; the caller sets [`Rights::BUSY`] in the
/// table.
///
/// # Errors
/// #GP(selector), also for a base that is not canonical; #NP(selector).
pub fn check_task_load(
    descriptor: WideDescriptor,
    selector: Selector,
    long_mode: bool,
) -> Result<Segment, Exception> {
    let available = |kind| matches!(kind, SystemType::TssAvailable | SystemType::Tss16Available);
    let segment = system_load(descriptor, selector, long_mode, available)?;
    Ok(Segment {
        rights: Rights(segment.rights.0 | Rights::BUSY),
        ..segment
    })
}

fn system_load(
    descriptor: WideDescriptor,
    selector: Selector,
    long_mode: bool,
    wanted: impl Fn(SystemType) -> bool,
) -> Result<Segment, Exception> {
    let raw = descriptor.low;
    let fits = raw.system_type(long_mode).is_some_and(wanted);
    if selector.ti() || !fits || (long_mode && !descriptor.is_well_formed()) {
        return Err(Exception::general_protection(selector.error()));
    }
    if !raw.is_present() {
        return Err(Exception::segment_not_present(selector.error()));
    }
    let mut segment = raw.segment(selector);
    if long_mode {
        segment.base = descriptor.base();
        if !CpuState::is_canonical(segment.base) {
            return Err(Exception::general_protection(selector.error()));
        }
    }
    Ok(segment)
}
