//! The guest `guests/small/litmus.S`: built, run, and its report read.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::support::build_guests;

/// A guest that wrote 16 to the debug-exit port: no violation.
pub const PASS: i32 = 33;
/// A guest that wrote 17: violations, or the CPUs gave up waiting for each other.
pub const FAIL: i32 = 35;

/// One run at a time: the host has fewer processors than the guests.
static MACHINE: Mutex<()> = Mutex::new(());

/// The built image.
pub fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| build_guests("litmus", &["litmus"], "").join("litmus.elf"))
}

/// What one litmus test said.
#[derive(Debug)]
pub struct Row {
    pub name: String,
    pub rounds: u64,
    pub violations: u64,
    pub gave_up: bool,
}

impl Row {
    fn parse(line: &str) -> Option<Self> {
        let (name, rest) = line.strip_prefix("litmus ")?.split_once(": ")?;
        let (rounds, rest) = rest.split_once(" rounds, ")?;
        let (violations, rest) = rest.split_once(" violations")?;
        Some(Self {
            name: name.to_owned(),
            rounds: rounds.parse().ok()?,
            violations: violations.parse().ok()?,
            gave_up: rest.contains("gave up"),
        })
    }

    /// Whether something was seen that must not be.
    pub fn failed(&self) -> bool {
        self.violations > 0 || self.gave_up
    }
}

/// One run of the guest.
pub struct Run {
    pub status: Option<i32>,
    pub rows: Vec<Row>,
    pub text: String,
    /// What `--stats` wrote.
    pub stats: serde_json::Value,
}

impl Run {
    /// The row of a test.
    ///
    /// # Panics
    /// If the guest did not run it.
    pub fn row(&self, name: &str) -> &Row {
        let row = self.rows.iter().find(|row| row.name == name);
        row.unwrap_or_else(|| panic!("no row {name}:\n{}", self.text))
    }

    /// The traces' part of the statistics.
    pub fn traces(&self) -> &serde_json::Value {
        &self.stats["boots"][0]["traces"]
    }

    /// The sum of a field over all traces of a kind.
    pub fn total(&self, kind: &str, field: &str) -> u64 {
        let kinds = self.traces()["kinds"].as_array().unwrap();
        let rows = kinds.iter().filter(|row| row["kind"] == kind);
        rows.map(|row| row[field].as_u64().unwrap()).sum()
    }
}

/// Runs the guest on so many VCPUs, with options for it and for trapline.
pub fn run(vcpus: u32, guest_options: &str, options: &[&str]) -> Run {
    static RUNS: AtomicU32 = AtomicU32::new(0);
    let image = image();
    let number = RUNS.fetch_add(1, Ordering::Relaxed);
    let stats = image.with_file_name(format!("stats-{}-{number}.json", std::process::id()));
    let _machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    // On a busy host some come late.
    let guest_options = &format!("cpus={vcpus} {guest_options}");
    let output = crate::support::command()
        .args(["run", "--serial", "tty", "--timeout", "600", "--kernel"])
        .arg(image)
        .args(["--cpus", &format!("boot={vcpus}")])
        .args(["--device", "dma-probe"])
        .args(["--cmdline", guest_options, "--stats"])
        .arg(&stats)
        .args(options)
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    let text = format!("{vcpus} VCPUs, {guest_options}, {options:?}:\n{out}{err}");
    println!("{text}");
    let written = std::fs::read(&stats).unwrap_or_else(|e| panic!("{e}: {text}"));
    let _ = std::fs::remove_file(&stats);
    Run {
        status: output.status.code(),
        rows: out.lines().filter_map(Row::parse).collect(),
        stats: serde_json::from_slice(&written).unwrap(),
        text,
    }
}
