//! Paths: what is executed often is translated over several blocks, as it was executed once.
//!
//! Where polls find that the VCPU's attention is wanted is where it spends its time, so those
//! places are counted ([`Heat`]): timers and the like take samples that cost nothing. From a place
//! that was found often enough the stepping engine goes on for a while, and a [`Recorder`] notes
//! the instructions, from the innermost loop's start if it meets one. The path is derived from
//! them like a block from its bytes: all its pieces are protected, then read, and it goes with any
//! of them. It takes the place of the block at its start.

mod heat;
mod recorder;

use std::rc::Rc;

use iced_x86::Instruction;

use trapline_engine::decode::block::may_be_followed;
use trapline_engine::decode::{Block, DecodeEnd, Op, OpKind, decode};
use trapline_engine::translate::{BlockId, Context, Source};
use trapline_trace::{Range, TraceId};
use trapline_x86::Mode;

use crate::code_cache::{CachedBlock, Form, Key};
use crate::fetch::Wanted;
use crate::translated::From;
use crate::vcpu::Vcpu;

pub(crate) use heat::Heat;
pub(crate) use recorder::{Progress, Recorder};

/// Instructions that are stepped to record one.
const PATIENCE: usize = 256;
const PAGE: u64 = 4096;

/// A piece of a path on one page, without gaps.
struct Piece {
    rip: u64,
    range: Range,
}

/// What a path is derived from.
#[derive(Default)]
struct Pieces {
    ops: Vec<Op>,
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
}

impl Vcpu {
    /// Steps from here, and makes a path of what is executed.
    #[cold]
    pub(crate) fn record_path(&mut self, mut recorder: Recorder, context: Context) {
        self.came_from = From::Elsewhere;
        for _ in 0..PATIENCE {
            let word = self.surroundings.trace.attention(self.surroundings.vcpu);
            if word.pending() || !self.may_run_translated() || Context::of(&self.cpu) != context {
                return;
            }
            let Ok(block) = self.fetch(Wanted::Single) else {
                // It raises its exception when it is executed.
                return;
            };
            let Some(op) = block.block.ops.first() else {
                return;
            };
            if matches!(op.kind, OpKind::System) && !may_be_followed(op) {
                // Its next instruction may be executed under other circumstances.
                break;
            }
            let instruction = op.instruction;
            self.step();
            if self.undelivered.is_some() {
                return;
            }
            if self.note_path(&mut recorder, &instruction, self.cpu.rip, context)
                != Progress::GoesOn
            {
                return;
            }
        }
        if recorder.straight {
            self.make_path(&recorder, false, context);
        }
    }

    /// Notes an instruction, and makes the path if it is complete.
    pub(crate) fn note_path(
        &mut self,
        recorder: &mut Recorder,
        instruction: &Instruction,
        next: u64,
        context: Context,
    ) -> Progress {
        let number = context.number();
        let progress = recorder.note(instruction, next, |rip| self.heat.is_loop((rip, number)));
        // A loop may be met the next time; else what goes straight on is better than nothing.
        match progress {
            Progress::Loop | Progress::ToLoop => {
                self.make_path(recorder, progress == Progress::Loop, context);
            }
            Progress::TooLong if recorder.straight => {
                self.make_path(recorder, false, context);
            }
            _ => {}
        }
        progress
    }

    fn make_path(&mut self, recorder: &Recorder, is_loop: bool, context: Context) {
        let (rips, number) = (&recorder.rips, context.number());
        let drops = self.code_drops;
        let pieces = self.pieces(rips);
        let patches = &self.surroundings.code.patches;
        let rewritten = |piece: &Piece| patches.first_in(piece.range).is_some();
        if pieces
            .as_ref()
            .is_some_and(|p| p.pieces.iter().any(rewritten))
        {
            // Such bytes need a block of their own. To step through them is dear, too.
            self.heat.give_up((recorder.from, number));
            return;
        }
        let made = pieces
            .and_then(|pieces| self.derive_path(pieces, context))
            .is_some();
        tracing::debug!(target: "path", vcpu = self.surroundings.vcpu.index(), made, is_loop, rip = format_args!("{rips:x?}"), "path");
        if made && self.code_drops == drops {
            self.surroundings.code.statistics.paths += 1;
            self.heat.add_head((rips[0], number), is_loop);
        }
    }

    /// Derives the path of these pieces. `None` if that is nothing more than a block, or not
    /// possible now.
    fn derive_path(&mut self, pieces: Pieces, context: Context) -> Option<()> {
        let Pieces { ops, bytes, pieces } = pieces;
        let block = Block {
            rip: pieces.first()?.rip,
            mode: Mode::Long64,
            len: bytes.len() as u32,
            ops,
        };
        if !block.is_path() {
            return None;
        }
        let code = &self.surroundings.code;
        if code.is_full()
            || pieces
                .iter()
                .any(|p| code.patches.first_in(p.range).is_some())
        {
            return None;
        }
        // Of every page but the first, the path enters only what a block stands for.
        let mut entries: Vec<(u64, Key)> = Vec::new();
        let mut seen = vec![block.rip >> 12];
        for piece in &pieces {
            if seen.contains(&(piece.rip >> 12)) {
                continue;
            }
            seen.push(piece.rip >> 12);
            let key = path_key(piece.range.lo, piece.rip, context);
            if self.surroundings.code.get(&key).is_none() {
                self.derive(key, piece.rip, true, Wanted::Translated(context, false))
                    .ok()?;
            }
            entries.push((piece.rip, key));
        }
        let mut traces = Vec::new();
        let made = self.derive_protected(&block, &bytes, &pieces, &entries, context, &mut traces);
        let Some(id) = made else {
            for id in traces {
                self.surroundings.code.release_trace(id);
            }
            return None;
        };
        let first = pieces.first()?.range;
        let key = path_key(first.lo, block.rip, context);
        let others = pieces.iter().skip(1).map(|piece| piece.range).collect();
        let cached = CachedBlock::path(
            Block {
                ops: Vec::new(),
                ..block
            },
            id,
            first,
            others,
            traces,
        );
        let _: Rc<CachedBlock> = self.surroundings.code.insert(key, cached);
        // The block that was here.
        self.forget_removed();
        Some(())
    }

    /// Drops the path at RIP: its loop calls or jumps elsewhere now. The next one looks in each turn.
    #[cold]
    pub(crate) fn drop_misled_path(&mut self, context: Context) {
        let rip = self.cpu.rip;
        self.heat.add_misled((rip, context.number()));
        self.heat.lost(rip, context.number());
        if let Ok((gpa, _)) = self.translate_fetch(rip) {
            self.surroundings
                .code
                .drop_block(path_key(gpa, rip, context));
            self.forget_removed();
            self.tlb.bump_epoch();
        }
    }

    /// Blocks that were removed are not to be found any more.
    fn forget_removed(&mut self) {
        for rip in self.surroundings.code.take_removed() {
            self.tlb.remove_jump(rip);
        }
    }

    /// Protects the pieces, reads them again, and translates.
    fn derive_protected(
        &mut self,
        block: &Block,
        bytes: &[u8],
        pieces: &[Piece],
        entries: &[(u64, Key)],
        context: Context,
        traces: &mut Vec<TraceId>,
    ) -> Option<BlockId> {
        for piece in pieces {
            traces.extend(self.establish(piece.range).ok()?);
        }
        let mut at = 0;
        for piece in pieces {
            let mut now = vec![0; (piece.range.hi - piece.range.lo) as usize];
            let then = bytes.get(at..at + now.len())?;
            if !self.surroundings.memory.read(piece.range.lo, &mut now) || now != then {
                return None;
            }
            at += now.len();
        }
        // From here on nothing changes before it is done.
        let (number, privilege) = (context.number(), context.privilege);
        for &(rip, key) in entries {
            let (gpa, _) = self.translate_fetch(rip).ok()?;
            let id = self.surroundings.code.get(&key)?.translated?;
            let translator = self.surroundings.code.translator.as_ref()?;
            let (address, leave) = (translator.address(id)?, translator.way_out());
            if gpa != key.gpa {
                return None;
            }
            let cell = self.tlb.jump_cell(number, rip, leave)?;
            self.tlb.fill_cell(cell, privilege, number, rip, address);
        }
        let source = Source {
            block,
            guest: bytes,
            context,
            page: pieces.first()?.range.lo >> 12,
            unshared: false,
            wary: self.heat.is_misled((block.rip, number)),
            run_time: None,
        };
        self.translate_block(source).ok()
    }

    /// Decodes the instructions at `rips`, as far as a path may go.
    fn pieces(&mut self, rips: &[u64]) -> Option<Pieces> {
        let mut all = Pieces::default();
        while let Some(&rip) = rips.get(all.ops.len()) {
            if all.ops.last().is_some_and(|op| !may_go_on_at(op, rip)) {
                break;
            }
            let rest = &rips[all.ops.len()..];
            let Ok((gpa, true)) = self.translate_fetch(rip) else {
                break;
            };
            let mut bytes = [0; 256];
            let room = ((PAGE - (gpa & (PAGE - 1))) as usize).min(bytes.len());
            let bytes = &mut bytes[..room];
            if !self.surroundings.memory.read(gpa, bytes) {
                break;
            }
            let Ok(DecodeEnd::Block(block)) =
                decode(bytes, rip, Mode::Long64, &self.features, None, rest.len())
            else {
                // It crosses the page.
                break;
            };
            let (mut len, mut goes_on) = (0, true);
            for (op, &executed) in block.ops.into_iter().zip(rest) {
                if op.instruction.ip() != executed {
                    break;
                }
                len += usize::from(op.len);
                goes_on = may_be_followed(&op);
                all.ops.push(op);
                if !goes_on {
                    break;
                }
            }
            if len == 0 {
                break;
            }
            all.bytes.extend_from_slice(&bytes[..len]);
            let end = gpa + len as u64;
            match all.pieces.last_mut() {
                Some(last) if last.range.hi == gpa && gpa & (PAGE - 1) != 0 => last.range.hi = end,
                _ => all.pieces.push(Piece {
                    rip,
                    range: Range::new(gpa, end),
                }),
            }
            if !goes_on {
                break;
            }
        }
        (!all.ops.is_empty()).then_some(all)
    }
}

/// Whether execution may go on at `next` behind the operation.
fn may_go_on_at(op: &Op, next: u64) -> bool {
    let behind = next == op.instruction.next_ip();
    match op.kind {
        OpKind::Jump | OpKind::Call => next == op.target,
        OpKind::JumpIf(_) => behind || next == op.target,
        OpKind::JumpIndirect | OpKind::CallIndirect | OpKind::Return(_) => true,
        _ => behind,
    }
}

fn path_key(gpa: u64, rip: u64, context: Context) -> Key {
    Key {
        gpa,
        rip,
        mode: Mode::Long64,
        form: Form::Translated(context.number(), false),
    }
}
