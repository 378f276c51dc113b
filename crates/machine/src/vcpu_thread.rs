//! One host thread per VCPU.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use trapline_monitor::signals::Signals;
use trapline_monitor::statistics::VcpuStatistics;
use trapline_monitor::surroundings::Surroundings;
use trapline_monitor::vcpu::{Execution, Exit, Vcpu};
use trapline_trace::{TraceSystem, VcpuId};
use trapline_x86::CpuState;

use crate::ending::{End, Ending};
use crate::outcome::{difference_report, register_dump};

/// Ends the machine if its VCPU's thread panics, so that a fault of the VMM is no hang.
struct PanicGuard {
    ending: Arc<Ending>,
    trace: Arc<TraceSystem>,
    vcpu: VcpuId,
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if thread::panicking() {
            // Nobody may wait for it any more.
            self.trace.enter_safe(self.vcpu);
            self.ending
                .announce(End::HostRefused("internal error, reported above".into()));
        }
    }
}

/// A running VCPU.
pub struct VcpuThread {
    signals: Arc<Signals>,
    statistics: Arc<Mutex<VcpuStatistics>>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the VCPU `index` with the registers `cpu`.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub fn spawn(
        index: u8,
        cpu: CpuState,
        surroundings: impl FnOnce() -> Surroundings + Send + 'static,
        signals: Arc<Signals>,
        ending: Arc<Ending>,
        execution: Execution,
    ) -> io::Result<Self> {
        let statistics = Arc::new(Mutex::new(VcpuStatistics::default()));
        let (thread_signals, thread_statistics) = (Arc::clone(&signals), Arc::clone(&statistics));
        let thread = thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
            let bootstrap = index == 0;
            let surroundings = surroundings();
            let _guard = PanicGuard {
                ending: Arc::clone(&ending),
                trace: Arc::clone(&surroundings.trace),
                vcpu: surroundings.vcpu,
            };
            let mut vcpu = match Vcpu::new(cpu, surroundings, thread_signals, bootstrap, execution) {
                Ok(vcpu) => vcpu,
                Err(error) => return ending.announce(End::HostRefused(error.to_string())),
            };
            let exit = vcpu.run();
            *thread_statistics.lock().unwrap_or_else(PoisonError::into_inner) = vcpu.statistics();
            tracing::debug!(target: "vcpu", vcpu = index, ?exit, registers = register_dump(&vcpu.cpu), "ends");
            match exit {
                Exit::Stopped => {}
                Exit::TripleFault => {
                    ending.announce(End::Crashed { vcpu: index, registers: register_dump(&vcpu.cpu) });
                }
                Exit::Difference => {
                    let report = vcpu.difference().map(|d| difference_report(&d));
                    ending.announce(End::EnginesDiffer(report.unwrap_or_default()));
                }
            }
        })?;
        Ok(Self {
            signals,
            statistics,
            thread: Some(thread),
        })
    }

    /// Asks the VCPU to end at its next instruction boundary.
    pub fn stop(&self) {
        self.signals.stop();
    }

    /// Waits for the end of the thread; its statistics.
    pub fn join(mut self) -> VcpuStatistics {
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the panic hook; the statistics are then zero.
            let _ = thread.join();
        }
        *self
            .statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
