//! Processes: fork with memory that is copied on write, and exec of this program.

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, ExitCode, Stdio};

use crate::Load;
use crate::bracket::{Outcome, Verdict, mix};
use crate::os::{self, Mapping};

/// Pages that parent and child share until one of them writes.
const PAGES: usize = 32;

/// Threads that fork or exec at the same time.
const THREADS: u64 = 2;

fn word(page: usize, seed: u64) -> u64 {
    mix(seed << 32 | page as u64)
}

/// Fills every page, or every second one, with words of the seed.
fn fill(pages: &Mapping, seed: u64, every: usize) {
    for page in (0..PAGES).step_by(every) {
        os::try_store(pages.at(page * os::PAGE + 8 * page), word(page, seed));
    }
}

fn sum(pages: &Mapping) -> u64 {
    (0..PAGES).fold(0, |sum, page| {
        mix(sum ^ os::try_load(pages.at(page * os::PAGE + 8 * page)).unwrap_or(0))
    })
}

/// What [`sum`] must be with words of `even` on even pages and of `odd` on odd ones.
fn expected_sum(even: u64, odd: u64) -> u64 {
    (0..PAGES).fold(0, |sum, page| {
        mix(sum ^ word(page, if page.is_multiple_of(2) { even } else { odd }))
    })
}

/// A pipe: its reading and its writing end.
fn pipe() -> std::io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the array has room for both ends.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: both descriptors were just made.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Runs `one` for every round in some threads.
fn in_threads(
    load: Load,
    one: impl Fn(u64, &Verdict) -> std::io::Result<u64> + Sync,
) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let mut total = 0;
    std::thread::scope(|scope| {
        let (verdict, one) = (&verdict, &one);
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || {
                    let mut total = 0;
                    for round in 0..u64::from(load.rounds) {
                        match one(thread << 20 | round, verdict) {
                            Ok(sum) => total = mix(total ^ sum),
                            Err(error) => verdict.fail(format!("round {round}: {error}")),
                        }
                        if verdict.has_failed() {
                            break;
                        }
                    }
                    total
                })
            })
            .collect();
        for thread in threads {
            total = mix(total ^ thread.join().expect("no thread panics here"));
        }
    });
    verdict.finish(total)
}

/// A child rewrites half of its pages and sends their sum; the parent rewrites the other half
/// meanwhile. Neither sees the other's words.
pub fn fork(load: Load) -> Result<Outcome, String> {
    in_threads(load, |seed, verdict| {
        let pages = Mapping::anonymous(PAGES, os::READ | os::WRITE)?;
        let (old, child_word, parent_word) = (seed << 2, seed << 2 | 1, seed << 2 | 2);
        fill(&pages, old, 1);
        let (reader, writer) = pipe()?;
        // SAFETY: the child neither allocates nor locks before it ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            fill(&pages, child_word, 2);
            let sum = sum(&pages).to_le_bytes();
            // SAFETY: the buffer is alive; the child ends here.
            unsafe {
                libc::write(writer.as_raw_fd(), sum.as_ptr().cast(), sum.len());
                libc::_exit((seed & 0x7f) as i32);
            }
        }
        if child < 0 {
            return Err(std::io::Error::last_os_error());
        }
        fill(&pages, parent_word, 2);
        drop(writer);
        let mut said = [0; 8];
        std::fs::File::from(reader).read_exact(&mut said)?;
        let mut status = 0;
        // SAFETY: the status is alive.
        unsafe { libc::waitpid(child, &mut status, 0) };
        let said = u64::from_le_bytes(said);
        verdict.equal("the child's sum", said, expected_sum(child_word, old));
        let own = sum(&pages);
        verdict.equal("the parent's sum", own, expected_sum(parent_word, old));
        verdict.equal(
            "the child's wait status",
            status,
            ((seed & 0x7f) as i32) << 8,
        );
        Ok(mix(said ^ own))
    })
}

/// A new process runs this program with a number and answers with a function of it.
pub fn exec(load: Load) -> Result<Outcome, String> {
    in_threads(load, |seed, verdict| {
        let output = Command::new("/proc/self/exe")
            .args(["--child", &seed.to_string()])
            .stdin(Stdio::null())
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let said = u64::from_str_radix(said.trim(), 16).unwrap_or(0);
        verdict.equal("the child's answer", said, mix(!seed));
        let code = output.status.code().unwrap_or(-1);
        verdict.equal("the child's exit status", code, child_status(seed).into());
        Ok(said)
    })
}

fn child_status(seed: u64) -> u8 {
    (seed & 0x3f) as u8 + 1
}

/// The part of the child in [`exec`].
pub fn child(seed: Option<&str>) -> ExitCode {
    let Some(seed) = seed.and_then(|s| s.parse::<u64>().ok()) else {
        return ExitCode::from(255);
    };
    println!("{:016x}", mix(!seed));
    ExitCode::from(child_status(seed))
}
