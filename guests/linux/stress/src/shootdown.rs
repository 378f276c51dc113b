//! Mappings that change while other threads use them.
//!
//! One thread takes a range through phases: a page of a file, read-only, without access, unmapped,
//! another page, and so on. The number of the phase is odd while it changes. A thread that reads
//! the same even number before and after its access must have got what that phase allows: this
//! page's content, a store that succeeds, or a fault. Each phase lasts until every thread has
//! accessed the range in it, so all have its translation cached when it ends.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Load;
use crate::bracket::{Line, Outcome, Verdict, mix};
use crate::os::{self, Mapping};

/// What the range is in a phase.
#[derive(Clone, Copy, PartialEq)]
enum State {
    /// Page `phase % PAGES` of the file, readable and writable.
    Writable,
    /// The same page as in the phase before, read-only by mprotect.
    ReadOnly,
    /// The same page, without access by mprotect.
    NoAccess,
    /// Nothing.
    Unmapped,
}

const STATES: [State; 6] = [
    State::Writable,
    State::ReadOnly,
    State::NoAccess,
    State::Writable,
    State::Unmapped,
    State::Writable,
];

/// Pages of the file; consecutive mappings use different ones.
const PAGES: usize = 7;

fn state(phase: u32) -> State {
    STATES[phase as usize % STATES.len()]
}

/// The phase in which the page that is mapped in this phase was mapped.
fn mapped_in(phase: u32) -> u32 {
    (0..=phase)
        .rev()
        .find(|&p| state(p) == State::Writable)
        .unwrap_or(0)
}

/// The word at the start of the page that was mapped in this phase.
fn stamp(phase: u32) -> u64 {
    mix(u64::from(mapped_in(phase)))
}

pub fn run(load: Load) -> Result<Outcome, String> {
    let trouble = |error| format!("the system refused a mapping: {error}");
    let file = os::memory_file(PAGES).map_err(trouble)?;
    let back = Mapping::shared(&file, 0, PAGES, os::READ | os::WRITE).map_err(trouble)?;
    let range = Mapping::shared(&file, 0, 1, os::READ | os::WRITE).map_err(trouble)?;
    let verdict = Verdict::default();
    let clock = Line(AtomicU32::new(1));
    let seen: Vec<Line<AtomicU32>> = (1..load.threads).map(|_| Line::default()).collect();
    let end = load.rounds.saturating_mul(2).saturating_add(2);

    std::thread::scope(|scope| {
        for (thread, seen) in seen.iter().enumerate() {
            let (range, clock, verdict) = (&range, &clock.0, &verdict);
            scope.spawn(move || user(thread, range, clock, &seen.0, end, verdict));
        }
        for phase in 0..load.rounds {
            if let Err(error) = enter(phase, &range, &back, &file) {
                verdict.fail(format!("phase {phase}: {error}"));
                break;
            }
            let now = 2 * (phase + 1);
            clock.0.store(now, Ordering::Release);
            let all = || seen.iter().all(|s| s.0.load(Ordering::Acquire) == now);
            if !verdict.wait(all) {
                break;
            }
            if state(phase) == State::ReadOnly && !is_still(&back, phase) {
                verdict.fail(format!(
                    "a store reached the page after mprotect, phase {phase}"
                ));
                break;
            }
            clock.0.store(now + 1, Ordering::SeqCst);
        }
        clock.0.store(end, Ordering::SeqCst);
    });
    let sum = (0..load.rounds).fold(0, |sum, phase| mix(sum ^ stamp(phase)));
    verdict.finish(sum)
}

/// Changes the range to what it is in the phase.
fn enter(phase: u32, range: &Mapping, back: &Mapping, file: &OwnedFd) -> std::io::Result<()> {
    match state(phase) {
        State::Writable => {
            let page = phase as usize % PAGES;
            os::try_store(back.at(page * os::PAGE), stamp(phase));
            range.replace(file, page, os::READ | os::WRITE)
        }
        State::ReadOnly => range.protect(os::READ),
        State::NoAccess => range.protect(os::NONE),
        State::Unmapped => range.unmap(),
    }
}

/// Whether the words that the users store stay as they are for a while.
fn is_still(back: &Mapping, phase: u32) -> bool {
    let page = mapped_in(phase) as usize % PAGES * os::PAGE;
    let words = || [1, 2, 3, 4].map(|line| os::try_load(back.at(page + line * 64)));
    let before = words();
    (0..200).all(|_| words() == before)
}

/// A thread that uses the range all the time.
fn user(
    thread: usize,
    range: &Mapping,
    clock: &AtomicU32,
    seen: &AtomicU32,
    end: u32,
    verdict: &Verdict,
) {
    let word = range.at((thread % 4 + 1) * 64);
    let mut count = 0;
    loop {
        let before = clock.load(Ordering::Acquire);
        if before == end || verdict.has_failed() {
            return;
        }
        let value = os::try_load(range.at(0));
        let read_at = clock.load(Ordering::Acquire);
        count += 1;
        let stored = os::try_store(word, count);
        let after = clock.load(Ordering::Acquire);
        if !before.is_multiple_of(2) {
            os::give_way();
            continue;
        }
        let phase = before / 2 - 1;
        let state = state(phase);
        let readable = matches!(state, State::Writable | State::ReadOnly);
        let expected = readable.then(|| stamp(phase));
        if before == read_at && value != expected {
            verdict.fail(format!(
                "phase {phase}: read {value:x?} and must read {expected:x?}"
            ));
        }
        if before == after {
            if stored != (state == State::Writable) {
                verdict.fail(format!("phase {phase}: a store that succeeds: {stored}"));
            }
            seen.store(before, Ordering::Release);
            if !readable {
                os::give_way();
            }
        }
    }
}
