//! Debian's unmodified kernel as a guest. `cargo xtask guest` fetches it; without it these tests
//! fail.

mod archive;
mod guest;
#[path = "../support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant, UNIX_EPOCH};

use guest::{Guest, Start, UP};
use rustix::process::{Pid, Signal, kill_process};

fn start(vcpus: u32, run: &str) -> Guest {
    Start {
        vcpus,
        run: Some(run),
        then: "poweroff",
        limit: 300,
        options: &[],
    }
    .on_pipes()
}

/// The counts of one line of /proc/interrupts, by VCPU.
fn counts(line: &str) -> Vec<u64> {
    line.split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect()
}

/// All VCPUs are there, each one's timer interrupts, the clock is right, and the power goes off.
fn boots(vcpus: u32) {
    // Something that waits a moment on every VCPU needs that VCPU's timer. The kernel's messages would
    // come between the words of a line.
    let run = "dmesg -n 1; echo VCPUS $(nproc); echo DATE $(date +%s); grep LOC: /proc/interrupts; \
               for c in $(seq 0 $(($(nproc) - 1))); do taskset -c $c sleep 0.05; done; sleep 2; \
               echo DATE $(date +%s); grep LOC: /proc/interrupts";
    let (status, said) = start(vcpus, run).end();
    assert_eq!(status, 0, "{}", said.text);

    let found: Vec<_> = said.after("VCPUS ").iter().map(|(n, _)| *n).collect();
    assert_eq!(found, [vcpus.to_string()]);

    let dates = said.after("DATE ");
    assert_eq!(dates.len(), 2, "{}", said.text);
    for (date, here) in &dates {
        let date: u64 = date.parse().unwrap();
        let here = here.duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(date.abs_diff(here) <= 2, "it is {date} there, {here} here");
    }

    let timers: Vec<_> = said
        .after("LOC:")
        .iter()
        .map(|(line, _)| counts(line))
        .collect();
    let [before, after] = &timers[..] else {
        panic!("no two samples of the timers: {}", said.text);
    };
    assert_eq!(
        (before.len(), after.len()),
        (vcpus as usize, vcpus as usize)
    );
    for (vcpu, (before, after)) in before.iter().zip(after).enumerate() {
        assert!(after > before, "the timer of VCPU {vcpu} stands at {after}");
    }
}

#[test]
fn boots_with_1_vcpu() {
    boots(1);
}

#[test]
fn boots_with_2_vcpus() {
    boots(2);
}

#[test]
fn boots_with_4_vcpus() {
    boots(4);
}

#[test]
fn boots_with_8_vcpus() {
    boots(8);
}

#[test]
fn a_reboot_starts_the_guest_again_and_sigterm_ends_it() {
    let guest = Start {
        vcpus: 4,
        run: Some("echo ran"),
        then: "reboot",
        limit: 300,
        options: &[],
    }
    .on_pipes();
    guest.wait_for(UP, 2);
    let pid = Pid::from_raw(guest.process().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let (status, _) = guest.end();
    assert_eq!(status, 128 + 15);
}

#[test]
fn a_failed_command_is_told_by_the_exit_status() {
    let (status, said) = start(1, "exit 5").end();
    assert_eq!(status, 5 << 1 | 1, "{}", said.text);
}

/// The lines of the stress program that hold results: name and checksum, or why a check was left
/// out.
fn results(said: &str) -> Vec<String> {
    said.lines()
        .filter(|line| {
            line.contains(" ok checksum=") || line.contains(" skipped: ") || line.contains("FAILED")
        })
        .map(|line| line.split(" (").next().unwrap().to_owned())
        .collect()
}

/// The stress program for this processor.
fn program() -> &'static Path {
    // Written once: a program that is being written cannot be run.
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| archive::unpack(&guest::file("initramfs.cpio"), "bin/stress-trapline"))
}

/// The stress program gives the same results in the guest as on the real processor.
fn stress(vcpus: u32, options: &str) {
    stress_under(vcpus, options, &[]);
}

/// As [`stress`], with further options of `trapline run`.
fn stress_under(vcpus: u32, options: &str, run_options: &[&str]) {
    let program = program();
    let guest = Start {
        vcpus,
        run: Some(&format!("stress-trapline --timeout 120 {options}")),
        then: "poweroff",
        limit: 300,
        options: run_options,
    }
    .on_pipes();
    let (status, said) = guest.end();
    let here = Command::new(program)
        .args(options.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let here = String::from_utf8(here.stdout).unwrap();
    println!("{}", results(&said.text).join("\n"));
    assert_eq!(status, 0, "{}", said.text);
    assert!(results(&here).len() > 10, "{here}");
    assert_eq!(results(&said.text), results(&here), "{}", said.text);
}

#[test]
fn stress_with_2_vcpus() {
    stress(2, "--percent 30");
}

#[test]
fn stress_with_4_vcpus() {
    stress(4, "--percent 100");
}

#[test]
fn stress_with_8_vcpus() {
    stress(8, "--percent 30 --threads 8");
}

/// Options that make the traces stricter, weaker where a guest may bear it, and busier than the
/// defaults (\[0075\] and \[0084\] of the seed).
const BRACKETING: [&str; 2] = ["--trace-semantics", "all=bracketing"];
const POST_WRITE_SYNC: [&str; 2] = ["--trace-semantics", "all=post-write-sync"];
const EVERYONE: [&str; 2] = ["--trace-notify", "all"];

#[test]
fn stress_with_2_vcpus_everything_bracketing() {
    stress_under(2, "--percent 10", &BRACKETING);
}

#[test]
fn stress_with_4_vcpus_everything_post_write_sync() {
    stress_under(4, "--percent 10", &POST_WRITE_SYNC);
}

#[test]
fn stress_with_8_vcpus_everyone_notified() {
    stress_under(8, "--percent 5 --threads 8", &EVERYONE);
}

/// Takes minutes: `cargo test --release --package trapline --test linux -- --ignored --nocapture
/// stress_under_every_override`.
#[test]
#[ignore = "takes minutes"]
fn stress_under_every_override() {
    for options in [&BRACKETING, &POST_WRITE_SYNC, &EVERYONE] {
        // On one VCPU, handing over to who spins takes a time slice.
        for (vcpus, percent) in [(1, 1), (2, 30), (4, 30), (8, 30)] {
            println!("{vcpus} VCPUs, {options:?}");
            stress_under(vcpus, &format!("--percent {percent}"), options);
        }
    }
}

/// Processor time that a process has used.
fn processor_time(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // The name in parentheses may hold anything.
    let fields = stat.rsplit_once(')').unwrap().1;
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap())
        .sum();
    Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

#[test]
fn the_console_takes_input_and_an_idle_guest_costs_nothing() {
    let mut guest = Start {
        vcpus: 8,
        run: None,
        then: "poweroff",
        limit: 300,
        options: &[],
    }
    .on_pipes();
    guest.wait_for(UP, 1);
    guest.wait_for("# ", 1);
    // The shell echoes what is typed, so the answer must not be in it.
    guest.type_in("echo answer=$((6*7))\n");
    guest.wait_for("answer=42", 1);

    // What the kernel put off during the boot comes first.
    std::thread::sleep(Duration::from_secs(5));
    let (before, start) = (processor_time(guest.process()), Instant::now());
    std::thread::sleep(Duration::from_secs(5));
    let used = processor_time(guest.process()) - before;
    let share = used.as_secs_f64() / start.elapsed().as_secs_f64();
    println!("8 idle VCPUs use {:.1} % of a processor", 100.0 * share);
    assert!(share < 0.1, "{share}");

    guest.type_in("poweroff -f\n");
    assert_eq!(guest.end().0, 0);
}

#[test]
fn ctrl_a_x_leaves_a_terminal() {
    use rustix::fs::{Mode, OFlags};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let name = ptsname(&controller, Vec::new()).unwrap();
    let user = rustix::fs::open(name, flags, Mode::empty()).unwrap();
    let mut guest = Start {
        vcpus: 2,
        run: None,
        then: "poweroff",
        limit: 120,
        options: &[],
    }
    .on_terminal(controller, user);
    guest.wait_for("Linux version", 1);
    guest.type_in("\x01x");
    assert_eq!(guest.end().0, 0);
}

/// Takes minutes: `cargo test --package trapline --test linux -- --ignored --nocapture`.
#[test]
#[ignore = "takes minutes"]
fn twenty_boots_in_a_row() {
    for boot in 1..=20 {
        let start = Instant::now();
        let guest = self::start(4, "nproc");
        guest.wait_for(UP, 1);
        let up = start.elapsed();
        let (status, said) = guest.end();
        assert_eq!(status, 0, "boot {boot}: {}", said.text);
        println!("boot {boot}: up after {:.1} s", up.as_secs_f64());
    }
}
