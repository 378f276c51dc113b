//! How a debugger stops a VCPU, looks at it and lets it go on, and how the machine is paused.
//!
//! Each VCPU has a [`DebugPort`]. The debugger asks it to stop; the VCPU's thread does so at its
//! next instruction boundary, lends its registers to the port and waits. A VCPU also stops by
//! itself at a breakpoint or behind an access that a watchpoint covers.
//!
//! Whoever pauses the machine *holds* its VCPUs in the same place. Debugger and holder do not know
//! of each other: a VCPU goes on when neither wants it to stay.
//!
//! # Locks
//! A port's mutex is a leaf; nothing is called under it. The breakpoints' lock is a leaf too.
//! While stopped the VCPU counts as being at an instruction boundary, so nobody waits for it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use trapline_x86::CpuState;

/// Why a VCPU is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// The debugger asked.
    Asked,
    /// It has executed the one instruction that it was to.
    Stepped,
    /// It is about to execute the instruction at a breakpoint.
    Breakpoint,
    /// It has accessed the bytes of the watchpoint with this number.
    Watchpoint(u64),
    /// It is held, and the debugger does not want it.
    Held,
}

/// How a stopped VCPU goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    Continue,
    /// One instruction.
    Step,
}

#[derive(Default)]
struct State {
    /// The debugger wants the VCPU stopped.
    wanted: bool,
    /// The machine is paused.
    held: bool,
    stopped: Option<(StopCause, Box<CpuState>)>,
    resume: Option<Resume>,
    /// The debugger has seen the present stop.
    reported: bool,
}

/// The debugger's access to one VCPU.
#[derive(Default)]
pub struct DebugPort {
    state: Mutex<State>,
    changed: Condvar,
}

impl DebugPort {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Debugger's side: the VCPU is to stop. The caller raises its attention word afterwards.
    pub fn want_stop(&self) {
        self.lock().wanted = true;
    }

    /// Holder's side: the VCPU is to stay at its next instruction boundary. The caller raises its
    /// attention word afterwards.
    pub fn hold(&self) {
        self.lock().held = true;
    }

    /// Holder's side: the VCPU may go on unless the debugger wants it.
    pub fn let_go(&self) {
        self.lock().held = false;
        self.changed.notify_all();
    }

    /// Debugger's side: whether the VCPU is stopped.
    pub fn is_stopped(&self) -> bool {
        self.lock().stopped.is_some()
    }

    /// Debugger's side: the cause of a stop that has not been reported yet.
    pub fn take_stop(&self) -> Option<StopCause> {
        let mut state = self.lock();
        if state.reported {
            return None;
        }
        let cause = state.stopped.as_ref().map(|(cause, _)| *cause);
        let cause = cause.filter(|cause| *cause != StopCause::Held);
        state.reported = cause.is_some();
        cause
    }

    /// Debugger's side: looks at or changes the registers of a stopped VCPU.
    pub fn with_registers<R>(&self, look: impl FnOnce(&mut CpuState) -> R) -> Option<R> {
        self.lock().stopped.as_mut().map(|(_, cpu)| look(cpu))
    }

    /// Debugger's side: lets the VCPU go on.
    pub fn resume(&self, how: Resume) {
        let mut state = self.lock();
        state.wanted = false;
        if state.stopped.is_some() {
            state.resume = Some(how);
            self.changed.notify_all();
        }
    }

    /// VCPU's side: why it has to stop, if it has.
    pub fn wanted(&self) -> Option<StopCause> {
        let state = self.lock();
        match (state.wanted, state.held) {
            (true, _) => Some(StopCause::Asked),
            (false, true) => Some(StopCause::Held),
            (false, false) => None,
        }
    }

    /// VCPU's side: lends its registers and waits; how the debugger lets it go on, if it had a
    /// say. `give_up` is looked at now and then: the machine ends.
    pub fn stop(
        &self,
        cause: StopCause,
        cpu: &mut CpuState,
        give_up: &dyn Fn() -> bool,
    ) -> Option<Resume> {
        const LOOK: std::time::Duration = std::time::Duration::from_millis(50);
        let mut state = self.lock();
        state.stopped = Some((cause, Box::new(cpu.clone())));
        state.resume = None;
        state.reported = false;
        let how = loop {
            if !state.held {
                if state.resume.is_some() {
                    break state.resume.take();
                }
                if cause == StopCause::Held && !state.wanted {
                    break None;
                }
            }
            if give_up() {
                break None;
            }
            state = self
                .changed
                .wait_timeout(state, LOOK)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        if let Some((_, lent)) = state.stopped.take() {
            *cpu = *lent;
        }
        how
    }
}

/// The debugger's breakpoints, by linear address, for all VCPUs of a machine.
#[derive(Default)]
pub struct Breakpoints {
    armed: AtomicBool,
    addresses: RwLock<HashSet<u64>>,
}

impl Breakpoints {
    /// Whether there is any: one relaxed load. A VCPU that sees it late stops late, and the
    /// debugger arms breakpoints only while all VCPUs are stopped.
    #[inline]
    pub fn armed(&self) -> bool {
        self.armed.load(Ordering::Relaxed)
    }

    pub fn contains(&self, linear: u64) -> bool {
        self.addresses
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&linear)
    }

    pub fn add(&self, linear: u64) {
        let mut all = self
            .addresses
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        all.insert(linear);
        self.armed.store(true, Ordering::Release);
    }

    /// Whether there was one at this address.
    pub fn remove(&self, linear: u64) -> bool {
        let mut all = self
            .addresses
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let had = all.remove(&linear);
        self.armed.store(!all.is_empty(), Ordering::Release);
        had
    }

    pub fn clear(&self) {
        let mut all = self
            .addresses
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        all.clear();
        self.armed.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_stopped_vcpu_takes_over_the_debuggers_registers() {
        let port = Arc::new(DebugPort::default());
        let vcpu = {
            let port = Arc::clone(&port);
            std::thread::spawn(move || {
                let mut cpu = CpuState::reset();
                let how = port.stop(StopCause::Asked, &mut cpu, &|| false);
                (how, cpu.rip)
            })
        };
        while !port.is_stopped() {
            std::thread::yield_now();
        }
        assert_eq!(port.take_stop(), Some(StopCause::Asked));
        assert_eq!(port.take_stop(), None);
        port.with_registers(|cpu| cpu.rip = 0x1234);
        port.resume(Resume::Step);
        assert_eq!(vcpu.join().unwrap(), (Some(Resume::Step), 0x1234));
        assert!(port.with_registers(|_| ()).is_none());
    }

    /// A VCPU that stops for `cause`, when it is there.
    fn stopping(
        port: &Arc<DebugPort>,
        cause: StopCause,
    ) -> std::thread::JoinHandle<Option<Resume>> {
        let waiting = Arc::clone(port);
        let stop = move || waiting.stop(cause, &mut CpuState::reset(), &|| false);
        let vcpu = std::thread::spawn(stop);
        while !port.is_stopped() {
            std::thread::yield_now();
        }
        vcpu
    }

    #[test]
    fn a_held_vcpu_goes_on_without_the_debugger() {
        let port = Arc::new(DebugPort::default());
        port.hold();
        assert_eq!(port.wanted(), Some(StopCause::Held));
        let vcpu = stopping(&port, StopCause::Held);
        assert_eq!(port.take_stop(), None);
        port.let_go();
        assert_eq!(vcpu.join().unwrap(), None);
        assert_eq!(port.wanted(), None);
    }

    #[test]
    fn debugger_and_holder_wait_for_each_other() {
        // Let go first, then resumed.
        let port = Arc::new(DebugPort::default());
        port.hold();
        let vcpu = stopping(&port, StopCause::Held);
        port.want_stop();
        port.let_go();
        assert!(port.is_stopped());
        port.resume(Resume::Step);
        assert_eq!(vcpu.join().unwrap(), Some(Resume::Step));
        // Resumed first, then let go.
        let vcpu = stopping(&port, StopCause::Breakpoint);
        port.hold();
        port.resume(Resume::Continue);
        assert!(port.is_stopped());
        port.let_go();
        assert_eq!(vcpu.join().unwrap(), Some(Resume::Continue));
    }

    #[test]
    fn breakpoints_arm_and_disarm() {
        let breakpoints = Breakpoints::default();
        assert!(!breakpoints.armed());
        breakpoints.add(5);
        assert!(breakpoints.armed() && breakpoints.contains(5) && !breakpoints.contains(6));
        assert!(breakpoints.remove(5));
        assert!(!breakpoints.remove(5));
        assert!(!breakpoints.armed());
    }
}
