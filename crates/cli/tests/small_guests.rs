//! The small assembly guests of `guests/small`, each as a test: they check themselves and report
//! through the debug-exit port.
//!
//! They are assembled once, into cargo's folder for test files. GNU as and ld must be there.

mod support;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use support::build_guests;

/// A guest that wrote 16 to the debug-exit port.
const PASS: i32 = 33;
/// Guest crashed.
const CRASH: i32 = 70;
/// The time limit passed.
const TIMEOUT: i32 = 124;

/// The folder of the built guests.
fn images() -> &'static Path {
    static IMAGES: OnceLock<PathBuf> = OnceLock::new();
    // Fewer rounds than by hand: the model checks look at the interleavings.
    IMAGES.get_or_init(|| build_guests("small-guests", &[], "--defsym ROUNDS=2000"))
}

/// Runs a guest with these further options.
fn run(guest: &str, options: &[&str]) -> Output {
    support::command()
        .args(["run", "--serial", "tty", "--kernel"])
        .arg(images().join(guest).with_extension("elf"))
        .args(options)
        .output()
        .unwrap()
}

/// Standard output and error, for messages.
fn texts(output: &Output) -> (String, String) {
    (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// Runs a guest that checks itself, with further options; all its checks must pass, and it must have
/// made some.
fn passes_with(guest: &str, vcpus: u32, options: &[&str]) {
    let cpus = format!("boot={vcpus}");
    let options = [&["--timeout", "300", "--cpus", &cpus], options].concat();
    let output = run(guest, &options);
    let (out, err) = texts(&output);
    let context = || format!("{guest} with {vcpus} VCPUs:\n{out}{err}");
    assert_eq!(output.status.code(), Some(PASS), "{}", context());
    let summary = out.lines().last().unwrap_or_default().trim_end();
    let checks = summary
        .strip_prefix(&format!("{guest}: "))
        .and_then(|rest| rest.strip_suffix(" checks, pass"))
        .and_then(|count| count.parse::<u64>().ok());
    assert!(checks.is_some_and(|n| n > 0), "{}", context());
    assert!(!out.contains("FAIL"), "{}", context());
}

/// One test per guest and number of VCPUs, with either engine.
macro_rules! guests {
    ($($test:ident: $guest:literal, $vcpus:literal;)*) => {
        mod translated {
            $(
                #[test]
                fn $test() {
                    super::passes_with($guest, $vcpus, &["--engine", "translate"]);
                }
            )*
        }
        mod stepped {
            $(
                #[test]
                fn $test() {
                    super::passes_with($guest, $vcpus, &["--engine", "step"]);
                }
            )*
        }
    };
}

guests! {
    exceptions: "exceptions", 1;
    exceptions_beside_an_idle_vcpu: "exceptions", 2;
    debug: "debug", 1;
    paging: "paging", 1;
    segments: "segments", 1;
    strings: "strings", 1;
    edges: "edges", 1;
    clock: "clock", 1;
    calibrate: "calibrate", 1;
    selfmod: "selfmod", 1;
    selfmod_beside_idle_vcpus: "selfmod", 4;
    paths: "paths", 1;
    paths_beside_an_idle_vcpu: "paths", 2;
    loops: "loops", 1;
    loops_beside_an_idle_vcpu: "loops", 2;
    patched: "patched", 2;
    patched_beside_idle_vcpus: "patched", 4;
    smp_of_2: "smp", 2;
    smp_of_3: "smp", 3;
    smp_of_4: "smp", 4;
    smp_of_8: "smp", 8;
    cross_mod_of_2: "cross_mod", 2;
    cross_mod_of_3: "cross_mod", 3;
    cross_mod_of_4: "cross_mod", 4;
    cross_mod_of_8: "cross_mod", 8;
}

/// Runs a guest, which must pass; the first VCPU's statistics.
fn statistics(guest: &str, vcpus: u32) -> serde_json::Value {
    let stats = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(guest);
    let stats = stats.with_extension("json");
    passes_with(guest, vcpus, &["--stats", stats.to_str().unwrap()]);
    let stats: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&stats).unwrap()).unwrap();
    stats["boots"][0]["vcpus"][0].clone()
}

/// The guests' loops did become paths.
#[test]
fn paths_are_made() {
    for guest in ["paths", "loops"] {
        let vcpu = statistics(guest, 1);
        assert!(vcpu["paths"].as_u64().unwrap() >= 8, "{guest}: {vcpu}");
    }
}

/// Code that is rewritten did go through all that makes it cheaper.
#[test]
fn rewritten_code_becomes_cheaper() {
    let vcpu = statistics("patched", 2);
    for (what, least) in [
        ("run_time_immediates", 10),
        ("revived_blocks", 1),
        ("stepped_rewrites", 1000),
    ] {
        assert!(vcpu[what].as_u64().unwrap() >= least, "{what}: {vcpu}");
    }
}

/// The guests for one VCPU, with both engines at once.
mod lockstep {
    fn passes(guest: &str) {
        let stats = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
        let stats = stats.join(format!("lockstep-{guest}.json"));
        let path = stats.to_str().unwrap();
        super::passes_with(guest, 1, &["--engine", "lockstep", "--stats", path]);
        let stats: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&stats).unwrap()).unwrap();
        let lockstep = &stats["boots"][0]["vcpus"][0]["lockstep"];
        assert!(lockstep["compared"].as_u64().unwrap() > 100, "{lockstep}");
    }

    #[test]
    fn exceptions() {
        passes("exceptions");
    }
    #[test]
    fn paths() {
        passes("paths");
    }
    #[test]
    fn loops() {
        passes("loops");
    }
    #[test]
    fn paging() {
        passes("paging");
    }
    #[test]
    fn segments() {
        passes("segments");
    }
    #[test]
    fn strings() {
        passes("strings");
    }
    #[test]
    fn selfmod() {
        passes("selfmod");
    }
}

/// What `cross_mod` says with these semantics of kind `code` and notifications that take a while.
fn cross_mod_weakened(semantics: &str) -> (Option<i32>, String) {
    let semantics = format!("code={semantics}");
    let options = [
        "--timeout",
        "300",
        "--cpus",
        "boot=3",
        "--trace-semantics",
        &semantics,
        "--debug-notice-delay",
        "code=200",
    ];
    let output = run("cross_mod", &options);
    (output.status.code(), texts(&output).0)
}

/// The test `order` or `chain` as a whole failed somewhere: old code ran, or an old opcode met a new
/// operand, which is read at run time, and led astray.
fn stale(out: &str, test: &str) -> bool {
    let (failure, astray) = (format!("FAIL {test}, "), format!("{test}, "));
    out.lines().any(|line| {
        line.starts_with(&failure) && line.contains("stale code")
            || line.starts_with(&astray) && line.contains("FAIL unexpected exception")
    })
}

#[test]
fn delayed_notifications_do_no_harm_under_bracketing() {
    let (status, out) = cross_mod_weakened("bracketing");
    assert_eq!(status, Some(PASS), "{out}");
}

#[test]
fn the_actor_tells_of_new_code_under_post_write_async() {
    let (_, out) = cross_mod_weakened("post-write-async");
    assert!(stale(&out, "order"), "{out}");
}

#[test]
fn a_device_writes_by_dma() {
    for vcpus in [1, 3] {
        passes_with("dma", vcpus, &["--device", "dma-probe"]);
    }
}

#[test]
fn a_triple_fault_prints_the_registers() {
    let output = run("crash_triple", &["--timeout", "60"]);
    let (out, err) = texts(&output);
    assert_eq!(output.status.code(), Some(CRASH), "{out}{err}");
    assert!(out.contains("crash_triple: now"), "{out}");
    assert!(err.contains("triple fault"), "{err}");
    assert!(err.contains("rax 0000000000007219"), "{err}");
    assert!(err.contains("mode Long64"), "{err}");
}

#[test]
fn running_into_a_hole_ends_in_a_crash() {
    // Ones are no instruction, and there is no handler.
    let output = run("crash_hole", &["--timeout", "60"]);
    let (out, err) = texts(&output);
    assert_eq!(output.status.code(), Some(CRASH), "{out}{err}");
    assert!(err.contains("triple fault"), "{err}");
    assert!(err.contains("rip 00000000d0000000"), "{err}");
}

#[test]
fn a_hanging_guest_is_stopped_by_the_time_limit() {
    let output = run("hang", &["--timeout", "2"]);
    let (out, err) = texts(&output);
    assert_eq!(output.status.code(), Some(TIMEOUT), "{out}{err}");
    assert!(out.contains("hang: spinning"), "{out}");
    assert!(err.contains("--timeout"), "{err}");
}

#[test]
fn the_guest_chooses_the_exit_status() {
    // (V << 1) | 1
    for (options, status) in [
        (&[][..], 85),
        (&["--cmdline", "exit=3"], 7),
        (&["--cmdline", "exit=0"], 1),
    ] {
        let output = run("exit", options);
        let (out, err) = texts(&output);
        assert_eq!(output.status.code(), Some(status), "{options:?} {out}{err}");
    }
}
