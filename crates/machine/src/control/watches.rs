//! Setting and removing watches.

use trapline_memory::watch::Watch;
use trapline_monitor::surroundings::REPORT_ONLY;
use trapline_trace::{Kind, TraceId, TraceSystem, VcpuSet};

use super::{Control, State};
use crate::watch::{WatchError, WatchSpec};

/// A watch that is set.
pub struct SetWatch {
    pub spec: WatchSpec,
    number: u64,
    consumers: VcpuSet,
    /// While a machine is attached.
    trace: Option<TraceId>,
}

impl SetWatch {
    /// From when this returns, accesses by all VCPUs are sensed. Its VCPUs are the trace's
    /// consumers.
    pub fn establish(&mut self, trace: &TraceSystem) {
        let (range, sense) = (self.spec.range, self.spec.sense);
        let cookie = REPORT_ONLY | self.number;
        let established = trace.establish(
            None,
            self.consumers,
            range,
            Kind::Watch,
            sense,
            cookie,
            &mut |_| {},
        );
        // Only a VCPU has something to start again.
        if let Ok(id) = established {
            if let Some(semantics) = self.spec.semantics {
                trace.set_trace_semantics(id, semantics);
            }
            self.trace = Some(id);
        }
    }

    fn remove(&mut self, trace: &TraceSystem) {
        if let Some(id) = self.trace.take() {
            self.consumers
                .iter()
                .for_each(|vcpu| trace.remove(vcpu, id));
        }
    }

    /// The machine has gone, and the trace with it.
    pub fn forget(&mut self) {
        self.trace = None;
    }
}

impl Control {
    /// Sets a watch, also in the machine that runs. A name is chosen if it has none.
    pub(super) fn add(&self, state: &mut State, mut spec: WatchSpec) -> Result<String, WatchError> {
        let taken = |name: &str| state.watches.iter().any(|w| w.spec.name == name);
        spec.check(state.vcpus, state.memory_bytes)?;
        if spec.name.is_empty() {
            let free = (0..).map(|n| format!("w{n}")).find(|name| !taken(name));
            spec.name = free.unwrap_or_default();
        } else if taken(&spec.name) {
            return Err(WatchError::NameTaken(spec.name));
        }
        let consumers = spec.vcpus.unwrap_or(VcpuSet::first(state.vcpus));
        let number = state.next_watch;
        state.next_watch += 1;
        self.watches.add(Watch {
            number,
            name: spec.name.as_str().into(),
            range: spec.range,
            sense: spec.sense,
            vcpus: consumers,
        });
        let name = spec.name.clone();
        let mut watch = SetWatch {
            spec,
            number,
            consumers,
            trace: None,
        };
        if let Some(machine) = &state.machine {
            watch.establish(&machine.trace);
        }
        state.watches.push(watch);
        Ok(name)
    }

    /// Removes the watch with this name; whether there was one.
    pub(super) fn drop_watch(&self, state: &mut State, name: &str) -> bool {
        let Some(at) = state.watches.iter().position(|w| w.spec.name == name) else {
            return false;
        };
        let mut watch = state.watches.remove(at);
        if let Some(machine) = &state.machine {
            watch.remove(&machine.trace);
        }
        self.watches.remove(watch.number);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MachineConfig;
    use crate::control::Live;
    use std::sync::Arc;
    use trapline_memory::GuestMemory;
    use trapline_trace::Actor;

    /// A machine's memory and traces, watched by `control`.
    fn machine(control: &Control) -> (Arc<GuestMemory>, Arc<TraceSystem>) {
        let memory = GuestMemory::new(16 << 20).unwrap();
        let memory = Arc::new(memory.watched_by(Arc::clone(control.watches())));
        let trace = Arc::new(TraceSystem::new(2, Arc::clone(&memory) as _));
        (memory, trace)
    }

    fn live(memory: &Arc<GuestMemory>, trace: &Arc<TraceSystem>) -> Live {
        Live {
            trace: Arc::clone(trace),
            vcpus: Vec::new(),
            ending: Arc::default(),
            memory: Arc::clone(memory),
            pool: None,
            press_power_button: Box::new(|| false),
        }
    }

    fn events(control: &Control) -> Vec<String> {
        let (events, _) = control.queue().take(100);
        events.iter().map(|e| e.watch.to_string()).collect()
    }

    #[test]
    fn watches_outlive_a_reset_and_end_when_removed() {
        let control = Control::default();
        let mut config = MachineConfig::new("k");
        config.vcpus = 2;
        config.memory_bytes = 16 << 20;
        config.watches = vec!["gpa=0x1000-0x1001".parse().unwrap()];
        control.configure(&config).unwrap();
        for _ in 0..2 {
            let (memory, trace) = machine(&control);
            let attached = control.attach(live(&memory, &trace));
            assert!(memory.write(&trace, Actor::Device, 0x1000, &[1]));
            assert_eq!(events(&control), ["w0"]);
            drop(attached);
        }
        let (memory, trace) = machine(&control);
        let _attached = control.attach(live(&memory, &trace));
        assert!(control.remove_watch("w0"));
        assert!(!control.remove_watch("w0"));
        let spec = "gpa=0x1000-0x1002,name=x".parse::<WatchSpec>().unwrap();
        assert_eq!(control.add_watch(spec.clone()), Ok("x".into()));
        let taken = WatchError::NameTaken("x".into());
        assert_eq!(control.add_watch(spec), Err(taken));
        let spec = "gpa=0x2000-0x2002,semantics=bracketing".parse().unwrap();
        assert_eq!(control.add_watch(spec), Ok("w0".into()));
        assert_eq!(trace.region_count(), 2);
        assert!(memory.write(&trace, Actor::Device, 0xfff, &[1; 0x1002]));
        assert_eq!(events(&control), ["x", "w0"]);
        assert!(control.remove_watch("x"));
        assert_eq!(trace.region_count(), 1);
    }
}
