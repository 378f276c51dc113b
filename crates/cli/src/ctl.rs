//! `trapline ctl`: asks a running machine by its API socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::{exit_status, report};

/// A command waits a few seconds at most.
const PATIENCE: Duration = Duration::from_secs(30);

const EXAMPLE: &str = "\
Example: watch a word of a machine that was started with --api-socket /tmp/vm.sock
  trapline ctl --api-socket /tmp/vm.sock watch-add name=flag gpa=0x5000-0x5008 access=rw
  trapline ctl --api-socket /tmp/vm.sock watch-events

Exit status:
  0          it is done, and the answer is printed
  64         wrong usage
  71         no machine answers, or it cannot do that now";

/// Ask a running machine something, by its API socket.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub struct CtlArguments {
    /// The socket that the machine was given with --api-socket
    #[arg(long, value_name = "PATH")]
    pub api_socket: PathBuf,

    #[command(subcommand)]
    pub command: CtlCommand,
}

#[derive(Debug, Subcommand)]
pub enum CtlCommand {
    /// Which machine it is and whether it runs
    Info,
    /// The statistics of now, as --stats writes them
    Counters,
    /// The registers of all processors
    Registers,
    /// Stop all processors
    Pause,
    /// Let all processors go on
    Resume,
    /// End the machine
    Shutdown,
    /// Reset the machine
    Reboot,
    /// Press the power button, for the guest to act on
    PowerButton,
    /// What traces there are and what they did
    Traces,
    /// Show trace semantics, or set them: semantics code=bracketing mmu=post-write-async
    Semantics {
        #[arg(value_name = "KIND=SEMANTICS")]
        pairs: Vec<String>,
    },
    /// Watch guest memory: watch-add name=flag gpa=0x5000-0x5008 access=rw
    WatchAdd {
        #[arg(value_name = "KEY=VALUE", required = true)]
        pairs: Vec<String>,
    },
    /// End a watch
    WatchRemove { name: String },
    /// All watches
    WatchList,
    /// Take the accesses to watched memory since this was last asked
    WatchEvents,
}

/// `KEY=VALUE` words, with commas or in several arguments, as an object.
fn object(pairs: &[String]) -> Result<Value, String> {
    let words = pairs.iter().flat_map(|pair| pair.split(','));
    let pairs = words.map(|word| match word.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), Value::from(value))),
        None => Err(format!("'{word}' has no '=': give KEY=VALUE")),
    });
    pairs.collect::<Result<_, _>>().map(Value::Object)
}

/// Method, name and body of the request.
fn request(command: &CtlCommand) -> Result<(&'static str, &'static str, Option<Value>), String> {
    Ok(match command {
        CtlCommand::Info => ("GET", "vm.info", None),
        CtlCommand::Counters => ("GET", "vm.counters", None),
        CtlCommand::Registers => ("GET", "vm.registers", None),
        CtlCommand::Pause => ("PUT", "vm.pause", None),
        CtlCommand::Resume => ("PUT", "vm.resume", None),
        CtlCommand::Shutdown => ("PUT", "vm.shutdown", None),
        CtlCommand::Reboot => ("PUT", "vm.reboot", None),
        CtlCommand::PowerButton => ("PUT", "vm.power-button", None),
        CtlCommand::Traces => ("GET", "traces.info", None),
        CtlCommand::Semantics { pairs } if pairs.is_empty() => ("GET", "traces.semantics", None),
        CtlCommand::Semantics { pairs } => ("PUT", "traces.semantics", Some(object(pairs)?)),
        CtlCommand::WatchAdd { pairs } => ("PUT", "watch.add", Some(object(pairs)?)),
        CtlCommand::WatchRemove { name } => ("PUT", "watch.remove", Some(json!({ "name": name }))),
        CtlCommand::WatchList => ("GET", "watch.list", None),
        CtlCommand::WatchEvents => ("GET", "watch.events", None),
    })
}

/// Sends a request; status and body of the answer.
fn ask(path: &Path, method: &str, name: &str, body: &str) -> io::Result<(u16, Vec<u8>)> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    let head = format!(
        "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    stream.write_all(format!("{head}{body}").as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(&bytes) {
        Ok(httparse::Status::Complete(len)) => {
            Ok((response.code.unwrap_or_default(), bytes.split_off(len)))
        }
        _ => Err(io::Error::other("the answer is no HTTP")),
    }
}

/// Asks, prints the answer, and returns the exit status.
pub fn run(arguments: &CtlArguments) -> u8 {
    let (method, name, body) = match request(&arguments.command) {
        Ok(request) => request,
        Err(error) => {
            report::line(&error);
            return exit_status::USAGE;
        }
    };
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    let path = &arguments.api_socket;
    let (status, body) = match ask(path, method, name, &body) {
        Ok(answer) => answer,
        Err(error) => {
            report::line(&format!(
                "no machine answers at {}: {error}; give the path that it was started with",
                path.display()
            ));
            return exit_status::HOST_REFUSED;
        }
    };
    let value: Value = serde_json::from_slice(&body).unwrap_or_default();
    if status >= 400 {
        report::line(value["error"].as_str().unwrap_or("the machine refused"));
        return if status == 400 {
            exit_status::USAGE
        } else {
            exit_status::HOST_REFUSED
        };
    }
    if !value.is_null()
        && let Err(error) = report::print(&format!("{value:#}\n"))
    {
        report::line(&format!(
            "cannot write the answer to standard output: {error}"
        ));
        return exit_status::HOST_REFUSED;
    }
    0
}
