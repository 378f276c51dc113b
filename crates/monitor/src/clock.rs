//! The host's time-stamp counter, how fast a guest's time passes, and how long a VCPU's thread slept
//! for its guest.
#![allow(unsafe_code)]

use std::cell::Cell;

use crate::vcpu::Execution;

thread_local! {
    static HALTED: Cell<u64> = const { Cell::new(0) };
}

/// Nanoseconds for which the calling thread has slept because its VCPU was halted.
#[must_use]
pub fn halted() -> u64 {
    HALTED.get()
}

/// The calling thread slept so many nanoseconds because its VCPU was halted.
pub(crate) fn was_halted(nanoseconds: u64) {
    HALTED.set(HALTED.get().wrapping_add(nanoseconds));
}

/// The host's time-stamp counter now.
#[must_use]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no operands. Every x86-64 processor has it, and Linux lets it through
    // unless the process asked otherwise with PR_SET_TSC.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// How fast guest time passes.
///
/// Lock-step execution takes some hundred times as long as translated code. With timers at the
/// host's pace a guest would do nothing but serve them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Host nanoseconds in one of the guest's.
    divisor: u64,
}

impl Pace {
    /// As on the host.
    pub const HOST: Self = Self { divisor: 1 };

    /// The pace of a guest that is executed so.
    #[must_use]
    pub fn of(execution: Execution) -> Self {
        match execution {
            Execution::Lockstep => Self { divisor: 64 },
            Execution::Stepped | Execution::Translated => Self::HOST,
        }
    }

    /// What passes in the guest, in whatever unit, while that passes on the host.
    #[must_use]
    pub fn guest(self, host: u64) -> u64 {
        host / self.divisor
    }

    /// What passes on the host while that passes in the guest.
    #[must_use]
    pub fn host(self, guest: u64) -> u64 {
        guest.saturating_mul(self.divisor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_comparing_slows_time_down() {
        assert_eq!(Pace::of(Execution::Translated), Pace::HOST);
        assert_eq!(Pace::of(Execution::Stepped), Pace::HOST);
        let slow = Pace::of(Execution::Lockstep);
        assert_eq!(slow.guest(slow.host(1000)), 1000);
        assert!(slow.guest(1000) < 100);
        assert_eq!(slow.host(u64::MAX), u64::MAX);
    }
}
