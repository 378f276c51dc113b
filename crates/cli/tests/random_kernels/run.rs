//! Runs one image and watches it.

use std::fs::File;
use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::random::Random;

/// The machine's memory in MiB.
const MEMORY_MIB: u64 = 16;
/// The most memory that the process may use: the machine's and what goes with it.
pub const MOST_KIB: u64 = (MEMORY_MIB + 160) * 1024;
/// `--timeout`, in seconds.
const TIME_LIMIT: u64 = 1;
/// How long it may take to end after that, on a busy host.
const SLACK: Duration = Duration::from_secs(60);
/// Clock ticks per second in `/proc/PID/stat`.
const TICKS: u64 = 100;

pub struct Ended {
    pub arguments: Vec<String>,
    /// `None` after a signal.
    pub status: Option<i32>,
    pub how: String,
    pub message: String,
    pub elapsed: Duration,
    pub peak_kib: u64,
    /// It had to be killed.
    pub overran: bool,
}

pub fn run(worker: u64, image: &[u8], random: &mut Random) -> Ended {
    let folder = std::env::temp_dir();
    let place = |what: &str| {
        folder.join(format!(
            "trapline-random-{}-{worker}-{what}",
            std::process::id()
        ))
    };
    let (kernel, errors) = (place("kernel"), place("errors"));
    std::fs::write(&kernel, image).expect("a temporary file");
    let cpus = random.pick(&[1, 1, 2, 3]);
    let arguments = [
        "run",
        "--kernel",
        &kernel.to_string_lossy(),
        "--serial",
        "null",
        "--memory",
        &format!("size={MEMORY_MIB}M"),
        "--cpus",
        &format!("boot={cpus}"),
        "--timeout",
        &TIME_LIMIT.to_string(),
    ]
    .map(str::to_owned)
    .to_vec();
    let start = Instant::now();
    let mut child = crate::support::command()
        .args(&arguments)
        .env("RUST_BACKTRACE", "1")
        .stdout(Stdio::null())
        .stderr(File::create(&errors).expect("a temporary file"))
        .spawn()
        .expect("trapline starts");
    let (mut peak_kib, mut overran) = (0, false);
    let status = loop {
        if let Some(status) = child.try_wait().expect("the child can be waited for") {
            break status;
        }
        if let Some(now) = peak(child.id()) {
            peak_kib = now.max(peak_kib);
        }
        if start.elapsed() > Duration::from_secs(TIME_LIMIT) + SLACK {
            overran = true;
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(3));
    };
    let elapsed = start.elapsed();
    let mut message = Vec::new();
    if let Ok(file) = File::open(&errors) {
        let _ = file.take(1 << 16).read_to_end(&mut message);
    }
    let _ = std::fs::remove_file(&kernel);
    let _ = std::fs::remove_file(&errors);
    Ended {
        arguments,
        status: status.code(),
        how: status.to_string(),
        message: String::from_utf8_lossy(&message).into_owned(),
        elapsed,
        peak_kib,
        overran,
    }
}

/// The process's peak resident set (VmHWM) so far.
fn peak(process: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// User and system time of all machines that have ended.
pub fn processor_time_of_all() -> Duration {
    let ticks = || {
        let text = std::fs::read_to_string("/proc/self/stat").ok()?;
        let fields: Vec<&str> = text.rsplit(')').next()?.split_whitespace().collect();
        // Times of children waited for: fields 16 and 17 of all, of which two come before.
        Some(fields.get(13)?.parse::<u64>().ok()? + fields.get(14)?.parse::<u64>().ok()?)
    };
    Duration::from_millis(ticks().unwrap_or(0) * 1000 / TICKS)
}
