//! Running translated code: finding the block at RIP, entering it, and doing what it left for.
#![allow(unsafe_code)]

use std::rc::Rc;
use std::sync::Arc;

use trapline_engine::access::Core;
use trapline_engine::env::Environment;
use trapline_engine::step::events::Event;
use trapline_engine::step::run::{Turn, run_one};
use trapline_engine::translate::{Context, Entry, Left, Site, finish_branch, may_run, run};
use trapline_trace::Attention;
use trapline_x86::state::Activity;

use crate::code_cache::CachedBlock;
use crate::fetch::Wanted;
use crate::vcpu::Vcpu;

/// What is known about where translated code came from when the next block is looked for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum From {
    /// A branch within the page, to be linked: the site, how often code had been dropped, and
    /// whether it leads to the translation that shares no look-ups.
    Link(u64, u64, bool),
    /// A jump to a constant address through this cell.
    Cell(u32),
    /// A branch to be found in the jump table from now on.
    Jump,
    /// Something else.
    #[default]
    Elsewhere,
}

/// What is to be done when translated code was left.
pub(crate) enum After {
    /// Go on at RIP.
    GoOn,
    /// Look at what asks for attention.
    Attention,
    /// The instruction at RIP must be stepped.
    Step,
    /// A helper executed an instruction that ended so.
    Turn(Turn),
}

impl Vcpu {
    /// Whether the code at RIP may run translated: 64-bit, and no check is due at every
    /// instruction.
    #[inline]
    pub(crate) fn may_run_translated(&self) -> bool {
        self.surroundings.code.translator.is_some()
            && !self.debugging
            && !self.log_blocks
            && may_run(&self.cpu)
    }

    /// Runs translated code until something is due that the run loop does.
    pub(crate) fn run_translated(&mut self) {
        let trace = Arc::clone(&self.surroundings.trace);
        let word = trace.attention(self.surroundings.vcpu);
        loop {
            let context = Context::of(&self.cpu);
            self.tlb.set_context(context.privilege, context.number());
            if let Some(recorder) = self.heat.take_wanted(self.cpu.rip, context.number()) {
                self.record_path(recorder, context);
                if self.must_look(word) {
                    return;
                }
                continue;
            }
            let quick = self
                .tlb
                .jump(context.privilege, context.number(), self.cpu.rip)
                .filter(|_| matches!(self.came_from, From::Jump) && !word.pending());
            if let Some(address) = quick {
                self.came_from = From::Elsewhere;
                let translator = self.surroundings.code.translator.as_ref();
                let Some(entry) = translator.map(|t| t.entry_at(address)) else {
                    return;
                };
                if self.enter_translated(entry, word) {
                    return;
                }
                continue;
            }
            let unshared = matches!(self.came_from, From::Link(_, _, true));
            let Some(block) = self.fetched(Wanted::Translated(context, unshared)) else {
                return;
            };
            let Some(entry) = self.enter(&block, context) else {
                // Nothing is translated there: no RAM, or code that never stops changing.
                self.step();
                return;
            };
            if self.enter_translated(entry, word) {
                return;
            }
        }
    }

    /// Enters translated code and does what it left for; whether the run loop must have a look.
    fn enter_translated(&mut self, entry: Entry, word: &Attention) -> bool {
        self.statistics.blocks += 1;
        let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.surroundings);
        // SAFETY: the block has just been fetched for this context and RIP; the code is
        // dropped only by `fetch`, never while it runs. The word lives as long as the trace
        // system.
        let left = unsafe { run(&mut core, entry) };
        if self.log_translated {
            let site = match left {
                Left::Site(number) => {
                    let translator = self.surroundings.code.translator.as_ref();
                    translator.and_then(|t| t.site(number))
                }
                _ => None,
            };
            tracing::trace!(target: "translated", vcpu = self.surroundings.vcpu.index(), ?left, ?site, rip = format_args!("{:#x}", self.cpu.rip), "left");
        }
        match self.after(left) {
            After::GoOn => {}
            After::Attention => return true,
            After::Step => self.step(),
            After::Turn(turn) => self.ended(turn),
        }
        self.must_look(word)
    }

    /// Whether there is something for the run loop to do.
    fn must_look(&self, word: &Attention) -> bool {
        word.pending()
            || self.undelivered.is_some()
            || self.surroundings.is_wanted(&self.cpu)
            || self.cpu.activity != Activity::Active
            || !self.may_run_translated()
    }

    /// Brings RIP up to date when translated code was left, and finishes a branch.
    #[inline]
    pub(crate) fn after(&mut self, left: Left) -> After {
        let translator = self.surroundings.code.translator.as_ref();
        match left {
            Left::Site(number) => match translator.and_then(|t| t.site(number)) {
                Some(Site::Link {
                    target, unshared, ..
                }) => {
                    self.cpu.rip = target;
                    self.came_from = From::Link(number, self.code_drops, unshared);
                    After::GoOn
                }
                Some(Site::Jump { target, cell }) => {
                    self.cpu.rip = target;
                    self.came_from = From::Cell(cell);
                    After::GoOn
                }
                Some(Site::Branch { rip, effect }) => {
                    self.cpu.rip = rip;
                    self.came_from = From::Jump;
                    let (tlb, around) = (&mut self.tlb, &mut self.surroundings);
                    match finish_branch(&mut Core::new(&mut self.cpu, tlb, around), effect) {
                        true => After::GoOn,
                        false => After::Step,
                    }
                }
                Some(Site::Attention { rip }) => {
                    self.cpu.rip = rip;
                    self.heat.note(rip, Context::of(&self.cpu).number());
                    After::Attention
                }
                Some(Site::Misled { rip }) => {
                    self.cpu.rip = rip;
                    self.came_from = From::Elsewhere;
                    self.drop_misled_path(Context::of(&self.cpu));
                    After::GoOn
                }
                None => After::Attention,
            },
            Left::Turn(turn) => {
                self.surroundings.exits.assists += 1;
                self.came_from = From::Jump;
                After::Turn(turn)
            }
            Left::Step { address, fault } => {
                self.surroundings.exits.host_faults += u64::from(fault);
                let Some(rip) = translator.and_then(|t| t.rip_of(address)) else {
                    return After::Attention;
                };
                self.cpu.rip = rip;
                After::Step
            }
        }
    }

    /// Where to begin in `block`; enters it where it will be looked for.
    pub(crate) fn enter(&mut self, block: &Rc<CachedBlock>, context: Context) -> Option<Entry> {
        let from = std::mem::take(&mut self.came_from);
        let id = block.translated?;
        let translator = self.surroundings.code.translator.as_mut()?;
        if let From::Link(site, drops, _) = from
            && drops == self.code_drops
        {
            translator.link(site, id);
        }
        let entry = translator.entry(id)?;
        if block.second.is_none()
            && let Some(address) = translator.address(id)
        {
            let (privilege, rip) = (context.privilege, self.cpu.rip);
            match from {
                From::Jump => self.tlb.insert_jump(privilege, rip, address),
                From::Cell(cell) => {
                    let number = context.number();
                    self.tlb.fill_cell(cell, privilege, number, rip, address);
                }
                _ => {}
            }
        }
        Some(entry)
    }

    /// Steps the instruction at RIP.
    pub(crate) fn step(&mut self) {
        self.surroundings.exits.steps += 1;
        let Some(block) = self.fetched(Wanted::Single) else {
            return;
        };
        let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.surroundings);
        let (turn, done) = run_one(&mut core, &block.block);
        self.statistics.instructions += done;
        self.ended(turn);
    }

    /// What follows from how an instruction ended.
    pub(crate) fn ended(&mut self, turn: Turn) {
        match turn {
            Turn::Continue | Turn::Stopped => {}
            Turn::Exception(e) => self.undelivered = Some(Event::Exception(e)),
            Turn::Restart => self.surroundings.exits.restarts += 1,
        }
    }
}
