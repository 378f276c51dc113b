//! `--watch`: accesses to watched guest memory are reported, and nothing else is.

mod support;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use serde_json::Value;
use support::build_guests;

/// The guest of `guests/small/watched.S`.
fn guest() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| build_guests("watched", &["watched"], "").join("watched.elf"))
}

/// Runs the guest, which must pass; what it and trapline said.
fn run(options: &[&str]) -> (String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = support::command()
        .args(["run", "--cpus", "boot=2", "--memory", "size=32M"])
        .args(["--timeout", "120", "--kernel"])
        .arg(guest())
        .args(options)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(stdout), text(stderr));
    assert_eq!(status.code(), Some(33), "{out}{err}");
    (out, err)
}

/// The address that the guest printed for one of its instructions.
fn site(out: &str, label: &str) -> String {
    let prefix = format!("{label}=");
    let line = out.lines().find_map(|line| line.strip_prefix(&prefix));
    line.unwrap().trim().into()
}

#[test]
fn each_access_is_told_with_all_that_is_known_of_it() {
    let (out, err) = run(&[
        "--watch",
        "name=window,gpa=0x400000-0x400008,access=rw,vcpus=0",
        "--watch",
        "name=edge,gpa=0x401000-0x401002",
        "--watch",
        "name=other,gpa=0x400000-0x400001,access=w,vcpus=1,semantics=bracketing",
    ]);
    let at = |label| site(&out, label);
    let expected = [
        format!(
            "window: VCPU 0 at {} wrote 0x400000-0x400008: \
             00 00 00 00 00 00 00 00 -> 88 77 66 55 44 33 22 11",
            at("store")
        ),
        format!(
            "window: VCPU 0 at {} wrote 0x400003-0x400004: 55 -> 5a",
            at("inside")
        ),
        format!(
            "window: VCPU 0 at {} read 0x400004-0x400008: 44 33 22 11",
            at("load")
        ),
        format!(
            "window: VCPU 0 at {} wrote 0x400000-0x400008: \
             88 77 66 5a 44 33 22 11 -> 89 77 66 5a 44 33 22 11",
            at("locked")
        ),
        format!(
            "edge: VCPU 0 at {} wrote 0x401000-0x401004: 00 00 00 00 -> 44 33 22 11",
            at("crossing")
        ),
        format!(
            "window: VCPU 0 at {} wrote 0x400000-0x400008: \
             89 77 66 5a 44 33 22 11 -> 88 77 66 55 88 77 66 55",
            at("wide")
        ),
        format!(
            "other: VCPU 1 at {} wrote 0x400000-0x400004: 88 77 66 55 -> 07 00 00 00",
            at("other")
        ),
    ];
    let prefix = |line: String| format!("trapline: watch {line}");
    assert_eq!(err.lines().collect::<Vec<_>>(), expected.map(prefix));
}

#[test]
fn the_log_has_an_object_per_access_and_does_not_hold_up_the_guest() {
    let path = std::env::temp_dir().join(format!("trapline-watch-{}", std::process::id()));
    let (out, err) = run(&[
        "--watch=name=hammered,gpa=0x410000-0x410008",
        "--watch=name=store,gpa=0x400000-0x400001,vcpus=0",
        "--watch-log",
        path.to_str().unwrap(),
    ]);
    let log = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    let events: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let first = &events[0];
    assert_eq!(first["watch"], "store");
    assert_eq!(first["rip"], site(&out, "store"));
    assert_eq!(
        (&first["actor"], &first["vcpu"]),
        (&"vcpu".into(), &0.into())
    );
    assert_eq!(first["old"], "0000000000000000");
    assert_eq!(first["new"], "8877665544332211");
    // What is not in the log is counted.
    let missing: usize = err
        .split_whitespace()
        .find_map(|word| word.parse().ok())
        .unwrap_or(0);
    let written = events.iter().filter(|e| e["watch"] == "hammered").count();
    assert_eq!(written + missing, 300_000, "{err}");
    let order: Vec<u64> = events
        .iter()
        .filter_map(|e| e["sequence"].as_u64())
        .collect();
    assert!(order.len() == events.len() && order.is_sorted());
}

#[test]
fn standard_error_is_not_flooded() {
    let (_, err) = run(&["--watch=name=hammered,gpa=0x410000-0x410008"]);
    assert!(err.contains("more accesses are not shown"), "{err}");
    let shown = err.lines().filter(|line| line.contains("hammered")).count();
    assert!(shown < 100_000, "{shown}");
}

#[test]
fn a_log_that_cannot_be_written_any_more_costs_the_guest_nothing() {
    let (_, err) = run(&["--watch=gpa=0x410000-0x410008", "--watch-log=/dev/full"]);
    assert!(
        err.contains("/dev/full") && err.contains("goes on"),
        "{err}"
    );
}
