//! Locked instructions of every width on lines that all threads share: the sums must be exact.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::Load;
use crate::bracket::{Line, Outcome, Verdict, mix};
use crate::cpu;
use crate::os;

/// Memory that threads change by locked instructions, or plainly while they hold a lock.
#[derive(Default)]
struct Shared<T>(Line<UnsafeCell<T>>);

// SAFETY: see the type.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn address(&self) -> *mut T {
        self.0.0.get()
    }

    fn value(&self) -> T
    where
        T: Copy,
    {
        // SAFETY: called when the threads have ended.
        unsafe { *self.0.0.get() }
    }
}

/// What the threads change, each on a line of its own.
#[derive(Default)]
struct Counters {
    bytes: Shared<u8>,
    words: Shared<u16>,
    doubles: Shared<u32>,
    mixed: Shared<u64>,
    /// A quadword at offset 3 of its line.
    unaligned: Shared<[u64; 3]>,
    eight: Shared<u64>,
    sixteen: Shared<u128>,
    bits: Shared<[u64; 4]>,
    lock: Line<AtomicU32>,
    locked: Shared<(u64, u64)>,
    bit_locked: Shared<u64>,
    compared: Line<AtomicU64>,
}

/// The bit of `bits` that is a lock; bits 0 to 63 belong to one thread each.
const LOCK_BIT: u64 = 200;

/// The increment of the 128-bit counter: every addition carries into both halves in time.
const STEP: u128 = 0x1_8000_0000_0000_0001;

/// Rounds after which the threads wait for each other: left alone, each might do all its work
/// while the others are not running.
const MEET: u32 = 250;

pub fn run(load: Load) -> Result<Outcome, String> {
    let counters = Counters::default();
    let verdict = Verdict::default();
    let total = u64::from(load.rounds) * u64::from(load.threads);
    let old_sum = AtomicU64::new(0);
    let arrived = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for thread in 0..load.threads {
            let (counters, verdict, old_sum, arrived) = (&counters, &verdict, &old_sum, &arrived);
            scope.spawn(move || {
                let mut sum = 0_u64;
                for round in 0..load.rounds {
                    if round % MEET == 0 {
                        arrived.fetch_add(1, Ordering::AcqRel);
                        let all = (round / MEET + 1) * load.threads;
                        verdict.wait(|| arrived.load(Ordering::Acquire) >= all);
                    }
                    sum = sum.wrapping_add(one(counters, verdict, thread, round));
                    if verdict.has_failed() {
                        return;
                    }
                }
                old_sum.fetch_add(sum, Ordering::Relaxed);
            });
        }
    });
    let old_sum = old_sum.into_inner();
    // Each value from 0 to total - 1 was the old one exactly once.
    verdict.equal(
        "the sum of XADD's old values",
        old_sum,
        total * (total - 1) / 2,
    );
    verdict.equal("the INC byte", counters.bytes.value(), total as u8);
    verdict.equal(
        "the DEC word",
        counters.words.value(),
        (total as u16).wrapping_neg(),
    );
    verdict.equal(
        "the ADD doubleword",
        counters.doubles.value(),
        (total as u32).wrapping_mul(3),
    );
    let mut mixed = 0;
    for thread in 0..load.threads {
        for round in 0..load.rounds {
            mixed ^= pattern(thread, round);
        }
    }
    verdict.equal("the XOR quadword", counters.mixed.value(), mixed);
    verdict.equal("the CMPXCHG8B counter", counters.eight.value(), total << 20);
    let sixteen = STEP.wrapping_mul(u128::from(total));
    verdict.equal("the CMPXCHG16B counter", counters.sixteen.value(), sixteen);
    let bits = counters.bits.value();
    verdict.equal("the bits", bits[0] | bits[1] | bits[2] | bits[3], 0);
    let (first, second) = counters.locked.value();
    verdict.equal("the first counter under XCHG's lock", first, total);
    verdict.equal("the second counter under XCHG's lock", second, total * 5);
    verdict.equal(
        "the counter under BTS's lock",
        counters.bit_locked.value(),
        total,
    );
    verdict.equal(
        "the CMPXCHG counter",
        counters.compared.0.into_inner(),
        total * 7,
    );
    verdict.finish(mix(mixed ^ old_sum ^ sixteen as u64 ^ second))
}

fn pattern(thread: u32, round: u32) -> u64 {
    mix(u64::from(thread) << 32 | u64::from(round))
}

/// One round of one thread; gives XADD's old value.
fn one(counters: &Counters, verdict: &Verdict, thread: u32, round: u32) -> u64 {
    cpu::locked_increment_8(counters.bytes.address());
    cpu::locked_decrement_16(counters.words.address());
    cpu::locked_add_32(counters.doubles.address(), 3);
    cpu::locked_xor_64(counters.mixed.address(), pattern(thread, round));
    let unaligned = counters
        .unaligned
        .address()
        .cast::<u8>()
        .wrapping_add(3)
        .cast();
    let old = cpu::locked_exchange_add_64(unaligned, 1);

    let eight = counters.eight.address();
    let mut seen = 0;
    loop {
        let held = cpu::compare_exchange_8_bytes(eight, seen, seen.wrapping_add(1 << 20));
        if held == seen {
            break;
        }
        seen = held;
    }
    let sixteen = counters.sixteen.address();
    let mut seen = 0;
    loop {
        let held = cpu::compare_exchange_16_bytes(sixteen, seen, seen.wrapping_add(STEP));
        if held == seen {
            break;
        }
        seen = held;
    }
    let compared = &counters.compared.0;
    let mut seen = compared.load(Ordering::Relaxed);
    while let Err(held) =
        compared.compare_exchange(seen, seen + 7, Ordering::AcqRel, Ordering::Relaxed)
    {
        seen = held;
    }

    // A bit of one's own among the bits of others.
    let bits = counters.bits.address().cast();
    let own = u64::from(thread % 64);
    for _ in 0..4 {
        if cpu::locked_set_bit(bits, own) || !cpu::locked_clear_bit(bits, own) {
            verdict.fail(format!("thread {thread} lost its own bit in round {round}"));
        }
    }

    while counters.lock.0.swap(1, Ordering::Acquire) != 0 {
        os::give_way();
    }
    // SAFETY: the lock is held.
    unsafe {
        let (first, second) = *counters.locked.address();
        *counters.locked.address() = (first + 1, second + 5);
    }
    counters.lock.0.store(0, Ordering::Release);

    while cpu::locked_set_bit(bits, LOCK_BIT) {
        os::give_way();
    }
    // SAFETY: the lock is held.
    unsafe { *counters.bit_locked.address() += 1 }
    if !cpu::locked_clear_bit(bits, LOCK_BIT) {
        verdict.fail(format!(
            "the lock of BTS was open in round {round} of thread {thread}"
        ));
    }
    old
}
