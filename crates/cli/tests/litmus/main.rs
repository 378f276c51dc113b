//! Litmus tests of coherence among VCPUs: what guests must never see, by semantics of the traces.
//!
//! `guests/small/litmus.S` says what each test does. The time of each is short here; `ten_seconds`
//! takes longer and is asked for by hand.

mod figures;
mod guest;
#[path = "../support/mod.rs"]
mod support;

use guest::{FAIL, PASS, Run, run};

/// All tests, with the number of VCPUs they need.
const TESTS: [(&str, u32); 23] = [
    ("order", 2),
    ("halted", 2),
    ("chain", 3),
    ("chain_read", 3),
    ("chain_fresh", 3),
    ("mutual", 2),
    ("each_other", 2),
    ("restart", 3),
    ("crossing", 2),
    ("beside", 2),
    ("stores", 2),
    ("shared", 2),
    ("shared_code", 2),
    ("accessed", 2),
    ("pushed", 2),
    ("gdt", 2),
    ("idt", 2),
    ("ldt", 2),
    ("tss", 2),
    ("shootdown", 2),
    ("present", 2),
    ("dma_code", 2),
    ("dma_paging", 2),
];
/// Those that need causality: a VCPU hears of new bytes from one that is not their writer. Only
/// bracketing promises it (\[0087\] of the seed).
const CAUSAL: [&str; 3] = ["chain", "chain_read", "chain_fresh"];

/// Milliseconds for each test.
const SHORT: u32 = 100;

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

/// As [`passes`], on 2, 4 and 8 VCPUs; the last run.
fn passes_on_all(left_out: &[&str], options: &[&str]) -> Run {
    passes(2, SHORT, left_out, options);
    passes(8, SHORT, left_out, options);
    passes(4, SHORT, left_out, options)
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
fn everyone_notified() {
    let run = passes_on_all(&[], &["--trace-notify", "all"]);
    let events = run.total("code", "events");
    let notifications = run.total("code", "notifications");
    assert_eq!(notifications, 4 * events, "{}", run.traces());
}

#[test]
fn everything_bracketing() {
    passes_on_all(&[], &["--trace-semantics", "all=bracketing"]);
}

/// Whoever hands over behind the write is waited for: only causality through others is lost.
#[test]
fn everything_post_write_sync() {
    passes_on_all(&CAUSAL, &["--trace-semantics", "all=post-write-sync"]);
}

/// Whether the guest sees violations within some tries, and it says so by its exit status.
///
/// An old opcode may meet a new operand, which is read at run time: then it leads anywhere, and the
/// guest ends with an exception that it did not expect.
fn violates(test: &str, options: &[&str]) -> bool {
    (0..5).any(|_| {
        let guest_options = format!("test={test} ms=1000 patience=5000");
        let run = run(4, &guest_options, options);
        let astray = format!("litmus {test}: FAIL unexpected exception");
        if run.text.contains(&astray) {
            return true;
        }
        let failed = run.row(test).failed();
        assert_eq!(run.status, Some(if failed { FAIL } else { PASS }));
        run.row(test).violations > 0
    })
}

/// The tests can fail: with semantics too weak for code, and notifications that take a while, the
/// old code runs.
#[test]
fn asynchronous_notifications_of_code_are_too_weak() {
    let weak = [
        "--trace-semantics",
        "code=post-write-async",
        "--debug-notice-delay",
        "code=500",
    ];
    for test in ["order", "chain_read"] {
        assert!(violates(test, &weak), "{test} saw nothing");
    }
}

/// So can those of descriptor tables: what a shadow says is old.
#[test]
fn asynchronous_notifications_of_descriptors_are_too_weak() {
    let weak = [
        "--trace-semantics",
        "descriptor=post-write-async",
        "--debug-notice-delay",
        "descriptor=500",
    ];
    for test in ["gdt", "idt"] {
        assert!(violates(test, &weak), "{test} saw nothing");
    }
}

/// The seed's argument for bracketing (\[0087\]): behind a write whose notifications are still
/// under way, a third VCPU hears of the new bytes from a second one.
#[test]
fn synchronous_notifications_of_code_are_too_weak_for_three() {
    let sync = [
        "--trace-semantics",
        "code=post-write-sync",
        "--debug-notice-delay",
        "code=500",
    ];
    assert!(violates("chain_read", &sync), "chain_read saw nothing");
    // For two they are strong enough, however long they take.
    let run = run(4, "test=order ms=300", &sync);
    assert_eq!(run.status, Some(PASS), "{}", run.text);
}

/// Page tables bear it: a guest flushes, and a flush waits for what is under way (\[0085\]).
#[test]
fn asynchronous_notifications_of_page_tables_are_strong_enough() {
    let paging = ["shootdown", "present", "dma_paging"];
    let names = TESTS.iter().map(|(name, _)| *name);
    let others: Vec<_> = names.filter(|name| !paging.contains(name)).collect();
    let options = [
        "--trace-semantics",
        "mmu=post-write-async",
        "--debug-notice-delay",
        "mmu=500",
    ];
    passes(4, 3 * SHORT, &others, &options);
}

/// Bracketing takes the same delay without harm.
#[test]
fn bracketing_bears_a_delay() {
    passes(4, SHORT, &[], &["--debug-notice-delay", "all=200"]);
}

/// Stores right before and right behind code that is executed all the while are no events; how many
/// of them were sensed, and how many there were.
fn stores_beside_code(options: &[&str]) -> (u64, u64) {
    let run = run(4, "test=beside ms=20000 rounds=100", options);
    assert_eq!(run.status, Some(PASS), "{}", run.text);
    let rounds = run.row("beside").rounds;
    assert!(rounds > 0, "{}", run.text);
    assert_eq!(run.total("code", "events"), 0, "{}", run.traces());
    let sensed = run.traces()["beside"].as_u64().unwrap();
    (sensed, rounds * 4 * 100)
}

/// Each is sensed, because its page has traces.
#[test]
fn stores_beside_code_are_no_events() {
    let (sensed, stores) = stores_beside_code(&["--engine", "step"]);
    assert!(sensed >= stores, "{sensed} of {stores}");
}

/// Those that are made again and again are sensed until they become direct.
#[test]
fn stores_beside_translated_code_become_direct() {
    let (sensed, stores) = stores_beside_code(&[]);
    assert!(sensed > 0 && sensed < stores / 10, "{sensed} of {stores}");
}

/// Each test ten seconds, on every number of VCPUs: `cargo test --release --package trapline --test
/// litmus -- --ignored --nocapture`.
#[test]
#[ignore = "takes a quarter of an hour"]
fn ten_seconds() {
    for vcpus in [2, 3, 4, 8] {
        passes(vcpus, 10_000, &[], &[]);
    }
}
