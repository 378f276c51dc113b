//! What can be asked, and how it is typed at the monitor console.

use std::str::FromStr;

use thiserror::Error;

use crate::semantics::{SemanticsError, TraceSemantics};
use crate::watch::{WatchError, WatchSpec};

/// Something asked of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// What machine it is and whether it runs.
    Info,
    /// The registers of all VCPUs.
    Registers,
    Pause,
    Resume,
    /// Ends the machine, whatever the guest does.
    Shutdown,
    /// Resets the machine.
    Reboot,
    /// Presses the power button, for the guest to act on.
    PowerButton,
    /// The statistics of now.
    Counters,
    /// How many traces there are, and what they did.
    Traces,
    Semantics,
    SetSemantics(TraceSemantics),
    AddWatch(WatchSpec),
    RemoveWatch(String),
    ListWatches,
    /// Takes events of watches that nobody has taken yet.
    Events,
}

/// How commands are typed.
pub const HELP: &str = "\
help                    shows this
info [vcpus|traces]     the machine; the registers of all VCPUs; the traces
stats                   the statistics of now, as --stats writes them
pause, cont             stops all VCPUs; lets them go on
semantics [KIND=SEM,…]  shows or sets trace semantics, as in semantics code=bracketing
watch add SPEC          watches memory, as in watch add name=flag,gpa=0x5000-0x5008,access=rw
watch remove NAME       ends a watch
watch list              all watches
watch events            accesses to watched memory since this was last asked
button                  presses the power button
reset                   resets the machine
quit                    ends the machine";

/// A line that is no command.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CommandError {
    #[error("'{0}' is no command; type help for all of them")]
    Unknown(String),
    #[error("{0} is missing; type help for an example")]
    Missing(&'static str),
    #[error(transparent)]
    Semantics(#[from] SemanticsError),
    #[error(transparent)]
    Watch(#[from] WatchError),
}

impl FromStr for Command {
    type Err = CommandError;

    fn from_str(line: &str) -> Result<Self, CommandError> {
        let words: Vec<&str> = line.split_whitespace().collect();
        Ok(match words.as_slice() {
            ["info"] => Self::Info,
            ["info", "vcpus" | "registers"] => Self::Registers,
            ["info", "traces"] => Self::Traces,
            ["info", "watches"] | ["watch", "list"] => Self::ListWatches,
            ["stats"] => Self::Counters,
            ["pause" | "stop"] => Self::Pause,
            ["cont" | "c" | "resume"] => Self::Resume,
            ["semantics"] => Self::Semantics,
            ["semantics", semantics] => Self::SetSemantics(semantics.parse()?),
            ["watch", "add", spec] => Self::AddWatch(spec.parse()?),
            ["watch", "remove", name] => Self::RemoveWatch((*name).into()),
            ["watch", "events"] => Self::Events,
            ["watch", "add"] => return Err(CommandError::Missing("what to watch")),
            ["watch", "remove"] => return Err(CommandError::Missing("the watch's name")),
            ["button"] => Self::PowerButton,
            ["reset"] => Self::Reboot,
            ["quit" | "q"] => Self::Shutdown,
            _ => return Err(CommandError::Unknown(words.join(" "))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_line_of_the_help_is_a_command() {
        for (line, command) in [
            (" info ", Command::Info),
            ("info vcpus", Command::Registers),
            ("info traces", Command::Traces),
            ("stats", Command::Counters),
            ("pause", Command::Pause),
            ("cont", Command::Resume),
            ("semantics", Command::Semantics),
            ("watch remove x", Command::RemoveWatch("x".into())),
            ("watch  list", Command::ListWatches),
            ("watch events", Command::Events),
            ("button", Command::PowerButton),
            ("reset", Command::Reboot),
            ("quit", Command::Shutdown),
        ] {
            assert_eq!(line.parse(), Ok(command), "{line}");
        }
        let example = "watch add name=flag,gpa=0x5000-0x5008,access=rw";
        assert!(HELP.contains(example));
        assert!(matches!(example.parse(), Ok(Command::AddWatch(_))));
        let example = "semantics code=bracketing";
        assert!(HELP.contains(example));
        assert!(matches!(example.parse(), Ok(Command::SetSemantics(_))));
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (line, hint) in [
            ("jump", "'jump'"),
            ("info cpus", "'info cpus'"),
            ("watch add", "what to watch"),
            ("watch add gpa=1", "'1'"),
            ("semantics code=x", "'x'"),
        ] {
            let error = line.parse::<Command>().unwrap_err().to_string();
            assert!(error.contains(hint), "{line}: {error}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(line in ".*") {
            let _ = line.parse::<Command>();
        }
    }
}
