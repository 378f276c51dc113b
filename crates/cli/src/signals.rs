//! Signals that ask for the end, and leaving when the machine does not.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
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

/// Lets SIGINT, SIGTERM and SIGHUP stop the machine: the first asks, the second does not wait.
pub fn watch(stop: &StopHandle) -> Result<(), MachineError> {
    let refused = |source| MachineError::Host {
        what: "to watch for signals".into(),
        remedy: "allow the process another thread and more open files",
        source,
    };
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(refused)?;
    let stop = stop.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            signals
                .forever()
                .for_each(|n| leave(&stop, StopReason::Signal(n)))
        })
        .map_err(refused)?;
    Ok(())
}

/// Asks the machine to end for `reason`. If it has been asked before, or does not within the grace
/// period, the process ends.
pub fn leave(stop: &StopHandle, reason: StopReason) {
    if !stop.request(reason) {
        // Output that closes while the machine is stopping is no second request.
        if reason != StopReason::OutputClosed {
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
