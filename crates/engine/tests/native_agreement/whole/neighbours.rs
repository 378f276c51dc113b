//! Runs of accesses that lie near each other, through a register, what was derived from it, and an
//! index: what shares look-ups in translated code. Random instructions hardly ever do.

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};

use crate::case::Registers;
use crate::random::Random;

/// Instructions of a run at most; none is longer than 10 bytes.
const MOST: usize = 10;
/// How far accesses are from their register; the large ones are beyond what is shared, or make it so.
const DISTANCES: &[i64] = &[
    0, 0, 8, 8, -8, -8, 16, -16, 1, -1, 4, 0x40, -0x80, 0x3f8, -0x400, 0x1000,
];
const FAR: &[i32] = &[8, -8, 16, -64, 0x1000_0000, -0x1000_0000, 0x7fff_fff8];

/// The registers that addresses are formed from.
struct Roles {
    base: Register,
    copy: Register,
    index: Register,
}

/// A run that accesses memory near `target`; sets the registers that it takes.
pub fn run(random: &mut Random, registers: &mut Registers, target: u64) -> Vec<Vec<u8>> {
    let numbers = [3, 5, 6, 7, 12, 13].map(|n: usize| (random.bits(), n));
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable();
    let [base, copy, index] = [0, 1, 2].map(|n| numbers[n].1);
    // Now and then the base is the stack pointer.
    let base = if random.one_in(4) { 4 } else { base };
    registers.gpr[base] = target;
    registers.gpr[copy] = target.wrapping_add(8 * random.below(16) as u64);
    registers.gpr[index] = (random.below(32) as u64).wrapping_sub(16);
    let register = |n: usize| Register::RAX + n as u32;
    let roles = Roles {
        base: register(base),
        copy: register(copy),
        index: register(index),
    };
    let count = 3 + random.below(MOST - 2);
    let mut encoder = Encoder::new(64);
    let mut run = Vec::new();
    while run.len() < count {
        let Some(instruction) = instruction(random, &roles) else {
            continue;
        };
        if encoder.encode(&instruction, 0).is_ok() {
            run.push(encoder.take_buffer());
        }
    }
    run
}

fn operand(random: &mut Random, roles: &Roles) -> MemoryOperand {
    let base = random.pick(&[roles.base, roles.base, roles.copy]);
    let distance = random.pick(DISTANCES);
    let (index, scale) = if random.one_in(3) {
        (roles.index, random.pick(&[1, 2, 4, 8]))
    } else {
        (Register::None, 1)
    };
    // 1: as many bytes as it takes.
    MemoryOperand::new(base, index, scale, distance, 1, false, Register::None)
}

fn instruction(random: &mut Random, roles: &Roles) -> Option<Instruction> {
    let memory = operand(random, roles);
    let value = Register::RAX + random.pick(&[0, 1, 2, 8, 9, 10, 3, 6]);
    let vector = Register::XMM0 + random.below(16) as u32;
    let moved = random.pick(&[roles.base, roles.copy, roles.copy, roles.index]);
    let by = random.pick(FAR);
    match random.below(18) {
        0..=2 => Instruction::with2(Code::Mov_r64_rm64, value, memory),
        3..=5 => Instruction::with2(Code::Mov_rm64_r64, memory, value),
        6 => Instruction::with2(Code::Add_rm64_r64, memory, value),
        7 => Instruction::with2(Code::Mov_rm32_imm32, memory, by),
        8 => Instruction::with2(Code::Movups_xmm_xmmm128, vector, memory),
        9 => Instruction::with2(Code::Movups_xmmm128_xmm, memory, vector),
        10 => Instruction::with2(Code::Lea_r64_m, moved, memory),
        11 => Instruction::with2(Code::Mov_r64_rm64, roles.copy, roles.base),
        12 => Instruction::with2(Code::Add_rm64_imm32, moved, by),
        13 => Instruction::with1(Code::Inc_rm64, moved),
        14 => Instruction::with1(Code::Push_r64, value),
        15 => Instruction::with1(Code::Pop_r64, value),
        16 => {
            let from = MemoryOperand::with_base_displ(moved, i64::from(by));
            Instruction::with2(Code::Lea_r64_m, moved, from)
        }
        _ => Instruction::with2(Code::Xchg_rm64_r64, roles.base, roles.copy),
    }
    .ok()
}
