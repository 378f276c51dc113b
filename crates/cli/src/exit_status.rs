//! Exit statuses of `trapline run`, after sysexits.h.

use trapline_machine::{Blame, MachineError, Outcome, StopReason};

/// Wrong usage.
pub const USAGE: u8 = 64;
/// An input file is unusable.
pub const BAD_INPUT: u8 = 65;
/// The guest crashed.
pub const GUEST_CRASHED: u8 = 70;
/// The translator and the stepping engine disagree: an internal error, which sysexits.h numbers so.
pub const ENGINES_DIFFER: u8 = 70;
/// The host refused a resource.
pub const HOST_REFUSED: u8 = 71;
/// The time limit passed; what timeout(1) gives.
pub const TIMED_OUT: u8 = 124;
/// A signal with this number less stopped the machine; what shells give.
pub const SIGNAL_BASE: u8 = 128;

pub fn of_error(error: &MachineError) -> u8 {
    match error.blame() {
        Blame::Usage => USAGE,
        Blame::Input => BAD_INPUT,
        Blame::Host => HOST_REFUSED,
    }
}

pub fn of_outcome(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::PowerOff => 0,
        // A process has 8 bits to say it in.
        Outcome::DebugExit(value) => ((value << 1) | 1) as u8,
        Outcome::Crashed { .. } => GUEST_CRASHED,
        Outcome::EnginesDiffer(_) => ENGINES_DIFFER,
        Outcome::Stopped(reason) => of_stop(*reason),
        Outcome::TimedOut => TIMED_OUT,
    }
}

pub fn of_stop(reason: StopReason) -> u8 {
    match reason {
        StopReason::Console | StopReason::Control => 0,
        StopReason::Signal(number) => SIGNAL_BASE.saturating_add(number.clamp(0, 64) as u8),
        StopReason::OutputLost(_) => HOST_REFUSED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes() {
        assert_eq!(of_outcome(&Outcome::PowerOff), 0);
        assert_eq!(of_outcome(&Outcome::DebugExit(0)), 1);
        assert_eq!(of_outcome(&Outcome::DebugExit(0x10)), 33);
        assert_eq!(of_outcome(&Outcome::DebugExit(0xffff_ffff)), 255);
        assert_eq!(of_outcome(&Outcome::TimedOut), 124);
        let crash = Outcome::Crashed {
            vcpu: 0,
            reason: String::new(),
            registers: String::new(),
        };
        assert_eq!(of_outcome(&crash), 70);
    }

    #[test]
    fn stops() {
        assert_eq!(of_stop(StopReason::Console), 0);
        assert_eq!(of_stop(StopReason::Control), 0);
        assert_eq!(of_stop(StopReason::Signal(15)), 143);
        assert_eq!(of_stop(StopReason::Signal(-1)), 128);
        assert_eq!(of_stop(StopReason::OutputLost(32)), 71);
    }
}
