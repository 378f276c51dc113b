//! The report as one page for browsers. It holds its data, style and program itself and asks for
//! nothing from anywhere.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};
use trapline_trace::{Kind, Semantics};

use super::events_file::{Category, Event, Events};
use super::measures::{self, Waits};
use super::roles::{self, Roles};
use super::text::{range, time};

const PAGE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
const PROGRAM: [&str; 3] = [
    include_str!("page/timeline.js"),
    include_str!("page/memory.js"),
    include_str!("page/page.js"),
];

/// The most events in a page: what a browser draws without tiring its user.
const MOST_EVENTS: usize = 1_000_000;
/// Rows of the tables.
const ROWS: usize = 50;

/// The page.
pub fn page(source: &Path, events: &Events) -> String {
    // Inside a script element no other character ends the data.
    let data = data(source, events).to_string().replace('<', "\\u003c");
    // Into pieces of the page, so that nothing in one insertion is taken for the next one's place.
    let mut page = String::with_capacity(data.len() + 100_000);
    let mut rest = PAGE;
    for (place, content) in [
        ("/* style */", STYLE),
        ("{\"data\":0}", data.as_str()),
        ("/* program */", &PROGRAM.join("\n")),
    ] {
        if let Some((before, after)) = rest.split_once(place) {
            page.push_str(before);
            page.push_str(content);
            rest = after;
        }
    }
    page.push_str(rest);
    page
}

fn words<T: ToString>(all: impl IntoIterator<Item = T>) -> Vec<String> {
    all.into_iter().map(|word| word.to_string()).collect()
}

fn words_or_none<T: ToString>(all: impl IntoIterator<Item = T>) -> Vec<String> {
    std::iter::once("none".to_owned())
        .chain(words(all))
        .collect()
}

/// What the page's program reads. Numbers that stand for words count in the lists given with them;
/// of kinds and semantics, 0 stands for none.
fn data(source: &Path, file: &Events) -> Value {
    let kept = kept(file);
    let name = source.file_name().unwrap_or(source.as_os_str());
    json!({
        "source": name.to_string_lossy(),
        "tool": file.tool,
        "vcpus": file.vcpus,
        "memory": file.memory_bytes,
        "dropped": file.dropped,
        "stopped": file.stopped,
        "total": file.events.len(),
        "omitted": file.events.len() - kept.len(),
        "end": file.end(),
        "tracks": file.tracks(),
        "categories": words(Category::ALL.map(|(_, name)| name)),
        "kinds": words_or_none(Kind::ALL),
        "semantics": words_or_none(Semantics::ALL),
        "events": columns(&kept),
        "totals": totals(file),
        "roles": role_table(file),
        "regions": regions(file),
        "waits": measures::waits(file).iter().map(waits).collect::<Vec<_>>(),
    })
}

/// The events that go into the page: where they are too many, those that only say where traces
/// are go first, and then the latest.
fn kept(file: &Events) -> Vec<&Event> {
    let all: Vec<&Event> = file.events.iter().collect();
    if all.len() <= MOST_EVENTS {
        return all;
    }
    let says_where = |e: &&Event| matches!(e.category, Category::Establish | Category::Remove);
    let mut kept: Vec<&Event> = all.into_iter().filter(|e| !says_where(e)).collect();
    kept.truncate(MOST_EVENTS);
    kept
}

/// The events, a list for each field: starts as differences from the one before.
fn columns(events: &[&Event]) -> Value {
    let mut sets: Vec<Vec<usize>> = Vec::new();
    let mut numbers: HashMap<u64, usize> = HashMap::new();
    let set: Vec<usize> = events
        .iter()
        .map(|event| {
            *numbers.entry(event.consumers.bits()).or_insert_with(|| {
                sets.push(event.consumers.iter().map(|v| v.index()).collect());
                sets.len() - 1
            })
        })
        .collect();
    let mut before = 0;
    let start: Vec<u64> = events
        .iter()
        .map(|event| event.start - std::mem::replace(&mut before, event.start))
        .collect();
    let column = |of: &dyn Fn(&Event) -> u64| events.iter().map(|e| of(e)).collect::<Vec<_>>();
    let lo = |range: Option<trapline_trace::Range>| range.map_or(0, |r| r.lo);
    let size = |range: Option<trapline_trace::Range>| range.map_or(0, |r| r.hi - r.lo);
    json!({
        "start": start,
        "length": column(&|e| e.length),
        "track": column(&|e| e.track.into()),
        "category": column(&|e| e.category as u64),
        "kind": column(&|e| e.kind.map_or(0, |k| k as u64 + 1)),
        "semantics": column(&|e| e.semantics.map_or(0, |s| s as u64 + 1)),
        "read": column(&|e| e.read.into()),
        "lo": column(&|e| lo(e.range)),
        "size": column(&|e| size(e.range)),
        "regionLo": column(&|e| lo(e.region)),
        "regionSize": column(&|e| size(e.region)),
        // One more, so that 0 stands for none.
        "sequence": column(&|e| e.sequence.map_or(0, |s| s.saturating_add(1))),
        "set": set,
        "sets": sets,
        "awaited": column(&|e| e.awaited.len() as u64),
        "waited": column(&|e| e.waited),
        "count": column(&|e| e.count),
    })
}

/// A table: its head and its rows.
fn table(head: &[&str], rows: Vec<Vec<String>>, others: usize) -> Value {
    json!({ "head": head, "rows": rows, "others": others })
}

fn totals(file: &Events) -> Value {
    let rows = measures::kinds(file).into_iter().map(|k| {
        vec![
            k.kind.to_string(),
            k.semantics.to_string(),
            k.events.to_string(),
            k.notifications.to_string(),
            k.awaited.to_string(),
            k.invalidated.to_string(),
        ]
    });
    let head = [
        "Kind",
        "Semantics",
        "Events",
        "Notified",
        "Waited for",
        "Invalidated",
    ];
    table(&head, rows.collect(), 0)
}

fn role_table(file: &Events) -> Value {
    let roles = |r: &Roles| json!([r.actor, r.consumer, r.bystander]);
    let (rows, others) = roles::busiest(roles::table(file), ROWS);
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "range": range(row.range),
                "kinds": words(&row.kinds),
                "accesses": row.accesses,
                "roles": row.roles.iter().map(roles).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({ "rows": rows, "others": others })
}

fn regions(file: &Events) -> Value {
    let all = measures::regions(file);
    let rows = all.iter().take(ROWS).map(|(region, kind, t)| {
        vec![
            range(*region),
            kind.to_string(),
            t.reads.to_string(),
            t.writes.to_string(),
            t.notifications.to_string(),
            time(t.longest_wait),
        ]
    });
    let head = [
        "Region",
        "Kind",
        "Reads",
        "Writes",
        "Notified",
        "Longest wait",
    ];
    table(&head, rows.collect(), all.len().saturating_sub(ROWS))
}

fn waits(waits: &Waits) -> Value {
    let bars = waits.bars();
    let bars: Vec<Value> = bars
        .iter()
        .map(|bar| json!([time(bar.below), bar.count]))
        .collect();
    json!({
        "what": waits.what,
        "count": waits.lengths.len(),
        "p50": time(waits.percentile(50)),
        "p90": time(waits.percentile(90)),
        "p99": time(waits.percentile(99)),
        "max": time(waits.max()),
        "bars": bars,
    })
}

#[cfg(test)]
mod tests {
    use super::super::events_file::tests::{acted, file};
    use super::*;

    /// The data block of a page.
    fn block(page: &str) -> Value {
        let (_, rest) = page
            .split_once("<script type=\"application/json\" id=\"data\">")
            .unwrap();
        let (data, _) = rest.split_once("</script>").unwrap();
        serde_json::from_str(data).unwrap()
    }

    #[test]
    fn a_page_is_complete_and_asks_for_nothing() {
        let list = [
            acted(0, 1.0, (0x1000, 0x1010), (0x1000, 0x1008), &[1]),
            acted(1, 4.0, (0x1000, 0x1010), (0x1004, 0x1008), &[0, 1]),
        ];
        let page = page(Path::new("dir/e.json"), &file(2, &list.join(",")).unwrap());
        for left in ["/* style */", "/* program */", "{\"data\":0}"] {
            assert!(!page.contains(left), "{left}");
        }
        for outside in ["http:", "https:", "src=", "href=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        let data = block(&page);
        assert_eq!(data["source"], "e.json");
        assert_eq!(data["events"]["start"], json!([1000, 3000]));
        assert_eq!(data["events"]["lo"], json!([0x1000, 0x1004]));
        assert_eq!(data["events"]["sets"], json!([[1], [0, 1]]));
        assert_eq!(
            data["roles"]["rows"][0]["roles"],
            json!([[1, 1, 1], [1, 2, 0]])
        );
    }

    #[test]
    fn no_name_ends_the_data() {
        let events = file(1, &acted(0, 1.0, (1, 2), (1, 2), &[])).unwrap();
        let name = "</script><script>alert(1)</script>.json";
        let page = page(
            Path::new("x").join(name.replace('/', "\u{2215}")).as_path(),
            &events,
        );
        let ends = page.matches("<script").count();
        assert_eq!(ends, 2, "the data and the program");
        assert!(block(&page)["source"].as_str().unwrap().contains("alert"));
    }
}
