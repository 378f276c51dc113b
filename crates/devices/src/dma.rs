//! Direct memory access: how a device reaches guest memory, and on which thread.
//!
//! # The rule
//! A device performs DMA on a thread of its own, never on a VCPU's, and holds no lock meanwhile
//! that an access to its registers takes. A DMA write may hit a traced location; then it waits
//! until the consumers have acknowledged at an instruction boundary. A VCPU inside an access to
//! device registers is at none: if it performed the write itself, it would wait for another actor,
//! or its own acknowledgement, while it counts as running; and if it waited for a lock that the
//! device's thread holds, the two would wait for each other.
//!
//! The types keep the first half of the rule: [`Dma`] exists only inside [`DmaThread::spawn`], and
//! cannot be sent to another thread. The device keeps the second half by taking its command out of
//! its lock before it executes it.

use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use trapline_memory::GuestMemory;
use trapline_trace::{Actor, TraceSystem};

/// What a device needs for DMA. Plain handles: they perform nothing until a [`DmaThread`] is made.
#[derive(Clone)]
pub struct DmaPort {
    pub memory: Arc<GuestMemory>,
    pub trace: Arc<TraceSystem>,
}

/// Guest memory as a device's own thread reaches it. Accesses to traced locations are events whose
/// actor is a device.
pub struct Dma {
    port: DmaPort,
    stop: Arc<AtomicBool>,
    /// Stays on its thread.
    here: PhantomData<*const ()>,
}

impl Dma {
    /// Reads `data.len()` bytes at a guest-physical address; whether all of them are RAM. If not,
    /// nothing or a part has been read.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let DmaPort { memory, trace } = &self.port;
        memory.read_sensed(trace, Actor::Device, gpa, data)
    }

    /// Writes bytes; whether all of them are RAM. If not, those that are have been written. Words
    /// of eight bytes at addresses that eight divides are written whole.
    pub fn write(&self, gpa: u64, data: &[u8]) -> bool {
        let DmaPort { memory, trace } = &self.port;
        memory.write(trace, Actor::Device, gpa, data)
    }

    /// Whether the machine ends: a long transfer leaves off.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// A device's thread. Dropping it stops and joins the thread.
pub struct DmaThread {
    stop: Arc<AtomicBool>,
    wake: Box<dyn Fn() + Send>,
    thread: Option<JoinHandle<()>>,
}

impl DmaThread {
    /// Starts the thread and runs `body` on it. `body` returns soon after [`Dma::stopping`] and a
    /// call of `wake`.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn spawn(
        name: &str,
        port: DmaPort,
        wake: impl Fn() + Send + 'static,
        body: impl FnOnce(Dma) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::Builder::new().name(name.into()).spawn(move || {
            body(Dma {
                port,
                stop: seen,
                here: PhantomData,
            });
        })?;
        Ok(Self {
            stop,
            wake: Box::new(wake),
            thread: Some(thread),
        })
    }
}

impl Drop for DmaThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        (self.wake)();
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}
