//! How a guest that polls OUT of channel 2 sees it rise on a busy host.
//!
//! Operating systems find the rate of the TSC with channel 2: they load it, read the TSC, poll OUT
//! at port 0x61, and read the TSC after every poll that finds OUT low. They notice when something
//! disturbed them between two TSC readings, not when it happened
//!
//! - between the load and the first reading, or
//! - between the last reading and the poll that finds OUT high.
//!
//! The interval between the first and the last reading is then shorter than the count, at worst by
//! all of it, and they believe in a TSC that is many times too slow. On a processor of its own a
//! system is safe from this; here a VCPU's thread loses its processor to others at any time.
//!
//! So, when the thread was away between these accesses and had time for next to nothing else, the
//! count begins when the VCPU goes on, and a poll is answered as of before the absence: OUT was
//! still low then, and the next poll finds it high. The interval can only become longer, which
//! systems notice. One that does something else than polling meanwhile sees the real time, and so
//! does one that reads the count.
//!
//! Where the host itself is a virtual machine that stood still, the thread does not know. So a long
//! break after many polls in close succession counts as an absence too.

use std::thread::{self, ThreadId};

/// Two accesses that are no further apart (nanoseconds) had no disturbance that matters.
const CLOSE: u64 = 50_000;

/// A guest that does nothing but to access the port again takes no longer (nanoseconds).
const NOTHING_ELSE: u64 = 1_000_000;

/// So many close accesses in a row come from a loop that does nothing else.
const LOOP: u32 = 100;

/// The accesses to channel 2 since its count began.
#[derive(Default)]
pub struct Poll {
    last: Option<Access>,
    /// OUT has not been looked at yet.
    first: bool,
    /// The accesses in a row that were close.
    close: u32,
}

struct Access {
    thread: ThreadId,
    at: u64,
    /// When the thread's time was looked at, and what it was.
    looked: u64,
    thread_time: u64,
}

/// What a poll is to find.
#[derive(Debug, PartialEq, Eq)]
pub enum Finding {
    /// OUT as it is.
    Now,
    /// OUT with a count that began so many nanoseconds later.
    BeginLater(u64),
    /// OUT as the poll before found it.
    AsBefore,
}

impl Poll {
    /// A count that OUT has still to rise at the end of goes on at `now`.
    pub fn begin(&mut self, now: u64, thread_time: u64) {
        self.last = Some(Access {
            thread: thread::current().id(),
            at: now,
            looked: now,
            thread_time,
        });
        self.first = true;
        self.close = 0;
    }

    /// The guest knows more than OUT, or knows that OUT has risen.
    pub fn end(&mut self) {
        self.last = None;
    }

    /// The guest looks at OUT. `thread_time` gives [`crate::clock::TimeSource::thread_time`].
    pub fn look(&mut self, now: u64, thread_time: impl FnOnce() -> u64) -> Finding {
        let Some(last) = &mut self.last else {
            return Finding::Now;
        };
        let first = std::mem::replace(&mut self.first, false);
        let passed = now.saturating_sub(last.at);
        last.at = now;
        if passed <= CLOSE {
            self.close = self.close.saturating_add(1);
            return Finding::Now;
        }
        let polling = std::mem::take(&mut self.close) >= LOOP;
        if last.thread != thread::current().id() {
            // The other thread's absences are not known.
            self.end();
            return Finding::Now;
        }
        let thread_time = thread_time();
        let had = thread_time.saturating_sub(last.thread_time);
        let away = now.saturating_sub(last.looked).saturating_sub(had);
        (last.looked, last.thread_time) = (now, thread_time);
        // What was away before the last access was too short to be looked at.
        let away = away.min(passed);
        let nothing_else = away != 0 && passed - away <= NOTHING_ELSE;
        match (first, nothing_else) {
            (true, true) => Finding::BeginLater(away),
            (false, true) => Finding::AsBefore,
            _ if polling => Finding::AsBefore,
            _ => Finding::Now,
        }
    }
}
