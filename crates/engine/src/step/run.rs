//! The innermost loop: executes the operations of a block.
#![allow(unsafe_code)]

use trapline_x86::control::{cr4, dr6, dr7, rflags};
use trapline_x86::state::InterruptShadow;
use trapline_x86::{CpuState, Exception, Mode, Vector};

use super::{Executed, Flow, address, bits, control, masked, stack, strings, xstate};
use crate::access::{Core, Fault, OperandAccess, host_fault};
use crate::decode::op::{FlatAddress, NO_REGISTER, RegOperand, StateCheck};
use crate::decode::{Block, Op, OpKind};
use crate::env::Environment;
use crate::native::{self, Thunk};
use crate::tlb::{Access, Privilege};

/// How a turn in a block ended. RIP is that of the next instruction to execute, or of the faulting
/// one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Go on at RIP.
    Continue,
    /// The processor's activity changed.
    Stopped,
    /// The instruction at RIP raised this, or, for debug traps, the one before RIP.
    Exception(Exception),
    /// Start the instruction at RIP again.
    Restart,
}

/// Executes `block` from its first operation, where RIP must be. Stops early where something may
/// have changed that the rest depends on.
///
/// Returns how it ended and the number of instructions completed.
pub fn run<E: Environment>(core: &mut Core<'_, E>, block: &Block) -> (Turn, u64) {
    core.leave_block = false;
    core.look_at_checks();
    let special = core.cpu.shadow != InterruptShadow::None
        || core.cpu.rflags & (rflags::TF | rflags::RF) != 0
        || core.cpu.dr7 & dr7::ENABLES != 0;
    if special {
        return run_one(core, block);
    }
    let mut done = 0;
    let mut n = 0;
    while let Some(op) = block.ops.get(n) {
        if let OpKind::Run(count) = op.kind {
            n += 1;
            if let Some(thunk) = op.thunk
                && call(thunk, core.cpu, std::ptr::null_mut()).is_ok()
            {
                let count = usize::from(count);
                let bytes: u64 = block.ops[n..n + count]
                    .iter()
                    .map(|op| u64::from(op.len))
                    .sum();
                next_rip(core.cpu, block.mode, bytes);
                n += count;
                done += count as u64;
            }
            continue;
        }
        match execute(core, op) {
            Ok(Flow::Next) => {
                next_rip(core.cpu, block.mode, u64::from(op.len));
                done += 1;
                n += 1;
                if core.leave_block {
                    return (Turn::Continue, done);
                }
            }
            Ok(Flow::Jump) => return (Turn::Continue, done + 1),
            Ok(Flow::Again) => {
                core.cpu.rflags |= rflags::RF;
                return (Turn::Continue, done);
            }
            Ok(Flow::Leave) => {
                next_rip(core.cpu, block.mode, u64::from(op.len));
                return (Turn::Continue, done + 1);
            }
            Ok(Flow::Stop) => {
                next_rip(core.cpu, block.mode, u64::from(op.len));
                return (Turn::Stopped, done + 1);
            }
            Err(Fault::Exception(e)) => return (Turn::Exception(e), done),
            Err(Fault::Restart) => return (Turn::Restart, done),
        }
    }
    (Turn::Continue, done)
}

/// Executes the first instruction of `block` alone. As [`run`] otherwise.
pub fn run_one<E: Environment>(core: &mut Core<'_, E>, block: &Block) -> (Turn, u64) {
    core.leave_block = false;
    match block
        .ops
        .iter()
        .find(|op| !matches!(op.kind, OpKind::Run(_)))
    {
        Some(op) => single(core, op),
        None => (Turn::Continue, 0),
    }
}

/// Passes an instruction. Outside 64-bit mode RIP has 32 bits, in 16-bit code too: only transfers
/// with a 16-bit operand size cut it to 16 bits, and code that comes past the segment's limit faults
/// there (measured on the processor; the comparison with it covers code across 64 KiB).
#[inline(always)]
fn next_rip(cpu: &mut CpuState, mode: Mode, len: u64) {
    let rip = cpu.rip.wrapping_add(len);
    cpu.rip = match mode {
        Mode::Long64 => rip,
        _ => rip & 0xffff_ffff,
    };
}

/// One instruction under an interrupt shadow, single-stepping, RF or armed breakpoints.
fn single<E: Environment>(core: &mut Core<'_, E>, op: &Op) -> (Turn, u64) {
    let shadow = core.cpu.shadow;
    let mode = core.cpu.mode();
    // Instruction breakpoints are faults, and wait for an instruction behind MOV SS.
    if core.cpu.rflags & rflags::RF == 0
        && shadow != InterruptShadow::MovSs
        && let Some(hit) = instruction_breakpoint(core.cpu)
    {
        return (Turn::Exception(Exception::debug(hit)), 0);
    }
    let stepping = core.cpu.rflags & rflags::TF != 0;
    let resume = core.cpu.rflags & rflags::RF;
    core.cpu.shadow = InterruptShadow::None;
    core.data_breakpoints = 0;
    let result = execute(core, op);
    let turn = match result {
        Err(Fault::Restart) => {
            core.cpu.shadow = shadow;
            return (Turn::Restart, 0);
        }
        Err(Fault::Exception(e)) => return (Turn::Exception(e), 0),
        Ok(Flow::Jump | Flow::Again) => Turn::Continue,
        Ok(Flow::Stop) => {
            next_rip(core.cpu, mode, u64::from(op.len));
            Turn::Stopped
        }
        Ok(_) => {
            next_rip(core.cpu, mode, u64::from(op.len));
            Turn::Continue
        }
    };
    use iced_x86::Mnemonic as M;
    let loads_flags = matches!(op.instruction.mnemonic(), M::Iret | M::Iretd | M::Iretq);
    if result == Ok(Flow::Again) {
        // An event between two iterations saves RFLAGS with RF set (SDM vol. 3, 17.3.1.1).
        core.cpu.rflags |= rflags::RF;
    } else if !loads_flags {
        core.cpu.rflags &= !resume;
    }
    // A transfer into the kernel decides by the flags it leaves behind; the others by the flags
    // that they started with.
    let enters_kernel = matches!(
        op.instruction.mnemonic(),
        M::Int | M::Int1 | M::Int3 | M::Into | M::Syscall | M::Sysenter
    );
    let stepped = stepping && (!enters_kernel || core.cpu.rflags & rflags::TF != 0);
    let mut report = core.data_breakpoints;
    if stepped {
        report |= dr6::BS;
    }
    if report != 0 && core.cpu.shadow != InterruptShadow::MovSs {
        return (Turn::Exception(Exception::debug(report)), 1);
    }
    (turn, 1)
}

/// The DR6 bits of enabled instruction breakpoints at CS:RIP.
fn instruction_breakpoint(cpu: &CpuState) -> Option<u64> {
    if cpu.dr7 & dr7::ENABLES == 0 {
        return None;
    }
    let linear = match cpu.mode() {
        Mode::Long64 => cpu.rip,
        _ => cpu.cs().base.wrapping_add(cpu.rip) & 0xffff_ffff,
    };
    let hits = (0..4).fold(0, |hits, i| {
        let enabled = cpu.dr7 >> (2 * i) & 3 != 0;
        let executes = cpu.dr7 >> (16 + 4 * i) & 3 == 0;
        hits | u64::from(enabled && executes && cpu.dr[i] == linear) << i
    });
    (hits != 0).then_some(hits)
}

/// Runs a thunk; the vector that the host processor raised on failure.
#[inline(always)]
pub(super) fn call(thunk: Thunk, cpu: &mut CpuState, operand: *mut u8) -> Result<(), u8> {
    // SAFETY: thunks of a block belong to the VCPU's current code arena (blocks are dropped before
    // it is reset), and `operand` covers the operand's bytes: it comes from a translation or from
    // a copy of at least that size.
    unsafe { native::call(thunk, cpu, operand) }.map_err(|fault| fault.vector)
}

#[inline(always)]
fn read_register(cpu: &CpuState, r: RegOperand) -> u64 {
    let value = cpu.gpr[usize::from(r.index & 15)];
    if r.high { value >> 8 } else { value }
}

#[inline(always)]
fn write_register(cpu: &mut CpuState, r: RegOperand, value: u64) {
    let full = &mut cpu.gpr[usize::from(r.index & 15)];
    *full = match (r.size, r.high) {
        (8, _) => value,
        (4, _) => value & 0xffff_ffff,
        (2, _) => *full & !0xffff | value & 0xffff,
        (_, true) => *full & !0xff00 | (value & 0xff) << 8,
        _ => *full & !0xff | value & 0xff,
    };
}

#[inline(always)]
fn flat_linear(cpu: &CpuState, a: &FlatAddress) -> u64 {
    let mut linear = a.displacement;
    if a.base != NO_REGISTER {
        linear = linear.wrapping_add(cpu.gpr[usize::from(a.base & 15)]);
    }
    if a.index != NO_REGISTER {
        linear = linear.wrapping_add(cpu.gpr[usize::from(a.index & 15)] << a.scale);
    }
    if a.segment != NO_REGISTER {
        linear = linear.wrapping_add(cpu.seg[usize::from(a.segment.min(5))].base);
    }
    linear
}

/// The host address of the memory operand if it can be accessed directly, without any check but
/// the TLB's. The TLB holds only canonical addresses, so a hit needs no canonical check.
#[inline(always)]
fn direct<E: Environment>(
    core: &Core<'_, E>,
    op: &Op,
    size: usize,
    access: Access,
) -> Option<*mut u8> {
    let flat = op.flat.as_ref()?;
    core.fast(
        flat_linear(core.cpu, flat),
        size,
        Privilege::of_data(core.cpu),
        access,
    )
}

#[inline(always)]
fn load<E: Environment>(core: &mut Core<'_, E>, op: &Op, size: u8) -> Result<u64, Fault> {
    if let Some(flat) = &op.flat {
        let linear = flat_linear(core.cpu, flat);
        if CpuState::is_canonical(linear) && linear & 4095 <= 4088 {
            return core.read_sized(linear, usize::from(size), Privilege::of_data(core.cpu));
        }
    }
    let linear = address::linear(core, &op.instruction, usize::from(size), Access::Read)?;
    core.read_sized(linear, usize::from(size), Privilege::of_data(core.cpu))
}

#[inline(always)]
fn store<E: Environment>(
    core: &mut Core<'_, E>,
    op: &Op,
    size: u8,
    value: u64,
) -> Result<(), Fault> {
    if let Some(flat) = &op.flat {
        let linear = flat_linear(core.cpu, flat);
        if CpuState::is_canonical(linear) && linear & 4095 <= 4088 {
            return core.write_sized(
                linear,
                usize::from(size),
                value,
                Privilege::of_data(core.cpu),
            );
        }
    }
    let linear = address::linear(core, &op.instruction, usize::from(size), Access::Write)?;
    core.write_sized(
        linear,
        usize::from(size),
        value,
        Privilege::of_data(core.cpu),
    )
}

/// An unmasked x87 or SIMD exception reaches the guest as its control bits say.
pub(super) fn floating_point_exception(cpu: &CpuState, vector: u8) -> Fault {
    if vector == 19 && cpu.cr4 & cr4::OSXMMEXCPT == 0 {
        return Exception::invalid_opcode().into();
    }
    host_fault(vector)
}

fn native_memory<E: Environment>(
    core: &mut Core<'_, E>,
    op: &Op,
    thunk: Thunk,
    access: OperandAccess,
) -> Executed {
    let size = usize::from(op.memory_size);
    let kind = if access == OperandAccess::Read {
        Access::Read
    } else {
        Access::Write
    };
    if let Some(host) = direct(core, op, size, kind) {
        return match call(thunk, core.cpu, host) {
            Ok(()) => Ok(Flow::Next),
            Err(vector) => Err(floating_point_exception(core.cpu, vector)),
        };
    }
    let linear = address::linear(core, &op.instruction, size, kind).map_err(|fault| {
        let linear = address::operand_address(core.cpu, &op.instruction);
        comes_first(core.cpu, thunk, linear, size, fault)
    })?;
    let mut vector = None;
    core.with_operand(linear, size, access, op.locked, &mut |cpu, operand| {
        call(thunk, cpu, operand).inspect_err(|&v| vector = Some(v))
    })
    .map_err(|fault| match vector {
        Some(v) => floating_point_exception(core.cpu, v),
        None => comes_first(core.cpu, thunk, linear, size, fault),
    })?;
    Ok(Flow::Next)
}

/// A buffer with the alignment that the widest vector instruction may check.
#[repr(align(64))]
struct Scratch([u8; 128]);

/// What an instruction raises that met `fault` at an operand of `size` bytes: a pending x87
/// exception comes before it, and so does an operand's alignment where that matters. Whether it does,
/// the processor tells: it executes the instruction on other registers and memory with the operand's
/// alignment.
#[cold]
pub(super) fn comes_first(
    cpu: &CpuState,
    thunk: Thunk,
    linear: u64,
    size: usize,
    fault: Fault,
) -> Fault {
    const X87: u8 = Vector::X87FloatingPoint as u8;
    const GENERAL_PROTECTION: u8 = Vector::GeneralProtection as u8;
    if !matches!(fault, Fault::Exception(_)) || size > 64 {
        return fault;
    }
    let misaligned = size >= 16 && linear & (size as u64 - 1) != 0;
    if !misaligned && !x87_pending(cpu) {
        return fault;
    }
    let mut buffer = Scratch([0; 128]);
    let operand = buffer.0[(linear & 63) as usize..].as_mut_ptr();
    match call(thunk, &mut cpu.clone(), operand) {
        Err(vector @ (X87 | GENERAL_PROTECTION)) => host_fault(vector),
        _ => fault,
    }
}

/// Whether an unmasked x87 exception waits for the next x87 or MMX instruction.
pub(super) fn x87_pending(cpu: &CpuState) -> bool {
    let image = &cpu.vector.x87.0;
    // Control and status words.
    image[2] & !image[0] & 0x3f != 0
}

/// As [`execute`], for translated code that cannot do without.
#[inline(never)]
pub(crate) fn single_operation<E: Environment>(core: &mut Core<'_, E>, op: &Op) -> Executed {
    execute(core, op)
}

/// Executes one operation.
#[inline(always)]
fn execute<E: Environment>(core: &mut Core<'_, E>, op: &Op) -> Executed {
    if op.check != StateCheck::None {
        xstate::check(core.cpu, op.check)?;
    }
    match op.kind {
        OpKind::Native => match op.thunk {
            Some(thunk) => match call(thunk, core.cpu, std::ptr::null_mut()) {
                Ok(()) => Ok(Flow::Next),
                Err(vector) => Err(floating_point_exception(core.cpu, vector)),
            },
            None => Err(Exception::invalid_opcode().into()),
        },
        OpKind::NativeMemory(access) => match op.thunk {
            Some(thunk) => native_memory(core, op, thunk, access),
            None => Err(Exception::invalid_opcode().into()),
        },
        OpKind::MoveRegister(to, from) => {
            let value = read_register(core.cpu, from);
            let value = match from.size {
                1 => value & 0xff,
                2 => value & 0xffff,
                4 => value & 0xffff_ffff,
                _ => value,
            };
            write_register(core.cpu, to, value);
            Ok(Flow::Next)
        }
        OpKind::MoveImmediate(to, value) => {
            write_register(core.cpu, to, value);
            Ok(Flow::Next)
        }
        OpKind::Load(to, size) => {
            let value = load(core, op, size)?;
            write_register(core.cpu, to, value);
            Ok(Flow::Next)
        }
        OpKind::LoadSigned(to, size) => {
            let value = load(core, op, size)?;
            let shift = 64 - 8 * u32::from(size);
            write_register(core.cpu, to, ((value << shift) as i64 >> shift) as u64);
            Ok(Flow::Next)
        }
        OpKind::Store(from) => {
            let value = read_register(core.cpu, from);
            store(core, op, from.size, value)?;
            Ok(Flow::Next)
        }
        OpKind::StoreImmediate(value, size) => {
            store(core, op, size, value)?;
            Ok(Flow::Next)
        }
        OpKind::LoadAddress(to) => {
            let offset = match &op.flat {
                Some(flat) => {
                    let flat = FlatAddress {
                        segment: NO_REGISTER,
                        ..*flat
                    };
                    flat_linear(core.cpu, &flat)
                }
                None => address::effective_offset(core.cpu, &op.instruction),
            };
            write_register(core.cpu, to, offset);
            Ok(Flow::Next)
        }
        OpKind::NoOperation => Ok(Flow::Next),
        OpKind::JumpIf(code) => {
            if !control::condition(core.cpu.rflags, code) {
                return Ok(Flow::Leave);
            }
            control::jump(core, op.target)
        }
        OpKind::Jump => control::jump(core, op.target),
        OpKind::JumpIndirect => control::jump_indirect(core, &op.instruction),
        OpKind::Call => control::call(core, &op.instruction, op.target),
        OpKind::CallIndirect => control::call_indirect(core, &op.instruction),
        OpKind::Return(extra) => control::ret(core, &op.instruction, extra),
        OpKind::Push => stack::execute_push(core, &op.instruction),
        OpKind::Pop => stack::execute_pop(core, &op.instruction),
        _ => execute_rare(core, op),
    }
}

#[inline(never)]
fn execute_rare<E: Environment>(core: &mut Core<'_, E>, op: &Op) -> Executed {
    let i = &op.instruction;
    match op.kind {
        OpKind::NativeMasked(access) => masked::native_masked(core, op, access),
        OpKind::DirectionFlag(set) => {
            let flags = &mut core.cpu.rflags;
            *flags = *flags & !rflags::DF | if set { rflags::DF } else { 0 };
            Ok(Flow::Next)
        }
        OpKind::Loop => control::loop_or_jcxz(core, i),
        OpKind::Frame => stack::execute_frame(core, i),
        OpKind::String => strings::execute(core, i),
        OpKind::BitString => bits::bit_string(core, op),
        OpKind::Gather => masked::gather_or_scatter(core, op),
        OpKind::Xlat => bits::xlat(core, i),
        OpKind::MaskMove => masked::mask_move(core, i),
        OpKind::Legacy => bits::legacy(core.cpu, i),
        OpKind::System => super::execute(core, i),
        OpKind::TooLong => Err(Exception::general_protection(0).into()),
        _ => Err(Exception::invalid_opcode().into()),
    }
}
