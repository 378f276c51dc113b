//! The binary as its user meets it: arguments, messages and exit statuses.

mod support;

use std::fs::File;
use std::io::Read;
use std::process::Stdio;

use support::{closed_pipe, refused, scratch, trapline};

#[test]
fn help_teaches_by_example() {
    for arguments in [&["--help"][..], &["run", "--help"]] {
        let output = trapline(arguments);
        assert_eq!(output.status.code(), Some(0));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("trapline run --kernel vmlinuz"), "{text}");
    }
    let text = String::from_utf8(trapline(&["run", "--help"]).stdout).unwrap();
    assert!(text.contains("Ctrl-A x") && text.contains("124"), "{text}");
}

#[test]
fn no_command_shows_help_and_is_wrong_usage() {
    let output = trapline::<&str>(&[]);
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8(output.stderr).unwrap().contains("Usage:"));
}

#[test]
fn wrong_usage() {
    refused(&["walk"], 64, "walk");
    refused(&["walk"], 64, "see trapline --help");
    refused(&["ctl", "--api-socket", "s", "walk"], 64, "ctl --help");
    refused(&["run", "--kernel", "k", "--log", "loud"], 64, "level");
    refused(&["run"], 64, "--kernel");
    refused(&["run", "--kernal", "k"], 64, "--kernel");
    refused(&["run", "--kernel", "k", "--cpus", "boot=0"], 64, "1 to 64");
    refused(
        &["run", "--kernel", "k", "--cpus", "boot=10000"],
        64,
        "1 to 64",
    );
    refused(
        &["run", "--kernel", "k", "--cpus", "boot=1,boot=1"],
        64,
        "twice",
    );
    refused(
        &["run", "--kernel", "k", "--memory", "size=1M"],
        64,
        "at least 2M",
    );
    refused(
        &["run", "--kernel", "k", "--memory", "size=x"],
        64,
        "no size",
    );
    refused(
        &["run", "--kernel", "k", "--serial", "pty"],
        64,
        "socket=PATH",
    );
    refused(
        &["run", "--kernel", "k", "--engine", "warp"],
        64,
        "translate",
    );
    refused(&["run", "--kernel", "k", "--timeout", "-1"], 64, "");
    refused(
        &["run", "--kernel", "k", "--kernel", "k"],
        64,
        "multiple times",
    );
}

#[test]
fn bad_input_files() {
    refused(&["run", "--kernel", "/nonexistent"], 65, "/nonexistent");
    refused(&["run", "--kernel", "/"], 65, "regular file");
    let noise = scratch("noise", &[0xa5; 5000]);
    refused(
        &["run", "--kernel", noise.to_str().unwrap()],
        65,
        "neither a bzImage",
    );
    let empty = scratch("empty", &[]);
    refused(
        &["run", "--kernel", empty.to_str().unwrap()],
        65,
        "neither a bzImage",
    );
    for path in [noise, empty] {
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn what_the_host_refuses() {
    refused(
        &["run", "--kernel", "/", "--serial", "file=/nonexistent/x"],
        71,
        "/nonexistent/x",
    );
    refused(
        &["run", "--kernel", "/", "--serial", "socket=/nonexistent/x"],
        71,
        "/nonexistent/x",
    );
    refused(
        &["run", "--kernel", "/", "--log-file", "/nonexistent/x"],
        71,
        "/nonexistent/x",
    );
}

#[test]
fn closed_outputs_are_no_panic() {
    for arguments in [
        &["--help"][..],
        &["run", "--help"],
        &["run"],
        &["run", "--kernel", "/"],
    ] {
        let expected = trapline(arguments).status;
        for (broken_stdout, broken_stderr) in [(true, false), (false, true), (true, true)] {
            let sink = |broken| if broken { closed_pipe() } else { Stdio::null() };
            let status = support::command()
                .args(arguments)
                .stdout(sink(broken_stdout))
                .stderr(sink(broken_stderr))
                .status()
                .unwrap();
            assert_eq!(status, expected, "{arguments:?}");
        }
        // A device that is always full.
        let full = File::options().write(true).open("/dev/full").unwrap();
        let status = support::command()
            .args(arguments)
            .stdout(full.try_clone().unwrap())
            .stderr(full)
            .status()
            .unwrap();
        assert_eq!(status, expected, "{arguments:?}");
    }
}

#[test]
fn the_version_is_told() {
    let mut text = String::new();
    let output = trapline(&["--version"]);
    output.stdout.as_slice().read_to_string(&mut text).unwrap();
    assert_eq!(text, concat!("trapline ", env!("CARGO_PKG_VERSION"), "\n"));
}
