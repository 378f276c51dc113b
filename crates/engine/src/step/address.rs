//! Addresses of memory operands: from an instruction to an offset, from segment and offset to a
//! linear address (SDM vol. 1, 3.7.5; vol. 3, 5.3 to 5.5).

use iced_x86::{CodeSize, Instruction, Register};
use trapline_x86::segment::Rights;
use trapline_x86::{CpuState, Exception, Gpr, Mode, Segment, SegmentRegister};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::tlb::Access;

/// The value of a general-purpose register of any size, zero-extended; 0 for any other register.
pub fn register_value(cpu: &CpuState, register: Register) -> u64 {
    if !register.is_gpr() {
        return 0;
    }
    if matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    ) {
        return cpu.gpr[register as usize - Register::AH as usize] >> 8 & 0xff;
    }
    cpu.gpr[register.number() & 15] & mask(register.size() as u32 * 8)
}

/// Writes a general-purpose register: the upper half is zeroed for 32 bits, kept for 8 and 16.
/// Does nothing for any other register.
pub fn set_register(cpu: &mut CpuState, register: Register, value: u64) {
    if !register.is_gpr() {
        return;
    }
    if matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    ) {
        let r = &mut cpu.gpr[register as usize - Register::AH as usize];
        *r = *r & !0xff00 | (value & 0xff) << 8;
        return;
    }
    let r = &mut cpu.gpr[register.number() & 15];
    *r = match register.size() {
        8 => value,
        4 => value & 0xffff_ffff,
        2 => *r & !0xffff | value & 0xffff,
        _ => *r & !0xff | value & 0xff,
    };
}

/// The low `bits` (1 to 64) bits set.
pub const fn mask(bits: u32) -> u64 {
    if bits >= 64 {
        u64::MAX
    } else {
        (1 << bits) - 1
    }
}

/// Writes the part of a register that an address or count of `bits` (16, 32, 64) bits occupies.
pub fn set_sized(cpu: &mut CpuState, register: Gpr, bits: u32, value: u64) {
    let r = &mut cpu.gpr[register as usize];
    *r = match bits {
        16 => *r & !0xffff | value & 0xffff,
        32 => value & 0xffff_ffff,
        _ => value,
    };
}

/// The size in bits (16, 32 or 64) of the memory operand's address.
pub fn address_bits(instr: &Instruction) -> u32 {
    for register in [instr.memory_base(), instr.memory_index()] {
        match register {
            Register::RIP => return 64,
            Register::EIP => return 32,
            r if r.is_gpr() && r.size() > 1 => return r.size() as u32 * 8,
            _ => {}
        }
    }
    match instr.memory_displ_size() {
        2 => 16,
        4 => 32,
        8 => 64,
        _ => match instr.code_size() {
            CodeSize::Code16 => 16,
            CodeSize::Code32 => 32,
            _ => 64,
        },
    }
}

/// The offset of the memory operand within its segment, wrapped to the address size.
///
/// RIP-relative operands are relative to where the instruction executes (`cpu.rip`), wherever it
/// was decoded.
pub fn effective_offset(cpu: &CpuState, instr: &Instruction) -> u64 {
    let base = instr.memory_base();
    let displacement = instr.memory_displacement64();
    let sum = if base == Register::RIP || base == Register::EIP {
        displacement
            .wrapping_sub(instr.next_ip())
            .wrapping_add(cpu.rip)
            .wrapping_add(instr.len() as u64)
    } else {
        register_value(cpu, base)
            .wrapping_add(
                register_value(cpu, instr.memory_index())
                    .wrapping_mul(u64::from(instr.memory_index_scale())),
            )
            .wrapping_add(displacement)
    };
    sum & mask(address_bits(instr))
}

/// The linear address of the memory operand's first byte, unchecked.
pub fn operand_address(cpu: &CpuState, instr: &Instruction) -> u64 {
    let segment = memory_segment(cpu, instr);
    let based =
        cpu.mode() != Mode::Long64 || matches!(segment, SegmentRegister::Fs | SegmentRegister::Gs);
    let base = if based { cpu.segment(segment).base } else { 0 };
    base.wrapping_add(effective_offset(cpu, instr))
}

/// The segment of the memory operand. In 64-bit mode prefixes for ES, CS, SS and DS are ignored, and
/// what is left of the default is whether a bad address is a stack fault.
pub fn memory_segment(cpu: &CpuState, instr: &Instruction) -> SegmentRegister {
    let named = segment_register(instr.memory_segment());
    let based = matches!(named, SegmentRegister::Fs | SegmentRegister::Gs);
    if based || cpu.mode() != Mode::Long64 {
        return named;
    }
    match instr.memory_base() {
        Register::RSP | Register::RBP | Register::ESP | Register::EBP => SegmentRegister::Ss,
        _ => SegmentRegister::Ds,
    }
}

/// The segment of an implicit operand at rSI or rDI, which a prefix may replace. 64-bit mode knows
/// only FS and GS.
pub fn prefix_segment(instr: &Instruction) -> SegmentRegister {
    let named = segment_register(instr.segment_prefix());
    let based = matches!(named, SegmentRegister::Fs | SegmentRegister::Gs);
    if instr.code_size() == CodeSize::Code64 && !based {
        SegmentRegister::Ds
    } else {
        named
    }
}

/// The segment register that iced names; DS for anything else.
pub fn segment_register(register: Register) -> SegmentRegister {
    match register {
        Register::ES => SegmentRegister::Es,
        Register::CS => SegmentRegister::Cs,
        Register::SS => SegmentRegister::Ss,
        Register::FS => SegmentRegister::Fs,
        Register::GS => SegmentRegister::Gs,
        _ => SegmentRegister::Ds,
    }
}

/// The linear address of the memory operand of `instr`, `size` bytes long.
///
/// # Errors
/// #GP(0), or #SS(0) through SS: limit, type or canonical violation.
pub fn linear<E: Environment>(
    core: &Core<'_, E>,
    instr: &Instruction,
    size: usize,
    access: Access,
) -> Result<u64, Fault> {
    let segment = memory_segment(core.cpu, instr);
    linear_for(
        core,
        segment,
        effective_offset(core.cpu, instr),
        size,
        access,
    )
}

/// As [`linear`], `displacement` bytes further on within the segment: the second part of an
/// operand such as a far pointer.
///
/// # Errors
/// As [`linear`].
pub fn linear_at<E: Environment>(
    core: &Core<'_, E>,
    instr: &Instruction,
    displacement: u64,
    size: usize,
    access: Access,
) -> Result<u64, Fault> {
    let segment = memory_segment(core.cpu, instr);
    let offset = effective_offset(core.cpu, instr).wrapping_add(displacement);
    linear_for(
        core,
        segment,
        offset & mask(address_bits(instr)),
        size,
        access,
    )
}

/// The linear address of `size` bytes at an offset (already wrapped to the address size) in a
/// segment.
///
/// # Errors
/// #GP(0), or #SS(0) through SS: limit, type or canonical violation.
pub fn linear_for<E: Environment>(
    core: &Core<'_, E>,
    segment: SegmentRegister,
    offset: u64,
    size: usize,
    access: Access,
) -> Result<u64, Fault> {
    Ok(linear_in(core.cpu, segment, offset, size, access)?)
}

/// [`linear_for`] on the registers alone.
///
/// # Errors
/// As [`linear_for`].
pub fn linear_in(
    cpu: &CpuState,
    segment: SegmentRegister,
    offset: u64,
    size: usize,
    access: Access,
) -> Result<u64, Exception> {
    let s = cpu.segment(segment);
    let violation = || match segment {
        SegmentRegister::Ss => Exception::stack_fault(0),
        _ => Exception::general_protection(0),
    };
    let more = (size as u64).saturating_sub(1);
    let mode = cpu.mode();
    if mode == Mode::Long64 {
        let base = match segment {
            SegmentRegister::Fs | SegmentRegister::Gs => s.base,
            _ => 0,
        };
        let linear = base.wrapping_add(offset);
        let last = linear.wrapping_add(more);
        if !CpuState::is_canonical(linear) || !CpuState::is_canonical(last) {
            return Err(violation());
        }
        return Ok(linear);
    }
    if !permits(s, mode >= Mode::Protected16, offset, size, access) {
        return Err(violation());
    }
    Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
}

/// Whether a segment permits an access by its limit and, in protected mode, by its type (SDM vol. 3,
/// 5.3 and 5.5). Real and virtual-8086 mode check the limit alone.
pub fn permits(s: &Segment, protected: bool, offset: u64, size: usize, access: Access) -> bool {
    let rights = s.rights;
    let last = offset.wrapping_add((size as u64).saturating_sub(1));
    let limit = u64::from(s.limit);
    if !protected {
        return last <= limit;
    }
    let typed = match access {
        Access::Read => rights.is_readable(),
        Access::Write => rights.is_writable_data(),
        Access::Fetch => true,
    };
    let inside = if rights.is_expand_down() {
        let top = mask(if rights.has(Rights::DB) { 32 } else { 16 });
        offset > limit && last <= top
    } else {
        last <= limit
    };
    !rights.is_unusable() && typed && inside
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};
    use trapline_x86::control::cr0;

    fn decode(bits: u32, bytes: &[u8]) -> Instruction {
        Decoder::with_ip(bits, bytes, 0x1000, DecoderOptions::NONE).decode()
    }

    fn protected() -> CpuState {
        let mut cpu = CpuState::reset();
        cpu.cr0 |= cr0::PE;
        for s in &mut cpu.seg {
            s.base = 0;
            s.limit = 0xffff_ffff;
            s.rights = Rights(0xc093);
        }
        cpu.seg[1].rights = Rights(0xc09b);
        cpu
    }

    #[test]
    fn sixteen_bit_addresses_wrap() {
        let mut cpu = CpuState::reset();
        cpu.gpr[3] = 0xffff_fff0;
        cpu.gpr[6] = 0x20;
        // mov ax, [bx+si+4]
        assert_eq!(
            effective_offset(&cpu, &decode(16, &[0x8b, 0x40, 0x04])),
            0x14
        );
    }

    #[test]
    fn rip_relative_follows_the_executing_address() {
        let mut cpu = CpuState::reset();
        cpu.rip = 0x5000;
        // mov rax, [rip+0x10], decoded at 0x1000
        let instr = decode(64, &[0x48, 0x8b, 0x05, 0x10, 0, 0, 0]);
        assert_eq!(effective_offset(&cpu, &instr), 0x5017);
    }

    #[test]
    fn prefixes_of_string_operands() {
        let segment = |bits, bytes| prefix_segment(&decode(bits, bytes));
        // lodsb alone, with SS and with GS
        assert_eq!(segment(32, &[0xac]), SegmentRegister::Ds);
        assert_eq!(segment(64, &[0x36, 0xac]), SegmentRegister::Ds);
        assert_eq!(segment(32, &[0x36, 0xac]), SegmentRegister::Ss);
        assert_eq!(segment(64, &[0x65, 0xac]), SegmentRegister::Gs);
    }

    #[test]
    fn limits_and_types() {
        let mut cpu = protected();
        cpu.seg[3].limit = 0xfff;
        let ds = SegmentRegister::Ds;
        assert_eq!(linear_in(&cpu, ds, 0xffc, 4, Access::Read), Ok(0xffc));
        let gp = Err(Exception::general_protection(0));
        assert_eq!(linear_in(&cpu, ds, 0xffd, 4, Access::Read), gp);
        assert_eq!(
            linear_in(&cpu, SegmentRegister::Cs, 0, 4, Access::Write),
            gp
        );
        assert!(linear_in(&cpu, SegmentRegister::Cs, 0, 4, Access::Read).is_ok());
        cpu.seg[3].rights = Rights(0xc097);
        assert_eq!(linear_in(&cpu, ds, 0xfff, 1, Access::Read), gp);
        assert_eq!(linear_in(&cpu, ds, 0x1000, 4, Access::Write), Ok(0x1000));
        cpu.seg[2] = Segment::null(0);
        let ss = Err(Exception::stack_fault(0));
        assert_eq!(linear_in(&cpu, SegmentRegister::Ss, 0, 1, Access::Read), ss);
    }

    #[test]
    fn long_mode_checks_canonical_addresses() {
        let mut cpu = protected();
        cpu.efer |= trapline_x86::control::efer::LMA;
        cpu.seg[1].rights = Rights(0xa09b);
        cpu.seg[4].base = 0x1000;
        assert_eq!(
            linear_in(&cpu, SegmentRegister::Fs, 8, 8, Access::Read),
            Ok(0x1008)
        );
        let edge = 0x7fff_ffff_fffc;
        assert!(linear_in(&cpu, SegmentRegister::Ds, edge, 4, Access::Read).is_ok());
        let ss = Err(Exception::stack_fault(0));
        assert_eq!(
            linear_in(&cpu, SegmentRegister::Ss, edge, 8, Access::Read),
            ss
        );
    }

    #[test]
    fn register_parts() {
        let mut cpu = CpuState::reset();
        cpu.gpr[0] = 0x1122_3344_5566_7788;
        assert_eq!(register_value(&cpu, Register::AH), 0x77);
        set_register(&mut cpu, Register::AH, 0xaa);
        set_register(&mut cpu, Register::AL, 0xbb);
        assert_eq!(cpu.gpr[0], 0x1122_3344_5566_aabb);
        set_register(&mut cpu, Register::EAX, 5);
        assert_eq!(cpu.gpr[0], 5);
        set_register(&mut cpu, Register::R9W, 7);
        assert_eq!(cpu.gpr[9], 7);
    }
}
