//! Development tasks, called as `cargo xtask TASK`.

mod bench;
mod boot;
mod guest;
mod layers;
mod project;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Trapline's development tasks", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Fetch a kernel and BusyBox, build our guest programs and the initramfs, all in .cache/guest
    Guest(GuestOptions),
    /// Build trapline and boot that guest on 2 VCPUs to a shell; Ctrl-A x leaves
    ///
    /// What follows `--` is handed to `trapline run` and overrides the defaults:
    /// `cargo xtask run -- --cpus boot=4 --memory size=1G`.
    Run {
        /// Options for `trapline run`
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Run every check and test: format, lints, layers, dependencies, models, guests, tests
    Test,
    /// Check that no layer depends on a higher one
    Layers,
    /// Measure guest work and boots natively, under Trapline and under QEMU TCG, side by side
    ///
    /// Some minutes: `cargo xtask bench --rounds 1 sort sieve` for a quick look.
    Bench(bench::Options),
    /// Measure what untraced and traced stores cost, in release mode (a minute on an idle machine)
    BenchTraces,
}

/// What `cargo xtask guest` can be told.
#[derive(clap::Args, Clone, Default)]
struct GuestOptions {
    /// Use this kernel image instead of fetching Debian's
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Use this statically linked BusyBox instead of fetching Debian's
    #[arg(long, value_name = "PATH")]
    busybox: Option<PathBuf>,
    /// Put this script into the initramfs as /etc/trapline/run: the guest runs it instead of a
    /// shell and ends with its exit status
    #[arg(long, value_name = "SCRIPT")]
    with: Option<PathBuf>,
    /// Where to write the initramfs [default: .cache/guest/initramfs.cpio, or with-NAME.cpio
    /// beside it for --with NAME]
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// Look for newer packages even if some are cached
    #[arg(long)]
    refresh: bool,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Guest(options) => guest::build(&options).map(|guest| guest.report()),
        Task::Run { args } => boot::run(&args),
        Task::Test => test::run(),
        Task::Layers => layers::run(),
        Task::Bench(options) => bench::run(&options),
        Task::BenchTraces => project::check(project::cargo().args([
            "bench",
            "--package",
            "trapline-monitor",
            "--bench",
            "traces",
        ])),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
