//! When a VCPU that spins gives up its thread's turn.
//!
//! With more VCPUs than processors, the one that is waited for may have no processor, so a spinning
//! VCPU yields. Between VCPUs of one machine that costs microseconds, for they yield too. But on a
//! host with other work, what gets the processor keeps it for milliseconds, and a guest that waits a
//! little with a hundred PAUSE instructions would wait for seconds. So after a long absence the VCPU
//! spins on for a while before it yields again.

use std::time::{Duration, Instant};

/// The longest time to spin on after an absence.
const SPIN: Duration = Duration::from_micros(250);

/// The turns of one VCPU's thread.
#[derive(Debug, Default)]
pub struct Turns {
    /// No yielding before this.
    keep_until: Option<Instant>,
}

impl Turns {
    /// The VCPU spins: gives up the turn, unless the last time was followed by a long absence.
    pub fn spins(&mut self) {
        let start = Instant::now();
        if self.keeps(start) {
            return;
        }
        std::thread::yield_now();
        self.was_away(start, Instant::now());
    }

    fn keeps(&self, now: Instant) -> bool {
        self.keep_until.is_some_and(|until| now < until)
    }

    fn was_away(&mut self, from: Instant, until: Instant) {
        let spin = until.saturating_duration_since(from).min(SPIN);
        self.keep_until = until.checked_add(spin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_kept_as_long_as_the_absence_was_but_not_for_long() {
        let start = Instant::now();
        let after = |us| start + Duration::from_micros(us);
        let mut turns = Turns::default();
        assert!(!turns.keeps(start));
        turns.was_away(start, after(2));
        assert!(turns.keeps(after(3)));
        assert!(!turns.keeps(after(4)));
        turns.was_away(after(10), after(4_010));
        assert!(turns.keeps(after(4_259)));
        assert!(!turns.keeps(after(4_260)));
    }
}
