//! Vector instructions that access only some elements of memory: masked loads and stores, gathers,
//! scatters and MASKMOV. Elements that the mask disables are not accessed, so they do not fault
//! (SDM vol. 1, 15.6.4; vol. 2, "VMASKMOV", "VPGATHERDD").

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind as Operand, Register};
use trapline_x86::{CpuState, Exception, Gpr, Mode};

use super::{Executed, Flow, address, run};
use crate::access::{Core, Fault, OperandAccess, host_fault};
use crate::decode::Op;
use crate::decode::op::is_compress;
use crate::env::Environment;
use crate::tlb::{Access, Privilege};

/// The largest vector in bytes.
const VECTOR: usize = 64;

/// A buffer with the alignment that the widest vector instruction may check.
#[repr(align(64))]
struct Buffer([u8; 2 * VECTOR]);

/// Which bytes of the memory operand the instruction accesses, one bit each, and the size of its
/// elements.
fn active_bytes<E: Environment>(core: &Core<'_, E>, op: &Op) -> (u64, usize) {
    let i = &op.instruction;
    let size = usize::from(op.memory_size).min(VECTOR);
    let whole = if size == 64 {
        u64::MAX
    } else {
        (1 << size) - 1
    };
    if is_compress(i) && i.op_mask() == Register::None {
        return (whole, i.memory_size().element_size().max(1));
    }
    if i.op_mask() == Register::None {
        // VMASKMOV: the top bit of each element of the first source.
        let mask = &core.cpu.vector.zmm[i.op1_register().number()].0;
        let mask = if i.op0_kind() == Operand::Memory || i.op2_kind() == Operand::Memory {
            mask
        } else {
            return (whole, size.max(1));
        };
        let element = match i.mnemonic() {
            Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq => 8,
            _ => 4,
        };
        let bits = (0..size / element)
            .filter(|n| mask[(n + 1) * element - 1] & 0x80 != 0)
            .fold(0, |bits, n| bits | ((1 << element) - 1) << (n * element));
        return (bits, element);
    }
    let k = core.cpu.vector.k[i.op_mask().number()];
    let element = if i.is_broadcast() {
        size
    } else if sums_products(i) {
        4
    } else if matches!(i.mnemonic(), Mnemonic::Vpmuldq | Mnemonic::Vpmuludq) {
        // The odd elements do not matter, but are accessed.
        8
    } else {
        i.memory_size().element_size()
    }
    .max(1);
    let vector = (0..i.op_count())
        .filter(|&n| i.op_kind(n) == Operand::Register && i.op_register(n).is_vector_register())
        .map(|n| i.op_register(n).size())
        .max()
        .unwrap_or(VECTOR);
    if i.is_broadcast() {
        let used = low_bits(broadcast_bytes(i) / element);
        return (if k & used != 0 { whole } else { 0 }, element);
    }
    let elements = size / element;
    let k = if is_tuple_broadcast(i) {
        // Every element of the vector takes one of these.
        let lanes = (vector / element / elements.max(1)).max(1);
        (0..lanes).fold(0, |used, lane| used | k >> (lane * elements))
    } else {
        k
    };
    let used = if elements >= 64 {
        k
    } else {
        k & ((1 << elements) - 1)
    };
    let compressed = is_compress(i)
        || matches!(
            i.mnemonic(),
            Mnemonic::Vpexpandb
                | Mnemonic::Vpexpandw
                | Mnemonic::Vpexpandd
                | Mnemonic::Vpexpandq
                | Mnemonic::Vexpandps
                | Mnemonic::Vexpandpd
        );
    let used = if compressed {
        let n = used.count_ones();
        if n == 64 { u64::MAX } else { (1 << n) - 1 }
    } else {
        used
    };
    if element == 1 {
        return (used, 1);
    }
    let bits = (0..elements.min(64))
        .filter(|n| used >> n & 1 != 0)
        .fold(0, |bits, n| bits | ((1u64 << element) - 1) << (n * element));
    (bits, element)
}

/// The low `n` bits.
fn low_bits(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// The bytes that a broadcast operand stands for: half a vector for a widening conversion.
fn broadcast_bytes(i: &Instruction) -> usize {
    let name = format!("{:?}", i.memory_size());
    match name.strip_prefix("Broadcast").map(|rest| &rest[..2]) {
        Some("32") => 4,
        Some("64") => 8,
        Some("12") => 16,
        Some("25") => 32,
        _ => VECTOR,
    }
}

/// Whether each element of the result adds products of several elements of memory: the mask has one
/// bit for 32 bits of them.
fn sums_products(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Vpdpbusd
            | M::Vpdpbusds
            | M::Vpdpwssd
            | M::Vpdpwssds
            | M::Vdpbf16ps
            | M::Vfmulcph
            | M::Vfcmulcph
            | M::Vfmaddcph
            | M::Vfcmaddcph
    )
}

/// Whether the instruction repeats several elements of memory in a vector.
fn is_tuple_broadcast(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Vbroadcastf32x2
            | M::Vbroadcastf32x4
            | M::Vbroadcastf32x8
            | M::Vbroadcastf64x2
            | M::Vbroadcastf64x4
            | M::Vbroadcasti32x2
            | M::Vbroadcasti32x4
            | M::Vbroadcasti32x8
            | M::Vbroadcasti64x2
            | M::Vbroadcasti64x4
            | M::Vbroadcastss
            | M::Vbroadcastsd
            | M::Vpbroadcastb
            | M::Vpbroadcastw
            | M::Vpbroadcastd
            | M::Vpbroadcastq
    )
}

/// Executes a native instruction whose memory operand is masked. Where all of the operand can be
/// accessed directly this is like any other; otherwise the active bytes are accessed one by one.
pub fn native_masked<E: Environment>(
    core: &mut Core<'_, E>,
    op: &Op,
    access: OperandAccess,
) -> Executed {
    let i = &op.instruction;
    let size = usize::from(op.memory_size);
    let kind = if access == OperandAccess::Read {
        Access::Read
    } else {
        Access::Write
    };
    let Some(thunk) = op.thunk else {
        return Err(Exception::invalid_opcode().into());
    };
    let privilege = Privilege::of_data(core.cpu);
    if let Ok(start) = address::linear_at(core, i, 0, size, kind)
        && let Some(host) = core.fast(start, size, privilege, kind)
    {
        return run::call(thunk, core.cpu, host)
            .map(|()| Flow::Next)
            .map_err(|vector| run::floating_point_exception(core.cpu, vector));
    }
    let active = active_bytes(core, op);
    let mut buffer = Buffer([0; 2 * VECTOR]);
    let start = address::operand_address(core.cpu, i);
    let offset = (start & 63) as usize;
    let (places, limit) = places(core, i, active, kind);
    let told = |core: &Core<'_, E>, fault| run::comes_first(core.cpu, thunk, start, size, fault);
    // Elements that are accessed singly are aligned as such, which is seen at the first that the
    // segment holds; VMASKMOV is never checked (measured).
    if i.encoding() == EncodingKind::EVEX && !places.is_empty() {
        core.check_alignment(start, active.1, privilege)
            .map_err(|fault| told(core, fault.into()))?;
    }
    for &(at, len, linear) in &places {
        let bytes = &mut buffer.0[offset + at..offset + at + len];
        let read = if access == OperandAccess::Read {
            Ok(())
        } else {
            core.probe_write(linear, len, privilege)
        }
        .and_then(|()| core.read_bytes(linear, bytes, privilege));
        read.map_err(|fault| told(core, fault))?;
    }
    if let Err(fault) = limit {
        return Err(told(core, fault));
    }
    let before = core.cpu.clone();
    run::call(thunk, core.cpu, buffer.0[offset..].as_mut_ptr())
        .map_err(|vector| run::floating_point_exception(core.cpu, vector))?;
    if access != OperandAccess::Read {
        for &(at, len, linear) in &places {
            let data = &buffer.0[offset + at..offset + at + len];
            core.write_bytes(linear, data, privilege)
                .inspect_err(|_| *core.cpu = before.clone())?;
        }
    }
    Ok(Flow::Next)
}

/// Part of an operand: its first byte, the number of its bytes, its linear address.
type Place = (usize, usize, u64);

/// Where the active bytes of the operand are, up to the first that the segment does not hold, and
/// the fault of that one. With 32-bit addresses VMASKMOV wraps the offset of every element at 4 GiB,
/// masked EVEX instructions do not (measured).
fn places<E: Environment>(
    core: &Core<'_, E>,
    i: &Instruction,
    (active, element): (u64, usize),
    access: Access,
) -> (Vec<Place>, Result<(), Fault>) {
    // The address size wraps the first byte's offset alone.
    let first = address::effective_offset(core.cpu, i);
    let segment = address::memory_segment(core.cpu, i);
    let narrow = core.cpu.mode() != Mode::Long64
        || i.memory_base().is_gpr32()
        || i.memory_index().is_gpr32()
        || i.memory_base() == Register::EIP;
    let wraps = narrow && i.encoding() == EncodingKind::VEX;
    let wrap = if wraps { 0xffff_ffff } else { u64::MAX };
    let linear = |at: usize, len| {
        let offset = first.wrapping_add(at as u64) & wrap;
        address::linear_for(core, segment, offset, len, access)
    };
    let mut places = Vec::new();
    for (at, len) in runs(active) {
        if let Ok(linear) = linear(at, len) {
            places.push((at, len, linear));
            continue;
        }
        for n in (at..at + len).step_by(element) {
            match linear(n, element) {
                Ok(linear) => places.push((n, element, linear)),
                Err(fault) => return (places, Err(fault)),
            }
        }
    }
    (places, Ok(()))
}

/// Runs of set bits as (start, length).
fn runs(mut bits: u64) -> Vec<(usize, usize)> {
    let mut out = Vec::new();
    let mut at = 0;
    while bits != 0 {
        let skip = bits.trailing_zeros() as usize;
        bits >>= skip;
        let len = bits.trailing_ones() as usize;
        out.push((at + skip, len));
        at += skip + len;
        bits = if len == 64 { 0 } else { bits >> len };
    }
    out
}

/// VGATHER, VPGATHER, VSCATTER and VPSCATTER. A fault leaves the elements before it done and their
/// mask bits clear, as the manual allows and restarting needs.
pub fn gather_or_scatter<E: Environment>(core: &mut Core<'_, E>, op: &Op) -> Executed {
    let i = &op.instruction;
    let scatter = i.op0_kind() == Operand::Memory;
    let vector = if scatter {
        i.op1_register()
    } else {
        i.op0_register()
    };
    let index = i.memory_index();
    let evex = i.encoding() == EncodingKind::EVEX;
    let mask = if evex { i.op_mask() } else { i.op2_register() };
    if !vector.is_vector_register() || mask == Register::None {
        return Err(Exception::invalid_opcode().into());
    }
    let same = |a: Register, b: Register| a.full_register() == b.full_register();
    if !scatter && (same(vector, index) || (!evex && (same(vector, mask) || same(index, mask)))) {
        return Err(Exception::invalid_opcode().into());
    }
    let element = i.memory_size().size().clamp(4, 8);
    let index_size = if i.is_vsib64() { 8 } else { 4 };
    let count = (vector.size() / element).min(index.size() / index_size);
    let privilege = Privilege::of_data(core.cpu);
    let access = if scatter { Access::Write } else { Access::Read };
    for n in 0..count {
        let enabled = if evex {
            core.cpu.vector.k[mask.number()] >> n & 1 != 0
        } else {
            core.cpu.vector.zmm[mask.number()].0[(n + 1) * element - 1] & 0x80 != 0
        };
        if !enabled {
            // The mask of an element that is done with reads as zero, should a later one fault.
            if !evex {
                core.cpu.vector.zmm[mask.number()].0[n * element..(n + 1) * element].fill(0);
            }
            continue;
        }
        let bytes = &core.cpu.vector.zmm[index.number()].0[n * index_size..(n + 1) * index_size];
        let offset = if index_size == 4 {
            i64::from(i32::from_le_bytes(bytes.try_into().unwrap_or_default()))
        } else {
            i64::from_le_bytes(bytes.try_into().unwrap_or_default())
        };
        let offset = (offset as u64).wrapping_mul(u64::from(i.memory_index_scale()));
        let linear = address::linear_at(core, i, offset, element, access)?;
        let slot = n * element..(n + 1) * element;
        let mut data = [0; 8];
        if scatter {
            data[..element].copy_from_slice(&core.cpu.vector.zmm[vector.number()].0[slot]);
            core.write_bytes(linear, &data[..element], privilege)?;
        } else {
            core.read_bytes(linear, &mut data[..element], privilege)?;
            core.cpu.vector.zmm[vector.number()].0[slot].copy_from_slice(&data[..element]);
        }
        if evex {
            core.cpu.vector.k[mask.number()] &= !(1 << n);
        } else {
            core.cpu.vector.zmm[mask.number()].0[n * element..(n + 1) * element].fill(0);
        }
    }
    if evex {
        core.cpu.vector.k[mask.number()] = 0;
    } else {
        core.cpu.vector.zmm[mask.number()].0.fill(0);
    }
    if !scatter {
        core.cpu.vector.zmm[vector.number()].0[count * element..].fill(0);
    }
    Ok(Flow::Next)
}

/// MASKMOVQ and MASKMOVDQU: stores the bytes whose mask byte has its top bit set to DS:rDI.
pub fn mask_move<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Executed {
    // The implicit memory operand is operand 0; source and mask are the last two.
    let (data, mask) = (i.op1_register(), i.op2_register());
    let (data, mask, size) = if data.is_mm() {
        if run::x87_pending(core.cpu) {
            return Err(host_fault(16));
        }
        let mm = |r: Register| {
            let at = mmx_offset(core.cpu, r.number());
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&core.cpu.vector.x87.0[at..at + 8]);
            bytes
        };
        (mm(data), mm(mask), 8)
    } else {
        let xmm = |r: Register| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&core.cpu.vector.zmm[r.number()].0[..16]);
            bytes
        };
        (xmm(data), xmm(mask), 16)
    };
    let bits = match i.op0_kind() {
        Operand::MemorySegDI => 16,
        Operand::MemorySegEDI => 32,
        _ => 64,
    };
    let wrap = if bits == 64 {
        u64::MAX
    } else {
        (1 << bits) - 1
    };
    let segment = address::prefix_segment(i);
    let privilege = Privilege::of_data(core.cpu);
    let base = core.cpu.gpr(Gpr::Rdi);
    // Whether bytes that the mask disables fault is left open; with processors that do so, they do.
    // The address size wraps the first byte's offset alone.
    let start = address::linear_for(core, segment, base & wrap, size, Access::Write)?;
    core.check_alignment(start, 8, privilege)?;
    core.probe_write(start, size, privilege)?;
    let wide = core.cpu.mode() == Mode::Long64;
    for n in (0..size).filter(|&n| mask[n] & 0x80 != 0) {
        let linear = start.wrapping_add(n as u64);
        let linear = if wide { linear } else { linear & 0xffff_ffff };
        core.write::<1>(linear, u64::from(data[n]), privilege)?;
    }
    if size == 8 {
        enter_mmx(core.cpu);
    }
    debug_assert!(core.cpu.mode() != Mode::Real || bits != 64);
    Ok(Flow::Next)
}

/// Where an x87 image holds MMX register `number`: it is in stack order, they are not.
fn mmx_offset(cpu: &CpuState, number: usize) -> usize {
    let top = usize::from(cpu.vector.x87.0[3] >> 3 & 7);
    32 + 16 * (number.wrapping_sub(top) & 7)
}

/// What every MMX instruction but EMMS does to the x87 state: the top of the stack is register 0, and
/// all registers are valid (SDM vol. 1, 9.5.1).
fn enter_mmx(cpu: &mut CpuState) {
    let before = cpu.vector.x87.0;
    for number in 0..8 {
        let from = mmx_offset(cpu, number);
        let to = 32 + 16 * number;
        cpu.vector.x87.0[to..to + 16].copy_from_slice(&before[from..from + 16]);
    }
    cpu.vector.x87.0[3] &= !0x38;
    cpu.vector.x87.0[4] = 0xff;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits() {
        assert_eq!(runs(0), vec![]);
        assert_eq!(runs(0b1101), vec![(0, 1), (2, 2)]);
        assert_eq!(runs(u64::MAX), vec![(0, 64)]);
        assert_eq!(runs(1 << 63), vec![(63, 1)]);
    }
}
