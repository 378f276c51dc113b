//! What other threads want of a VCPU: one word of attention that it polls, and what the bits of
//! that word stand for.
//!
//! Orderings: whoever signals first stores what it signals, then raises the attention bit with
//! release ordering; the VCPU takes the bits with acquire ordering before it reads what was
//! stored. No locks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use trapline_trace::{TraceSystem, VcpuId};

use crate::debug::{Breakpoints, DebugPort};
use crate::interrupt::VcpuSignals;
use crate::statistics::{LiveReport, VcpuStatistics};

/// Bits of a VCPU's attention word beside those of the trace subsystem.
pub mod attention {
    /// The local APIC may have an interrupt to deliver.
    pub const INTERRUPT: u32 = 1 << 8;
    /// NMI, INIT or a start-up IPI waits.
    pub const EVENT: u32 = 1 << 9;
    /// The machine stops.
    pub const STOP: u32 = 1 << 10;
    /// A debugger wants something, or a watchpoint was hit.
    pub const DEBUG: u32 = 1 << 11;
    /// Someone wants its statistics.
    pub const REPORT: u32 = 1 << 12;
    /// All of them.
    pub const ALL: u32 = INTERRUPT | EVENT | STOP | DEBUG | REPORT;
}

/// No start-up IPI waits.
const NO_STARTUP: u32 = u32::MAX;

/// The signals of one VCPU.
pub struct Signals {
    trace: Arc<TraceSystem>,
    vcpu: VcpuId,
    nmi: AtomicBool,
    init: AtomicBool,
    startup: AtomicU32,
    stopping: AtomicBool,
    /// The debugger's access to this VCPU.
    pub debug: DebugPort,
    /// Its statistics, while it runs.
    pub report: LiveReport,
    pub breakpoints: Arc<Breakpoints>,
}

/// Events taken from [`Signals`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    pub nmi: bool,
    pub init: bool,
    /// The vector of a start-up IPI.
    pub startup: Option<u8>,
}

impl Signals {
    pub fn new(trace: Arc<TraceSystem>, vcpu: VcpuId, breakpoints: Arc<Breakpoints>) -> Self {
        Self {
            trace,
            vcpu,
            nmi: AtomicBool::new(false),
            init: AtomicBool::new(false),
            startup: AtomicU32::new(NO_STARTUP),
            stopping: AtomicBool::new(false),
            debug: DebugPort::default(),
            report: LiveReport::default(),
            breakpoints,
        }
    }

    /// Asks the VCPU's thread to end at its next instruction boundary.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.trace.raise(self.vcpu, attention::STOP);
    }

    /// Whether [`Self::stop`] has been called.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Makes the VCPU look at its [`DebugPort`] and at the breakpoints.
    pub fn debug(&self) {
        self.trace.raise(self.vcpu, attention::DEBUG);
    }

    /// The VCPU's statistics of now; of its last stop if it stands still, and of its last report
    /// if it gives none in time.
    pub fn statistics(&self, patience: Duration) -> VcpuStatistics {
        let request = self.report.ask();
        self.trace.raise(self.vcpu, attention::REPORT);
        let still = || self.debug.is_stopped() || self.is_stopping();
        self.report.wait(request, patience, &still)
    }

    /// Takes what waits.
    pub fn take(&self) -> Events {
        let startup = self.startup.swap(NO_STARTUP, Ordering::Acquire);
        Events {
            nmi: self.nmi.swap(false, Ordering::Acquire),
            init: self.init.swap(false, Ordering::Acquire),
            startup: u8::try_from(startup).ok(),
        }
    }
}

impl VcpuSignals for Signals {
    fn interrupt(&self) {
        self.trace.raise(self.vcpu, attention::INTERRUPT);
    }
    fn nmi(&self) {
        self.nmi.store(true, Ordering::Release);
        self.trace.raise(self.vcpu, attention::EVENT);
    }
    fn init(&self) {
        // A start-up IPI from before the INIT is void.
        self.startup.store(NO_STARTUP, Ordering::Release);
        self.init.store(true, Ordering::Release);
        self.trace.raise(self.vcpu, attention::EVENT);
    }
    fn startup(&self, vector: u8) {
        self.startup.store(u32::from(vector), Ordering::Release);
        self.trace.raise(self.vcpu, attention::EVENT);
    }
}
