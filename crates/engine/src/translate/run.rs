//! Runs translated code, and the helpers that it calls.
//!
//! The frame and the registers of [`CpuState`] are kept equal at every change between translated
//! code and Rust: general-purpose registers and status flags are copied, vector registers are
//! loaded and stored by the code itself where it needs them.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering};

use trapline_x86::control::rflags;
use trapline_x86::state::{Activity, Gpr};
use trapline_x86::vector::MXCSR_RESET;
use trapline_x86::{CpuState, SegmentRegister};

use super::assembler::JUMP_BYTES;
use super::emit::{StackEffect, leaves};
use super::stubs::exit;
use crate::access::{Core, Fault, copy_from_guest};
use crate::decode::Op;
use crate::env::{Backing, Environment, Span, Translation};
use crate::frame::{Frame, field};
use crate::step::Flow;
use crate::step::run::{Turn, single_operation};
use crate::tlb::{Access, Privilege};

/// Why translated code was left. RIP is that of the next instruction unless a site says where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// By the site with this number.
    Site(u64),
    /// A helper executed an instruction that ended so.
    Turn(Turn),
    /// The instruction at this host address must be stepped; whether the host raised an exception
    /// there.
    Step { address: u64, fault: bool },
}

const STATUS: u64 = 0x8d5;

/// What the helpers get.
struct Context<'a, 'b, E: Environment> {
    core: &'a mut Core<'b, E>,
    turn: Turn,
}

/// Copies registers and flags into the frame.
fn enter_frame(cpu: &CpuState, frame: &mut Frame) {
    for (n, &value) in cpu.gpr.iter().enumerate() {
        frame.set(field::GPR + n as i32 * 8, value);
    }
    let overflow = cpu.rflags >> 11 & 1;
    let others = cpu.rflags & 0xd5 | 2;
    frame.set(field::FLAGS, overflow | others << 8);
    frame.set(field::INTERRUPTS, cpu.rflags >> 9 & 1);
    frame.set(field::ACCESS, cpu.rflags >> 18 & 1);
    frame.set(
        field::OTHER_FLAGS,
        cpu.rflags & !(STATUS | rflags::IF | rflags::AC | rflags::ONE),
    );
    frame.set(field::FS_BASE, cpu.seg[SegmentRegister::Fs as usize].base);
    frame.set(field::GS_BASE, cpu.seg[SegmentRegister::Gs as usize].base);
    frame.set(field::KERNEL_GS_BASE, cpu.msr.kernel_gs_base);
}

/// Copies registers and flags back.
fn leave_frame(cpu: &mut CpuState, frame: &Frame) {
    for (n, value) in cpu.gpr.iter_mut().enumerate() {
        *value = frame.get(field::GPR + n as i32 * 8);
    }
    let flags = frame.get(field::FLAGS);
    let status = (flags & 1) << 11 | flags >> 8 & 0xd5;
    cpu.seg[SegmentRegister::Gs as usize].base = frame.get(field::GS_BASE);
    cpu.msr.kernel_gs_base = frame.get(field::KERNEL_GS_BASE);
    let interrupts = (frame.get(field::INTERRUPTS) & 1) << 9;
    let access = (frame.get(field::ACCESS) & 1) << 18;
    let kept = cpu.rflags & !(STATUS | rflags::IF | rflags::AC);
    cpu.rflags = kept | status | interrupts | access;
}

/// Where to begin.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The translator's way in.
    pub(super) function: u64,
    pub(super) address: u64,
    /// The address of the VCPU's attention word.
    pub(super) attention: u64,
}

/// Executes translated code from `entry`, that of a live block which was translated for the
/// current context and whose first instruction is at RIP.
///
/// # Safety
/// `entry` is as said, its translator and the attention word live; while it runs the translator is not reset (blocks may be added, linked and
/// unlinked), and the TLB holds only translations that may be used directly.
pub unsafe fn run<E: Environment>(core: &mut Core<'_, E>, entry: Entry) -> Left {
    core.leave_block = false;
    let vector = (&raw mut core.cpu.vector) as u64;
    let frame = core.tlb.frame_mut();
    enter_frame(core.cpu, frame);
    frame.set(field::VECTOR, vector);
    frame.set(field::ATTENTION, entry.attention);
    frame.set(field::MISS, miss::<E> as *const () as u64);
    frame.set(field::ASSIST, assist::<E> as *const () as u64);
    frame.set(field::VECTORS_AWAY, 1);
    frame.set(field::INTERRUPT_DUE, u64::from(core.env.is_interrupt_due()));
    frame.set(field::HOST_MXCSR, u64::from(MXCSR_RESET));
    let stack_pointer = frame.stack_pointer();
    let mut context = Context {
        core,
        turn: Turn::Continue,
    };
    let pointer = &raw mut context;
    // SAFETY: `pointer` was just made; the frame belongs to this core.
    unsafe { &mut *pointer }
        .core
        .tlb
        .frame_mut()
        .set(field::CONTEXT, pointer as u64);
    // SAFETY: the stub has this signature and obeys the calling convention; the entry is live, as
    // the caller promises. Helpers get `pointer` back, and nothing else uses it meanwhile.
    let enter: extern "sysv64" fn(u64, u64) = unsafe { std::mem::transmute(entry.function) };
    enter(stack_pointer, entry.address);
    // SAFETY: generated code has returned.
    let context = unsafe { &mut *pointer };
    let core = &mut *context.core;
    let code = core.tlb.frame().get(field::EXIT);
    if code == exit::MOVED {
        // The helper has brought the registers up to date.
        return Left::Turn(context.turn);
    }
    leave_frame(core.cpu, core.tlb.frame());
    match code {
        exit::STEP | exit::FAULT => Left::Step {
            address: core.tlb.frame().get(field::RETURN),
            fault: code == exit::FAULT,
        },
        site => Left::Site(site),
    }
}

/// Executes an indirect branch that left by [`super::Site::Branch`]; whether it did. If not, nothing has
/// changed and the instruction must be stepped, which raises what there is to raise.
pub fn finish_branch<E: Environment>(core: &mut Core<'_, E>, effect: StackEffect) -> bool {
    let target = core.tlb.frame().get(field::TARGET);
    if !CpuState::is_canonical(target) {
        return false;
    }
    match effect {
        StackEffect::None => {}
        StackEffect::Pop(bytes) => {
            let stack = core.cpu.gpr(Gpr::Rsp).wrapping_add(u64::from(bytes));
            core.cpu.set_gpr(Gpr::Rsp, stack);
        }
        StackEffect::Push(next) => {
            // Only what needs no event: the rest has its order.
            let stack = core.cpu.gpr(Gpr::Rsp).wrapping_sub(8);
            let privilege = Privilege::of_data(core.cpu);
            if stack & 4095 > 4088 {
                return false;
            }
            let Some(host) = core.tlb.host(stack, privilege, true) else {
                return false;
            };
            // SAFETY: the TLB holds what may be written directly, and the eight bytes are on one
            // page.
            unsafe { host.cast::<u64>().write_unaligned(next) };
            core.cpu.set_gpr(Gpr::Rsp, stack);
        }
    }
    core.cpu.rip = target;
    true
}

/// A look-up missed: translates, so that it hits when it is repeated. Anything but 0 leaves
/// translated code.
extern "sysv64" fn miss<E: Environment>(
    context: *mut Context<'_, '_, E>,
    linear: u64,
    kind: u64,
) -> u32 {
    // SAFETY: the pointer that `run` put into the frame; `run` itself waits.
    let context = unsafe { &mut *context };
    let core = &mut *context.core;
    let (table, size) = (kind & 0xff, kind >> 8 & 0xff);
    let privilege = match table >> 1 {
        0 => Privilege::Supervisor,
        1 => Privilege::SupervisorOpen,
        _ => Privilege::User,
    };
    let access = if table & 1 == 0 {
        Access::Read
    } else {
        Access::Write
    };
    let fits = (linear & 4095) + size <= 4096;
    if fits && CpuState::is_canonical(linear) {
        let translation = core
            .env
            .translate(core.cpu, core.tlb, linear, privilege, access);
        // Only what the TLB holds now will hit.
        if let Ok(translation) = translation
            && (core
                .tlb
                .host(linear, privilege, access == Access::Write)
                .is_some()
                || opens_gap(core, linear, kind as u32, translation))
        {
            return 0;
        }
    }
    if !fits
        && access == Access::Read
        && let Some(operand) = read_across(core, linear, size as usize, privilege)
    {
        // The operand is found behind the jump at the return address.
        let frame = core.tlb.frame_mut();
        frame.set(field::MISSED, operand);
        let found = frame.get(field::RETURN).wrapping_add(JUMP_BYTES as u64);
        frame.set(field::RETURN, found);
        return 0;
    }
    core.tlb.frame_mut().set(field::EXIT, exit::STEP);
    1
}

/// Reads an operand that lies on two pages, both of which the TLB holds, and gives the host address
/// of the copy. Changes no translation: what was looked up before stays right.
fn read_across<E: Environment>(
    core: &mut Core<'_, E>,
    linear: u64,
    size: usize,
    privilege: Privilege,
) -> Option<u64> {
    let mut bytes = [0; 64];
    let bytes = bytes.get_mut(..size)?;
    let (head, tail) = bytes.split_at_mut_checked(4096 - (linear & 4095) as usize)?;
    let first = core.tlb.host(linear, privilege, false)?;
    let next = linear.wrapping_add(head.len() as u64);
    let second = core.tlb.host(next, privilege, false)?;
    // SAFETY: the TLB holds what may be read directly, and neither part leaves its page; other VCPUs
    // may write there, as on hardware, which reads such an operand in two parts, too.
    unsafe {
        copy_from_guest(first, head);
        copy_from_guest(second, tail);
    }
    Some(core.tlb.frame_mut().keep_operand(linear, bytes))
}

/// Whether a look-up of this kind that missed will find a gap between traces if it is repeated.
fn opens_gap<E: Environment>(
    core: &mut Core<'_, E>,
    linear: u64,
    kind: u32,
    translation: Translation,
) -> bool {
    let Translation {
        gpa,
        backing: Backing::Sensed(host),
    } = translation
    else {
        return false;
    };
    let len = kind >> 8;
    let opens = kind & 1 != 0
        && core.tlb.wants_gap(linear, kind)
        && core.env.may_write_beside(Span { gpa, len });
    if opens {
        core.tlb.open_gap(linear, kind, gpa, host);
    }
    opens
}

/// Whether something asks for the VCPU's attention.
fn is_wanted(frame: &Frame) -> bool {
    let word = frame.get(field::ATTENTION) as *const AtomicU32;
    // SAFETY: `run` put the pointer there; the word outlives the run.
    unsafe { &*word }.load(Ordering::Relaxed) != 0
}

/// Executes one operation. Anything but 0 leaves translated code.
extern "sysv64" fn assist<E: Environment>(context: *mut Context<'_, '_, E>, op: *const Op) -> u32 {
    // SAFETY: as in `miss`.
    let context = unsafe { &mut *context };
    // SAFETY: the translator keeps the operation until it is reset, which does not happen while
    // its code runs.
    let op = unsafe { &*op };
    let core = &mut *context.core;
    leave_frame(core.cpu, core.tlb.frame());
    core.cpu.rip = op.instruction.ip();
    core.leave_block = false;
    core.look_at_checks();
    let mut result = single_operation(core, op);
    while result == Ok(Flow::Again) && !core.leave_block && !is_wanted(core.tlb.frame()) {
        result = single_operation(core, op);
    }
    let next = op.instruction.next_ip();
    context.turn = match result {
        Ok(Flow::Next) if !core.leave_block && !leaves(op) => {
            reenter(core);
            return 0;
        }
        Ok(Flow::Next | Flow::Leave) => {
            core.cpu.rip = next;
            Turn::Continue
        }
        Ok(Flow::Jump) => Turn::Continue,
        Ok(Flow::Again) => {
            core.cpu.rflags |= rflags::RF;
            Turn::Continue
        }
        Ok(Flow::Stop) => {
            core.cpu.rip = next;
            Turn::Stopped
        }
        Err(Fault::Exception(e)) => Turn::Exception(e),
        Err(Fault::Restart) => Turn::Restart,
    };
    if context.turn == Turn::Continue
        && let Some(address) = next_translated(core)
    {
        reenter(core);
        core.tlb.frame_mut().set(field::RETURN, address);
        return 0;
    }
    core.tlb.frame_mut().set(field::EXIT, exit::MOVED);
    1
}

/// A helper has changed the registers, and translated code goes on.
fn reenter<E: Environment>(core: &mut Core<'_, E>) {
    let due = core.env.is_interrupt_due();
    let frame = core.tlb.frame_mut();
    enter_frame(core.cpu, frame);
    frame.set(field::VECTORS_AWAY, 1);
    frame.set(field::INTERRUPT_DUE, u64::from(due));
}

/// Where translated code goes on at RIP, if nobody needs to have a look before and the jump table
/// knows it.
fn next_translated<E: Environment>(core: &Core<'_, E>) -> Option<u64> {
    let cpu = &*core.cpu;
    if !super::may_run(cpu)
        || cpu.activity != Activity::Active
        || is_wanted(core.tlb.frame())
        || core.env.is_wanted(cpu)
    {
        return None;
    }
    let context = super::Context::of(cpu);
    core.tlb.jump(context.privilege, context.number(), cpu.rip)
}
