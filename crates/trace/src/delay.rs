//! Notifications that take time to reach their consumers, for tests: with weak semantics a guest
//! can then see what the strict ones keep from it.
//!
//! Under bracketing the actor waits longer before it writes, and nothing else changes. Under
//! synchronous post-write it has written, and its consumers learn of it one after the other while
//! it waits. Otherwise the notice travels: it lies in its consumer's [`Travelling`] until it is
//! due, while the actor and the consumer go on.
//!
//! `notices` is a leaf lock. `any` is stored under it and read relaxed: whoever posts raises the
//! consumer's attention afterwards, and that orders the two.

use std::time::{Duration, Instant};

use crate::kind::Kind;
use crate::notice::Notice;
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering::Relaxed, lock};

/// How long notifications travel, by kind. None do unless a test wants it.
#[derive(Debug)]
pub struct Delays {
    any: AtomicBool,
    nanoseconds: Vec<AtomicU64>,
}

impl Default for Delays {
    fn default() -> Self {
        Self {
            any: AtomicBool::new(false),
            nanoseconds: Kind::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

impl Delays {
    pub fn set(&self, kind: Kind, delay: Duration) {
        let nanoseconds = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds[kind as usize].store(nanoseconds, Relaxed);
        self.any.fetch_or(nanoseconds > 0, Relaxed);
    }

    pub fn of(&self, kind: Kind) -> Option<Duration> {
        if !self.any.load(Relaxed) {
            return None;
        }
        let nanoseconds = self.nanoseconds[kind as usize].load(Relaxed);
        (nanoseconds > 0).then(|| Duration::from_nanos(nanoseconds))
    }
}

/// One VCPU's notices that are not due yet.
#[derive(Debug, Default)]
pub struct Travelling {
    any: AtomicBool,
    notices: Mutex<Vec<(Instant, Notice)>>,
}

impl Travelling {
    pub fn post(&self, due: Instant, notice: Notice) {
        let mut notices = lock(&self.notices);
        notices.push((due, notice));
        self.any.store(true, Relaxed);
    }

    /// Takes those that are due, or `all`, and tells whether others are left.
    pub fn take(&self, all: bool) -> (Vec<Notice>, bool) {
        if !self.any.load(Relaxed) {
            return (Vec::new(), false);
        }
        let mut notices = lock(&self.notices);
        let now = Instant::now();
        let (due, left): (Vec<_>, Vec<_>) =
            notices.drain(..).partition(|(due, _)| all || *due <= now);
        *notices = left;
        self.any.store(!notices.is_empty(), Relaxed);
        let due = due.into_iter().map(|(_, notice)| notice).collect();
        (due, !notices.is_empty())
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::kind::Sense;

    #[test]
    fn what_is_not_due_stays_unless_all_is_asked_for() {
        let travelling = Travelling::default();
        let notice = |page| Notice::Revoke {
            page,
            sense: Sense::WRITE,
        };
        let now = Instant::now();
        travelling.post(now + Duration::from_secs(3600), notice(1));
        travelling.post(now, notice(2));
        assert_eq!(travelling.take(false), (vec![notice(2)], true));
        assert_eq!(travelling.take(false), (vec![], true));
        assert_eq!(travelling.take(true), (vec![notice(1)], false));
    }

    #[test]
    fn delays_are_by_kind() {
        let delays = Delays::default();
        assert_eq!(delays.of(Kind::Code), None);
        delays.set(Kind::Code, Duration::from_micros(5));
        assert_eq!(delays.of(Kind::Code), Some(Duration::from_micros(5)));
        assert_eq!(delays.of(Kind::Mmu), None);
    }
}
