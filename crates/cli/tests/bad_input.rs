//! Bad input and bad guests: one clear sentence and the documented exit status.

mod support;

use std::process::{Command, Output, Stdio};

use support::{closed_pipe, is_refusal, multiboot, place, refused, scratch, trapline};

/// Runs an image of this name; status and message.
fn run_image(name: &str, image: &[u8]) -> (Option<i32>, String) {
    let path = scratch(name, image);
    let output = trapline(&[
        "run",
        "--kernel",
        path.to_str().unwrap(),
        "--serial",
        "null",
        "--memory",
        "size=16M",
        "--timeout",
        "20",
    ]);
    std::fs::remove_file(path).unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn a_guest_that_crashes_is_told_with_its_registers() {
    // ud2, without an IDT.
    let (status, message) = run_image("triple", &multiboot(&[0x0f, 0x0b]));
    assert_eq!(status, Some(70), "{message}");
    assert!(message.starts_with("trapline: the guest crashed on VCPU 0"));
    assert!(message.to_lowercase().contains("rip"), "{message}");
    // mov eax, 0xd0000000; jmp eax: a hole reads as ones, which is no instruction.
    let hole = [0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0];
    let (status, message) = run_image("hole", &multiboot(&hole));
    assert_eq!(status, Some(70), "{message}");
    assert!(message.contains("d0000000"), "{message}");
}

#[test]
fn a_guest_says_its_exit_status() {
    // mov al, 0x10; out 0xf4, al
    let (status, message) = run_image("exit", &multiboot(&[0xb0, 0x10, 0xe6, 0xf4]));
    assert_eq!((status, message.as_str()), (Some(33), ""));
}

#[test]
fn a_guest_that_does_not_end_is_stopped() {
    let path = scratch("endless", &multiboot(&[0xeb, 0xfe]));
    let kernel = path.to_str().unwrap();
    let arguments = [
        "run",
        "--kernel",
        kernel,
        "--serial",
        "null",
        "--timeout",
        "1",
    ];
    refused(&arguments, 124, "time limit");
    std::fs::remove_file(path).unwrap();
}

#[test]
fn truncated_kernels() {
    let whole = multiboot(&[0x90; 4096]);
    for length in [1, 12, 31, 33, 2000, whole.len() - 1] {
        let (status, message) = run_image("truncated", &whole[..length]);
        assert_eq!(status, Some(65), "{length}: {message}");
        assert_eq!(message.lines().count(), 1, "{length}: {message}");
    }
}

#[test]
fn a_command_line_that_is_too_long() {
    let path = scratch("cmdline", &multiboot(&[0xeb, 0xfe]));
    let cmdline = "x".repeat(100_000);
    let kernel = path.to_str().unwrap();
    let output = trapline(&["run", "--kernel", kernel, "--cmdline", &cmdline]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(
        matches!(output.status.code(), Some(64 | 65)),
        "{:?} {message}",
        output.status
    );
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.contains("command line"), "{message}");
    std::fs::remove_file(path).unwrap();
}

#[test]
fn an_initramfs_that_does_not_fit() {
    let kernel = scratch("small-kernel", &multiboot(&[0xeb, 0xfe]));
    let initramfs = scratch("large-initramfs", &vec![7; 20 << 20]);
    refused(
        &[
            "run",
            "--kernel",
            kernel.to_str().unwrap(),
            "--initramfs",
            initramfs.to_str().unwrap(),
            "--memory",
            "size=16M",
        ],
        65,
        "--memory",
    );
    for path in [kernel, initramfs] {
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn memory_that_the_host_refuses() {
    let path = scratch("memory", &multiboot(&[0xeb, 0xfe]));
    let kernel = path.to_str().unwrap();
    for size in ["size=100T", "size=512T", "size=16777215T"] {
        let output = trapline(&["run", "--kernel", kernel, "--memory", size]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(
            matches!(output.status.code(), Some(64 | 71)),
            "{size}: {:?} {message}",
            output.status
        );
        assert_eq!(message.lines().count(), 1, "{message}");
    }
    // With little address space.
    let command = format!(
        "ulimit -v 400000; exec {} run --kernel {kernel} --memory size=1G",
        env!("CARGO_BIN_EXE_trapline")
    );
    let output = Command::new("sh")
        .args(["-c", &command])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(71), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.contains("memory"), "{message}");
    std::fs::remove_file(path).unwrap();
}

#[test]
fn watches_and_semantics_that_cannot_be() {
    let path = scratch("unwatched", &multiboot(&[0xeb, 0xfe]));
    let kernel = path.to_str().unwrap();
    for (option, hint) in [
        ("--watch=", "''"),
        ("--watch=gpa=0x1000", "'0x1000'"),
        ("--watch=gpa=0x1000-0x1000", "'0x1000-0x1000' is empty"),
        (
            "--watch=gpa=0x1001-0x1000",
            "'0x1001-0x1000' is empty or inverted",
        ),
        ("--watch=gpa=0x1ffffff-0x2000001", "RAM is 0x0-0x2000000"),
        ("--watch=gpa=0xfee00000-0xfee00004", "not all guest RAM"),
        ("--watch=gpa=0-1,vcpus=2", "VCPU 2"),
        ("--watch=gpa=0-1,vcpus=1-0", "'1-0'"),
        ("--watch=gpa=0-1,access=x", "'x'"),
        ("--watch=gpa=0-1,semantics=soon", "'soon'"),
        ("--watch=name=,gpa=0-1", "''"),
        ("--watch=name=a,gpa=0-1,color=red", "'color'"),
        ("--trace-semantics=", "''"),
        ("--trace-semantics=code", "'code'"),
        ("--trace-semantics=cod=bracketing", "'cod'"),
        ("--trace-semantics=code=soon", "'soon'"),
        ("--trace-semantics=device=bracketing", "'device'"),
    ] {
        let machine = ["--cpus", "boot=2", "--memory", "size=32M"];
        let arguments = [&["run", "--kernel", kernel][..], &machine, &[option]].concat();
        refused(&arguments, 64, hint);
    }
    let run = ["run", "--kernel", kernel];
    let twice = ["--watch=name=a,gpa=0-1", "--watch=name=a,gpa=2-3"];
    refused(&[&run[..], &twice].concat(), 64, "'a'");
    let log = ["--watch=gpa=0-1", "--watch-log=/nonexistent/x"];
    refused(&[&run[..], &log].concat(), 71, "/nonexistent/x");
    let long = format!("--api-socket=/tmp/{}", "x".repeat(200));
    for socket in ["--api-socket=/nonexistent/x", "--api-socket=/", &long] {
        let path = socket.strip_prefix("--api-socket=").unwrap();
        refused(&["run", "--kernel", kernel, socket], 71, path);
    }
    // Not a socket: it is not replaced.
    let socket = format!("--api-socket={kernel}");
    refused(&["run", "--kernel", kernel, &socket], 71, kernel);
    refused(
        &["ctl", "--api-socket", "/nonexistent/x", "info"],
        71,
        "/nonexistent/x",
    );
    refused(&["ctl", "info"], 64, "--api-socket");
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_console_that_nobody_reads() {
    // mov dx, 0x3f8; again: mov al, 'x'; out dx, al; jmp again
    let chatter = [0x66, 0xba, 0xf8, 0x03, 0xb0, 0x78, 0xee, 0xeb, 0xfb];
    let path = scratch("chatter", &multiboot(&chatter));
    let kernel = path.to_str().unwrap();
    let arguments = [
        "run",
        "--kernel",
        kernel,
        "--memory",
        "size=16M",
        "--timeout",
        "20",
    ];
    let broken = support::command()
        .args(arguments)
        .stdout(closed_pipe())
        .output()
        .unwrap();
    let message = String::from_utf8(broken.stderr).unwrap();
    assert_eq!(broken.status.code(), Some(71), "{message}");
    assert!(message.contains("standard output"), "{message}");
    // Nor has it room on a device that is full.
    let full = std::fs::File::options().write(true).open("/dev/full");
    let output = support::command()
        .args(arguments)
        .stdout(full.unwrap())
        .output()
        .unwrap();
    is_refusal(&output, 71, "No space left");
    std::fs::remove_file(path).unwrap();
}

/// The binary run by a shell that closes its standard output first.
fn without_output(arguments: &str) -> Output {
    let command = format!("exec {} {arguments} >&-", env!("CARGO_BIN_EXE_trapline"));
    Command::new("sh")
        .args(["-c", &command])
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn a_standard_output_that_is_closed_from_the_start() {
    // Rust's runtime puts /dev/null there, where all that is printed would be lost.
    let path = scratch("quiet", &multiboot(&[0xb0, 0x10, 0xe6, 0xf4]));
    let run = format!(
        "run --memory size=16M --timeout 60 --kernel {}",
        path.display()
    );
    is_refusal(&without_output(&run), 71, "standard output");
    // Who has no use for it is not bothered.
    for serial in ["null", "file=/dev/null"] {
        let output = without_output(&format!("{run} --serial {serial}"));
        assert_eq!(output.status.code(), Some(33), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
    }
    let stats = place("quiet-stats");
    let output = without_output(&format!("{run} --serial null --stats {}", stats.display()));
    assert_eq!(output.status.code(), Some(33), "{output:?}");
    let report = format!("report {}", stats.display());
    is_refusal(&without_output(&report), 71, "standard output");
    for path in [path, stats] {
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn no_file_is_written_that_another_option_names() {
    let image = multiboot(&[0xeb, 0xfe]);
    let path = scratch("precious", &image);
    let kernel = path.to_str().unwrap();
    let serial = format!("file={kernel}");
    for (option, value) in [
        ("--serial", serial.as_str()),
        ("--stats", kernel),
        ("--events", kernel),
        ("--watch-log", kernel),
        ("--log-file", kernel),
    ] {
        refused(&["run", "--kernel", kernel, option, value], 64, option);
        assert_eq!(std::fs::read(&path).unwrap(), image, "{option}");
    }
    let initramfs = ["run", "--kernel", "/nonexistent", "--initramfs", kernel];
    refused(
        &[&initramfs[..], &["--stats", kernel]].concat(),
        64,
        "--initramfs",
    );
    std::fs::remove_file(path).unwrap();
}
