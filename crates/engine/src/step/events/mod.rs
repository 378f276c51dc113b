//! Delivery of interrupts and exceptions (SDM vol. 3, chapter 6; 20.1.4 for real mode).

pub mod interrupt_return;
#[cfg(test)]
mod tests;

use trapline_x86::control::{cr0, dr7, rflags};
use trapline_x86::descriptor::{Gate, GateKind, GateUse, Selector, check_gate_target, idt_error};
use trapline_x86::exception::selector_error::EXT;
use trapline_x86::state::{Activity, InterruptShadow};
use trapline_x86::{CpuState, Exception, Gpr, Mode, Segment, SegmentRegister, Vector};

use crate::access::{Core, Fault};
use crate::env::{Environment, Restart};
use crate::step::segments::descriptor as descriptors;
use crate::step::stack::access::Stack;
use crate::step::transfer;
use crate::step::transfer::far_return::CodeSegment;
use crate::step::transfer::task::{self, TaskSwitch};
use crate::system_item::{Decoded, SystemItem};
use crate::tlb::Privilege;

/// Something that is delivered through the interrupt descriptor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Raised by an instruction. RIP is where execution resumes: the instruction's own address for
    /// a fault, the next one's for a trap.
    Exception(Exception),
    /// INT n, INT3 or INTO of `len` bytes at RIP.
    SoftwareInterrupt { vector: u8, len: u8 },
    /// An external interrupt.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
}

/// Where delivery led.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// To a handler: RIP is its first instruction.
    Handler,
    /// To a handler, and what was pushed met data breakpoints: this #DB comes before the handler's
    /// first instruction.
    Breakpoint(Exception),
    /// To shutdown.
    TripleFault,
}

/// What the table look-up and the pushes need to know of an event.
struct Plan {
    vector: u8,
    error: Option<u32>,
    /// RIP as saved.
    rip: u64,
    /// RFLAGS as saved.
    flags: u64,
    software: bool,
    /// [`EXT`] where an error of the delivery must say so.
    ext: u32,
}

impl Plan {
    fn new(cpu: &CpuState, event: Event) -> Self {
        let mut plan = Self {
            vector: 0,
            error: None,
            rip: cpu.rip,
            flags: cpu.rflags,
            software: false,
            ext: EXT,
        };
        match event {
            Event::Exception(e) => {
                plan.vector = e.vector as u8;
                plan.error = e.error;
                plan.flags &= !rflags::RF;
                if sets_resume_flag(cpu, &e) {
                    plan.flags |= rflags::RF;
                }
            }
            Event::SoftwareInterrupt { vector, len } => {
                plan.vector = vector;
                plan.software = true;
                plan.ext = 0;
                plan.rip = next_rip(cpu, usize::from(len));
                plan.flags &= !rflags::RF;
            }
            Event::Interrupt(vector) => plan.vector = vector,
            Event::Nmi => plan.vector = Vector::Nmi as u8,
        }
        plan
    }

    /// The error code of an exception that concerns the event's own table entry.
    fn idt_error(&self) -> u32 {
        idt_error(self.vector, self.ext != 0)
    }
}

/// RIP after an instruction of `len` bytes, wrapped to the code's width.
pub fn next_rip(cpu: &CpuState, len: usize) -> u64 {
    let next = cpu.rip.wrapping_add(len as u64);
    if cpu.mode() == Mode::Long64 {
        next
    } else {
        next & 0xffff_ffff
    }
}

/// Whether RFLAGS is saved with RF set: for faults, except instruction breakpoints, whose handler
/// sets it (SDM vol. 3, 17.3.1.1).
fn sets_resume_flag(cpu: &CpuState, e: &Exception) -> bool {
    match e.vector {
        // Behind an iteration of a repeated instruction RF is set, as it is behind IRET at times.
        Vector::Debug => {
            e.dr6 & trapline_x86::control::dr6::BD != 0 || cpu.rflags & rflags::RF != 0
        }
        Vector::DoubleFault | Vector::MachineCheck => cpu.rflags & rflags::RF != 0,
        _ => e.is_fault(),
    }
}

/// Delivers one event. On an error the registers are as before, except CR2 and DR6, which the
/// event itself defines.
///
/// # Errors
/// The exception that the delivery raised, or restart.
pub fn deliver<E: Environment>(core: &mut Core<'_, E>, event: Event) -> Result<(), Fault> {
    let plan = Plan::new(core.cpu, event);
    if let Event::Exception(e) = event {
        if let Some(linear) = e.cr2 {
            core.cpu.cr2 = linear;
        }
        core.cpu.dr6 |= e.dr6;
    }
    match core.cpu.mode() {
        Mode::Real => deliver_real(core, &plan)?,
        _ if core.cpu.long_mode() => deliver_long(core, &plan)?,
        _ => deliver_protected(core, &plan)?,
    }
    let cpu = &mut *core.cpu;
    match event {
        Event::Nmi => cpu.nmi_blocked = true,
        Event::Exception(e) if e.vector == Vector::Debug => cpu.dr7 &= !dr7::GD,
        _ => {}
    }
    cpu.shadow = InterruptShadow::None;
    cpu.activity = Activity::Active;
    Ok(())
}

/// Delivers an event and whatever its delivery raises: a second exception, a double fault, or
/// shutdown (SDM vol. 3, tables 6-4 and 6-5). Data breakpoints on the frame are traps behind the
/// delivery. Those on the frame of #DB itself come again and again, as on processors: one call
/// delivers one event, so that its caller can look at what else is due.
///
/// # Errors
/// [`Restart`]: deliver the same event again.
pub fn raise<E: Environment>(core: &mut Core<'_, E>, event: Event) -> Result<Delivered, Restart> {
    let mut event = event;
    loop {
        let second = match deliver(core, event) {
            Ok(()) => {
                return Ok(match core.data_breakpoints {
                    0 => Delivered::Handler,
                    hit => Delivered::Breakpoint(Exception::debug(hit)),
                });
            }
            Err(Fault::Restart) => return Err(Restart),
            Err(Fault::Exception(e)) => e,
        };
        // A page fault sets CR2 even where a double fault takes its place.
        if let Some(linear) = second.cr2 {
            core.cpu.cr2 = linear;
        }
        let Event::Exception(first) = event else {
            event = Event::Exception(second);
            continue;
        };
        let severe = second.is_contributory() || second.vector == Vector::PageFault;
        // Nothing but shutdown follows a double fault, so that no guest can keep the delivery busy.
        if first.vector == Vector::DoubleFault {
            core.cpu.activity = Activity::Shutdown;
            return Ok(Delivered::TripleFault);
        }
        let double = match first.vector {
            Vector::PageFault => severe,
            _ => first.is_contributory() && second.is_contributory(),
        };
        // A benign exception (#AC) while an exception is delivered would raise itself for ever.
        let double = double || !severe;
        event = Event::Exception(if double { double_fault() } else { second });
    }
}

/// #DF.
fn double_fault() -> Exception {
    Exception {
        vector: Vector::DoubleFault,
        error: Some(0),
        cr2: None,
        dr6: 0,
    }
}

/// Real mode: the interrupt vector table holds far pointers.
fn deliver_real<E: Environment>(core: &mut Core<'_, E>, plan: &Plan) -> Result<(), Fault> {
    let offset = u64::from(plan.vector) * 4;
    if offset + 3 > u64::from(core.cpu.idtr.limit) {
        return Err(Exception::general_protection(plan.idt_error()).into());
    }
    let linear = core.cpu.idtr.base.wrapping_add(offset);
    let target = core.read::<4>(linear, Privilege::Supervisor)?;
    let mut stack = Stack::current(core.cpu);
    let cs = core.cpu.cs().selector;
    stack.push_all(core, 2, &[plan.flags, u64::from(cs), plan.rip])?;
    let cpu = &mut *core.cpu;
    stack.commit_pointer(cpu);
    let cs = cpu.segment_mut(SegmentRegister::Cs);
    cs.selector = (target >> 16) as u16;
    cs.base = (target >> 16) << 4;
    cpu.rip = target & 0xffff;
    cpu.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
    Ok(())
}

/// Reads and checks the event's gate.
fn gate<E: Environment>(core: &mut Core<'_, E>, plan: &Plan) -> Result<Gate, Fault> {
    let long = core.cpu.long_mode();
    let size = if long { 16 } else { 8 };
    let offset = u64::from(plan.vector) * size;
    let invalid = || Exception::general_protection(plan.idt_error()).into();
    if offset + size - 1 > u64::from(core.cpu.idtr.limit) {
        return Err(invalid());
    }
    let linear = core.cpu.idtr.base.wrapping_add(offset);
    let item = if long {
        SystemItem::WideGate
    } else {
        SystemItem::Gate
    };
    let Decoded::Gate(Some(gate)) = descriptors::read_item(core, linear, item)? else {
        return Err(invalid());
    };
    if !gate.kind.is_event() {
        return Err(invalid());
    }
    if plan.software && gate.dpl < core.cpu.cpl() {
        return Err(invalid());
    }
    if !gate.present {
        return Err(Exception::segment_not_present(plan.idt_error()).into());
    }
    Ok(gate)
}

/// Reads and checks the code segment that a gate names. CS's selector has the new privilege level.
fn handler_segment<E: Environment>(
    core: &mut Core<'_, E>,
    plan: &Plan,
    selector: Selector,
) -> Result<CodeSegment, Fault> {
    if selector.is_null() {
        return Err(Exception::general_protection(plan.ext).into());
    }
    let code = descriptors::fetch(core, selector, Exception::general_protection, plan.ext)?;
    let cpu = &core.cpu;
    let through = GateUse::Event {
        external: plan.ext != 0,
        virtual8086: cpu.mode() == Mode::Virtual8086,
    };
    let (cs, _) = check_gate_target(code.raw, selector, cpu.cpl(), through, cpu.long_mode())?;
    Ok((code, cs))
}

/// Makes the handler's code segment and flags current. Nothing here can fail.
fn enter_handler(cpu: &mut CpuState, gate: &Gate, cs: Segment) {
    *cpu.segment_mut(SegmentRegister::Cs) = cs;
    cpu.cpl = cs.rpl();
    cpu.rip = gate.offset;
    let mut clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
    if gate.kind.is_interrupt() {
        clear |= rflags::IF;
    }
    cpu.rflags &= !clear;
}

/// Protected and virtual-8086 mode.
fn deliver_protected<E: Environment>(core: &mut Core<'_, E>, plan: &Plan) -> Result<(), Fault> {
    let gate = gate(core, plan)?;
    if gate.kind == GateKind::Task {
        return task::switch(
            core,
            TaskSwitch::Event {
                error: plan.error,
                rip: plan.rip,
                flags: plan.flags,
                ext: plan.ext,
            },
            gate.selector,
        );
    }
    let (code, cs) = handler_segment(core, plan, gate.selector)?;
    let level = cs.rpl();
    let size = gate.kind.bits() as usize / 8;
    if gate.offset > u64::from(cs.limit) {
        return Err(Exception::general_protection(plan.ext).into());
    }
    let cpu = &core.cpu;
    let virtual_mode = cpu.mode() == Mode::Virtual8086;
    let selector = |s| u64::from(cpu.segment(s).selector);
    let mut frame = [0; 10];
    let mut n = 0;
    let mut add = |value| {
        frame[n] = value;
        n += 1;
    };
    let inner = level != cpu.cpl();
    if inner {
        if virtual_mode {
            use SegmentRegister::{Ds, Es, Fs, Gs};
            [Gs, Fs, Ds, Es].into_iter().for_each(|s| add(selector(s)));
        }
        add(selector(SegmentRegister::Ss));
        add(cpu.gpr(Gpr::Rsp));
    }
    add(plan.flags);
    add(selector(SegmentRegister::Cs));
    add(plan.rip);
    if let Some(error) = plan.error {
        add(u64::from(error));
    }
    let mut stack = if inner {
        let (segment, pointer) = transfer::stack::inner_stack(core, level, plan.ext)?;
        let error = Selector(segment.selector).error() | plan.ext;
        Stack::in_segment(core.cpu, segment, pointer, level, error)
    } else {
        let mut stack = Stack::current(core.cpu);
        stack.error = plan.ext;
        stack
    };
    stack.push_all(core, size, &frame[..n])?;
    descriptors::mark_accessed(core, &code)?;
    let cpu = &mut *core.cpu;
    if inner {
        *cpu.segment_mut(SegmentRegister::Ss) = stack.segment;
        if virtual_mode {
            use SegmentRegister::{Ds, Es, Fs, Gs};
            for s in [Es, Ds, Fs, Gs] {
                *cpu.segment_mut(s) = Segment::null(0);
            }
        }
    }
    stack.commit_pointer(cpu);
    enter_handler(cpu, &gate, cs);
    Ok(())
}

/// Long mode (SDM vol. 3, 6.14).
fn deliver_long<E: Environment>(core: &mut Core<'_, E>, plan: &Plan) -> Result<(), Fault> {
    let gate = gate(core, plan)?;
    let (code, cs) = handler_segment(core, plan, gate.selector)?;
    let level = cs.rpl();
    if !CpuState::is_canonical(gate.offset) {
        return Err(Exception::general_protection(plan.ext).into());
    }
    let inner = level != core.cpu.cpl();
    let top = if gate.ist != 0 {
        transfer::stack::interrupt_stack(core, gate.ist, plan.ext)?
    } else if inner {
        transfer::stack::inner_pointer(core, level, plan.ext)?
    } else {
        core.cpu.gpr(Gpr::Rsp)
    };
    let mut stack = Stack::long(core.cpu, top & !15, level);
    stack.error = plan.ext;
    let cpu = &core.cpu;
    let frame = [
        u64::from(cpu.ss().selector),
        cpu.gpr(Gpr::Rsp),
        plan.flags,
        u64::from(cpu.cs().selector),
        plan.rip,
        u64::from(plan.error.unwrap_or(0)),
    ];
    let n = if plan.error.is_some() { 6 } else { 5 };
    stack.push_all(core, 8, &frame[..n])?;
    descriptors::mark_accessed(core, &code)?;
    let cpu = &mut *core.cpu;
    if inner {
        *cpu.segment_mut(SegmentRegister::Ss) = transfer::stack::null_stack_segment(level);
    }
    cpu.set_gpr(Gpr::Rsp, stack.pointer);
    enter_handler(cpu, &gate, cs);
    Ok(())
}

/// INT n, INT3, INTO: delivers and leaves RIP at the handler.
///
/// # Errors
/// What the delivery raises.
pub fn software_interrupt<E: Environment>(
    core: &mut Core<'_, E>,
    vector: u8,
    len: usize,
) -> Result<(), Fault> {
    deliver(
        core,
        Event::SoftwareInterrupt {
            vector,
            len: len as u8,
        },
    )
}

/// Whether the processor is in protected mode, where gates and descriptors are used.
pub(super) fn is_protected(cpu: &CpuState) -> bool {
    cpu.cr0 & cr0::PE != 0 && cpu.rflags & rflags::VM == 0
}
