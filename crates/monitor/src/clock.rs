//! The host's time-stamp counter, and how long a VCPU's thread slept for its guest.
#![allow(unsafe_code)]

use std::cell::Cell;

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
