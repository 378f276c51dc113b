//! The time that devices live in: nanoseconds since the machine was built, and the wall clock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use trapline_monitor::clock::{Pace, halted};

/// Where devices take time from, so that tests can give them theirs.
pub trait TimeSource: Send + Sync {
    /// Monotonic nanoseconds since an arbitrary start.
    fn now(&self) -> u64;
    /// Nanoseconds that the calling thread has had for its VCPU: on a processor, and asleep while
    /// the VCPU was halted. Where it advances by less than [`Self::now`], something else had the
    /// processor, and the guest stood still without knowing.
    fn thread_time(&self) -> u64;
    /// The time since 1970-01-01 00:00 UTC.
    fn wall_clock(&self) -> Duration;
    /// How long to sleep on the host until so many nanoseconds have passed.
    fn host_duration(&self, nanoseconds: u64) -> Duration {
        Duration::from_nanos(nanoseconds)
    }
}

/// The host's CLOCK_MONOTONIC and CLOCK_REALTIME, at a pace.
pub struct HostClock {
    start: Instant,
    /// The wall clock then.
    epoch: Duration,
    pace: Pace,
}

impl HostClock {
    #[must_use]
    pub fn new(pace: Pace) -> Self {
        Self {
            start: Instant::now(),
            epoch: host_wall_clock(),
            pace,
        }
    }
}

fn host_wall_clock() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

impl TimeSource for HostClock {
    fn now(&self) -> u64 {
        let elapsed = self.start.elapsed().as_nanos();
        self.pace.guest(u64::try_from(elapsed).unwrap_or(u64::MAX))
    }

    fn thread_time(&self) -> u64 {
        let used = clock_gettime(ClockId::ThreadCPUTime);
        let nanoseconds = used.tv_sec as u64 * 1_000_000_000 + used.tv_nsec as u64;
        self.pace.guest(nanoseconds.wrapping_add(halted()))
    }

    fn host_duration(&self, nanoseconds: u64) -> Duration {
        Duration::from_nanos(self.pace.host(nanoseconds))
    }

    fn wall_clock(&self) -> Duration {
        if self.pace == Pace::HOST {
            host_wall_clock()
        } else {
            self.epoch + Duration::from_nanos(self.now())
        }
    }
}

/// Time that stands still until it is told to go on.
pub struct VirtualClock {
    now: AtomicU64,
    /// What [`TimeSource::thread_time`] lacks.
    away: AtomicU64,
    epoch: Duration,
}

impl VirtualClock {
    /// `epoch` is the wall clock at zero, since 1970.
    #[must_use]
    pub fn new(epoch: Duration) -> Self {
        Self {
            now: AtomicU64::new(0),
            away: AtomicU64::new(0),
            epoch,
        }
    }

    /// Sets the monotonic time in nanoseconds; it never goes back.
    pub fn set(&self, now: u64) {
        self.now.fetch_max(now, Ordering::SeqCst);
    }

    /// Lets so many nanoseconds pass in which no thread has a processor.
    pub fn stand_still(&self, nanoseconds: u64) {
        self.away.fetch_add(nanoseconds, Ordering::SeqCst);
        self.now.fetch_add(nanoseconds, Ordering::SeqCst);
    }
}

impl TimeSource for VirtualClock {
    fn now(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }

    fn thread_time(&self) -> u64 {
        self.now().saturating_sub(self.away.load(Ordering::SeqCst))
    }

    fn wall_clock(&self) -> Duration {
        self.epoch + Duration::from_nanos(self.now())
    }
}

/// `value * numerator / denominator` without overflow in between, saturating; a zero denominator
/// saturates too.
#[must_use]
pub fn scale(value: u64, numerator: u64, denominator: u64) -> u64 {
    (u128::from(value) * u128::from(numerator))
        .checked_div(u128::from(denominator))
        .and_then(|scaled| u64::try_from(scaled).ok())
        .unwrap_or(u64::MAX)
}

/// Like [`scale`], rounded up: the first moment at which that much has passed.
#[must_use]
pub fn scale_up(value: u64, numerator: u64, denominator: u64) -> u64 {
    (u128::from(value) * u128::from(numerator))
        .checked_add(u128::from(denominator).saturating_sub(1))
        .and_then(|product| product.checked_div(u128::from(denominator)))
        .and_then(|scaled| u64::try_from(scaled).ok())
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaling_survives_extremes() {
        assert_eq!(scale(u64::MAX, 1_000_000_000, 1), u64::MAX);
        assert_eq!(scale(u64::MAX, 10, 20), u64::MAX / 2);
        assert_eq!(scale(1, 1, 0), u64::MAX);
        assert_eq!(scale(7, 1, 2), 3);
        assert_eq!(scale_up(7, 1, 2), 4);
        assert_eq!(scale_up(8, 1, 2), 4);
        assert_eq!(scale_up(u64::MAX, u64::MAX, u64::MAX), u64::MAX);
        assert_eq!(scale_up(5, 5, 0), u64::MAX);
    }
}
