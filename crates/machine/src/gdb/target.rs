//! The machine as gdb's target: all VCPUs stop together and go on together.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints as GdbBreakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint,
    HwWatchpointOps, SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use trapline_memory::GuestMemory;
use trapline_monitor::debug::{Breakpoints, Resume, StopCause};
use trapline_monitor::signals::Signals;
use trapline_trace::{Kind, Range, Sense, TraceId, TraceSystem, VcpuId, VcpuSet};

use super::{memory, registers};

/// The machine's end: there is nothing left to debug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine has ended")]
pub struct Ended;

struct Watchpoint {
    linear: u64,
    len: u64,
    kind: WatchKind,
    traces: Vec<TraceId>,
}

/// A debugger's view of a machine.
pub struct Debugger {
    vcpus: Vec<Arc<Signals>>,
    breakpoints: Arc<Breakpoints>,
    memory: Arc<GuestMemory>,
    trace: Arc<TraceSystem>,
    watchpoints: HashMap<u64, Watchpoint>,
    next_watchpoint: u64,
    actions: HashMap<usize, Resume>,
    /// VCPUs without an action of their own stay stopped.
    others_stay: bool,
}

/// What made the target stop.
#[derive(Clone, Copy, Debug)]
pub struct Stopped {
    pub vcpu: usize,
    pub cause: StopCause,
}

impl Debugger {
    pub fn new(
        vcpus: Vec<Arc<Signals>>,
        breakpoints: Arc<Breakpoints>,
        memory: Arc<GuestMemory>,
        trace: Arc<TraceSystem>,
    ) -> Self {
        Self {
            vcpus,
            breakpoints,
            memory,
            trace,
            watchpoints: HashMap::new(),
            next_watchpoint: 0,
            actions: HashMap::new(),
            others_stay: false,
        }
    }

    fn vcpu(&self, tid: Tid) -> Option<&Arc<Signals>> {
        self.vcpus.get(tid.get() - 1)
    }

    /// The thread of a VCPU: gdb counts from 1.
    pub fn tid(vcpu: usize) -> Tid {
        NonZeroUsize::MIN.saturating_add(vcpu)
    }

    /// Whether the machine is being stopped for good.
    pub fn has_ended(&self) -> bool {
        self.vcpus.iter().any(|v| v.is_stopping())
    }

    /// Stops all VCPUs and waits until they are.
    pub fn stop_all(&self) -> Result<(), Ended> {
        for vcpu in &self.vcpus {
            vcpu.debug.want_stop();
            vcpu.debug();
        }
        while !self.vcpus.iter().all(|v| v.debug.is_stopped()) {
            if self.has_ended() {
                return Err(Ended);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// A VCPU that has stopped by itself, if any.
    pub fn stopped(&self) -> Option<Stopped> {
        self.vcpus.iter().enumerate().find_map(|(vcpu, signals)| {
            let cause = signals.debug.take_stop()?;
            (cause != StopCause::Asked).then_some(Stopped { vcpu, cause })
        })
    }

    /// The linear address and the kind of the watchpoint with this number.
    pub fn watchpoint(&self, number: u64) -> Option<(u64, WatchKind)> {
        self.watchpoints.get(&number).map(|w| (w.linear, w.kind))
    }

    /// The client has gone: nothing of it stays behind, and all VCPUs go on.
    pub fn detach(&mut self) {
        self.breakpoints.clear();
        for watchpoint in std::mem::take(&mut self.watchpoints).into_values() {
            self.remove(&watchpoint);
        }
        for vcpu in &self.vcpus {
            vcpu.debug.resume(Resume::Continue);
        }
    }

    fn remove(&self, watchpoint: &Watchpoint) {
        for id in &watchpoint.traces {
            for n in 0..self.vcpus.len() {
                self.trace.remove(VcpuId::new(n), *id);
            }
        }
    }

    fn resume_all(&mut self) {
        for (n, vcpu) in self.vcpus.iter().enumerate() {
            let action = match self.actions.get(&n) {
                None if self.others_stay => continue,
                action => action.copied().unwrap_or(Resume::Continue),
            };
            // Breakpoints may have changed: each looks before its next instruction.
            vcpu.debug();
            vcpu.debug.resume(action);
        }
    }
}

impl Target for Debugger {
    type Arch = X86_64_SSE;
    type Error = Ended;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }
    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debugger {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid).ok_or(TargetError::NonFatal)?;
        vcpu.debug
            .with_registers(|cpu| registers::read(cpu, regs))
            .ok_or(TargetError::NonFatal)
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid).ok_or(TargetError::NonFatal)?;
        vcpu.debug
            .with_registers(|cpu| registers::write(regs, cpu))
            .ok_or(TargetError::NonFatal)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let vcpu = self.vcpu(tid).ok_or(TargetError::NonFatal)?;
        let done = vcpu
            .debug
            .with_registers(|cpu| memory::read(cpu, &self.memory, start, data));
        match done {
            Some(0) | None => Err(TargetError::NonFatal),
            Some(done) => Ok(done),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid).ok_or(TargetError::NonFatal)?;
        let good = vcpu
            .debug
            .with_registers(|cpu| memory::write(cpu, &self.memory, &self.trace, start, data));
        if good == Some(true) {
            Ok(())
        } else {
            Err(TargetError::NonFatal)
        }
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), Ended> {
        (0..self.vcpus.len()).for_each(|n| active(Self::tid(n)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Debugger {
    fn resume(&mut self) -> Result<(), Ended> {
        self.resume_all();
        Ok(())
    }
    fn clear_resume_actions(&mut self) -> Result<(), Ended> {
        self.actions.clear();
        self.others_stay = false;
        Ok(())
    }
    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Ended> {
        self.actions.insert(tid.get() - 1, Resume::Continue);
        Ok(())
    }
    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSchedulerLocking for Debugger {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Ended> {
        self.others_stay = true;
        Ok(())
    }
}

impl MultiThreadSingleStep for Debugger {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Ended> {
        self.actions.insert(tid.get() - 1, Resume::Step);
        Ok(())
    }
}

impl GdbBreakpoints for Debugger {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }
    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Debugger {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.breakpoints.add(address);
        Ok(true)
    }
    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove(address))
    }
}

impl HwBreakpoint for Debugger {
    fn add_hw_breakpoint(&mut self, address: u64, kind: usize) -> TargetResult<bool, Self> {
        self.add_sw_breakpoint(address, kind)
    }
    fn remove_hw_breakpoint(&mut self, address: u64, kind: usize) -> TargetResult<bool, Self> {
        self.remove_sw_breakpoint(address, kind)
    }
}

impl HwWatchpoint for Debugger {
    /// The watched bytes are those that are mapped there now, on the first stopped VCPU that maps
    /// all of them.
    fn add_hw_watchpoint(
        &mut self,
        linear: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let Some(end) = linear.checked_add(len).filter(|_| len > 0) else {
            return Ok(false);
        };
        let ranges = self.vcpus.iter().find_map(|vcpu| {
            vcpu.debug.with_registers(|cpu| {
                let mut ranges = Vec::new();
                let mut at = linear;
                while at < end {
                    let next = ((at | 0xfff) + 1).min(end);
                    let gpa = memory::physical(cpu, &self.memory, at)?;
                    ranges.push(Range::new(gpa, gpa + (next - at)));
                    at = next;
                }
                Some(ranges)
            })?
        });
        let Some(ranges) = ranges else {
            return Ok(false);
        };
        let sense = match kind {
            WatchKind::Write => Sense::WRITE,
            WatchKind::Read => Sense::READ,
            WatchKind::ReadWrite => Sense::BOTH,
        };
        let number = self.next_watchpoint;
        self.next_watchpoint += 1;
        let all = VcpuSet::first(self.vcpus.len());
        let traces = ranges
            .into_iter()
            .filter_map(|range| {
                let watch = Kind::Watch;
                self.trace
                    .establish(None, all, range, watch, sense, number, &mut |_| {})
                    .ok()
            })
            .collect();
        self.watchpoints.insert(
            number,
            Watchpoint {
                linear,
                len,
                kind,
                traces,
            },
        );
        Ok(true)
    }

    fn remove_hw_watchpoint(
        &mut self,
        linear: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let found = self
            .watchpoints
            .iter()
            .find(|(_, w)| w.linear == linear && w.len == len && w.kind == kind)
            .map(|(number, _)| *number);
        let Some(watchpoint) = found.and_then(|number| self.watchpoints.remove(&number)) else {
            return Ok(false);
        };
        self.remove(&watchpoint);
        Ok(true)
    }
}
