//! On a terminal: the monitor console, and raw mode around signals.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{self, LocalModes, OptionalActions};
use support::{multiboot, scratch};

/// Multiboot code that echoes the serial line: `mov dx, 0x3fd; in al, dx; test al, 1;
/// jz back; mov dl, 0xf8; in al, dx; out dx, al; jmp back`.
const ECHO: [u8; 15] = [
    0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0xb2, 0xf8, 0xec, 0xee, 0xeb, 0xf1,
];

fn terminal() -> (File, OwnedFd) {
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let name = ptsname(&controller, Vec::new()).unwrap();
    let user = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    (controller.into(), user)
}

struct Session {
    child: Child,
    keys: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
    user: OwnedFd,
    kernel: PathBuf,
}

impl Session {
    fn start(name: &str) -> Self {
        let kernel = scratch(name, &multiboot(&ECHO));
        let (mut controller, user) = terminal();
        let keys = controller.try_clone().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_trapline"))
            .args(["run", "--memory", "size=16M", "--cpus", "boot=2"])
            .args(["--timeout", "300", "--kernel"])
            .arg(&kernel)
            .stdin(user.try_clone().unwrap())
            .stdout(user.try_clone().unwrap())
            .stderr(user.try_clone().unwrap())
            .spawn()
            .unwrap();
        let (sender, screen) = channel();
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            // Ends with an error when nobody has the terminal open any more.
            while let Ok(n @ 1..) = controller.read(&mut piece) {
                if sender.send(piece[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            keys,
            screen,
            seen: String::new(),
            user,
            kernel,
        }
    }

    /// What the kernel says of the process's state; T is stopped.
    fn state(&self) -> String {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        fields[..1].into()
    }

    fn is_raw(&self) -> bool {
        let modes = termios::tcgetattr(&self.user).unwrap().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Waits until it is so.
    fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !is_so(self) {
            assert!(start.elapsed() < Duration::from_secs(120), "never {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).unwrap();
    }

    /// Waits until this is on the screen, and forgets everything up to it.
    fn expect(&mut self, text: &str) {
        let start = Instant::now();
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let left = Duration::from_secs(120).saturating_sub(start.elapsed());
            match self.screen.recv_timeout(left) {
                Ok(piece) => self.seen.push_str(&String::from_utf8_lossy(&piece)),
                Err(_) => panic!("'{text}' does not appear; there is: {}", self.seen),
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.kernel);
    }
}

#[test]
fn commands_are_typed_beside_the_guest() {
    let mut session = Session::start("commands");
    // The terminal may still be on its way into raw mode: what is typed too early is lost.
    loop {
        session.type_keys(b"g");
        std::thread::sleep(Duration::from_millis(50));
        while let Ok(piece) = session.screen.try_recv() {
            session.seen.push_str(&String::from_utf8_lossy(&piece));
        }
        if session.seen.contains("gg") {
            break;
        }
    }
    session.type_keys(b"\x01h");
    session.expect("Ctrl-A c");
    session.type_keys(b"\x01c");
    session.expect("(trapline) ");
    session.type_keys(b"help\r");
    session.expect("watch remove NAME");
    session.type_keys(b"jump\r");
    session.expect("'jump' is no command");
    session.type_keys(b"pause\rinfo\r");
    session.expect("\"state\": \"paused\"");
    session.type_keys(b"info vcpus\r");
    session.expect("VCPU 0, active");
    session.expect("rip 00000000001000");
    session.expect("VCPU 1, waitforsipi");
    session.type_keys(b"watch add name=x,gpa=0x1000-0x1008\r");
    session.expect("\"name\": \"x\"");
    session.type_keys(b"watch remove y\rwatch remove x\rwatch list\r");
    session.expect("'y'");
    session.expect("[]");
    session.type_keys(b"semantics code=post-write-sync\r");
    session.expect("\"code\": \"post-write-sync\"");
    session.type_keys(b"info traces\r");
    session.expect("\"regions\"");
    session.type_keys(b"cont\rstats\r");
    session.expect("\"instructions\"");
    session.expect("(trapline) ");
    // Back to the guest, which echoes again.
    session.type_keys(b"\x01c");
    session.type_keys(b"ok?");
    session.expect("ok?");
    session.type_keys(b"\x01cquit\r");
    let status = session.child.wait().unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn whoever_stops_the_process_gets_the_terminal_back() {
    let mut session = Session::start("stopped");
    let cooked = termios::tcgetattr(&session.user).unwrap();
    session.until("raw", Session::is_raw);
    // SIGTSTP can be acted on before the process stops; SIGSTOP cannot, but a shell sets the modes too.
    for signal in [Signal::TSTP, Signal::STOP] {
        session.signal(signal);
        session.until("stopped", |session| session.state() == "T");
        if signal == Signal::TSTP {
            assert!(!session.is_raw());
        }
        termios::tcsetattr(&session.user, OptionalActions::Now, &cooked).unwrap();
        session.signal(Signal::CONT);
        session.until("raw again", Session::is_raw);
    }
    session.type_keys(b"?");
    session.expect("?");
    session.type_keys(b"\x01x");
    assert_eq!(session.child.wait().unwrap().code(), Some(0));
    assert!(!session.is_raw());
}

#[test]
fn a_quit_signal_ends_the_process_as_ever_but_restores_the_terminal() {
    let mut session = Session::start("quit");
    session.until("raw", Session::is_raw);
    // No core file is wanted.
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    prlimit(Some(Pid::from_child(&session.child)), Resource::Core, none).unwrap();
    session.signal(Signal::QUIT);
    let status = session.child.wait().unwrap();
    assert_eq!(status.signal(), Some(Signal::QUIT.as_raw()));
    assert!(!session.is_raw());
}
