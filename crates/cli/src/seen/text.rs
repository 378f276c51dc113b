//! The report as text.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use trapline_trace::Range;

use super::events_file::{Category, Events};
use super::measures::{self, Waits};
use super::roles::{self, Roles, Row};
use super::stats_file::Stats;

/// Width of a histogram's longest bar.
const BAR: u64 = 40;

/// A table with aligned columns: the first `left` of them to the left, the others to the right.
struct Table {
    left: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(left: usize, head: &[&str]) -> Self {
        let head = head.iter().map(|&cell| cell.to_owned()).collect();
        Self {
            left,
            rows: vec![head],
        }
    }

    fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn write(&self, out: &mut String) {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (n, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                let _ = if n < self.left {
                    write!(line, "  {cell:<width$}")
                } else {
                    write!(line, "  {cell:>width$}")
                };
            }
            let _ = writeln!(out, "{}", line.trim_end());
        }
    }
}

/// A length of time, in a unit that suits it.
pub fn time(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} µs", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

/// A number of bytes, in a unit that suits it.
fn bytes(count: u64) -> String {
    match count {
        0x4000_0000.. if count.is_multiple_of(1 << 30) => format!("{} GiB", count >> 30),
        0x10_0000.. => format!("{} MiB", count >> 20),
        _ => format!("{} KiB", count >> 10),
    }
}

pub fn range(range: Range) -> String {
    format!("[{:#x}, {:#x})", range.lo, range.hi)
}

fn roles(r: &Roles) -> String {
    format!("{}/{}/{}", r.actor, r.consumer, r.bystander)
}

/// "1 event", "2 events".
fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn title(out: &mut String, title: &str) {
    let _ = writeln!(out, "\n{title}");
}

/// What a file of `--events` tells, with at most `top` lines of each table.
pub fn events(out: &mut String, path: &Path, file: &Events, top: usize) {
    let _ = writeln!(
        out,
        "{}: {}, {}, {}, {} of guest memory",
        path.display(),
        count(file.events.len() as u64, "event"),
        time(file.end()),
        count(file.vcpus.into(), "VCPU"),
        bytes(file.memory_bytes)
    );
    if file.dropped > 0 {
        let _ = writeln!(
            out,
            "{} found no room and are missing: what follows counts too few",
            count(file.dropped, "event")
        );
    }
    if let Some(reason) = &file.stopped {
        let _ = writeln!(
            out,
            "the recording ended before the machine did: {}",
            reason.escape_debug()
        );
    }
    totals(out, file);
    role_table(out, file, top);
    regions(out, file, top);
    for waits in measures::waits(file) {
        histogram(out, &waits);
    }
}

fn totals(out: &mut String, file: &Events) {
    title(out, "Events by kind and semantics");
    let mut table = Table::new(
        2,
        &[
            "kind",
            "semantics",
            "events",
            "notified",
            "waited for",
            "invalidated",
        ],
    );
    for k in measures::kinds(file) {
        table.row(vec![
            k.kind.to_string(),
            k.semantics.to_string(),
            k.events.to_string(),
            k.notifications.to_string(),
            k.awaited.to_string(),
            k.invalidated.to_string(),
        ]);
    }
    table.write(out);
    let traces = file.of(Category::Establish).count() as u64;
    let _ = writeln!(out, "  {} established", count(traces, "trace"));
}

fn role_table(out: &mut String, file: &Events, top: usize) {
    title(
        out,
        "Roles by piece of traced memory (as actor/consumer/bystander of an access)",
    );
    let all = roles::table(file);
    let mut sum = vec![Roles::default(); file.vcpus.into()];
    for row in &all {
        for (sum, r) in sum.iter_mut().zip(&row.roles) {
            sum.actor += r.actor;
            sum.consumer += r.consumer;
            sum.bystander += r.bystander;
        }
    }
    let total: u64 = all.iter().map(|row| row.accesses).sum();
    let vcpus: Vec<String> = (0..file.vcpus).map(|n| format!("VCPU {n}")).collect();
    let mut head = vec!["memory", "kinds", "accesses"];
    head.extend(vcpus.iter().map(String::as_str));
    let mut table = Table::new(2, &head);
    let (rows, others) = roles::busiest(all, top);
    for Row {
        range: at,
        kinds,
        accesses,
        roles: played,
    } in &rows
    {
        let kinds: Vec<String> = kinds.iter().map(ToString::to_string).collect();
        let mut cells = vec![range(*at), kinds.join(" "), accesses.to_string()];
        cells.extend(played.iter().map(roles));
        table.row(cells);
    }
    let mut cells = vec!["all".to_owned(), String::new(), total.to_string()];
    cells.extend(sum.iter().map(roles));
    table.row(cells);
    table.write(out);
    more(out, others);
}

fn more(out: &mut String, others: usize) {
    if others > 0 {
        let _ = writeln!(out, "  and {others} more, less busy; --top shows more");
    }
}

fn regions(out: &mut String, file: &Events, top: usize) {
    title(out, "Busiest regions");
    let all = measures::regions(file);
    let mut table = Table::new(
        2,
        &[
            "region",
            "kind",
            "reads",
            "writes",
            "notified",
            "longest wait",
        ],
    );
    for (region, kind, t) in all.iter().take(top) {
        table.row(vec![
            range(*region),
            kind.to_string(),
            t.reads.to_string(),
            t.writes.to_string(),
            t.notifications.to_string(),
            time(t.longest_wait),
        ]);
    }
    table.write(out);
    more(out, all.len().saturating_sub(top));
}

fn histogram(out: &mut String, waits: &Waits) {
    title(
        out,
        &format!(
            "{}: {}, p50 {}, p90 {}, p99 {}, max {}",
            waits.what,
            count(waits.lengths.len() as u64, "wait"),
            time(waits.percentile(50)),
            time(waits.percentile(90)),
            time(waits.percentile(99)),
            time(waits.max())
        ),
    );
    let bars = waits.bars();
    let most = bars.iter().map(|bar| bar.count).max().unwrap_or(1).max(1);
    let mut table = Table::new(0, &[]);
    table.rows.clear();
    for bar in bars {
        let length = (bar.count * BAR).div_ceil(most);
        table.row(vec![
            format!("< {}", time(bar.below)),
            bar.count.to_string(),
            format!("{:<1$}", "#".repeat(length as usize), BAR as usize),
        ]);
    }
    table.write(out);
}

/// The sum over all kinds.
fn sum(by_kind: &BTreeMap<String, u64>) -> String {
    let sum = by_kind
        .values()
        .fold(0, |sum: u64, n| sum.saturating_add(*n));
    sum.to_string()
}

/// What a file of `--stats` tells of traces.
pub fn stats(out: &mut String, path: &Path, file: &Stats) {
    let _ = writeln!(
        out,
        "{}: {:.2} s on the host, {}",
        path.display(),
        file.host_seconds,
        count(file.boots.len() as u64, "boot")
    );
    for (n, boot) in file.boots.iter().enumerate() {
        if file.boots.len() > 1 {
            title(out, &format!("Boot {}", n + 1));
        }
        title(out, "Events by kind and semantics");
        let mut table = Table::new(
            2,
            &[
                "kind",
                "semantics",
                "events",
                "notified",
                "acknowledged",
                "waits",
                "p50",
                "p99",
                "max",
            ],
        );
        for k in &boot.traces.kinds {
            table.row(vec![
                k.kind.escape_debug().to_string(),
                k.semantics.escape_debug().to_string(),
                k.events.to_string(),
                k.notifications.to_string(),
                k.acknowledgements.to_string(),
                k.waits.count.to_string(),
                time(k.waits.p50_ns),
                time(k.waits.p99_ns),
                time(k.waits.max_ns),
            ]);
        }
        table.write(out);
        let _ = writeln!(
            out,
            "  accesses beside a trace, on its page: {}",
            boot.traces.beside
        );
        title(out, "VCPUs");
        let mut table = Table::new(
            1,
            &[
                "",
                "actor",
                "consumer",
                "bystander",
                "invalidations",
                "re-derivations",
                "TLB fills",
                "instructions",
                "running",
                "halted",
            ],
        );
        for (n, v) in boot.vcpus.iter().enumerate() {
            table.row(vec![
                format!("VCPU {n}"),
                v.roles.actor.to_string(),
                v.roles.consumer.to_string(),
                v.roles.bystander.to_string(),
                sum(&v.invalidations),
                sum(&v.rederivations),
                v.tlb_fills.to_string(),
                v.instructions.to_string(),
                format!("{:.2} s", v.running_seconds),
                format!("{:.2} s", v.halted_seconds),
            ]);
        }
        table.write(out);
    }
}

#[cfg(test)]
mod tests {
    use super::super::events_file::tests::{acted, file};
    use super::*;

    #[test]
    fn times_and_bytes_have_units() {
        let times = [999, 1_500, 2_500_000, 3_000_000_000].map(time);
        assert_eq!(times, ["999 ns", "1.5 µs", "2.5 ms", "3.00 s"]);
        let sizes = [65536, 512 << 20, 2 << 30, (1 << 30) + 4096].map(bytes);
        assert_eq!(sizes, ["64 KiB", "512 MiB", "2 GiB", "1024 MiB"]);
    }

    #[test]
    fn the_report_has_its_parts() {
        let list = [
            acted(0, 1.0, (0x1000, 0x1010), (0x1000, 0x1008), &[1]),
            acted(1, 9.0, (0x1000, 0x1010), (0x1000, 0x1008), &[1]),
        ];
        let mut out = String::new();
        let events_file = file(3, &list.join(",")).unwrap();
        events(&mut out, Path::new("e.json"), &events_file, 8);
        let expected = "\
e.json: 2 events, 11.5 µs, 3 VCPUs, 64 KiB of guest memory

Events by kind and semantics
  kind  semantics   events  notified  waited for  invalidated
  code  bracketing       2         2           2            0
  0 traces established

Roles by piece of traced memory (as actor/consumer/bystander of an access)
  memory            kinds  accesses  VCPU 0  VCPU 1  VCPU 2
  [0x1000, 0x1010)  code          2   1/0/2   1/2/0   0/0/2
  all                             2   1/0/2   1/2/0   0/0/2

Busiest regions
  region            kind  reads  writes  notified  longest wait
  [0x1000, 0x1010)  code      0       2         2        1.2 µs

Actors, for acknowledgements: 2 waits, p50 1.2 µs, p90 1.2 µs, p99 1.2 µs, max 1.2 µs
  < 2.0 µs  2  ########################################
";
        assert_eq!(out, expected);
    }

    #[test]
    fn statistics_of_an_older_version_are_read() {
        let file: Stats = serde_json::from_str("{\"boots\":[{\"vcpus\":[{}]}]}").unwrap();
        let mut out = String::new();
        stats(&mut out, Path::new("s"), &file);
        assert!(out.contains("VCPU 0"), "{out}");
    }
}
