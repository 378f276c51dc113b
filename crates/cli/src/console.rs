//! The serial line on standard input and output.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use trapline_machine::console::ConsoleInput;
use trapline_machine::{Console, Control, MachineError, StopHandle, StopReason};

use crate::escape::{Escape, Key, Request};
use crate::monitor::Monitor;
use crate::{report, signals, standard_output, terminal};

const KEYS: &str = "Ctrl-A x leaves, Ctrl-A c opens and leaves the monitor, Ctrl-A Ctrl-A sends Ctrl-A, \
                    Ctrl-A h shows this";

/// Connects a console with standard input and output. A terminal is put into raw mode and the
/// escape key works; from a pipe or a file every byte goes to the guest.
pub fn open(stop: &StopHandle, control: &Arc<Control>) -> Result<Console, MachineError> {
    let refused = |what: &str, source: io::Error| MachineError::Host {
        what: what.into(),
        remedy: "give --serial null, file=PATH or socket=PATH",
        source,
    };
    standard_output::check().map_err(|e| refused("to write to standard output", e))?;
    let (console, input) = Console::new(StandardOutput {
        stop: stop.clone(),
        open: true,
    });
    let stdin = io::stdin();
    let escape = if !stdin.is_terminal() {
        None
    } else if terminal::in_foreground(&stdin) {
        terminal::make_raw(&stdin).map_err(|e| refused("raw mode of the terminal", e))?;
        Some(Escape::default())
    } else {
        // A job in the background would be stopped if it touched the terminal.
        return Ok(console);
    };
    let stop = stop.clone();
    let monitor = Monitor::new(Arc::clone(control));
    thread::Builder::new()
        .name("standard input".into())
        .spawn(move || match escape {
            Some(escape) => read_keys(escape, monitor, &input, &stop),
            None => read_input(|bytes| input.send(bytes)),
        })
        .map_err(|e| refused("a thread for standard input", e))?;
    Ok(console)
}

/// Hands what is typed to the guest or the monitor, except for escape sequences.
fn read_keys(
    mut escape: Escape,
    mut monitor: Monitor<io::Stderr>,
    input: &ConsoleInput,
    stop: &StopHandle,
) {
    let mut guest = Vec::new();
    read_input(|typed| {
        guest.clear();
        let mut leave = false;
        escape.feed(typed, |key| match key {
            Key::Byte(byte) if monitor.is_active() => monitor.key(byte),
            Key::Byte(byte) => guest.push(byte),
            Key::Request(Request::Leave) => leave = true,
            Key::Request(Request::Help) => report::line(KEYS),
            Key::Request(Request::Monitor) => monitor.toggle(),
        });
        if leave {
            signals::leave(stop, StopReason::Console);
        }
        // A guest that takes no input must not keep the user from leaving, so this comes last.
        input.try_send(&guest)
    });
}

/// Reads standard input and hands on every piece until there is no more or nobody wants it.
fn read_input(mut hand_on: impl FnMut(&[u8]) -> bool) {
    let stdin = io::stdin();
    let mut buffer = [0; 4096];
    loop {
        match rustix::io::read(&stdin, &mut buffer) {
            Ok(0) => return,
            Ok(n) => {
                if !hand_on(&buffer[..n]) {
                    return;
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(&stdin, PollFlags::IN),
            Err(error) => {
                tracing::warn!("standard input cannot be read any more: {error}");
                return;
            }
        }
    }
}

/// Waits until a descriptor that someone else made non-blocking is ready.
fn wait_for(descriptor: impl AsFd, event: PollFlags) {
    let _ = poll(&mut [PollFd::new(&descriptor, event)], None);
}

/// Standard output without a buffer. When it takes no more the machine is asked to end, and what
/// the guest still writes is dropped.
struct StandardOutput {
    stop: StopHandle,
    open: bool,
}

impl Write for StandardOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stdout = io::stdout();
        while self.open {
            match rustix::io::write(&stdout, bytes) {
                Ok(n) => return Ok(n),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait_for(&stdout, PollFlags::OUT),
                Err(error) => {
                    self.open = false;
                    let reason = StopReason::OutputLost(error.raw_os_error());
                    signals::leave(&self.stop, reason);
                }
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
