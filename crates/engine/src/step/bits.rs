//! Bit strings, translation tables, BCD arithmetic: unprivileged instructions whose memory operand
//! depends on a register, or that have no 64-bit encoding.

use iced_x86::{Instruction, Mnemonic, Register};
use trapline_x86::control::rflags;
use trapline_x86::{CpuState, Exception, Gpr};

use super::{Executed, Flow, address, host};
use crate::access::{Core, OperandAccess};
use crate::decode::Op;
use crate::env::Environment;
use crate::tlb::{Access, Privilege};

/// BT, BTS, BTR and BTC of a bit string in memory: the operand-sized part of it that holds the bit
/// is accessed (SDM vol. 2, "BT"), of which only a byte changes.
pub fn bit_string<E: Environment>(core: &mut Core<'_, E>, op: &Op) -> Executed {
    let i = &op.instruction;
    let register = i.op1_register();
    let raw = address::register_value(core.cpu, register);
    let index = match register.size() {
        2 => i64::from(raw as i16),
        4 => i64::from(raw as i32),
        _ => raw as i64,
    };
    let operation = match i.mnemonic() {
        Mnemonic::Bts => host::BitOperation::Set,
        Mnemonic::Btr => host::BitOperation::Reset,
        Mnemonic::Btc => host::BitOperation::Complement,
        _ => host::BitOperation::Test,
    };
    let (access, kind) = if operation == host::BitOperation::Test {
        (OperandAccess::Read, Access::Read)
    } else {
        (OperandAccess::ReadWrite, Access::Write)
    };
    let size = register.size().clamp(2, 8);
    let part = (index >> 3) as u64 & !(size as u64 - 1);
    let byte = (index >> 3) as usize & (size - 1);
    let linear = address::linear_at(core, i, part, size, kind)?;
    let mut old = false;
    core.with_operand(linear, size, access, op.locked, &mut |_, operand| {
        let byte = operand.wrapping_add(byte);
        old = host::bit(byte, (index & 7) as u32, operation, op.locked);
        Ok(())
    })?;
    let flags = &mut core.cpu.rflags;
    *flags = *flags & !rflags::CF | if old { rflags::CF } else { 0 };
    Ok(Flow::Next)
}

/// XLAT.
pub fn xlat<E: Environment>(core: &mut Core<'_, E>, i: &Instruction) -> Executed {
    let bits = address::address_bits(i);
    let mask = if bits == 64 {
        u64::MAX
    } else {
        (1 << bits) - 1
    };
    let offset = core
        .cpu
        .gpr(Gpr::Rbx)
        .wrapping_add(core.cpu.gpr(Gpr::Rax) & 0xff)
        & mask;
    let segment = address::memory_segment(core.cpu, i);
    let linear = address::linear_for(core, segment, offset, 1, Access::Read)?;
    let value = core.read::<1>(linear, Privilege::of_data(core.cpu))?;
    address::set_register(core.cpu, Register::AL, value);
    Ok(Flow::Next)
}

fn set_result_flags(cpu: &mut CpuState, value: u8, carry: bool, adjust: bool) {
    let mut flags = cpu.rflags & !rflags::STATUS;
    let mut set = |bit, on| flags |= if on { bit } else { 0 };
    set(rflags::CF, carry);
    set(rflags::AF, adjust);
    set(rflags::ZF, value == 0);
    set(rflags::SF, value & 0x80 != 0);
    set(rflags::PF, value.count_ones().is_multiple_of(2));
    cpu.rflags = flags;
}

/// AAA, AAD, AAM, AAS, DAA, DAS and SALC: no 64-bit encoding, so not native (SDM vol. 2).
pub fn legacy(cpu: &mut CpuState, i: &Instruction) -> Executed {
    let ax = cpu.gpr(Gpr::Rax) as u16;
    let [al, ah] = ax.to_le_bytes();
    let carry = cpu.rflags & rflags::CF != 0;
    let adjust = cpu.rflags & rflags::AF != 0;
    let set_ax = |cpu: &mut CpuState, value: u16| {
        address::set_register(cpu, Register::AX, u64::from(value));
    };
    match i.mnemonic() {
        Mnemonic::Salc => {
            address::set_register(cpu, Register::AL, if carry { 0xff } else { 0 });
        }
        m @ (Mnemonic::Aaa | Mnemonic::Aas) => {
            let over = al & 0xf > 9 || adjust;
            let ax = match (over, m) {
                (true, Mnemonic::Aaa) => ax.wrapping_add(0x106),
                (true, _) => ax.wrapping_sub(6).wrapping_sub(0x100),
                _ => ax,
            } & 0xff0f;
            set_ax(cpu, ax);
            set_result_flags(cpu, ax as u8, over, over);
        }
        Mnemonic::Aad => {
            let value = al.wrapping_add(ah.wrapping_mul(i.immediate8()));
            set_ax(cpu, u16::from(value));
            set_result_flags(cpu, value, false, false);
        }
        Mnemonic::Aam => {
            let base = i.immediate8();
            if base == 0 {
                return Err(Exception::divide_error().into());
            }
            set_ax(cpu, u16::from_le_bytes([al % base, al / base]));
            set_result_flags(cpu, al % base, false, false);
        }
        m => {
            let low = al & 0xf > 9 || adjust;
            let high = al > 0x99 || carry;
            let amount = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
            let value = if m == Mnemonic::Daa {
                al.wrapping_add(amount)
            } else {
                al.wrapping_sub(amount)
            };
            let borrow = m == Mnemonic::Das && low && al < 6;
            address::set_register(cpu, Register::AL, u64::from(value));
            set_result_flags(cpu, value, high || borrow, low);
        }
    }
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};
    use trapline_x86::{Segment, SegmentRegister};

    use super::*;
    use crate::step::tests_support::{Rig, raises};

    #[test]
    fn xlat_knows_a_stack_segment_outside_64_bit_mode_only() {
        // xlat ss:[rbx], with a REX prefix that does not count
        let bytes = [0x48, 0x36, 0xd7];
        let mut rig = Rig::long();
        rig.cpu.set_gpr(Gpr::Rbx, 1 << 54);
        let xlat = |rig: &mut Rig, bytes: &[u8]| {
            let bits = rig.cpu.mode().bits();
            let i = Decoder::with_ip(bits, bytes, rig.cpu.rip, DecoderOptions::NONE).decode();
            super::xlat(&mut rig.core(), &i)
        };
        let refused = raises(Exception::general_protection(0));
        assert_eq!(xlat(&mut rig, &bytes), refused);

        let mut rig = Rig::protected();
        rig.cpu.set_gpr(Gpr::Rbx, 0x6000);
        rig.cpu.seg[SegmentRegister::Ss as usize] = Segment {
            limit: 0x5fff,
            ..*rig.cpu.segment(SegmentRegister::Ss)
        };
        let refused = raises(Exception::stack_fault(0));
        assert_eq!(xlat(&mut rig, &bytes[1..]), refused);
        assert_eq!(xlat(&mut rig, &bytes[2..]), Ok(Flow::Next));
    }
}
