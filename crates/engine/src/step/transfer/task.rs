//! Task switches through a 32-bit TSS (SDM vol. 3, 7.3).
//!
//! Long mode has none. A 16-bit TSS cannot be switched to: #GP with its selector.

use trapline_x86::control::{cr0, rflags};
use trapline_x86::segment::Rights;
use trapline_x86::{CpuState, Exception, Mode, Segment, SegmentRegister};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::segments::descriptor::{
    self as descriptors, Descriptor, selector_error, system_type,
};
use crate::step::stack::access::Stack;
use crate::step::transfer::far_return::virtual_segment;
use crate::tlb::Privilege;

/// Offsets within a 32-bit TSS (SDM vol. 3, figure 7-2).
mod tss {
    pub const CR3: usize = 0x1c;
    pub const EIP: usize = 0x20;
    pub const EFLAGS: usize = 0x24;
    pub const EAX: usize = 0x28;
    pub const ES: usize = 0x48;
    pub const LDT: usize = 0x60;
    pub const TRAP: usize = 0x64;
    pub const BYTES: usize = 0x68;
}

/// What switches tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskSwitch {
    Jump {
        rip: u64,
    },
    Call {
        rip: u64,
    },
    /// A task gate in the IDT.
    Event {
        error: Option<u32>,
        rip: u64,
        flags: u64,
        ext: u32,
    },
    /// IRET with RFLAGS.NT; RIP is behind it.
    Return {
        rip: u64,
    },
}

impl TaskSwitch {
    fn nests(self) -> bool {
        matches!(self, Self::Call { .. } | Self::Event { .. })
    }
    fn ext(self) -> u32 {
        if let Self::Event { ext, .. } = self {
            ext
        } else {
            0
        }
    }
}

/// IRET with RFLAGS.NT: back to the task that the current TSS links to. `rip` is behind it.
///
/// # Errors
/// #TS, #NP, page faults, restart.
pub fn return_to_caller<E: Environment>(core: &mut Core<'_, E>, rip: u64) -> Result<(), Fault> {
    let tr = core.cpu.tr;
    let link = core.read::<2>(tr.base, Privilege::Supervisor)? as u16;
    switch(core, TaskSwitch::Return { rip }, link)
}

/// Switches to the task whose TSS `selector` names.
///
/// # Errors
/// Before the switch: #GP, #TS, #NP, page faults, restart, with nothing changed. After it, in the
/// new task: what loading its segments raises.
pub fn switch<E: Environment>(
    core: &mut Core<'_, E>,
    reason: TaskSwitch,
    selector: u16,
) -> Result<(), Fault> {
    let ext = reason.ext();
    let error = selector_error(selector) | ext;
    let returns = matches!(reason, TaskSwitch::Return { .. });
    let invalid: fn(u32) -> Exception = if returns {
        Exception::invalid_tss
    } else {
        Exception::general_protection
    };
    if selector & 4 != 0 || descriptors::is_null(selector) {
        return Err(invalid(error).into());
    }
    let target = descriptors::fetch(core, selector, invalid, ext)?;
    let wanted = if returns {
        system_type::TSS_BUSY
    } else {
        system_type::TSS_AVAILABLE
    };
    if !target.is_system() || target.rights().kind() != wanted {
        return Err(invalid(error).into());
    }
    if !target.is_present() {
        return Err(Exception::segment_not_present(error).into());
    }
    if (target.limit() as usize) < tss::BYTES - 1 {
        return Err(Exception::invalid_tss(error).into());
    }
    let old = core.cpu.tr;
    if old.rights.kind() & !2 != system_type::TSS_AVAILABLE
        || (old.limit as usize) < tss::BYTES - 1
        || core.cpu.long_mode()
    {
        return Err(Exception::invalid_tss(selector_error(old.selector) | ext).into());
    }
    let mut image = [0; tss::BYTES];
    core.read_bytes(target.base(), &mut image, Privilege::Supervisor)?;

    save(core, &old, reason)?;
    if reason.nests() {
        core.write::<2>(
            target.base(),
            u64::from(old.selector),
            Privilege::Supervisor,
        )?;
    } else {
        set_busy(core, old.selector, false)?;
    }
    if !returns {
        descriptors::write_type(core, &target, target.rights().0 | 2)?;
    }
    load(core, &target, &image, reason)
}

/// Writes the outgoing task's registers to its TSS.
fn save<E: Environment>(
    core: &mut Core<'_, E>,
    tr: &Segment,
    reason: TaskSwitch,
) -> Result<(), Fault> {
    let cpu = &core.cpu;
    let mut flags = cpu.rflags;
    let rip = match reason {
        TaskSwitch::Jump { rip } | TaskSwitch::Call { rip } => rip,
        TaskSwitch::Event {
            rip, flags: saved, ..
        } => {
            flags = saved;
            rip
        }
        TaskSwitch::Return { rip } => {
            flags &= !rflags::NT;
            rip
        }
    };
    let mut bytes = [0; tss::LDT - tss::EIP];
    let mut put = |at: usize, value: u64| {
        bytes[at - tss::EIP..][..4].copy_from_slice(&(value as u32).to_le_bytes());
    };
    put(tss::EIP, rip);
    put(tss::EFLAGS, flags);
    for n in 0..8 {
        put(tss::EAX + 4 * n, cpu.gpr[n]);
    }
    for n in 0..6 {
        put(tss::ES + 4 * n, u64::from(cpu.seg[n].selector));
    }
    core.write_bytes(
        tr.base.wrapping_add(tss::EIP as u64),
        &bytes,
        Privilege::Supervisor,
    )
}

fn set_busy<E: Environment>(
    core: &mut Core<'_, E>,
    selector: u16,
    busy: bool,
) -> Result<(), Fault> {
    let Some(found) = descriptors::lookup(core, selector)? else {
        return Ok(());
    };
    let rights = if busy {
        found.rights().0 | 2
    } else {
        found.rights().0 & !2
    };
    descriptors::write_type(core, &found, rights)
}

/// Loads the incoming task's registers. From here on errors belong to the new task.
fn load<E: Environment>(
    core: &mut Core<'_, E>,
    target: &Descriptor,
    image: &[u8; tss::BYTES],
    reason: TaskSwitch,
) -> Result<(), Fault> {
    let get = |at: usize| {
        u64::from(u32::from_le_bytes([
            image[at],
            image[at + 1],
            image[at + 2],
            image[at + 3],
        ]))
    };
    let cpu = &mut *core.cpu;
    let mut tr = target.segment();
    tr.rights.0 |= 2;
    cpu.tr = tr;
    cpu.cr0 |= cr0::TS;
    let new_cr3 = get(tss::CR3);
    if cpu.paging() && cpu.cr3 != new_cr3 {
        cpu.cr3 = new_cr3;
        core.env.before_flush(core.tlb);
        core.tlb.flush_non_global();
    }
    let cpu = &mut *core.cpu;
    cpu.rip = get(tss::EIP);
    let flags = get(tss::EFLAGS) & 0x003f_7fd7 | rflags::ONE;
    cpu.rflags = flags | if reason.nests() { rflags::NT } else { 0 };
    for n in 0..8 {
        cpu.gpr[n] = get(tss::EAX + 4 * n);
    }
    let selector = |n: usize| get(tss::ES + 4 * n) as u16;
    for n in 0..6 {
        cpu.seg[n] = Segment::null(selector(n));
    }
    cpu.ldtr = Segment::null(get(tss::LDT) as u16);
    // The local breakpoints are the old task's.
    cpu.dr7 &= !0x55;
    if cpu.rflags & rflags::VM != 0 {
        for n in 0..6 {
            cpu.seg[n] = virtual_segment(selector(n));
        }
        cpu.cpl = 3;
    } else {
        cpu.cpl = selector(SegmentRegister::Cs as usize) as u8 & 3;
    }
    load_ldt(core)?;
    if core.cpu.mode() != Mode::Virtual8086 {
        load_segments(core)?;
    }
    if core.cpu.rip > u64::from(core.cpu.cs().limit) {
        return Err(Exception::general_protection(0).into());
    }
    if let TaskSwitch::Event {
        error: Some(error), ..
    } = reason
    {
        let mut stack = Stack::current(core.cpu);
        stack.push_all(core, 4, &[u64::from(error)])?;
        stack.commit_pointer(core.cpu);
    }
    if image[tss::TRAP] & 1 != 0 {
        return Err(Exception::debug(trapline_x86::control::dr6::BT).into());
    }
    Ok(())
}

fn load_ldt<E: Environment>(core: &mut Core<'_, E>) -> Result<(), Fault> {
    let selector = core.cpu.ldtr.selector;
    if descriptors::is_null(selector) {
        return Ok(());
    }
    let invalid = || Exception::invalid_tss(selector_error(selector)).into();
    if selector & 4 != 0 {
        return Err(invalid());
    }
    let found = descriptors::fetch(core, selector, Exception::invalid_tss, 0)?;
    if !found.is_system() || found.rights().kind() != system_type::LDT || !found.is_present() {
        return Err(invalid());
    }
    core.cpu.ldtr = found.segment();
    Ok(())
}

/// The rules of a segment load, with #TS in place of #GP.
fn load_segments<E: Environment>(core: &mut Core<'_, E>) -> Result<(), Fault> {
    use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
    let level = core.cpu.cpl();
    for s in [Cs, Ss, Ds, Es, Fs, Gs] {
        let selector = core.cpu.segment(s).selector;
        let null = descriptors::is_null(selector);
        if null && !matches!(s, Cs | Ss) {
            continue;
        }
        let error = selector_error(selector);
        let invalid = || Err(Exception::invalid_tss(error).into());
        if null {
            return invalid();
        }
        let found = descriptors::fetch(core, selector, Exception::invalid_tss, 0)?;
        if !permits(core.cpu, s, &found, level) {
            return invalid();
        }
        if !found.is_present() {
            return Err(match s {
                Ss => Exception::stack_fault(error),
                _ => Exception::segment_not_present(error),
            }
            .into());
        }
        descriptors::mark_accessed(core, &found)?;
        let mut segment = found.segment();
        segment.rights.0 |= Rights::ACCESSED;
        *core.cpu.segment_mut(s) = segment;
    }
    Ok(())
}

fn permits(cpu: &CpuState, s: SegmentRegister, found: &Descriptor, level: u8) -> bool {
    let rights = found.rights();
    let rpl = found.selector as u8 & 3;
    match s {
        SegmentRegister::Cs if rights.is_conforming() => rights.dpl() <= rpl,
        SegmentRegister::Cs => rights.is_code() && rights.dpl() == rpl,
        SegmentRegister::Ss => {
            rights.is_writable_data() && rights.dpl() == level && rpl == cpu.cpl()
        }
        _ => rights.is_readable() && (rights.is_conforming() || rights.dpl() >= rpl.max(level)),
    }
}
