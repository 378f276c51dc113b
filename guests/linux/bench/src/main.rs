//! Measures how fast a processor does what guests do; the same program runs natively and in guests.
//!
//! Each row prints `NAME RATE UNIT/s`, the best of several repetitions of about a twentieth of a
//! second, so that what else the machine does disturbs least.

mod compute;
mod system;
mod threads;

use std::hint::black_box;
use std::time::{Duration, Instant};

/// A row: its name, its unit, and what does some units of work and says how many.
pub type Row = (&'static str, &'static str, fn() -> u64);

const REPETITIONS: u32 = 5;
const REPETITION: Duration = Duration::from_millis(50);

/// What a row says that got a wrong result.
pub const WRONG: u64 = u64::MAX;

/// Units of work a second, the best repetition; 0 if some result was wrong.
fn rate(work: fn() -> u64) -> f64 {
    let mut best = 0.0f64;
    if black_box(work()) == WRONG {
        return 0.0;
    }
    for _ in 0..REPETITIONS {
        let start = Instant::now();
        let mut done = 0;
        while start.elapsed() < REPETITION {
            match black_box(work()) {
                WRONG => return 0.0,
                some => done += some,
            }
        }
        best = best.max(done as f64 / start.elapsed().as_secs_f64());
    }
    best
}

fn main() {
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().is_some_and(|a| a == "--leave") {
        return;
    }
    let wanted: Vec<String> = arguments.collect();
    let rows = [compute::ROWS, system::ROWS, threads::ROWS].concat();
    for (name, unit, work) in rows {
        if (wanted.is_empty() || wanted.iter().any(|w| w == name)) && compute::possible(name) {
            println!("{name} {:.6e} {unit}/s", rate(work));
        }
    }
}
