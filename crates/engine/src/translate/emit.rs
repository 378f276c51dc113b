//! Emits the code of one block.

use iced_x86::{Encoder, InstructionInfoFactory, Mnemonic, OpKind as Operand};

use crate::decode::op::{OpKind, StateCheck};
use crate::decode::{Block, Op};
use crate::frame::{field, jump_cell, jump_hosts, jump_targets};
use crate::native::form::{Form, STATUS};

use super::Context;
use super::assembler::{Assembler, Label, Mem, cond};
use super::immediate::RunTime;
use super::memory::{Address, Look};
use super::plain::Plan;
use super::registers::{ADDRESS, COUNT, INDEX};
use super::shared::Shares;
use super::stubs::Stubs;
use super::values::{Access, Effect, Move};
use crate::decode::op::FlatAddress;
use crate::native::ThunkError;
use crate::tlb::Tlb;

/// How generated code leaves, other than through a helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// A direct branch to `target` whose displacement stands at `patch`, bytes from the arena's
    /// start; unlinked, it leaves.
    Link {
        patch: u32,
        /// What the displacement is as long as the site is not linked.
        unlinked: i32,
        target: u64,
        /// Goes back or to itself: must poll.
        backward: bool,
        /// Leads to the translation that shares no look-ups.
        unshared: bool,
    },
    /// A jump to this address whose cell was empty.
    Jump { target: u64, cell: u32 },
    /// An indirect branch at this address whose target, in [`field::TARGET`], was not in the jump
    /// table. Nothing but the target has been computed; see [`super::finish_branch`].
    Branch { rip: u64, effect: StackEffect },
    /// At a block's start: something asks for attention.
    Attention { rip: u64 },
    /// At the start of a path that is a loop: a branch that its registers lead always leads
    /// elsewhere this time.
    Misled { rip: u64 },
}

/// What an indirect branch does to the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackEffect {
    None,
    /// RSP grows by so many bytes.
    Pop(u32),
    /// This return address is pushed.
    Push(u64),
}

/// Code that is emitted behind the block.
#[derive(Clone, Copy)]
pub(super) enum Deferred {
    Miss {
        label: Label,
        retry: Label,
        /// Behind the look-up.
        hit: Label,
        look: Look,
        operation: usize,
        access: usize,
    },
    /// The look-up of a group's window missed.
    Window {
        label: Label,
        found: Label,
        window: Look,
        look: Look,
        operation: usize,
        access: usize,
    },
    /// What is needed before a loop, perhaps this look-up, is not so.
    NoLoop { label: Label, look: Option<Look> },
    /// Leave by a site.
    Leave { label: Label, site: usize },
    /// A taken branch to another page.
    Jump { label: Label, target: u64 },
    /// An indirect branch that does not go where its path goes on.
    Dispatch { label: Label, operation: usize },
}

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

/// Operations that code points to: each stays where it is.
#[allow(clippy::vec_box)]
pub(super) type Kept = Vec<Box<Op>>;

/// The code of a block and what is to be known of it.
pub(super) struct Emitted {
    pub bytes: Vec<u8>,
    /// Offset of the entry that does not poll.
    pub entry: usize,
    /// Offset of what stands behind the block's own code: ways out, and what look-ups do that miss.
    #[cfg(test)]
    pub deferred: usize,
    /// For each piece of code the instruction that it belongs to: offset in the code, and of the
    /// instruction in the block (its number in a path); ascending.
    pub points: Vec<(u32, u16)>,
    pub sites: Vec<Site>,
    /// Operations that helpers execute.
    pub assisted: Kept,
}

pub(super) struct Emitter<'a> {
    pub asm: Assembler,
    pub stubs: &'a Stubs,
    pub context: Context,
    pub bmi2: bool,
    attention: u64,
    /// The block's only instruction has this immediate.
    pub run_time: Option<RunTime>,
    tlb: &'a mut Tlb,
    pub shares: Shares,
    /// The group whose window's host address is in ADDRESS.
    pub address_holds: Option<usize>,
    unshared: bool,
    pub wary: bool,
    /// There were too few cells.
    full: bool,
    pub unsupported: bool,
    /// In a path that is a loop: where its turns begin.
    pub again: Option<Label>,
    /// The linear pages that a path has looked at.
    pub pages: Vec<u64>,
    pub is_path: bool,
    /// Where the bytes of the operation that is being treated stand in `guest`.
    at: usize,
    pub encoder: &'a mut Encoder,
    pub deferred: Vec<Deferred>,
    /// The index of the operation being emitted.
    pub operation: usize,
    pub block: &'a Block,
    /// The guest's bytes.
    guest: &'a [u8],
    /// Bytes from the arena's start to this block's code.
    offset: u32,
    first_site: usize,
    sites: Vec<Site>,
    points: Vec<(u32, u16)>,
    assisted: Kept,
    /// The guest's vector registers are surely in the host's.
    vectors_here: bool,
    /// Status flags that are read after each operation starts.
    live: Vec<u32>,
}

/// All that [`emit`] needs to know.
pub(super) struct Request<'a> {
    pub block: &'a Block,
    /// The bytes that the block was decoded from.
    pub guest: &'a [u8],
    pub context: Context,
    /// The immediate of the block's only instruction is read at run time.
    pub run_time: Option<RunTime>,
    pub stubs: &'a Stubs,
    pub bmi2: bool,
    /// The address of the attention word.
    pub attention: u64,
    /// The address at which the code will lie, and from the arena's start.
    pub start: u64,
    pub offset: u32,
    /// The number that the first site gets.
    pub first_site: usize,
    /// Each access is looked up by itself.
    pub unshared: bool,
    /// A loop looks at each branch where that leads, in each turn.
    pub wary: bool,
    /// Gives out cells.
    pub tlb: &'a mut Tlb,
}

/// Emits a block.
///
/// # Errors
/// [`ThunkError::Full`] if there are too few cells, [`ThunkError::Unsupported`] if a displacement is
/// out of reach.
pub(super) fn emit(
    request: Request<'_>,
    encoder: &mut Encoder,
    factory: &mut InstructionInfoFactory,
) -> Result<Emitted, ThunkError> {
    let block = request.block;
    let mut emitter = Emitter {
        asm: Assembler::new(request.start),
        stubs: request.stubs,
        context: request.context,
        bmi2: request.bmi2,
        attention: request.attention,
        run_time: request.run_time,
        tlb: request.tlb,
        shares: Shares::default(),
        address_holds: None,
        unshared: request.unshared,
        wary: request.wary,
        full: false,
        unsupported: false,
        again: None,
        pages: vec![block.rip >> 12],
        is_path: block.is_path(),
        at: 0,
        encoder,
        deferred: Vec::new(),
        operation: 0,
        block,
        guest: request.guest,
        offset: request.offset,
        first_site: request.first_site,
        sites: Vec::new(),
        points: Vec::new(),
        assisted: Vec::new(),
        vectors_here: false,
        live: Vec::new(),
    };
    let treatments = emitter.treat(factory)?;
    emitter.poll();
    let entry = emitter.asm.here();
    if emitter.shares.is_loop() {
        let vectors =
            |treatment: &Treatment| matches!(treatment, Treatment::Plain(plan, _) if plan.vectors);
        emitter.start_loop(treatments.iter().any(vectors));
    }
    let mut open = true;
    for (n, (op, treatment)) in block.ops.iter().zip(treatments).enumerate() {
        emitter.operation = n;
        // Where a path goes on.
        let next = block.ops.get(n + 1).map(|next| next.instruction.ip());
        let next = next.filter(|_| emitter.is_path);
        let goes_on = matches!(treatment, Treatment::Own) && op.kind == OpKind::System;
        let goes_on = goes_on || !leaves(op);
        emitter.point(n);
        match treatment {
            Treatment::Own if next.is_some() && op.is_near_branch() => {
                emitter.pass(op, next.unwrap_or_default());
            }
            _ if next.is_some() && !goes_on => return Err(ThunkError::Unsupported),
            Treatment::Plain(plan, look) => emitter.plain(op, &plan, look),
            Treatment::RunTime(plan, look) => {
                emitter.fetch_immediate();
                emitter.plain(op, &plan, look);
            }
            Treatment::Assist => emitter.assist(op),
            Treatment::Own => emitter.own(op),
            Treatment::RunTimeOwn => emitter.own_at_run_time(op),
        }
        open = goes_on;
        if let Some(next) = next {
            emitter.enter_page(next);
        }
    }
    if open && let Some(last) = block.ops.last() {
        emitter.go_to(last.instruction.next_ip());
    }
    #[cfg(test)]
    let deferred = emitter.asm.here();
    emitter.finish_deferred();
    if emitter.full {
        return Err(ThunkError::Full);
    }
    if emitter.unsupported || !emitter.asm.finish() {
        return Err(ThunkError::Unsupported);
    }
    Ok(Emitted {
        bytes: emitter.asm.bytes,
        entry,
        #[cfg(test)]
        deferred,
        points: emitter.points,
        sites: emitter.sites,
        assisted: emitter.assisted,
    })
}

/// Whether translated code is left behind the operation when a helper has executed it: the context
/// or the way on may have changed.
pub(super) fn leaves(op: &Op) -> bool {
    let reads_segment = op.instruction.mnemonic() == Mnemonic::Mov
        && op.instruction.op1_register().is_segment_register();
    op.ends_block() && !reads_segment
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
    fn treat(
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

    /// The code from here on belongs to operation `n`.
    fn point(&mut self, n: usize) {
        let op = self.block.ops.get(n).filter(|_| !self.is_path);
        let offset = op.map_or(n as u64, |op| {
            op.instruction.ip().wrapping_sub(self.block.rip)
        });
        self.points.push((self.asm.here() as u32, offset as u16));
    }

    /// Leaves if something asks for attention.
    pub(super) fn poll(&mut self) {
        let label = self.leave(Site::Attention {
            rip: self.block.rip,
        });
        let a = &mut self.asm;
        a.mov_immediate(COUNT, self.attention);
        if self.live.first().is_some_and(|&live| live == 0) {
            a.compare_mem32(Mem::base(COUNT, 0), 0);
            a.jump_if(cond::NE, label);
        } else {
            a.load32(COUNT, Mem::base(COUNT, 0));
            a.unless_rcx_zero(|a| {
                a.jump(label);
            });
        }
    }

    /// A label for code that leaves by `site`.
    pub(super) fn leave(&mut self, site: Site) -> Label {
        let label = self.asm.label();
        let number = self.sites.len();
        self.sites.push(site);
        self.deferred.push(Deferred::Leave {
            label,
            site: number,
        });
        label
    }

    /// One guest instruction on registers, and memory if there is a look-up.
    fn plain(&mut self, _op: &Op, plan: &Plan, look: Option<Look>) {
        if plan.vectors {
            self.ensure_vectors();
        }
        if let Some(look) = look {
            self.locate(0, look);
        }
        plan.emit(&mut self.asm);
        if plan.uses_scratch() {
            self.address_holds = None;
        }
    }

    /// Loads the guest's vector registers unless they are there.
    pub(super) fn ensure_vectors(&mut self) {
        if self.vectors_here {
            return;
        }
        self.vectors_here = true;
        let load = self.stubs.load_vectors;
        let a = &mut self.asm;
        a.load32(COUNT, Mem::field(field::VECTORS_AWAY));
        a.unless_rcx_zero(|a| a.call_address(load));
    }

    /// Lets a helper execute the operation.
    pub(super) fn assist(&mut self, op: &Op) {
        tracing::trace!(target: "assist", instruction = %op.instruction, kind = ?op.kind, "left to a helper");
        let kept = self.keep(op);
        self.asm.mov_immediate(COUNT, kept);
        self.asm.call_address(self.stubs.assist);
        self.vectors_here = false;
        self.address_holds = None;
    }

    /// Keeps a copy of the operation for helpers, and gives its address.
    pub(super) fn keep(&mut self, op: &Op) -> u64 {
        let op = Box::new(op.clone());
        let pointer: *const Op = &*op;
        self.assisted.push(op);
        pointer as u64
    }

    /// Whether another operation of the block follows the current one.
    pub(super) fn is_followed(&self) -> bool {
        self.operation + 1 < self.block.ops.len()
    }

    /// Whether the block is a path whose last branch leads to its start.
    fn leads_back(&self) -> bool {
        self.is_path
            && self.block.ops.last().is_some_and(|op| {
                matches!(op.kind, OpKind::Jump | OpKind::JumpIf(_)) && op.target == self.block.rip
            })
    }

    /// Whether a direct branch to `target` needs no look at the translation of its page: that of
    /// this block holds for it too.
    fn same_page(&self, target: u64) -> bool {
        let first = self.block.rip >> 12;
        let last = self
            .block
            .rip
            .wrapping_add(u64::from(self.block.len.max(1)) - 1)
            >> 12;
        // A path looks at its other pages by itself.
        (first == last || self.is_path) && target >> 12 == first
    }

    /// A label of an unlinked branch to `target` on this page; [`Self::linked`] tells where the
    /// displacement stands.
    fn link(&mut self, target: u64) -> (Label, usize) {
        let backward = target
            <= self
                .block
                .ops
                .get(self.operation)
                .map_or(target, |op| op.instruction.ip());
        let site = self.sites.len();
        let label = self.leave(Site::Link {
            patch: 0,
            unlinked: 0,
            target,
            backward,
            unshared: false,
        });
        (label, site)
    }

    /// Goes on with the current operation, in the translation that shares no look-ups.
    ///
    /// In a path, code on another page goes on in whatever is there.
    pub(super) fn go_on_unshared(&mut self) {
        if !self.same_page(self.rip()) {
            self.jump_through_cell(self.context, self.rip());
            return;
        }
        let site = self.sites.len();
        let label = self.leave(Site::Link {
            patch: 0,
            unlinked: 0,
            target: self.rip(),
            backward: false,
            unshared: true,
        });
        let at = self.asm.jump(label);
        self.linked(site, at);
    }

    /// Of the current operation.
    fn rip(&self) -> u64 {
        let op = self.block.ops.get(self.operation);
        op.map_or(self.block.rip, |op| op.instruction.ip())
    }

    fn linked(&mut self, site: usize, at: usize) {
        if let Some(Site::Link { patch, .. }) = self.sites.get_mut(site) {
            *patch = self.offset + at as u32;
        }
    }

    /// Where a branch to `target` goes that starts the next turn of a loop.
    fn next_turn(&self, target: u64) -> Option<Label> {
        self.again
            .filter(|_| target == self.block.rip && !self.is_followed())
    }

    /// A conditional branch.
    pub(super) fn branch_if(&mut self, condition: u8, target: u64) {
        if let Some(again) = self.next_turn(target) {
            self.asm.jump_if(condition, again);
        } else if self.same_page(target) {
            let (label, site) = self.link(target);
            let at = self.asm.jump_if(condition, label);
            self.linked(site, at);
        } else {
            let label = self.asm.label();
            self.deferred.push(Deferred::Jump { label, target });
            self.asm.jump_if(condition, label);
        }
    }

    /// Goes on at a constant address.
    pub(super) fn go_to(&mut self, target: u64) {
        if let Some(again) = self.next_turn(target) {
            self.asm.jump(again);
        } else if self.same_page(target) {
            let (label, site) = self.link(target);
            let at = self.asm.jump(label);
            self.linked(site, at);
        } else {
            self.jump_through_cell(self.context, target);
        }
    }

    /// Jumps to a constant address, to code of another context perhaps, through its cell.
    pub(super) fn jump_through_cell(&mut self, context: Context, target: u64) {
        let leave = self.stubs.leave;
        let Some(cell) = self.tlb.jump_cell(context.number(), target, leave) else {
            self.full = true;
            return;
        };
        let number = self.first_site + self.sites.len();
        self.sites.push(Site::Jump { target, cell });
        // An empty cell leads to the way out, which takes the site's number in RCX.
        self.asm.mov_immediate(COUNT, number as u64);
        self.asm.jump_mem(Mem::field(jump_cell(cell)));
    }

    /// The cell for jumps to `target`, and the host address that it holds now, if any.
    pub(super) fn cell(&mut self, target: u64) -> Option<(u32, Option<u64>)> {
        let leave = self.stubs.leave;
        let Some(cell) = self.tlb.jump_cell(self.context.number(), target, leave) else {
            self.full = true;
            return None;
        };
        let host = self.tlb.frame().get(jump_cell(cell));
        Some((cell, Some(host).filter(|&host| host != leave)))
    }

    /// Finds the code for the guest address in ADDRESS: gives where its host address
    /// stands, by INDEX. If there is none in the table, [`Site::Branch`] leaves.
    pub(super) fn find_target(&mut self, effect: StackEffect) -> Mem {
        let rip = self.rip();
        let miss = self.leave(Site::Branch { rip, effect });
        let table = self.context.jump_table();
        let a = &mut self.asm;
        a.zero_extend16(INDEX, ADDRESS);
        a.load(COUNT, Mem::slot(jump_targets(table), INDEX));
        a.lea(
            COUNT,
            Mem {
                base: Some(COUNT),
                index: Some((ADDRESS, 0)),
                displacement: 0,
            },
        );
        a.unless_rcx_zero(|a| {
            a.jump(miss);
        });
        Mem::slot(jump_hosts(table), INDEX)
    }

    fn finish_deferred(&mut self) {
        // Jumps add exits, so they come first.
        let mut n = 0;
        while n < self.deferred.len() {
            match self.deferred[n] {
                Deferred::Miss {
                    label,
                    retry,
                    hit,
                    look,
                    operation,
                    access,
                } => {
                    self.operation = operation;
                    self.point(operation);
                    self.miss(label, retry, hit, look, access);
                }
                Deferred::Window {
                    label,
                    found,
                    window,
                    look,
                    operation,
                    access,
                } => {
                    self.operation = operation;
                    self.point(operation);
                    self.window_missed(label, found, window, look, access);
                }
                Deferred::NoLoop { label, look } => {
                    self.operation = 0;
                    self.point(0);
                    self.no_loop(label, look);
                }
                Deferred::Leave { label, site } => {
                    self.asm.bind(label);
                    match self.sites.get_mut(site) {
                        Some(Site::Link {
                            patch, unlinked, ..
                        }) => {
                            let next = i64::from(*patch) - i64::from(self.offset) + 4;
                            *unlinked = (self.asm.here() as i64 - next) as i32;
                        }
                        Some(Site::Branch { .. }) => {
                            self.asm.store(Mem::field(field::TARGET), ADDRESS);
                        }
                        _ => {}
                    }
                    let number = self.first_site + site;
                    self.asm.mov_immediate(COUNT, number as u64);
                    self.asm.jump_address(self.stubs.leave);
                }
                Deferred::Dispatch { label, operation } => {
                    self.operation = operation;
                    self.point(operation);
                    self.address_holds = None;
                    self.asm.bind(label);
                    let block = self.block;
                    if let Some(op) = block.ops.get(operation) {
                        self.dispatch(op);
                    }
                }
                Deferred::Jump { label, target } => {
                    self.asm.bind(label);
                    self.jump_through_cell(self.context, target);
                }
            }
            n += 1;
        }
    }
}
