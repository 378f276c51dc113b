//! What all checks share: their outcome, the first failure among threads, waiting and mixing.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Load, os};

/// How a check ended if it did not fail.
pub enum Outcome {
    Checksum(u64),
    Skipped(&'static str),
}

/// The code of a check; the error says which value was wrong.
pub type Check = fn(Load) -> Result<Outcome, String>;

/// The first failure that any thread of a check found; all the others leave when there is one.
#[derive(Default)]
pub struct Verdict {
    failed: AtomicBool,
    first: Mutex<Option<String>>,
}

impl Verdict {
    /// Notes a failure.
    pub fn fail(&self, message: String) {
        self.first
            .lock()
            .expect("no thread panics here")
            .get_or_insert(message);
        self.failed.store(true, Ordering::Release);
    }

    /// Notes a failure unless both values are equal; says whether they are.
    pub fn equal<T: PartialEq + std::fmt::LowerHex>(&self, what: &str, is: T, must: T) -> bool {
        if is != must {
            self.fail(format!("{what} is {is:#x} and must be {must:#x}"));
            return false;
        }
        true
    }

    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Waits until the condition holds; false if a thread failed meanwhile.
    ///
    /// It looks often at first, as the other thread may run on another processor, and then lets
    /// others run, as there may be more threads than processors.
    pub fn wait(&self, condition: impl FnMut() -> bool) -> bool {
        self.wait_looking(200, condition)
    }

    /// As [`Verdict::wait`], with the number of looks before others may run: few if one is costly.
    pub fn wait_looking(&self, looks: u32, mut condition: impl FnMut() -> bool) -> bool {
        loop {
            for _ in 0..looks {
                if condition() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if self.has_failed() {
                return false;
            }
            os::give_way();
        }
    }

    /// Ends the check.
    pub fn finish(self, checksum: u64) -> Result<Outcome, String> {
        match self.first.into_inner().expect("no thread panics here") {
            None => Ok(Outcome::Checksum(checksum)),
            Some(message) => Err(message),
        }
    }
}

/// A value of a counter on its own cache line.
#[derive(Default)]
#[repr(align(64))]
pub struct Line<T>(pub T);

/// A well-mixed function of its input, for patterns and checksums (the finalizer of SplitMix64).
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
