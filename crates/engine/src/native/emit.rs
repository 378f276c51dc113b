//! Writes the code of thunks.

use std::mem::offset_of;

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};
use trapline_x86::CpuState;
use trapline_x86::vector::{MXCSR_RESET, VectorState};

use super::arena::{MARKER_BYTES, marker};
use super::form::{CARRY, Form, OVERFLOW, STATUS};
use super::host::{Host, VectorWidth};
use super::registers::{Assignment, gpr64};

const GPR: usize = offset_of!(CpuState, gpr);
const RIP: usize = offset_of!(CpuState, rip);
const RFLAGS: usize = offset_of!(CpuState, rflags);
const VECTOR: usize = offset_of!(CpuState, vector);
const ZMM: usize = VECTOR + offset_of!(VectorState, zmm);
const X87: usize = VECTOR + offset_of!(VectorState, x87);
const MASK: usize = VECTOR + offset_of!(VectorState, k);
const MXCSR: usize = VECTOR + offset_of!(VectorState, mxcsr);
/// Last instruction and last data pointer in an FXSAVE64 image (SDM vol. 1, table 10-2).
const X87_FIP: usize = X87 + 8;
const X87_FDP: usize = X87 + 16;
const X87_MXCSR: usize = X87 + 24;

/// The instruction cannot be encoded for 64-bit mode, or there are too few registers.
pub(super) struct CannotEncode;

impl From<iced_x86::IcedError> for CannotEncode {
    fn from(_: iced_x86::IcedError) -> Self {
        Self
    }
}

type Emitted = Result<(), CannotEncode>;

/// State that all instructions of a thunk use together.
#[derive(Default)]
struct Union {
    gpr_used: u16,
    gpr_written: u16,
    vector_used: u32,
    vector_written: u32,
    mask_used: u8,
    mask_written: u8,
    mxcsr: bool,
    x87: bool,
    flags_in: u32,
    flags_determined: u32,
    flags_out: bool,
}

impl Union {
    fn new(forms: &[Form], host: Host) -> Self {
        let mut union = Self::default();
        for form in forms {
            union.gpr_used |= form.gpr_used;
            union.gpr_written |= form.gpr_written;
            union.vector_used |= form.vector_used & host.vectors();
            union.vector_written |= form.vector_written & host.vectors();
            union.mask_used |= form.mask_used & host.masks();
            union.mask_written |= form.mask_written & host.masks();
            union.mxcsr |= form.mxcsr;
            union.x87 |= form.x87;
            union.flags_in |= form.flags_in & !union.flags_determined;
            union.flags_determined |= form.flags_determined;
            union.flags_out |= form.flags_out;
        }
        union
    }
}

/// Emits code for one thunk.
struct Emitter<'a> {
    encoder: Encoder,
    /// The address that the first byte will have.
    start: u64,
    /// Bytes emitted.
    len: usize,
    host: Host,
    registers: Assignment,
    union: Union,
    /// Address of a 32-bit MXCSR value for Rust.
    host_mxcsr: u64,
    forms: &'a [Form],
    /// Address of the last guest instruction emitted.
    executed: u64,
    /// Where the marker before the load of MXCSR goes.
    refusal: Option<usize>,
}

/// The code of a thunk that will lie at `start`: executes `forms` in order.
pub(super) fn thunk(
    forms: &[Form],
    host: Host,
    start: u64,
    host_mxcsr: u64,
) -> Result<Vec<u8>, CannotEncode> {
    // The x87 instruction pointer is corrected for one instruction only.
    if forms.len() > 1 && forms.iter().any(|form| form.x87 || form.memory) {
        return Err(CannotEncode);
    }
    let registers = Assignment::new(forms).ok_or(CannotEncode)?;
    let mut emitter = Emitter {
        encoder: Encoder::new(64),
        start,
        len: 0,
        host,
        registers,
        union: Union::new(forms, host),
        host_mxcsr,
        forms,
        executed: 0,
        refusal: None,
    };
    emitter.load()?;
    let markers = emitter.execute()?;
    emitter.store()?;
    emitter.leave()?;
    emitter.put(Instruction::with2(
        Code::Xor_r32_rm32,
        Register::EAX,
        Register::EAX,
    )?)?;
    emitter.put(Instruction::with(Code::Retnq))?;
    let recovery = emitter.len;
    emitter.recover()?;
    let refusal = emitter.refusal.map(|at| (at, emitter.len));
    if refusal.is_some() {
        emitter.leave()?;
        emitter.put(Instruction::with(Code::Retnq))?;
    }
    let mut code = emitter.encoder.take_buffer();
    for (at, target) in markers.into_iter().map(|at| (at, recovery)).chain(refusal) {
        let end = at + MARKER_BYTES;
        let distance = i32::try_from(target - end).map_err(|_| CannotEncode)?;
        code.get_mut(at..end)
            .ok_or(CannotEncode)?
            .copy_from_slice(&marker(distance));
    }
    Ok(code)
}

impl Emitter<'_> {
    fn ip(&self) -> u64 {
        self.start.wrapping_add(self.len as u64)
    }

    fn put(&mut self, instruction: Instruction) -> Emitted {
        self.len += self.encoder.encode(&instruction, self.ip())?;
        Ok(())
    }

    fn byte(&mut self, byte: u8) {
        self.encoder.write_u8(byte);
        self.len += 1;
    }

    /// A field of the guest's state.
    fn field(&self, offset: usize) -> MemoryOperand {
        MemoryOperand::with_base_displ(gpr64(self.registers.state), offset as i64)
    }

    fn load(&mut self) -> Emitted {
        for register in each(u32::from(self.registers.saved)) {
            self.put(Instruction::with1(Code::Push_r64, gpr64(register as u8))?)?;
        }
        let (state, operand) = (gpr64(self.registers.state), gpr64(self.registers.operand));
        if state != Register::RDI {
            self.put(Instruction::with2(
                Code::Mov_r64_rm64,
                state,
                Register::RDI,
            )?)?;
        }
        if operand != Register::RSI {
            self.put(Instruction::with2(
                Code::Mov_r64_rm64,
                operand,
                Register::RSI,
            )?)?;
        }
        if self.union.x87 {
            // The image's MXCSR means nothing, but FXRSTOR refuses reserved bits in it.
            let mxcsr = self.field(X87_MXCSR);
            self.put(Instruction::with2(
                Code::Mov_rm32_imm32,
                mxcsr,
                MXCSR_RESET,
            )?)?;
            // Loads XMM registers and MXCSR, too: before those.
            self.put(Instruction::with1(
                Code::Fxrstor64_m512byte,
                self.field(X87),
            )?)?;
        }
        self.load_flags()?;
        for guest in each(u32::from(self.union.gpr_used)) {
            let register = self.registers.host(guest);
            let field = self.field(GPR + guest * 8);
            self.put(Instruction::with2(Code::Mov_r64_rm64, register, field)?)?;
        }
        for number in each(self.union.vector_used) {
            let (code, register) = self.vector(number, true);
            let field = self.field(ZMM + number * 64);
            self.put(Instruction::with2(code, register, field)?)?;
        }
        for number in each(u32::from(self.union.mask_used)) {
            let code = if self.host.wide_masks {
                Code::VEX_Kmovq_kr_km64
            } else {
                Code::VEX_Kmovw_kr_km16
            };
            let field = self.field(MASK + number * 8);
            self.put(Instruction::with2(
                code,
                Register::K0 + number as u32,
                field,
            )?)?;
        }
        if self.union.mxcsr {
            // Whoever lets reserved bits in gets #GP, not the end of the process.
            self.refusal = Some(self.mark());
            self.put(Instruction::with1(Code::Ldmxcsr_m32, self.field(MXCSR))?)?;
        }
        Ok(())
    }

    /// Makes room for a marker and gives where it goes.
    fn mark(&mut self) -> usize {
        let at = self.len;
        for _ in 0..MARKER_BYTES {
            self.byte(0);
        }
        at
    }

    /// Loads the status flags that the instructions read or keep. Clobbers RAX and RCX.
    fn load_flags(&mut self) -> Emitted {
        let mut needed = self.union.flags_in;
        if self.union.flags_out {
            needed |= STATUS & !self.union.flags_determined;
        }
        if needed == 0 {
            return Ok(());
        }
        let flags = self.field(RFLAGS);
        if needed == CARRY {
            return self.put(Instruction::with2(Code::Bt_rm32_imm8, flags, 0)?);
        }
        // POPF takes longer than this.
        self.put(Instruction::with2(
            Code::Mov_r32_rm32,
            Register::EAX,
            flags,
        )?)?;
        if needed & OVERFLOW != 0 {
            self.put(Instruction::with2(
                Code::Mov_r32_rm32,
                Register::ECX,
                Register::EAX,
            )?)?;
            self.put(Instruction::with2(Code::Shr_rm32_imm8, Register::ECX, 11)?)?;
            self.put(Instruction::with2(Code::And_rm32_imm8, Register::ECX, 1)?)?;
            self.put(Instruction::with2(
                Code::Mov_r8_rm8,
                Register::AH,
                Register::AL,
            )?)?;
            // Overflows from 1 only.
            self.put(Instruction::with2(Code::Add_rm8_imm8, Register::CL, 0x7f)?)?;
        } else {
            self.put(Instruction::with2(
                Code::Mov_r8_rm8,
                Register::AH,
                Register::AL,
            )?)?;
        }
        self.put(Instruction::with(Code::Sahf))
    }

    /// The guest's instructions, each after room for a marker. Gives where the markers go.
    fn execute(&mut self) -> Result<Vec<usize>, CannotEncode> {
        let mut markers = Vec::with_capacity(self.forms.len());
        for form in self.forms {
            markers.push(self.mark());
            self.executed = self.ip();
            self.put(self.registers.apply(form))?;
        }
        Ok(markers)
    }

    fn store(&mut self) -> Emitted {
        for guest in each(u32::from(self.union.gpr_written)) {
            let register = self.registers.host(guest);
            let field = self.field(GPR + guest * 8);
            self.put(Instruction::with2(Code::Mov_rm64_r64, field, register)?)?;
        }
        for number in each(self.union.vector_written) {
            let (code, register) = self.vector(number, false);
            let field = self.field(ZMM + number * 64);
            self.put(Instruction::with2(code, field, register)?)?;
        }
        for number in each(u32::from(self.union.mask_written)) {
            // Without wide masks the upper 48 bits are always 0 in the guest's state.
            let code = if self.host.wide_masks {
                Code::VEX_Kmovq_m64_kr
            } else {
                Code::VEX_Kmovw_m16_kr
            };
            let field = self.field(MASK + number * 8);
            self.put(Instruction::with2(
                code,
                field,
                Register::K0 + number as u32,
            )?)?;
        }
        if self.union.flags_out {
            self.store_flags()?;
        }
        if self.union.mxcsr {
            self.put(Instruction::with1(Code::Stmxcsr_m32, self.field(MXCSR))?)?;
        }
        if self.union.x87 {
            self.put(Instruction::with1(
                Code::Fxsave64_m512byte,
                self.field(X87),
            )?)?;
            self.hide_pointers()?;
        }
        Ok(())
    }

    /// Merges the status flags into the guest's. Clobbers RAX and RCX.
    fn store_flags(&mut self) -> Emitted {
        let (eax, ecx) = (Register::EAX, Register::ECX);
        // PUSHF takes longer than this.
        self.put(Instruction::with(Code::Lahf))?;
        self.put(Instruction::with1(Code::Seto_rm8, Register::AL)?)?;
        self.put(Instruction::with2(Code::Movzx_r32_rm8, ecx, Register::AH)?)?;
        self.put(Instruction::with2(Code::Movzx_r32_rm8, eax, Register::AL)?)?;
        self.put(Instruction::with2(Code::Shl_rm32_imm8, eax, 11)?)?;
        self.put(Instruction::with2(
            Code::And_rm32_imm32,
            ecx,
            (STATUS & 0xff) as i32,
        )?)?;
        self.put(Instruction::with2(Code::Or_r32_rm32, eax, ecx)?)?;
        self.put(Instruction::with2(
            Code::Mov_r32_rm32,
            ecx,
            self.field(RFLAGS),
        )?)?;
        self.put(Instruction::with2(
            Code::And_rm32_imm32,
            ecx,
            !STATUS as i32,
        )?)?;
        self.put(Instruction::with2(Code::Or_r32_rm32, eax, ecx)?)?;
        self.put(Instruction::with2(
            Code::Mov_rm32_r32,
            self.field(RFLAGS),
            eax,
        )?)
    }

    /// Replaces host addresses in the x87 image: the instruction pointer by the guest's, the data
    /// pointer by 0. Clobbers RAX, RCX and flags.
    fn hide_pointers(&mut self) -> Emitted {
        let (rax, rcx) = (Register::RAX, Register::RCX);
        let executed = MemoryOperand::with_base_displ(Register::RIP, self.executed as i64);
        self.put(Instruction::with2(
            Code::Mov_r64_rm64,
            rax,
            self.field(X87_FIP),
        )?)?;
        self.put(Instruction::with2(Code::Lea_r64_m, rcx, executed)?)?;
        self.put(Instruction::with2(Code::Cmp_r64_rm64, rax, rcx)?)?;
        self.put(Instruction::with2(
            Code::Cmove_r64_rm64,
            rax,
            self.field(RIP),
        )?)?;
        self.put(Instruction::with2(
            Code::Mov_rm64_r64,
            self.field(X87_FIP),
            rax,
        )?)?;
        if self.forms.iter().any(|form| form.memory) {
            let operand = gpr64(self.registers.operand);
            self.put(Instruction::with2(
                Code::Mov_r64_rm64,
                rax,
                self.field(X87_FDP),
            )?)?;
            self.put(Instruction::with2(
                Code::Xor_r32_rm32,
                Register::ECX,
                Register::ECX,
            )?)?;
            self.put(Instruction::with2(Code::Cmp_r64_rm64, rax, operand)?)?;
            self.put(Instruction::with2(Code::Cmove_r64_rm64, rax, rcx)?)?;
            self.put(Instruction::with2(
                Code::Mov_rm64_r64,
                self.field(X87_FDP),
                rax,
            )?)?;
        }
        Ok(())
    }

    /// Makes the processor fit for Rust again.
    fn leave(&mut self) -> Emitted {
        if self.union.x87 {
            self.put(Instruction::with(Code::Fninit))?;
        }
        if self.union.mxcsr || self.union.x87 {
            let default = MemoryOperand::with_base_displ(Register::RIP, self.host_mxcsr as i64);
            self.put(Instruction::with1(Code::Ldmxcsr_m32, default)?)?;
        }
        if self.union.vector_used != 0 && self.host.width > VectorWidth::Xmm {
            // Else SSE code pays for the upper halves.
            self.put(Instruction::with(Code::VEX_Vzeroupper))?;
        }
        for register in each(u32::from(self.registers.saved)).rev() {
            self.put(Instruction::with1(Code::Pop_r64, gpr64(register as u8))?)?;
        }
        Ok(())
    }

    /// The recovery code: the fault handler has put the result into RAX.
    fn recover(&mut self) -> Emitted {
        if self.union.mxcsr {
            // An unmasked SIMD exception has set its flags.
            self.put(Instruction::with1(Code::Stmxcsr_m32, self.field(MXCSR))?)?;
            if self.union.x87 {
                // A conversion between MMX and XMM registers may have begun to use the former.
                self.put(Instruction::with1(
                    Code::Fxsave64_m512byte,
                    self.field(X87),
                )?)?;
            }
        }
        self.leave()?;
        self.put(Instruction::with(Code::Retnq))
    }

    /// The widest move between a vector register and memory, and the register's full name.
    fn vector(&self, number: usize, load: bool) -> (Code, Register) {
        let number = number as u32;
        match (self.host.width, load) {
            (VectorWidth::Xmm, true) => (Code::Movaps_xmm_xmmm128, Register::XMM0 + number),
            (VectorWidth::Xmm, false) => (Code::Movaps_xmmm128_xmm, Register::XMM0 + number),
            (VectorWidth::Ymm, true) => (Code::VEX_Vmovaps_ymm_ymmm256, Register::YMM0 + number),
            (VectorWidth::Ymm, false) => (Code::VEX_Vmovaps_ymmm256_ymm, Register::YMM0 + number),
            (VectorWidth::Zmm, true) => {
                (Code::EVEX_Vmovaps_zmm_k1z_zmmm512, Register::ZMM0 + number)
            }
            (VectorWidth::Zmm, false) => {
                (Code::EVEX_Vmovaps_zmmm512_k1z_zmm, Register::ZMM0 + number)
            }
        }
    }
}

/// The numbers of the bits set, ascending.
fn each(set: u32) -> impl DoubleEndedIterator<Item = usize> {
    (0..32).filter(move |bit| set & (1 << bit) != 0)
}
