//! Page sharing as a policy: when and how fast pages are looked at.
//!
//! One thread for all machines of a pool. It reads at most [`PAGES_PER_SECOND`] unless told
//! otherwise, which costs a few hundredths of a processor, and begins a pass over all memory at most
//! once in [`PASS`]: a page is a candidate when it was the same in two passes.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use trapline_memory::GuestMemory;
use trapline_memory::sharing::{PoolStatistics, Scanner, SharingPool};
use trapline_trace::TraceSystem;

use crate::outcome::MachineError;

/// How many pages are read in a second, at most.
pub const PAGES_PER_SECOND: u32 = 25_000;
/// How many pages are read at once.
const STEP: u32 = 256;
/// The shortest time from one pass to the next.
const PASS: Duration = Duration::from_millis(500);

/// Machines in this process that keep pages with the same bytes once. Give it to each of them
/// ([`crate::run_sharing`]). It works until it is dropped; pages that are shared then stay so.
pub struct PageSharing {
    pool: Arc<SharingPool>,
    orders: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread is to do.
struct Orders {
    now: Mutex<Order>,
    changed: Condvar,
}

#[derive(Clone, Copy, PartialEq)]
struct Order {
    end: bool,
    /// Pages per second.
    rate: u32,
}

impl Orders {
    fn give(&self, change: impl FnOnce(&mut Order)) {
        change(&mut self.now.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn now(&self) -> Order {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something else than `seen` is ordered, for at most this long.
    fn wait(&self, seen: Order, limit: Duration) {
        let now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .changed
            .wait_timeout_while(now, limit, |now| *now == seen);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
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
        let orders = Arc::new(Orders {
            now: Mutex::new(Order {
                end: false,
                rate: PAGES_PER_SECOND,
            }),
            changed: Condvar::new(),
        });
        let (scanner, given) = (Scanner::new(Arc::clone(&pool)), Arc::clone(&orders));
        let thread = thread::Builder::new()
            .name("page-sharing".into())
            .spawn(move || scan(scanner, &given))
            .map_err(refused)?;
        Ok(Self {
            pool,
            orders,
            thread: Some(thread),
        })
    }

    pub(crate) fn pool(&self) -> Arc<SharingPool> {
        Arc::clone(&self.pool)
    }

    /// How many pages are read in a second, at most; with 0 nothing more becomes shared.
    pub fn set_rate(&self, pages_per_second: u32) {
        self.orders.give(|order| order.rate = pages_per_second);
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
        self.orders.give(|order| order.end = true);
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the panic hook; without a scanner nothing more is shared.
            let _ = thread.join();
        }
    }
}

fn scan(mut scanner: Scanner, orders: &Orders) {
    let mut pass = Instant::now();
    loop {
        let order = orders.now();
        if order.end {
            return;
        }
        if order.rate == 0 {
            orders.wait(order, PASS);
            continue;
        }
        let step = scanner.step(STEP as usize);
        let mut wait = Duration::from_secs(1) * STEP / order.rate;
        if step.pass_ended {
            wait = wait.max(PASS.saturating_sub(pass.elapsed()));
        }
        orders.wait(order, wait);
        if step.pass_ended {
            pass = Instant::now();
        }
    }
}
