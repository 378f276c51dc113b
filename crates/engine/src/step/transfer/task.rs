//! Task switches (SDM vol. 3, 7.3). Long mode has none.

use trapline_x86::control::{cr0, rflags};
use trapline_x86::descriptor::tss::{tss16, tss32};
use trapline_x86::descriptor::{
    Selector, SystemType, check_data_load, check_ldt_load, check_return, check_stack_switch,
};
use trapline_x86::segment::Rights;
use trapline_x86::{Exception, Mode, Segment, SegmentRegister, Vector};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::segments::descriptor::{self as descriptors, Descriptor};
use crate::step::stack::access::Stack;
use crate::step::transfer::far_return::virtual_segment;
use crate::tlb::Privilege;

/// The largest part of a TSS that a switch reads.
const LARGEST: usize = tss32::MINIMUM_LIMIT as usize + 1;

/// Where a TSS keeps the registers: offsets in bytes.
struct Layout {
    /// Bytes of a register and from one selector to the next.
    size: usize,
    minimum_limit: u32,
    cr3: Option<u64>,
    ip: u64,
    flags: u64,
    /// The first of eight.
    ax: u64,
    /// The first selector: ES, CS, SS, DS and, in a 32-bit one, FS and GS.
    es: u64,
    segments: usize,
    ldt: u64,
    trap: Option<u64>,
}

const WIDE: Layout = Layout {
    size: 4,
    minimum_limit: tss32::MINIMUM_LIMIT,
    cr3: Some(tss32::CR3),
    ip: tss32::EIP,
    flags: tss32::EFLAGS,
    ax: tss32::EAX,
    es: tss32::ES,
    segments: 6,
    ldt: tss32::LDT,
    trap: Some(tss32::TRAP),
};

const NARROW: Layout = Layout {
    size: 2,
    minimum_limit: tss16::MINIMUM_LIMIT,
    cr3: None,
    ip: tss16::IP,
    flags: tss16::FLAGS,
    ax: tss16::AX,
    es: tss16::ES,
    segments: 4,
    ldt: tss16::LDT,
    trap: None,
};

impl Layout {
    /// That of a TSS descriptor's type, busy or not.
    fn of(kind: u8) -> Option<&'static Self> {
        use SystemType::{Tss16Available, Tss16Busy, TssAvailable, TssBusy};
        match SystemType::of(kind, false)? {
            TssAvailable | TssBusy => Some(&WIDE),
            Tss16Available | Tss16Busy => Some(&NARROW),
            _ => None,
        }
    }
}

/// What a switch reads of the incoming task's TSS.
struct Image {
    bytes: [u8; LARGEST],
    layout: &'static Layout,
}

impl Image {
    fn field(&self, at: u64, size: usize) -> u64 {
        let at = at as usize;
        let mut value = [0; 8];
        value[..size].copy_from_slice(&self.bytes[at..at + size]);
        u64::from_le_bytes(value)
    }

    fn register(&self, at: u64) -> u64 {
        self.field(at, self.layout.size)
    }

    /// The selector of segment register `n`, null where the TSS has none.
    fn selector(&self, n: usize) -> Selector {
        let l = self.layout;
        if n < l.segments {
            Selector(self.field(l.es + (n * l.size) as u64, 2) as u16)
        } else {
            Selector(0)
        }
    }
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
    let link = Selector(core.read::<2>(tr.base, Privilege::Supervisor)? as u16);
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
    selector: Selector,
) -> Result<(), Fault> {
    let ext = reason.ext();
    let error = selector.error() | ext;
    let returns = matches!(reason, TaskSwitch::Return { .. });
    let invalid: fn(u32) -> Exception = if returns {
        Exception::invalid_tss
    } else {
        Exception::general_protection
    };
    if selector.ti() || selector.is_null() {
        return Err(invalid(error).into());
    }
    let target = descriptors::fetch(core, selector, invalid, ext)?;
    let kind = target.rights().kind();
    let is_busy = target.rights().has(Rights::BUSY);
    let layout = match Layout::of(kind) {
        Some(layout) if target.is_system() && is_busy == returns => layout,
        _ => return Err(invalid(error).into()),
    };
    if !target.is_present() {
        return Err(Exception::segment_not_present(error).into());
    }
    if target.limit() < layout.minimum_limit {
        return Err(Exception::invalid_tss(error).into());
    }
    let old = core.cpu.tr;
    let old_layout = match Layout::of(old.rights.kind()) {
        Some(layout) if old.limit >= layout.minimum_limit && !core.cpu.long_mode() => layout,
        _ => return Err(Exception::invalid_tss(Selector(old.selector).error() | ext).into()),
    };
    let mut image = Image {
        bytes: [0; LARGEST],
        layout,
    };
    let used = layout.minimum_limit as usize + 1;
    core.read_bytes(
        target.base(),
        &mut image.bytes[..used],
        Privilege::Supervisor,
    )?;
    save(core, &old, old_layout, reason)?;
    if reason.nests() {
        core.write::<2>(
            target.base(),
            u64::from(old.selector),
            Privilege::Supervisor,
        )?;
    } else {
        clear_busy(core, Selector(old.selector))?;
    }
    if !returns {
        descriptors::write_type(core, &target, target.rights().0 | Rights::BUSY)?;
    }
    enter(core, &target, &image, reason);
    let entered = core.cpu.clone();
    loop {
        // Memory says that the task has been entered: from here on nothing may start again from
        // the beginning.
        match load(core, &image, reason) {
            Err(Fault::Restart) => *core.cpu = entered.clone(),
            done => return done,
        }
    }
}

/// Writes the outgoing task's registers to its TSS.
fn save<E: Environment>(
    core: &mut Core<'_, E>,
    tr: &Segment,
    layout: &Layout,
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
    let mut bytes = [0; LARGEST];
    let mut put = |at: u64, value: u64| {
        bytes[at as usize..][..layout.size].copy_from_slice(&value.to_le_bytes()[..layout.size]);
    };
    put(layout.ip, rip);
    put(layout.flags, flags);
    let step = layout.size as u64;
    for (n, value) in (0..8).zip(cpu.gpr) {
        put(layout.ax + step * n, value);
    }
    for (n, segment) in (0..).zip(&cpu.seg[..layout.segments]) {
        put(layout.es + step * n, u64::from(segment.selector));
    }
    let saved = layout.ip as usize..layout.es as usize + layout.segments * layout.size;
    core.write_bytes(
        tr.base.wrapping_add(layout.ip),
        &bytes[saved],
        Privilege::Supervisor,
    )
}

fn clear_busy<E: Environment>(core: &mut Core<'_, E>, selector: Selector) -> Result<(), Fault> {
    match descriptors::lookup(core, selector)? {
        Some(found) => descriptors::write_type(core, &found, found.rights().0 & !Rights::BUSY),
        None => Ok(()),
    }
}

/// Loads what of the incoming task's registers can be loaded without a check.
fn enter<E: Environment>(
    core: &mut Core<'_, E>,
    target: &Descriptor,
    image: &Image,
    reason: TaskSwitch,
) {
    let layout = image.layout;
    let cpu = &mut *core.cpu;
    let mut tr = target.segment();
    tr.rights.0 |= Rights::BUSY;
    cpu.tr = tr;
    cpu.cr0 |= cr0::TS;
    if let Some(new_cr3) = layout.cr3.map(|at| image.register(at))
        && cpu.paging()
        && cpu.cr3 != new_cr3
    {
        cpu.cr3 = new_cr3;
        core.env.before_flush(core.tlb);
        core.tlb.flush_non_global();
    }
    let cpu = &mut *core.cpu;
    cpu.rip = image.register(layout.ip);
    let flags = image.register(layout.flags) & 0x003f_7fd7 | rflags::ONE;
    cpu.rflags = flags | if reason.nests() { rflags::NT } else { 0 };
    // The upper halves of registers that a 16-bit TSS does not hold: all ones, as processors do.
    let above = if layout.size == 2 { 0xffff_0000 } else { 0 };
    for (n, register) in (0..8).zip(&mut cpu.gpr[..8]) {
        *register = above | image.register(layout.ax + n * layout.size as u64);
    }
    for (n, segment) in cpu.seg.iter_mut().enumerate() {
        *segment = Segment::null(image.selector(n).0);
    }
    cpu.ldtr = Segment::null(image.field(layout.ldt, 2) as u16);
    // The local breakpoints are the old task's.
    cpu.dr7 &= !0x55;
    if cpu.rflags & rflags::VM != 0 {
        for (n, segment) in cpu.seg.iter_mut().enumerate() {
            *segment = virtual_segment(image.selector(n).0);
        }
        cpu.cpl = 3;
    } else {
        cpu.cpl = image.selector(SegmentRegister::Cs as usize).rpl();
    }
}

/// Loads the incoming task's segments and pushes the event's error code. Errors belong to the new
/// task.
fn load<E: Environment>(
    core: &mut Core<'_, E>,
    image: &Image,
    reason: TaskSwitch,
) -> Result<(), Fault> {
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
        stack.push_all(core, image.layout.size, &[u64::from(error)])?;
        stack.commit_pointer(core.cpu);
    }
    if image
        .layout
        .trap
        .is_some_and(|at| image.field(at, 1) & 1 != 0)
    {
        return Err(Exception::debug(trapline_x86::control::dr6::BT).into());
    }
    Ok(())
}

fn load_ldt<E: Environment>(core: &mut Core<'_, E>) -> Result<(), Fault> {
    let selector = Selector(core.cpu.ldtr.selector);
    if selector.is_null() {
        return Ok(());
    }
    let invalid = Exception::invalid_tss(selector.error());
    if selector.ti() {
        return Err(invalid.into());
    }
    let found = descriptors::fetch(core, selector, Exception::invalid_tss, 0)?;
    // An absent one is #TS, too (SDM vol. 3, table 7-1).
    core.cpu.ldtr = check_ldt_load(found.wide(), selector, false).map_err(|_| invalid)?;
    Ok(())
}

/// The rules of a segment load, with #TS in place of #GP.
fn load_segments<E: Environment>(core: &mut Core<'_, E>) -> Result<(), Fault> {
    use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
    let level = core.cpu.cpl();
    for s in [Cs, Ss, Ds, Es, Fs, Gs] {
        let selector = Selector(core.cpu.segment(s).selector);
        let null = selector.is_null();
        if null && !matches!(s, Cs | Ss) {
            continue;
        }
        let invalid = Exception::invalid_tss(selector.error());
        if null {
            return Err(invalid.into());
        }
        let found = descriptors::fetch(core, selector, Exception::invalid_tss, 0)?;
        let loaded = match s {
            Cs => check_return(found.raw, selector, level, false),
            Ss => check_stack_switch(found.raw, selector, level, 0),
            _ => check_data_load(found.raw, selector, level),
        };
        let segment = loaded.map_err(|e| match e.vector {
            Vector::GeneralProtection => invalid,
            _ => e,
        })?;
        descriptors::mark_accessed(core, &found)?;
        *core.cpu.segment_mut(s) = segment;
    }
    Ok(())
}
