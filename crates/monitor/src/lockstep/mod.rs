//! Lock-step execution: the translator and the stepping engine execute the same instructions, and
//! the first difference ends the machine.
//!
//! Translated code runs first, from one poll to the next, on trial ([`rehearsal`]): its effects on
//! memory and registers are kept aside and taken back. Then the same instructions are stepped, one
//! by one, until they come to where translated code ended, in the same state. If they never do,
//! that is a [`Difference`]. What was stepped stays; so translated code decides nothing, and
//! interrupts come between such pieces.
//!
//! What must not happen twice ends a trial: devices, sensed accesses, instructions that are not
//! [`comparable`]. It is stepped once.
#![allow(unsafe_code)]

pub mod comparable;
pub mod difference;
pub mod rehearsal;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use iced_x86::Instruction;
use trapline_engine::access::{Core, Fault};
use trapline_engine::decode::{DecodeEnd, decode};
use trapline_engine::step::events::Event;
use trapline_engine::step::run::{Turn, run_one};
use trapline_engine::translate::{Context, Left, dead_flags, run};
use trapline_x86::{CpuState, Exception, Mode};

use crate::fetch::Wanted;
use crate::lockstep::difference::{Difference, STATUS, same};
use crate::lockstep::rehearsal::MemoryDifference;
use crate::path::{Progress, Recorder};
use crate::statistics::LockstepStatistics;
use crate::translated::{After, From};
use crate::vcpu::Vcpu;

/// Every poll of translated code finds that its attention is asked for.
pub(crate) static WANTED: AtomicU32 = AtomicU32::new(1);

/// Instructions that are stepped before it is given up to meet translated code: more than lie
/// between two polls, with the repetitions of string instructions.
const PATIENCE: usize = 1 << 16;
/// The exception flags of MXCSR.
const EXCEPTIONS: u32 = 0x3f;
/// Instructions that are printed.
const PRINTED: usize = 256;

/// What lock-step execution keeps from one piece to the next.
pub(crate) struct Lockstep {
    before: Box<CpuState>,
    translated: Box<CpuState>,
    instructions: Vec<Instruction>,
    /// The path that is being recorded.
    recorder: Option<Recorder>,
    pub statistics: LockstepStatistics,
    pub difference: Option<Arc<Difference>>,
}

impl Default for Lockstep {
    fn default() -> Self {
        Self {
            before: Box::new(CpuState::reset()),
            translated: Box::new(CpuState::reset()),
            instructions: Vec::new(),
            recorder: None,
            statistics: LockstepStatistics::default(),
            difference: None,
        }
    }
}

/// How translated code ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// Between two blocks.
    Block,
    /// At a poll, or on the way to another translation of the same code: flags that the block
    /// there does not need may be lost.
    Poll,
    /// Before an instruction that it could not execute.
    Before,
    /// As `Before`: the host raised an exception there.
    Fault,
    Raises(Exception),
}

impl Vcpu {
    /// Executes one piece of code in both engines, or one instruction if that is not possible.
    pub(crate) fn run_lockstep(&mut self) {
        let comparable = match self.fetch(Wanted::Single) {
            Ok(block) => block
                .block
                .ops
                .first()
                .is_some_and(|op| comparable::is_comparable(&op.instruction)),
            Err(fault) => return self.fetch_failed(fault),
        };
        if !comparable {
            return self.step_alone();
        }
        let context = Context::of(&self.cpu);
        self.tlb.set_context(context.privilege, context.number());
        let unshared = matches!(self.came_from, From::Link(_, _, true));
        let block = match self.fetch(Wanted::Translated(context, unshared)) {
            Ok(block) => block,
            Err(fault) => return self.fetch_failed(fault),
        };
        let Some(entry) = self.enter(&block, context) else {
            return self.step_alone();
        };
        let Some(mut lockstep) = self.lockstep.take() else {
            return;
        };
        if let Some(recorder) = self.heat.take_wanted(self.cpu.rip, context.number()) {
            lockstep.recorder = Some(recorder);
        }
        lockstep.before.clone_from(&self.cpu);
        self.surroundings
            .rehearse(|trial| trial.begin(&mut self.tlb));
        self.statistics.blocks += 1;
        let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.surroundings);
        // SAFETY: the block has just been fetched for this context and RIP; code is dropped only
        // by `fetch`, which is not called while it runs.
        let left = unsafe { run(&mut core, entry) };
        let fault = matches!(left, Left::Step { fault: true, .. });
        let end = match self.after(left) {
            // The same code goes on in another form, in a path perhaps through a cell.
            After::GoOn if matches!(self.came_from, From::Link(_, _, true) | From::Cell(_)) => {
                End::Poll
            }
            After::GoOn => End::Block,
            After::Attention => End::Poll,
            After::Step if fault => End::Fault,
            After::Step => End::Before,
            After::Turn(Turn::Exception(e)) => End::Raises(e),
            After::Turn(Turn::Restart) => End::Before,
            After::Turn(_) => End::Block,
        };
        std::mem::swap(&mut self.cpu, &mut lockstep.translated);
        self.cpu.clone_from(&lockstep.before);
        self.surroundings
            .rehearse(|trial| trial.again(&mut self.tlb));
        let met = self.follow(&mut lockstep, end);
        self.surroundings.rehearse(|trial| trial.end());
        let recorder = lockstep.recorder.take();
        if met && let Some(recorder) = recorder {
            lockstep.recorder = self.note_piece(recorder, &lockstep.instructions, context);
        }
        let stop = lockstep.difference.is_some();
        self.lockstep = Some(lockstep);
        if stop {
            return;
        }
        match (met, end) {
            (true, End::Raises(e)) => self.undelivered = Some(Event::Exception(e)),
            (true, End::Before | End::Fault) | (false, _) => self.step_alone(),
            _ => {}
        }
    }

    /// Notes the instructions that were stepped; the recorder, if the path goes on behind them.
    fn note_piece(
        &mut self,
        mut recorder: Recorder,
        instructions: &[Instruction],
        context: Context,
    ) -> Option<Recorder> {
        let following = instructions.iter().skip(1).map(Instruction::ip);
        let following: Vec<u64> = following.chain([self.cpu.rip]).collect();
        for (instruction, next) in instructions.iter().zip(following) {
            let progress = self.note_path(&mut recorder, instruction, next, context);
            if progress != Progress::GoesOn {
                return None;
            }
        }
        (Context::of(&self.cpu) == context).then_some(recorder)
    }

    fn fetch_failed(&mut self, fault: Fault) {
        match fault {
            Fault::Restart => self.surroundings.exits.restarts += 1,
            Fault::Exception(e) => self.undelivered = Some(Event::Exception(e)),
        }
    }

    /// Steps one instruction that is not compared.
    fn step_alone(&mut self) {
        if let Some(lockstep) = &mut self.lockstep {
            lockstep.statistics.alone += 1;
        }
        self.step();
    }

    /// Steps until translated code is met; whether it was. If not, and there is no difference,
    /// the next instruction must not be executed on trial.
    fn follow(&mut self, lockstep: &mut Lockstep, end: End) -> bool {
        lockstep.instructions.clear();
        // What to show if they never meet: the first time at the same place.
        let mut shown: Option<(Box<CpuState>, Vec<MemoryDifference>)> = None;
        let mut turn = Turn::Continue;
        let mut met = false;
        let raised = match end {
            End::Raises(e) => Some(e),
            _ => None,
        };
        for stepped in 0..PATIENCE {
            if self.cpu.rip == lockstep.translated.rip && raised.is_none() {
                met = self.meets(&lockstep.translated, end);
                if met {
                    break;
                }
                if stepped > 0 && shown.is_none() {
                    shown = Some((self.cpu.clone(), self.surroundings.trial_differences()));
                }
            }
            let block = match self.fetch(Wanted::Single) {
                Ok(block) => block,
                Err(Fault::Restart) => return false,
                Err(Fault::Exception(e)) => {
                    turn = Turn::Exception(e);
                    break;
                }
            };
            let instruction = match block.block.ops.first() {
                Some(op) if comparable::is_comparable(&op.instruction) => op.instruction,
                _ => {
                    // Only if translated code is where it should not be.
                    break;
                }
            };
            let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.surroundings);
            let (ended, done) = run_one(&mut core, &block.block);
            lockstep.instructions.push(instruction);
            self.statistics.instructions += done;
            lockstep.statistics.instructions += done;
            turn = ended;
            match ended {
                Turn::Continue | Turn::Stopped => {}
                Turn::Exception(e) => {
                    met = raised == Some(e) && self.meets(&lockstep.translated, end);
                    break;
                }
                Turn::Restart => {
                    // Refused, or something changed: it is executed for good now.
                    lockstep.statistics.given_up += 1;
                    return false;
                }
            }
        }
        if met {
            // A piece whose first instruction is not for translated code tells nothing.
            lockstep.statistics.compared += u64::from(!lockstep.instructions.is_empty());
            return true;
        }
        let (stepped, memory) =
            shown.unwrap_or_else(|| (self.cpu.clone(), self.surroundings.trial_differences()));
        lockstep.instructions.truncate(PRINTED);
        lockstep.difference = Some(Arc::new(Difference {
            before: (*lockstep.before).clone(),
            translated: (*lockstep.translated).clone(),
            stepped: *stepped,
            translated_raises: raised,
            stepped_ends: turn,
            instructions: lockstep.instructions.clone(),
            memory,
        }));
        false
    }

    /// Whether registers and memory are as translated code left them.
    fn meets(&mut self, translated: &CpuState, end: End) -> bool {
        let cpu = &*self.cpu;
        let registers = match end {
            End::Block => same(cpu, translated, 0),
            // The instruction has left a mark of its exception, and will again.
            End::Fault => {
                let mut cpu = self.cpu.clone();
                cpu.vector.mxcsr |= translated.vector.mxcsr & EXCEPTIONS;
                self.same_but_dead_flags(&cpu, translated)
            }
            _ if same(cpu, translated, 0) => true,
            _ => self.same_but_dead_flags(&self.cpu.clone(), translated),
        };
        registers && self.surroundings.trial_differences().is_empty()
    }

    fn same_but_dead_flags(&mut self, cpu: &CpuState, translated: &CpuState) -> bool {
        let differ = (cpu.rflags ^ translated.rflags) & STATUS;
        same(cpu, translated, STATUS) && (differ == 0 || differ & !self.dead_flags_here() == 0)
    }

    /// The status flags that the code at RIP overwrites before it reads them.
    fn dead_flags_here(&mut self) -> u64 {
        let mut bytes = [0; 256];
        let len = (4096 - (self.cpu.rip as usize & 4095)).min(bytes.len());
        let (linear, mode) = (self.cpu.rip, self.cpu.mode());
        if mode != Mode::Long64 {
            return 0;
        }
        let Ok((gpa, true)) = self.translate_fetch(linear) else {
            return 0;
        };
        if !self.surroundings.memory.read(gpa, &mut bytes[..len]) {
            return 0;
        }
        match decode(
            &bytes[..len],
            linear,
            mode,
            &self.features,
            None,
            usize::MAX,
        ) {
            Ok(DecodeEnd::Block(block)) => u64::from(dead_flags(&block)),
            // It goes on on the next page.
            _ => match self.fetch(Wanted::Single) {
                Ok(block) => u64::from(dead_flags(&block.block)),
                Err(_) => 0,
            },
        }
    }
}
