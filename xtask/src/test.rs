//! `cargo xtask test`: every check and test of the project, the quick ones first.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::{GuestOptions, guest, layers, project};

/// One step of the test command.
struct Step {
    name: &'static str,
    action: fn() -> Result<()>,
}

/// The steps, in order. The last one prints the verdict of the test runner and nothing follows it.
const STEPS: [Step; 8] = [
    Step {
        name: "format",
        action: format,
    },
    Step {
        name: "layers",
        action: layers::run,
    },
    Step {
        name: "lints",
        action: lints,
    },
    Step {
        name: "dependencies",
        action: dependencies,
    },
    Step {
        name: "guests",
        action: guests,
    },
    Step {
        name: "guest programs on this processor",
        action: programs,
    },
    Step {
        name: "models",
        action: models,
    },
    Step {
        name: "tests",
        action: tests,
    },
];

/// Runs the steps and stops at the first that fails.
///
/// # Errors
/// If a step fails.
pub fn run() -> Result<()> {
    let mut times: Vec<(&str, Duration)> = Vec::new();
    for (index, step) in STEPS.iter().enumerate() {
        if index + 1 == STEPS.len() {
            let spent: Vec<_> = times
                .iter()
                .map(|(n, t)| format!("{n} {:.1} s", t.as_secs_f64()))
                .collect();
            println!("== so far: {}", spent.join(", "));
        }
        println!("== [{}/{}] {}", index + 1, STEPS.len(), step.name);
        let start = Instant::now();
        (step.action)().with_context(|| format!("step `{}` failed", step.name))?;
        times.push((step.name, start.elapsed()));
    }
    Ok(())
}

/// The manifests of our guest programs, which are no members of the workspace.
fn program_manifests() -> [PathBuf; 2] {
    ["stress", "bench"].map(|name| guest::program_folder(name).join("Cargo.toml"))
}

fn format() -> Result<()> {
    project::check(project::cargo().args(["fmt", "--all", "--check"]))?;
    for manifest in program_manifests() {
        project::check(
            project::cargo()
                .args(["fmt", "--check", "--manifest-path"])
                .arg(manifest),
        )?;
    }
    Ok(())
}

fn lints() -> Result<()> {
    let warnings = ["--", "-D", "warnings"];
    project::check(
        project::cargo()
            .args(["clippy", "--quiet", "--workspace", "--all-targets"])
            .args(warnings),
    )?;
    if has_models()? {
        project::check(
            project::cargo()
                .args([
                    "clippy",
                    "--quiet",
                    "--package",
                    "trapline-trace",
                    "--all-targets",
                ])
                .args(["--features", "shuttle"])
                .args(warnings),
        )?;
    }
    for manifest in program_manifests() {
        project::check(
            project::cargo()
                .args(["clippy", "--quiet", "--manifest-path"])
                .arg(manifest)
                .arg("--target-dir")
                .arg(guest::program_target_directory()?)
                .args(warnings),
        )?;
    }
    Ok(())
}

fn dependencies() -> Result<()> {
    let works = |arguments: &[&str]| {
        project::cargo()
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    if !works(&["deny", "--version"]) {
        println!("SKIPPED: cargo-deny is not installed, so licences and advisories are unchecked");
        println!("         (`cargo install --locked cargo-deny` brings it)");
        return Ok(());
    }
    let deny = ["deny", "--workspace", "check"];
    project::check(
        project::cargo()
            .args(deny)
            .args(["bans", "licenses", "sources"]),
    )?;
    if !works(&["deny", "--workspace", "fetch", "db"]) {
        println!("SKIPPED: the database of advisories cannot be fetched, so they are unchecked");
        println!("         (`cargo deny check advisories` checks them where there is a network)");
        return Ok(());
    }
    project::check(project::cargo().args(deny).arg("advisories"))
}

fn guests() -> Result<()> {
    guest::build(&GuestOptions::default())?.report();
    guest::assemble_small()
}

fn programs() -> Result<()> {
    let program = guest::build_program("stress")?;
    project::check(Command::new(program).stdin(Stdio::null()))
}

/// Whether the trace crate has its models, which run with the feature `shuttle`.
fn has_models() -> Result<bool> {
    let metadata = project::metadata()?;
    let packages = metadata["packages"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    Ok(packages
        .iter()
        .any(|p| p["name"] == "trapline-trace" && !p["features"]["shuttle"].is_null()))
}

fn models() -> Result<()> {
    if !has_models()? {
        println!("SKIPPED: trapline-trace has no feature `shuttle`");
        return Ok(());
    }
    project::check(project::cargo().args([
        "test",
        "--package",
        "trapline-trace",
        "--features",
        "shuttle",
    ]))
}

fn tests() -> Result<()> {
    project::check(project::cargo().args(["test", "--workspace", "--no-fail-fast"]))
}
