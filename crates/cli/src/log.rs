//! Where log messages go.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::Mutex;

use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use trapline_machine::MachineError;

/// Logs what `filter` lets through to `path`, or else to standard error.
pub fn start(filter: Targets, path: Option<&Path>) -> Result<(), MachineError> {
    // A message that cannot be written is lost: saying so would fail too.
    let layer = fmt::layer().log_internal_errors(false);
    let layer = match path {
        Some(path) => {
            let file = File::create(path).map_err(|source| MachineError::Host {
                what: format!("to create {} for --log-file", path.display()),
                remedy: "give a path that can be written",
                source,
            })?;
            layer.with_ansi(false).with_writer(Mutex::new(file)).boxed()
        }
        None => layer
            .with_ansi(io::stderr().is_terminal())
            .with_writer(io::stderr)
            .boxed(),
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .init();
    Ok(())
}
