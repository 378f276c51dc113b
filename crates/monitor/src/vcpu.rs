//! The run loop of one VCPU.
//!
//! One turn of the loop is: look at the attention word (traces, interrupts, events, stop), deliver
//! what is due, find the block at RIP, execute it. Everything between two turns is an instruction
//! boundary.

use std::sync::Arc;
use std::time::Instant;

use trapline_engine::access::Core;
use trapline_engine::decode::Features;
use trapline_engine::env::Environment;
use trapline_engine::native::{NativeCode, NativeError};
use trapline_engine::step::events::{Delivered, Event, raise};
use trapline_engine::step::run::{run, run_one};
use trapline_engine::tlb::Tlb;
use trapline_engine::translate::Translator;
use trapline_x86::state::{Activity, InterruptShadow};
use trapline_x86::{CpuState, Mode};

use crate::clock::Pace;
use crate::code_cache::CachedBlock;
use crate::debug::{Resume, StopCause};
use crate::fetch::Wanted;
use crate::lockstep::difference::Difference;
use crate::lockstep::{self, Lockstep};
use crate::path::Heat;
use crate::signals::{Signals, attention};
use crate::statistics::VcpuStatistics;
use crate::surroundings::Surroundings;
use crate::translated::From;

/// Why a VCPU stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was asked to.
    Stopped,
    /// A triple fault: the registers are those at the last fault.
    TripleFault,
    /// In lock-step execution: the engines disagree, see [`Vcpu::difference`].
    Difference,
}

/// How a VCPU executes 64-bit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Execution {
    Stepped,
    Translated,
    /// Both, and compared; for machines of one VCPU.
    Lockstep,
}

/// The sub-VMM of one VCPU.
pub struct Vcpu {
    pub cpu: Box<CpuState>,
    pub(crate) tlb: Tlb,
    pub(crate) native: NativeCode,
    pub(crate) features: Features,
    pub(crate) surroundings: Surroundings,
    signals: Arc<Signals>,
    bootstrap: bool,
    /// An event that has been taken from its source but not yet delivered.
    pub(crate) undelivered: Option<Event>,
    nmi_pending: bool,
    pub(crate) statistics: VcpuStatistics,
    /// How translated code was left last.
    pub(crate) came_from: From,
    /// How often all derived code was dropped.
    pub(crate) code_drops: u64,
    /// Where it spends its time.
    pub(crate) heat: Heat,
    /// When it began to run, while it does.
    started: Option<Instant>,
    /// A debugger has breakpoints, steps or waits: instructions run singly.
    pub(crate) debugging: bool,
    stepping: bool,
    stepped: bool,
    /// The breakpoint here has been reported: the next instruction runs.
    passed_breakpoint: Option<u64>,
    /// Whether every block is logged.
    pub(crate) log_blocks: bool,
    /// Whether every way out of translated code is logged.
    pub(crate) log_translated: bool,
    /// In lock-step execution.
    pub(crate) lockstep: Option<Box<Lockstep>>,
}

impl Vcpu {
    /// A VCPU in the state `cpu`, to be run on the calling thread.
    ///
    /// # Errors
    /// The host refused executable memory.
    pub fn new(
        cpu: CpuState,
        mut surroundings: Surroundings,
        signals: Arc<Signals>,
        bootstrap: bool,
        execution: Execution,
    ) -> Result<Self, NativeError> {
        if execution != Execution::Stepped {
            let word = surroundings.trace.attention(surroundings.vcpu);
            // The trace system outlives the VCPU, which keeps it.
            let word = match execution {
                Execution::Lockstep => lockstep::WANTED.as_ptr(),
                _ => word.as_ptr(),
            };
            surroundings.code.translator = Some(Translator::new(word)?);
        }
        let compared = (execution == Execution::Lockstep).then(Box::default);
        if compared.is_some() {
            surroundings.rehearsal = Some(Box::default());
        }
        surroundings.pace = Pace::of(execution);
        let cpu = Box::new(cpu);
        let features = Features::new(|leaf, subleaf| surroundings.cpuid(&cpu, leaf, subleaf));
        Ok(Self {
            cpu,
            tlb: Tlb::default(),
            native: NativeCode::new()?,
            features,
            surroundings,
            signals,
            bootstrap,
            undelivered: None,
            nmi_pending: false,
            statistics: VcpuStatistics::default(),
            came_from: From::default(),
            code_drops: 0,
            heat: Heat::default(),
            started: None,
            debugging: false,
            stepping: false,
            stepped: false,
            passed_breakpoint: None,
            log_translated: tracing::enabled!(target: "translated", tracing::Level::TRACE),
            lockstep: compared,
            log_blocks: tracing::enabled!(target: "exec", tracing::Level::TRACE),
        })
    }

    /// Totals so far.
    pub fn statistics(&self) -> VcpuStatistics {
        VcpuStatistics {
            tlb_fills: self.tlb.fills,
            code: self.surroundings.code.statistics,
            shadow: self.surroundings.shadow.statistics,
            descriptors: self.surroundings.descriptors.statistics,
            exits: self.surroundings.exits,
            lockstep: self.lockstep.as_ref().map(|l| l.statistics),
            running_ns: self.started.map_or(self.statistics.running_ns, |started| {
                (started.elapsed().as_nanos() as u64).saturating_sub(self.statistics.halted_ns)
            }),
            ..self.statistics
        }
    }

    /// What the engines disagree in, after [`Exit::Difference`].
    pub fn difference(&self) -> Option<Arc<Difference>> {
        self.lockstep.as_ref()?.difference.clone()
    }

    /// Runs until stopped or crashed.
    pub fn run(&mut self) -> Exit {
        let vcpu = self.surroundings.vcpu;
        let trace = Arc::clone(&self.surroundings.trace);
        trace.leave_safe(vcpu);
        self.surroundings.boundary(&mut self.tlb);
        self.started = Some(Instant::now());
        let exit = self.turns();
        trace.enter_safe(vcpu);
        self.statistics.running_ns = self.statistics().running_ns;
        self.started = None;
        exit
    }

    fn turns(&mut self) -> Exit {
        let trace = Arc::clone(&self.surroundings.trace);
        let word = trace.attention(self.surroundings.vcpu);
        loop {
            if word.pending() && self.attend() {
                return Exit::Stopped;
            }
            if self.debugging {
                while self.stop_for_debugger() {}
            }
            if self.cpu.activity != Activity::Active {
                if self.cpu.activity == Activity::Shutdown {
                    return Exit::TripleFault;
                }
                self.idle();
                continue;
            }
            if self.undelivered.is_some()
                || self.nmi_pending
                || self.surroundings.look_for_interrupts
            {
                self.choose_event();
                if self.undelivered.is_some() {
                    self.deliver();
                    continue;
                }
            }
            if self.may_run_translated() {
                if self.lockstep.is_none() {
                    self.run_translated();
                    continue;
                }
                self.run_lockstep();
                if self.difference().is_some() {
                    return Exit::Difference;
                }
                continue;
            }
            if let Some(block) = self.fetched(Wanted::Decoded) {
                self.execute(&block);
            }
        }
    }

    /// Looks at what the attention word announces; whether to stop.
    #[cold]
    fn attend(&mut self) -> bool {
        let s = &mut self.surroundings;
        let taken = s.trace.attention(s.vcpu).take(attention::ALL);
        s.boundary(&mut self.tlb);
        if s.code.has_released() || s.shadow.has_released() || s.descriptors.has_released() {
            s.remove_released();
        }
        if taken & attention::STOP != 0 {
            return true;
        }
        if taken & attention::DEBUG != 0 {
            self.debugging = true;
        }
        if taken & attention::REPORT != 0 {
            self.signals.report.give(self.statistics());
        }
        if taken & attention::INTERRUPT != 0 {
            self.surroundings.look_for_interrupts = true;
        }
        if taken & attention::EVENT != 0 {
            let events = self.signals.take();
            self.nmi_pending |= events.nmi;
            if events.init {
                self.undelivered = None;
                self.nmi_pending = false;
                self.surroundings.apic.init();
                self.cpu.init(self.bootstrap);
                self.surroundings.before_flush(&mut self.tlb);
                self.tlb.flush_all();
            }
            if let Some(vector) = events.startup
                && self.cpu.activity == Activity::WaitForSipi
            {
                tracing::debug!(target: "vcpu", vcpu = self.surroundings.vcpu.index(), vector, "starts");
                self.cpu.startup(vector);
                self.surroundings.before_flush(&mut self.tlb);
                self.tlb.flush_all();
            }
        }
        false
    }

    /// Stops if it is held or the debugger wants so, at a breakpoint, behind a step or a
    /// watchpoint. Whether there may be another reason to stop here.
    #[cold]
    fn stop_for_debugger(&mut self) -> bool {
        let breakpoints = Arc::clone(&self.signals.breakpoints);
        let linear = if self.cpu.mode() == Mode::Long64 {
            self.cpu.rip
        } else {
            self.cpu.cs().base.wrapping_add(self.cpu.rip) & 0xffff_ffff
        };
        let cause = if let Some(number) = self.surroundings.watchpoint_hit.take() {
            StopCause::Watchpoint(number)
        } else if let Some(cause) = self.signals.debug.wanted() {
            cause
        } else if self.stepped {
            StopCause::Stepped
        } else if self.passed_breakpoint != Some(linear)
            && self.cpu.activity == Activity::Active
            && breakpoints.contains(linear)
        {
            StopCause::Breakpoint
        } else {
            self.debugging = breakpoints.armed() || self.stepping;
            return false;
        };
        self.signals.report.give(self.statistics());
        let s = &mut self.surroundings;
        s.trace.enter_safe(s.vcpu);
        let signals = Arc::clone(&self.signals);
        let how = signals
            .debug
            .stop(cause, &mut self.cpu, &|| signals.is_stopping());
        s.trace.leave_safe(s.vcpu);
        // What was written meanwhile, by the debugger too, is applied before the next instruction.
        s.boundary(&mut self.tlb);
        if let Some(how) = how {
            // The debugger may have changed what translations and blocks were chosen by.
            self.tlb.flush_all();
            self.stepping = how == Resume::Step;
            self.stepped = false;
            self.passed_breakpoint = Some(linear);
        }
        cause == StopCause::Held && how.is_none() && !signals.is_stopping()
    }

    /// Sleeps until the attention word changes, unless what would end the halt is here already.
    fn idle(&mut self) {
        let s = &mut self.surroundings;
        if self.cpu.activity == Activity::Halted {
            s.exits.halts += 1;
            let interrupt = self.cpu.interrupts_enabled() && s.apic.pending();
            if interrupt || (self.nmi_pending && !self.cpu.nmi_blocked) {
                self.cpu.activity = Activity::Active;
                s.look_for_interrupts = true;
                return;
            }
        }
        let start = Instant::now();
        s.trace.sleep(s.vcpu, None);
        let halted = start.elapsed().as_nanos() as u64;
        self.statistics.halted_ns += halted;
        crate::clock::was_halted(halted);
    }

    /// Takes the most urgent event that can be delivered now (SDM vol. 3, table 6-2).
    fn choose_event(&mut self) {
        if self.undelivered.is_some() || self.cpu.shadow == InterruptShadow::MovSs {
            return;
        }
        if self.nmi_pending && !self.cpu.nmi_blocked {
            self.nmi_pending = false;
            self.undelivered = Some(Event::Nmi);
            return;
        }
        if !self.surroundings.look_for_interrupts {
            return;
        }
        if !self.cpu.interrupts_enabled() || self.cpu.shadow != InterruptShadow::None {
            return;
        }
        match self.surroundings.apic.acknowledge() {
            Some(vector) => {
                self.surroundings.exits.interrupts += 1;
                self.undelivered = Some(Event::Interrupt(vector));
            }
            None => self.surroundings.look_for_interrupts = false,
        }
    }

    /// Delivers the undelivered event; it stays if the delivery has to restart.
    fn deliver(&mut self) {
        let Some(event) = self.undelivered else {
            return;
        };
        if let Event::Exception(e) = event {
            self.surroundings.exits.exceptions += 1;
            if self.log_blocks {
                tracing::trace!(target: "exec", vcpu = self.surroundings.vcpu.index(), rip = format_args!("{:#x}", self.cpu.rip), ?e, "exception");
            }
        }
        let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.surroundings);
        match raise(&mut core, event) {
            Ok(Delivered::TripleFault) => {
                self.undelivered = None;
                self.cpu.activity = Activity::Shutdown;
            }
            Ok(Delivered::Handler) => self.undelivered = None,
            Ok(Delivered::Breakpoint(e)) => self.undelivered = Some(Event::Exception(e)),
            Err(_) => {
                self.surroundings.exits.restarts += 1;
                // Faults raise themselves again when their instruction is executed again.
                if let Event::Exception(e) = event
                    && e.is_fault()
                {
                    self.undelivered = None;
                }
            }
        }
    }

    fn execute(&mut self, cached: &CachedBlock) {
        if self.log_blocks {
            tracing::trace!(target: "exec", vcpu = self.surroundings.vcpu.index(), rip = format_args!("{:#x}", self.cpu.rip), rsp = format_args!("{:#x}", self.cpu.gpr[4]), rax = format_args!("{:#x}", self.cpu.gpr[0]), "block");
        }
        self.statistics.blocks += 1;
        let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.surroundings);
        let (turn, done) = if self.debugging {
            run_one(&mut core, &cached.block)
        } else {
            run(&mut core, &cached.block)
        };
        if done > 0 {
            self.passed_breakpoint = None;
            self.stepped |= self.stepping;
        }
        self.statistics.instructions += done;
        self.ended(turn);
    }
}
