//! Whether there is a standard output at all.
//!
//! A process may be started with it closed. Rust's runtime then opens /dev/null in its place before
//! `main`, so that no file that is opened later is taken for it, and what is printed is lost without
//! a word. Only code that runs before the runtime can tell.

// For the section that names the function below.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::io::Errno;

static CLOSED: AtomicBool = AtomicBool::new(false);

extern "C" fn look() {
    let closed = rustix::io::fcntl_getfd(rustix::stdio::stdout()) == Err(Errno::BADF);
    CLOSED.store(closed, Relaxed);
}

// SAFETY: the C library calls every function of this section once, before `main`, with arguments that
// a function without parameters leaves alone. This one makes a system call and stores to a static:
// neither needs Rust's runtime, and no other thread runs yet.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Whether the process was started with an open standard output.
///
/// # Errors
/// That it was closed, as writing to it would have said.
pub fn check() -> io::Result<()> {
    if CLOSED.load(Relaxed) {
        return Err(Errno::BADF.into());
    }
    Ok(())
}
