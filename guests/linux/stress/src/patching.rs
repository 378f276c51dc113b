//! Code that is rewritten while the program runs: by its own thread, through another mapping, and
//! by another thread. What was written must run, never what was there before.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::Load;
use crate::bracket::{Line, Outcome, Verdict, mix};
use crate::cpu;
use crate::os::{self, Mapping};

/// Where the function lies in its page: its immediate operand is aligned, so that a store of it is
/// never torn.
const CODE: usize = 3;

/// The aligned place of the immediate operand.
const IMMEDIATE: usize = 4;

/// A function that returns a number.
struct Function<'a>(&'a Mapping);

impl Function<'_> {
    /// Writes `mov eax, value; ret` through the mapping.
    fn write(&self, value: u32) {
        self.bytes(&[0xb8], value, &[0xc3]);
    }

    /// Writes `mov edx, value; mov eax, edx; ret` through the mapping.
    fn write_other_form(&self, value: u32) {
        self.bytes(&[0xba], value, &[0x89, 0xd0, 0xc3]);
    }

    fn bytes(&self, before: &[u8], value: u32, after: &[u8]) {
        let value = value.to_le_bytes();
        let bytes = before.iter().chain(&value).chain(after);
        for (offset, byte) in bytes.enumerate() {
            // SAFETY: the function fits its page, and nobody runs it now.
            unsafe { self.0.at(CODE + offset).write_volatile(*byte) };
        }
    }

    /// Writes the immediate operand alone, with one store.
    fn patch(&self, value: u32) {
        // SAFETY: the place is aligned and in the page, and is only used atomically or by its own
        // thread.
        let immediate = unsafe { AtomicU32::from_ptr(self.0.at(IMMEDIATE).cast()) };
        immediate.store(value, Ordering::Release);
    }

    /// Runs it.
    fn call(&self) -> u32 {
        // SAFETY: the mapping holds a whole function by `write` before it is first called.
        let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(self.0.at(CODE)) };
        function()
    }
}

/// The number that the function returns in a round; never that of the round before.
fn value(round: u32) -> u32 {
    mix(round.into()) as u32 ^ round
}

/// The sum of all rounds' numbers.
fn checksum(rounds: u32) -> u64 {
    (0..rounds).fold(0, |sum, round| mix(sum ^ u64::from(value(round))))
}

fn trouble(error: std::io::Error) -> String {
    format!("the system refused a mapping: {error}")
}

/// A page that can be written and run.
fn page() -> Result<Mapping, String> {
    Mapping::anonymous(1, os::READ | os::WRITE | os::EXECUTE).map_err(trouble)
}

/// What a round writes: mostly the operand, now and then the whole function in another form.
fn rewrite(function: &Function, round: u32) {
    match round % 64 {
        0 => function.write(value(round)),
        32 => function.write_other_form(value(round)),
        _ => function.patch(value(round)),
    }
}

fn must_be(verdict: &Verdict, round: u32, got: u32) -> bool {
    verdict.equal(&format!("the result in round {round}"), got, value(round))
}

/// A thread rewrites its own function at the address where it runs it: no more than the call
/// itself is needed.
pub fn own(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let page = page()?;
    let function = Function(&page);
    for round in 0..load.rounds {
        rewrite(&function, round);
        if !must_be(&verdict, round, function.call()) {
            break;
        }
    }
    verdict.finish(checksum(load.rounds))
}

/// A thread rewrites its function through a second mapping of the same page, which takes a
/// serializing instruction before the call.
pub fn alias(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let file = os::memory_file(1).map_err(trouble)?;
    let data = Mapping::shared(&file, 0, 1, os::READ | os::WRITE).map_err(trouble)?;
    let code = Mapping::shared(&file, 0, 1, os::READ | os::EXECUTE).map_err(trouble)?;
    for round in 0..load.rounds {
        rewrite(&Function(&data), round);
        cpu::serialize();
        if !must_be(&verdict, round, Function(&code).call()) {
            break;
        }
    }
    verdict.finish(checksum(load.rounds))
}

/// A page is writable or executable, never both, and changes between them in every round.
pub fn protect(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let page = page()?;
    for round in 0..load.rounds {
        page.protect(os::READ | os::WRITE).map_err(trouble)?;
        rewrite(&Function(&page), round);
        page.protect(os::READ | os::EXECUTE).map_err(trouble)?;
        if os::try_store(page.at(64), 1) {
            verdict.fail(format!(
                "a store to read-only code succeeded in round {round}"
            ));
        }
        if !must_be(&verdict, round, Function(&page).call()) {
            break;
        }
    }
    verdict.finish(checksum(load.rounds))
}

/// One thread rewrites the function and then sets a flag; the other one sees the flag, serializes
/// and runs the function, then hands back.
pub fn other(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let page = page()?;
    let (written, run) = (Line(AtomicU32::new(0)), Line(AtomicU32::new(0)));
    std::thread::scope(|scope| {
        let (page, verdict, written, run) = (&page, &verdict, &written.0, &run.0);
        scope.spawn(move || {
            for round in 0..load.rounds {
                rewrite(&Function(page), round);
                written.store(round + 1, Ordering::Release);
                if !verdict.wait(|| run.load(Ordering::Acquire) == round + 1) {
                    return;
                }
            }
        });
        scope.spawn(move || {
            for round in 0..load.rounds {
                if !verdict.wait(|| written.load(Ordering::Acquire) == round + 1) {
                    return;
                }
                cpu::serialize();
                must_be(verdict, round, Function(page).call());
                run.store(round + 1, Ordering::Release);
            }
        });
    });
    verdict.finish(checksum(load.rounds))
}

/// How often X looks for Z's answer until it says that the patch is long done.
const PATIENCE: u32 = 1_000_000;

/// Three threads: X patches the function; Y, which runs it all the time, gets the new number and
/// tells Z by a flag; Z sees the flag, serializes, and must get the new number too, although X
/// never told it anything.
///
/// X speaks only when there is no answer for long: then Y runs the old code for ever, and says so.
pub fn chain(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let page = page()?;
    Function(&page).write(!value(0));
    let [seen, done, overdue] = std::array::from_fn(|_| Line(AtomicU32::new(0)));
    std::thread::scope(|scope| {
        let (page, verdict) = (&page, &verdict);
        let (seen, done, overdue) = (&seen.0, &done.0, &overdue.0);
        scope.spawn(move || {
            for round in 0..load.rounds {
                Function(page).patch(value(round));
                let mut looks = 0;
                let answered = || {
                    looks += 1;
                    if looks == PATIENCE {
                        overdue.store(round + 1, Ordering::Release);
                    }
                    done.load(Ordering::Acquire) == round + 1
                };
                if !verdict.wait(answered) {
                    return;
                }
            }
        });
        scope.spawn(move || {
            let mut old = !value(0);
            for round in 0..load.rounds {
                let runs_new_code = || {
                    let late = overdue.load(Ordering::Acquire) == round + 1;
                    cpu::serialize();
                    let got = Function(page).call();
                    if got != old || late {
                        must_be(verdict, round, got);
                    }
                    got == value(round)
                };
                if !verdict.wait_looking(8, runs_new_code) {
                    return;
                }
                old = value(round);
                seen.store(round + 1, Ordering::Release);
            }
        });
        scope.spawn(move || {
            for round in 0..load.rounds {
                if !verdict.wait(|| seen.load(Ordering::Acquire) == round + 1) {
                    return;
                }
                cpu::serialize();
                must_be(verdict, round, Function(page).call());
                done.store(round + 1, Ordering::Release);
            }
        });
    });
    verdict.finish(checksum(load.rounds))
}
