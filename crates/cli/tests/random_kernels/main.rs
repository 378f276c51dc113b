//! Random bytes as a kernel: no panic, an exit status that is documented, an end within the time
//! limit, no more memory than the machine needs.
//!
//! `TRAPLINE_FUZZ_SECONDS` sets how long (20 unless set), `TRAPLINE_FUZZ_PROCESSOR_SECONDS` ends the
//! run earlier, when the machines have used that much processor time. `TRAPLINE_FUZZ_SEED` repeats a
//! run: kernel `n` of a run depends on the seed and on `n` alone. `TRAPLINE_FUZZ_FIRST` begins at a
//! later kernel, `TRAPLINE_FUZZ_GUESTS` names a folder whose files are mutated too, and
//! `TRAPLINE_FUZZ_WORKERS` says how many machines run at a time (2 unless set).
//! Every minute it prints how far it is.

mod code;
mod container;
mod random;
mod run;
mod stage;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use container::Guests;
use random::Random;
use run::Ended;

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let hex = text.strip_prefix("0x");
    let number = hex.map_or_else(
        || text.parse().ok(),
        |hex| u64::from_str_radix(hex, 16).ok(),
    );
    Some(number.unwrap_or_else(|| panic!("{name}={text} is not a number")))
}

/// What all kernels of one kind came to.
#[derive(Default)]
struct Tally {
    by_status: BTreeMap<i32, u64>,
    peak_kib: u64,
}

#[test]
fn random_kernels_end_in_an_orderly_way() {
    let limit = Duration::from_secs(setting("TRAPLINE_FUZZ_SECONDS").unwrap_or(20));
    let processor_limit =
        setting("TRAPLINE_FUZZ_PROCESSOR_SECONDS").map_or(Duration::MAX, Duration::from_secs);
    let workers = setting("TRAPLINE_FUZZ_WORKERS").unwrap_or(2).clamp(1, 64);
    let seed = setting("TRAPLINE_FUZZ_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64)
    });
    println!(
        "TRAPLINE_FUZZ_SEED={seed:#x} TRAPLINE_FUZZ_SECONDS={}",
        limit.as_secs()
    );
    let folder = std::env::var_os("TRAPLINE_FUZZ_GUESTS").map(PathBuf::from);
    let guests = Guests::read(folder.as_deref());
    println!("{} guests to mutate", guests.len());

    let start = Instant::now();
    let next = AtomicU64::new(setting("TRAPLINE_FUZZ_FIRST").unwrap_or(0));
    let failed = AtomicBool::new(false);
    let tallies: Mutex<BTreeMap<&str, Tally>> = Mutex::default();
    let minutes = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let (next, failed, tallies, guests) = (&next, &failed, &tallies, &guests);
            let minutes = &minutes;
            scope.spawn(move || {
                while start.elapsed() < limit
                    && run::processor_time_of_all() < processor_limit
                    && !failed.load(Ordering::Relaxed)
                {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let mut random =
                        Random::new(seed ^ (n + 1).wrapping_mul(0xd134_2543_de82_ef95));
                    let (kind, image) = container::kernel(&mut random, guests);
                    let ended = run::run(worker, &image, &mut random);
                    if let Some(complaint) = complaint(&ended) {
                        failed.store(true, Ordering::Relaxed);
                        let name = format!("trapline-random-kernel-{seed:x}-{n}");
                        let kept = std::env::temp_dir().join(name);
                        let _ = std::fs::write(&kept, &image);
                        panic!(
                            "{kind} kernel {n} of seed {seed:#x}, kept as {}, run with {:?}: \
                             {complaint}\n{}",
                            kept.display(),
                            ended.arguments,
                            ended.message
                        );
                    }
                    let mut tallies = tallies.lock().unwrap_or_else(|e| e.into_inner());
                    let tally = tallies.entry(kind).or_default();
                    *tally
                        .by_status
                        .entry(ended.status.unwrap_or(-1))
                        .or_default() += 1;
                    tally.peak_kib = tally.peak_kib.max(ended.peak_kib);
                    let minute = start.elapsed().as_secs() / 60;
                    if minutes.fetch_max(minute, Ordering::Relaxed) < minute {
                        let used = run::processor_time_of_all().as_secs();
                        println!("{minute} min: {n} kernels, {used} s of processor time");
                    }
                }
            });
        }
    });
    let tallies = tallies.into_inner().unwrap_or_else(|e| e.into_inner());
    let mut total = 0;
    for (kind, tally) in &tallies {
        println!(
            "{kind}: by status {:?}, at most {} KiB",
            tally.by_status, tally.peak_kib
        );
        total += tally.by_status.values().sum::<u64>();
    }
    println!(
        "{total} kernels, {:.1} s of processor time",
        run::processor_time_of_all().as_secs_f64()
    );
    assert!(total > 0);
}

/// What is wrong with how a machine ended.
fn complaint(ended: &Ended) -> Option<String> {
    if ended.overran {
        return Some(format!(
            "still ran after {:.1} s",
            ended.elapsed.as_secs_f64()
        ));
    }
    if ended.message.contains("panicked") || ended.message.contains("RUST_BACKTRACE") {
        return Some("panicked".to_owned());
    }
    let Some(status) = ended.status else {
        return Some(format!("was killed by a signal: {}", ended.how));
    };
    // Power-off, debug exit with any value, unusable file, crash, time limit.
    let documented = status == 0 || status & 1 == 1 || matches!(status, 70 | 124);
    if !documented {
        return Some(format!("exit status {status}"));
    }
    let told = !ended.message.is_empty();
    if matches!(status, 70 | 124) && !told {
        return Some(format!("exit status {status} without a word"));
    }
    if ended.peak_kib > run::MOST_KIB {
        return Some(format!("used {} KiB", ended.peak_kib));
    }
    None
}
