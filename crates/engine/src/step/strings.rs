//! String instructions (SDM vol. 1, 7.3.9). Registers are exact at every iteration, so a fault or
//! an interrupt in the middle resumes where it stopped.

use iced_x86::{Instruction, Mnemonic, OpKind as Operand};
use trapline_x86::control::rflags;
use trapline_x86::{CpuState, Gpr, SegmentRegister};

use super::address::mask;
use super::{Executed, Flow, address, host};
use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::tlb::{Access, Privilege};

/// Iterations after which a repeated instruction lets interrupts in.
const ITERATIONS_PER_TURN: u64 = 4096;

struct Shape {
    mnemonic: Mnemonic,
    /// Element bytes.
    size: usize,
    address_bits: u32,
    source: SegmentRegister,
}

fn shape(i: &Instruction) -> Shape {
    use Mnemonic as M;
    let size = match i.mnemonic() {
        M::Movsb | M::Stosb | M::Lodsb | M::Cmpsb | M::Scasb => 1,
        M::Movsw | M::Stosw | M::Lodsw | M::Cmpsw | M::Scasw => 2,
        M::Movsd | M::Stosd | M::Lodsd | M::Cmpsd | M::Scasd => 4,
        _ => 8,
    };
    let mut address_bits = 64;
    for n in 0..i.op_count() {
        address_bits = match i.op_kind(n) {
            Operand::MemorySegSI | Operand::MemoryESDI => 16,
            Operand::MemorySegESI | Operand::MemoryESEDI => 32,
            Operand::MemorySegRSI | Operand::MemoryESRDI => 64,
            _ => continue,
        };
    }
    Shape {
        mnemonic: i.mnemonic(),
        size,
        address_bits,
        source: address::prefix_segment(i),
    }
}

/// Moves an index register by one element.
fn advance(cpu: &mut CpuState, r: Gpr, s: &Shape, elements: u64) {
    let step = (s.size as u64).wrapping_mul(elements);
    let value = if cpu.rflags & rflags::DF != 0 {
        cpu.gpr(r).wrapping_sub(step)
    } else {
        cpu.gpr(r).wrapping_add(step)
    };
    address::set_sized(cpu, r, s.address_bits, value);
}

fn source<E: Environment>(core: &mut Core<'_, E>, s: &Shape) -> Result<u64, Fault> {
    let offset = core.cpu.gpr(Gpr::Rsi) & mask(s.address_bits);
    let linear = address::linear_for(core, s.source, offset, s.size, Access::Read)?;
    core.read_sized(linear, s.size, Privilege::of_data(core.cpu))
}

fn destination<E: Environment>(
    core: &Core<'_, E>,
    s: &Shape,
    access: Access,
) -> Result<u64, Fault> {
    let offset = core.cpu.gpr(Gpr::Rdi) & mask(s.address_bits);
    address::linear_for(core, SegmentRegister::Es, offset, s.size, access)
}

fn accumulator(core: &Core<'_, impl Environment>, s: &Shape) -> u64 {
    core.cpu.gpr(Gpr::Rax) & mask(8 * s.size as u32)
}

/// One iteration; compares set the status flags.
fn once<E: Environment>(core: &mut Core<'_, E>, s: &Shape) -> Result<(), Fault> {
    use Mnemonic as M;
    match s.mnemonic {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => {
            let value = source(core, s)?;
            let to = destination(core, s, Access::Write)?;
            core.write_sized(to, s.size, value, Privilege::of_data(core.cpu))?;
            advance(core.cpu, Gpr::Rsi, s, 1);
            advance(core.cpu, Gpr::Rdi, s, 1);
        }
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
            let value = accumulator(core, s);
            let to = destination(core, s, Access::Write)?;
            core.write_sized(to, s.size, value, Privilege::of_data(core.cpu))?;
            advance(core.cpu, Gpr::Rdi, s, 1);
        }
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => {
            let value = source(core, s)?;
            let rax = &mut core.cpu.gpr[Gpr::Rax as usize];
            *rax = match s.size {
                1 => *rax & !0xff | value,
                2 => *rax & !0xffff | value,
                _ => value,
            };
            advance(core.cpu, Gpr::Rsi, s, 1);
        }
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => {
            // If both fault, processors report the destination.
            let at = destination(core, s, Access::Read)?;
            let right = core.read_sized(at, s.size, Privilege::of_data(core.cpu))?;
            let left = source(core, s)?;
            set_compare_flags(core.cpu, left, right, s.size);
            advance(core.cpu, Gpr::Rsi, s, 1);
            advance(core.cpu, Gpr::Rdi, s, 1);
        }
        _ => {
            let left = accumulator(core, s);
            let at = destination(core, s, Access::Read)?;
            let right = core.read_sized(at, s.size, Privilege::of_data(core.cpu))?;
            set_compare_flags(core.cpu, left, right, s.size);
            advance(core.cpu, Gpr::Rdi, s, 1);
        }
    }
    Ok(())
}

fn set_compare_flags(cpu: &mut CpuState, left: u64, right: u64, size: usize) {
    cpu.rflags = cpu.rflags & !rflags::STATUS | host::compare_flags(left, right, size);
}

/// How many iterations can run at once on host memory: forward MOVS or STOS whose ranges are each
/// within one directly accessible page. Gives the host pointers.
fn bulk<E: Environment>(core: &Core<'_, E>, s: &Shape, count: u64) -> Option<Bulk> {
    use Mnemonic as M;
    if core.cpu.rflags & rflags::DF != 0 {
        return None;
    }
    let privilege = Privilege::of_data(core.cpu);
    let room = |linear: u64| (4096 - (linear & 4095)) / s.size as u64;
    let to = destination(core, s, Access::Write).ok()?;
    let mut n = count.min(room(to));
    let mut from = None;
    if matches!(s.mnemonic, M::Movsb | M::Movsw | M::Movsd | M::Movsq) {
        let offset = core.cpu.gpr(Gpr::Rsi) & mask(s.address_bits);
        let linear = address::linear_for(core, s.source, offset, s.size, Access::Read).ok()?;
        n = n.min(room(linear));
        from = Some(linear);
    } else if !matches!(s.mnemonic, M::Stosb | M::Stosw | M::Stosd | M::Stosq) {
        return None;
    }
    if n < 2 {
        return None;
    }
    let bytes = n as usize * s.size;
    // The last element's segment check covers those between.
    if core.cpu.mode() != trapline_x86::Mode::Long64 {
        let limit = |segment, r| {
            let offset = core.cpu.gpr(r) & mask(s.address_bits);
            offset.checked_add(bytes as u64).is_some_and(|end| {
                (end - 1) & mask(s.address_bits) == end - 1
                    && address::linear_for(core, segment, offset, bytes, Access::Read).is_ok()
            })
        };
        if !limit(SegmentRegister::Es, Gpr::Rdi) || (from.is_some() && !limit(s.source, Gpr::Rsi)) {
            return None;
        }
    }
    let to = core.fast(to, bytes, privilege, Access::Write)?;
    let from = match from {
        Some(linear) => Some(core.fast(linear, bytes, privilege, Access::Read)?),
        None => None,
    };
    Some(Bulk {
        to,
        from,
        elements: n,
    })
}

struct Bulk {
    to: *mut u8,
    from: Option<*mut u8>,
    elements: u64,
}

/// Executes a string instruction, with its repeat prefix.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Executed {
    let s = shape(i);
    let repeat = i.has_rep_prefix() || i.has_repe_prefix() || i.has_repne_prefix();
    if !repeat {
        once(core, &s)?;
        return Ok(Flow::Next);
    }
    use Mnemonic as M;
    let compares = matches!(
        s.mnemonic,
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq
    );
    let count = |core: &Core<'_, E>| core.cpu.gpr(Gpr::Rcx) & mask(s.address_bits);
    if count(core) == 0 {
        return Ok(Flow::Next);
    }
    let mut turn = 0;
    loop {
        let left = count(core);
        if left == 0 {
            return Ok(Flow::Next);
        }
        if turn >= ITERATIONS_PER_TURN {
            // The instruction resumes after a look at what is pending.
            return Ok(Flow::Again);
        }
        if core.cpu.rflags & rflags::TF == 0
            && let Some(bulk) = bulk(core, &s, left)
        {
            match bulk.from {
                Some(from) => {
                    host::move_elements(bulk.to, from, bulk.elements as usize * s.size, s.size)
                }
                None => host::fill(
                    bulk.to,
                    accumulator(core, &s),
                    bulk.elements as usize,
                    s.size,
                ),
            }
            if bulk.from.is_some() {
                advance(core.cpu, Gpr::Rsi, &s, bulk.elements);
            }
            advance(core.cpu, Gpr::Rdi, &s, bulk.elements);
            address::set_sized(core.cpu, Gpr::Rcx, s.address_bits, left - bulk.elements);
            turn += bulk.elements;
            continue;
        }
        once(core, &s)?;
        address::set_sized(core.cpu, Gpr::Rcx, s.address_bits, left - 1);
        turn += 1;
        if compares {
            let zero = core.cpu.rflags & rflags::ZF != 0;
            if zero == i.has_repne_prefix() {
                return Ok(Flow::Next);
            }
        }
        // A sensed write may have changed this very instruction; debug traps come behind every
        // iteration (SDM vol. 3, 17.3.1.2 and 17.3.1.4).
        let traps = core.cpu.rflags & rflags::TF != 0 || core.data_breakpoints != 0;
        if (core.leave_block || traps) && left > 1 {
            return Ok(Flow::Again);
        }
    }
}
