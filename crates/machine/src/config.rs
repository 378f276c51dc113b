//! What a machine is to be built from: plain data, and the rules it must keep.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::files::{self, NamedFile};
use crate::gdb::GdbAddress;
use crate::seccomp::Seccomp;
use crate::semantics::{NoticeDelays, TraceSemantics};
use crate::watch::{WatchError, WatchSpec};

/// The most VCPUs a machine may have.
pub const MAX_VCPUS: u8 = 64;
/// The least guest memory, in bytes: the first MiB is firmware's, a kernel needs some beside it.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;
/// The most guest memory, in bytes.
pub const MAX_MEMORY_BYTES: u64 = 1 << 40;
/// Guest memory comes in pages of this many bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Where the first serial line (COM1) goes.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum SerialMode {
    /// Standard input and output; a terminal is put into raw mode.
    #[default]
    Tty,
    /// Output is dropped, there is no input.
    Null,
    /// Output replaces the file's content, there is no input.
    File(PathBuf),
    /// A Unix stream socket is listened on at this path; one client at a time.
    Socket(PathBuf),
}

/// What executes guest instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// The fastest engine that can run the guest.
    #[default]
    Auto,
    /// One instruction at a time.
    Step,
    /// The binary translator.
    Translate,
    /// The translator and the stepping engine, over the same blocks; the first difference ends the
    /// machine. For one VCPU.
    Lockstep,
}

/// Who is notified of trace events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TraceNotify {
    /// The VCPUs for which the trace covers the location.
    #[default]
    Consumers,
    /// Every VCPU, of every event: the null-trace embodiment.
    All,
}

/// A device that a machine has only when asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// [`trapline_devices::dma_probe`].
    DmaProbe,
}

/// A machine to build. [`MachineConfig::validate`] tells whether it can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// A bzImage, an ELF kernel with a PVH entry, or a Multiboot 1 image.
    pub kernel: PathBuf,
    /// Handed to the kernel as its initial RAM file system (Multiboot: as module 0).
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line, without a terminating NUL.
    pub cmdline: String,
    /// 1 to [`MAX_VCPUS`]; may exceed the host's processors.
    pub vcpus: u8,
    /// Guest RAM in bytes: a multiple of [`PAGE_BYTES`].
    pub memory_bytes: u64,
    /// Whether pages with the same bytes are kept once. A [`crate::PageSharing`] given to
    /// [`crate::run_sharing`] does it without this.
    pub mergeable: bool,
    pub serial: SerialMode,
    pub engine: EngineKind,
    /// Wall time after which the machine is stopped.
    pub timeout: Option<Duration>,
    /// Where the statistics are written at exit, as one JSON object.
    pub stats: Option<PathBuf>,
    /// Where the events of the trace subsystem are written while the machine runs.
    pub events: Option<PathBuf>,
    /// The folder where a jitdump of the translations is written while the machine runs.
    pub jitdump: Option<PathBuf>,
    pub trace_notify: TraceNotify,
    /// Devices beside those that every machine has; naming one twice is no different.
    pub devices: Vec<Device>,
    /// Semantics that differ from the defaults of their kinds.
    pub trace_semantics: TraceSemantics,
    /// Ranges of guest memory whose accesses are reported.
    pub watches: Vec<WatchSpec>,
    /// Where they are reported, rather than on standard error.
    pub watch_log: Option<PathBuf>,
    /// For tests.
    pub notice_delays: NoticeDelays,
    /// Where a gdb stub listens.
    pub gdb: Option<GdbAddress>,
    /// How this process is confined once the machine's files are open.
    pub seccomp: Seccomp,
}

/// A configuration from which no machine can be built.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    #[error("{0} VCPUs are not possible: give 1 to {MAX_VCPUS}, for example --cpus boot=2")]
    Vcpus(u64),
    #[error(
        "{0} bytes of memory are not possible: give at least 2M and at most 1T, for example --memory size=512M"
    )]
    MemorySize(u64),
    #[error(
        "{0} bytes of memory are no whole number of 4 KiB pages: give the size in M or G, for example --memory size=512M"
    )]
    MemoryGranularity(u64),
    #[error("the kernel command line contains a NUL byte: remove it")]
    CmdlineNul,
    #[error("--engine lockstep cannot compare {0} VCPUs: give --cpus boot=1")]
    LockstepVcpus(u8),
    #[error("the time limit is zero: give a positive number of seconds, for example --timeout 60")]
    ZeroTimeout,
    #[error("{} is given for both {first} and {second}: give two paths", path.display())]
    SameFile {
        path: PathBuf,
        first: &'static str,
        second: &'static str,
    },
    #[error(transparent)]
    Watch(#[from] WatchError),
}

impl MachineConfig {
    /// A machine with one VCPU, 512 MiB, and the serial line on the terminal.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initramfs: None,
            cmdline: String::new(),
            vcpus: 1,
            memory_bytes: 512 << 20,
            mergeable: false,
            serial: SerialMode::default(),
            engine: EngineKind::default(),
            timeout: None,
            stats: None,
            events: None,
            jitdump: None,
            trace_notify: TraceNotify::default(),
            devices: Vec::new(),
            trace_semantics: TraceSemantics::default(),
            watches: Vec::new(),
            watch_log: None,
            notice_delays: NoticeDelays::default(),
            gdb: None,
            seccomp: Seccomp::default(),
        }
    }

    /// Checks every rule but those about the content of its files.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(ConfigError::Vcpus(self.vcpus.into()));
        }
        if self.engine == EngineKind::Lockstep && self.vcpus > 1 {
            return Err(ConfigError::LockstepVcpus(self.vcpus));
        }
        validate_memory(self.memory_bytes)?;
        if self.cmdline.contains('\0') {
            return Err(ConfigError::CmdlineNul);
        }
        if self.timeout == Some(Duration::ZERO) {
            return Err(ConfigError::ZeroTimeout);
        }
        for (n, watch) in self.watches.iter().enumerate() {
            watch.check(self.vcpus.into(), self.memory_bytes)?;
            let earlier = self.watches[..n].iter().any(|w| w.name == watch.name);
            if earlier && !watch.name.is_empty() {
                return Err(WatchError::NameTaken(watch.name.clone()).into());
            }
        }
        files::distinct(&self.files())?;
        Ok(())
    }

    /// The files that it names, with their options.
    pub fn files(&self) -> Vec<NamedFile<'_>> {
        let serial = match &self.serial {
            SerialMode::File(path) => Some(path),
            SerialMode::Tty | SerialMode::Null | SerialMode::Socket(_) => None,
        };
        let options = [
            ("--kernel", Some(&self.kernel), false),
            ("--initramfs", self.initramfs.as_ref(), false),
            ("--serial", serial, true),
            ("--stats", self.stats.as_ref(), true),
            ("--events", self.events.as_ref(), true),
            ("--watch-log", self.watch_log.as_ref(), true),
        ];
        let named = options
            .into_iter()
            .filter_map(|(option, path, is_written)| {
                Some(NamedFile {
                    option,
                    path: path?,
                    is_written,
                })
            });
        named.collect()
    }
}

/// Checks a guest memory size in bytes.
pub fn validate_memory(bytes: u64) -> Result<(), ConfigError> {
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes) {
        return Err(ConfigError::MemorySize(bytes));
    }
    if !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(ConfigError::MemoryGranularity(bytes));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut MachineConfig)) -> Result<(), ConfigError> {
        let mut config = MachineConfig::new("vmlinuz");
        change(&mut config);
        config.validate()
    }

    #[test]
    fn the_default_is_valid() {
        assert_eq!(with(|_| {}), Ok(()));
    }

    #[test]
    fn vcpus_have_both_limits() {
        assert_eq!(with(|c| c.vcpus = 0), Err(ConfigError::Vcpus(0)));
        assert_eq!(with(|c| c.vcpus = 64), Ok(()));
        assert_eq!(with(|c| c.vcpus = 65), Err(ConfigError::Vcpus(65)));
    }

    #[test]
    fn lock_step_is_for_one_vcpu() {
        let lockstep = |vcpus| {
            with(|c| {
                c.engine = EngineKind::Lockstep;
                c.vcpus = vcpus;
            })
        };
        assert_eq!(lockstep(1), Ok(()));
        assert_eq!(lockstep(2), Err(ConfigError::LockstepVcpus(2)));
    }

    #[test]
    fn memory_has_limits_and_a_granularity() {
        assert_eq!(
            with(|c| c.memory_bytes = 1 << 20),
            Err(ConfigError::MemorySize(1 << 20))
        );
        assert_eq!(with(|c| c.memory_bytes = 2 << 20), Ok(()));
        assert_eq!(with(|c| c.memory_bytes = 1 << 40), Ok(()));
        assert_eq!(
            with(|c| c.memory_bytes = u64::MAX),
            Err(ConfigError::MemorySize(u64::MAX))
        );
        let odd = (8 << 20) + 512;
        assert_eq!(
            with(|c| c.memory_bytes = odd),
            Err(ConfigError::MemoryGranularity(odd))
        );
    }

    #[test]
    fn a_command_line_ends_at_no_nul() {
        assert_eq!(
            with(|c| c.cmdline = "a\0b".into()),
            Err(ConfigError::CmdlineNul)
        );
    }

    #[test]
    fn events_and_statistics_need_a_file_each() {
        let both = |stats: &str, events: &str| {
            with(|c| (c.stats, c.events) = (Some(stats.into()), Some(events.into())))
        };
        assert_eq!(both("a", "b"), Ok(()));
        let same = ConfigError::SameFile {
            path: "a".into(),
            first: "--stats",
            second: "--events",
        };
        assert_eq!(both("a", "a"), Err(same));
    }

    #[test]
    fn a_time_limit_is_positive() {
        assert_eq!(
            with(|c| c.timeout = Some(Duration::ZERO)),
            Err(ConfigError::ZeroTimeout)
        );
    }
}
