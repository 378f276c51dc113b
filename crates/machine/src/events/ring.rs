//! A ring of plain records from one thread to the writer. Pushing never waits: what finds no room
//! is dropped and counted.
//!
//! # Orderings
//! The producer writes a record's words and then stores `written` with release; the reader loads it
//! with acquire before it reads the words. The reader stores `read` with release after it has read
//! them; the producer loads it with acquire before it writes them anew. The words themselves are
//! relaxed.
//!
//! One thread at a time produces. `busy` enforces it where several threads share a ring: its
//! acquire and release order one producer's words after another's.

use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Words of a record.
pub const WORDS: usize = 12;

/// How often a producer looks whether another one has finished, which takes it some dozen
/// nanoseconds, before it drops its record.
const TRIES: u32 = 64;

/// Keeps the producer's and the reader's words apart, each on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Line<T>(T);

/// A ring.
#[derive(Debug)]
pub struct Ring {
    words: Box<[AtomicU64]>,
    /// Records written since the beginning.
    written: Line<AtomicU64>,
    /// Records read since the beginning.
    read: Line<AtomicU64>,
    dropped: AtomicU64,
    busy: AtomicBool,
}

impl Ring {
    /// A ring for this many records.
    pub fn new(capacity: usize) -> Self {
        Self {
            words: (0..capacity.max(1) * WORDS)
                .map(|_| AtomicU64::new(0))
                .collect(),
            written: Line::default(),
            read: Line::default(),
            dropped: AtomicU64::new(0),
            busy: AtomicBool::new(false),
        }
    }

    fn slot(&self, number: u64) -> &[AtomicU64] {
        let slots = self.words.len() / WORDS;
        let first = (number % slots as u64) as usize * WORDS;
        &self.words[first..first + WORDS]
    }

    /// Adds a record, or drops it if there is no room.
    pub fn push(&self, record: &[u64; WORDS]) {
        let free = || {
            self.busy
                .compare_exchange(false, true, Acquire, Relaxed)
                .is_ok()
        };
        let ours = (0..TRIES).any(|_| {
            let ours = free();
            if !ours {
                std::hint::spin_loop();
            }
            ours
        });
        if !ours {
            return self.drop_one();
        }
        let number = self.written.0.load(Relaxed);
        let slots = (self.words.len() / WORDS) as u64;
        if number - self.read.0.load(Acquire) >= slots {
            self.drop_one();
        } else {
            for (word, value) in self.slot(number).iter().zip(record) {
                word.store(*value, Relaxed);
            }
            self.written.0.store(number + 1, Release);
        }
        self.busy.store(false, Release);
    }

    /// Counts a record that was not kept.
    pub fn drop_one(&self) {
        self.drop_some(1);
    }

    /// Counts records that were not kept.
    pub fn drop_some(&self, count: u64) {
        self.dropped.fetch_add(count, Relaxed);
    }

    /// Records dropped since the beginning.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    /// Hands over every record there is now, oldest first. For one thread only: the writer.
    pub fn read(&self, mut take: impl FnMut([u64; WORDS])) {
        let end = self.written.0.load(Acquire);
        for number in self.read.0.load(Relaxed)..end {
            let slot = self.slot(number);
            take(std::array::from_fn(|n| slot[n].load(Relaxed)));
            self.read.0.store(number + 1, Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    fn firsts(ring: &Ring) -> Vec<u64> {
        let mut firsts = Vec::new();
        ring.read(|record| firsts.push(record[0]));
        firsts
    }

    #[test]
    fn what_finds_no_room_is_counted() {
        let ring = Ring::new(3);
        (0..5).for_each(|n| ring.push(&[n; WORDS]));
        assert_eq!((firsts(&ring), ring.dropped()), (vec![0, 1, 2], 2));
        (5..7).for_each(|n| ring.push(&[n; WORDS]));
        assert_eq!((firsts(&ring), ring.dropped()), (vec![5, 6], 2));
    }

    #[test]
    fn records_arrive_whole_and_in_order_and_all_are_accounted_for() {
        const EACH: u64 = 20_000;
        let ring = Arc::new(Ring::new(64));
        let producers: Vec<_> = (0..2u64)
            .map(|producer| {
                let ring = Arc::clone(&ring);
                thread::spawn(move || {
                    for n in 1..=EACH {
                        ring.push(&[producer << 32 | n; WORDS]);
                    }
                })
            })
            .collect();
        let mut last = [0; 2];
        let mut arrived = 0;
        let mut look = |ring: &Ring| {
            ring.read(|record| {
                assert!(record.iter().all(|word| *word == record[0]), "{record:x?}");
                let (producer, n) = ((record[0] >> 32) as usize, record[0] & 0xffff_ffff);
                assert!(n > last[producer]);
                last[producer] = n;
                arrived += 1;
            });
        };
        while producers.iter().any(|p| !p.is_finished()) {
            look(&ring);
            thread::yield_now();
        }
        look(&ring);
        assert_eq!(arrived + ring.dropped(), 2 * EACH);
        assert!(arrived > 0);
    }
}
