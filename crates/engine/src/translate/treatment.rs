//! What becomes of each operation of a block, decided before anything is emitted.

use iced_x86::{InstructionInfoFactory, Mnemonic, OpKind as Operand};

use crate::decode::Op;
use crate::decode::op::{FlatAddress, OpKind, StateCheck};
use crate::native::ThunkError;
use crate::native::form::{Form, STATUS};

use super::emit::Emitter;
use super::memory::{Address, Look};
use super::plain::Plan;
use super::shared::Shares;
use super::values::{Access, Effect, Move};

/// What an operation becomes, decided before anything is emitted.
pub(super) enum Treatment {
    Plain(Box<Plan>, Option<Look>),
    /// As `Plain`, and as `Own`, with an immediate that is read at run time.
    RunTime(Box<Plan>, Option<Look>),
    RunTimeOwn,
    Assist,
    /// Moves, stack and control flow, by kind.
    Own,
}

/// The register that the operation sets to the value of one plus a constant, if it does nothing
/// else to registers.
fn moved(op: &Op) -> Option<Move> {
    let i = &op.instruction;
    let to = i.op0_register();
    if i.op0_kind() != Operand::Register || !to.is_gpr64() {
        return None;
    }
    let constant = |n: u32| i.try_immediate(n).ok().map(|value| value as i64);
    let (from, by) = match i.mnemonic() {
        Mnemonic::Inc => (to, Some(1)),
        Mnemonic::Dec => (to, Some(-1)),
        Mnemonic::Add => (to, constant(1)),
        Mnemonic::Sub => (to, constant(1).and_then(i64::checked_neg)),
        Mnemonic::Mov if i.op1_kind() == Operand::Register && i.op1_register().is_gpr64() => {
            (i.op1_register(), Some(0))
        }
        Mnemonic::Lea
            if i.memory_base().is_gpr64()
                && i.memory_index() == iced_x86::Register::None
                && op.flat.is_some() =>
        {
            (i.memory_base(), Some(i.memory_displacement64() as i64))
        }
        _ => return None,
    };
    Some(Move {
        to: to.number(),
        from: from.number(),
        by: i32::try_from(by?).ok()?,
    })
}

impl Emitter<'_> {
    /// Decides what becomes of each operation, and which flags are live where.
    pub(super) fn treat(
        &mut self,
        factory: &mut InstructionInfoFactory,
    ) -> Result<Vec<Treatment>, ThunkError> {
        let mut treatments = Vec::with_capacity(self.block.ops.len());
        let mut on_groups = Vec::with_capacity(self.block.ops.len());
        let mut forms = Vec::with_capacity(self.block.ops.len());
        for op in &self.block.ops {
            self.operation = treatments.len();
            let form = Form::of(&op.instruction, factory);
            let len = usize::from(op.len);
            let treatment = match self.run_time {
                // Only what can be read at run time is asked for.
                Some(_) => self
                    .run_time_treatment(op, factory)
                    .ok_or(ThunkError::Unsupported)?,
                None => self.treatment(op, form.as_ref()),
            };
            self.at += len;
            on_groups.push(self.effect(op, form.as_ref(), &treatment));
            treatments.push(treatment);
            forms.push(form);
        }
        if !self.unshared && self.same_page(self.block.rip) {
            self.shares = Shares::of(on_groups, self.leads_back());
        }
        let mut live = STATUS;
        self.live = vec![0; treatments.len()];
        let page = |n: usize| self.block.ops.get(n).map(|op| op.instruction.ip() >> 12);
        for (n, op) in self.block.ops.iter().enumerate().rev() {
            let (read, determined) = match (treatments.get(n), forms.get(n)) {
                (Some(Treatment::Assist), _) => (STATUS, 0),
                _ if op.instruction.mnemonic() == Mnemonic::Pushfq => (STATUS, 0),
                (_, Some(Some(form))) => (form.flags_in, form.flags_determined),
                // Moves and stack operations touch none; branches read some or leave.
                _ if op.ends_block() => (STATUS, 0),
                _ => (0, 0),
            };
            if page(n + 1) != page(n) {
                // A path may end here.
                live = STATUS;
            }
            live = live & !determined | read;
            self.live[n] = live;
        }
        for (n, treatment) in treatments.iter_mut().enumerate() {
            let (Treatment::Plain(plan, Some(look)) | Treatment::RunTime(plan, Some(look))) =
                treatment
            else {
                continue;
            };
            look.keep_flags = self.live[n] != 0;
            // The operand is not where its window begins.
            if let Some(share) = self.shares.share(n, 0)
                && share.offset != 0
                && let (Some(op), Some(form)) = (self.block.ops.get(n), &forms[n])
            {
                let displaced = Plan::of(form, &op.instruction, None, share.offset, self.encoder);
                match displaced {
                    Some(displaced) => **plan = displaced,
                    // What could be encoded without a displacement can be with one.
                    None => self.shares = Shares::default(),
                }
            }
        }
        Ok(treatments)
    }

    /// What an operation means for shared look-ups.
    fn effect(&self, op: &Op, form: Option<&Form>, treatment: &Treatment) -> Effect {
        match treatment {
            Treatment::Assist => Effect {
                barrier: true,
                ..Effect::default()
            },
            Treatment::RunTime(..) | Treatment::RunTimeOwn => Effect::default(),
            Treatment::Own => self.own_effect(op),
            Treatment::Plain(_, look) => {
                let operand = look.and_then(|look| match look.address {
                    Address::Flat(address) => Some(Access {
                        address,
                        size: look.size,
                        write: look.write,
                    }),
                    Address::Relative(..) => None,
                });
                let moved = moved(op);
                let written = form.map_or(u16::MAX, |form| form.gpr_written);
                Effect {
                    accesses: [operand, None],
                    written: match moved {
                        Some(moved) => written & !(1 << (moved.to & 15)),
                        None => written,
                    },
                    moved,
                    barrier: false,
                }
            }
        }
    }

    fn treatment(&mut self, op: &Op, form: Option<&Form>) -> Treatment {
        let available = match op.check {
            StateCheck::None => true,
            StateCheck::Sse => self.context.sse,
            StateCheck::Avx => self.context.avx,
            StateCheck::Avx512 => self.context.avx512,
            StateCheck::X87 | StateCheck::Wait | StateCheck::Mmx => false,
        };
        if !available {
            return Treatment::Assist;
        }
        match op.kind {
            OpKind::Native
            | OpKind::NativeMemory(_)
            | OpKind::MoveRegister(..)
            | OpKind::MoveImmediate(..)
            | OpKind::Load(..)
            | OpKind::LoadSigned(..)
            | OpKind::Store(_)
            | OpKind::StoreImmediate(..)
            | OpKind::LoadAddress(_) => self.plain_treatment(op, form).unwrap_or(Treatment::Assist),
            OpKind::NoOperation => Treatment::Own,
            _ if self.own_is_possible(op) => Treatment::Own,
            _ => Treatment::Assist,
        }
    }

    fn plain_treatment(&mut self, op: &Op, form: Option<&Form>) -> Option<Treatment> {
        if let (OpKind::LoadAddress(to), Some(flat)) = (op.kind, &op.flat)
            && flat.base == crate::decode::op::NO_REGISTER
            && flat.index == crate::decode::op::NO_REGISTER
        {
            // RIP-relative: a constant.
            return (to.size == 8)
                .then(|| Plan::constant(usize::from(to.index), flat.displacement))
                .map(|plan| Treatment::Plain(Box::new(plan), None));
        }
        let form = form?;
        if form.x87 {
            return None;
        }
        let look = self.operand_look(op, form)?;
        let original = self.guest.get(self.at..self.at + usize::from(op.len));
        let plan = Plan::of(form, &op.instruction, original, 0, self.encoder)?;
        Some(Treatment::Plain(Box::new(plan), look))
    }

    /// The look-up of the operation's memory operand, if it has one; `None` if it cannot be looked up.
    pub(super) fn operand_look(&self, op: &Op, form: &Form) -> Option<Option<Look>> {
        if !form.memory {
            return Some(None);
        }
        let flat: FlatAddress = op.flat?;
        if !(1..=64).contains(&op.memory_size) {
            return None;
        }
        Some(Some(Look {
            address: Address::Flat(flat),
            size: op.memory_size,
            write: match op.kind {
                OpKind::NativeMemory(access) => access != crate::access::OperandAccess::Read,
                OpKind::Store(_) | OpKind::StoreImmediate(..) => true,
                _ => false,
            },
            keep_flags: true,
        }))
    }

    /// Whether the flags that the guest has when the current operation starts are needed.
    pub(super) fn flags_live(&self) -> bool {
        self.live.get(self.operation).is_none_or(|&live| live != 0)
    }
}
