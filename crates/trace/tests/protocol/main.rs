//! A model of the protocol, explored in full: three VCPUs, two regions, all semantics of each.
//!
//! It covers invariants 2 to 7 of the design brief and freedom from deadlock; the checks of
//! `tests/models` cover the code itself, but only some of its schedules. For every step that a
//! mutation leaves out, the exploration must find a violation of the invariant that needs it.
//!
//! The explorer is our own ([`explore`]): the protocol needs breadth-first search and nothing else.
#![cfg(not(feature = "shuttle"))]

mod explore;
mod model;

use std::collections::BTreeSet;

use explore::explore;
use model::{Instruction, Mutation, Protocol, REGIONS, SEMANTICS, Semantics, VCPUS};

use Instruction::{Execute, Halt, Look, Write};

type Programs = [&'static [Instruction]; VCPUS];

const FIRST: Instruction = Write([true, false]);
const SECOND: Instruction = Write([false, true]);
const BOTH: Instruction = Write([true, true]);

/// A bystander and a consumer of each region watch one write of both.
const CHAIN: Programs = [&[BOTH, Execute], &[Execute, Execute], &[Look(0), Execute]];
/// Actors on each other's regions.
const CROSSING: Programs = [&[SECOND, Execute], &[FIRST, Execute], &[BOTH, Execute]];
/// Sleepers, one of which becomes an actor.
const SLEEPERS: Programs = [&[FIRST, BOTH], &[Halt, Execute], &[Halt, SECOND, Execute]];
/// Two writes of one region by different VCPUs, seen by a consumer and the bystander.
const SUCCESSION: Programs = [&[FIRST, Look(0)], &[Execute, Execute], &[FIRST, Look(0)]];
/// One actor that acts again at once.
const ROW: Programs = [&[SECOND, SECOND], &[Execute, Execute], &[Execute]];

const ALL: [Programs; 5] = [ROW, SUCCESSION, SLEEPERS, CHAIN, CROSSING];

fn protocol(semantics: [Semantics; REGIONS], programs: Programs) -> Protocol {
    Protocol {
        semantics,
        programs,
        mutation: None,
        demand_causality: false,
    }
}

fn every_semantics() -> impl Iterator<Item = [Semantics; REGIONS]> {
    let pairs = |first| SEMANTICS.into_iter().map(move |second| [first, second]);
    SEMANTICS.into_iter().flat_map(pairs)
}

#[test]
fn every_state_of_every_semantics_is_sound() {
    let mut states = 0;
    for semantics in every_semantics() {
        for programs in ALL {
            let model = protocol(semantics, programs);
            match explore(&model, model.start()) {
                Ok(count) => states += count,
                Err(wrong) => panic!("{semantics:?}, {programs:?}: {wrong}"),
            }
        }
    }
    println!("{states} states");
    assert!(states > 100_000, "only {states} states were explored");
}

/// With this step left out, some program under some semantics violates this invariant.
fn breaks(mutation: Mutation, invariant: &str) {
    let mut others = BTreeSet::new();
    for programs in ALL {
        for semantics in every_semantics() {
            let model = Protocol {
                mutation: Some(mutation),
                ..protocol(semantics, programs)
            };
            if let Err(wrong) = explore(&model, model.start()) {
                if wrong.starts_with(invariant) {
                    return;
                }
                others.extend(wrong.lines().next().map(str::to_owned));
            }
        }
    }
    panic!("{mutation:?} does not break `{invariant}`, but {others:?}");
}

#[test]
fn invariant_2_needs_the_stall() {
    breaks(Mutation::ResumeEarly, "2:");
}

#[test]
fn invariant_2_needs_the_wait_for_the_stall() {
    breaks(Mutation::WriteWithoutWaiting, "2:");
}

#[test]
fn invariant_4_needs_the_bracket_before_the_write() {
    breaks(Mutation::WaitAfterWrite, "4:");
}

#[test]
fn invariant_3_needs_the_wait_after_the_write() {
    breaks(Mutation::GoOnWithoutWaiting, "3:");
}

#[test]
fn invariant_3_needs_the_notice_after_the_write() {
    breaks(Mutation::NotifyBeforeWrite, "3:");
}

#[test]
fn invariant_5_needs_one_notice_for_each_consumer() {
    breaks(Mutation::NotifyTwice, "5:");
    breaks(Mutation::NotifyBystanders, "5:");
    breaks(Mutation::LoseNotice, "5:");
}

#[test]
fn invariant_6_needs_the_run_state() {
    breaks(Mutation::WaitForSleepers, "6 and 7:");
}

#[test]
fn invariant_6_needs_the_look_after_waking() {
    breaks(Mutation::WakeWithoutLooking, "3:");
}

#[test]
fn invariant_7_needs_waiting_at_a_boundary() {
    breaks(Mutation::WaitRunning, "6 and 7:");
}

#[test]
fn invariant_7_needs_the_second_look() {
    breaks(Mutation::ForgetRequest, "7: a request");
}

#[test]
fn invariant_7_needs_the_lane() {
    breaks(Mutation::NoLane, "7:");
}

#[test]
fn pre_write_value_needs_the_notice_before_the_write() {
    breaks(Mutation::NotifyAfterWrite, "pre-write:");
}

/// An instruction that waited for the lane may be derived from what changed meanwhile.
#[test]
fn an_instruction_that_waited_needs_the_restart() {
    breaks(Mutation::NoRestart, "3:");
}

/// \[0087\]: post-write-sync does not keep a consumer's old code from meeting what a bystander did
/// with the new; bracketing does.
#[test]
fn causality_needs_bracketing() {
    for (semantics, holds) in [
        (Semantics::Bracketing, true),
        (Semantics::Sync, false),
        (Semantics::Async, false),
    ] {
        let model = Protocol {
            demand_causality: true,
            ..protocol([semantics, Semantics::Async], CHAIN)
        };
        let verdict = explore(&model, model.start());
        // The second region is not looked at, so it cannot be what fails.
        assert_eq!(verdict.is_ok(), holds, "{semantics:?}: {verdict:?}");
    }
}
