//! Signals that ask for the end, leaving when the machine does not, and job control.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGXFSZ};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use trapline_machine::{MachineError, StopHandle, StopReason};

use crate::{exit_status, report, terminal};

/// How long a machine may take to stop before the process ends without it.
const GRACE: Duration = Duration::from_secs(10);

/// Makes a file that may not grow any further fail to be written (EFBIG) rather than end the
/// process.
pub fn survive_file_limit() {
    // A flag that nobody reads: all that matters is that there is a handler. Without one the
    // limit ends the process, as it would have anyway.
    let _ = signal_hook::flag::register(SIGXFSZ, Arc::default());
}

/// Lets SIGINT, SIGTERM and SIGHUP stop the machine: the first asks, the second does not wait. Around
/// those that stop or end the process at once, the terminal is not left in raw mode. A SIGHUP that
/// was ignored from the start, as nohup(1) does it, stays so.
pub fn watch(stop: &StopHandle) -> Result<(), MachineError> {
    let refused = |source| MachineError::Host {
        what: "to watch for signals".into(),
        remedy: "allow the process another thread and more open files",
        source,
    };
    let mut handled = vec![SIGINT, SIGTERM, SIGQUIT, SIGTSTP, SIGCONT];
    if !is_ignored(SIGHUP) {
        handled.push(SIGHUP);
    }
    let mut signals = Signals::new(handled).map_err(refused)?;
    let stop = stop.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            signals.forever().for_each(|n| match n {
                SIGQUIT | SIGTSTP => {
                    terminal::suspend();
                    // It knows both.
                    let _ = emulate_default_handler(n);
                }
                SIGCONT => terminal::resume(),
                _ => leave(&stop, StopReason::Signal(n)),
            })
        })
        .map_err(refused)?;
    Ok(())
}

/// Whether this process ignores a signal, as far as the kernel tells.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Asks the machine to end for `reason`. If it has been asked before, or does not within the grace
/// period, the process ends.
pub fn leave(stop: &StopHandle, reason: StopReason) {
    if !stop.request(reason) {
        // Output that is lost while the machine is stopping is no second request.
        if !matches!(reason, StopReason::OutputLost(_)) {
            end(reason);
        }
        return;
    }
    let limit = move || {
        thread::sleep(GRACE);
        report::line("the machine did not stop in time; ended without it");
        end(reason);
    };
    // Without a thread only the limit is missing.
    let _ = thread::Builder::new()
        .name("grace period".into())
        .spawn(limit);
}

fn end(reason: StopReason) -> ! {
    terminal::restore();
    std::process::exit(exit_status::of_stop(reason).into())
}
