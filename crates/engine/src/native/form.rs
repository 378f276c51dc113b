//! What a thunk must know about an instruction: whether it may run natively, and what state it
//! touches.

use super::host::logic_clears_adjust;
use iced_x86::{
    Code, CodeSize, CpuidFeature, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpCodeOperandKind, OpKind, Register, RflagsBits,
};

/// The six status flags in RFLAGS: OF, SF, ZF, AF, PF, CF.
pub(crate) const STATUS: u32 = 0x8d5;
/// The carry flag in RFLAGS.
pub(crate) const CARRY: u32 = 1;
/// The overflow flag in RFLAGS.
pub(crate) const OVERFLOW: u32 = 0x800;

/// One instruction as 64-bit code, its memory operand without address, and the registers it uses.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    pub instruction: Instruction,
    /// Has a memory operand, to be replaced by a pointer.
    pub memory: bool,
    /// General-purpose registers, a bit each in the order of their encoding.
    pub gpr_used: u16,
    pub gpr_written: u16,
    /// Those whose value, or a part of it, matters or stays.
    pub gpr_read: u16,
    /// Those used other than by an operand that could name another register.
    pub gpr_fixed: u16,
    /// AH, CH, DH or BH is an operand: no REX prefix possible.
    pub high_byte: bool,
    pub vector_used: u32,
    pub vector_written: u32,
    pub mask_used: u8,
    pub mask_written: u8,
    pub mxcsr: bool,
    pub x87: bool,
    /// Status flags that must be the guest's before the instruction.
    pub flags_in: u32,
    /// Status flags that the instruction surely replaces by values of its own.
    pub flags_determined: u32,
    /// The instruction may change some status flag.
    pub flags_out: bool,
}

/// `instruction` without what does not matter to a thunk: the address of its memory operand,
/// segment override, hints. LEA keeps its address: it is its operand.
pub(crate) fn normalize(instruction: &Instruction) -> Instruction {
    let mut normal = *instruction;
    normal.set_segment_prefix(Register::None);
    // Repeat and elision prefixes mean nothing, or are hints, on what runs here; mandatory ones are
    // part of the code.
    normal.set_has_rep_prefix(false);
    normal.set_has_repne_prefix(false);
    normal.set_ip(0);
    normal.set_len(0);
    if normal.mnemonic() != Mnemonic::Lea && normal.op_kinds().any(|kind| kind == OpKind::Memory) {
        normal.set_memory_base(Register::None);
        normal.set_memory_index(Register::None);
        normal.set_memory_index_scale(1);
        normal.set_memory_displ_size(0);
        normal.set_memory_displacement64(0);
    }
    normal
}

impl Form {
    /// `None` if the instruction must not run natively.
    pub fn of(instruction: &Instruction, factory: &mut InstructionInfoFactory) -> Option<Self> {
        if !may_run(instruction) {
            return None;
        }
        let narrow = !matches!(instruction.code_size(), CodeSize::Code64);
        let mut normal = normalize(instruction);
        normal.set_code_size(CodeSize::Code64);
        let code = long_mode_code(normal.code());
        if code != normal.code() {
            normal.set_code(code);
        }
        if !normal.op_code().mode64() {
            return None;
        }

        let lea = normal.mnemonic() == Mnemonic::Lea;
        let memory_operands = normal
            .op_kinds()
            .filter(|&kind| kind == OpKind::Memory)
            .count();
        if memory_operands > 1 {
            return None;
        }
        let mut form = Self {
            instruction: normal,
            memory: memory_operands == 1 && !lea,
            gpr_used: 0,
            gpr_written: 0,
            gpr_read: 0,
            gpr_fixed: 0,
            high_byte: false,
            vector_used: 0,
            vector_written: 0,
            mask_used: 0,
            mask_written: 0,
            mxcsr: false,
            x87: normal.cpuid_features().iter().any(|f| is_fpu(*f))
                || matches!(normal.mnemonic(), Mnemonic::Emms | Mnemonic::Wait),
            flags_in: 0,
            flags_determined: 0,
            flags_out: false,
        };
        form.registers(factory, lea)?;
        if narrow && matches!(normal.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) {
            // Outside 64-bit mode these leave registers 8 to 15 alone.
            form.vector_used &= 0xff;
            form.vector_written &= 0xff;
        }
        form.mxcsr = may_use_mxcsr(&form);
        form.flags()?;
        Some(form)
    }

    fn registers(&mut self, factory: &mut InstructionInfoFactory, lea: bool) -> Option<()> {
        let instruction = self.instruction;
        let mut renamable = 0u16;
        for operand in 0..instruction.op_count() {
            match instruction.op_kind(operand) {
                OpKind::Register => {
                    let register = instruction.op_register(operand);
                    if let Some(gpr) = gpr_bit(register) {
                        if is_fixed(instruction.op_code().op_kind(operand)) {
                            self.gpr_fixed |= gpr;
                        } else {
                            renamable |= gpr;
                        }
                        self.high_byte |= is_high_byte(register);
                    } else if !is_data_register(register) {
                        return None;
                    }
                }
                OpKind::Memory
                | OpKind::Immediate8
                | OpKind::Immediate8_2nd
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64 => {}
                _ => return None,
            }
        }
        if lea {
            for register in [instruction.memory_base(), instruction.memory_index()] {
                match register {
                    Register::None => {}
                    _ if register.is_gpr32() || register.is_gpr64() => {
                        renamable |= gpr_bit(register)?;
                    }
                    // 16-bit addressing cannot be encoded; RIP is not the host's.
                    _ => return None,
                }
            }
            if instruction.memory_displ_size() == 2 {
                return None;
            }
        }
        let info = factory.info(&instruction);
        if info.used_memory().len() > usize::from(self.memory) {
            return None;
        }
        for used in info.used_registers() {
            let register = used.register();
            let written = matches!(
                used.access(),
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            );
            if let Some(gpr) = gpr_bit(register) {
                self.gpr_used |= gpr;
                if written {
                    self.gpr_written |= gpr;
                }
                if used.access() != OpAccess::Write || register.size() < 4 {
                    self.gpr_read |= gpr;
                }
            } else if register.is_vector_register() {
                let bit = 1u32.checked_shl(register.number() as u32)?;
                self.vector_used |= bit;
                if written {
                    self.vector_written |= bit;
                }
            } else if register.is_k() {
                let bit = 1u8.checked_shl(register.number() as u32)?;
                self.mask_used |= bit;
                if written {
                    self.mask_written |= bit;
                }
            } else if register.is_st() || register.is_mm() {
                self.x87 = true;
            } else if !(register.is_segment_register() && self.memory) {
                return None;
            }
        }
        self.gpr_used |= renamable | self.gpr_fixed;
        self.gpr_fixed |= self.gpr_used & !renamable;
        Some(())
    }

    fn flags(&mut self) -> Option<()> {
        let instruction = &self.instruction;
        let other = RflagsBits::DF | RflagsBits::IF | RflagsBits::AC;
        if (instruction.rflags_read() | instruction.rflags_modified()) & other != 0 {
            return None;
        }
        // What a shift does depends on its count: nothing if that is 0, and a rotation through CF by
        // a multiple of the width plus one may still change OF.
        let shift = shifts(instruction.mnemonic());
        self.flags_out = shift || status(instruction.rflags_modified()) != 0;
        self.flags_in = status(instruction.rflags_read());
        if self.flags_out {
            if !shift {
                let determined = instruction.rflags_written()
                    | instruction.rflags_set()
                    | instruction.rflags_cleared();
                self.flags_determined =
                    status(determined) & !status(instruction.rflags_undefined());
                let logic = matches!(
                    instruction.mnemonic(),
                    Mnemonic::And | Mnemonic::Or | Mnemonic::Xor | Mnemonic::Test
                );
                if logic && logic_clears_adjust() {
                    self.flags_determined |= 0x10;
                }
            }
            self.flags_in |= STATUS & !self.flags_determined;
        }
        Some(())
    }
}

/// Status flags as bits of RFLAGS.
fn status(bits: u32) -> u32 {
    [
        (RflagsBits::OF, OVERFLOW),
        (RflagsBits::SF, 0x80),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::AF, 0x10),
        (RflagsBits::PF, 0x04),
        (RflagsBits::CF, CARRY),
    ]
    .iter()
    .filter(|(from, _)| bits & from != 0)
    .fold(0, |flags, (_, to)| flags | to)
}

/// The bit of the general-purpose register that `register` is (part of).
pub(crate) fn gpr_bit(register: Register) -> Option<u16> {
    register
        .is_gpr()
        .then(|| 1u16.checked_shl(register.full_register().number() as u32))
        .flatten()
}

pub(crate) fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

fn is_data_register(register: Register) -> bool {
    register.is_vector_register() || register.is_k() || register.is_st() || register.is_mm()
}

/// Operands that the opcode itself names.
pub(crate) fn is_fixed(kind: OpCodeOperandKind) -> bool {
    matches!(
        kind,
        OpCodeOperandKind::al
            | OpCodeOperandKind::cl
            | OpCodeOperandKind::ax
            | OpCodeOperandKind::dx
            | OpCodeOperandKind::eax
            | OpCodeOperandKind::rax
    )
}

/// The code with the same meaning in 64-bit mode, for those that 64-bit mode lacks; and for those
/// with an absolute address the one with a ModRM byte.
fn long_mode_code(code: Code) -> Code {
    match code {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        _ => code,
    }
}

fn shifts(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Rol | Ror | Rcl | Rcr | Shl | Sal | Shr | Sar | Shld | Shrd
    )
}

fn is_fpu(feature: CpuidFeature) -> bool {
    matches!(
        feature,
        CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387
    )
}

/// Whether the instruction is of a kind that may run natively. Lists what may, so that an
/// instruction nobody has thought of does not.
fn may_run(instruction: &Instruction) -> bool {
    if instruction.flow_control() != FlowControl::Next
        || instruction.is_privileged()
        || instruction.is_stack_instruction()
        || instruction.is_string_instruction()
        || instruction.is_save_restore_instruction()
        || instruction.is_vsib()
    {
        return false;
    }
    // A bit index in a register reaches beyond the operand.
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    ) && instruction.op0_kind() == OpKind::Memory
        && instruction.op1_kind() == OpKind::Register
    {
        return false;
    }
    let features = instruction.cpuid_features();
    let mut base = false;
    for feature in features {
        if is_base(*feature) {
            base = true;
        } else if !is_computational(*feature) {
            return false;
        }
    }
    let mnemonic = instruction.mnemonic();
    if base && features.len() == 1 {
        is_base_mnemonic(mnemonic)
    } else {
        !features.is_empty() && !is_special(mnemonic)
    }
}

fn is_base(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64
    )
}

/// Features whose instructions compute, on registers and their explicit memory operand only, but
/// for those of [`is_special`].
fn is_computational(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        ADX | AES
            | AVX
            | AVX2
            | AVX512_4FMAPS
            | AVX512_4VNNIW
            | AVX512_BF16
            | AVX512_BITALG
            | AVX512_FP16
            | AVX512_IFMA
            | AVX512_VBMI
            | AVX512_VBMI2
            | AVX512_VNNI
            | AVX512_VP2INTERSECT
            | AVX512_VPOPCNTDQ
            | AVX512BW
            | AVX512CD
            | AVX512DQ
            | AVX512ER
            | AVX512F
            | AVX512VL
            | AVX_IFMA
            | AVX_NE_CONVERT
            | AVX_VNNI
            | AVX_VNNI_INT8
            | AVX_VNNI_INT16
            | BMI1
            | BMI2
            | CLDEMOTE
            | CLFLUSHOPT
            | CLFSH
            | CLWB
            | CMOV
            | CMPCCXADD
            | CMPXCHG16B
            | CX8
            | F16C
            | FMA
            | FMA4
            | FPU
            | FPU287
            | FPU387
            | GFNI
            | LZCNT
            | MMX
            | MOVBE
            | MOVDIRI
            | MULTIBYTENOP
            | PAUSE
            | PCLMULQDQ
            | POPCNT
            | PREFETCHW
            | PREFETCHWT1
            | RAO_INT
            | RDRAND
            | RDSEED
            | SHA
            | SHA512
            | SM3
            | SM4
            | SSE
            | SSE2
            | SSE3
            | SSE4_1
            | SSE4_2
            | SSE4A
            | SSSE3
            | TBM
            | VAES
            | VPCLMULQDQ
            | XOP
    )
}

/// Instructions of [`is_computational`] features that do touch something else.
fn is_special(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Maskmovq | Maskmovdqu | Vmaskmovdqu | Ldmxcsr | Stmxcsr | Vldmxcsr | Vstmxcsr
    )
}

/// Instructions of the 8086 to the first x64 processors that may run natively.
fn is_base_mnemonic(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    if shifts(mnemonic) {
        return true;
    }
    matches!(
        mnemonic,
        Adc | Add
            | And
            | Bsf
            | Bsr
            | Bswap
            | Bt
            | Btc
            | Btr
            | Bts
            | Cbw
            | Cdq
            | Cdqe
            | Clc
            | Cmc
            | Cmp
            | Cmpxchg
            | Cqo
            | Cwd
            | Cwde
            | Dec
            | Div
            | Idiv
            | Imul
            | Inc
            | Lahf
            | Lea
            | Mov
            | Movsx
            | Movsxd
            | Movzx
            | Mul
            | Neg
            | Nop
            | Not
            | Or
            | Reservednop
            | Sahf
            | Sbb
            | Seta
            | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
            | Stc
            | Sub
            | Test
            | Wait
            | Xadd
            | Xchg
            | Xor
    )
}

/// Whether the instruction may read MXCSR or set its flags. Generous: no for moves, integer, bitwise
/// and shuffling instructions only.
fn may_use_mxcsr(form: &Form) -> bool {
    const NEVER: [&str; 27] = [
        "p",
        "mov",
        "and",
        "or",
        "xor",
        "unpck",
        "shuf",
        "blend",
        "insert",
        "extr",
        "broadcast",
        "aes",
        "sha",
        "gf2p8",
        "lddqu",
        "maskmov",
        "align",
        "compress",
        "expand",
        "perm",
        "zero",
        "k",
        "dbpsad",
        "test",
        "sm3",
        "sm4",
        "mpsad",
    ];
    let name = format!("{:?}", form.instruction.mnemonic()).to_ascii_lowercase();
    let bare = name.strip_prefix('v').unwrap_or(&name);
    // A conversion from memory to a general-purpose register uses no vector register.
    (form.vector_used != 0 || form.mask_used != 0 || bare.starts_with("cvt"))
        && !NEVER.iter().any(|prefix| bare.starts_with(prefix))
}
