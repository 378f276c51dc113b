//! Host instructions of fixed form: what stands around the guest's own.

use crate::frame::SKEW;

/// Host registers by the number of their encoding.
pub mod reg {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R8: u8 = 8;
    pub const R9: u8 = 9;
    pub const R10: u8 = 10;
    pub const R11: u8 = 11;
    pub const R12: u8 = 12;
    pub const R13: u8 = 13;
    pub const R14: u8 = 14;
    pub const R15: u8 = 15;
}

/// Length of [`Assembler::jump`].
pub const JUMP_BYTES: i32 = 5;

/// Condition codes as they stand in Jcc and SETcc.
pub mod cond {
    pub const A: u8 = 7;
    pub const NE: u8 = 5;
}

/// A memory operand: base plus index times scale plus displacement.
#[derive(Clone, Copy, Debug)]
pub struct Mem {
    pub base: Option<u8>,
    /// Register and shift.
    pub index: Option<(u8, u8)>,
    pub displacement: i32,
}

impl Mem {
    pub fn base(base: u8, displacement: i32) -> Self {
        Self {
            base: Some(base),
            index: None,
            displacement,
        }
    }
    /// Two registers.
    pub fn sum(base: u8, index: u8) -> Self {
        Self {
            base: Some(base),
            index: Some((index, 0)),
            displacement: 0,
        }
    }
    /// A field of the frame.
    pub fn field(offset: i32) -> Self {
        Self::base(reg::RSP, offset + SKEW)
    }
    /// A slot, by the number in `index`, of the frame's table at `offset`.
    pub fn slot(offset: i32, index: u8) -> Self {
        Self {
            base: Some(reg::RSP),
            index: Some((index, 3)),
            displacement: offset + SKEW,
        }
    }
}

/// A place in the code that jumps refer to before it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(usize);

/// Code that grows.
#[derive(Default)]
pub struct Assembler {
    pub bytes: Vec<u8>,
    /// The executable address of the first byte.
    pub start: u64,
    /// Offsets of labels.
    labels: Vec<Option<usize>>,
    /// 32-bit displacements to fill in: where they stand and what they lead to.
    fixups: Vec<(usize, Label)>,
}

impl Assembler {
    pub fn new(start: u64) -> Self {
        // What a block takes as a rule.
        Self {
            bytes: Vec::with_capacity(1024),
            start,
            labels: Vec::with_capacity(64),
            fixups: Vec::with_capacity(64),
        }
    }

    /// Bytes so far.
    pub fn here(&self) -> usize {
        self.bytes.len()
    }

    /// The executable address of the next byte.
    pub fn address(&self) -> u64 {
        self.start.wrapping_add(self.bytes.len() as u64)
    }

    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// The label is here.
    pub fn bind(&mut self, label: Label) {
        let here = self.here();
        if let Some(place) = self.labels.get_mut(label.0) {
            *place = Some(here);
        }
    }

    /// The offset of a bound label.
    pub fn offset_of(&self, label: Label) -> Option<usize> {
        self.labels.get(label.0).copied().flatten()
    }

    /// Fills in what jumps to labels; whether all were bound.
    #[must_use]
    pub fn finish(&mut self) -> bool {
        for (at, label) in std::mem::take(&mut self.fixups) {
            let Some(target) = self.offset_of(label) else {
                return false;
            };
            let distance = target as i64 - (at as i64 + 4);
            self.bytes[at..at + 4].copy_from_slice(&(distance as i32).to_le_bytes());
        }
        true
    }

    pub fn byte(&mut self, byte: u8) {
        self.bytes.push(byte);
    }
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
    fn imm32(&mut self, value: i32) {
        self.raw(&value.to_le_bytes());
    }

    /// ModRM, SIB and displacement; the REX prefix and opcode have been written.
    fn operand(&mut self, register: u8, mem: Mem) {
        let field = (register & 7) << 3;
        let Some(base) = mem.base else {
            // Absolute, or index only.
            let (index, scale) = mem.index.unwrap_or((4, 0));
            self.byte(field | 4);
            self.byte(scale << 6 | (index & 7) << 3 | 5);
            self.imm32(mem.displacement);
            return;
        };
        let short = i8::try_from(mem.displacement).ok();
        let mode = match (mem.displacement, short) {
            (0, _) if base & 7 != 5 => 0,
            (_, Some(_)) => 0x40,
            _ => 0x80,
        };
        match mem.index {
            None if base & 7 != 4 => self.byte(mode | field | base & 7),
            index => {
                let (index, scale) = index.unwrap_or((4, 0));
                self.byte(mode | field | 4);
                self.byte(scale << 6 | (index & 7) << 3 | base & 7);
            }
        }
        match mode {
            0x40 => self.byte(mem.displacement as u8),
            0x80 => self.imm32(mem.displacement),
            _ => {}
        }
    }

    fn rex(wide: bool, register: u8, mem: Mem) -> u8 {
        0x40 | u8::from(wide) << 3
            | (register >> 3) << 2
            | (mem.index.map_or(0, |(i, _)| i) >> 3) << 1
            | mem.base.unwrap_or(0) >> 3
    }

    /// `opcode` with a register and a memory operand of 64 bits, or 32.
    fn with_mem(&mut self, wide: bool, opcode: &[u8], register: u8, mem: Mem) {
        let rex = Self::rex(wide, register, mem);
        if rex != 0x40 {
            self.byte(rex);
        }
        self.raw(opcode);
        self.operand(register, mem);
    }

    /// `opcode` with two registers: `register` in ModRM.reg, `rm` in ModRM.rm.
    fn with_reg(&mut self, wide: bool, opcode: &[u8], register: u8, rm: u8) {
        let rex = 0x40 | u8::from(wide) << 3 | (register >> 3) << 2 | rm >> 3;
        if rex != 0x40 {
            self.byte(rex);
        }
        self.raw(opcode);
        self.byte(0xc0 | (register & 7) << 3 | rm & 7);
    }

    /// MOV r64, m64.
    pub fn load(&mut self, to: u8, mem: Mem) {
        self.with_mem(true, &[0x8b], to, mem);
    }
    /// MOV r32, m32.
    pub fn load32(&mut self, to: u8, mem: Mem) {
        self.with_mem(false, &[0x8b], to, mem);
    }
    /// MOVSX r64 from memory of so many bytes: 1, 2, 4; MOV for 8.
    pub fn load_signed(&mut self, to: u8, mem: Mem, bytes: u8) {
        let opcode: &[u8] = match bytes {
            1 => &[0x0f, 0xbe],
            2 => &[0x0f, 0xbf],
            4 => &[0x63],
            _ => &[0x8b],
        };
        self.with_mem(true, opcode, to, mem);
    }
    /// MOV m64, r64.
    pub fn store(&mut self, mem: Mem, from: u8) {
        self.with_mem(true, &[0x89], from, mem);
    }
    /// MOV m64, imm32 sign-extended.
    pub fn store_immediate(&mut self, mem: Mem, value: i32) {
        self.with_mem(true, &[0xc7], 0, mem);
        self.imm32(value);
    }
    /// MOV m32, imm32.
    pub fn store_immediate32(&mut self, mem: Mem, value: i32) {
        self.with_mem(false, &[0xc7], 0, mem);
        self.imm32(value);
    }
    /// MOV r64, r64.
    pub fn mov(&mut self, to: u8, from: u8) {
        if to != from {
            self.with_reg(true, &[0x8b], to, from);
        }
    }
    /// The shortest MOV of a constant that touches no flags.
    pub fn mov_immediate(&mut self, to: u8, value: u64) {
        if let Ok(low) = u32::try_from(value) {
            if to >= 8 {
                self.byte(0x41);
            }
            self.byte(0xb8 | to & 7);
            self.imm32(low as i32);
        } else if let Ok(signed) = i32::try_from(value as i64) {
            self.with_reg(true, &[0xc7], 0, to);
            self.imm32(signed);
        } else {
            self.byte(0x48 | to >> 3);
            self.byte(0xb8 | to & 7);
            self.raw(&value.to_le_bytes());
        }
    }
    /// LEA r64, m.
    pub fn lea(&mut self, to: u8, mem: Mem) {
        match mem {
            Mem {
                base: Some(base),
                index: None,
                displacement: 0,
            } => self.mov(to, base),
            _ => self.with_mem(true, &[0x8d], to, mem),
        }
    }
    /// MOVZX r32, r16.
    pub fn zero_extend16(&mut self, to: u8, from: u8) {
        self.with_reg(false, &[0x0f, 0xb7], to, from);
    }
    /// MOVZX r32, m8.
    pub fn load_byte(&mut self, to: u8, mem: Mem) {
        self.with_mem(false, &[0x0f, 0xb6], to, mem);
    }
    /// RORX r32, r32, imm8, as a shift to the left of a value that fits. Needs BMI2.
    pub fn shift_left_flagless(&mut self, register: u8, count: u8) {
        // VEX.LZ.F2.0F3A.W0 F0 /r ib.
        self.byte(0xc4);
        self.byte((!register >> 3 & 1) << 7 | 0x40 | (!register >> 3 & 1) << 5 | 3);
        self.byte(0x7b);
        self.byte(0xf0);
        self.byte(0xc0 | (register & 7) << 3 | register & 7);
        self.byte(32 - count);
    }
    /// SHRX r64, r64, RSP: without flags. Needs BMI2.
    pub fn page_number(&mut self, to: u8, from: u8) {
        // VEX.LZ.F2.0F38.W1 F7 /r, the count in vvvv.
        self.byte(0xc4);
        self.byte((!to >> 3 & 1) << 7 | 0x40 | (!from >> 3 & 1) << 5 | 2);
        self.byte(0x80 | (!reg::RSP & 0xf) << 3 | 3);
        self.byte(0xf7);
        self.byte(0xc0 | (to & 7) << 3 | from & 7);
    }
    /// BEXTR r64, r64, RSP: the slot of an address. Changes flags. Needs BMI1.
    pub fn slot_index(&mut self, to: u8, from: u8) {
        // VEX.LZ.0F38.W1 F7 /r, start and length in vvvv.
        self.byte(0xc4);
        self.byte((!to >> 3 & 1) << 7 | 0x40 | (!from >> 3 & 1) << 5 | 2);
        self.byte(0x80 | (!reg::RSP & 0xf) << 3);
        self.byte(0xf7);
        self.byte(0xc0 | (to & 7) << 3 | from & 7);
    }
    /// SHR r32, imm8.
    pub fn shift_right32(&mut self, register: u8, count: u8) {
        self.with_reg(false, &[0xc1], 5, register);
        self.byte(count);
    }
    /// ADD r64, m64.
    pub fn add_mem(&mut self, to: u8, mem: Mem) {
        self.with_mem(true, &[0x03], to, mem);
    }
    /// CMP r64, imm32.
    pub fn compare_immediate(&mut self, register: u8, value: i32) {
        if let Ok(short) = i8::try_from(value) {
            self.with_reg(true, &[0x83], 7, register);
            self.byte(short as u8);
        } else {
            self.with_reg(true, &[0x81], 7, register);
            self.imm32(value);
        }
    }
    /// CMP m32, imm8.
    pub fn compare_mem32(&mut self, mem: Mem, value: i8) {
        self.with_mem(false, &[0x83], 7, mem);
        self.byte(value as u8);
    }
    /// Jcc with a 32-bit displacement; gives where the displacement stands.
    pub fn jump_if(&mut self, condition: u8, label: Label) -> usize {
        self.raw(&[0x0f, 0x80 | condition]);
        self.displacement(label)
    }
    /// JMP with a 32-bit displacement ([`JUMP_BYTES`]); gives where the displacement stands.
    pub fn jump(&mut self, label: Label) -> usize {
        self.byte(0xe9);
        self.displacement(label)
    }
    fn displacement(&mut self, label: Label) -> usize {
        let at = self.here();
        self.fixups.push((at, label));
        self.imm32(0);
        at
    }
    fn displacement_to(&mut self, target: u64) {
        let next = self.address().wrapping_add(4);
        self.imm32(target.wrapping_sub(next) as i32);
    }
    /// CALL to an address within reach.
    pub fn call_address(&mut self, target: u64) {
        self.byte(0xe8);
        self.displacement_to(target);
    }
    /// JMP to an address within reach.
    pub fn jump_address(&mut self, target: u64) {
        self.byte(0xe9);
        self.displacement_to(target);
    }
    /// JRCXZ over the jump that `miss` emits.
    pub fn unless_rcx_zero(&mut self, miss: impl FnOnce(&mut Self)) {
        self.raw(&[0xe3, 0]);
        let from = self.here();
        miss(self);
        let distance = self.here() - from;
        self.bytes[from - 1] = distance as u8;
    }
    /// JMP r64.
    pub fn jump_register(&mut self, register: u8) {
        self.with_reg(false, &[0xff], 4, register);
    }
    /// JMP m64.
    pub fn jump_mem(&mut self, mem: Mem) {
        self.with_mem(false, &[0xff], 4, mem);
    }
    /// CALL m64.
    pub fn call_mem(&mut self, mem: Mem) {
        self.with_mem(false, &[0xff], 2, mem);
    }
    pub fn push(&mut self, register: u8) {
        if register >= 8 {
            self.byte(0x41);
        }
        self.byte(0x50 | register & 7);
    }
    pub fn pop(&mut self, register: u8) {
        if register >= 8 {
            self.byte(0x41);
        }
        self.byte(0x58 | register & 7);
    }
    pub fn ret(&mut self) {
        self.byte(0xc3);
    }
    /// Puts the status flags into AX: LAHF, SETO AL.
    pub fn flags_to_ax(&mut self) {
        self.raw(&[0x9f, 0x0f, 0x90, 0xc0]);
    }
    /// The reverse: ADD AL, 127 (overflows from 1 only), SAHF.
    pub fn ax_to_flags(&mut self) {
        self.raw(&[0x04, 0x7f, 0x9e]);
    }
    /// MOV m16, AX.
    pub fn store_ax(&mut self, mem: Mem) {
        self.byte(0x66);
        self.with_mem(false, &[0x89], reg::RAX, mem);
    }
    /// MOVZX EAX, m16.
    pub fn load_ax(&mut self, mem: Mem) {
        self.with_mem(false, &[0x0f, 0xb7], reg::RAX, mem);
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

    use super::*;

    fn text(emit: impl FnOnce(&mut Assembler)) -> String {
        let mut a = Assembler::new(0x1000);
        emit(&mut a);
        assert!(a.finish());
        let mut decoder = Decoder::with_ip(64, &a.bytes, 0x1000, DecoderOptions::NONE);
        let mut formatter = GasFormatter::new();
        let mut lines = Vec::new();
        while decoder.can_decode() {
            let mut line = String::new();
            formatter.format(&decoder.decode(), &mut line);
            lines.push(line);
        }
        lines.join("; ")
    }

    #[test]
    fn operands_take_every_form() {
        for (mem, expected) in [
            (Mem::base(reg::RAX, 0), "mov (%rax),%r9"),
            (Mem::base(reg::RBP, 0), "mov (%rbp),%r9"),
            (Mem::base(reg::R13, 0), "mov (%r13),%r9"),
            (Mem::base(reg::R12, 0), "mov (%r12),%r9"),
            (Mem::base(reg::RSP, 8), "mov 8(%rsp),%r9"),
            (Mem::base(reg::R14, -0x1000), "mov -0x1000(%r14),%r9"),
            (
                Mem::slot(0x1000 - SKEW, reg::R15),
                "mov 0x1000(%rsp,%r15,8),%r9",
            ),
            (
                Mem {
                    base: None,
                    index: Some((reg::RDX, 2)),
                    displacement: 5,
                },
                "mov 5(,%rdx,4),%r9",
            ),
            (
                Mem {
                    base: None,
                    index: None,
                    displacement: 5,
                },
                "mov 5,%r9",
            ),
        ] {
            assert_eq!(text(|a| a.load(reg::R9, mem)), expected);
        }
    }

    #[test]
    fn constants_are_short() {
        let immediate = |value| text(|a| a.mov_immediate(reg::R14, value));
        assert_eq!(immediate(5), "mov $5,%r14d");
        assert_eq!(immediate(u64::MAX), "mov $0xFFFFFFFFFFFFFFFF,%r14");
        assert_eq!(immediate(1 << 40), "movabs $0x10000000000,%r14");
    }

    #[test]
    fn the_flagless_shift_counts_by_the_stack_pointer() {
        assert_eq!(
            text(|a| a.page_number(reg::RCX, reg::R14)),
            "shrx %rsp,%r14,%rcx"
        );
        assert_eq!(
            text(|a| a.page_number(reg::R15, reg::RAX)),
            "shrx %rsp,%rax,%r15"
        );
    }

    #[test]
    fn slots_are_extracted_by_the_stack_pointer() {
        assert_eq!(
            text(|a| a.slot_index(reg::R15, reg::R14)),
            "bextr %rsp,%r14,%r15"
        );
    }

    #[test]
    fn the_flagless_shift_to_the_left_rotates() {
        assert_eq!(
            text(|a| a.shift_left_flagless(reg::RCX, 11)),
            "rorx $0x15,%ecx,%ecx"
        );
        assert_eq!(
            text(|a| a.shift_left_flagless(reg::R15, 9)),
            "rorx $0x17,%r15d,%r15d"
        );
    }

    #[test]
    fn jumps_reach_their_labels() {
        let code = text(|a| {
            let end = a.label();
            a.unless_rcx_zero(|a| {
                a.jump(end);
            });
            a.jump_if(cond::NE, end);
            a.bind(end);
            a.ret();
        });
        let code = code.replace("0x000000000000", "");
        assert_eq!(code, "jrcxz 1007; jmp 100D; jne 100D; ret");
    }
}
