//! Each form of `--serial`.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::{multiboot, place, scratch};

/// A Multiboot image that waits for a byte on the serial line if it has a `prompt`, sends
/// "hi\n" and leaves with status 33.
fn greeting(prompt: bool) -> Vec<u8> {
    let mut code = Vec::new();
    if prompt {
        // mov dx, 0x3fd; in al, dx; test al, 1; jz back; mov dl, 0xf8; in al, dx
        code.extend([
            0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 1, 0x74, 0xfb, 0xb2, 0xf8, 0xec,
        ]);
    }
    code.extend([0x66, 0xba, 0xf8, 0x03]);
    for byte in *b"hi\n" {
        // mov al, byte; out dx, al
        code.extend([0xb0, byte, 0xee]);
    }
    // mov al, 0x10; out 0xf4, al
    code.extend([0xb0, 0x10, 0xe6, 0xf4]);
    multiboot(&code)
}

fn machine(kernel: &Path, serial: &str) -> Command {
    let mut command = support::command();
    command
        .args(["run", "--memory", "size=16M", "--timeout", "120"])
        .args(["--serial", serial, "--kernel"])
        .arg(kernel);
    command
}

/// What a machine with this serial line writes to its standard output.
fn output(name: &str, serial: &str) -> String {
    let kernel = scratch(name, &greeting(false));
    let output = machine(&kernel, serial).output().unwrap();
    std::fs::remove_file(&kernel).unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(33), "{message}");
    assert_eq!(message, "");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_terminal_is_the_standard_output() {
    assert_eq!(output("tty", "tty"), "hi\n");
}

#[test]
fn null_drops_what_the_guest_sends() {
    assert_eq!(output("null", "null"), "");
}

#[test]
fn a_file_holds_what_the_guest_sent_last() {
    let file = place("file-output");
    std::fs::write(&file, "something longer from before").unwrap();
    let serial = format!("file={}", file.display());
    assert_eq!(output("file", &serial), "");
    assert_eq!(std::fs::read(&file).unwrap(), b"hi\n");
    std::fs::remove_file(&file).unwrap();
}

/// A client of the socket, as soon as somebody listens there.
fn connected(socket: &Path) -> UnixStream {
    let start = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(client) => return client,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {}
            Err(e) => panic!("{e}"),
        }
        assert!(start.elapsed() < Duration::from_secs(60), "no socket");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_socket_carries_both_directions_and_goes_at_the_end() {
    let (kernel, socket) = (place("socket-kernel"), place("socket"));
    std::fs::write(&kernel, greeting(true)).unwrap();
    let mut child = machine(&kernel, &format!("socket={}", socket.display()))
        .spawn()
        .unwrap();
    let mut client = connected(&socket);
    client.write_all(b"?").unwrap();
    let mut said = String::new();
    client.read_to_string(&mut said).unwrap();
    assert_eq!(said, "hi\n");
    assert_eq!(child.wait().unwrap().code(), Some(33));
    assert!(!socket.exists(), "the socket is left");
    std::fs::remove_file(&kernel).unwrap();
}

#[test]
fn a_hangup_that_was_ignored_stays_ignored() {
    let (kernel, socket) = (scratch("nohup", &greeting(true)), place("nohup-socket"));
    let command = format!(
        "trap '' HUP; exec {} run --memory size=16M --timeout 120 --serial socket={} --kernel {}",
        env!("CARGO_BIN_EXE_trapline"),
        socket.display(),
        kernel.display()
    );
    let mut child = Command::new("sh").args(["-c", &command]).spawn().unwrap();
    let mut client = connected(&socket);
    kill_process(Pid::from_child(&child), Signal::HUP).unwrap();
    client.write_all(b"?").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(33));
    std::fs::remove_file(&kernel).unwrap();
}
