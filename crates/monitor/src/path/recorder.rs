//! Notes what is executed, for a path.

use iced_x86::{FlowControl, Instruction};

/// Instructions of a path: bounds the time between two polls.
const LONGEST: usize = 64;

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
    pub rips: Vec<u64>,
    /// Where recording began.
    pub from: u64,
    next: u64,
    /// The last instruction was a branch of any kind; and one before it was.
    branches: bool,
    branched: bool,
    /// A path that is no loop will do.
    pub straight: bool,
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
}
