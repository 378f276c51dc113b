//! Random runs: instructions of all kinds that user code may execute, registers that point near the
//! edges of pages, branches forward within the run.

use iced_x86::{
    Code, Decoder, DecoderOptions, EncodingKind, Instruction, InstructionInfoFactory,
    InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register,
};
use trapline_engine::decode::features::Features;

use super::case::{
    ALIGNMENT_CHECK, CODE, CODE_16, CODE_BYTES, Case, DATA, DIRECTION, PAGE, PAGES, Run, data_base,
};
use super::engine::features;
use super::neighbours;
use crate::case::Registers;
use crate::generate::{Generator as Single, floats, number};
use crate::random::Random;

/// Counts how often a run is still to be executed.
const COUNTER: Register = Register::R12;
/// Leads an indirect branch before the run.
const LEADER: Register = Register::R13;

pub struct Generator {
    single: Single,
    features: Features,
    bits: u32,
    /// Some cases check alignment.
    checks_alignment: bool,
    /// Most runs are repeated a few times, by a branch back at their end.
    loops: bool,
    written: InstructionInfoFactory,
    case: Case,
}

/// Instructions that random codes and bytes bring up too rarely.
const RARE: &[&[u8]] = &[
    &[0xa4],
    &[0xa5],
    &[0xa6],
    &[0xa7],
    &[0xaa],
    &[0xab],
    &[0xac],
    &[0xad],
    &[0xae],
    &[0xaf],
    &[0xd7],
    &[0x27],
    &[0x2f],
    &[0x37],
    &[0x3f],
    &[0xd4],
    &[0xd5],
    &[0xd6],
    &[0x60],
    &[0x61],
    &[0x62],
    &[0x63],
    &[0xc8],
    &[0xc9],
    &[0xc3],
    &[0xc2],
    &[0xe8],
    &[0xe9],
    &[0xeb],
    &[0xe0],
    &[0xe1],
    &[0xe2],
    &[0xe3],
    &[0x74],
    &[0x7c],
    &[0x0f, 0x8f],
    &[0x0f, 0x82],
    &[0x50],
    &[0x58],
    &[0x5c],
    &[0x54],
    &[0x8f, 0x00],
    &[0x8f, 0x44, 0x24],
    &[0xff, 0x30],
    &[0xff, 0x74, 0x24],
    &[0xff, 0x10],
    &[0xff, 0x20],
    &[0xff, 0xd0],
    &[0xff],
    &[0x68],
    &[0x6a],
    &[0x9c],
    &[0xfc],
    &[0xfd],
    &[0x0f, 0xa3],
    &[0x0f, 0xab],
    &[0x0f, 0xb3],
    &[0x0f, 0xbb],
    &[0x0f, 0xba],
    &[0x0f, 0xf7],
    &[0x66, 0x0f, 0xf7],
    &[0x0f, 0x18],
    &[0x0f, 0x0d],
    &[0x0f, 0x1f],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0x90],
    &[0xa0],
    &[0xa3],
    &[0x88],
    &[0x8b],
    &[0xc7],
    &[0x8d],
    &[0x87],
    &[0x0f, 0xb1],
    &[0x0f, 0xc1],
    &[0xc4, 0xe2],
    &[0xd9],
    &[0xdd],
    &[0xdf],
];

impl Generator {
    pub fn new(seed: u64, bits: u32, checks_alignment: bool, loops: bool) -> Self {
        Self {
            single: Single::new(seed ^ 0x5eed, bits),
            features: features(),
            bits,
            checks_alignment,
            loops,
            written: InstructionInfoFactory::new(),
            case: Case {
                bits,
                ..Case::default()
            },
        }
    }

    pub fn next(&mut self) -> Run {
        self.change_world();
        let mut case = self.case.clone();
        let mut bytes: Vec<Vec<u8>> = Vec::new();
        let random = &mut self.single.random;
        let mut count = random.pick(&[1, 1, 1, 1, 2, 3, 6]);
        if self.bits == 64 && random.one_in(8) {
            count = 0;
            let target = target(random, 64);
            bytes = neighbours::run(random, &mut case.registers, target);
        }
        while bytes.len() < count {
            let Some(one) = self.instruction() else {
                continue;
            };
            let instruction = self.decode(&one, 0);
            if count > 1 && leaves_flags_undefined(&instruction) {
                continue;
            }
            if bytes.is_empty() {
                self.aim(&instruction, &mut case.registers);
            }
            bytes.push(one);
        }
        self.retarget(&mut bytes);
        if self.loops && !self.single.random.one_in(4) {
            self.repeat(&mut bytes, &mut case.registers);
        }
        let mut instructions = Vec::new();
        let mut at = 0;
        for one in &bytes {
            instructions.push(self.decode(one, at as u64));
            case.code[at..at + one.len()].copy_from_slice(one);
            at += one.len();
        }
        case.len = at as u32;
        Run { case, instructions }
    }

    fn decode(&self, bytes: &[u8], at: u64) -> Instruction {
        let ip = self.case.ip() + at;
        Decoder::with_ip(self.bits, bytes, ip, DecoderOptions::NONE).decode()
    }

    /// The bytes of one instruction, if this attempt is good.
    fn instruction(&mut self) -> Option<Vec<u8>> {
        let random = &mut self.single.random;
        let bytes = match random.below(4) {
            0 => self.single.random_bytes()?.to_vec(),
            1 => self.single.random_code()?.to_vec(),
            2 => self.sparse()?.to_vec(),
            _ => {
                let mut bytes = Vec::new();
                for _ in 0..random.below(3) {
                    bytes
                        .push(random.pick(&[0x66, 0xf2, 0xf3, 0x48, 0x41, 0x45, 0x67, 0x4c, 0x2e]));
                }
                bytes.extend_from_slice(random.pick(RARE));
                while bytes.len() < 15 {
                    // Small numbers: levels of ENTER, displacements.
                    bytes.push(random.bits() as u8 >> random.below(7));
                }
                bytes
            }
        };
        let instruction = self.decode(&bytes, 0);
        let fits = !instruction.is_invalid()
            && self.features.allow(&instruction)
            && !is_excluded(&instruction, &bytes, self.bits);
        fits.then(|| bytes[..instruction.len()].to_vec())
    }

    /// A vector instruction that accesses elements of memory by a mask or by indexes.
    fn sparse(&mut self) -> Option<[u8; 15]> {
        let bytes = self.single.random_code()?;
        let instruction = self.decode(&bytes, 0);
        let memory = instruction.op_kinds().any(|kind| kind == OpKind::Memory);
        let sparse = instruction.is_vsib()
            || instruction.op_mask() != Register::None
            || matches!(
                instruction.mnemonic(),
                Mnemonic::Vmaskmovps
                    | Mnemonic::Vmaskmovpd
                    | Mnemonic::Vpmaskmovd
                    | Mnemonic::Vpmaskmovq
            );
        (memory && sparse).then_some(bytes)
    }

    /// Branches go to a later instruction, or behind the last: nothing loops, and nothing goes into
    /// the middle of an instruction.
    fn retarget(&mut self, bytes: &mut [Vec<u8>]) {
        let ends: Vec<usize> = bytes
            .iter()
            .scan(0, |at, one| {
                *at += one.len();
                Some(*at)
            })
            .collect();
        for n in 0..bytes.len() {
            let instruction = self.decode(&bytes[n], 0);
            let near = instruction.op_count() > 0
                && matches!(
                    instruction.op0_kind(),
                    OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
                );
            if !near {
                continue;
            }
            let target = match self.single.random.below(4) {
                0 => CODE_BYTES + self.single.random.below(8),
                _ => ends[n + self.single.random.below(bytes.len() - n)],
            };
            let offsets = Decoder::with_ip(self.bits, &bytes[n], 0, DecoderOptions::NONE);
            let mut decoder = offsets;
            let instruction = decoder.decode();
            let constants = decoder.get_constant_offsets(&instruction);
            let (at, size) = (constants.immediate_offset(), constants.immediate_size());
            let distance = (target - ends[n]) as u64;
            bytes[n][at..at + size].copy_from_slice(&distance.to_le_bytes()[..size]);
        }
    }

    /// Has the run executed up to four times, with some branches that lead on before it, if nothing in it
    /// writes the register that counts.
    fn repeat(&mut self, bytes: &mut Vec<Vec<u8>>, registers: &mut Registers) {
        if self.writes(bytes, COUNTER) {
            return;
        }
        let led = !self.writes(bytes, LEADER);
        let random = &mut self.single.random;
        let before: &[&[u8]] = match random.below(if led { 4 } else { 2 }) {
            0 => &[&[0xeb, 0]],                               // jmp to what follows
            1 => &[&[0xe8, 2, 0, 0, 0], &[0xeb, 1], &[0xc3]], // call 1f; jmp 2f; 1: ret; 2:
            2 => &[&[0x41, 0xff, 0xe5]],                      // jmp *%r13
            _ => &[&[0x41, 0xff, 0xd5]],                      // call *%r13
        };
        let before: Vec<Vec<u8>> = before.iter().map(|one| one.to_vec()).collect();
        let first: usize = before.iter().map(Vec::len).sum();
        let len: usize = first + bytes.iter().map(Vec::len).sum::<usize>();
        if len + 9 > CODE_BYTES {
            return;
        }
        registers.gpr[COUNTER.number()] = 1 + random.below(4) as u64;
        if led && !random.one_in(8) {
            registers.gpr[LEADER.number()] = CODE + first as u64;
        }
        bytes.splice(0..0, before);
        bytes.push(vec![0x49, 0xff, 0xcc]); // dec %r12
        let mut back = vec![0x0f, 0x85]; // jne
        back.extend_from_slice(&(-(len as i32) - 9).to_le_bytes());
        bytes.push(back);
    }

    /// Whether instructions write a register, or a part of it.
    fn writes(&mut self, bytes: &[Vec<u8>], register: Register) -> bool {
        let decoded: Vec<_> = bytes.iter().map(|one| self.decode(one, 0)).collect();
        decoded.iter().any(|i| {
            let info = self
                .written
                .info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE);
            info.used_registers().iter().any(|used| {
                let reads = matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
                used.register().full_register() == register && !reads
            })
        })
    }

    fn change_world(&mut self) {
        self.single.change_world();
        let random = &mut self.single.random;
        let case = &mut self.case;
        case.segment = random.below(CODE_16.len()) as u32;
        case.registers.clone_from(&self.single.world.registers);
        if random.one_in(6) {
            case.registers.rflags |= DIRECTION;
        }
        if self.checks_alignment && random.one_in(8) {
            case.registers.rflags |= ALIGNMENT_CHECK;
        }
        for register in 0..16 {
            if random.one_in(2) {
                case.registers.gpr[register] = target(random, self.bits);
            } else if random.one_in(3) {
                case.registers.gpr[register] &= 0x7f;
            }
        }
        // Index vectors of small numbers, of steps near a page, of anything.
        for _ in 0..2 {
            let vector = &mut case.registers.vector.zmm[random.below(32)].0;
            let scale = random.pick(&[1, 8, 64, 1024]);
            let size = random.pick(&[4, 8]);
            for chunk in vector.chunks_exact_mut(size) {
                let value = (random.below(64) as u64).wrapping_mul(scale);
                let value = if random.one_in(8) {
                    number(random)
                } else if random.one_in(3) {
                    value.wrapping_neg()
                } else {
                    value
                };
                chunk.copy_from_slice(&value.to_le_bytes()[..size]);
            }
        }
        for _ in 0..3 {
            let edge = random.below(PAGES.len() + 1) * PAGE;
            let bytes = case.memory.0.as_flattened_mut();
            let from = edge.saturating_sub(192) + 64 * random.below(6);
            if let Some(part) = bytes.get_mut(from..from + 64) {
                floats(random, part);
            }
        }
    }

    /// Sets registers so that the memory that the instruction accesses is near an edge.
    fn aim(&mut self, i: &Instruction, registers: &mut Registers) {
        let random = &mut self.single.random;
        if random.one_in(10) {
            return;
        }
        let bits = self.bits;
        let gpr = &mut registers.gpr;
        if i.is_string_instruction() {
            gpr[6] = target(random, bits);
            gpr[7] = target(random, bits);
            gpr[1] = random.below(48) as u64;
            if random.one_in(4) {
                gpr[1] = random.below(0x3000) as u64;
            }
            return;
        }
        if i.is_stack_instruction() {
            gpr[4] = target(random, bits);
            gpr[5] = target(random, bits);
        }
        match i.mnemonic() {
            Mnemonic::Xlatb => gpr[3] = target(random, bits).wrapping_sub(gpr[0] & 0xff),
            Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => {
                gpr[7] = target(random, bits);
            }
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
                if i.op1_kind() == OpKind::Register && !random.one_in(4) =>
            {
                let index = random.below(0x200) as u64;
                let index = if random.one_in(2) {
                    index.wrapping_neg()
                } else {
                    index
                };
                gpr[i.op1_register().full_register().number()] = index;
            }
            _ => {}
        }
        let base = match (i.memory_base(), i.memory_index()) {
            (Register::RIP | Register::EIP, _) => return,
            (base, _) if base.is_gpr() => base,
            (_, index) if index.is_gpr() && i.memory_index_scale() == 1 => index,
            _ => return,
        };
        if i.memory_index().is_gpr() && i.memory_index() != base {
            gpr[i.memory_index().number()] &= 0x3f;
        }
        let wanted = target(random, bits);
        let number = base.number();
        gpr[number] = 0;
        let rest = offset(i, gpr);
        let value = wanted.wrapping_sub(rest);
        gpr[number] = if bits == 64 {
            value
        } else {
            value & 0xffff_ffff
        };
    }
}

/// The offset of the memory operand without its vector index.
fn offset(i: &Instruction, gpr: &[u64; 16]) -> u64 {
    let value = |r: Register| if r.is_gpr() { gpr[r.number()] } else { 0 };
    value(i.memory_base())
        .wrapping_add(value(i.memory_index()).wrapping_mul(u64::from(i.memory_index_scale())))
        .wrapping_add(i.memory_displacement64())
}

/// An offset in data segments, mostly near the edge of a page.
fn target(random: &mut Random, bits: u32) -> u64 {
    let edge = (random.below(PAGES.len() + 1) * PAGE) as u64;
    let near = match random.below(4) {
        0 => random.below(PAGE) as u64,
        1 => 16 * random.below(12) as u64,
        _ => random.below(80) as u64,
    };
    let near = if random.one_in(2) {
        near
    } else {
        near.wrapping_neg()
    };
    let near = if random.one_in(3) { near & !63 } else { near };
    let linear = DATA.wrapping_add(edge).wrapping_add(near);
    let offset = linear.wrapping_sub(data_base(bits));
    if bits == 64 {
        offset
    } else {
        offset & 0xffff_ffff
    }
}

/// What cannot be compared, and what would leave the case.
fn is_excluded(i: &Instruction, bytes: &[u8], bits: u32) -> bool {
    use Mnemonic as M;
    let segment = |n: u32| {
        i.op_count() > n
            && i.op_kind(n) == OpKind::Register
            && i.op_register(n).is_segment_register()
    };
    match i.mnemonic() {
        // Random numbers, time, identification.
        M::Rdrand | M::Rdseed | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdpmc | M::Cpuid => true,
        // What the kernel does or may emulate.
        M::Syscall | M::Sysenter | M::Int | M::Int1 | M::Int3 | M::Into => true,
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => true,
        // Descriptors of the host's tables.
        M::Lar | M::Lsl | M::Verr | M::Verw | M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => true,
        M::Retf | M::Iret | M::Iretd | M::Iretq => true,
        M::Mov | M::Pop if segment(0) => true,
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase | M::Swapgs => true,
        // Trap and alignment flags are the host's.
        M::Popf | M::Popfd | M::Popfq => true,
        // Images with the format of this processor; tested beside their code.
        M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xsaveopt | M::Xsaveopt64 => true,
        M::Xsaves | M::Xsaves64 | M::Xrstor | M::Xrstor64 | M::Xrstors | M::Xrstors64 => true,
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 | M::Xgetbv => true,
        M::Fnsave | M::Frstor | M::Fnstenv | M::Fldenv => true,
        // Processors differ.
        M::Movsxd if i.code() == Code::Movsxd_r16_rm16 => true,
        M::Reservednop | M::Sysexit | M::Sysexitq => true,
        M::Loope | M::Loopne if has_repeat_prefix(bytes) => true,
        _ if i.is_jmp_far()
            || i.is_call_far()
            || i.is_jmp_far_indirect()
            || i.is_call_far_indirect() =>
        {
            true
        }
        // This processor has 16-bit near branches in 64-bit mode, the decoder those of others.
        _ if bits == 64 && near_branch(i) && has_operand_size_prefix(bytes) => true,
        _ => {
            matches!(i.segment_prefix(), Register::FS | Register::GS)
                || i.encoding() == EncodingKind::D3NOW
                || i.code() == Code::INVALID
        }
    }
}

/// Whether the engine has flags of its own where the manual leaves them undefined: what follows could
/// tell.
fn leaves_flags_undefined(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Aaa | M::Aas | M::Aad | M::Aam | M::Daa | M::Das
    )
}

fn near_branch(i: &Instruction) -> bool {
    i.is_jcc_short_or_near()
        || i.is_jmp_short_or_near()
        || i.is_call_near()
        || i.is_jmp_near_indirect()
        || i.is_call_near_indirect()
        || i.is_loop()
        || i.is_loopcc()
        || i.is_jcx_short()
        || i.mnemonic() == Mnemonic::Ret
}

/// Whether 66 is among the prefixes.
fn has_operand_size_prefix(bytes: &[u8]) -> bool {
    prefixes(bytes).any(|byte| *byte == 0x66)
}

/// Whether F2 or F3 is among the prefixes.
fn has_repeat_prefix(bytes: &[u8]) -> bool {
    prefixes(bytes).any(|byte| matches!(*byte, 0xf2 | 0xf3))
}

fn prefixes(bytes: &[u8]) -> impl Iterator<Item = &u8> {
    let prefix = |byte: &&u8| matches!(**byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    bytes.iter().take_while(prefix)
}
