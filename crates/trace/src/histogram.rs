//! A histogram of durations with a bounded relative error.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Buckets of each power of two: a bucket is at most an eighth as wide as its lower bound.
const PARTS: usize = 8;
/// Powers of two: up to 2^40 ns, a quarter of an hour; longer waits count as that.
const POWERS: usize = 40;

/// Counts of durations in nanoseconds. One thread at a time counts; any may read.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    longest: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: (0..PARTS * POWERS).map(|_| AtomicU64::new(0)).collect(),
            longest: AtomicU64::new(0),
        }
    }
}

/// The bucket of a duration.
fn bucket(nanoseconds: u64) -> usize {
    let parts = PARTS.ilog2();
    if nanoseconds < PARTS as u64 {
        return nanoseconds as usize;
    }
    let power = nanoseconds.ilog2();
    let part = (nanoseconds >> (power - parts)) as usize & (PARTS - 1);
    ((power - parts + 1) as usize * PARTS + part).min(PARTS * POWERS - 1)
}

/// The longest duration of a bucket.
fn longest_of(bucket: usize) -> u64 {
    let parts = PARTS.ilog2();
    if bucket < PARTS {
        return bucket as u64;
    }
    let shift = (bucket / PARTS - 1) as u32;
    let part = (bucket % PARTS) as u64 | 1 << parts;
    ((part + 1) << shift) - 1
}

impl Histogram {
    /// Counts a duration. The caller is the only one who does so now.
    pub fn count(&self, nanoseconds: u64) {
        let place = &self.buckets[bucket(nanoseconds)];
        place.store(place.load(Relaxed) + 1, Relaxed);
        if nanoseconds > self.longest.load(Relaxed) {
            self.longest.store(nanoseconds, Relaxed);
        }
    }

    pub fn total(&self) -> u64 {
        self.buckets.iter().map(|b| b.load(Relaxed)).sum()
    }

    /// The longest duration.
    pub fn longest(&self) -> u64 {
        self.longest.load(Relaxed)
    }

    /// A duration that `percent` of all do not exceed; at most an eighth above the least such. 0 if
    /// there is none.
    pub fn percentile(&self, percent: u64) -> u64 {
        let (total, mut seen) = (self.total(), 0);
        for (n, count) in self.buckets.iter().enumerate() {
            seen += count.load(Relaxed);
            if seen > 0 && seen * 100 >= total * percent {
                return longest_of(n).min(self.longest());
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_narrow() {
        let mut last = 0;
        for n in 0..100_000u64 {
            let b = bucket(n);
            assert!(b == last || b == last + 1, "{n} is in {b} after {last}");
            last = b;
            let longest = longest_of(b);
            assert!(
                longest >= n && longest <= n + n / 8,
                "{n} counts as {longest}"
            );
        }
        assert_eq!(bucket(u64::MAX), PARTS * POWERS - 1);
    }

    #[test]
    fn percentiles() {
        let histogram = Histogram::default();
        assert_eq!(histogram.percentile(50), 0);
        for _ in 0..98 {
            histogram.count(5);
        }
        histogram.count(1000);
        histogram.count(1000);
        assert_eq!(histogram.total(), 100);
        assert_eq!(histogram.percentile(50), 5);
        assert_eq!(histogram.percentile(99), 1000);
        assert_eq!(histogram.longest(), 1000);
    }
}
