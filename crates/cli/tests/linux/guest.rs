//! A Debian guest under test: started, watched line by line, typed to, and ended.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// What the initial script says when the guest is up.
pub const UP: &str = "trapline: shell is up";

/// What no guest may say: kernel complaints that show a wrong processor, clock or interrupt
/// controller.
const COMPLAINTS: [&str; 18] = [
    "BUG:",
    "Oops",
    "WARNING: CPU",
    "Call Trace",
    "Kernel panic",
    "soft lockup",
    "hard LOCKUP",
    "rcu: INFO",
    "self-detected stall",
    "unchecked MSR access",
    "Marking TSC unstable",
    "Marking clocksource",
    "APIC error",
    "spurious",
    "nobody cared",
    "hung_task",
    "ACPI Error",
    "MTRRs disabled",
];

/// One guest at a time: their times are looked at.
static MACHINE: Mutex<()> = Mutex::new(());

/// Where `cargo xtask guest` leaves its files.
///
/// # Panics
/// If they are not there.
pub fn file(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../.cache/guest")
        .join(name);
    assert!(
        path.exists(),
        "{} is missing: run `cargo xtask guest` first",
        path.display()
    );
    path
}

/// What a guest has said so far.
#[derive(Default)]
struct Said {
    text: String,
    /// When each line was complete.
    lines: Vec<SystemTime>,
    closed: bool,
}

#[derive(Default)]
struct Console {
    said: Mutex<Said>,
    more: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Console {
    /// Collects from `source` until it ends, in a thread of its own.
    fn listen(self: &Arc<Self>, mut source: impl Read + Send + 'static) {
        let console = Arc::clone(self);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // A terminal ends with an error, a pipe with nothing.
            while let Ok(n @ 1..) = source.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..n]).replace('\r', "");
                let mut said = lock(&console.said);
                let ends = text.matches('\n').count();
                said.text.push_str(&text);
                let lines = said.lines.len() + ends;
                said.lines.resize(lines, SystemTime::now());
                console.more.notify_all();
            }
            lock(&console.said).closed = true;
            console.more.notify_all();
        });
    }
}

/// A running guest. It is killed when the test gives up.
pub struct Guest {
    child: Child,
    input: Option<Box<dyn Write>>,
    console: Arc<Console>,
    started: Instant,
    _machine: MutexGuard<'static, ()>,
}

/// How a guest is started.
pub struct Start<'a> {
    pub vcpus: u32,
    /// A command to run instead of the interactive shell; without double quotes.
    pub run: Option<&'a str>,
    /// What follows the command: `poweroff` or `reboot`.
    pub then: &'a str,
    /// Seconds.
    pub limit: u32,
    /// Further options of `trapline run`.
    pub options: &'a [&'a str],
}

impl Start<'_> {
    fn command(&self) -> Command {
        let cmdline = match self.run {
            Some(run) => format!(
                "console=ttyS0 trapline.run=\"{run}\" trapline.then={}",
                self.then
            ),
            None => "console=ttyS0".to_owned(),
        };
        let mut command = crate::support::command();
        command
            .arg("run")
            .arg("--kernel")
            .arg(file("vmlinuz"))
            .arg("--initramfs")
            .arg(file("initramfs.cpio"))
            .args(["--cmdline", &cmdline, "--memory", "size=512M"])
            .args(["--cpus", &format!("boot={}", self.vcpus)])
            .args(["--timeout", &self.limit.to_string()])
            .args(self.options);
        command
    }

    /// Starts it with pipes for console and messages.
    pub fn on_pipes(&self) -> Guest {
        let machine = lock(&MACHINE);
        let mut child = self
            .command()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let console = Arc::new(Console::default());
        // Messages first: the console's end ends the waiting.
        let messages = child.stderr.take().unwrap();
        let output = child.stdout.take().unwrap();
        console.listen(output.chain(messages));
        Guest {
            input: child
                .stdin
                .take()
                .map(|input| Box::new(input) as Box<dyn Write>),
            child,
            console,
            started: Instant::now(),
            _machine: machine,
        }
    }

    /// Starts it on a terminal, whose other side is `controller`.
    pub fn on_terminal(&self, controller: OwnedFd, user: OwnedFd) -> Guest {
        let machine = lock(&MACHINE);
        let child = self
            .command()
            .stdin(user.try_clone().unwrap())
            .stdout(user.try_clone().unwrap())
            .stderr(user)
            .spawn()
            .unwrap();
        let controller = File::from(controller);
        let console = Arc::new(Console::default());
        console.listen(controller.try_clone().unwrap());
        Guest {
            child,
            input: Some(Box::new(controller)),
            console,
            started: Instant::now(),
            _machine: machine,
        }
    }
}

impl Guest {
    /// Waits until the guest has said `what` this many times.
    ///
    /// # Panics
    /// If it ends, or a minute passes without a new line, before that.
    pub fn wait_for(&self, what: &str, times: usize) {
        let mut said = lock(&self.console.said);
        loop {
            if said.text.matches(what).count() >= times {
                return;
            }
            let before = said.text.len();
            assert!(
                !said.closed,
                "ended without {what:?} (times {times}):\n{}",
                said.text
            );
            let (next, timeout) = self
                .console
                .more
                .wait_timeout(said, Duration::from_secs(60))
                .unwrap_or_else(PoisonError::into_inner);
            said = next;
            assert!(
                !timeout.timed_out() || said.text.len() > before,
                "silent for a minute without {what:?} (times {times}):\n{}",
                said.text
            );
        }
    }

    /// Types to the guest.
    pub fn type_in(&mut self, text: &str) {
        let input = self.input.as_mut().unwrap();
        input.write_all(text.as_bytes()).unwrap();
        input.flush().unwrap();
    }

    /// The process of the virtual machine monitor.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end; the exit status and everything said.
    ///
    /// # Panics
    /// If the guest's kernel complained about its machine, or the process died of a signal.
    pub fn end(mut self) -> (i32, Transcript) {
        let status = self.child.wait().unwrap().code();
        let mut said = lock(&self.console.said);
        while !said.closed {
            said = self
                .console
                .more
                .wait(said)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let transcript = Transcript {
            text: std::mem::take(&mut said.text),
            times: std::mem::take(&mut said.lines),
        };
        drop(said);
        let status = status.unwrap_or_else(|| panic!("killed:\n{}", transcript.text));
        for complaint in COMPLAINTS {
            assert!(
                !transcript.text.contains(complaint),
                "the guest complains ({complaint}):\n{}",
                transcript.text
            );
        }
        println!(
            "ended with status {status} after {:.1} s",
            self.started.elapsed().as_secs_f64()
        );
        (status, transcript)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail if it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everything that a guest said.
pub struct Transcript {
    pub text: String,
    times: Vec<SystemTime>,
}

impl Transcript {
    /// What follows `start` in each line that starts so, and when the line came.
    pub fn after(&self, start: &str) -> Vec<(&str, SystemTime)> {
        self.text
            .lines()
            .zip(&self.times)
            .filter_map(|(line, time)| Some((line.strip_prefix(start)?.trim(), *time)))
            .collect()
    }
}
