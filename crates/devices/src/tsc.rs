//! The rate of the host's time-stamp counter.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::thread;
use std::time::{Duration, Instant};

use trapline_monitor::clock::host_tsc;

/// How long the counter is watched.
const WATCH: Duration = Duration::from_millis(10);

/// A rate of CPUID is believed when it is that close to the measured one: 1 in so many.
const AGREEMENT: u64 = 200;

/// The rate in Hz at which the host's time-stamp counter counts against CLOCK_MONOTONIC. Takes
/// about 10 ms. What CPUID says is exact, so it is preferred when the measurement confirms it.
#[must_use]
pub fn tsc_frequency() -> u64 {
    let measured = measure();
    reported()
        .into_iter()
        .find(|rate| rate.abs_diff(measured) < measured / AGREEMENT)
        .unwrap_or(measured)
}

fn measure() -> u64 {
    let (first, start) = sample();
    thread::sleep(WATCH);
    let (last, end) = sample();
    let nanoseconds = end.duration_since(start).as_nanos().max(1);
    let rate = u128::from(last.wrapping_sub(first)) * 1_000_000_000 / nanoseconds;
    u64::try_from(rate).unwrap_or(u64::MAX).max(1)
}

/// The counter and the clock at the same moment: of several tries the one in which the clock was
/// read fastest.
fn sample() -> (u64, Instant) {
    let attempt = || {
        let before = host_tsc();
        let now = Instant::now();
        let after = host_tsc();
        let length = after.wrapping_sub(before);
        (length, (before.wrapping_add(length / 2), now))
    };
    let mut best = attempt();
    for _ in 0..9 {
        let next = attempt();
        if next.0 < best.0 {
            best = next;
        }
    }
    best.1
}

/// The rates that CPUID reports, best first: the hypervisor's timing leaf, the ratio to the
/// crystal, the base frequency.
fn reported() -> Vec<u64> {
    let mut rates = Vec::new();
    let highest = __cpuid(0).eax;
    let hypervisor = __cpuid(1).ecx & 1 << 31 != 0;
    if hypervisor && (0x4000_0010..0x4001_0000).contains(&__cpuid(0x4000_0000).eax) {
        rates.push(u64::from(__cpuid(0x4000_0010).eax) * 1_000);
    }
    if highest >= 0x15 {
        let leaf = __cpuid_count(0x15, 0);
        if leaf.eax != 0 && leaf.ecx != 0 {
            rates.push(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax));
        }
    }
    if highest >= 0x16 {
        rates.push(u64::from(__cpuid(0x16).eax & 0xffff) * 1_000_000);
    }
    rates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_another_interval() {
        let rate = tsc_frequency();
        let (first, start) = sample();
        thread::sleep(Duration::from_millis(50));
        let (last, end) = sample();
        let expected = end.duration_since(start).as_secs_f64() * rate as f64;
        let error = ((last - first) as f64 / expected - 1.0).abs();
        assert!(error < 0.006, "{rate} Hz is off by {error}");
    }
}
