//! The terminal's raw mode, and its way back on every way out.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use rustix::termios::{self, OptionalActions, OutputModes, Termios};

/// A terminal in raw mode and how it was before.
struct Saved {
    terminal: OwnedFd,
    modes: Termios,
    raw: Termios,
}

impl Saved {
    /// Makes the terminal what it was. Not after draining: a terminal whose output is held up would
    /// keep the process from ending. If it is gone there is nothing to restore.
    fn restore(&self) {
        let _ = termios::tcsetattr(&self.terminal, OptionalActions::Now, &self.modes);
    }
}

/// The process has one controlling terminal, so one place remembers it: signal threads and the
/// panic hook restore it too.
static SAVED: Mutex<Option<Saved>> = Mutex::new(None);

fn saved() -> MutexGuard<'static, Option<Saved>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Puts `terminal` into raw mode until [`restore`]. Every key then comes as it is typed. Output
/// processing stays, for what Trapline itself prints.
pub fn make_raw(terminal: impl AsFd) -> io::Result<()> {
    let mut saved = saved();
    let modes = termios::tcgetattr(&terminal)?;
    let mut raw = modes.clone();
    raw.make_raw();
    raw.output_modes |= modes.output_modes & OutputModes::OPOST;
    // A second call must not take the raw mode for how it was before.
    if saved.is_none() {
        *saved = Some(Saved {
            terminal: terminal.as_fd().try_clone_to_owned()?,
            modes,
            raw: raw.clone(),
        });
    }
    termios::tcsetattr(&terminal, OptionalActions::Flush, &raw)?;
    Ok(())
}

/// Makes the terminal what it was before [`make_raw`]; does nothing if it is.
pub fn restore() {
    if let Some(saved) = saved().take() {
        saved.restore();
    }
}

/// Makes the terminal what it was until [`resume`], for a process that is about to be stopped.
pub fn suspend() {
    if let Some(saved) = saved().as_ref() {
        saved.restore();
    }
}

/// Raw mode again, for a process that goes on after it was stopped: whoever had the terminal
/// meanwhile left it in modes of his own. In the background nothing is done; a process that comes to
/// the foreground is told to go on once more.
pub fn resume() {
    if let Some(Saved { terminal, raw, .. }) = saved().as_ref()
        && in_foreground(terminal)
    {
        let _ = termios::tcsetattr(terminal, OptionalActions::Now, raw);
    }
}

/// Whether using the terminal does not stop this process. One that does not control it is not
/// under its job control at all.
pub fn in_foreground(terminal: impl AsFd) -> bool {
    termios::tcgetpgrp(terminal).map_or(true, |group| group == rustix::process::getpgrp())
}

/// As [`restore`], unless someone is just doing it: for signal handlers, which may not wait.
pub fn restore_if_free() {
    if let Ok(saved) = SAVED.try_lock()
        && let Some(saved) = saved.as_ref()
    {
        saved.restore();
    }
}

/// Restores the terminal before a panic's message is printed.
pub fn restore_on_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            print(info);
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    fn terminal() -> (OwnedFd, OwnedFd) {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let name = ptsname(&controller, Vec::new()).unwrap();
        let user = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        (controller, user)
    }

    // One test: the saved modes are the process's.
    #[test]
    fn raw_mode_ends_by_restore_and_by_a_panic() {
        let (_controller, user) = terminal();
        let local = || termios::tcgetattr(&user).unwrap().local_modes;
        let before = local();
        assert!(before.contains(LocalModes::ISIG | LocalModes::ICANON | LocalModes::ECHO));

        make_raw(&user).unwrap();
        make_raw(&user).unwrap();
        assert!(!local().intersects(LocalModes::ISIG | LocalModes::ICANON | LocalModes::ECHO));
        suspend();
        assert_eq!(local(), before);
        resume();
        assert!(!local().intersects(LocalModes::ISIG | LocalModes::ICANON | LocalModes::ECHO));
        restore();
        assert_eq!(local(), before);
        restore();
        resume();
        assert_eq!(local(), before);

        restore_on_panic();
        make_raw(&user).unwrap();
        std::thread::spawn(|| panic!("on purpose"))
            .join()
            .unwrap_err();
        assert_eq!(local(), before);

        assert!(make_raw(std::fs::File::open("/dev/null").unwrap()).is_err());
    }
}
