//! Asynchronous signals.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

static HANDLED: AtomicU64 = AtomicU64::new(0);

/// Calls `work` while signals arrive at its thread all the time.
pub fn under_signals(work: impl FnOnce()) {
    // SAFETY: the handler is async-signal-safe; the thread signalled outlives the scope.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(c_int) = on_signal;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
    }
    // SAFETY: no preconditions.
    let thread = unsafe { libc::pthread_self() };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // SAFETY: that thread waits for this one before it ends.
                unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
                std::thread::sleep(Duration::from_micros(20));
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    let handled = HANDLED.load(Ordering::Relaxed);
    println!("{handled} signals");
    assert!(handled > 0);
}

/// Uses vector registers as handlers do.
extern "C" fn on_signal(_: c_int) {
    let count = HANDLED.fetch_add(1, Ordering::Relaxed);
    let product = (0..8).map(|i| f64::from(i) * count as f64).sum::<f64>();
    std::hint::black_box(product);
}
