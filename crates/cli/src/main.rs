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
mod standard_output;
mod terminal;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use trapline_machine::config::{ConfigError, SerialMode};
use trapline_machine::files::{self, NamedFile};
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
    // Before any of them is opened.
    if let Err(error) = check_files(&config, arguments.log_file.as_deref()) {
        return report::error(&error.into());
    }
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

/// Checks that no file is written that another option reads or writes.
fn check_files(config: &MachineConfig, log: Option<&Path>) -> Result<(), ConfigError> {
    let mut files = config.files();
    files.extend(log.map(|path| NamedFile {
        option: "--log-file",
        path,
        is_written: true,
    }));
    files::distinct(&files)
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
