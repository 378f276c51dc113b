//! The gdb stub, spoken to in gdb's remote protocol.

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use support::build_guests;

/// `mov al, 7; out 0xf4, al`: exit status 15.
const EXIT_7: &str = "b007e6f4";

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .expect("a free port")
        .port()
}

/// A gdb client: only what the test needs.
struct Client(TcpStream);

impl Client {
    fn connect(port: u16) -> Self {
        for _ in 0..200 {
            if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) {
                stream
                    .set_read_timeout(Some(Duration::from_secs(30)))
                    .expect("a time limit");
                return Self(stream);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("the stub does not listen");
    }

    fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.0.read_exact(&mut byte).expect("the stub answers");
        byte[0]
    }

    fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        write!(self.0, "${packet}#{sum:02x}").expect("the stub listens");
    }

    /// Sends a packet; its reply, acknowledged.
    fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.reply()
    }

    fn reply(&mut self) -> String {
        while self.byte() != b'$' {}
        let mut text = String::new();
        loop {
            match self.byte() {
                b'#' => break,
                // Run-length encoding: the next byte says how often the last one comes again.
                b'*' => {
                    let again = self.byte() - 29;
                    let last = text.chars().last().expect("something to repeat");
                    text.extend(std::iter::repeat_n(last, usize::from(again)));
                }
                byte => text.push(char::from(byte)),
            }
        }
        let _ = (self.byte(), self.byte());
        self.0.write_all(b"+").expect("the stub listens");
        text
    }

    /// A register by its number in gdb's order.
    fn register(&mut self, number: usize) -> u64 {
        let all = self.ask("g");
        let hex = &all[16 * number..16 * number + 16];
        u64::from_str_radix(hex, 16)
            .expect("a register")
            .swap_bytes()
    }
}

fn start(guest: &Path, cpus: u8, port: u16, serial: &str) -> Child {
    support::command()
        .args(["run", "--serial", serial, "--timeout", "60"])
        .args([
            "--cpus",
            &format!("boot={cpus}"),
            "--gdb",
            &port.to_string(),
        ])
        .arg("--kernel")
        .arg(guest)
        .stdout(Stdio::null())
        .spawn()
        .expect("trapline starts")
}

#[test]
fn a_debugger_rewrites_running_code() {
    let guest = build_guests("gdb-hang", &["hang"], "").join("hang.elf");
    let port = free_port();
    let console = guest.with_extension("console");
    let _ = std::fs::remove_file(&console);
    let mut trapline = start(&guest, 1, port, &format!("file={}", console.display()));
    // Stepping there would take long: let the guest run until it says that it spins.
    for _ in 0..400 {
        if std::fs::read_to_string(&console).is_ok_and(|text| text.contains("spinning")) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut gdb = Client::connect(port);
    assert!(gdb.ask("?").starts_with(['S', 'T']));
    // The guest spins in its last instruction; a few steps lead there.
    let mut rip = gdb.register(16);
    loop {
        let before = rip;
        assert!(gdb.ask("vCont;s:1").starts_with('T'));
        rip = gdb.register(16);
        if rip == before {
            break;
        }
    }
    assert_eq!(gdb.ask(&format!("M{rip:x},4:{EXIT_7}")), "OK");
    assert_eq!(gdb.ask(&format!("m{rip:x},4")), EXIT_7);
    // Not even one instruction is executed from what was decoded before.
    assert!(gdb.ask("vCont;s:1").starts_with('T'));
    assert_eq!(gdb.register(16), rip + 2);
    assert_eq!(gdb.ask("D"), "OK");
    let status = trapline.wait().expect("trapline ends");
    assert_eq!(status.code(), Some(15));
}

#[test]
fn a_client_that_vanishes_leaves_the_guest_unharmed() {
    let guest = build_guests("gdb-exit", &["exit"], "").join("exit.elf");
    let port = free_port();
    let mut trapline = start(&guest, 2, port, "null");
    // The guest may have ended before the client comes; then there is nothing to leave.
    if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) {
        drop(stream);
    }
    let status = trapline.wait().expect("trapline ends");
    assert_eq!(status.code(), Some(85));
}

#[test]
fn a_port_that_is_taken_is_refused_by_the_host() {
    let guest = build_guests("gdb-exit", &["exit"], "").join("exit.elf");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let output = support::command()
        .args([
            "run",
            "--serial",
            "null",
            "--gdb",
            &port.to_string(),
            "--kernel",
        ])
        .arg(&guest)
        .output()
        .expect("trapline runs");
    assert_eq!(output.status.code(), Some(71));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("--gdb") && text.trim().lines().count() == 1,
        "{text}"
    );
}
