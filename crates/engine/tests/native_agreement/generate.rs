//! Random instructions with random state.

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Instruction, Mnemonic, OpCodeInfo, OpCodeOperandKind,
    OpKind, Register, RoundingControl,
};
use trapline_engine::native;

use crate::case::{Case, DATA, Registers, STATUS, World, ip};
use crate::random::Random;
use crate::reference::canonical;

/// An instruction as decoded, and the address of its memory operand (0: none).
pub struct Generated {
    pub case: Case,
    pub instruction: Instruction,
    pub address: u64,
}

pub struct Generator {
    pub random: Random,
    codes: Vec<Code>,
    /// How often each code gave #UD, until it gave something else.
    undefined: Vec<u8>,
    encoder: Encoder,
    bits: u32,
    /// A world that changes a little from case to case.
    pub world: World,
}

impl Generator {
    /// Generates code for segments of 16, 32 or 64 `bits`.
    pub fn new(seed: u64, bits: u32) -> Self {
        let codes: Vec<Code> = Code::values()
            .filter(|code| code.op_code().is_available_in_mode(bits))
            .filter(|code| code.op_code().is_instruction())
            .collect();
        Self {
            random: Random::new(seed),
            codes,
            undefined: vec![0; Code::values().len()],
            encoder: Encoder::new(bits),
            bits,
            world: World::default(),
        }
    }

    /// Tells whether `code` raised #UD, so that what the processor lacks comes up rarely.
    pub fn learn(&mut self, code: Code, undefined: bool) {
        let count = &mut self.undefined[code as usize];
        if !undefined {
            *count = u8::MAX;
        } else if *count < 8 {
            *count += 1;
        }
    }

    pub fn next(&mut self) -> Generated {
        loop {
            let bytes = if self.random.one_in(3) {
                self.random_bytes()
            } else {
                self.random_code()
            };
            let Some(bytes) = bytes else { continue };
            let instruction =
                Decoder::with_ip(self.bits, &bytes, ip(self.bits), DecoderOptions::NONE).decode();
            if instruction.is_invalid()
                || !native::supports(&instruction, &mut iced_x86::InstructionInfoFactory::new())
                || is_excluded(&instruction)
                || (self.undefined[instruction.code() as usize] == 8 && !self.random.one_in(64))
            {
                continue;
            }
            self.change_world();
            let mut case = Case {
                before: self.world.clone(),
                bits: self.bits,
                ..Case::default()
            };
            case.len = instruction.len() as u32;
            case.bytes[..instruction.len()].copy_from_slice(&bytes[..instruction.len()]);
            if let Some(address) = self.aim(&instruction, &mut case.before.registers) {
                return Generated {
                    case,
                    instruction,
                    address,
                };
            }
        }
    }

    /// Sets base and index registers so that the memory operand lies in the data, and gives its
    /// address.
    fn aim(&mut self, instruction: &Instruction, registers: &mut Registers) -> Option<u64> {
        let memory = instruction.op_kinds().any(|kind| kind == OpKind::Memory);
        if !memory || instruction.mnemonic() == Mnemonic::Lea {
            return Some(0);
        }
        // FS has a base of its own in the process that executes the reference; code cannot be
        // written to through CS.
        match instruction.segment_prefix() {
            Register::FS | Register::GS => return None,
            Register::CS if self.bits != 64 => return None,
            _ => {}
        }
        let base = instruction.memory_base();
        if instruction.is_ip_rel_memory_operand() || base == Register::None {
            let address = linear(instruction, registers);
            return in_data(address).then_some(address);
        }
        let target = self.target();
        let index = instruction.memory_index();
        let number = base.full_register().number();
        if index != Register::None {
            let index_number = index.full_register().number();
            // Small, so that 32-bit addresses do as well.
            registers.gpr[index_number] &= 0xff;
            if index_number == number {
                let scale = u64::from(instruction.memory_index_scale()) + 1;
                let wanted = target.wrapping_sub(instruction.memory_displacement64());
                registers.gpr[number] = wanted / scale;
            }
        }
        if index.full_register() != base.full_register() {
            registers.gpr[number] = 0;
            let rest = linear(instruction, registers);
            registers.gpr[number] = target.wrapping_sub(rest);
            if self.bits != 64 {
                registers.gpr[number] &= 0xffff_ffff;
            }
        }
        let address = linear(instruction, registers);
        in_data(address).then_some(address)
    }

    fn target(&mut self) -> u64 {
        let offset = self.random.below(129) as u64;
        DATA + match self.random.below(4) {
            0 => offset,
            1 => offset & !15,
            _ => offset & !63,
        }
    }

    pub fn random_bytes(&mut self) -> Option<[u8; 15]> {
        let mut bytes = [0; 15];
        self.random.fill(&mut bytes);
        let mut at = 0;
        for _ in 0..self.random.below(3) {
            bytes[at] = self
                .random
                .pick(&[0x66, 0xf2, 0xf3, 0x40, 0x48, 0x4f, 0x41, 0x44, 0x67, 0xf0]);
            at += 1;
        }
        let opcode = self.random.pick(&[
            &[][..],
            &[0x0f],
            &[0x0f, 0x38],
            &[0x0f, 0x3a],
            &[0xc5],
            &[0xc4],
            &[0x62],
        ]);
        bytes[at..at + opcode.len()].copy_from_slice(opcode);
        Some(bytes)
    }

    pub fn random_code(&mut self) -> Option<[u8; 15]> {
        let code = self.codes[self.random.below(self.codes.len())];
        let info = code.op_code();
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        for operand in 0..info.op_count() {
            self.random_operand(&mut instruction, operand, info.op_kind(operand))?;
        }
        self.random_decoration(&mut instruction, info);
        self.encoder.encode(&instruction, ip(self.bits)).ok()?;
        let encoded = self.encoder.take_buffer();
        let mut bytes = [0x90; 15];
        bytes.get_mut(..encoded.len())?.copy_from_slice(&encoded);
        Some(bytes)
    }

    fn random_operand(
        &mut self,
        instruction: &mut Instruction,
        operand: u32,
        kind: OpCodeOperandKind,
    ) -> Option<()> {
        use OpCodeOperandKind as K;
        let memory = match kind {
            K::mem | K::mem_offs => true,
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::zmm_or_mem
            | K::k_or_mem => self.random.one_in(2),
            _ => false,
        };
        if memory {
            instruction.set_op_kind(operand, OpKind::Memory);
            self.random_address(instruction, kind == K::mem_offs);
            return Some(());
        }
        let indexes = match kind {
            K::mem_vsib32x | K::mem_vsib64x => Some(Register::XMM0),
            K::mem_vsib32y | K::mem_vsib64y => Some(Register::YMM0),
            K::mem_vsib32z | K::mem_vsib64z => Some(Register::ZMM0),
            _ => None,
        };
        if let Some(first) = indexes {
            let registers = if self.bits == 64 { 16 } else { 8 };
            let base = if self.bits == 64 {
                Register::RAX
            } else {
                Register::EAX
            };
            instruction.set_op_kind(operand, OpKind::Memory);
            instruction.set_memory_base(base + self.random.below(registers) as u32);
            instruction.set_memory_index(first + self.random.below(registers) as u32);
            instruction.set_memory_index_scale(self.random.pick(&[1, 2, 4, 8]));
            instruction.set_memory_displ_size(1);
            instruction.set_memory_displacement64(self.random.bits() as i8 as u64);
            return Some(());
        }
        let (first, count) = match kind {
            K::r8_or_mem | K::r8_reg | K::r8_opcode => (Register::AL, 20),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_reg_mem => {
                (Register::AX, 16)
            }
            K::r32_or_mem
            | K::r32_reg
            | K::r32_rm
            | K::r32_opcode
            | K::r32_vvvv
            | K::r32_reg_mem => (Register::EAX, 16),
            K::r64_or_mem
            | K::r64_reg
            | K::r64_rm
            | K::r64_opcode
            | K::r64_vvvv
            | K::r64_reg_mem => (Register::RAX, 16),
            K::mm_or_mem | K::mm_reg | K::mm_rm => (Register::MM0, 8),
            K::k_or_mem | K::k_reg | K::kp1_reg | K::k_rm | K::k_vvvv => (Register::K0, 8),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmmp3_vvvv => {
                (Register::XMM0, self.vector_registers())
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv => {
                (Register::YMM0, self.vector_registers())
            }
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv | K::zmmp3_vvvv => {
                (Register::ZMM0, 32)
            }
            K::xmm_is4 | K::xmm_is5 => (Register::XMM0, 16),
            K::ymm_is4 | K::ymm_is5 => (Register::YMM0, 16),
            K::sti_opcode => (Register::ST0, 8),
            K::st0 => (Register::ST0, 1),
            K::al => (Register::AL, 1),
            K::cl => (Register::CL, 1),
            K::ax => (Register::AX, 1),
            K::eax => (Register::EAX, 1),
            K::rax => (Register::RAX, 1),
            _ => {
                let (kind, value) = match kind {
                    K::imm8 => (OpKind::Immediate8, self.random.bits() & 0xff),
                    K::imm4_m2z => (OpKind::Immediate8, self.random.bits() & 0xf),
                    K::imm8_const_1 => (OpKind::Immediate8, 1),
                    K::imm8sex16 => (OpKind::Immediate8to16, self.random.bits() as i8 as u64),
                    K::imm8sex32 => (OpKind::Immediate8to32, self.random.bits() as i8 as u64),
                    K::imm8sex64 => (OpKind::Immediate8to64, self.random.bits() as i8 as u64),
                    K::imm16 => (OpKind::Immediate16, self.random.bits() & 0xffff),
                    K::imm32 => (OpKind::Immediate32, self.random.bits() & 0xffff_ffff),
                    K::imm32sex64 => (OpKind::Immediate32to64, self.random.bits() as i32 as u64),
                    K::imm64 => (OpKind::Immediate64, self.random.bits()),
                    _ => return None,
                };
                // EXTRQ and INSERTQ have two.
                let second = (0..operand).any(|o| instruction.op_kind(o) == OpKind::Immediate8);
                let kind = if second { OpKind::Immediate8_2nd } else { kind };
                instruction.set_op_kind(operand, kind);
                if second {
                    instruction.set_immediate8_2nd(value as u8);
                } else {
                    instruction.set_immediate_u64(operand, value);
                }
                return Some(());
            }
        };
        instruction.set_op_kind(operand, OpKind::Register);
        let count = if self.bits == 64 { count } else { count.min(8) };
        instruction.set_op_register(operand, first + self.random.below(count) as u32);
        Some(())
    }

    fn vector_registers(&mut self) -> usize {
        if self.random.one_in(2) { 16 } else { 32 }
    }

    fn random_address(&mut self, instruction: &mut Instruction, absolute: bool) {
        let target = self.target();
        instruction.set_memory_displ_size(8);
        if absolute || self.random.one_in(8) {
            let relative = !absolute && self.bits == 64;
            instruction.set_memory_base(if relative {
                Register::RIP
            } else {
                Register::None
            });
            if self.bits != 64 {
                instruction.set_memory_displ_size(4);
            }
            instruction.set_memory_displacement64(target);
            return;
        }
        let wide = self.bits == 64 && !self.random.one_in(8);
        let registers = if self.bits == 64 { 16 } else { 8 };
        let first = if wide { Register::RAX } else { Register::EAX };
        instruction.set_memory_base(first + self.random.below(registers) as u32);
        if self.random.one_in(2) {
            let index = self.random.below(registers) as u32;
            if index != 4 {
                instruction.set_memory_index(first + index);
                instruction.set_memory_index_scale(self.random.pick(&[1, 2, 4, 8]));
            }
        }
        match self.random.below(3) {
            0 => instruction.set_memory_displ_size(0),
            1 => {
                instruction.set_memory_displ_size(1);
                instruction.set_memory_displacement64(self.random.bits() as i8 as u64);
            }
            _ => {
                instruction.set_memory_displ_size(if wide { 8 } else { 4 });
                let displacement = self.random.bits() as i32 as u64;
                let displacement = if wide {
                    displacement
                } else {
                    displacement & 0xffff_ffff
                };
                instruction.set_memory_displacement64(displacement);
            }
        }
    }

    fn random_decoration(&mut self, instruction: &mut Instruction, info: &OpCodeInfo) {
        let memory = instruction.op_kinds().any(|kind| kind == OpKind::Memory);
        if info.can_use_lock_prefix() && memory && self.random.one_in(2) {
            instruction.set_has_lock_prefix(true);
        }
        if info.can_use_op_mask_register()
            && (info.require_op_mask_register() || self.random.one_in(2))
        {
            instruction.set_op_mask(Register::K1 + self.random.below(7) as u32);
            if info.can_use_zeroing_masking() && self.random.one_in(2) {
                instruction.set_zeroing_masking(true);
            }
        }
        if memory {
            if info.can_broadcast() && self.random.one_in(2) {
                instruction.set_is_broadcast(true);
            }
        } else if info.can_use_rounding_control() && self.random.one_in(3) {
            instruction.set_rounding_control(self.random.pick(&[
                RoundingControl::RoundToNearest,
                RoundingControl::RoundDown,
                RoundingControl::RoundUp,
                RoundingControl::RoundTowardZero,
            ]));
        } else if info.can_suppress_all_exceptions() && self.random.one_in(3) {
            instruction.set_suppress_all_exceptions(true);
        }
    }

    /// Replaces some of the state; the rest stays as it was for the case before.
    pub fn change_world(&mut self) {
        let random = &mut self.random;
        for _ in 0..6 {
            let register = random.below(16);
            self.world.registers.gpr[register] = number(random);
        }
        if self.bits != 64 {
            for register in &mut self.world.registers.gpr {
                *register &= 0xffff_ffff;
            }
        }
        self.world.registers.rflags = 0x202 | (random.bits() & STATUS);
        let vector = &mut self.world.registers.vector;
        for _ in 0..4 {
            let register = random.below(32);
            floats(random, &mut vector.zmm[register].0);
        }
        let mask = random.below(8);
        vector.k[mask] = number(random);
        vector.mxcsr = match random.below(4) {
            0 => 0x1f80,
            1 => random.bits() as u32 & 0xffff,
            2 => 0x1f80 | (random.bits() as u32 & 0xe07f),
            // Flush to zero and denormals are zero rarely: they hide much.
            _ => 0x1f80 | (random.bits() as u32 & 0x603f),
        };
        x87(random, &mut vector.x87.0);
        canonical(&mut vector.x87);
        let part = random.below(5) * 64;
        floats(random, &mut self.world.data.0[part..part + 64]);
    }
}

/// What cannot be compared.
fn is_excluded(instruction: &Instruction) -> bool {
    match instruction.mnemonic() {
        // Random numbers.
        Mnemonic::Rdrand | Mnemonic::Rdseed => true,
        // The decoder takes XCHG r8, RAX for PAUSE if it has an F3 prefix.
        Mnemonic::Pause => instruction.len() > 2,
        _ => false,
    }
}

fn in_data(address: u64) -> bool {
    (DATA..=DATA + 128).contains(&address)
}

fn linear(instruction: &Instruction, registers: &Registers) -> u64 {
    let operand = (0..instruction.op_count())
        .find(|&operand| instruction.op_kind(operand) == OpKind::Memory)
        .expect("a memory operand");
    instruction
        .virtual_address(operand, 0, |register, _, _| {
            if register.is_segment_register() {
                return Some(0);
            }
            let value = registers.gpr[register.full_register().number()];
            Some(if register.size() == 4 {
                value & 0xffff_ffff
            } else {
                value
            })
        })
        .expect("an address of general-purpose registers")
}

/// Numbers of all sizes, and edges.
pub fn number(random: &mut Random) -> u64 {
    match random.below(6) {
        0 => random.bits(),
        1 => random.bits() >> random.below(64),
        2 => (random.bits() as i8) as u64,
        3 => 1u64 << random.below(64),
        4 => random.pick(&[
            0,
            1,
            u64::MAX,
            1 << 63,
            (1 << 63) - 1,
            0xffff_ffff,
            0x8000_0000,
            0x7fff,
        ]),
        _ => (random.bits() as i32) as u64,
    }
}

pub fn floats(random: &mut Random, bytes: &mut [u8]) {
    match random.below(4) {
        0 => random.fill(bytes),
        1 => {
            for chunk in bytes.chunks_exact_mut(4) {
                chunk.copy_from_slice(&single(random).to_le_bytes());
            }
        }
        2 => {
            for chunk in bytes.chunks_exact_mut(8) {
                chunk.copy_from_slice(&double(random).to_le_bytes());
            }
        }
        _ => {
            for chunk in bytes.chunks_exact_mut(8) {
                chunk.copy_from_slice(&number(random).to_le_bytes());
            }
        }
    }
}

/// The bits of a single-precision number: ordinary, extreme or special.
fn single(random: &mut Random) -> u32 {
    let bits = random.bits() as u32;
    match random.below(6) {
        0..=2 => (bits & 0x81ff_ffff) | 0x3f00_0000,
        3 => bits & 0x807f_ffff,
        4 => random.pick(&[
            0,
            0x8000_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            0x3f80_0000,
            0x7f7f_ffff,
        ]),
        _ => bits,
    }
}

/// The bits of a double-precision number: ordinary, extreme or special.
fn double(random: &mut Random) -> u64 {
    let bits = random.bits();
    match random.below(6) {
        0..=2 => (bits & 0x803f_ffff_ffff_ffff) | 0x3fe0_0000_0000_0000,
        3 => bits & 0x800f_ffff_ffff_ffff,
        4 => random.pick(&[
            0,
            1 << 63,
            0x7ff << 52,
            0xfff << 52,
            0x7ff8 << 48,
            (0x7ff << 52) | 1,
            0x3ff << 52,
        ]),
        _ => bits,
    }
}

/// An FXSAVE image: exceptions mostly masked, sometimes one pending.
fn x87(random: &mut Random, image: &mut [u8; 512]) {
    let masks = if random.one_in(4) {
        random.bits() as u16 & 0x3f
    } else {
        0x3f
    };
    let control = (random.bits() as u16 & 0x0f00) | 0x40 | masks;
    image[0..2].copy_from_slice(&control.to_le_bytes());
    let mut status = random.bits() as u16 & 0x7f7f;
    if !random.one_in(8) {
        // Nothing pending.
        status &= !0x3f | masks;
    }
    image[2..4].copy_from_slice(&status.to_le_bytes());
    image[4] = random.bits() as u8 | random.pick(&[0, 0xff]);
    image[6..8].copy_from_slice(&(random.bits() as u16 & 0x7ff).to_le_bytes());
    image[8..16].copy_from_slice(&(random.bits() >> 17).to_le_bytes());
    image[16..24].copy_from_slice(&(random.bits() >> 17).to_le_bytes());
    let at = 32 + random.below(8) * 16;
    let exponent = match random.below(4) {
        0 => random.bits() as u16,
        1 => random.pick(&[0, 0x7fff, 0x8000, 0xffff]),
        _ => 0x3ff0 + random.below(32) as u16,
    };
    let mantissa = random.bits() | if random.one_in(8) { 0 } else { 1 << 63 };
    image[at..at + 8].copy_from_slice(&mantissa.to_le_bytes());
    image[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
    image[24..32].copy_from_slice(&0x1f80u64.to_le_bytes());
}
