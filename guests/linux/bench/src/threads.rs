//! Rows that use every processor.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::Row;

pub const ROWS: &[Row] = &[
    ("shootdown", "change", shootdown),
    ("locked-counter", "increment", locked),
    ("threads", "round", independent),
    ("patched", "patch", patched),
];

fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// mprotect while another thread reads the pages.
fn shootdown() -> u64 {
    let stop = AtomicBool::new(false);
    let page = Box::leak(Box::new([0u8; 3 * 4096])).as_mut_ptr() as usize;
    let page = page.next_multiple_of(4096);
    let changes = 200;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: a page of the allocation above, always readable.
                unsafe { (page as *const u8).read_volatile() };
                std::hint::spin_loop();
            }
        });
        for n in 0..changes {
            let protection = if n & 1 == 0 {
                libc::PROT_READ
            } else {
                libc::PROT_READ | libc::PROT_WRITE
            };
            // SAFETY: a page of the allocation above, to which nobody writes.
            unsafe { libc::mprotect(page as *mut _, 4096, protection) };
        }
        stop.store(true, Ordering::Relaxed);
    });
    changes
}

/// One thread patches a function and stores a number, the other sees the number, serializes and
/// calls the function.
fn patched() -> u64 {
    const ROUNDS: u32 = 2000;
    let code = crate::system::function() as usize;
    let (patched, called) = (AtomicU32::new(0), AtomicU32::new(0));
    let mut stale = false;
    let alone = processors() == 1;
    let wait = || {
        if alone {
            thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..=ROUNDS {
                // SAFETY: the page holds a function whose constant is at offset 1.
                unsafe { ((code + 1) as *mut u32).write_unaligned(n) };
                patched.store(n, Ordering::Release);
                while called.load(Ordering::Acquire) != n {
                    wait();
                }
            }
        });
        for n in 1..=ROUNDS {
            while patched.load(Ordering::Acquire) != n {
                wait();
            }
            // CPUID serializes.
            std::hint::black_box(std::arch::x86_64::__cpuid(0));
            // SAFETY: the page holds a function without arguments.
            let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(code) };
            stale |= function() != n;
            called.store(n, Ordering::Release);
        }
    });
    if stale {
        crate::WRONG
    } else {
        u64::from(ROUNDS)
    }
}

/// Runs `work` on every processor for a while; the sum of what it did.
fn everywhere(work: impl Fn() -> u64 + Sync) -> u64 {
    let end = Instant::now() + Duration::from_millis(20);
    let run = || {
        let mut done = 0;
        while Instant::now() < end {
            done += work();
        }
        done
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..processors()).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|t| t.join().unwrap_or(0)).sum()
    })
}

fn locked() -> u64 {
    let counter = AtomicU64::new(0);
    everywhere(|| {
        for _ in 0..1000 {
            counter.fetch_add(1, Ordering::SeqCst);
        }
        1000
    })
}

fn independent() -> u64 {
    everywhere(|| crate::compute::ROWS[0].2())
}
