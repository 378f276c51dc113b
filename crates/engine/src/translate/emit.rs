//! Emits the code of one block.

use iced_x86::{Encoder, InstructionInfoFactory, Mnemonic};

use crate::decode::op::OpKind;
use crate::decode::{Block, Op};
use crate::frame::field;

use super::Context;
use super::assembler::{Assembler, Label, Mem, cond};
use super::immediate::RunTime;
use super::memory::Look;
use super::plain::Plan;
use super::registers::{ADDRESS, COUNT};
use super::shared::Shares;
use super::stubs::Stubs;
use super::treatment::Treatment;
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
    pub tlb: &'a mut Tlb,
    pub shares: Shares,
    /// The group whose window's host address is in ADDRESS.
    pub address_holds: Option<usize>,
    pub unshared: bool,
    pub wary: bool,
    /// There were too few cells.
    pub full: bool,
    pub unsupported: bool,
    /// In a path that is a loop: where its turns begin.
    pub again: Option<Label>,
    /// The linear pages that a path has looked at.
    pub pages: Vec<u64>,
    pub is_path: bool,
    /// Where the bytes of the operation that is being treated stand in `guest`.
    pub at: usize,
    pub encoder: &'a mut Encoder,
    pub deferred: Vec<Deferred>,
    /// The index of the operation being emitted.
    pub operation: usize,
    pub block: &'a Block,
    /// The guest's bytes.
    pub guest: &'a [u8],
    /// Bytes from the arena's start to this block's code.
    pub offset: u32,
    pub first_site: usize,
    pub sites: Vec<Site>,
    points: Vec<(u32, u16)>,
    assisted: Kept,
    /// The guest's vector registers are surely in the host's.
    vectors_here: bool,
    /// Status flags that are read after each operation starts.
    pub live: Vec<u32>,
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

impl Emitter<'_> {
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
