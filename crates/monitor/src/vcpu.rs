//! The run loop of one VCPU.
//!
//! One turn of the loop is: look at the attention word (traces, interrupts, events, stop), deliver
//! what is due, find the block at RIP, execute it. Everything between two turns is an instruction
//! boundary.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use trapline_engine::access::{Core, Fault};
use trapline_engine::decode::{DecodeEnd, Features, decode};
use trapline_engine::env::{Backing, Environment};
use trapline_engine::native::{NativeCode, NativeError, ThunkError};
use trapline_engine::step::events::{Delivered, Event, raise};
use trapline_engine::step::run::{Turn, run, run_one};
use trapline_engine::tlb::{Access, Privilege, Tlb};
use trapline_trace::{Kind, Range, Sense, VcpuSet};
use trapline_x86::state::{Activity, InterruptShadow};
use trapline_x86::{CpuState, Exception, Mode};

use crate::code_cache::{CachedBlock, Key};
use crate::debug::{Resume, StopCause};
use crate::signals::{Signals, attention};
use crate::statistics::VcpuStatistics;
use crate::surroundings::Surroundings;

const PAGE: u64 = 4096;

/// Why a VCPU stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was asked to.
    Stopped,
    /// A triple fault: the registers are those at the last fault.
    TripleFault,
}

/// The sub-VMM of one VCPU.
pub struct Vcpu {
    pub cpu: Box<CpuState>,
    tlb: Tlb,
    native: NativeCode,
    features: Features,
    surroundings: Surroundings,
    signals: Arc<Signals>,
    bootstrap: bool,
    /// An event that has been taken from its source but not yet delivered.
    undelivered: Option<Event>,
    nmi_pending: bool,
    statistics: VcpuStatistics,
    /// A debugger has breakpoints, steps or waits: instructions run singly.
    debugging: bool,
    stepping: bool,
    stepped: bool,
    /// The breakpoint here has been reported: the next instruction runs.
    passed_breakpoint: Option<u64>,
    /// Whether every block is logged.
    log_blocks: bool,
}

/// What a fetch gives.
enum Fetched {
    Block(Rc<CachedBlock>),
    Fault(Fault),
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
    ) -> Result<Self, NativeError> {
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
            debugging: false,
            stepping: false,
            stepped: false,
            passed_breakpoint: None,
            log_blocks: tracing::enabled!(target: "exec", tracing::Level::TRACE),
        })
    }

    /// Totals so far.
    pub fn statistics(&self) -> VcpuStatistics {
        VcpuStatistics {
            tlb_fills: self.tlb.fills,
            code: self.surroundings.code.statistics,
            exits: self.surroundings.exits,
            ..self.statistics
        }
    }

    /// Runs until stopped or crashed.
    pub fn run(&mut self) -> Exit {
        let vcpu = self.surroundings.vcpu;
        let trace = Arc::clone(&self.surroundings.trace);
        trace.leave_safe(vcpu);
        self.surroundings.boundary(&mut self.tlb);
        let start = Instant::now();
        let exit = self.turns();
        trace.enter_safe(vcpu);
        self.statistics.running_ns =
            (start.elapsed().as_nanos() as u64).saturating_sub(self.statistics.halted_ns);
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
                self.stop_for_debugger();
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
            match self.fetch() {
                Fetched::Block(block) => self.execute(&block),
                Fetched::Fault(Fault::Restart) => self.surroundings.exits.restarts += 1,
                Fetched::Fault(Fault::Exception(e)) => self.undelivered = Some(Event::Exception(e)),
            }
        }
    }

    /// Looks at what the attention word announces; whether to stop.
    #[cold]
    fn attend(&mut self) -> bool {
        let s = &mut self.surroundings;
        let taken = s
            .trace
            .attention(s.vcpu)
            .take(attention::INTERRUPT | attention::EVENT | attention::STOP | attention::DEBUG);
        s.boundary(&mut self.tlb);
        if s.code.has_released() {
            s.remove_released();
        }
        if taken & attention::STOP != 0 {
            return true;
        }
        if taken & attention::DEBUG != 0 {
            self.debugging = true;
        }
        if taken & attention::INTERRUPT != 0 {
            s.look_for_interrupts = true;
        }
        if taken & attention::EVENT != 0 {
            let events = self.signals.take();
            self.nmi_pending |= events.nmi;
            if events.init {
                self.undelivered = None;
                self.nmi_pending = false;
                self.surroundings.apic.init();
                self.cpu.init(self.bootstrap);
                self.tlb.flush_all();
            }
            if let Some(vector) = events.startup
                && self.cpu.activity == Activity::WaitForSipi
            {
                tracing::debug!(target: "vcpu", vcpu = self.surroundings.vcpu.index(), vector, "starts");
                self.cpu.startup(vector);
                self.tlb.flush_all();
            }
        }
        false
    }

    /// Stops for the debugger if it wants so, at a breakpoint, behind a step or a watchpoint.
    #[cold]
    fn stop_for_debugger(&mut self) {
        let breakpoints = Arc::clone(&self.signals.breakpoints);
        let linear = if self.cpu.mode() == Mode::Long64 {
            self.cpu.rip
        } else {
            self.cpu.cs().base.wrapping_add(self.cpu.rip) & 0xffff_ffff
        };
        let cause = if let Some(number) = self.surroundings.watchpoint_hit.take() {
            StopCause::Watchpoint(number)
        } else if self.signals.debug.is_wanted() {
            StopCause::Asked
        } else if self.stepped {
            StopCause::Stepped
        } else if self.passed_breakpoint != Some(linear)
            && self.cpu.activity == Activity::Active
            && breakpoints.contains(linear)
        {
            StopCause::Breakpoint
        } else {
            self.debugging = breakpoints.armed() || self.stepping;
            return;
        };
        let s = &mut self.surroundings;
        s.trace.enter_safe(s.vcpu);
        let signals = Arc::clone(&self.signals);
        let how = signals
            .debug
            .stop(cause, &mut self.cpu, &|| signals.is_stopping());
        s.trace.leave_safe(s.vcpu);
        // What was written meanwhile, by the debugger too, is applied before the next instruction.
        s.boundary(&mut self.tlb);
        // The debugger may have changed what translations and blocks were chosen by.
        self.tlb.flush_all();
        self.stepping = how == Resume::Step;
        self.stepped = false;
        self.passed_breakpoint = Some(linear);
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
        self.statistics.halted_ns += start.elapsed().as_nanos() as u64;
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
            Ok(_) => self.undelivered = None,
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
        match turn {
            Turn::Continue | Turn::Stopped => {}
            Turn::Exception(e) => self.undelivered = Some(Event::Exception(e)),
            Turn::Restart => self.surroundings.exits.restarts += 1,
        }
    }

    /// Mode and privilege as one byte: what a block's validity at a linear address depends on
    /// besides the translation.
    #[inline]
    fn context(&self) -> u8 {
        self.cpu.mode() as u8 | u8::from(self.cpu.cpl() == 3) << 7
    }

    #[inline]
    fn fetch(&mut self) -> Fetched {
        let context = self.context();
        let mode = self.cpu.mode();
        let linear = if mode == Mode::Long64 {
            self.cpu.rip
        } else {
            self.cpu.cs().base.wrapping_add(self.cpu.rip) & 0xffff_ffff
        };
        // Flat segments make offset and linear address the same; for others the base belongs to
        // what the jump cache must compare, so it is keyed by the linear address.
        if let Some(block) = self
            .surroundings
            .code
            .jump(linear, self.tlb.epoch(), context)
            && block.block.rip == self.cpu.rip
        {
            return Fetched::Block(block);
        }
        match self.fetch_slow(mode, linear) {
            Ok(block) => {
                let epoch = self.tlb.epoch();
                if block.second.is_none() && mode == Mode::Long64 {
                    self.surroundings
                        .code
                        .remember(linear, epoch, context, &block);
                }
                Fetched::Block(block)
            }
            Err(fault) => Fetched::Fault(fault),
        }
    }

    /// Translates the fetch of one byte: its guest-physical address and, for RAM, its host address.
    fn translate_fetch(&mut self, linear: u64) -> Result<(u64, bool), Fault> {
        let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.surroundings);
        let privilege = Privilege::of_fetch(core.cpu);
        let translation = core.translate(linear, privilege, Access::Fetch)?;
        let ram = !matches!(translation.backing, Backing::Device);
        Ok((translation.gpa, ram))
    }

    fn fetch_slow(&mut self, mode: Mode, linear: u64) -> Result<Rc<CachedBlock>, Fault> {
        let rip = self.cpu.rip;
        if mode == Mode::Long64 {
            if !CpuState::is_canonical(linear) {
                return Err(Exception::general_protection(0).into());
            }
        } else if rip > u64::from(self.cpu.cs().limit) {
            return Err(Exception::general_protection(0).into());
        }
        let (gpa, ram) = self.translate_fetch(linear)?;
        let key = Key { gpa, rip, mode };
        if let Some(block) = self.surroundings.code.get(&key) {
            let block = Rc::clone(block);
            match block.second {
                None => return Ok(block),
                Some(second) => {
                    let next = self.next_page(mode, linear);
                    let (second_gpa, _) = self.translate_fetch(next)?;
                    if second_gpa == second.lo {
                        return Ok(block);
                    }
                }
            }
        }
        self.decode(key, linear, ram)
    }

    fn next_page(&self, mode: Mode, linear: u64) -> u64 {
        let next = (linear & !(PAGE - 1)).wrapping_add(PAGE);
        if mode == Mode::Long64 {
            next
        } else {
            next & 0xffff_ffff
        }
    }

    /// Decodes the block at `key`: protects its bytes with a trace, then reads them.
    fn decode(&mut self, key: Key, linear: u64, ram: bool) -> Result<Rc<CachedBlock>, Fault> {
        if self.surroundings.code.is_full() {
            self.drop_code();
        }
        if self.surroundings.code.has_many_released() {
            self.surroundings.remove_released();
        }
        let room = (PAGE - (linear & (PAGE - 1))) as usize;
        let mut bytes = [0xff; PAGE as usize + 16];
        let read = |s: &Surroundings, gpa: u64, into: &mut [u8]| {
            // A hole reads as ones.
            if !s.memory.read(gpa, into) {
                into.fill(0xff);
            }
        };
        loop {
            // The first reading only tells how long the block is.
            let first_len = room.min(256);
            read(&self.surroundings, key.gpa, &mut bytes[..first_len]);
            let mut second_gpa = None;
            let mut end = self.try_decode(&bytes[..first_len], key)?;
            let mut second_len = 0;
            if matches!(end, DecodeEnd::NeedMoreBytes) {
                if self.code_left(key) < first_len as u64 {
                    // It crosses the segment's limit.
                    return Err(Exception::general_protection(0).into());
                }
                let next = self.next_page(key.mode, linear);
                let (gpa, _) = self.translate_fetch(next)?;
                second_gpa = Some(gpa);
                read(
                    &self.surroundings,
                    gpa,
                    &mut bytes[first_len..first_len + 15],
                );
                end = self.try_decode(&bytes[..first_len + 15], key)?;
            }
            let DecodeEnd::Block(mut block) = end else {
                return Err(Exception::general_protection(0).into());
            };
            if let Some(_gpa) = second_gpa {
                // Only the crossing instruction: what follows it lies on the other page.
                block.truncate_to_first();
                second_len = (block.len as usize).saturating_sub(first_len);
            }
            let used_first = (block.len as usize).min(first_len);
            let first = Range {
                lo: key.gpa,
                hi: key.gpa + used_first as u64,
            };
            let second = second_gpa.map(|gpa| Range {
                lo: gpa,
                hi: gpa + second_len.max(1) as u64,
            });
            if !ram {
                // Nothing can change in a hole; device registers are not executed from twice.
                return Ok(Rc::new(CachedBlock::new(
                    block,
                    first,
                    second,
                    [None, None],
                )));
            }
            // Protect, then read.
            let mut traces = [self.establish(first)?, None];
            if let Some(second) = second {
                match self.establish(second) {
                    Ok(id) => traces[1] = id,
                    Err(fault) => {
                        self.release(traces);
                        return Err(fault);
                    }
                }
            }
            let mut now = [0xff; PAGE as usize + 16];
            read(&self.surroundings, first.lo, &mut now[..used_first]);
            if let Some(second) = second {
                let len = (second.hi - second.lo) as usize;
                read(
                    &self.surroundings,
                    second.lo,
                    &mut now[used_first..used_first + len],
                );
            }
            let len = block.len as usize;
            if now[..len] == bytes[..len] {
                let cached = CachedBlock::new(block, first, second, traces);
                return Ok(self.surroundings.code.insert(key, cached));
            }
            self.release(traces);
        }
    }

    /// Bytes from the block's start to the end of the code segment.
    fn code_left(&self, key: Key) -> u64 {
        if key.mode == Mode::Long64 {
            return u64::MAX;
        }
        u64::from(self.cpu.cs().limit)
            .saturating_sub(key.rip)
            .saturating_add(1)
    }

    fn try_decode(&mut self, bytes: &[u8], key: Key) -> Result<DecodeEnd, Fault> {
        let left = usize::try_from(self.code_left(key)).unwrap_or(usize::MAX);
        let bytes = &bytes[..bytes.len().min(left)];
        loop {
            match decode(bytes, key.rip, key.mode, &self.features, &mut self.native) {
                Ok(end) => return Ok(end),
                Err(ThunkError::Full) => self.drop_code(),
                Err(ThunkError::Unsupported) => return Err(Exception::invalid_opcode().into()),
            }
        }
    }

    /// Drops all decoded code, so that its thunks can go too.
    fn drop_code(&mut self) {
        self.surroundings.code.clear();
        self.surroundings.remove_released();
        self.native.reset();
        self.tlb.bump_epoch();
    }

    fn establish(&mut self, range: Range) -> Result<Option<trapline_trace::TraceId>, Fault> {
        let s = &mut self.surroundings;
        let (code, memory, vcpu, tlb) = (&mut s.code, &*s.memory, s.vcpu, &mut self.tlb);
        s.trace
            .establish(
                Some(vcpu),
                VcpuSet::one(vcpu),
                range,
                Kind::Code,
                Sense::WRITE,
                0,
                &mut |notice| Surroundings::apply(code, memory, vcpu, tlb, &notice),
            )
            .map(|id| {
                code.use_trace(id);
                Some(id)
            })
            .map_err(|_| Fault::Restart)
    }

    fn release(&mut self, traces: [Option<trapline_trace::TraceId>; 2]) {
        for id in traces.into_iter().flatten() {
            self.surroundings.code.release_trace(id);
        }
    }
}
