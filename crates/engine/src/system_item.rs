//! What the processor reads of the guest's descriptor tables and task-state segments, and what it
//! makes of the bytes. The environment may keep it decoded ([`Environment::shadowed`]).
//!
//! [`Environment::shadowed`]: crate::env::Environment::shadowed

use trapline_x86::Segment;
use trapline_x86::descriptor::{Gate, RawDescriptor, Selector, WideDescriptor};

/// One thing read at once from a descriptor table or a task-state segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SystemItem {
    /// Eight bytes of the GDT or LDT.
    Segment,
    /// A system segment of long mode, 16 bytes.
    WideSegment,
    /// A gate of the IDT outside long mode, eight bytes.
    Gate,
    /// A gate of the IDT in long mode, 16 bytes.
    WideGate,
    /// A stack pointer, or its segment's selector, in a task-state segment: 2, 4 or 8 bytes.
    Stack(u8),
}

impl SystemItem {
    /// Its size in bytes, 2 to 16.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Segment | Self::Gate => 8,
            Self::WideSegment | Self::WideGate => 16,
            Self::Stack(bytes) => bytes as usize,
        }
    }

    /// Decodes it. `low` holds the first eight bytes, or as many as there are, `high` the rest.
    pub const fn decode(self, low: u64, high: u64) -> Decoded {
        match self {
            Self::Segment | Self::WideSegment => {
                let wide = WideDescriptor {
                    low: RawDescriptor(low),
                    high,
                };
                let mut segment = wide.low.segment(Selector(0));
                segment.base = wide.base();
                Decoded::Segment {
                    raw: low,
                    high,
                    segment,
                }
            }
            Self::Gate => Decoded::Gate(Gate::parse(low, 0, false)),
            Self::WideGate => Decoded::Gate(Gate::parse(low, high, true)),
            Self::Stack(_) => Decoded::Stack(low),
        }
    }
}

/// A [`SystemItem`] decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    Segment {
        raw: u64,
        /// Bytes 8 to 15 of a wide one, else 0.
        high: u64,
        /// Its selector is 0: which one it is loaded by does not stand in the table.
        segment: Segment,
    },
    /// `None` if its type is no gate.
    Gate(Option<Gate>),
    Stack(u64),
}
