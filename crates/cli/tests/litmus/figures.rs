//! Figures 3 and 4 of the seed, in a guest: VCPUs a to f have derived code from shared and from
//! overlapping ranges. Exactly the named consumers are notified, exactly once, and no bystander.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::guest::{PASS, image, run};

const A: u64 = 0;
const B: u64 = 1;
const C: u64 = 2;
const E: u64 = 4;

/// Figure 3: `[m1, m2)` is a's and c's, `[m3, m4)` is b's. Figure 4: `[m1, m3)` is a's, `[m2, m4)`
/// c's, `[m5, m6)` b's. The places are those of `guests/small/litmus/figures.inc`.
const PLACES: [(&str, &[u64]); 7] = [
    ("figure 3, [m1, m2)", &[A, C]),
    ("figure 3, [m3, m4)", &[B]),
    ("figure 4, [m1, m2)", &[A]),
    ("figure 4, [m2, m3)", &[A, C]),
    ("figure 4, [m3, m4)", &[C]),
    ("figure 4, [m4, m5)", &[]),
    ("figure 4, [m5, m6)", &[B]),
];

const ROUNDS: u64 = 10;

/// How many notifications of kind `code` each VCPU got of each event, by VCPU and sequence number.
fn notifications(events: &Value) -> BTreeMap<(u64, u64), u64> {
    let mut counts = BTreeMap::new();
    for event in events["traceEvents"].as_array().unwrap() {
        if event["name"] == "code notification" {
            // Track 1 is VCPU 0's.
            let vcpu = event["tid"].as_u64().unwrap() - 1;
            let sequence = event["args"]["sequence"].as_u64().unwrap();
            *counts.entry((vcpu, sequence)).or_default() += 1;
        }
    }
    counts
}

fn roles(actor: u64) {
    for (place, (name, consumers)) in PLACES.iter().enumerate() {
        let path = image().with_file_name(format!("events-{actor}-{place}.json"));
        let guest_options = format!("test=roles ms=60000 rounds={ROUNDS} at={place} actor={actor}");
        let run = run(6, &guest_options, &["--events", path.to_str().unwrap()]);
        assert_eq!(run.status, Some(PASS), "{}", run.text);
        assert_eq!(run.row("roles").rounds, ROUNDS);
        let context = format!("{name}, VCPU {actor} stores: {}", run.traces());

        let wanted = ROUNDS * consumers.len() as u64;
        assert_eq!(run.total("code", "notifications"), wanted, "{context}");

        let events: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        std::fs::remove_file(&path).unwrap();
        let counts = notifications(&events);
        assert!(counts.values().all(|&n| n == 1), "{context} {counts:?}");
        for vcpu in 0..6 {
            let notified = counts.keys().filter(|(v, _)| *v == vcpu).count() as u64;
            let wanted = ROUNDS * u64::from(consumers.contains(&vcpu));
            assert_eq!(notified, wanted, "VCPU {vcpu}: {context}");
        }
    }
}

#[test]
fn the_actor_is_another_vcpu() {
    roles(E);
}

#[test]
fn the_actor_is_a_consumer_of_some() {
    roles(A);
}
