//! What traces are for, what they sense, and how their events are made known.

use std::fmt;
use std::str::FromStr;

/// A half-open range of guest-physical bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    pub lo: u64,
    pub hi: u64,
}

impl Range {
    pub const fn new(lo: u64, hi: u64) -> Self {
        Self { lo, hi }
    }
    pub const fn is_empty(&self) -> bool {
        self.lo >= self.hi
    }
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.lo < other.hi && other.lo < self.hi
    }
    pub const fn contains(&self, other: &Self) -> bool {
        self.lo <= other.lo && other.hi <= self.hi
    }
}

/// What is derived from the traced bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    Code,
    Mmu,
    Descriptor,
    Device,
    Share,
    Watch,
}

impl Kind {
    pub const ALL: [Self; 6] = [
        Self::Code,
        Self::Mmu,
        Self::Descriptor,
        Self::Device,
        Self::Share,
        Self::Watch,
    ];

    /// The semantics unless overridden (\[0082\], \[0085\], \[0087\] of the seed).
    pub const fn default_semantics(self) -> Semantics {
        match self {
            Self::Code | Self::Share => Semantics::Bracketing,
            Self::Descriptor => Semantics::PostWriteSync,
            Self::Mmu | Self::Watch | Self::Device => Semantics::PostWriteAsync,
        }
    }
}

/// The order of notification and write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Semantics {
    /// Notify; each consumer acknowledges at an instruction boundary and stalls; the write;
    /// consumers resume (\[0077\]).
    Bracketing,
    /// The write; notify; the actor waits for every acknowledgement, not for the processing
    /// (\[0078\]).
    PostWriteSync,
    /// The write; notify; the actor goes on (\[0078\]).
    PostWriteAsync,
    /// Notify of what is about to be written; the write (\[0081\]).
    PreWriteValue,
}

impl Semantics {
    pub const ALL: [Self; 4] = [
        Self::Bracketing,
        Self::PostWriteSync,
        Self::PostWriteAsync,
        Self::PreWriteValue,
    ];
}

/// A word that names no kind or semantics.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{word}' is no {what}; use one of {choices}")]
pub struct UnknownWord {
    word: String,
    what: &'static str,
    choices: &'static str,
}

const KINDS: &str = "code, mmu, descriptor, device, share, watch";
const SEMANTICS: &str = "bracketing, post-write-sync, post-write-async, pre-write-value";

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Code => "code",
            Self::Mmu => "mmu",
            Self::Descriptor => "descriptor",
            Self::Device => "device",
            Self::Share => "share",
            Self::Watch => "watch",
        })
    }
}

impl FromStr for Kind {
    type Err = UnknownWord;
    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        Self::ALL
            .into_iter()
            .find(|k| k.to_string() == word)
            .ok_or_else(|| UnknownWord {
                word: word.into(),
                what: "kind of trace",
                choices: KINDS,
            })
    }
}

impl fmt::Display for Semantics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bracketing => "bracketing",
            Self::PostWriteSync => "post-write-sync",
            Self::PostWriteAsync => "post-write-async",
            Self::PreWriteValue => "pre-write-value",
        })
    }
}

impl FromStr for Semantics {
    type Err = UnknownWord;
    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        Self::ALL
            .into_iter()
            .find(|s| s.to_string() == word)
            .ok_or_else(|| UnknownWord {
                word: word.into(),
                what: "trace semantics",
                choices: SEMANTICS,
            })
    }
}

/// Which accesses a trace senses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sense {
    pub read: bool,
    pub write: bool,
}

impl Sense {
    pub const READ: Self = Self {
        read: true,
        write: false,
    };
    pub const WRITE: Self = Self {
        read: false,
        write: true,
    };
    pub const BOTH: Self = Self {
        read: true,
        write: true,
    };

    /// Whether an access of kind `self` is one that `other` senses.
    pub const fn meets(self, other: Self) -> bool {
        (self.read && other.read) || (self.write && other.write)
    }
    pub const fn union(self, other: Self) -> Self {
        Self {
            read: self.read || other.read,
            write: self.write || other.write,
        }
    }
}

/// Whose access a trace event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Actor {
    Vcpu(crate::VcpuId),
    /// A device, by DMA.
    Device,
    Debugger,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip() {
        for kind in Kind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        for semantics in Semantics::ALL {
            assert_eq!(semantics.to_string().parse(), Ok(semantics));
        }
        let error = "codes".parse::<Kind>().unwrap_err().to_string();
        assert!(
            error.contains("'codes'") && error.contains("descriptor"),
            "{error}"
        );
    }

    #[test]
    fn ranges_are_half_open() {
        let r = Range::new(4, 8);
        assert!(r.overlaps(&Range::new(7, 9)));
        assert!(!r.overlaps(&Range::new(8, 9)));
        assert!(!r.overlaps(&Range::new(0, 4)));
    }
}
