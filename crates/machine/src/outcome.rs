//! How a machine ended, or why it could not be run.

use std::fmt::Write as _;
use std::io;

use thiserror::Error;
use trapline_monitor::lockstep::difference::Difference;
use trapline_x86::{CpuState, Gpr, SegmentRegister};

use crate::config::ConfigError;
use crate::load::LoadError;
use crate::stop::StopReason;

/// How a machine that ran came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered itself off.
    PowerOff,
    /// The guest wrote this value to the debug-exit port 0xf4.
    DebugExit(u32),
    /// The guest crashed beyond what a processor recovers from.
    Crashed {
        /// The VCPU that crashed.
        vcpu: u8,
        /// What happened, for example "triple fault".
        reason: String,
        /// Its registers at that moment, as [`register_dump`] prints them.
        registers: String,
    },
    /// In lock-step execution the translator and the stepping engine came to different results: the
    /// guest's instructions, what differs, and both states, for a person to read.
    EnginesDiffer(String),
    /// Someone outside asked for the end.
    Stopped(StopReason),
    /// The configured time limit passed.
    TimedOut,
}

/// Whose fault it is that a machine cannot run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The options given.
    Usage,
    /// An input file.
    Input,
    /// The host, which refused a resource.
    Host,
}

/// Why a machine could not be built or had to be given up by the VMM.
#[derive(Debug, Error)]
pub enum MachineError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The host refused a resource.
    #[error("the host refused {what}: {source}; {remedy}")]
    Host {
        /// The resource with its size or name, for example "8 GiB of guest memory".
        what: String,
        /// What the user can do.
        remedy: &'static str,
        source: io::Error,
    },
}

impl MachineError {
    /// Whose fault it is; decides the exit status.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Config(_) => Blame::Usage,
            Self::Load(error) => error.blame(),
            Self::Host { .. } => Blame::Host,
        }
    }
}

/// What two engines made of the same instructions, many lines for a person to read.
pub fn difference_report(difference: &Difference) -> String {
    format!(
        "{difference}\nbefore:\n{}\n\ntranslated:\n{}\n\nstepped:\n{}",
        register_dump(&difference.before),
        register_dump(&difference.translated),
        register_dump(&difference.stepped)
    )
}

/// The registers of a VCPU, several lines for a person to read.
pub fn register_dump(cpu: &CpuState) -> String {
    const NAMES: [(&str, Gpr); 16] = [
        ("rax", Gpr::Rax),
        ("rbx", Gpr::Rbx),
        ("rcx", Gpr::Rcx),
        ("rdx", Gpr::Rdx),
        ("rsi", Gpr::Rsi),
        ("rdi", Gpr::Rdi),
        ("rbp", Gpr::Rbp),
        ("rsp", Gpr::Rsp),
        ("r8 ", Gpr::R8),
        ("r9 ", Gpr::R9),
        ("r10", Gpr::R10),
        ("r11", Gpr::R11),
        ("r12", Gpr::R12),
        ("r13", Gpr::R13),
        ("r14", Gpr::R14),
        ("r15", Gpr::R15),
    ];
    const SEGMENTS: [(&str, SegmentRegister); 6] = [
        ("cs", SegmentRegister::Cs),
        ("ss", SegmentRegister::Ss),
        ("ds", SegmentRegister::Ds),
        ("es", SegmentRegister::Es),
        ("fs", SegmentRegister::Fs),
        ("gs", SegmentRegister::Gs),
    ];
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "rip {:016x}  rflags {:08x}  mode {:?}  cpl {}",
        cpu.rip,
        cpu.rflags,
        cpu.mode(),
        cpu.cpl()
    );
    for row in NAMES.chunks(4) {
        for (i, (name, register)) in row.iter().enumerate() {
            let gap = if i == 0 { "" } else { "  " };
            let _ = write!(text, "{gap}{name} {:016x}", cpu.gpr(*register));
        }
        text.push('\n');
    }
    for (name, register) in SEGMENTS {
        let segment = cpu.segment(register);
        let _ = writeln!(
            text,
            "{name}  {:04x}  base {:016x}  limit {:08x}  rights {:?}",
            segment.selector, segment.base, segment.limit, segment.rights
        );
    }
    for (name, table) in [("gdt", &cpu.gdtr), ("idt", &cpu.idtr)] {
        let _ = writeln!(
            text,
            "{name}       base {:016x}  limit {:04x}",
            table.base, table.limit
        );
    }
    let _ = write!(
        text,
        "cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}  efer {:04x}",
        cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dump_shows_every_register() {
        let mut cpu = CpuState::reset();
        for (i, value) in cpu.gpr.iter_mut().enumerate() {
            *value = 0xabc0_0000 + i as u64;
        }
        cpu.cr2 = 0x1234_5678;
        let text = register_dump(&cpu);
        for i in 0..16 {
            assert!(
                text.contains(&format!("{:016x}", 0xabc0_0000u64 + i)),
                "{text}"
            );
        }
        assert!(text.contains("rip 000000000000fff0"), "{text}");
        assert!(text.contains("cr2 0000000012345678"), "{text}");
        assert!(text.contains("cs  f000  base 00000000ffff0000"), "{text}");
    }

    #[test]
    fn blame_follows_the_error() {
        let host = MachineError::Host {
            what: "memory".into(),
            remedy: "ask for less",
            source: io::Error::from(io::ErrorKind::OutOfMemory),
        };
        assert_eq!(host.blame(), Blame::Host);
        assert_eq!(
            MachineError::from(ConfigError::CmdlineNul).blame(),
            Blame::Usage
        );
    }
}
