//! Builds a machine, starts its sub-VMMs, waits for its end, and builds it again on a reset.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use trapline_devices::acpi::{TablesConfig, build_tables};
use trapline_devices::chipset::{Chipset, ChipsetConfig};
use trapline_devices::clock::HostClock;
use trapline_devices::dma::DmaPort;
use trapline_devices::serial::SerialInput;
use trapline_memory::GuestMemory;
use trapline_monitor::CodeObserver;
use trapline_monitor::clock::{Pace, host_tsc};
use trapline_monitor::debug::Breakpoints;
use trapline_monitor::interrupt::VcpuSignals;
use trapline_monitor::signals::Signals;
use trapline_monitor::surroundings::Surroundings;
use trapline_monitor::vcpu::Execution;
use trapline_trace::{Kind, Range, Sense, TraceSystem, VcpuId, VcpuSet};
use trapline_x86::CpuState;
use trapline_x86::cpuid::{CpuidConfig, CpuidModel};
use vm_memory::{Bytes, GuestAddress};

use crate::config::{ConfigError, Device, EngineKind, MachineConfig, TraceNotify};
use crate::console::Console;
use crate::control::{Control, Live};
use crate::ending::{End, Ending};
use crate::events::EventLog;
use crate::gdb::{Debugger, GdbServer};
use crate::jitdump::JitDump;
use crate::load::{self, LoadRequest};
use crate::outcome::{MachineError, Outcome};
use crate::platform::Buses;
use crate::seccomp;
use crate::sharing::PageSharing;
use crate::statistics::Report;
use crate::stop::StopHandle;
use crate::vcpu_thread::VcpuThread;
use crate::watch::WatchLog;

/// Where the ACPI tables lie: in the area that firmware owns on a PC.
const ACPI_BASE: u64 = 0xe_0000;
/// Guest RAM below this address is in one piece; the rest starts at 4 GiB.
const LOW_RAM_END: u64 = 3 << 30;
/// IA32_MTRR_DEF_TYPE as firmware leaves it: enabled, all memory write-back. A reset leaves the
/// MTRRs disabled, and then systems do without the PAT.
const FIRMWARE_MTRR_DEF_TYPE: u64 = 1 << 11 | 6;
/// How long console input that the guest does not take is kept waiting between two tries.
const INPUT_RETRY: Duration = Duration::from_millis(5);

/// Builds the machine and runs it to its end. A reset by the guest builds it anew from the same
/// configuration. Whoever has `control` may meanwhile look at the machine and change it.
///
/// # Errors
/// The configuration, an input file or the host do not allow the machine.
pub fn run(
    config: &MachineConfig,
    console: Console,
    stop: StopHandle,
    control: &Control,
) -> Result<Outcome, MachineError> {
    if config.mergeable {
        return run_sharing(config, console, stop, control, &PageSharing::start()?);
    }
    run_with(config, console, stop, control, None)
}

/// As [`run`], with memory that shares pages with the other machines of `sharing`.
///
/// # Errors
/// As [`run`].
pub fn run_sharing(
    config: &MachineConfig,
    console: Console,
    stop: StopHandle,
    control: &Control,
    sharing: &PageSharing,
) -> Result<Outcome, MachineError> {
    run_with(config, console, stop, control, Some(sharing))
}

fn run_with(
    config: &MachineConfig,
    console: Console,
    stop: StopHandle,
    control: &Control,
    sharing: Option<&PageSharing>,
) -> Result<Outcome, MachineError> {
    config.validate()?;
    let deadline = config.timeout.map(|limit| Instant::now() + limit);
    let output = SharedOutput(Arc::new(Mutex::new(console.output)));
    let input = InputThread::spawn(console.input)?;
    let tsc_frequency = trapline_devices::tsc::tsc_frequency();
    let gdb = config.gdb.as_ref().map(GdbServer::listen).transpose()?;
    let events = config
        .events
        .as_ref()
        .map(|path| EventLog::create(path, config.vcpus, config.memory_bytes))
        .transpose()?;
    let watch_log = if config.watches.is_empty() && config.watch_log.is_none() {
        None
    } else {
        let (log, sink) = WatchLog::start(config.watch_log.as_deref())?;
        control.watches().add_sink(sink);
        Some(log)
    };
    let jitdump = config.jitdump.as_deref().map(JitDump::create).transpose()?;
    let jitdump = jitdump.map(Arc::new);
    control.configure(config).map_err(ConfigError::from)?;
    let mut report = Report::start(config.stats.as_deref())?;
    seccomp::confine(config.seccomp)?;
    let end = loop {
        let mut machine = Machine::build(
            config,
            output.clone(),
            tsc_frequency,
            events.as_ref(),
            control,
        )?;
        machine.jitdump.clone_from(&jitdump);
        if let Some(sharing) = sharing {
            sharing.join(&machine.memory, &machine.trace, machine.vcpus.len());
        }
        input.connect(Some(machine.chipset.serial_input()));
        let end = machine.run(&stop, deadline, gdb.as_ref(), sharing, &mut report, control)?;
        input.connect(None);
        if end != End::Reset {
            break end;
        }
        tracing::info!(target: "machine", "the guest resets the machine");
    };
    control.watches().close();
    if let Some(log) = watch_log {
        log.finish();
    }
    if let Some(events) = events {
        report.events(events.finish());
    }
    if let Some(jitdump) = jitdump {
        jitdump.finish()?;
    }
    report.write()?;
    Ok(match end {
        End::PowerOff => Outcome::PowerOff,
        End::DebugExit(value) => Outcome::DebugExit(value),
        End::Crashed { vcpu, registers } => Outcome::Crashed {
            vcpu,
            reason: "triple fault".into(),
            registers,
        },
        End::EnginesDiffer(report) => Outcome::EnginesDiffer(report),
        End::Stopped(reason) => Outcome::Stopped(reason),
        End::TimedOut | End::Reset => Outcome::TimedOut,
        End::HostRefused(what) => {
            return Err(MachineError::Host {
                what: "a resource of a VCPU".into(),
                remedy: "free it or raise the limit",
                source: io::Error::other(what),
            });
        }
    })
}

/// One machine, from power-up to its end or reset.
struct Machine {
    vcpus: Vec<(Arc<Signals>, CpuState)>,
    trace: Arc<TraceSystem>,
    memory: Arc<GuestMemory>,
    chipset: Arc<Chipset>,
    cpuid: Arc<CpuidModel>,
    ending: Arc<Ending>,
    breakpoints: Arc<Breakpoints>,
    execution: Execution,
    jitdump: Option<Arc<JitDump>>,
}

impl Machine {
    fn build(
        config: &MachineConfig,
        output: SharedOutput,
        tsc_frequency: u64,
        events: Option<&EventLog>,
        control: &Control,
    ) -> Result<Self, MachineError> {
        let count = usize::from(config.vcpus);
        let memory = GuestMemory::new(config.memory_bytes).map_err(|error| MachineError::Host {
            what: format!("{} MiB of guest memory", config.memory_bytes >> 20),
            remedy: "give a smaller --memory size",
            source: io::Error::other(error.to_string()),
        })?;
        let memory = Arc::new(memory.watched_by(Arc::clone(control.watches())));
        let observing = events.map(EventLog::observing).unwrap_or_default();
        if let Some(events) = events {
            events.power_up();
        }
        let trace = TraceSystem::new(count, Arc::clone(&memory) as _).observed(observing);
        let trace = Arc::new(trace);
        trace.set_notify_all(config.trace_notify == TraceNotify::All);
        config.notice_delays.apply(&trace);
        let ending = Arc::new(Ending::default());
        let breakpoints = Arc::new(Breakpoints::default());
        let signals: Vec<Arc<Signals>> = (0..count)
            .map(|n| {
                Arc::new(Signals::new(
                    Arc::clone(&trace),
                    VcpuId::new(n),
                    Arc::clone(&breakpoints),
                ))
            })
            .collect();
        let execution = match config.engine {
            EngineKind::Step => Execution::Stepped,
            EngineKind::Auto | EngineKind::Translate => Execution::Translated,
            EngineKind::Lockstep => Execution::Lockstep,
        };
        let pace = Pace::of(execution);
        let chipset = Chipset::new(ChipsetConfig {
            signals: signals
                .iter()
                .map(|s| Arc::clone(s) as Arc<dyn VcpuSignals>)
                .collect(),
            events: Arc::clone(&ending) as _,
            time: Arc::new(HostClock::new(pace)),
            tsc_frequency,
            serial_output: Box::new(output),
            debug_console: None,
            memory_below_4g: config.memory_bytes.min(LOW_RAM_END),
            memory_above_4g: config.memory_bytes.saturating_sub(LOW_RAM_END),
            dma_probe: config.devices.contains(&Device::DmaProbe),
        })
        .map_err(internal)?;
        for (cookie, region) in chipset.mmio().regions() {
            let range = Range {
                lo: region.range.start,
                hi: region.range.end,
            };
            let both = Sense {
                read: true,
                write: true,
            };
            // Nothing runs yet, so nothing can interfere.
            let _ = trace.establish(
                None,
                VcpuSet::EMPTY,
                range,
                Kind::Device,
                both,
                cookie,
                &mut |_| {},
            );
        }
        let tables = build_tables(
            &TablesConfig {
                vcpus: u32::from(config.vcpus),
            },
            ACPI_BASE,
        )
        .map_err(internal)?;
        memory
            .inner()
            .write_slice(&tables.bytes, GuestAddress(tables.base))
            .map_err(internal)?;
        let boot = load::load(
            memory.inner(),
            &LoadRequest {
                kernel: &config.kernel,
                initramfs: config.initramfs.as_deref(),
                cmdline: &config.cmdline,
                acpi_rsdp: Some(tables.rsdp),
            },
        )?;
        // All VCPUs count from zero at power-up.
        let tsc_offset = pace.guest(host_tsc()).wrapping_neg();
        let vcpus = signals
            .into_iter()
            .enumerate()
            .map(|(n, signals)| {
                let mut cpu = CpuState::reset();
                if n == 0 {
                    boot.apply(&mut cpu);
                } else {
                    cpu.init(false);
                }
                cpu.msr.tsc_offset = tsc_offset;
                cpu.msr.mtrr_def_type = FIRMWARE_MTRR_DEF_TYPE;
                (signals, cpu)
            })
            .collect();
        let khz = |hz: u64| u32::try_from(hz / 1000).ok();
        let cpuid = CpuidModel::from_host(CpuidConfig {
            vcpus: u32::from(config.vcpus),
            tsc_khz: khz(tsc_frequency),
            apic_bus_khz: khz(trapline_devices::local_apic::BUS_FREQUENCY),
        });
        Ok(Self {
            vcpus,
            trace,
            memory,
            chipset: Arc::new(chipset),
            cpuid: Arc::new(cpuid),
            ending,
            breakpoints,
            execution,
            jitdump: None,
        })
    }

    /// Runs all VCPUs until the machine ends, then stops them.
    fn run(
        self,
        stop: &StopHandle,
        deadline: Option<Instant>,
        gdb: Option<&GdbServer>,
        sharing: Option<&PageSharing>,
        report: &mut Report,
        control: &Control,
    ) -> Result<End, MachineError> {
        let platform = Arc::new(Buses {
            chipset: Arc::clone(&self.chipset),
        });
        let timers = self.chipset.spawn_timers().map_err(no_thread)?;
        let port = DmaPort {
            memory: Arc::clone(&self.memory),
            trace: Arc::clone(&self.trace),
        };
        let transfers = self.chipset.spawn_dma(&port).map_err(no_thread)?;
        let ending = Arc::clone(&self.ending);
        stop.on_request(move |reason| ending.announce(End::Stopped(reason)));
        let attached = control.attach(Live {
            trace: Arc::clone(&self.trace),
            vcpus: self.vcpus.iter().map(|(s, _)| Arc::clone(s)).collect(),
            ending: Arc::clone(&self.ending),
            memory: Arc::clone(&self.memory),
            pool: sharing.map(PageSharing::pool),
            press_power_button: {
                let chipset = Arc::clone(&self.chipset);
                Box::new(move || chipset.press_power_button())
            },
        });
        let debugger = Debugger::new(
            self.vcpus
                .iter()
                .map(|(signals, _)| Arc::clone(signals))
                .collect(),
            Arc::clone(&self.breakpoints),
            Arc::clone(&self.memory),
            Arc::clone(&self.trace),
        );
        let execution = self.execution;
        let mut threads = Vec::new();
        for (n, (signals, cpu)) in self.vcpus.into_iter().enumerate() {
            let Some(apic) = self.chipset.local_apic(n) else {
                continue;
            };
            let (trace, memory) = (Arc::clone(&self.trace), Arc::clone(&self.memory));
            let (platform, cpuid) = (Arc::clone(&platform), Arc::clone(&self.cpuid));
            let observer = self
                .jitdump
                .clone()
                .map(|dump| dump as Arc<dyn CodeObserver>);
            let surroundings = move || {
                let vcpu = VcpuId::new(n);
                let mut around = Surroundings::new(vcpu, trace, memory, apic, platform, cpuid);
                around.code_observer = observer;
                around
            };
            let ending = Arc::clone(&self.ending);
            match VcpuThread::spawn(n as u8, cpu, surroundings, signals, ending, execution) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    stop_all(threads);
                    return Err(no_thread(error));
                }
            }
        }
        let server = match gdb.map(|gdb| gdb.serve(debugger)).transpose() {
            Ok(server) => server,
            Err(error) => {
                stop_all(threads);
                return Err(no_thread(error));
            }
        };
        let end = self.ending.wait(deadline);
        drop(attached);
        let vcpus = stop_all(threads);
        let shared = sharing.map(|sharing| sharing.statistics());
        report.add(vcpus, &self.trace, &self.memory, shared);
        if let Some(server) = server {
            let _ = server.join();
        }
        drop((timers, transfers));
        Ok(end)
    }
}

fn stop_all(threads: Vec<VcpuThread>) -> Vec<trapline_monitor::statistics::VcpuStatistics> {
    for thread in &threads {
        thread.stop();
    }
    threads.into_iter().map(VcpuThread::join).collect()
}

fn no_thread(source: io::Error) -> MachineError {
    MachineError::Host {
        what: "a thread for a VCPU".into(),
        remedy: "give fewer --cpus or raise the limit of processes",
        source,
    }
}

/// An error that the configuration's validation should have prevented.
fn internal(error: impl std::fmt::Display) -> MachineError {
    MachineError::Host {
        what: "to build the machine".into(),
        remedy: "give a smaller configuration",
        source: io::Error::other(error.to_string()),
    }
}

/// The console's output, shared by the machines before and after a reset.
#[derive(Clone)]
struct SharedOutput(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for SharedOutput {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(data)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .flush()
    }
}

/// Hands console input to the serial line of the machine that runs now.
struct InputThread {
    serial: Arc<Mutex<Option<SerialInput>>>,
}

impl InputThread {
    fn spawn(input: Receiver<Vec<u8>>) -> Result<Self, MachineError> {
        let serial: Arc<Mutex<Option<SerialInput>>> = Arc::default();
        let target = Arc::downgrade(&serial);
        let feed = move || {
            loop {
                let piece = match input.recv_timeout(Duration::from_millis(200)) {
                    Ok(piece) => piece,
                    Err(RecvTimeoutError::Timeout) if target.strong_count() > 0 => continue,
                    Err(_) => return,
                };
                let mut rest = piece.as_slice();
                while !rest.is_empty() {
                    let Some(serial) = target.upgrade() else {
                        return;
                    };
                    let serial = serial
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .clone();
                    let taken = serial.map_or(0, |s| s.push(rest));
                    rest = rest.get(taken..).unwrap_or_default();
                    if taken == 0 {
                        thread::sleep(INPUT_RETRY);
                    }
                }
            }
        };
        thread::Builder::new()
            .name("console-input".into())
            .spawn(feed)
            .map_err(no_thread)?;
        Ok(Self { serial })
    }

    fn connect(&self, serial: Option<SerialInput>) {
        *self.serial.lock().unwrap_or_else(PoisonError::into_inner) = serial;
    }
}
