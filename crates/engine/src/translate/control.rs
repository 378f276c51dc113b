//! Stack operations and control flow.

use iced_x86::{Code, Mnemonic, OpKind as Operand};
use trapline_x86::CpuState;

use crate::decode::Op;
use crate::decode::op::{OpKind, RegOperand};
use crate::frame::field;

use super::Context;
use super::assembler::{Mem, reg};
use super::emit::{Emitter, StackEffect};
use super::memory::{Address, Look};
use super::registers::{ADDRESS, COUNT, GUEST_RBP, GUEST_RSP, INDEX, STACK, home, host};
use super::values::{Access, Effect, access};
use crate::tlb::Privilege;

/// Hints that access nothing as far as the guest can tell.
fn is_prefetch(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Prefetch | M::Prefetchw | M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2
    )
}

impl Emitter<'_> {
    /// Whether [`Self::own`] knows the form.
    pub(super) fn own_is_possible(&self, op: &Op) -> bool {
        let i = &op.instruction;
        let register64 = |n: u32| i.op_kind(n) == Operand::Register && i.op_register(n).is_gpr64();
        let memory64 = |n: u32| {
            i.op_kind(n) == Operand::Memory && i.memory_size().size() == 8 && op.flat.is_some()
        };
        match op.kind {
            OpKind::Jump | OpKind::JumpIf(_) => {
                i.op0_kind() == Operand::NearBranch64 && CpuState::is_canonical(op.target)
            }
            OpKind::Call => i.code() == Code::Call_rel32_64 && CpuState::is_canonical(op.target),
            OpKind::JumpIndirect => i.code() == Code::Jmp_rm64 && (register64(0) || memory64(0)),
            OpKind::CallIndirect => i.code() == Code::Call_rm64 && (register64(0) || memory64(0)),
            OpKind::Return(_) => matches!(i.code(), Code::Retnq | Code::Retnq_imm16),
            OpKind::Push => match i.code() {
                Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 => true,
                Code::Push_rm64 => register64(0) || memory64(0),
                _ => false,
            },
            OpKind::Pop => matches!(i.code(), Code::Pop_r64 | Code::Pop_rm64) && register64(0),
            OpKind::Frame => i.code() == Code::Leaveq,
            OpKind::System => match i.mnemonic() {
                Mnemonic::Cli | Mnemonic::Swapgs => self.context.ring0,
                // Interrupts are held off for one more instruction, which must be in this block.
                Mnemonic::Sti => self.context.ring0 && self.is_followed(),
                Mnemonic::Stac | Mnemonic::Clac => self.context.ring0 && self.context.smap,
                Mnemonic::Vzeroupper => self.context.avx,
                Mnemonic::Pushfq => i.code() == Code::Pushfq && self.bmi2,
                Mnemonic::Pause => true,
                m => is_prefetch(m),
            },
            _ => false,
        }
    }

    /// What an operation that [`Self::own_is_possible`] allows means for shared look-ups.
    pub(super) fn own_effect(&self, op: &Op) -> Effect {
        let i = &op.instruction;
        let push = Effect {
            accesses: [None, Some(access(GUEST_RSP, -8, 8, true))],
            moved: Effect::adjusted(GUEST_RSP, -8),
            ..Effect::default()
        };
        let operand = op
            .flat
            .filter(|_| i.op0_kind() == Operand::Memory)
            .map(|address| Access {
                address,
                size: 8,
                write: false,
            });
        match op.kind {
            OpKind::Call => push,
            OpKind::JumpIndirect => Effect {
                accesses: [operand, None],
                ..Effect::default()
            },
            OpKind::Push | OpKind::CallIndirect => Effect {
                accesses: [operand, push.accesses[1]],
                ..push
            },
            OpKind::Return(extra) => Effect {
                accesses: [None, Some(access(GUEST_RSP, 0, 8, false))],
                moved: Effect::adjusted(GUEST_RSP, 8 + i32::from(extra)),
                ..Effect::default()
            },
            OpKind::Pop => {
                let register = RegOperand::new(i.op0_register());
                let guest = register.map_or(GUEST_RSP, |r| usize::from(r.index));
                Effect {
                    accesses: [None, Some(access(GUEST_RSP, 0, 8, false))],
                    written: 1 << guest,
                    moved: Effect::adjusted(GUEST_RSP, 8),
                    ..Effect::default()
                }
            }
            OpKind::Frame => Effect {
                accesses: [Some(access(GUEST_RBP, 0, 8, false)), None],
                written: 1 << GUEST_RBP | 1 << GUEST_RSP,
                ..Effect::default()
            },
            OpKind::System if i.mnemonic() == Mnemonic::Pushfq => push,
            OpKind::System if matches!(i.mnemonic(), Mnemonic::Pause | Mnemonic::Swapgs) => {
                Effect {
                    barrier: true,
                    ..Effect::default()
                }
            }
            _ => Effect::default(),
        }
    }

    /// Emits an operation that [`Self::own_is_possible`] allows.
    pub(super) fn own(&mut self, op: &Op) {
        match op.kind {
            OpKind::JumpIf(condition) => {
                self.branch_if((condition as u8).wrapping_sub(1) & 15, op.target);
                self.go_to(op.instruction.next_ip());
            }
            OpKind::Jump => self.go_to(op.target),
            OpKind::Call => {
                self.push_constant(op.instruction.next_ip());
                self.go_to(op.target);
            }
            OpKind::JumpIndirect | OpKind::CallIndirect => {
                self.load_operand(op);
                self.dispatch(op);
            }
            OpKind::Return(_) => {
                self.load_return_address();
                self.dispatch(op);
            }
            OpKind::Push => self.push(op),
            OpKind::Pop => self.pop(op),
            OpKind::System => match op.instruction.mnemonic() {
                Mnemonic::Sti => self.allow_interrupts(op),
                Mnemonic::Stac => self.allow_access(op, true),
                Mnemonic::Clac => self.allow_access(op, false),
                Mnemonic::Cli => self.asm.store_immediate32(Mem::field(field::INTERRUPTS), 0),
                Mnemonic::Swapgs => {
                    let (user, kernel) = (
                        Mem::field(field::GS_BASE),
                        Mem::field(field::KERNEL_GS_BASE),
                    );
                    self.asm.load(INDEX, user);
                    self.asm.load(COUNT, kernel);
                    self.asm.store(user, COUNT);
                    self.asm.store(kernel, INDEX);
                }
                Mnemonic::Pushfq => self.push_flags(),
                Mnemonic::Pause => self.pause(op),
                Mnemonic::Vzeroupper => {
                    self.ensure_vectors();
                    self.asm.raw(&[0xc5, 0xf8, 0x77]);
                }
                _ => {}
            },
            OpKind::Frame if op.instruction.mnemonic() == Mnemonic::Leave => self.leave_frame(),
            _ => {}
        }
    }

    /// STI: a helper executes it if that may let an interrupt in.
    fn allow_interrupts(&mut self, op: &Op) {
        let (kept, assist) = (self.keep(op), self.stubs.assist);
        let a = &mut self.asm;
        a.load(COUNT, Mem::field(field::INTERRUPT_DUE));
        a.unless_rcx_zero(|a| {
            a.mov_immediate(COUNT, kept);
            a.call_address(assist);
        });
        a.store_immediate32(Mem::field(field::INTERRUPTS), 1);
    }

    /// STAC and CLAC: the code behind them is that of another context.
    fn allow_access(&mut self, op: &Op, allowed: bool) {
        let context = Context {
            privilege: if allowed {
                Privilege::SupervisorOpen
            } else {
                Privilege::Supervisor
            },
            ..self.context
        };
        self.asm
            .store_immediate32(Mem::field(field::ACCESS), i32::from(allowed));
        self.jump_through_cell(context, op.instruction.next_ip());
    }

    /// Counts, and lets a helper hear of it now and then.
    fn pause(&mut self, op: &Op) {
        let counter = Mem::field(field::PAUSES);
        let count = self.asm.label();
        self.asm.load(COUNT, counter);
        self.asm.unless_rcx_zero(|a| {
            a.jump(count);
        });
        self.assist(op);
        // The helper leaves, or goes on elsewhere, behind the instruction.
        self.asm.bind(count);
        self.asm.lea(COUNT, Mem::base(COUNT, -1));
        self.asm.store(counter, COUNT);
        self.asm.raw(&[0xf3, 0x90]);
    }

    /// A stack slot at a displacement from RSP.
    pub(super) fn stack(&self, displacement: i32, write: bool) -> Look {
        Look {
            address: Address::Relative(GUEST_RSP, displacement),
            size: 8,
            write,
            keep_flags: self.flags_live(),
        }
    }

    /// Loads what RSP points to into ADDRESS.
    pub(super) fn load_return_address(&mut self) {
        let at = self.locate(1, self.stack(0, false));
        self.asm.load(ADDRESS, Mem::base(ADDRESS, at));
        self.address_holds = None;
    }

    /// Calls the target in ADDRESS.
    pub(super) fn call_found(&mut self, op: &Op) {
        let next = op.instruction.next_ip();
        let found = self.find_target(StackEffect::Push(next));
        self.asm.load(COUNT, found);
        self.asm.store(Mem::field(field::TARGET), COUNT);
        self.push_constant(next);
        self.asm.jump_mem(Mem::field(field::TARGET));
    }

    /// Loads the 64-bit operand into ADDRESS.
    pub(super) fn load_operand(&mut self, op: &Op) {
        if let Some(register) = RegOperand::new(op.instruction.op0_register()) {
            self.address_holds = None;
            self.load_guest(ADDRESS, usize::from(register.index));
        } else if let Some(flat) = op.flat {
            let look = Look {
                address: Address::Flat(flat),
                size: 8,
                write: false,
                keep_flags: self.flags_live(),
            };
            let at = self.locate(0, look);
            self.asm.load(ADDRESS, Mem::base(ADDRESS, at));
            self.address_holds = None;
        }
    }

    pub(super) fn load_guest(&mut self, to: u8, guest: usize) {
        match host(guest) {
            Some(host) => self.asm.mov(to, host),
            None => self.asm.load(to, home(guest)),
        }
    }

    pub(super) fn push_constant(&mut self, value: u64) {
        let at = self.locate(1, self.stack(-8, true));
        let slot = Mem::base(ADDRESS, at);
        match i32::try_from(value as i64) {
            Ok(value) => self.asm.store_immediate(slot, value),
            Err(_) => {
                self.asm.mov_immediate(COUNT, value);
                self.asm.store(slot, COUNT);
            }
        }
        self.asm.lea(STACK, Mem::base(STACK, -8));
    }

    fn push(&mut self, op: &Op) {
        let i = &op.instruction;
        match i.op0_kind() {
            Operand::Register => {
                let Some(register) = RegOperand::new(i.op0_register()) else {
                    return;
                };
                let guest = usize::from(register.index);
                let at = self.locate(1, self.stack(-8, true));
                let from = match host(guest) {
                    Some(host) => host,
                    None => {
                        self.asm.load(COUNT, home(guest));
                        COUNT
                    }
                };
                self.asm.store(Mem::base(ADDRESS, at), from);
                self.asm.lea(STACK, Mem::base(STACK, -8));
            }
            Operand::Memory => {
                self.load_operand(op);
                self.asm.store(Mem::field(field::SPILL), ADDRESS);
                let at = self.locate(1, self.stack(-8, true));
                self.asm.load(COUNT, Mem::field(field::SPILL));
                self.asm.store(Mem::base(ADDRESS, at), COUNT);
                self.asm.lea(STACK, Mem::base(STACK, -8));
            }
            _ => self.push_constant(i.immediate(0)),
        }
    }

    /// PUSHFQ: neither VM nor RF is ever set here.
    fn push_flags(&mut self) {
        let at = self.locate(1, self.stack(-8, true));
        let a = &mut self.asm;
        let sum = Mem::sum(INDEX, COUNT);
        a.mov(COUNT, reg::RAX);
        a.flags_to_ax();
        a.store_ax(Mem::field(field::KEPT_FLAGS));
        a.mov(reg::RAX, COUNT);
        a.load_byte(INDEX, Mem::field(field::KEPT_FLAGS + 1));
        let bits = [
            (field::KEPT_FLAGS, 11),
            (field::INTERRUPTS, 9),
            (field::ACCESS, 18),
        ];
        for (field, bit) in bits {
            a.load_byte(COUNT, Mem::field(field));
            a.shift_left_flagless(COUNT, bit);
            a.lea(INDEX, sum);
        }
        a.load(COUNT, Mem::field(field::OTHER_FLAGS));
        a.lea(INDEX, sum);
        a.store(Mem::base(ADDRESS, at), INDEX);
        a.lea(STACK, Mem::base(STACK, -8));
    }

    fn pop(&mut self, op: &Op) {
        let Some(register) = RegOperand::new(op.instruction.op0_register()) else {
            return;
        };
        let guest = usize::from(register.index);
        let at = self.locate(1, self.stack(0, false));
        let slot = Mem::base(ADDRESS, at);
        match host(guest) {
            Some(host) => self.asm.load(host, slot),
            None => {
                self.asm.load(INDEX, slot);
                self.asm.store(home(guest), INDEX);
            }
        }
        if guest != GUEST_RSP {
            self.asm.lea(STACK, Mem::base(STACK, 8));
        }
    }

    fn leave_frame(&mut self) {
        let keep_flags = self.flags_live();
        let look = Look {
            address: Address::Relative(GUEST_RBP, 0),
            size: 8,
            write: false,
            keep_flags,
        };
        let at = self.locate(0, look);
        self.asm.load(INDEX, Mem::base(ADDRESS, at));
        self.asm.lea(STACK, Mem::base(reg::RBP, 8));
        self.asm.mov(reg::RBP, INDEX);
    }
}
