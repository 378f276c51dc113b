//! How a machine's end becomes known: the first reason counts.
//!
//! One mutex, held only to store or take the reason; nothing is called under it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use trapline_devices::events::{SystemEvent, SystemEvents};

use crate::stop::StopReason;

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    PowerOff,
    /// The guest asked for a reset: the machine is built again.
    Reset,
    DebugExit(u32),
    /// A VCPU crashed, with its registers as text.
    Crashed {
        vcpu: u8,
        registers: String,
    },
    /// In lock-step execution, with what was found as text.
    EnginesDiffer(String),
    Stopped(StopReason),
    /// The host refused a VCPU what it needs.
    HostRefused(String),
    TimedOut,
}

/// Where the end is announced and awaited.
#[derive(Default)]
pub struct Ending {
    end: Mutex<Option<End>>,
    announced: Condvar,
}

impl Ending {
    fn lock(&self) -> MutexGuard<'_, Option<End>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces an end, unless there is one already.
    pub fn announce(&self, end: End) {
        self.lock().get_or_insert(end);
        self.announced.notify_all();
    }

    /// Whether an end has been announced.
    pub fn is_announced(&self) -> bool {
        self.lock().is_some()
    }

    /// Waits for the end; [`End::TimedOut`] when `deadline` passes first.
    pub fn wait(&self, deadline: Option<Instant>) -> End {
        let mut end = self.lock();
        loop {
            if let Some(end) = &*end {
                return end.clone();
            }
            end = match deadline {
                None => self
                    .announced
                    .wait(end)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return end.get_or_insert(End::TimedOut).clone();
                    }
                    self.announced
                        .wait_timeout(end, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }
}

impl SystemEvents for Ending {
    fn raise(&self, event: SystemEvent) {
        self.announce(match event {
            SystemEvent::PowerOff => End::PowerOff,
            SystemEvent::Reset => End::Reset,
            SystemEvent::DebugExit(value) => End::DebugExit(value),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_counts() {
        let ending = Ending::default();
        ending.raise(SystemEvent::DebugExit(3));
        ending.raise(SystemEvent::PowerOff);
        assert_eq!(ending.wait(None), End::DebugExit(3));
    }

    #[test]
    fn a_deadline_ends_the_wait_for_good() {
        let ending = Ending::default();
        assert_eq!(ending.wait(Some(Instant::now())), End::TimedOut);
        ending.announce(End::PowerOff);
        assert_eq!(ending.wait(None), End::TimedOut);
    }
}
