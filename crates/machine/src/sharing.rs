//! Page sharing as a policy: when and how fast pages are looked at.
//!
//! One thread for all machines of a pool. It reads at most [`PAGES_PER_SECOND`], which costs a few
//! hundredths of a processor, and begins a pass over all memory at most once in [`PASS`]: a page is
//! a candidate when it was the same in two passes.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use trapline_memory::GuestMemory;
use trapline_memory::sharing::{PoolStatistics, Scanner, SharingPool};
use trapline_trace::TraceSystem;

use crate::outcome::MachineError;

/// How many pages are read in a second, at most.
const PAGES_PER_SECOND: u32 = 25_000;
/// How many pages are read at once.
const STEP: u32 = 256;
/// The shortest time from one pass to the next.
const PASS: Duration = Duration::from_millis(500);

/// Machines in this process that keep pages with the same bytes once. Give it to each of them
/// ([`crate::run_sharing`]). It works until it is dropped; pages that are shared then stay so.
pub struct PageSharing {
    pool: Arc<SharingPool>,
    end: Arc<End>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct End {
    asked: Mutex<bool>,
    changed: Condvar,
}

impl End {
    /// Waits for the end, for at most this long; whether it has been asked for.
    fn wait(&self, limit: Duration) -> bool {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .changed
            .wait_timeout_while(asked, limit, |asked| !*asked);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl PageSharing {
    /// Starts looking for pages, of no machine yet.
    ///
    /// # Errors
    /// The host has no file in memory or no thread to give.
    pub fn start() -> Result<Self, MachineError> {
        let refused = |source: io::Error| MachineError::Host {
            what: "a file in memory or a thread for page sharing".into(),
            remedy: "free some, or leave out mergeable=on",
            source,
        };
        let pool = SharingPool::new().map_err(refused)?;
        let end = Arc::new(End::default());
        let (scanner, asked) = (Scanner::new(Arc::clone(&pool)), Arc::clone(&end));
        let thread = thread::Builder::new()
            .name("page-sharing".into())
            .spawn(move || scan(scanner, &asked))
            .map_err(refused)?;
        Ok(Self {
            pool,
            end,
            thread: Some(thread),
        })
    }

    pub(crate) fn pool(&self) -> Arc<SharingPool> {
        Arc::clone(&self.pool)
    }

    /// What is shared now.
    pub fn statistics(&self) -> PoolStatistics {
        self.pool.statistics()
    }

    /// Takes a machine in, until its memory is dropped.
    pub(crate) fn join(&self, memory: &Arc<GuestMemory>, trace: &Arc<TraceSystem>, vcpus: usize) {
        self.pool.join(memory, trace, vcpus);
    }
}

impl Drop for PageSharing {
    fn drop(&mut self) {
        *self
            .end
            .asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.end.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the panic hook; without a scanner nothing more is shared.
            let _ = thread.join();
        }
    }
}

fn scan(mut scanner: Scanner, end: &End) {
    let pause = Duration::from_secs(1) * STEP / PAGES_PER_SECOND;
    let mut pass = Instant::now();
    loop {
        let step = scanner.step(STEP as usize);
        let mut wait = pause;
        if step.pass_ended {
            wait = wait.max(PASS.saturating_sub(pass.elapsed()));
        }
        if end.wait(wait) {
            return;
        }
        if step.pass_ended {
            pass = Instant::now();
        }
    }
}
