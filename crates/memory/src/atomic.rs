//! Accesses to guest memory that VCPUs race with, by host pointer.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A host pointer to bytes of guest RAM that stay mapped as long as their `GuestMemory` lives.
#[derive(Clone, Copy)]
pub struct HostBytes(pub *mut u8);

impl HostBytes {
    /// The aligned 64-bit word here; `None` if the pointer is not aligned.
    pub fn word64(&self) -> Option<&AtomicU64> {
        if !self.0.cast::<u64>().is_aligned() {
            return None;
        }
        // SAFETY: aligned, and the constructor's caller found 8 bytes of RAM here. All accesses by
        // Rust code are atomic; those of guest code are the processor's.
        Some(unsafe { AtomicU64::from_ptr(self.0.cast()) })
    }

    /// Stores an aligned 64-bit word at once; whether the pointer is aligned.
    pub fn store64(&self, value: u64) -> bool {
        self.word64()
            .inspect(|word| word.store(value, Ordering::SeqCst))
            .is_some()
    }

    /// The aligned 32-bit word here; `None` if the pointer is not aligned.
    pub fn word32(&self) -> Option<&AtomicU32> {
        if !self.0.cast::<u32>().is_aligned() {
            return None;
        }
        // SAFETY: as in `word64`, for 4 bytes.
        Some(unsafe { AtomicU32::from_ptr(self.0.cast()) })
    }
}

/// `value` replaced by `new` if it is `old`; else what was found.
pub fn exchange64(word: &AtomicU64, old: u64, new: u64) -> Result<(), u64> {
    word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
        .map(|_| ())
}

/// As [`exchange64`].
pub fn exchange32(word: &AtomicU32, old: u32, new: u32) -> Result<(), u32> {
    word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
        .map(|_| ())
}
