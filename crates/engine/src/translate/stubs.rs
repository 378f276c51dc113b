//! The code that every translation shares: the ways in and out, and to the helpers.
//!
//! All of them agree on this: RSP is the frame's stack pointer, the pinned guest registers are in
//! their host registers, the status flags are the guest's, and the scratch registers are free.

use std::mem::offset_of;

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};
use trapline_x86::vector::VectorState;

use super::assembler::{Assembler, JUMP_BYTES, Label, Mem, cond, reg};
use super::registers::{ADDRESS, COUNT, INDEX, home, pinned};
use crate::frame::{field, gap_addresses, gap_hosts, gap_kinds};
use crate::native::host::{Host, VectorWidth};

/// Codes in [`field::EXIT`] that are no site.
pub mod exit {
    /// A helper has set RIP.
    pub const MOVED: u64 = 1 << 32;
    /// The instruction whose code contains the address in [`super::field::RETURN`] must be stepped.
    pub const STEP: u64 = 2 << 32;
    /// As `STEP`: the host raised an exception there.
    pub const FAULT: u64 = 3 << 32;
}

/// Addresses of the shared code.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    /// Function (RDI: the frame's stack pointer, RSI: where to begin).
    pub enter: u64,
    /// Leave by the site in RCX.
    pub leave: u64,
    /// Called by look-ups that missed; ADDRESS: the linear address, RCX: the kind of access. Behind
    /// the call stand a jump to where the look-up is repeated, and what is done if ADDRESS is the
    /// operand's host address already.
    pub miss: u64,
    /// Called to execute the operation that RCX points to.
    pub assist: u64,
    /// Called to load the guest's vector registers.
    pub load_vectors: u64,
    /// Where host faults go on, RCX: the faulting address.
    pub fault: u64,
}

/// Callee-saved registers of the System V convention.
const SAVED: [u8; 6] = [reg::RBX, reg::RBP, reg::R12, reg::R13, reg::R14, reg::R15];

/// Writes the shared code.
pub fn emit(a: &mut Assembler, host: Host) -> Option<Stubs> {
    let mut stubs = Stubs::default();
    let back = a.label();
    let align = |a: &mut Assembler| {
        while !a.here().is_multiple_of(16) {
            a.byte(0xcc);
        }
        a.address()
    };

    stubs.load_vectors = align(a);
    move_vectors(a, host, true)?;
    a.store_immediate32(Mem::field(field::VECTORS_AWAY + 8), 0);
    a.ret();

    let save_vectors = align(a);
    move_vectors(a, host, false)?;
    a.store_immediate32(Mem::field(field::VECTORS_AWAY + 8), 1);
    a.ret();

    stubs.enter = align(a);
    for register in SAVED {
        a.push(register);
    }
    // Aligns the stack for helpers.
    a.push(reg::RAX);
    a.store(
        Mem::base(reg::RDI, field::HOST_STACK + crate::frame::SKEW),
        reg::RSP,
    );
    a.mov(reg::RSP, reg::RDI);
    a.mov(ADDRESS, reg::RSI);
    load_registers(a);
    a.jump_register(ADDRESS);

    stubs.fault = align(a);
    a.store(Mem::field(field::RETURN), COUNT);
    a.mov_immediate(COUNT, exit::FAULT);
    // Falls through.
    stubs.leave = a.address();
    a.store(Mem::field(field::EXIT), COUNT);
    store_registers(a);
    save_if_here(a, save_vectors);
    a.bind(back);
    a.load(reg::RSP, Mem::field(field::HOST_STACK));
    a.pop(reg::RAX);
    for register in SAVED.iter().rev() {
        a.pop(*register);
    }
    a.ret();

    stubs.miss = align(a);
    a.pop(INDEX);
    a.store(Mem::field(field::RETURN), INDEX);
    a.store(Mem::field(field::MISSED), ADDRESS);
    find_gap(a);
    store_registers(a);
    a.load32(INDEX, Mem::field(field::VECTORS_AWAY));
    save_if_here(a, save_vectors);
    a.load(reg::RDI, Mem::field(field::CONTEXT));
    a.mov(reg::RSI, ADDRESS);
    a.mov(reg::RDX, COUNT);
    call_helper(a, field::MISS, back);
    // Callee-saved: whether the vectors were away before.
    let away = a.label();
    a.raw(&[0x45, 0x85, 0xff]); // test r15d, r15d
    a.jump_if(cond::NE, away);
    a.call_address(stubs.load_vectors);
    a.bind(away);
    load_registers(a);
    a.load(ADDRESS, Mem::field(field::MISSED));
    a.jump_mem(Mem::field(field::RETURN));

    stubs.assist = align(a);
    a.pop(INDEX);
    a.store(Mem::field(field::RETURN), INDEX);
    store_registers(a);
    save_if_here(a, save_vectors);
    a.load(reg::RDI, Mem::field(field::CONTEXT));
    a.mov(reg::RSI, COUNT);
    call_helper(a, field::ASSIST, back);
    load_registers(a);
    a.jump_mem(Mem::field(field::RETURN));

    a.finish().then_some(stubs)
}

/// Looks for a gap at the address in ADDRESS for an access of the kind in RCX. If there is one, its
/// host address goes to ADDRESS, and the code behind the jump at [`field::RETURN`] goes on. No flag
/// changes.
fn find_gap(a: &mut Assembler) {
    let none = a.label();
    let sum = Mem::sum(COUNT, ADDRESS);
    a.store(Mem::field(field::MISSED_KIND), COUNT);
    a.load_byte(INDEX, Mem::field(field::MISSED));
    a.load(ADDRESS, Mem::slot(gap_kinds(), INDEX));
    a.lea(COUNT, sum);
    a.load(ADDRESS, Mem::field(field::MISSED));
    a.unless_rcx_zero(|a| {
        a.jump(none);
    });
    a.load(COUNT, Mem::slot(gap_addresses(), INDEX));
    a.lea(COUNT, sum);
    a.unless_rcx_zero(|a| {
        a.jump(none);
    });
    a.load(ADDRESS, Mem::slot(gap_hosts(), INDEX));
    a.load(COUNT, Mem::field(field::RETURN));
    a.lea(COUNT, Mem::base(COUNT, JUMP_BYTES));
    a.jump_register(COUNT);
    a.bind(none);
    a.load(COUNT, Mem::field(field::MISSED_KIND));
}

/// Calls a helper on the host's stack; goes `back` to the caller of generated code unless it
/// returns 0.
fn call_helper(a: &mut Assembler, helper: i32, back: Label) {
    a.mov(reg::RBX, reg::RSP);
    a.load(reg::RSP, Mem::field(field::HOST_STACK));
    a.call_mem(Mem::base(reg::RBX, helper + crate::frame::SKEW));
    a.mov(reg::RSP, reg::RBX);
    a.raw(&[0x85, 0xc0]); // test eax, eax
    a.jump_if(cond::NE, back);
}

fn load_registers(a: &mut Assembler) {
    a.load_ax(Mem::field(field::FLAGS));
    a.ax_to_flags();
    for (guest, host) in pinned() {
        a.load(host, home(guest));
    }
}

fn store_registers(a: &mut Assembler) {
    for (guest, host) in pinned() {
        a.store(home(guest), host);
    }
    a.flags_to_ax();
    a.store_ax(Mem::field(field::FLAGS));
}

/// Saves the vector registers if they are the guest's. Flags and RAX are free, RCX is kept.
fn save_if_here(a: &mut Assembler, save_vectors: u64) {
    let away = a.label();
    a.compare_mem32(Mem::field(field::VECTORS_AWAY), 0);
    a.jump_if(cond::NE, away);
    a.mov(reg::RAX, COUNT);
    a.call_address(save_vectors);
    a.mov(COUNT, reg::RAX);
    a.bind(away);
}

/// Loads or stores all vector, mask and MXCSR state. Called, so that RSP is lower by 8. Clobbers
/// RCX only.
fn move_vectors(a: &mut Assembler, host: Host, load: bool) -> Option<()> {
    let called = |offset: i32| Mem::field(offset + 8);
    a.load(COUNT, called(field::VECTOR));
    let place = |offset: usize| MemoryOperand::with_base_displ(Register::RCX, offset as i64);
    let put = |a: &mut Assembler, code: Code, register: Register, memory: MemoryOperand| {
        let instruction = if load {
            Instruction::with2(code, register, memory)
        } else {
            Instruction::with2(code, memory, register)
        };
        let mut encoder = Encoder::new(64);
        encoder.encode(&instruction.ok()?, a.address()).ok()?;
        a.raw(&encoder.take_buffer());
        Some(())
    };
    for number in 0..32u32 {
        if host.vectors() & (1 << number) == 0 {
            continue;
        }
        let (code, first) = match (host.width, load) {
            (VectorWidth::Xmm, true) => (Code::Movaps_xmm_xmmm128, Register::XMM0),
            (VectorWidth::Xmm, false) => (Code::Movaps_xmmm128_xmm, Register::XMM0),
            (VectorWidth::Ymm, true) => (Code::VEX_Vmovaps_ymm_ymmm256, Register::YMM0),
            (VectorWidth::Ymm, false) => (Code::VEX_Vmovaps_ymmm256_ymm, Register::YMM0),
            (VectorWidth::Zmm, true) => (Code::EVEX_Vmovaps_zmm_k1z_zmmm512, Register::ZMM0),
            (VectorWidth::Zmm, false) => (Code::EVEX_Vmovaps_zmmm512_k1z_zmm, Register::ZMM0),
        };
        let offset = offset_of!(VectorState, zmm) + number as usize * 64;
        put(a, code, first + number, place(offset))?;
    }
    for number in 0..8u32 {
        if host.masks() & (1 << number) == 0 {
            continue;
        }
        let code = match (host.wide_masks, load) {
            (true, true) => Code::VEX_Kmovq_kr_km64,
            (true, false) => Code::VEX_Kmovq_m64_kr,
            (false, true) => Code::VEX_Kmovw_kr_km16,
            (false, false) => Code::VEX_Kmovw_m16_kr,
        };
        let offset = offset_of!(VectorState, k) + number as usize * 8;
        put(a, code, Register::K0 + number, place(offset))?;
    }
    let mxcsr = offset_of!(VectorState, mxcsr);
    let single = |a: &mut Assembler, code: Code, memory: MemoryOperand| {
        let mut encoder = Encoder::new(64);
        let instruction = Instruction::with1(code, memory).ok()?;
        encoder.encode(&instruction, a.address()).ok()?;
        a.raw(&encoder.take_buffer());
        Some(())
    };
    if load {
        single(a, Code::Ldmxcsr_m32, place(mxcsr))?;
    } else {
        single(a, Code::Stmxcsr_m32, place(mxcsr))?;
        let own = i64::from(field::HOST_MXCSR + 8 + crate::frame::SKEW);
        let own = MemoryOperand::with_base_displ(Register::RSP, own);
        single(a, Code::Ldmxcsr_m32, own)?;
        if host.width > VectorWidth::Xmm {
            // Else SSE code of the host pays for the upper halves.
            a.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper
        }
    }
    Some(())
}
