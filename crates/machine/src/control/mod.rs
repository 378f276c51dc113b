//! What can be asked of a machine from outside while it runs: one place behind the API socket and
//! the monitor console.
//!
//! A [`Control`] lives as long as the run; the machine that runs now is attached to it, so what
//! was set (watches, semantics) is set again after a reset.
//!
//! # Lock order
//! `state`, then what the trace subsystem locks. Commands run one at a time, with `state` locked,
//! on threads that are no VCPU's: they may wait until VCPUs have stopped, and no VCPU waits for
//! them except by being paused.

mod command;
mod execute;
mod watches;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use trapline_memory::GuestMemory;
use trapline_memory::sharing::SharingPool;
use trapline_memory::watch::Watches;
use trapline_monitor::signals::Signals;
use trapline_trace::TraceSystem;

use crate::config::MachineConfig;
use crate::ending::Ending;
use crate::semantics::TraceSemantics;
use crate::watch::{WatchError, WatchQueue, WatchSpec};
use watches::SetWatch;

pub use command::{Command, CommandError, HELP};
pub use execute::{ControlError, Fault, Reply};

/// The machine that runs now.
pub(crate) struct Live {
    pub trace: Arc<TraceSystem>,
    pub vcpus: Vec<Arc<Signals>>,
    pub ending: Arc<Ending>,
    pub memory: Arc<GuestMemory>,
    /// Of shared pages.
    pub pool: Option<Arc<SharingPool>>,
    /// Presses the power button; whether the guest listens to it.
    pub press_power_button: Box<dyn Fn() -> bool + Send>,
}

#[derive(Default)]
struct State {
    machine: Option<Live>,
    paused: bool,
    vcpus: usize,
    memory_bytes: u64,
    semantics: TraceSemantics,
    watches: Vec<SetWatch>,
    next_watch: u64,
}

/// The way into a machine from outside.
pub struct Control {
    state: Mutex<State>,
    watches: Arc<Watches>,
    queue: WatchQueue,
}

impl Default for Control {
    fn default() -> Self {
        let (queue, sink) = WatchQueue::new();
        let watches = Arc::new(Watches::default());
        watches.add_sink(sink);
        Self {
            state: Mutex::default(),
            watches,
            queue,
        }
    }
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where accesses to watched memory are reported.
    pub(crate) fn watches(&self) -> &Arc<Watches> {
        &self.watches
    }

    /// The events of watches, for whoever asks.
    pub fn queue(&self) -> &WatchQueue {
        &self.queue
    }

    /// Sets a watch; its name.
    ///
    /// # Errors
    /// The machine cannot have it, or has one of that name.
    pub fn add_watch(&self, spec: WatchSpec) -> Result<String, WatchError> {
        self.add(&mut self.lock(), spec)
    }

    /// Removes the watch with this name; whether there was one.
    pub fn remove_watch(&self, name: &str) -> bool {
        self.drop_watch(&mut self.lock(), name)
    }

    /// Takes over what the configuration sets from the start.
    pub(crate) fn configure(&self, config: &MachineConfig) -> Result<(), WatchError> {
        let mut state = self.lock();
        state.vcpus = usize::from(config.vcpus);
        state.memory_bytes = config.memory_bytes;
        state.semantics = config.trace_semantics.clone();
        for spec in &config.watches {
            self.add(&mut state, spec.clone())?;
        }
        Ok(())
    }

    /// Attaches a machine before its VCPUs start, until the guard is dropped.
    pub(crate) fn attach(&self, machine: Live) -> Attached<'_> {
        let mut state = self.lock();
        state.semantics.apply(&machine.trace);
        for watch in &mut state.watches {
            watch.establish(&machine.trace);
        }
        state.paused = false;
        state.machine = Some(machine);
        Attached(self)
    }
}

/// A machine is attached.
pub(crate) struct Attached<'a>(&'a Control);

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.machine = None;
        for watch in &mut state.watches {
            watch.forget();
        }
    }
}
