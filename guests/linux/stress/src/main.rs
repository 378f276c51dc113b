//! Checks, inside a guest, that its processors keep their promises to each other.
//!
//! Every check computes real values, compares them with values known in advance or computed another
//! way, and prints one line: `NAME ok checksum=… (… ms)`, `NAME skipped: …` or `NAME FAILED: …`.
//! The checksums depend on the rounds and threads alone, so those of a guest and those of a real
//! processor must be equal. The exit status is 0 if no check failed, 1 if one did and 64 for bad
//! usage.

mod bracket;
mod counters;
mod cpu;
mod futexes;
mod os;
mod patching;
mod processes;
mod registers;
mod shootdown;
mod signals;
mod vectors;

use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bracket::{Check, Outcome};

const USAGE: &str = "\
usage: stress-trapline [OPTIONS] [NAME...]

Runs the named checks, or all of them.

  --threads N   threads of a check that takes any number, 2 to 64 [4]
  --percent N   rounds of every check, in percent of its own default [100]
  --rounds N    rounds of every check
  --seconds N   repeat the checks until this time has passed
  --timeout N   seconds after which a single check counts as hung [600]
  --list        print the names and default rounds, and leave
  --debug-exit V  run nothing; write V to the debug-exit port 0xf4, which ends the machine
";

/// What a check is told.
#[derive(Clone, Copy)]
pub struct Load {
    /// How often it repeats its piece of work.
    pub rounds: u32,
    /// How many threads take part, if the check does not need a certain number.
    pub threads: u32,
}

/// Every check, its default rounds and its code.
///
/// The rounds are chosen for an engine of some 30 million instructions a second.
const CHECKS: [(&str, u32, Check); 19] = [
    ("counters", 20_000, counters::run),
    ("futex-ring", 1_000, futexes::ring),
    ("condvar-ring", 500, futexes::condvar_ring),
    ("shootdown", 200, shootdown::run),
    ("fork", 10, processes::fork),
    ("exec", 4, processes::exec),
    ("signal-timer", 20, signals::timer),
    ("signal-threads", 300, signals::threads),
    ("signal-exceptions", 200, signals::exceptions),
    ("vector-sse", 2_000, vectors::sse),
    ("vector-avx2", 2_000, vectors::avx2),
    ("vector-avx512", 2_000, vectors::avx512),
    ("x87", 5_000, vectors::x87),
    ("vector-threads", 100, vectors::threads),
    ("patch-self", 100_000, patching::own),
    ("patch-alias", 20_000, patching::alias),
    ("patch-protect", 1_000, patching::protect),
    ("patch-other", 100_000, patching::other),
    ("patch-chain", 20_000, patching::chain),
];

struct Options {
    threads: u32,
    percent: u32,
    rounds: Option<u32>,
    seconds: u64,
    timeout: u64,
    names: Vec<String>,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let first = arguments.next();
    if first.as_deref() == Some("--child") {
        return processes::child(arguments.next().as_deref());
    }
    let options = match options(first.into_iter().chain(arguments)) {
        Ok(Some(options)) => options,
        Ok(None) => return ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("stress-trapline: {message}\n\n{USAGE}");
            return ExitCode::from(64);
        }
    };
    os::install_handlers();

    let end = Instant::now() + Duration::from_secs(options.seconds);
    let (mut run, mut failed) = (0, 0);
    loop {
        for (name, rounds, check) in CHECKS {
            if !options.names.is_empty() && !options.names.iter().any(|n| n == name) {
                continue;
            }
            let scaled = u64::from(rounds) * u64::from(options.percent) / 100;
            let scaled = u32::try_from(scaled).unwrap_or(u32::MAX).max(1);
            let rounds = options.rounds.unwrap_or(scaled);
            let load = Load {
                rounds,
                threads: options.threads,
            };
            run += 1;
            failed += u32::from(!report(name, check, load, options.timeout));
        }
        if Instant::now() >= end {
            break;
        }
    }
    if failed == 0 {
        println!("stress-trapline: {run} checks, none failed");
        ExitCode::SUCCESS
    } else {
        println!("stress-trapline: {failed} of {run} checks FAILED");
        ExitCode::FAILURE
    }
}

/// Runs one check in a thread of its own and prints its line; says whether it did not fail.
fn report(name: &str, check: Check, load: Load, timeout: u64) -> bool {
    let start = Instant::now();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(check(load)));
    let outcome = receiver.recv_timeout(Duration::from_secs(timeout));
    let spent = start.elapsed().as_millis();
    match outcome {
        Ok(Ok(Outcome::Checksum(sum))) => println!("{name} ok checksum={sum:016x} ({spent} ms)"),
        Ok(Ok(Outcome::Skipped(why))) => println!("{name} skipped: {why}"),
        Ok(Err(message)) => {
            println!("{name} FAILED: {message} ({spent} ms)");
            return false;
        }
        Err(_) => {
            // Its threads are still at work, so nothing that follows would be trustworthy.
            println!("{name} FAILED: no end within {timeout} s");
            std::process::exit(1);
        }
    }
    true
}

/// Reads the command line; `None` means that everything asked for is done.
fn options(arguments: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let mut options = Options {
        threads: 4,
        percent: 100,
        rounds: None,
        seconds: 0,
        timeout: 600,
        names: Vec::new(),
    };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let mut number = |low: u32, high: u32| {
            let value = arguments
                .next()
                .ok_or(format!("{argument} needs a number"))?;
            let number = value.parse().ok().filter(|n| (low..=high).contains(n));
            number.ok_or(format!(
                "{argument} needs a number from {low} to {high}, not `{value}`"
            ))
        };
        match argument.as_str() {
            "--threads" => options.threads = number(2, 64)?,
            "--percent" => options.percent = number(1, 1_000_000)?,
            "--rounds" => options.rounds = Some(number(1, u32::MAX)?),
            "--seconds" => options.seconds = number(0, u32::MAX)?.into(),
            "--debug-exit" => {
                let value = number(0, 255)? as u8;
                let refused = os::debug_exit(value);
                return Err(format!(
                    "the machine goes on after the debug exit: {refused}"
                ));
            }
            "--timeout" => options.timeout = number(1, u32::MAX)?.into(),
            "--help" | "-h" => {
                print!("{USAGE}");
                return Ok(None);
            }
            "--list" => {
                for (name, rounds, _) in CHECKS {
                    println!("{name} {rounds}");
                }
                return Ok(None);
            }
            name if CHECKS.iter().any(|(n, ..)| *n == name) => options.names.push(argument),
            other => return Err(format!("no option or check is called `{other}`")),
        }
    }
    Ok(Some(options))
}
