//! The host's time-stamp counter.
#![allow(unsafe_code)]

/// The host's time-stamp counter now.
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC is unprivileged on every host that runs user programs normally.
    unsafe { std::arch::x86_64::_rdtsc() }
}
