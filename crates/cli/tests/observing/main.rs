//! Seeing what traces do: `--events`, `--stats` and `trapline report`, with real guests.

mod browser;
mod guest;
#[path = "../support/mod.rs"]
mod support;
mod trace_file;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest::{Folder, MEMORY_BYTES, PASS, command, image, machine, recorded, text, two_vcpus};
use serde_json::Value;
use support::trapline;
use trace_file::{check_nesting, check_notifications, of, span, vcpu};

/// Sum over the statistics of all kinds but devices' registers.
fn memory_total(stats: &Value, field: &str) -> u64 {
    let kinds = stats["boots"][0]["traces"]["kinds"].as_array().unwrap();
    let memory = kinds.iter().filter(|k| k["kind"] != "device");
    memory.map(|k| k[field].as_u64().unwrap()).sum()
}

#[test]
fn a_run_of_two_vcpus_is_in_the_file() {
    let folder = two_vcpus();
    let (file, stats) = (folder.json("events"), folder.json("stats"));
    let facts = &file["otherData"];
    assert_eq!(facts["vcpus"], 2);
    assert_eq!(facts["memory_bytes"], MEMORY_BYTES);
    assert_eq!(facts["dropped"], stats["events"]["dropped"]);
    assert_eq!(facts["events"], stats["events"]["written"]);
    assert_eq!(stats["events"]["stopped"], Value::Null);
    check_nesting(&file);

    let names: Vec<_> = trace_file::events(&file)
        .iter()
        .filter(|e| e["name"] == "thread_name")
        .map(|e| e["args"]["name"].as_str().unwrap())
        .collect();
    assert_eq!(names[..2], ["VCPU 0", "VCPU 1"]);

    // The guest patches code for the other VCPU, and nobody else runs it.
    let writes: Vec<&Value> = of(&file, "actor")
        .filter(|e| e["name"] == "code write")
        .collect();
    assert!(writes.len() > 100, "{} writes of code", writes.len());
    for write in &writes {
        let args = &write["args"];
        let other = 1 - vcpu(write).expect("a VCPU wrote");
        assert_eq!(args["semantics"], "bracketing");
        assert_eq!(args["consumers"], serde_json::json!([other]), "{write}");
    }
    // Everything is described.
    for category in ["notification", "invalidation"] {
        let mut events = of(&file, category).peekable();
        assert!(events.peek().is_some(), "{category}");
        for event in events {
            let args = &event["args"];
            // The processor's own descriptors are written, too.
            let semantics = match args["kind"].as_str() {
                Some("code") => "bracketing",
                Some("descriptor") => "post-write-sync",
                _ => panic!("{event}"),
            };
            assert_eq!(args["semantics"], semantics, "{event}");
            assert!(args["range"].is_string(), "{event}");
        }
    }
    // An acknowledgement is where a stall begins.
    let starts = |category| {
        of(&file, category)
            .map(|e| span(e).0)
            .collect::<BTreeSet<_>>()
    };
    assert_eq!(starts("acknowledgement"), starts("stall"));

    // With nothing dropped, the file and the counters say the same.
    if facts["dropped"] == 0 {
        assert!(check_notifications(&file) > 100);
        let writes: Vec<&Value> = of(&file, "actor")
            .filter(|e| e["args"]["kind"] != "device")
            .collect();
        assert_eq!(writes.len() as u64, memory_total(&stats, "events"));
        let notified = writes
            .iter()
            .map(|w| w["args"]["consumers"].as_array().unwrap().len() as u64);
        assert_eq!(notified.sum::<u64>(), memory_total(&stats, "notifications"));
        for vcpu_stats in stats["boots"][0]["vcpus"].as_array().unwrap() {
            let number = vcpu_stats["vcpu"].as_u64();
            // An access that hits two regions is two events, and one time an actor.
            let own = writes.iter().filter(|w| vcpu(w) == number);
            let own: BTreeSet<_> = own.map(|w| span(w)).collect();
            assert_eq!(vcpu_stats["roles"]["actor"], own.len());
            let invalidated: u64 = of(&file, "invalidation")
                .filter(|e| vcpu(e) == number)
                .map(|e| e["args"]["count"].as_u64().unwrap())
                .sum();
            let kinds = vcpu_stats["invalidations"].as_object().unwrap();
            let counted: u64 = kinds.values().map(|n| n.as_u64().unwrap()).sum();
            assert_eq!(counted, invalidated);
        }
    }
}

#[test]
fn four_vcpus_are_told_once_each_and_no_bystander() {
    let folder = recorded("four", "cross_mod", 4);
    let file = folder.json("events");
    check_nesting(&file);
    if file["otherData"]["dropped"] == 0 {
        assert!(check_notifications(&file) > 100);
    }
}

#[test]
fn without_code_that_changes_nobody_is_notified_of_any() {
    let folder = recorded("smp", "smp", 2);
    let file = folder.json("events");
    check_nesting(&file);
    assert!(of(&file, "establish").any(|e| e["args"]["kind"] == "code"));
    for event in of(&file, "actor").filter(|e| e["args"]["kind"] == "device") {
        assert_eq!(event["args"]["consumers"], serde_json::json!([]), "{event}");
    }
    assert_eq!(
        of(&file, "drop").count() > 0,
        file["otherData"]["dropped"] != 0
    );
}

#[test]
fn statistics_have_every_field() {
    let folder = two_vcpus();
    let stats = folder.json("stats");
    let number = |at: &Value, field: &str| {
        assert!(at[field].is_number(), "{field} in {at}");
    };
    number(&stats, "host_seconds");
    let boot = &stats["boots"][0];
    let code = &boot["traces"]["kinds"][0];
    assert_eq!(
        (&code["kind"], &code["semantics"]),
        (&"code".into(), &"bracketing".into())
    );
    for field in ["events", "notifications", "acknowledgements"] {
        assert!(code[field].as_u64().unwrap() > 0, "{field}");
    }
    for field in ["count", "p50_ns", "p99_ns", "max_ns"] {
        number(&code["waits"], field);
    }
    let vcpus = boot["vcpus"].as_array().unwrap();
    assert_eq!(vcpus.len(), 2);
    for vcpu in vcpus {
        for field in [
            "instructions",
            "host_seconds",
            "running_seconds",
            "halted_seconds",
            "tlb_fills",
            "decoded_blocks",
            "decoded_bytes",
            "translated_blocks",
            "translated_bytes",
        ] {
            number(vcpu, field);
        }
        for field in ["actor", "consumer", "bystander"] {
            number(&vcpu["roles"], field);
        }
        for field in [
            "port",
            "device",
            "msr",
            "cpuid",
            "sensed",
            "halts",
            "exceptions",
            "interrupts",
        ] {
            number(&vcpu["exits"], field);
        }
        // The code that was changed was invalidated and decoded again.
        for field in ["invalidations", "rederivations"] {
            assert!(vcpu[field]["code"].as_u64().unwrap() > 0, "{field}");
        }
    }
}

#[test]
fn the_file_is_whole_after_a_crash() {
    let folder = Folder::new("crash");
    let arguments = command(&folder, "crash_triple", 1);
    let output = {
        let _machine = machine();
        trapline(&arguments)
    };
    assert_eq!(output.status.code(), Some(70), "{}", text(&output.stderr));
    let file = folder.json("events");
    assert_eq!(file["otherData"]["stopped"], Value::Null);
    assert!(of(&file, "establish").count() > 0);
}

/// Starts a guest that never ends, waits until events are in its file, and kills it with `signal`.
fn killed(test: &str, signal: &str) -> (Option<i32>, Value) {
    let folder = Folder::new(test);
    let _machine = machine();
    let mut child = support::command()
        .args(command(&folder, "hang", 2))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let limit = Instant::now() + Duration::from_secs(60);
    let written = || {
        let bytes = std::fs::read(folder.path("events")).unwrap_or_default();
        let whole: Option<Value> = serde_json::from_slice(&bytes).ok();
        whole.is_some_and(|file| of(&file, "establish").any(|e| vcpu(e).is_some()))
    };
    while !written() {
        assert!(Instant::now() < limit, "no events within a minute");
        thread::sleep(Duration::from_millis(10));
    }
    let kill = format!("kill -{signal} {}", child.id());
    let sent = Command::new("sh").args(["-c", &kill]).status().unwrap();
    assert!(sent.success());
    let status = child.wait().unwrap();
    (status.code(), folder.json("events"))
}

#[test]
fn the_file_is_whole_after_being_asked_to_end() {
    let (status, file) = killed("term", "TERM");
    assert_eq!(status, Some(128 + 15));
    assert_eq!(file["otherData"]["vcpus"], 2);
}

#[test]
fn the_file_is_whole_after_being_killed() {
    let (status, file) = killed("kill", "KILL");
    assert_eq!(status, None);
    assert_eq!(file["otherData"]["vcpus"], 2);
}

/// One line of warning, the guest's own end, and the statistics tell why the recording ended.
fn unharmed(folder: &Folder, output: &std::process::Output, reason: &str) {
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(PASS), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.contains("takes no more events"), "{message}");
    let events = &folder.json("stats")["events"];
    assert!(
        events["stopped"].as_str().unwrap().contains(reason),
        "{events}"
    );
    assert!(events["dropped"].as_u64().unwrap() > 0, "{events}");
}

#[test]
fn a_full_disk_leaves_the_guest_alone() {
    let folder = Folder::new("full");
    let mut arguments = command(&folder, "cross_mod", 2);
    for argument in &mut arguments {
        if argument.ends_with("/events") {
            *argument = "/dev/full".into();
        }
    }
    let output = {
        let _machine = machine();
        trapline(&arguments)
    };
    unharmed(&folder, &output, "No space");
}

#[test]
fn a_limit_of_file_sizes_leaves_the_guest_and_what_is_written_alone() {
    let folder = Folder::new("limit");
    // In blocks of 512 bytes: 20 MiB. Guest memory and generated code lie in files, too.
    let script = format!(
        "ulimit -f 40960; exec {} \"$@\"",
        env!("CARGO_BIN_EXE_trapline")
    );
    let _machine = machine();
    let output = Command::new("sh")
        .args(["-c", &script, "sh"])
        .args(command(&folder, "selfmod", 1))
        .args(["--engine", "step"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    unharmed(&folder, &output, "too large");
    let file = folder.json("events");
    let stopped = file["otherData"]["stopped"].as_str().unwrap();
    assert!(stopped.contains("too large"), "{stopped}");
    let report = trapline(&["report".into(), folder.path("events")]);
    assert_eq!(report.status.code(), Some(0), "{}", text(&report.stderr));
    assert!(text(&report.stdout).contains("the recording ended before the machine did"));
}

#[test]
fn a_path_that_cannot_be_written_is_told_before_the_guest_starts() {
    let folder = Folder::new("unwritable");
    let mut arguments = command(&folder, "cross_mod", 1);
    for argument in &mut arguments {
        if argument.ends_with("/events") {
            *argument = "/nonexistent/events".into();
        }
    }
    let output = trapline(&arguments);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(71), "{message}");
    assert!(
        message.contains("/nonexistent/events for --events"),
        "{message}"
    );
    assert_eq!(message.lines().count(), 1, "{message}");
    assert_eq!(text(&output.stdout), "");
    assert!(!folder.path("stats").exists());
}

#[test]
fn one_file_for_two_things_is_wrong_usage() {
    let kernel = image("hang").display().to_string();
    let output = trapline(&[
        "run", "--kernel", &kernel, "--stats", "/tmp/x", "--events", "/tmp/x",
    ]);
    assert_eq!(output.status.code(), Some(64));
    assert!(text(&output.stderr).contains("--stats and --events"));
}

#[test]
fn the_report_names_actors_consumers_and_waits() {
    let folder = recorded("three", "cross_mod", 3);
    let (events, stats) = (folder.path("events"), folder.path("stats"));
    let output = trapline(&["report".into(), events, stats]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report = text(&output.stdout);
    for part in [
        "Roles by piece of traced memory",
        "Busiest regions",
        "Actors, for acknowledgements: ",
        "p50",
        "p90",
        "p99",
        "VCPU 2",
        "re-derivations",
        "####",
    ] {
        assert!(report.contains(part), "{part} in {report}");
    }
    // Each access has one actor, and each VCPU is its consumer or bystander.
    let all = report
        .lines()
        .find_map(|line| line.trim().strip_prefix("all "))
        .unwrap();
    let mut words = all.split_whitespace();
    let accesses: u64 = words.next().unwrap().parse().unwrap();
    let roles: Vec<Vec<u64>> = words
        .map(|word| word.split('/').map(|n| n.parse().unwrap()).collect())
        .collect();
    assert_eq!(roles.len(), 3);
    assert_eq!(roles.iter().map(|r| r[0]).sum::<u64>(), accesses);
    assert!(roles.iter().all(|r| r[1] + r[2] == accesses), "{all}");
    assert!(accesses > 0);
}

#[test]
fn the_page_holds_the_run_and_works_in_a_browser() {
    let recording = two_vcpus();
    let folder = Folder::new("page");
    let page = folder.path("page.html");
    let output = trapline(&[
        "report".into(),
        recording.path("events"),
        "--html".into(),
        page.clone(),
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let html = std::fs::read_to_string(&page).unwrap();
    let (_, rest) = html.split_once("id=\"data\">").unwrap();
    let (block, _) = rest.split_once("</script>").unwrap();
    let data: Value = serde_json::from_str(block).unwrap();
    assert_eq!((&data["vcpus"], &data["omitted"]), (&2.into(), &0.into()));
    let count = data["events"]["start"].as_array().unwrap().len();
    assert_eq!(data["total"], count);
    let acts = of(&recording.json("events"), "actor").count();
    let actor = data["categories"]
        .as_array()
        .unwrap()
        .iter()
        .position(|c| c == "actor");
    let categories = data["events"]["category"].as_array().unwrap();
    let acts_of_page = categories
        .iter()
        .filter(|c| c.as_u64() == actor.map(|a| a as u64));
    assert_eq!(acts_of_page.count(), acts);

    let profile = folder.path("profile");
    let Some(document) = browser::document(&page, "time=100-300&memory=0x104000+512", &profile)
    else {
        return;
    };
    assert!(
        !document.contains("data-failed"),
        "the page's program failed"
    );
    assert!(
        document.contains(&format!("data-ready=\"{count}\"")),
        "it did not finish"
    );
    assert!(
        document.contains("100 µs to 300 µs (200 µs)"),
        "it shows the time asked for"
    );
    assert!(
        document.contains("0x104000 + 16 KiB"),
        "it shows the memory asked for"
    );
    let row = data["roles"]["rows"][0]["range"].as_str().unwrap();
    assert!(document.contains(row), "the table of roles has {row}");
}

/// A report of these files must be refused with this status and one line that has `hint` in it.
fn refused(arguments: &[&str], status: i32, hint: &str) {
    support::refused(&[&["report"], arguments].concat(), status, hint);
}

#[test]
fn bad_files_are_refused() {
    let recording = two_vcpus();
    let folder = Folder::new("bad");
    let whole = std::fs::read(recording.path("events")).unwrap();
    let write = |name: &str, content: &[u8]| folder.write(name, content).display().to_string();
    refused(&["/nonexistent"], 65, "/nonexistent");
    refused(&[&folder.path("").display().to_string()], 65, "cannot read");
    refused(&[&write("empty", b"")], 65, "is empty");
    refused(
        &[&write("half", &whole[..whole.len() / 2])],
        65,
        "ends in the middle",
    );
    refused(&[&write("first", &whole[..1])], 65, "ends in the middle");
    refused(
        &[&write("binary", b"\x7fELF\x02\x01\x00")],
        65,
        "no file of --events",
    );
    refused(
        &[&write("latin", b"{\"traceEvents\":[\"\xff\"]}")],
        65,
        "no file of --events",
    );
    refused(&[&write("other", b"{\"a\":1}")], 65, "neither");
    let foreign = b"{\"traceEvents\":[],\"otherData\":{\"tool\":\"x\",\"vcpus\":1}}";
    refused(&[&write("foreign", foreign)], 65, "written by 'x'");
    let negative = text(&whole).replacen("\"ts\":", "\"ts\":-", 1);
    refused(&[&write("negative", negative.as_bytes())], 65, "is no time");
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    refused(
        &[&write("deep", deep.as_bytes())],
        65,
        "no file of --events",
    );

    let (events, stats) = (
        recording.path("events").display().to_string(),
        recording.path("stats").display().to_string(),
    );
    let page = folder.path("page.html").display().to_string();
    refused(&[&stats, "--html", &page], 64, "0 are given");
    refused(&[&events, &events, "--html", &page], 64, "2 are given");
    refused(
        &[&events, "--html", "/nonexistent/p.html"],
        71,
        "/nonexistent/p.html",
    );
    refused(&[&events, "--html", &events], 64, "--html");
    refused(&[], 64, "PATH");
    refused(&[&events, "--top", "many"], 64, "--top");
    // Nothing of this has changed the file.
    assert_eq!(std::fs::read(&events).unwrap(), whole);
}

#[test]
fn a_reader_that_leaves_early_is_no_fault() {
    let folder = two_vcpus();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = support::command()
        .arg("report")
        .arg(folder.path("events"))
        .stdout(writer)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stderr), "");
}

/// What `perf inject --jit` is to read holds the guest's code, by its addresses.
#[test]
fn a_jitdump_names_the_code_of_a_guest() {
    let folder = Folder::new("jitdump");
    let at = folder.path("").display().to_string();
    let kernel = image("cross_mod").display().to_string();
    let run = |at: &str| {
        trapline(&[
            "run",
            "--kernel",
            &kernel,
            "--cpus",
            "boot=2",
            "--jitdump",
            at,
        ])
    };
    let output = run(&at);
    assert_eq!(output.status.code(), Some(33), "{}", text(&output.stderr));
    let mut dumps = std::fs::read_dir(folder.path("")).unwrap();
    let dump = dumps.next().unwrap().unwrap();
    let name = dump.file_name().into_string().unwrap();
    assert!(
        name.starts_with("jit-") && name.ends_with(".dump"),
        "{name}"
    );
    let bytes = std::fs::read(dump.path()).unwrap();
    let named = b"guest kernel 0x10";
    assert!(bytes.windows(named.len()).any(|part| part == named));

    let output = run("/nonexistent");
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(71), "{message}");
    assert!(message.contains("/nonexistent/jit-"), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
}
