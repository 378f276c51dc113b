//! Immediates that are read from guest memory when their instruction executes.
//!
//! Code whose immediate is rewritten again and again is translated so that the immediate's bytes are
//! not part of what the translation is derived from: each execution loads them from where they
//! stand. No trace is needed on them, and a store to them costs no event. The rest of the
//! instruction is derived, and traced, as ever.
//!
//! Every immediate and every displacement of a near branch stands at its instruction's end, so a
//! block of one such instruction is derived from its first bytes only. The load is an ordinary one
//! at the instruction's place in the program's order; docs/coherence.md, "Immediates read at run
//! time", says why that is enough.

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpKind as Operand, Register};

use super::assembler::Mem;
use super::emit::{Emitter, StackEffect};
use super::plain::Plan;
use super::registers::{ADDRESS, COUNT, INDEX, STACK};
use super::treatment::Treatment;
use crate::decode::Op;
use crate::decode::op::{OpKind, RegOperand};
use crate::frame::field;
use crate::native::form::Form;

/// The last bytes of an instruction: its immediate or its branch displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Bytes before it.
    pub offset: u8,
    /// Its bytes: 1, 2, 4 or 8. It stands for the value extended with its sign.
    pub len: u8,
}

/// The immediate of an instruction that can be read at run time.
#[derive(Clone, Copy, Debug)]
pub struct RunTime {
    pub len: u8,
    /// Where the host sees its bytes, for as long as the translation lives.
    pub host: u64,
}

/// The immediate of an operation that [`super::Translator::translate`] can read at run time.
pub fn tail(op: &Op) -> Option<Tail> {
    let i = &op.instruction;
    let len = match op.kind {
        OpKind::Jump if i.code() == Code::Jmp_rel32_64 => 4,
        OpKind::Call if i.code() == Code::Call_rel32_64 => 4,
        OpKind::JumpIf(_) if i.is_jcc_near() && i.op0_kind() == Operand::NearBranch64 => {
            // A 16-bit displacement would have truncated RIP.
            4
        }
        OpKind::Push => match i.code() {
            Code::Pushq_imm8 => 1,
            Code::Pushq_imm32 => 4,
            _ => return None,
        },
        OpKind::MoveImmediate(..)
        | OpKind::StoreImmediate(..)
        | OpKind::Native
        | OpKind::NativeMemory(_) => {
            let high = RegOperand::new(i.op0_register()).is_some_and(|r| r.high);
            let addressed = i.op0_kind() != Operand::Memory || op.flat.is_some();
            if high || !addressed {
                return None;
            }
            with_register(i, Register::R14)?;
            immediate_bytes(i.op1_kind())?
        }
        _ => return None,
    };
    Some(Tail {
        offset: op.len.checked_sub(len).filter(|&offset| offset > 0)?,
        len,
    })
}

fn immediate_bytes(kind: Operand) -> Option<u8> {
    Some(match kind {
        Operand::Immediate8
        | Operand::Immediate8to16
        | Operand::Immediate8to32
        | Operand::Immediate8to64 => 1,
        Operand::Immediate16 => 2,
        Operand::Immediate32 | Operand::Immediate32to64 => 4,
        Operand::Immediate64 => 8,
        _ => return None,
    })
}

/// The same instruction with (a part of) `register` as its second operand, for those whose second
/// and last operand is an immediate.
fn with_register(i: &Instruction, register: Register) -> Option<Instruction> {
    if i.op_count() != 2 {
        return None;
    }
    immediate_bytes(i.op1_kind())?;
    let size = match i.op0_kind() {
        Operand::Register => i.op0_register().size(),
        Operand::Memory => i.memory_size().size(),
        _ => return None,
    };
    let column = match size {
        1 => 0,
        2 => 1,
        4 => 2,
        8 => 3,
        _ => return None,
    };
    use Code as C;
    let codes = match i.mnemonic() {
        Mnemonic::Mov => [
            C::Mov_rm8_r8,
            C::Mov_rm16_r16,
            C::Mov_rm32_r32,
            C::Mov_rm64_r64,
        ],
        Mnemonic::Add => [
            C::Add_rm8_r8,
            C::Add_rm16_r16,
            C::Add_rm32_r32,
            C::Add_rm64_r64,
        ],
        Mnemonic::Or => [C::Or_rm8_r8, C::Or_rm16_r16, C::Or_rm32_r32, C::Or_rm64_r64],
        Mnemonic::Adc => [
            C::Adc_rm8_r8,
            C::Adc_rm16_r16,
            C::Adc_rm32_r32,
            C::Adc_rm64_r64,
        ],
        Mnemonic::Sbb => [
            C::Sbb_rm8_r8,
            C::Sbb_rm16_r16,
            C::Sbb_rm32_r32,
            C::Sbb_rm64_r64,
        ],
        Mnemonic::And => [
            C::And_rm8_r8,
            C::And_rm16_r16,
            C::And_rm32_r32,
            C::And_rm64_r64,
        ],
        Mnemonic::Sub => [
            C::Sub_rm8_r8,
            C::Sub_rm16_r16,
            C::Sub_rm32_r32,
            C::Sub_rm64_r64,
        ],
        Mnemonic::Xor => [
            C::Xor_rm8_r8,
            C::Xor_rm16_r16,
            C::Xor_rm32_r32,
            C::Xor_rm64_r64,
        ],
        Mnemonic::Cmp => [
            C::Cmp_rm8_r8,
            C::Cmp_rm16_r16,
            C::Cmp_rm32_r32,
            C::Cmp_rm64_r64,
        ],
        Mnemonic::Test => [
            C::Test_rm8_r8,
            C::Test_rm16_r16,
            C::Test_rm32_r32,
            C::Test_rm64_r64,
        ],
        _ => return None,
    };
    let part = match size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    let mut with = *i;
    with.set_code(codes[column]);
    with.set_op1_kind(Operand::Register);
    with.set_op1_register(super::registers::part(part, register.number() as u8));
    Some(with)
}

impl Emitter<'_> {
    /// What becomes of the block's only operation if its immediate is read at run time.
    pub(super) fn run_time_treatment(
        &mut self,
        op: &Op,
        factory: &mut InstructionInfoFactory,
    ) -> Option<Treatment> {
        if matches!(
            op.kind,
            OpKind::Push | OpKind::Jump | OpKind::Call | OpKind::JumpIf(_)
        ) {
            return Some(Treatment::RunTimeOwn);
        }
        // A guest register that the plan would take from the frame: the immediate takes its place.
        let i = &op.instruction;
        let named = [
            i.op0_register().full_register(),
            i.memory_base().full_register(),
            i.memory_index().full_register(),
        ];
        let spare = [Register::R14, Register::R15]
            .into_iter()
            .find(|register| !named.contains(register))?;
        let with = with_register(i, spare)?;
        let form = Form::of(&with, factory)?;
        let look = self.operand_look(op, &form)?;
        let mut plan = Plan::of(&form, &with, None, 0, self.encoder)?;
        plan.read_instead(spare.number(), Mem::field(field::IMMEDIATE))
            .then(|| Treatment::RunTime(Box::new(plan), look))
    }

    /// Loads the immediate, extended with its sign, into `to`. Clobbers RCX; no flag changes.
    fn load_immediate(&mut self, to: u8) {
        let Some(immediate) = self.run_time else {
            return;
        };
        self.asm.mov_immediate(COUNT, immediate.host);
        self.asm.load_signed(to, Mem::base(COUNT, 0), immediate.len);
    }

    /// Puts the immediate where the plan finds it.
    pub(super) fn fetch_immediate(&mut self) {
        self.load_immediate(COUNT);
        self.asm.store(Mem::field(field::IMMEDIATE), COUNT);
    }

    /// Emits a PUSH or a branch.
    pub(super) fn own_at_run_time(&mut self, op: &Op) {
        let next = op.instruction.next_ip();
        match op.kind {
            OpKind::Push => {
                let at = self.locate(1, self.stack(-8, true));
                self.load_immediate(COUNT);
                self.asm.store(Mem::base(ADDRESS, at), COUNT);
                self.asm.lea(STACK, Mem::base(STACK, -8));
            }
            OpKind::Jump => self.jump_at_run_time(next),
            OpKind::JumpIf(condition) => {
                let taken = self.asm.label();
                self.asm
                    .jump_if((condition as u8).wrapping_sub(1) & 15, taken);
                self.go_to(next);
                self.asm.bind(taken);
                self.jump_at_run_time(next);
            }
            OpKind::Call => {
                self.load_target(next);
                let found = self.find_target(StackEffect::Push(next));
                self.asm.load(COUNT, found);
                self.asm.store(Mem::field(field::TARGET), COUNT);
                self.push_constant(next);
                self.asm.jump_mem(Mem::field(field::TARGET));
            }
            _ => {}
        }
    }

    fn jump_at_run_time(&mut self, next: u64) {
        self.load_target(next);
        let found = self.find_target(StackEffect::None);
        self.asm.jump_mem(found);
    }

    /// The branch's target, in ADDRESS.
    fn load_target(&mut self, next: u64) {
        self.load_immediate(INDEX);
        self.asm.mov_immediate(ADDRESS, next);
        self.asm.lea(ADDRESS, Mem::sum(ADDRESS, INDEX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{DecodeEnd, Features, decode};
    use trapline_x86::Mode;

    fn tail_of(bytes: &[u8]) -> Option<(u8, u8)> {
        let features = Features::new(|leaf, _| [if leaf == 0 { 7 } else { u32::MAX }; 4]);
        match decode(bytes, 0x1000, Mode::Long64, &features, None, 1) {
            Ok(DecodeEnd::Block(block)) => tail(&block.ops[0]).map(|t| (t.offset, t.len)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn immediates_stand_at_the_end() {
        for (bytes, expected) in [
            (&[0xb8, 1, 2, 3, 4][..], Some((1, 4))),
            (&[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8], Some((2, 8))),
            (&[0x48, 0xc7, 0xc0, 1, 2, 3, 4], Some((3, 4))),
            (&[0xb0, 7], Some((1, 1))),
            // mov ah, 7
            (&[0xb4, 7], None),
            (&[0x66, 0xbb, 1, 2], Some((2, 2))),
            // add dword [rbx + 0x11], 5; cmp eax, imm32; test byte [rip + 4], 3
            (&[0x83, 0x43, 0x11, 5], Some((3, 1))),
            (&[0x3d, 1, 2, 3, 4], Some((1, 4))),
            (&[0xf6, 0x05, 4, 0, 0, 0, 3], Some((6, 1))),
            (&[0xe8, 1, 2, 3, 4], Some((1, 4))),
            (&[0xe9, 1, 2, 3, 4], Some((1, 4))),
            (&[0x0f, 0x84, 1, 2, 3, 4], Some((2, 4))),
            (&[0x68, 1, 2, 3, 4], Some((1, 4))),
            (&[0x6a, 1], Some((1, 1))),
            // A short branch, a shift, a return, LEA, NOP, IMUL: not these.
            (&[0xeb, 1], None),
            (&[0xc1, 0xe0, 3], None),
            (&[0xc2, 3, 0], None),
            (&[0x48, 0x8d, 0x05, 1, 2, 3, 4], None),
            (&[0x0f, 0x1f, 0x44, 0, 0], None),
            (&[0x6b, 0xc0, 5], None),
        ] {
            assert_eq!(tail_of(bytes), expected, "{bytes:x?}");
        }
    }
}
