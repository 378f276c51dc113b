//! What is said on standard error: one sentence for every way a run can go wrong.

use std::io::{self, Write};

use clap::error::ErrorKind;
use trapline_machine::{MachineError, Outcome, StopReason};

use crate::{exit_status, standard_output};

/// Prints a line for the user. If nobody can read it, there is nobody to tell.
pub fn line(text: &str) {
    let _ = writeln!(io::stderr(), "trapline: {text}");
}

/// Prints what was asked for on standard output.
///
/// # Errors
/// If it cannot be written. Whoever closes a pipe has read enough: that is none.
pub fn print(text: &str) -> io::Result<()> {
    standard_output::check()?;
    let mut out = io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// Says why a machine cannot run and returns the exit status.
pub fn error(error: &MachineError) -> u8 {
    line(&error.to_string());
    exit_status::of_error(error)
}

/// Says how a machine ended, if there is anything to say, and returns the exit status.
pub fn outcome(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::PowerOff
        | Outcome::DebugExit(_)
        | Outcome::Stopped(StopReason::Console | StopReason::Control) => {}
        Outcome::Crashed {
            vcpu,
            reason,
            registers,
        } => {
            line(&format!(
                "the guest crashed on VCPU {vcpu}: {reason}\n{registers}"
            ));
        }
        Outcome::EnginesDiffer(report) => line(&format!(
            "the translator and the stepping engine came to different results, please report \
             this:\n{report}"
        )),
        Outcome::Stopped(StopReason::Signal(number)) => {
            line(&format!("the machine was stopped by signal {number}"));
        }
        Outcome::Stopped(StopReason::OutputLost(errno)) => line(&format!(
            "standard output cannot be written any more, so the machine was stopped: {}; give \
             --serial null to run without it",
            io::Error::from_raw_os_error(*errno)
        )),
        Outcome::TimedOut => {
            line("the time limit passed and the machine was stopped; give a higher --timeout");
        }
    }
    exit_status::of_outcome(outcome)
}

/// Prints help or version where they were asked for, else what is wrong with the command line,
/// and returns the exit status.
pub fn usage(error: &clap::Error) -> u8 {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Whoever closes standard output has read enough.
            let _ = error.print();
            0
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            exit_status::USAGE
        }
        _ => {
            let command = match std::env::args().nth(1).as_deref() {
                Some("run") => "run ",
                Some("ctl") => "ctl ",
                Some("report") => "report ",
                _ => "",
            };
            line(&format!(
                "{} (see trapline {command}--help)",
                sentence(&error.to_string())
            ));
            exit_status::USAGE
        }
    }
}

/// The message of clap's text, which has paragraphs, as one line.
fn sentence(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let end = ["\n\nUsage:", "\n\nFor more information"]
        .iter()
        .filter_map(|mark| text.find(mark))
        .min()
        .unwrap_or(text.len());
    let paragraphs = text[..end].split("\n\n");
    let lines: Vec<_> = paragraphs
        .map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    lines.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_one_line() {
        let text = "error: unexpected argument '--kernal' found\n\n  tip: a similar argument exists: \
                    '--kernel'\n\nUsage: trapline run\n\nFor more information, try '--help'.\n";
        assert_eq!(
            sentence(text),
            "unexpected argument '--kernal' found; tip: a similar argument exists: '--kernel'"
        );
        assert_eq!(
            sentence("error: missing:\n  --kernel <PATH>\n\nUsage: x"),
            "missing: --kernel <PATH>"
        );
    }
}
