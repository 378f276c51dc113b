//! Paths: what is executed often is translated over several blocks, as it was executed once.
//!
//! Where polls find that the VCPU's attention is wanted is where it spends its time, so those
//! places are counted ([`Heat`]): timers and the like take samples that cost nothing. From a place
//! that was found often enough the stepping engine goes on for a while, and a [`Recorder`] notes
//! the instructions, from the innermost loop's start if it meets one. The path is derived from
//! them like a block from its bytes: all its pieces are protected, then read, and it goes with any
//! of them. It takes the place of the block at its start.

use std::rc::Rc;

use foldhash::{HashMap, HashSet};
use iced_x86::{FlowControl, Instruction};

use trapline_engine::decode::block::may_be_followed;
use trapline_engine::decode::{Block, DecodeEnd, Op, OpKind, decode};
use trapline_engine::translate::{BlockId, Context, Source};
use trapline_trace::{Range, TraceId};
use trapline_x86::Mode;

use crate::code_cache::{CachedBlock, Form, Key};
use crate::fetch::Wanted;
use crate::translated::From;
use crate::vcpu::Vcpu;

/// Samples at a place that make it hot.
const HOT: u8 = 2;
/// Places that are counted at once.
const PLACES: usize = 256;
/// How often a path is recorded from one place, however often it is lost.
const ATTEMPTS: u8 = 8;
/// Places whose attempts are remembered: then all are forgotten.
const MOST: usize = 1 << 14;
/// Instructions of a path: bounds the time between two polls.
const LONGEST: usize = 64;
/// Instructions that are stepped to record one.
const PATIENCE: usize = 256;
const PAGE: u64 = 4096;

/// Where: RIP, and the context's number.
type Place = (u64, u8);

#[derive(Clone, Copy, Default)]
struct Count {
    place: Place,
    samples: u8,
}

/// Where time is spent.
pub(crate) struct Heat {
    counts: Box<[Count; PLACES]>,
    attempts: HashMap<Place, u8>,
    /// Where paths start that were made, and whether they lead back there.
    heads: HashMap<Place, bool>,
    /// Where loops start that were once led elsewhere by what their registers held.
    misled: HashSet<Place>,
    /// The place from which a path is to be recorded when it is next come to.
    wanted: Option<Place>,
}

impl Default for Heat {
    fn default() -> Self {
        Self {
            counts: Box::new([Count::default(); PLACES]),
            attempts: HashMap::default(),
            heads: HashMap::default(),
            misled: HashSet::default(),
            wanted: None,
        }
    }
}

impl Heat {
    /// Notes that the VCPU was found here.
    pub fn note(&mut self, rip: u64, context: u8) {
        let place = (rip, context);
        let count = &mut self.counts[(rip ^ rip >> 8) as usize % PLACES];
        if count.place != place {
            // What is found more often stays.
            if count.samples > 0 {
                count.samples -= 1;
            } else {
                *count = Count { place, samples: 1 };
            }
            return;
        }
        count.samples = (count.samples + 1).min(HOT);
        let tried = self.attempts.get(&place).copied().unwrap_or(0);
        if count.samples == HOT && tried < ATTEMPTS && !self.heads.contains_key(&place) {
            self.wanted = Some(place);
        }
    }

    /// A recorder if a path is to be recorded from here; it is not any more when asked again.
    #[inline]
    pub fn take_wanted(&mut self, rip: u64, context: u8) -> Option<Recorder> {
        if self.wanted != Some((rip, context)) {
            return None;
        }
        self.wanted = None;
        if self.attempts.len() >= MOST {
            self.attempts.clear();
        }
        let attempts = self.attempts.entry((rip, context)).or_default();
        *attempts += 1;
        Some(Recorder::new(rip, *attempts == ATTEMPTS))
    }

    fn is_loop(&self, place: Place) -> bool {
        self.heads.get(&place) == Some(&true)
    }

    fn add_head(&mut self, place: Place, is_loop: bool) {
        if self.heads.len() >= MOST {
            self.heads.clear();
        }
        self.heads.insert(place, is_loop);
    }

    /// A path from here will not be possible for long.
    fn give_up(&mut self, place: Place) {
        self.attempts.insert(place, ATTEMPTS);
    }

    /// The path of the loop that starts here was led elsewhere.
    fn add_misled(&mut self, place: Place) {
        if self.misled.len() >= MOST {
            self.misled.clear();
        }
        self.misled.insert(place);
    }

    /// There is no path here (any more).
    pub fn lost(&mut self, rip: u64, context: u8) {
        self.heads.remove(&(rip, context));
    }

    /// All paths are gone.
    pub fn all_lost(&mut self) {
        self.heads.clear();
    }
}

/// What noting an instruction means for a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    GoesOn,
    /// It has come back to its start.
    Loop,
    /// It has come to a loop that has a path.
    ToLoop,
    /// It leads on and on.
    TooLong,
    /// Something came in between.
    Broken,
}

/// A path that is being recorded.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// Where its instructions are.
    rips: Vec<u64>,
    /// Where recording began.
    from: u64,
    next: u64,
    /// The last instruction was a branch of any kind; and one before it was.
    branches: bool,
    branched: bool,
    /// A path that is no loop will do.
    straight: bool,
}

impl Recorder {
    pub fn new(head: u64, straight: bool) -> Self {
        Self {
            rips: Vec::new(),
            from: head,
            next: head,
            branches: false,
            branched: false,
            straight,
        }
    }

    /// Notes an instruction that was executed, `next` being RIP behind it.
    pub fn note(
        &mut self,
        instruction: &Instruction,
        next: u64,
        is_loop: impl Fn(u64) -> bool,
    ) -> Progress {
        let rip = instruction.ip();
        if rip != self.next {
            return Progress::Broken;
        }
        self.next = next;
        // A repeated one is executed several times.
        if self.rips.last() != Some(&rip) {
            self.rips.push(rip);
            self.branched |= self.branches;
            self.branches = instruction.flow_control() != FlowControl::Next;
        }
        let direct = matches!(
            instruction.flow_control(),
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
        );
        if next == rip {
            return Progress::GoesOn;
        }
        if self.rips.first() == Some(&next) {
            return Progress::Loop;
        }
        // What is no more than a block is left to blocks: it may be the start of a loop around that one.
        if self.branched && is_loop(next) {
            return Progress::ToLoop;
        }
        if self.rips.len() >= LONGEST {
            return Progress::TooLong;
        }
        if direct && next < rip && next == instruction.near_branch_target() {
            if is_loop(next) {
                return Progress::Broken;
            }
            // A loop: only what is in it.
            self.rips.clear();
            (self.branches, self.branched) = (false, false);
        }
        Progress::GoesOn
    }
}

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
            wary: self.heat.misled.contains(&(block.rip, number)),
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

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    /// nop, nop, dec ecx, jnz to the first, nop, ret; each at its offset from 0x1000.
    const CODE: [u8; 8] = [0x90, 0x90, 0xff, 0xc9, 0x75, 0xfa, 0x90, 0xc3];

    fn at(rip: u64) -> Instruction {
        let bytes = &CODE[(rip - 0x1000) as usize..];
        Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE).decode()
    }

    /// What the last instruction meant.
    fn record(recorder: &mut Recorder, rips: &[u64], is_loop: impl Fn(u64) -> bool) -> Progress {
        let mut progress = Progress::GoesOn;
        for pair in rips.windows(2) {
            assert_eq!(progress, Progress::GoesOn);
            progress = recorder.note(&at(pair[0]), pair[1], &is_loop);
        }
        progress
    }

    const TURN: [u64; 5] = [0x1000, 0x1001, 0x1002, 0x1004, 0x1000];

    #[test]
    fn a_loop_ends_where_it_starts() {
        let mut recorder = Recorder::new(0x1000, false);
        let progress = record(&mut recorder, &TURN, |_| false);
        assert_eq!((progress, &recorder.rips[..]), (Progress::Loop, &TURN[..4]));
    }

    #[test]
    fn what_leads_into_a_loop_is_left_out() {
        let mut recorder = Recorder::new(0x1002, false);
        let mut way = vec![0x1002, 0x1004];
        way.extend(TURN);
        let progress = record(&mut recorder, &way, |_| false);
        assert_eq!((progress, &recorder.rips[..]), (Progress::Loop, &TURN[..4]));
    }

    #[test]
    fn a_path_ends_where_a_loop_begins() {
        let mut recorder = Recorder::new(0x1004, false);
        let progress = record(&mut recorder, &[0x1004, 0x1006, 0x1007, 0x1000], |rip| {
            rip == 0x1000
        });
        assert_eq!(progress, Progress::ToLoop);
        assert_eq!(recorder.rips, [0x1004, 0x1006, 0x1007]);
    }

    #[test]
    fn a_block_that_leads_to_a_loop_may_be_in_one_around_it() {
        let mut recorder = Recorder::new(0x1000, false);
        // Once through the inner loop, which begins at 0x1001, and back.
        let way = [0x1000, 0x1001, 0x1002, 0x1004, 0x1006, 0x1007, 0x1000];
        let progress = record(&mut recorder, &way, |rip| rip == 0x1001);
        assert_eq!((progress, &recorder.rips[..]), (Progress::Loop, &way[..6]));
    }

    #[test]
    fn a_loop_that_has_a_path_is_not_recorded_again() {
        let mut recorder = Recorder::new(0x1002, false);
        let progress = record(&mut recorder, &[0x1002, 0x1004, 0x1000], |rip| {
            rip == 0x1000
        });
        assert_eq!(progress, Progress::Broken);
    }

    #[test]
    fn an_interruption_breaks_it() {
        let mut recorder = Recorder::new(0x1000, false);
        recorder.note(&at(0x1000), 0x1001, |_| false);
        let progress = recorder.note(&at(0x1002), 0x1004, |_| false);
        assert_eq!(progress, Progress::Broken);
    }

    #[test]
    fn it_is_not_longer_than_time_between_polls_may_be() {
        let mut recorder = Recorder::new(0x1000, false);
        let straight: Vec<u64> = (0..LONGEST as u64 + 1).collect();
        let mut last = Progress::GoesOn;
        let mut nop = at(0x1000);
        for pair in straight.windows(2) {
            nop.set_ip(0x1000 + pair[0]);
            last = recorder.note(&nop, 0x1000 + pair[1], |_| false);
        }
        assert_eq!(last, Progress::TooLong);
    }

    #[test]
    fn a_repeated_instruction_is_noted_once() {
        let mut recorder = Recorder::new(0x1000, false);
        for _ in 0..3 {
            assert_eq!(
                recorder.note(&at(0x1000), 0x1000, |_| false),
                Progress::GoesOn
            );
        }
        recorder.note(&at(0x1000), 0x1001, |_| false);
        assert_eq!(recorder.rips, [0x1000]);
    }

    #[test]
    fn places_become_hot_and_are_tried_a_few_times() {
        let mut heat = Heat::default();
        heat.note(0x1000, 1);
        assert!(heat.take_wanted(0x1000, 1).is_none());
        for attempt in 1..=ATTEMPTS {
            heat.note(0x1000, 1);
            assert!(heat.take_wanted(0x1000, 2).is_none());
            let recorder = heat.take_wanted(0x1000, 1).unwrap();
            assert_eq!(recorder.straight, attempt == ATTEMPTS);
            assert!(heat.take_wanted(0x1000, 1).is_none());
        }
        heat.note(0x1000, 1);
        assert!(heat.take_wanted(0x1000, 1).is_none());
    }

    #[test]
    fn a_place_with_a_path_is_not_wanted_until_it_is_lost() {
        let mut heat = Heat::default();
        heat.add_head((0x1000, 1), true);
        assert!(heat.is_loop((0x1000, 1)) && !heat.is_loop((0x1000, 2)));
        for _ in 0..5 {
            heat.note(0x1000, 1);
        }
        assert!(heat.take_wanted(0x1000, 1).is_none());
        heat.lost(0x1000, 1);
        heat.note(0x1000, 1);
        assert!(heat.take_wanted(0x1000, 1).is_some());
    }

    #[test]
    fn what_is_found_more_often_stays_counted() {
        let mut heat = Heat::default();
        heat.note(0x1000, 1);
        // The same slot, once each.
        heat.note(0x1000, 2);
        heat.note(0x1000, 1);
        heat.note(0x1000, 1);
        assert!(heat.take_wanted(0x1000, 1).is_some());
    }
}
