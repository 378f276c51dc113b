//! The command line of Trapline.

mod arguments;
mod console;
mod escape;
mod exit_status;
mod log;
mod report;
mod seen;
mod signals;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use trapline_machine::config::SerialMode;
use trapline_machine::{Console, Control, MachineConfig, MachineError, Outcome, StopHandle};

use arguments::{Arguments, Command, RunArguments};

fn main() -> ExitCode {
    let status = match Arguments::try_parse() {
        Ok(Arguments {
            command: Command::Run(run),
        }) => run_machine(&run),
        Ok(Arguments {
            command: Command::Report(report),
        }) => seen::run(&report),
        Err(error) => report::usage(&error),
    };
    ExitCode::from(status)
}

/// Runs a machine to its end and returns the exit status.
fn run_machine(arguments: &RunArguments) -> u8 {
    let config = arguments.config();
    if let Err(error) = log::start(arguments.log.clone(), arguments.log_file.as_deref()) {
        return report::error(&error);
    }
    let ended = start_and_wait(&config);
    // Before anything is printed.
    terminal::restore();
    match ended {
        Ok(outcome) => report::outcome(&outcome),
        Err(error) => report::error(&error),
    }
}

fn start_and_wait(config: &MachineConfig) -> Result<Outcome, MachineError> {
    config.validate()?;
    let stop = StopHandle::new();
    terminal::restore_on_panic();
    signals::watch(&stop)?;
    signals::survive_file_limit();
    let console = match &config.serial {
        SerialMode::Tty => console::open(&stop)?,
        SerialMode::Null => Console::null(),
        SerialMode::File(path) => Console::file(path)?,
        SerialMode::Socket(path) => Console::socket(path)?,
    };
    trapline_machine::run(config, console, stop, &Control::default())
}
