//! The events of a file, as a test looks at them.

use std::collections::{BTreeSet, HashMap};

use serde_json::Value;

pub fn events(file: &Value) -> &[Value] {
    file["traceEvents"].as_array().unwrap()
}

pub fn of<'a>(file: &'a Value, category: &'a str) -> impl Iterator<Item = &'a Value> {
    let shown = |e: &&Value| matches!(e["ph"].as_str(), Some("X" | "i"));
    events(file)
        .iter()
        .filter(shown)
        .filter(move |e| e["cat"] == category)
}

/// The VCPU that an event is on, if it is on a VCPU.
pub fn vcpu(event: &Value) -> Option<u64> {
    let tid = event["tid"].as_u64().unwrap();
    (1..=64).contains(&tid).then(|| tid - 1)
}

/// Nanoseconds from microseconds.
fn nanoseconds(value: &Value) -> i64 {
    (value.as_f64().unwrap() * 1000.0).round() as i64
}

/// When an event began and ended.
pub fn span(event: &Value) -> (i64, i64) {
    let start = nanoseconds(&event["ts"]);
    let length = event.get("dur").map_or(0, nanoseconds);
    assert!(start >= 0 && length >= 0, "{event}");
    (start, start + length)
}

/// Checks that the spans of every track lie within each other or apart, as the format asks for.
pub fn check_nesting(file: &Value) {
    let mut tracks: HashMap<u64, Vec<(i64, i64)>> = HashMap::new();
    for event in events(file) {
        let phase = event["ph"].as_str().unwrap();
        assert!(["X", "i", "s", "f", "M"].contains(&phase), "{event}");
        if phase == "X" {
            let track = event["tid"].as_u64().unwrap();
            tracks.entry(track).or_default().push(span(event));
        }
    }
    for (track, mut spans) in tracks {
        spans.sort_by_key(|(start, end)| (*start, -*end));
        let mut open: Vec<(i64, i64)> = Vec::new();
        for (start, end) in spans {
            while open.last().is_some_and(|(_, outer)| *outer <= start) {
                open.pop();
            }
            if let Some((_, outer)) = open.last() {
                assert!(
                    end <= *outer,
                    "on track {track}, {start} to {end} reaches out of a span that ends at {outer}"
                );
            }
            open.push((start, end));
        }
    }
}

/// Checks that each consumer of each event was notified once and nobody else was; the last ones of
/// a VCPU may still have been in its queue at the end.
pub fn check_notifications(file: &Value) -> usize {
    let mut told: HashMap<u64, BTreeSet<u64>> = HashMap::new();
    let mut last: HashMap<u64, u64> = HashMap::new();
    for event in of(file, "notification") {
        let sequence = event["args"]["sequence"].as_u64().unwrap();
        let vcpu = vcpu(event).expect("only VCPUs are notified");
        assert!(
            told.entry(sequence).or_default().insert(vcpu),
            "twice: {event}"
        );
        let last = last.entry(vcpu).or_default();
        *last = sequence.max(*last);
    }
    let mut checked = 0;
    // Devices' registers are counted apart, and nobody is notified of them.
    let memory = |event: &&Value| event["args"]["kind"] != "device";
    for event in of(file, "actor").filter(memory) {
        let sequence = event["args"]["sequence"].as_u64().unwrap();
        let told = told.remove(&sequence).unwrap_or_default();
        let consumers: BTreeSet<u64> = event["args"]["consumers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap())
            .collect();
        assert!(told.is_subset(&consumers), "{event}: told {told:?}");
        for missing in consumers.difference(&told) {
            let end = last.get(missing).copied().unwrap_or(0);
            assert!(sequence > end, "{event}: VCPU {missing} was not told");
        }
        checked += told.len();
    }
    assert!(told.is_empty(), "notified of what nobody did: {told:?}");
    checked
}
