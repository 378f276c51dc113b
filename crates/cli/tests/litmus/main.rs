//! Litmus tests of coherence among VCPUs: what guests must never see, by semantics of the traces.
//!
//! `guests/small/litmus.S` says what each test does. The time of each is short here; `ten_seconds`
//! takes longer and is asked for by hand.

mod guest;

use guest::{PASS, Run, run};

/// All tests, with the number of VCPUs they need.
const TESTS: [(&str, u32); 16] = [
    ("order", 2),
    ("halted", 2),
    ("chain", 3),
    ("chain_read", 3),
    ("chain_fresh", 3),
    ("mutual", 2),
    ("each_other", 2),
    ("crossing", 2),
    ("beside", 2),
    ("stores", 2),
    ("shared", 2),
    ("shared_code", 2),
    ("gdt", 2),
    ("idt", 2),
    ("shootdown", 2),
    ("present", 2),
];

/// Milliseconds for each test.
const SHORT: u32 = 150;

/// Runs all tests but those left out; none may see a violation, each must have had some rounds.
fn passes(vcpus: u32, milliseconds: u32, left_out: &[&str], options: &[&str]) -> Run {
    let names: Vec<_> = TESTS
        .iter()
        .filter(|(name, fewest)| *fewest <= vcpus && !left_out.contains(name))
        .map(|(name, _)| *name)
        .collect();
    let guest_options = format!("ms={milliseconds} test={}", names.join(","));
    let run = run(vcpus, &guest_options, options);
    assert_eq!(run.status, Some(PASS), "{}", run.text);
    let ran: Vec<_> = run.rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(ran, names, "{}", run.text);
    for row in &run.rows {
        assert!(!row.failed() && row.rounds > 0, "{row:?}\n{}", run.text);
    }
    run
}

#[test]
fn default_semantics_with_2_vcpus() {
    passes(2, SHORT, &[], &[]);
}

#[test]
fn default_semantics_with_4_vcpus() {
    let run = passes(4, SHORT, &[], &[]);
    // The tests have been about traces.
    assert!(run.total("code", "events") > 100, "{}", run.traces());
}

#[test]
fn default_semantics_with_8_vcpus() {
    passes(8, SHORT, &[], &[]);
}

#[test]
fn everyone_notified_with_4_vcpus() {
    let run = passes(4, SHORT, &[], &["--trace-notify", "all"]);
    let events = run.total("code", "events");
    let notifications = run.total("code", "notifications");
    assert_eq!(notifications, 4 * events, "{}", run.traces());
}

/// Bytes right before and right behind code that is executed all the while: no event.
#[test]
fn stores_beside_code_are_no_events() {
    let run = run(4, "test=beside ms=20000 rounds=100", &[]);
    assert_eq!(run.status, Some(PASS), "{}", run.text);
    let rounds = run.row("beside").rounds;
    assert!(rounds > 0, "{}", run.text);
    assert_eq!(run.total("code", "events"), 0, "{}", run.traces());
    // They were sensed, because their page has traces.
    let beside = run.traces()["beside"].as_u64().unwrap();
    assert!(beside >= rounds * 4 * 100, "{}", run.traces());
}

/// Each test ten seconds: `cargo test --release -p trapline --test litmus -- --ignored
/// --nocapture ten_seconds`.
#[test]
#[ignore = "takes minutes"]
fn ten_seconds() {
    for vcpus in [2, 3, 4, 8] {
        passes(vcpus, 10_000, &[], &[]);
    }
}
