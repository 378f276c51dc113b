//! What may stand on the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::filter::{LevelFilter, Targets};
use trapline_machine::MachineConfig;
use trapline_machine::config::{
    ConfigError, Device, EngineKind, MAX_VCPUS, SerialMode, TraceNotify, validate_memory,
};
use trapline_machine::gdb::GdbAddress;
use trapline_machine::keyed;
use trapline_machine::seccomp::Seccomp;
use trapline_machine::semantics::{NoticeDelays, TraceSemantics};
use trapline_machine::watch::WatchSpec;

use crate::ctl::CtlArguments;

const EXAMPLE: &str = "\
Example: boot a Linux kernel on two processors, with its console in this terminal
  trapline run --kernel vmlinuz --initramfs initramfs.cpio.gz \\
    --cmdline 'console=ttyS0' --cpus boot=2 --memory size=512M";

const RUN_HELP: &str = "\
Example: boot a Linux kernel on two processors, with its console in this terminal
  trapline run --kernel vmlinuz --initramfs initramfs.cpio.gz \\
    --cmdline 'console=ttyS0' --cpus boot=2 --memory size=512M

Keys, when the serial line is on a terminal:
  Ctrl-A x       leave: stop the machine
  Ctrl-A Ctrl-A  send Ctrl-A to the guest (Ctrl-A a too)
  Ctrl-A c       switch to the monitor, where commands are typed, and back to the guest
  Ctrl-A h       show these keys

Exit status:
  0          the guest powered off, or Ctrl-A x stopped it
  (V<<1)|1   the guest wrote V to the debug-exit port 0xf4 (lowest 8 bits)
  64         wrong usage
  65         an input file is unusable
  70         the guest crashed, its registers are printed; or, with --engine lockstep, the engines
             disagree, and both states are printed
  71         the host refused a resource
  124        the time limit passed
  128+N      signal N stopped the machine";

/// Runs x86-64 virtual machines with several processors, and needs no virtualization hardware for
/// it: no /dev/kvm, no kernel module, no root.
#[derive(Debug, Parser)]
#[command(name = "trapline", version, after_help = EXAMPLE)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build a machine, boot a kernel on it, and run it to its end
    Run(Box<RunArguments>),
    /// Ask a running machine something, by its API socket
    Ctl(CtlArguments),
    /// Tell what files of "run --events" and "run --stats" hold
    Report(ReportArguments),
}

const REPORT_HELP: &str = "\
Example: record a run, read what the traces did, and look at it in a browser
  trapline run --kernel vmlinuz --cpus boot=2 --events events.json --stats stats.json
  trapline report events.json stats.json --html events.html

Exit status:
  0          the report is made
  64         wrong usage
  65         a file is unusable
  71         the host refused to write the report";

/// Tell what files of "run --events" and "run --stats" hold: which VCPU played which role for
/// which memory, the busiest regions, and how long was waited.
#[derive(Debug, Args)]
#[command(after_help = REPORT_HELP)]
pub struct ReportArguments {
    /// Files that "run --events" or "run --stats" wrote
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,

    /// Write a page for browsers, with a timeline and a map of guest memory
    #[arg(long, value_name = "OUT")]
    pub html: Option<PathBuf>,

    /// How many lines each table has at most
    #[arg(long, value_name = "LINES", default_value_t = 16)]
    pub top: usize,
}

/// Build a machine, boot a kernel on it, and run it to its end.
#[derive(Debug, Args)]
#[command(after_help = RUN_HELP)]
pub struct RunArguments {
    /// Kernel: a bzImage, an ELF file with a PVH entry, or a Multiboot 1 image
    #[arg(long, value_name = "PATH")]
    pub kernel: PathBuf,

    /// Initial RAM file system for the kernel (module 0 of a Multiboot kernel)
    #[arg(long, value_name = "PATH")]
    pub initramfs: Option<PathBuf>,

    /// Command line of the kernel
    #[arg(
        long,
        value_name = "STR",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub cmdline: String,

    /// Number of virtual processors, 1 to 64; may exceed the host's
    #[arg(long, value_name = "boot=N", default_value = "boot=1", value_parser = cpus)]
    pub cpus: u8,

    /// Guest memory, with a suffix K, M, G or T; with mergeable=on, pages that have the same bytes
    /// are found and kept once
    #[arg(
        long,
        value_name = "size=SIZE[,mergeable=on|off]",
        default_value = "size=512M",
        value_parser = memory
    )]
    pub memory: Memory,

    /// First serial line: this terminal (standard input and output), nothing, a file, or a Unix
    /// socket to listen at
    #[arg(
        long,
        value_name = "tty|null|file=PATH|socket=PATH",
        default_value = "tty",
        value_parser = serial
    )]
    pub serial: SerialMode,

    /// What executes the guest's instructions
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    pub engine: Engine,

    /// Who is notified of trace events
    #[arg(long, value_enum, default_value_t = Notify::Consumers)]
    pub trace_notify: Notify,

    /// Add a device to the machine; may be given for several
    #[arg(long = "device", value_enum, value_name = "DEVICE")]
    pub devices: Vec<ExtraDevice>,

    /// In which order trace events and notifications happen, by kind of trace
    ///
    /// Kinds: code, mmu, descriptor, share, watch, or all. Semantics: bracketing,
    /// post-write-sync, post-write-async, pre-write-value.
    /// Example: --trace-semantics code=bracketing,mmu=post-write-async
    #[arg(long, value_name = "KIND=SEMANTICS,…")]
    pub trace_semantics: Option<TraceSemantics>,

    /// Report accesses to a range of guest memory; may be given for several
    ///
    /// Each access is told with its processor (or device, or debugger), instruction address,
    /// guest-physical range, and the bytes before and after. HI is the first address behind the
    /// range. Instruction fetches are no reads; a read-modify-write is a write.
    /// Example: --watch name=flag,gpa=0x5000-0x5008,access=rw,vcpus=0-1
    #[arg(
        long = "watch",
        value_name = "name=N,gpa=LO-HI,access=r|w|rw,vcpus=all|0-1,semantics=…"
    )]
    pub watches: Vec<WatchSpec>,

    /// Write what --watch reports to this file, as one JSON object per line
    #[arg(long, value_name = "PATH")]
    pub watch_log: Option<PathBuf>,

    /// Let notifications of a kind take this many microseconds to reach their consumers
    #[arg(long, value_name = "KIND=MICROSECONDS,…", hide = true)]
    pub debug_notice_delay: Option<NoticeDelays>,

    /// Listen here for requests: HTTP with JSON on a Unix socket
    ///
    /// Example: --api-socket /tmp/vm.sock, and then
    /// curl --unix-socket /tmp/vm.sock http://localhost/api/v1/vm.info
    /// or trapline ctl --api-socket /tmp/vm.sock info
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,

    /// Let gdb connect here ("target remote ADDRESS:PORT"); the guest stops when it does
    #[arg(long, value_name = "[ADDRESS:]PORT")]
    pub gdb: Option<GdbAddress>,

    /// Let the host's kernel refuse what a running machine does not need (a seccomp filter)
    ///
    /// A violation ends the process with exit status 71; with log, the kernel only notes it.
    #[arg(long, value_enum, default_value_t = Filter::True)]
    pub seccomp: Filter,

    /// Stop the machine after this many seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,

    /// Write statistics to this file at exit, as one JSON object
    #[arg(long, value_name = "PATH")]
    pub stats: Option<PathBuf>,

    /// Write what the memory traces do to this file, in the Chrome trace-event format: for Perfetto
    /// and for "trapline report"
    #[arg(long, value_name = "PATH")]
    pub events: Option<PathBuf>,

    /// Write jit-PID.dump to this folder, from which "perf inject --jit" learns the names of guest
    /// code; see docs/performance.md
    #[arg(long, value_name = "FOLDER")]
    pub jitdump: Option<PathBuf>,

    /// What to log: a level, or targets with levels, as in warn,trapline_devices=debug
    #[arg(long, value_name = "FILTER", default_value = "warn", value_parser = filter)]
    pub log: Targets,

    /// Where to log to, rather than standard error
    #[arg(long, value_name = "PATH")]
    pub log_file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// The fastest that can run the guest
    Auto,
    /// One instruction at a time
    Step,
    /// The binary translator
    Translate,
    /// Both, over the same blocks of 64-bit code, to test them: stops at the first difference and
    /// prints both states; for one processor, and slow
    Lockstep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Notify {
    /// The processors for which the trace covers the location
    Consumers,
    /// Every processor, of every event
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Filter {
    /// Refuse it
    True,
    /// Do without a filter
    False,
    /// Allow it, and note it in the kernel's log
    Log,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExtraDevice {
    /// A test device that copies guest memory by DMA
    DmaProbe,
}

impl RunArguments {
    /// The machine they describe.
    pub fn config(&self) -> MachineConfig {
        MachineConfig {
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            cmdline: self.cmdline.clone(),
            vcpus: self.cpus,
            memory_bytes: self.memory.bytes,
            mergeable: self.memory.mergeable,
            serial: self.serial.clone(),
            engine: match self.engine {
                Engine::Auto => EngineKind::Auto,
                Engine::Step => EngineKind::Step,
                Engine::Translate => EngineKind::Translate,
                Engine::Lockstep => EngineKind::Lockstep,
            },
            timeout: self.timeout,
            stats: self.stats.clone(),
            events: self.events.clone(),
            jitdump: self.jitdump.clone(),
            trace_notify: match self.trace_notify {
                Notify::Consumers => TraceNotify::Consumers,
                Notify::All => TraceNotify::All,
            },
            devices: self
                .devices
                .iter()
                .map(|ExtraDevice::DmaProbe| Device::DmaProbe)
                .collect(),
            trace_semantics: self.trace_semantics.clone().unwrap_or_default(),
            watches: self.watches.clone(),
            watch_log: self.watch_log.clone(),
            notice_delays: self.debug_notice_delay.clone().unwrap_or_default(),
            gdb: self.gdb.clone(),
            seccomp: match self.seccomp {
                Filter::True => Seccomp::Enforce,
                Filter::False => Seccomp::Off,
                Filter::Log => Seccomp::Log,
            },
        }
    }
}

fn cpus(text: &str) -> Result<u8, String> {
    let [boot] = keyed::values(text, ["boot"])?;
    let boot = boot.ok_or("give the number of processors, for example boot=2")?;
    let count: u64 = boot
        .parse()
        .map_err(|_| format!("'{boot}' is no number of processors: give 1 to {MAX_VCPUS}"))?;
    match u8::try_from(count) {
        Ok(count @ 1..=MAX_VCPUS) => Ok(count),
        _ => Err(ConfigError::Vcpus(count).to_string()),
    }
}

/// The value of `--memory`.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub bytes: u64,
    pub mergeable: bool,
}

fn memory(text: &str) -> Result<Memory, String> {
    let [size, mergeable] = keyed::values(text, ["size", "mergeable"])?;
    let size = size.ok_or("give the size of memory, for example size=512M")?;
    let bytes = keyed::size(size)?;
    validate_memory(bytes).map_err(|e| e.to_string())?;
    let mergeable = match mergeable {
        None | Some("off") => false,
        Some("on") => true,
        Some(other) => return Err(format!("mergeable is 'on' or 'off', not '{other}'")),
    };
    Ok(Memory { bytes, mergeable })
}

fn serial(text: &str) -> Result<SerialMode, String> {
    match text.split_once('=') {
        None if text == "tty" => Ok(SerialMode::Tty),
        None if text == "null" => Ok(SerialMode::Null),
        Some(("file" | "socket", "")) => Err("the path is missing behind '='".into()),
        Some(("file", path)) => Ok(SerialMode::File(path.into())),
        Some(("socket", path)) => Ok(SerialMode::Socket(path.into())),
        _ => Err("give tty, null, file=PATH or socket=PATH".into()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|limit| !limit.is_zero())
        .ok_or_else(|| "give a positive number of seconds, for example 60 or 0.5".into())
}

fn filter(text: &str) -> Result<Targets, String> {
    // A word alone may be meant as a target, but is a level that is not spelled so more often: it
    // would turn all messages off.
    let is_level = |word: &str| !word.is_empty() && word.parse::<LevelFilter>().is_ok();
    let is_sound = |word: &str| word.contains('=') || is_level(word);
    let targets = text.split(',').all(is_sound).then(|| text.parse().ok());
    targets.flatten().ok_or_else(|| {
        "give a level (off, error, warn, info, debug, trace) or targets with levels, for example \
         warn,trapline_devices=debug"
            .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(options: &[&str]) -> Result<MachineConfig, String> {
        let fixed = ["trapline", "run", "--kernel", "k"];
        let arguments =
            Arguments::try_parse_from(fixed.iter().chain(options)).map_err(|e| e.to_string())?;
        match arguments.command {
            Command::Run(run) => Ok(run.config()),
            Command::Report(_) | Command::Ctl(_) => Err("no run".into()),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn defaults() {
        let expected = MachineConfig {
            seccomp: Seccomp::Enforce,
            ..MachineConfig::new("k")
        };
        assert_eq!(parse(&[]).unwrap(), expected);
    }

    #[test]
    fn every_option() {
        let config = parse(&[
            "--initramfs=i",
            "--cmdline=-x console=ttyS0",
            "--cpus=boot=8",
            "--memory=size=2G,mergeable=on",
            "--serial=file=a=b",
            "--engine=step",
            "--trace-notify=all",
            "--device=dma-probe",
            "--trace-semantics=code=post-write-sync",
            "--watch=gpa=4-5",
            "--watch=name=a,gpa=6-7",
            "--watch-log=w",
            "--debug-notice-delay=code=7",
            "--gdb=1234",
            "--seccomp=log",
            "--timeout=1.5",
            "--stats=s",
            "--events=e",
            "--jitdump=j",
            "--log=debug",
            "--log-file=l",
        ]);
        let expected = MachineConfig {
            kernel: "k".into(),
            initramfs: Some("i".into()),
            cmdline: "-x console=ttyS0".into(),
            vcpus: 8,
            memory_bytes: 2 << 30,
            mergeable: true,
            serial: SerialMode::File("a=b".into()),
            engine: EngineKind::Step,
            timeout: Some(Duration::from_millis(1500)),
            stats: Some("s".into()),
            events: Some("e".into()),
            jitdump: Some("j".into()),
            trace_notify: TraceNotify::All,
            devices: vec![Device::DmaProbe],
            trace_semantics: "code=post-write-sync".parse().unwrap(),
            watches: vec![
                "gpa=4-5".parse().unwrap(),
                "name=a,gpa=6-7".parse().unwrap(),
            ],
            watch_log: Some("w".into()),
            notice_delays: "code=7".parse().unwrap(),
            gdb: Some("127.0.0.1:1234".parse().unwrap()),
            seccomp: Seccomp::Log,
        };
        assert_eq!(config.unwrap(), expected);
    }

    #[test]
    fn wrong_values_say_what_is_right() {
        for (option, hint) in [
            ("--cpus=2", "boot="),
            ("--cpus=boot=0", "1 to 64"),
            ("--cpus=boot=10000", "1 to 64"),
            ("--cpus=boot=x", "1 to 64"),
            ("--cpus=boot=1,boot=2", "twice"),
            ("--cpus=boot=1,max=2", "'max'"),
            ("--memory=512M", "size="),
            ("--memory=size=1M", "at least 2M"),
            ("--memory=size=2T", "at most 1T"),
            ("--memory=size=99999999999999T", "too large"),
            ("--memory=size=2097153", "4 KiB"),
            ("--memory=size=-1", "size=512M"),
            ("--memory=mergeable=on", "size=512M"),
            ("--memory=size=1G,mergeable=yes", "'off'"),
            ("--serial=pty", "socket=PATH"),
            ("--serial=file=", "path"),
            ("--timeout=0", "positive"),
            ("--timeout=nan", "positive"),
            ("--timeout=1e300", "positive"),
            ("--engine=fast", "translate"),
            ("--seccomp=maybe", "log"),
            ("--device=disk", "dma-probe"),
            ("--log=a=b=c", "level"),
            ("--log=loud", "level"),
            ("--log=", "level"),
            ("--trace-semantics=code", "'code'"),
            ("--trace-semantics=code=strict", "'strict'"),
            ("--trace-semantics=device=bracketing", "'device'"),
            ("--debug-notice-delay=code=x", "microseconds"),
        ] {
            let error = parse(&[option]).expect_err(option);
            assert!(error.contains(hint), "{option}: {error}");
        }
    }
}
