//! Which semantics the kinds of traces get instead of their defaults (\[0084\] of the seed).

use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;
use trapline_trace::{Kind, Semantics, TraceSystem};

/// The kinds whose semantics a user may choose. Accesses to device registers derive nothing.
const CHOOSABLE: [Kind; 5] = [
    Kind::Code,
    Kind::Mmu,
    Kind::Descriptor,
    Kind::Share,
    Kind::Watch,
];
/// Stands for all of them.
const ALL: &str = "all";
/// The longest delay of a notification, for tests.
const MAX_DELAY: Duration = Duration::from_secs(10);

/// A text that says no semantics.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SemanticsError {
    #[error(
        "'{0}' has no '=': give KIND=SEMANTICS with commas between, for example code=bracketing"
    )]
    NoPair(String),
    #[error(
        "'{0}' is no kind of trace with semantics: use code, mmu, descriptor, share, watch or all"
    )]
    Kind(String),
    #[error("{0}; for example code=bracketing")]
    Semantics(String),
    #[error("'{0}' is given twice: give each kind once")]
    Twice(String),
    #[error("'{0}' is no delay: give a number of microseconds up to 10000000")]
    Delay(String),
}

/// Splits `KIND=VALUE,…` and reads each value; `all` comes first, so that single kinds override
/// it.
fn pairs<T: Copy>(
    text: &str,
    value: impl Fn(&str) -> Result<T, SemanticsError>,
) -> Result<Vec<(Kind, T)>, SemanticsError> {
    let mut seen = Vec::new();
    let (mut every, mut single) = (Vec::new(), Vec::new());
    for part in text.split(',') {
        let (kind, rest) = part
            .split_once('=')
            .ok_or_else(|| SemanticsError::NoPair(part.into()))?;
        if seen.contains(&kind) {
            return Err(SemanticsError::Twice(kind.into()));
        }
        seen.push(kind);
        if kind == ALL {
            let value = value(rest)?;
            every.extend(CHOOSABLE.map(|kind| (kind, value)));
            continue;
        }
        let chosen = kind.parse().ok().filter(|kind| CHOOSABLE.contains(kind));
        let chosen = chosen.ok_or_else(|| SemanticsError::Kind(kind.into()))?;
        single.push((chosen, value(rest)?));
    }
    every.extend(single);
    Ok(every)
}

/// Semantics by kind, in the order in which they are to be set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceSemantics(Vec<(Kind, Semantics)>);

impl FromStr for TraceSemantics {
    type Err = SemanticsError;

    /// Reads `code=bracketing,mmu=post-write-async`; `all=…` stands for every kind.
    fn from_str(text: &str) -> Result<Self, SemanticsError> {
        let semantics = |word: &str| {
            word.parse()
                .map_err(|error: trapline_trace::kind::UnknownWord| {
                    SemanticsError::Semantics(error.to_string())
                })
        };
        pairs(text, semantics).map(Self)
    }
}

/// The semantics that hold now, of every kind that has a choice.
pub fn current(trace: &TraceSystem) -> [(Kind, Semantics); 5] {
    CHOOSABLE.map(|kind| (kind, trace.semantics(kind)))
}

impl TraceSemantics {
    /// Has `later` override these.
    pub fn extend(&mut self, later: Self) {
        self.0
            .retain(|(kind, _)| !later.0.iter().any(|(k, _)| k == kind));
        self.0.extend(later.0);
    }

    /// Sets them, before or while a guest runs: from the next event on they hold.
    pub fn apply(&self, trace: &TraceSystem) {
        for (kind, semantics) in &self.0 {
            trace.set_semantics(*kind, *semantics);
        }
    }
}

/// How long notifications take to reach their consumers, by kind: a test then sees what weak
/// semantics allow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NoticeDelays(Vec<(Kind, Duration)>);

impl FromStr for NoticeDelays {
    type Err = SemanticsError;

    /// Reads `code=500,mmu=20`, in microseconds; `all=…` stands for every kind.
    fn from_str(text: &str) -> Result<Self, SemanticsError> {
        let delay = |word: &str| {
            let delay = word.parse().ok().map(Duration::from_micros);
            delay
                .filter(|delay| *delay <= MAX_DELAY)
                .ok_or_else(|| SemanticsError::Delay(word.into()))
        };
        pairs(text, delay).map(Self)
    }
}

impl NoticeDelays {
    pub fn apply(&self, trace: &TraceSystem) {
        for (kind, delay) in &self.0 {
            trace.set_notice_delay(*kind, *delay);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use trapline_trace::AlwaysSensed;

    fn applied(text: &str) -> TraceSystem {
        let trace = TraceSystem::new(1, Arc::new(AlwaysSensed));
        text.parse::<TraceSemantics>().unwrap().apply(&trace);
        trace
    }

    #[test]
    fn what_is_not_named_keeps_its_default() {
        let trace = applied("code=post-write-async,watch=bracketing");
        assert_eq!(trace.semantics(Kind::Code), Semantics::PostWriteAsync);
        assert_eq!(trace.semantics(Kind::Watch), Semantics::Bracketing);
        for kind in [Kind::Mmu, Kind::Descriptor, Kind::Share] {
            assert_eq!(trace.semantics(kind), kind.default_semantics());
        }
    }

    #[test]
    fn all_comes_before_single_kinds() {
        let trace = applied("mmu=pre-write-value,all=post-write-sync");
        assert_eq!(trace.semantics(Kind::Mmu), Semantics::PreWriteValue);
        assert_eq!(trace.semantics(Kind::Code), Semantics::PostWriteSync);
        let device = Kind::Device;
        assert_eq!(trace.semantics(device), device.default_semantics());
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (text, hint) in [
            ("", "''"),
            ("code", "'code' has no '='"),
            ("codes=bracketing", "'codes'"),
            ("device=bracketing", "'device'"),
            ("code=strict", "'strict'"),
            ("code=bracketing,code=bracketing", "twice"),
            ("code=bracketing,", "''"),
        ] {
            let error = text.parse::<TraceSemantics>().unwrap_err().to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
        for text in ["code=-1", "code=10000001", "x=1", "1"] {
            assert!(text.parse::<NoticeDelays>().is_err(), "{text}");
        }
    }
}
