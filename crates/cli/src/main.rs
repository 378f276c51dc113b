//! The command line of Trapline.

mod api;
mod arguments;
mod console;
mod ctl;
mod escape;
mod exit_status;
mod log;
mod monitor;
mod report;
mod seen;
mod signals;
mod terminal;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use trapline_machine::config::SerialMode;
use trapline_machine::{Console, Control, MachineConfig, MachineError, Outcome, StopHandle};

use api::ApiSocket;
use arguments::{Arguments, Command, RunArguments};

fn main() -> ExitCode {
    let status = match Arguments::try_parse() {
        Ok(Arguments {
            command: Command::Run(run),
        }) => run_machine(&run),
        Ok(Arguments {
            command: Command::Report(report),
        }) => seen::run(&report),
        Ok(Arguments {
            command: Command::Ctl(ctl),
        }) => ctl::run(&ctl),
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
    let ended = start_and_wait(&config, arguments.api_socket.as_deref());
    // Before anything is printed.
    terminal::restore();
    match ended {
        Ok(outcome) => report::outcome(&outcome),
        Err(error) => report::error(&error),
    }
}

fn start_and_wait(
    config: &MachineConfig,
    api_socket: Option<&Path>,
) -> Result<Outcome, MachineError> {
    config.validate()?;
    let stop = StopHandle::new();
    terminal::restore_on_panic();
    trapline_machine::seccomp::on_violation(terminal::restore_if_free);
    signals::watch(&stop)?;
    signals::survive_file_limit();
    let control = Arc::new(Control::default());
    let _api = api_socket
        .map(|path| ApiSocket::open(path, &control))
        .transpose()?;
    let console = match &config.serial {
        SerialMode::Tty => console::open(&stop, &control)?,
        SerialMode::Null => Console::null(),
        SerialMode::File(path) => Console::file(path)?,
        SerialMode::Socket(path) => Console::socket(path)?,
    };
    trapline_machine::run(config, console, stop, &control)
}
