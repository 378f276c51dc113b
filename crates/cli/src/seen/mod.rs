//! `trapline report`: what the files of `--events` and `--stats` tell.

mod events_file;
mod html;
mod measures;
mod roles;
mod stats_file;
mod text;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;
use thiserror::Error;

use crate::arguments::ReportArguments;
use crate::{exit_status, report};
use events_file::Events;
use stats_file::Stats;

/// Why a report cannot be made.
#[derive(Debug, Error)]
pub enum SeenError {
    #[error("cannot read {path}: {source}; give a file that --events or --stats wrote", path = .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is empty; give a file that --events or --stats wrote", path = .path.display())]
    Empty { path: PathBuf },
    #[error("{path} ends in the middle of line {line}; copy it again", path = .path.display())]
    Truncated { path: PathBuf, line: usize },
    #[error("{path} is no file of --events or --stats: {fault}", path = .path.display())]
    Malformed { path: PathBuf, fault: String },
    #[error("--html shows one file of --events, but {count} are given")]
    NotOne { count: usize },
    #[error("--html would replace {path}, which the report is of; give another path", path = .path.display())]
    SameFile { path: PathBuf },
    #[error("cannot write {path}: {source}; give a path that can be written", path = .path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// Makes the report and returns the exit status.
pub fn run(arguments: &ReportArguments) -> u8 {
    match make(arguments) {
        Ok(()) => 0,
        Err(error) => {
            report::line(&error.to_string());
            match error {
                SeenError::Write { .. } => exit_status::HOST_REFUSED,
                SeenError::NotOne { .. } | SeenError::SameFile { .. } => exit_status::USAGE,
                SeenError::Read { .. }
                | SeenError::Empty { .. }
                | SeenError::Truncated { .. }
                | SeenError::Malformed { .. } => exit_status::BAD_INPUT,
            }
        }
    }
}

/// A file that tells something.
enum File {
    Events(Box<Events>),
    Stats(Stats),
}

fn make(arguments: &ReportArguments) -> Result<(), SeenError> {
    let files: Vec<(&Path, File)> = arguments
        .paths
        .iter()
        .map(|path| Ok((path.as_path(), read(path)?)))
        .collect::<Result<_, _>>()?;
    if let Some(html) = &arguments.html {
        page(html, &files)?;
    }
    let mut out = String::new();
    for (n, (path, file)) in files.iter().enumerate() {
        if n > 0 {
            out.push('\n');
        }
        match file {
            File::Events(events) => text::events(&mut out, path, events, arguments.top),
            File::Stats(stats) => text::stats(&mut out, path, stats),
        }
    }
    report::print(&out).map_err(|source| SeenError::Write {
        path: "standard output".into(),
        source,
    })
}

/// Writes the page of the one file of events.
fn page(page: &Path, files: &[(&Path, File)]) -> Result<(), SeenError> {
    let same = |a: &Path, b: &Path| {
        let canonical = |path: &Path| fs::canonicalize(path).ok();
        canonical(a).is_some_and(|a| Some(a) == canonical(b))
    };
    if let Some((path, _)) = files.iter().find(|(path, _)| same(page, path)) {
        return Err(SeenError::SameFile {
            path: path.to_path_buf(),
        });
    }
    let mut events = files.iter().filter_map(|(path, file)| match file {
        File::Events(events) => Some((path, events)),
        File::Stats(_) => None,
    });
    let (Some((path, one)), None) = (events.next(), events.next()) else {
        let of_events = |(_, file): &&(&Path, File)| matches!(file, File::Events(_));
        return Err(SeenError::NotOne {
            count: files.iter().filter(of_events).count(),
        });
    };
    write_page(page, path, one)
}

fn write_page(page: &Path, path: &Path, events: &Events) -> Result<(), SeenError> {
    fs::write(page, html::page(path, events)).map_err(|source| SeenError::Write {
        path: page.into(),
        source,
    })
}

fn read(path: &Path) -> Result<File, SeenError> {
    let bytes = fs::read(path).map_err(|source| SeenError::Read {
        path: path.into(),
        source,
    })?;
    parse(&bytes).map_err(|fault| match fault {
        Fault::Empty => SeenError::Empty { path: path.into() },
        Fault::Truncated(line) => SeenError::Truncated {
            path: path.into(),
            line,
        },
        Fault::Malformed(fault) => SeenError::Malformed {
            path: path.into(),
            fault,
        },
    })
}

/// What is wrong with a file's content.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    Empty,
    /// It ends in this line.
    Truncated(usize),
    Malformed(String),
}

impl From<serde_json::Error> for Fault {
    fn from(error: serde_json::Error) -> Self {
        if error.is_eof() {
            Self::Truncated(error.line())
        } else {
            Self::Malformed(error.to_string())
        }
    }
}

/// Tells the two kinds of file apart.
#[derive(Deserialize)]
struct Either {
    #[serde(rename = "traceEvents")]
    events: Option<IgnoredAny>,
    boots: Option<IgnoredAny>,
}

fn parse(bytes: &[u8]) -> Result<File, Fault> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(Fault::Empty);
    }
    let either: Either = serde_json::from_slice(bytes)?;
    match (either.events, either.boots) {
        (Some(_), _) => Ok(File::Events(Box::new(Events::parse(bytes)?))),
        (None, Some(_)) => Ok(File::Stats(serde_json::from_slice(bytes)?)),
        (None, None) => Err(Fault::Malformed(
            "it has neither \"traceEvents\" nor \"boots\"".into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> Fault {
        match parse(text.as_bytes()) {
            Ok(_) => panic!("{text} is accepted"),
            Err(fault) => fault,
        }
    }

    #[test]
    fn bad_content_is_told_apart() {
        assert_eq!(fault(""), Fault::Empty);
        assert_eq!(fault(" \n"), Fault::Empty);
        assert_eq!(fault("{\"traceEvents\":[\n{\"ph\":"), Fault::Truncated(2));
        for text in [
            "{}",
            "[]",
            "7",
            "\u{7f}ELF",
            "{\"boots\":3}",
            "{\"traceEvents\":{}}",
            "{\"traceEvents\":[]}",
            "{\"traceEvents\":[],\"otherData\":{\"tool\":\"other 1\",\"vcpus\":2}}",
            "{\"traceEvents\":[],\"otherData\":{\"tool\":\"trapline 1\",\"vcpus\":65}}",
            "{\"traceEvents\":[],\"otherData\":{\"tool\":\"trapline 1\",\"vcpus\":0}}",
        ] {
            assert!(matches!(fault(text), Fault::Malformed(_)), "{text}");
        }
    }
}
