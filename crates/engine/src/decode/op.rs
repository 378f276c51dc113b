//! One predecoded guest instruction.

use iced_x86::{
    Code, ConditionCode, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind as Operand, Register,
};
use trapline_x86::Mode;

use crate::access::OperandAccess;
use crate::native::Thunk;

/// A general-purpose register operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegOperand {
    /// Index into `CpuState::gpr`.
    pub index: u8,
    /// Bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// AH, CH, DH or BH.
    pub high: bool,
}

impl RegOperand {
    /// `None` for a register that is not general-purpose.
    pub fn new(register: Register) -> Option<Self> {
        if !register.is_gpr() {
            return None;
        }
        let high = matches!(
            register,
            Register::AH | Register::CH | Register::DH | Register::BH
        );
        let index = register.full_register().number() as u8;
        Some(Self {
            index,
            size: register.size() as u8,
            high,
        })
    }
}

/// A memory operand of 64-bit code in the form that needs no segment or size checks: base plus
/// scaled index plus displacement, plus the base of FS or GS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlatAddress {
    /// Index into `gpr`, or [`NO_REGISTER`].
    pub base: u8,
    pub index: u8,
    /// Shift of the index.
    pub scale: u8,
    /// Index into `seg` of FS or GS, or [`NO_REGISTER`].
    pub segment: u8,
    /// The displacement; the absolute address for a RIP-relative operand.
    pub displacement: u64,
}

/// No register in this place of a [`FlatAddress`].
pub const NO_REGISTER: u8 = 0xff;

/// The check that an instruction's registers need before it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateCheck {
    None,
    X87,
    /// WAIT/FWAIT: CR0.MP and CR0.TS.
    Wait,
    Mmx,
    Sse,
    Avx,
    Avx512,
}

/// What executes an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Natively, without a memory operand.
    Native,
    /// Natively with a memory operand.
    NativeMemory(OperandAccess),
    /// As `NativeMemory`, with elements that a mask disables: their memory is not accessed.
    NativeMasked(OperandAccess),
    /// Several instructions without memory operands as one thunk; they are the next `n` operations.
    /// Skipped when instructions must run singly.
    Run(u8),
    /// MOV between general-purpose registers.
    MoveRegister(RegOperand, RegOperand),
    MoveImmediate(RegOperand, u64),
    /// MOV and MOVZX from memory of `size` bytes.
    Load(RegOperand, u8),
    /// MOVSX and MOVSXD from memory of `size` bytes.
    LoadSigned(RegOperand, u8),
    Store(RegOperand),
    StoreImmediate(u64, u8),
    LoadAddress(RegOperand),
    NoOperation,
    /// CLD (false) and STD (true).
    DirectionFlag(bool),
    JumpIf(ConditionCode),
    Jump,
    JumpIndirect,
    Call,
    CallIndirect,
    /// Near return; releases that many bytes more.
    Return(u16),
    /// LOOP, LOOPE, LOOPNE, JCXZ.
    Loop,
    Push,
    Pop,
    /// PUSHA, POPA, ENTER, LEAVE.
    Frame,
    String,
    /// BT, BTS, BTR, BTC with a bit string in memory.
    BitString,
    Gather,
    Xlat,
    /// MASKMOVQ, MASKMOVDQU.
    MaskMove,
    /// BCD arithmetic and other forms without a 64-bit encoding.
    Legacy,
    /// Privileged, sensitive or far: see `step::system`.
    System,
    Undefined,
    /// More than 15 bytes: #GP(0).
    TooLong,
}

/// One predecoded instruction.
#[derive(Clone, Debug)]
pub struct Op {
    pub kind: OpKind,
    pub len: u8,
    pub check: StateCheck,
    pub locked: bool,
    /// The memory operand's size in bytes.
    pub memory_size: u16,
    pub flat: Option<FlatAddress>,
    pub thunk: Option<Thunk>,
    /// Branch target for direct branches.
    pub target: u64,
    pub instruction: Instruction,
}

impl Op {
    /// Predecodes; native operations get their thunk later.
    pub fn new(
        instruction: Instruction,
        mode: Mode,
        allowed: bool,
        factory: &mut InstructionInfoFactory,
    ) -> Self {
        let kind = if is_hint(&instruction) {
            OpKind::NoOperation
        } else if instruction.is_invalid() || !allowed || !lock_is_legal(&instruction) {
            OpKind::Undefined
        } else {
            kind_of(&instruction, mode, factory)
        };
        Self {
            kind,
            len: instruction.len() as u8,
            check: check_of(&instruction),
            locked: is_locked(&instruction),
            memory_size: memory_size_of(&instruction),
            flat: (mode == Mode::Long64)
                .then(|| flat_address(&instruction))
                .flatten(),
            thunk: None,
            target: match instruction.flow_control() {
                FlowControl::ConditionalBranch
                | FlowControl::UnconditionalBranch
                | FlowControl::Call => instruction.near_branch_target(),
                _ => 0,
            },
            instruction,
        }
    }

    /// Whether it is a near jump, call or return, conditional or not, but for LOOP and JCXZ.
    pub fn is_near_branch(&self) -> bool {
        matches!(
            self.kind,
            OpKind::Jump
                | OpKind::JumpIf(_)
                | OpKind::JumpIndirect
                | OpKind::Call
                | OpKind::CallIndirect
                | OpKind::Return(_)
        )
    }

    /// Whether a block ends behind this operation.
    pub fn ends_block(&self) -> bool {
        match self.kind {
            OpKind::Jump
            | OpKind::JumpIndirect
            | OpKind::Call
            | OpKind::CallIndirect
            | OpKind::Return(_)
            | OpKind::Loop
            | OpKind::Undefined
            | OpKind::TooLong
            | OpKind::JumpIf(_) => true,
            OpKind::System => !matches!(
                self.instruction.mnemonic(),
                Mnemonic::Cpuid
                    | Mnemonic::Rdtsc
                    | Mnemonic::Rdtscp
                    | Mnemonic::Rdpid
                    | Mnemonic::Rdmsr
                    | Mnemonic::In
                    | Mnemonic::Pushfq
                    | Mnemonic::Pushfd
                    | Mnemonic::Pushf
                    | Mnemonic::Prefetchnta
                    | Mnemonic::Prefetcht0
                    | Mnemonic::Prefetcht1
                    | Mnemonic::Prefetcht2
                    | Mnemonic::Prefetchw
                    | Mnemonic::Stmxcsr
                    | Mnemonic::Ldmxcsr
                    | Mnemonic::Rdfsbase
                    | Mnemonic::Rdgsbase
                    | Mnemonic::Xgetbv
                    | Mnemonic::Vzeroupper
            ),
            _ => false,
        }
    }
}

/// Encodings in the range reserved for hints: without the extension that they belong to (CET, MPX,
/// CLDEMOTE, none of which the guest is shown) they do nothing.
fn is_hint(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
            | M::Reservednop
            | M::Cldemote
            | M::Bndmk
            | M::Bndcl
            | M::Bndcu
            | M::Bndcn
            | M::Bndmov
            | M::Bndldx
            | M::Bndstx
    ) && !i.has_lock_prefix()
}

fn is_locked(i: &Instruction) -> bool {
    i.has_lock_prefix()
        || (i.mnemonic() == Mnemonic::Xchg && i.op0_kind() == Operand::Memory)
        || (i.mnemonic() == Mnemonic::Xchg && i.op1_kind() == Operand::Memory)
}

/// LOCK is legal only on a memory destination of the read-modify-write instructions; iced decodes
/// it elsewhere too (SDM vol. 2, "LOCK").
fn lock_is_legal(i: &Instruction) -> bool {
    !i.has_lock_prefix() || (i.op0_kind() == Operand::Memory && i.op_code().can_use_lock_prefix())
}

fn memory_size_of(i: &Instruction) -> u16 {
    if i.is_broadcast() {
        return i.memory_size().size() as u16;
    }
    match i.mnemonic() {
        // What the processor reads or writes differs from the operand type iced names.
        Mnemonic::Fnstenv | Mnemonic::Fldenv => i.memory_size().size() as u16,
        _ => i.memory_size().size() as u16,
    }
}

fn flat_address(i: &Instruction) -> Option<FlatAddress> {
    if !(0..i.op_count()).any(|n| i.op_kind(n) == Operand::Memory) {
        return None;
    }
    let segment = match i.memory_segment() {
        Register::FS => 4,
        Register::GS => 5,
        _ => NO_REGISTER,
    };
    if i.is_ip_rel_memory_operand() {
        return (i.memory_base() == Register::RIP).then(|| FlatAddress {
            base: NO_REGISTER,
            index: NO_REGISTER,
            scale: 0,
            segment,
            displacement: i.memory_displacement64(),
        });
    }
    let number = |r: Register| match r {
        Register::None => Some(NO_REGISTER),
        r if r.is_gpr64() => Some(r.number() as u8),
        _ => None,
    };
    let (base, index) = (number(i.memory_base())?, number(i.memory_index())?);
    // Without registers a 32-bit address size would wrap: rare, left to the slow way.
    if base == NO_REGISTER && index == NO_REGISTER && i.memory_displ_size() != 8 {
        let d = i.memory_displacement64();
        if d as i32 as i64 as u64 != d {
            return None;
        }
    }
    Some(FlatAddress {
        base,
        index,
        scale: i.memory_index_scale().trailing_zeros() as u8,
        segment,
        displacement: i.memory_displacement64(),
    })
}

fn check_of(i: &Instruction) -> StateCheck {
    if i.mnemonic() == Mnemonic::Wait {
        return StateCheck::Wait;
    }
    if i.encoding() == EncodingKind::EVEX {
        return StateCheck::Avx512;
    }
    let mut check = StateCheck::None;
    for n in 0..i.op_count() {
        if i.op_kind(n) != Operand::Register {
            continue;
        }
        let r = i.op_register(n);
        if r.is_k() {
            return StateCheck::Avx512;
        }
        if r.is_vector_register() {
            let vex = i.encoding() == EncodingKind::VEX;
            check = if vex {
                StateCheck::Avx
            } else {
                StateCheck::Sse
            };
        } else if r.is_mm() && check == StateCheck::None {
            check = StateCheck::Mmx;
        } else if r.is_st() && check == StateCheck::None {
            check = StateCheck::X87;
        }
    }
    if check == StateCheck::None {
        use iced_x86::CpuidFeature as F;
        if i.mnemonic() == Mnemonic::Emms {
            return StateCheck::Mmx;
        }
        if i.cpuid_features()
            .iter()
            .any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
        {
            return StateCheck::X87;
        }
    }
    check
}

/// How an explicit memory operand is accessed.
fn operand_access(i: &Instruction, factory: &mut InstructionInfoFactory) -> Option<OperandAccess> {
    let info = factory.info(i);
    (0..i.op_count())
        .find(|&n| i.op_kind(n) == Operand::Memory)
        .and_then(|n| match info.op_access(n) {
            OpAccess::Read | OpAccess::CondRead => Some(OperandAccess::Read),
            // An unmasked x87 exception keeps the result from memory.
            OpAccess::Write if check_of(i) == StateCheck::X87 => Some(OperandAccess::ReadWrite),
            OpAccess::Write => Some(OperandAccess::Write),
            OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => {
                Some(OperandAccess::ReadWrite)
            }
            OpAccess::NoMemAccess | OpAccess::None => None,
        })
}

fn kind_of(i: &Instruction, mode: Mode, factory: &mut InstructionInfoFactory) -> OpKind {
    use Mnemonic as M;
    let real = matches!(mode, Mode::Real | Mode::Virtual8086);
    if real && !matches!(i.encoding(), EncodingKind::Legacy) {
        return OpKind::Undefined;
    }
    if crate::step::handles(i) {
        return OpKind::System;
    }
    if let Some(kind) = control_flow(i) {
        return kind;
    }
    if i.is_string_instruction() {
        return OpKind::String;
    }
    if i.is_vsib() {
        return OpKind::Gather;
    }
    match i.mnemonic() {
        M::Push => return OpKind::Push,
        M::Pop => return OpKind::Pop,
        M::Pusha | M::Pushad | M::Popa | M::Popad | M::Enter | M::Leave => return OpKind::Frame,
        M::Xlatb => return OpKind::Xlat,
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => return OpKind::MaskMove,
        M::Nop => return OpKind::NoOperation,
        M::Cld => return OpKind::DirectionFlag(false),
        M::Std => return OpKind::DirectionFlag(true),
        M::Aaa | M::Aad | M::Aam | M::Aas | M::Daa | M::Das | M::Salc => return OpKind::Legacy,
        M::Bt | M::Bts | M::Btr | M::Btc
            if i.op0_kind() == Operand::Memory && i.op1_kind() == Operand::Register =>
        {
            return OpKind::BitString;
        }
        M::Lea => {
            if let Some(r) = RegOperand::new(i.op0_register()) {
                return OpKind::LoadAddress(r);
            }
        }
        M::Mov | M::Movzx | M::Movsx | M::Movsxd => {
            if let Some(kind) = data_move(i) {
                return kind;
            }
        }
        _ => {}
    }
    if !crate::native::supports(i, factory) {
        return OpKind::Undefined;
    }
    match operand_access(i, factory) {
        Some(access) if is_masked(i) => OpKind::NativeMasked(access),
        Some(access) => OpKind::NativeMemory(access),
        None => OpKind::Native,
    }
}

/// Whether a mask says which elements of the memory operand are accessed at all.
fn is_masked(i: &Instruction) -> bool {
    (i.op_mask() != Register::None && !accesses_all(i))
        || is_compress(i) && i.op0_kind() == Operand::Memory
        || matches!(
            i.mnemonic(),
            Mnemonic::Vmaskmovps
                | Mnemonic::Vmaskmovpd
                | Mnemonic::Vpmaskmovd
                | Mnemonic::Vpmaskmovq
        )
}

/// Whether the instruction stores selected elements side by side: one by one, also without a mask.
pub fn is_compress(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Vpcompressb
            | M::Vpcompressw
            | M::Vpcompressd
            | M::Vpcompressq
            | M::Vcompressps
            | M::Vcompresspd
    )
}

/// Whether the instruction accesses its whole memory operand whatever its mask says: its elements
/// are not those of the result (SDM vol. 2, 2.8, the exception classes with "NF").
fn accesses_all(i: &Instruction) -> bool {
    use Mnemonic as M;
    let name = format!("{:?}", i.mnemonic());
    const SHUFFLES: [&str; 15] = [
        "Vinsert",
        "Vpack",
        "Vpunpck",
        "Vunpck",
        "Vshuf",
        "Vpshuf",
        "Vpalignr",
        "Valign",
        "Vperm",
        "Vdbpsadbw",
        "Vgf2p8affine",
        "Vpmadd",
        "Vextract",
        "Vpconflict",
        "Vcvtne2ps2bf16",
    ];
    if SHUFFLES.iter().any(|prefix| name.starts_with(prefix)) {
        return !matches!(
            i.mnemonic(),
            M::Vpmadd52huq | M::Vpmadd52luq | M::Vpshufbitqmb
        );
    }
    match i.mnemonic() {
        M::Vmovddup | M::Vmovsldup | M::Vmovshdup | M::Vpmultishiftqb => true,
        // The count of all elements.
        M::Vpsllw
        | M::Vpslld
        | M::Vpsllq
        | M::Vpsrlw
        | M::Vpsrld
        | M::Vpsrlq
        | M::Vpsraw
        | M::Vpsrad
        | M::Vpsraq => i.op_count() == 3 && i.op_kind(2) == Operand::Memory,
        _ => false,
    }
}

fn control_flow(i: &Instruction) -> Option<OpKind> {
    Some(match i.flow_control() {
        FlowControl::ConditionalBranch => {
            if i.is_jcc_short_or_near() {
                OpKind::JumpIf(i.condition_code())
            } else if i.is_loop() || i.is_loopcc() || i.is_jcx_short() {
                OpKind::Loop
            } else {
                return None;
            }
        }
        FlowControl::UnconditionalBranch if i.is_jmp_short_or_near() => OpKind::Jump,
        FlowControl::IndirectBranch if i.is_jmp_near_indirect() => OpKind::JumpIndirect,
        FlowControl::Call if i.is_call_near() => OpKind::Call,
        FlowControl::IndirectCall if i.is_call_near_indirect() => OpKind::CallIndirect,
        FlowControl::Return if i.mnemonic() == Mnemonic::Ret => {
            OpKind::Return(if i.op_count() > 0 { i.immediate16() } else { 0 })
        }
        _ => return None,
    })
}

/// MOV, MOVZX, MOVSX and MOVSXD between general-purpose registers, memory and immediates.
fn data_move(i: &Instruction) -> Option<OpKind> {
    let signed = matches!(i.mnemonic(), Mnemonic::Movsx | Mnemonic::Movsxd);
    let moving = i.mnemonic() == Mnemonic::Mov;
    let size = i.memory_size().size() as u8;
    match (i.op0_kind(), i.op1_kind()) {
        (Operand::Register, Operand::Memory) => {
            let r = RegOperand::new(i.op0_register())?;
            Some(if signed {
                OpKind::LoadSigned(r, size)
            } else {
                OpKind::Load(r, size)
            })
        }
        (Operand::Memory, Operand::Register) if moving => {
            RegOperand::new(i.op1_register()).map(OpKind::Store)
        }
        (Operand::Register, Operand::Register) if moving => {
            let (to, from) = (
                RegOperand::new(i.op0_register())?,
                RegOperand::new(i.op1_register())?,
            );
            Some(OpKind::MoveRegister(to, from))
        }
        (Operand::Register, Operand::Register) if !signed => {
            let (to, from) = (
                RegOperand::new(i.op0_register())?,
                RegOperand::new(i.op1_register())?,
            );
            Some(OpKind::MoveRegister(to, from))
        }
        (Operand::Register, _) if moving => {
            let r = RegOperand::new(i.op0_register())?;
            Some(OpKind::MoveImmediate(r, i.immediate(1)))
        }
        (Operand::Memory, _) if moving => Some(OpKind::StoreImmediate(i.immediate(1), size)),
        _ => None,
    }
}

/// Whether `code` may be batched with its neighbours into one thunk: it cannot fault.
pub fn cannot_fault(i: &Instruction) -> bool {
    !matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && i.code() != Code::INVALID
}
