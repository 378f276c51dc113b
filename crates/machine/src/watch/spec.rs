//! A watch as its user writes it: `name=N,gpa=LO-HI,access=r|w|rw,vcpus=all|0-1,semantics=…`.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;
use trapline_memory::guest_ram;
use trapline_trace::{Range, Semantics, Sense, VcpuSet};

use crate::keyed;

const LONGEST_NAME: usize = 64;

/// A watch that cannot be set.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WatchError {
    #[error("{0}")]
    Keys(String),
    #[error("the range is missing: give gpa=LO-HI, for example gpa=0x1000-0x1008")]
    NoRange,
    #[error(
        "'{0}' is no range: give guest-physical addresses LO-HI or LO+LENGTH, for example gpa=0x1000-0x1008"
    )]
    Range(String),
    #[error("the range '{0}' is empty or inverted: HI is the first address behind it and above LO")]
    EmptyRange(String),
    #[error("'{0}' is no name of a watch: use up to 64 letters, digits, '.', '-' and '_'")]
    Name(String),
    #[error("'{0}' is no access: give access=r, w or rw")]
    Access(String),
    #[error("'{0}' names no VCPUs: give vcpus=all, a number or a range, with '+' between several")]
    Vcpus(String),
    #[error("{0}")]
    Semantics(String),
    #[error("watch '{name}' covers {range}, which is not all guest RAM: {ram}")]
    OutsideMemory {
        name: String,
        range: String,
        ram: String,
    },
    #[error("watch '{name}' names VCPU {vcpu}, but the machine has {count}, counted from 0")]
    NoVcpu {
        name: String,
        vcpu: usize,
        count: usize,
    },
    #[error("there are two watches with the name '{0}': give each another")]
    NameTaken(String),
}

/// A range of guest memory whose accesses are to be reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchSpec {
    /// Empty: one is chosen.
    pub name: String,
    pub range: Range,
    pub sense: Sense,
    /// Whose accesses; `None` for all VCPUs.
    pub vcpus: Option<VcpuSet>,
    /// Instead of those of kind `watch`.
    pub semantics: Option<Semantics>,
}

impl FromStr for WatchSpec {
    type Err = WatchError;

    fn from_str(text: &str) -> Result<Self, WatchError> {
        let keys = ["name", "gpa", "access", "vcpus", "semantics"];
        let [name, gpa, access, vcpus, semantics] =
            keyed::values(text, keys).map_err(WatchError::Keys)?;
        let sense = match access.unwrap_or("w") {
            "r" => Sense::READ,
            "w" => Sense::WRITE,
            "rw" | "wr" => Sense::BOTH,
            other => return Err(WatchError::Access(other.into())),
        };
        let semantics = semantics.map(str::parse).transpose();
        Ok(Self {
            name: name.map(checked_name).transpose()?.unwrap_or_default(),
            range: gpa.ok_or(WatchError::NoRange).and_then(range)?,
            sense,
            vcpus: vcpus.map(set).transpose()?.flatten(),
            semantics: semantics.map_err(|e: trapline_trace::kind::UnknownWord| {
                WatchError::Semantics(e.to_string())
            })?,
        })
    }
}

impl WatchSpec {
    /// Whether a machine with so many VCPUs and bytes of memory can have it.
    pub fn check(&self, vcpus: usize, memory_bytes: u64) -> Result<(), WatchError> {
        let name = || self.name.clone();
        let ram = guest_ram(memory_bytes);
        if !ram.iter().any(|ram| ram.contains(&self.range)) {
            let pieces: Vec<String> = ram.iter().map(shown).collect();
            return Err(WatchError::OutsideMemory {
                name: name(),
                range: shown(&self.range),
                ram: format!("RAM is {}", pieces.join(" and ")),
            });
        }
        let all = VcpuSet::first(vcpus);
        let missing = self
            .vcpus
            .and_then(|set| set.iter().find(|v| !all.contains(*v)));
        match missing {
            None => Ok(()),
            Some(vcpu) => Err(WatchError::NoVcpu {
                name: name(),
                vcpu: vcpu.index(),
                count: vcpus,
            }),
        }
    }
}

/// A range as its user writes it.
pub fn shown(range: &Range) -> String {
    format!("{:#x}-{:#x}", range.lo, range.hi)
}

/// The kinds of access as their user writes them.
pub fn shown_sense(sense: Sense) -> &'static str {
    match (sense.read, sense.write) {
        (true, true) => "rw",
        (true, false) => "r",
        _ => "w",
    }
}

/// A set of VCPUs as its user writes it.
pub fn shown_vcpus(set: VcpuSet) -> String {
    let members: Vec<String> = set.iter().map(|v| v.index().to_string()).collect();
    members.join("+")
}

impl fmt::Display for WatchSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.name.is_empty() {
            write!(f, "name={},", self.name)?;
        }
        let (range, access) = (shown(&self.range), shown_sense(self.sense));
        let vcpus = self.vcpus.map_or("all".into(), shown_vcpus);
        write!(f, "gpa={range},access={access},vcpus={vcpus}")?;
        self.semantics
            .map_or(Ok(()), |semantics| write!(f, ",semantics={semantics}"))
    }
}

fn checked_name(name: &str) -> Result<String, WatchError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(fits) {
        return Err(WatchError::Name(name.into()));
    }
    Ok(name.into())
}

fn number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    // The parser would take a sign.
    let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, radix).ok())?
}

fn range(text: &str) -> Result<Range, WatchError> {
    let wrong = || WatchError::Range(text.into());
    let (lo, hi) = if let Some((lo, hi)) = text.split_once('-') {
        (number(lo), number(hi))
    } else if let Some((lo, length)) = text.split_once('+') {
        let lo = number(lo);
        (
            lo,
            lo.zip(number(length)).and_then(|(l, n)| l.checked_add(n)),
        )
    } else {
        return Err(wrong());
    };
    let (lo, hi) = lo.zip(hi).ok_or_else(wrong)?;
    let range = Range::new(lo, hi);
    if range.is_empty() {
        return Err(WatchError::EmptyRange(text.into()));
    }
    Ok(range)
}

/// The VCPUs that `text` names; `None` for all.
fn set(text: &str) -> Result<Option<VcpuSet>, WatchError> {
    if text == "all" {
        return Ok(None);
    }
    let wrong = || WatchError::Vcpus(text.into());
    let index = |text: &str| {
        let vcpu = number(text).and_then(|n| usize::try_from(n).ok());
        vcpu.filter(|n| *n < trapline_trace::MAX_VCPUS)
            .ok_or_else(wrong)
    };
    let mut set = VcpuSet::EMPTY;
    for part in text.split('+') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (index(first)?, index(last)?);
        if first > last {
            return Err(wrong());
        }
        set = set.union((first..=last).map(trapline_trace::VcpuId::new).collect());
    }
    Ok(Some(set))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<WatchSpec, WatchError> {
        text.parse()
    }

    #[test]
    fn everything_but_the_range_has_a_default() {
        let spec = parse("gpa=0x1000-0x1008").unwrap();
        assert_eq!(spec.range, Range::new(0x1000, 0x1008));
        assert_eq!((spec.sense, spec.vcpus), (Sense::WRITE, None));
        assert_eq!(spec.to_string(), "gpa=0x1000-0x1008,access=w,vcpus=all");
    }

    #[test]
    fn every_key() {
        let text = "name=x.y,gpa=16+4,access=rw,vcpus=0-1+3,semantics=bracketing";
        let spec = parse(text).unwrap();
        assert_eq!(spec.name, "x.y");
        assert_eq!(spec.range, Range::new(16, 20));
        assert_eq!(spec.sense, Sense::BOTH);
        assert_eq!(spec.vcpus.map(VcpuSet::bits), Some(0b1011));
        assert_eq!(spec.semantics, Some(Semantics::Bracketing));
        assert_eq!(parse(&spec.to_string()), Ok(spec));
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (text, hint) in [
            ("", "''"),
            ("name=a", "gpa=LO-HI"),
            ("gpa=5", "'5'"),
            ("gpa=-5-7", "'-5-7'"),
            ("gpa=+5-7", "'+5-7'"),
            ("gpa=0x-0x9", "'0x-0x9'"),
            ("gpa=8-8", "empty"),
            ("gpa=9-8", "inverted"),
            ("gpa=0xfffffffffffffff0+0x20", "'0xfffffffffffffff0+0x20'"),
            ("gpa=0-1,access=x", "'x'"),
            ("gpa=0-1,vcpus=1-0", "'1-0'"),
            ("gpa=0-1,vcpus=64", "'64'"),
            ("gpa=0-1,vcpus=", "''"),
            ("gpa=0-1,semantics=late", "'late'"),
            ("gpa=0-1,gpa=0-1", "twice"),
            ("gpa=0-1,size=8", "'size'"),
            ("gpa=0-1,name=a b", "'a b'"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[test]
    fn a_machine_must_have_the_memory_and_the_vcpus() {
        let check = |text| parse(text).unwrap().check(2, 16 << 20);
        assert_eq!(check("gpa=0-0x1000000,vcpus=0-1"), Ok(()));
        let error = check("name=far,gpa=0xffffff-0x1000001")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("'far'") && error.contains("0x1000000"),
            "{error}"
        );
        let error = check("gpa=0-1,vcpus=2").unwrap_err().to_string();
        assert!(
            error.contains("VCPU 2") && error.contains("has 2"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn nothing_panics(text in ".*", gpa in "[0-9a-fx+-]*", vcpus in "[0-9+-]*") {
            let _ = parse(&text);
            if let Ok(spec) = parse(&format!("gpa={gpa},vcpus={vcpus}")) {
                let _ = spec.check(2, 1 << 20);
            }
        }
    }
}
