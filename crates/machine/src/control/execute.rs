//! Carrying out commands.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use thiserror::Error;
use trapline_memory::watch::WatchEvent;

use super::command::Command;
use super::{Control, Live, State};
use crate::ending::End;
use crate::outcome::register_dump;
use crate::stop::StopReason;
use crate::watch::{WatchError, WatchSpec, event, shown, shown_sense};
use crate::{semantics, statistics};

/// How long VCPUs may take to stop or to report. They look at every instruction boundary.
const PATIENCE: Duration = Duration::from_secs(5);
/// Events that are handed out at once.
const MOST_EVENTS: usize = 4096;

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ControlError {
    #[error("no machine runs at the moment: it starts, resets or has ended; try again")]
    NoMachine,
    #[error("there is no watch '{0}'; see the list of watches")]
    NoWatch(String),
    #[error("VCPU {0} did not stop within 5 seconds and runs on; try again")]
    Late(usize),
    #[error("the guest does not listen to the power button; shut the machine down instead")]
    NobodyListens,
    #[error(transparent)]
    Watch(#[from] WatchError),
}

/// What an error says about the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It can never be carried out.
    Request,
    /// It names what does not exist.
    Missing,
    /// It cannot be carried out now.
    State,
}

impl ControlError {
    pub fn fault(&self) -> Fault {
        match self {
            Self::Watch(_) => Fault::Request,
            Self::NoWatch(_) => Fault::Missing,
            Self::NoMachine | Self::Late(_) | Self::NobodyListens => Fault::State,
        }
    }
}

/// The registers of one VCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    vcpu: usize,
    activity: String,
    rip: u64,
    text: String,
}

/// The answer to a command. As text ([`fmt::Display`]) it is for a person.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// It has been done, and there is nothing to say.
    Done,
    Value(Value),
    Registers(Vec<Registers>),
    Events {
        events: Vec<Arc<WatchEvent>>,
        /// Events that found no room since the last time.
        dropped: u64,
    },
}

impl Reply {
    /// The answer for a program; `None` if there is nothing to say.
    pub fn to_json(&self) -> Option<Value> {
        match self {
            Self::Done => None,
            Self::Value(value) => Some(value.clone()),
            Self::Registers(all) => Some(
                all.iter()
                    .map(|r| {
                        json!({
                            "vcpu": r.vcpu,
                            "activity": r.activity,
                            "rip": format!("{:#x}", r.rip),
                            "registers": r.text,
                        })
                    })
                    .collect(),
            ),
            Self::Events { events, dropped } => {
                let events: Vec<_> = events.iter().map(|e| event::Object::of(e)).collect();
                Some(json!({ "events": events, "dropped": dropped }))
            }
        }
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => Ok(()),
            Self::Value(value) => write!(f, "{value:#}"),
            Self::Registers(all) => {
                for (n, r) in all.iter().enumerate() {
                    let gap = if n > 0 { "\n" } else { "" };
                    write!(f, "{gap}VCPU {}, {}\n{}", r.vcpu, r.activity, r.text)?;
                }
                Ok(())
            }
            Self::Events { events, dropped } => {
                for event in events {
                    writeln!(f, "{}", event::line(event))?;
                }
                write!(f, "{} accesses, {dropped} more had no room", events.len())
            }
        }
    }
}

impl Live {
    fn ends(&self) -> bool {
        self.ending.is_announced() || self.vcpus.iter().any(|v| v.is_stopping())
    }

    /// Has all VCPUs stay at their next instruction boundary, and waits until they do.
    fn hold(&self) -> Result<(), ControlError> {
        for vcpu in &self.vcpus {
            vcpu.debug.hold();
            vcpu.debug();
        }
        let until = Instant::now() + PATIENCE;
        loop {
            let Some(late) = self.vcpus.iter().position(|v| !v.debug.is_stopped()) else {
                return Ok(());
            };
            let error = if self.ends() {
                ControlError::NoMachine
            } else if Instant::now() > until {
                ControlError::Late(late)
            } else {
                thread::sleep(Duration::from_micros(200));
                continue;
            };
            self.let_go();
            return Err(error);
        }
    }

    fn let_go(&self) {
        self.vcpus.iter().for_each(|v| v.debug.let_go());
    }

    fn registers(&self) -> Vec<Registers> {
        let look = |(vcpu, signals): (usize, &Arc<trapline_monitor::signals::Signals>)| {
            signals.debug.with_registers(|cpu| Registers {
                vcpu,
                activity: format!("{:?}", cpu.activity).to_lowercase(),
                rip: cpu.rip,
                text: register_dump(cpu),
            })
        };
        self.vcpus.iter().enumerate().filter_map(look).collect()
    }

    fn counters(&self) -> Value {
        let until = Instant::now() + PATIENCE;
        let left = || until.saturating_duration_since(Instant::now());
        let vcpus: Vec<_> = self.vcpus.iter().map(|v| v.statistics(left())).collect();
        let pool = self.pool.as_ref().map(|pool| pool.statistics());
        statistics::boot(&vcpus, &self.trace, &self.memory, pool)
    }

    fn semantics(&self) -> Value {
        let all = semantics::current(&self.trace);
        let all = all.map(|(kind, semantics)| (kind.to_string(), semantics.to_string().into()));
        Value::Object(Map::from_iter(all))
    }
}

fn watch(spec: &WatchSpec) -> Value {
    json!({
        "name": spec.name,
        "gpa": shown(&spec.range),
        "access": shown_sense(spec.sense),
        "vcpus": spec.vcpus.map(|set| set.iter().map(|v| v.index()).collect::<Vec<_>>()),
        "semantics": spec.semantics.map(|s| s.to_string()),
    })
}

impl Control {
    /// Carries out a command. Waits at most a few seconds; does no harm to the guest but what it
    /// is asked for.
    ///
    /// # Errors
    /// Why it was not carried out.
    pub fn execute(&self, command: Command) -> Result<Reply, ControlError> {
        if command == Command::Events {
            let (events, dropped) = self.queue().take(MOST_EVENTS);
            return Ok(Reply::Events { events, dropped });
        }
        let mut state = self.lock();
        match command {
            Command::AddWatch(spec) => {
                let name = self.add(&mut state, spec)?;
                return Ok(Reply::Value(json!({ "name": name })));
            }
            Command::RemoveWatch(name) => {
                return if self.drop_watch(&mut state, &name) {
                    Ok(Reply::Done)
                } else {
                    Err(ControlError::NoWatch(name))
                };
            }
            Command::ListWatches => {
                let watches = state.watches.iter().map(|w| watch(&w.spec));
                return Ok(Reply::Value(watches.collect()));
            }
            _ => {}
        }
        let State {
            machine,
            paused,
            semantics,
            vcpus,
            memory_bytes,
            ..
        } = &mut *state;
        let machine = machine.as_ref().filter(|machine| !machine.ends());
        let machine = machine.ok_or(ControlError::NoMachine)?;
        Ok(match command {
            Command::Info => Reply::Value(json!({
                "version": env!("CARGO_PKG_VERSION"),
                "state": if *paused { "paused" } else { "running" },
                "vcpus": vcpus,
                "memory_bytes": memory_bytes,
                "traces": machine.trace.region_count(),
            })),
            Command::Registers => {
                if !*paused {
                    machine.hold()?;
                }
                let registers = machine.registers();
                if !*paused {
                    machine.let_go();
                }
                Reply::Registers(registers)
            }
            Command::Pause => {
                if !*paused {
                    machine.hold()?;
                    *paused = true;
                }
                Reply::Done
            }
            Command::Resume => {
                machine.let_go();
                *paused = false;
                Reply::Done
            }
            Command::Shutdown => {
                machine.ending.announce(End::Stopped(StopReason::Control));
                Reply::Done
            }
            Command::Reboot => {
                machine.ending.announce(End::Reset);
                Reply::Done
            }
            Command::PowerButton => {
                if !(machine.press_power_button)() {
                    return Err(ControlError::NobodyListens);
                }
                Reply::Done
            }
            Command::Counters => Reply::Value(machine.counters()),
            Command::Traces => {
                let mut traces = statistics::traces(&machine.trace.totals());
                traces["regions"] = machine.trace.region_count().into();
                traces["semantics"] = machine.semantics();
                Reply::Value(traces)
            }
            Command::Semantics => Reply::Value(machine.semantics()),
            Command::SetSemantics(new) => {
                new.apply(&machine.trace);
                semantics.extend(new);
                Reply::Value(machine.semantics())
            }
            // Carried out above.
            Command::AddWatch(_)
            | Command::RemoveWatch(_)
            | Command::ListWatches
            | Command::Events => Reply::Done,
        })
    }
}
