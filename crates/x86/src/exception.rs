//! Exceptions: vectors, error codes and what else is saved with them (SDM vol. 3, chapter 6).

/// Vectors of the architecturally defined exceptions and interrupts (SDM vol. 3, table 6-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Vector {
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    X87FloatingPoint = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    SimdFloatingPoint = 19,
}

/// A synchronous exception raised by an instruction, not yet delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    pub vector: Vector,
    /// The error code, for the vectors that push one.
    pub error: Option<u32>,
    /// The faulting linear address, for page faults: goes to CR2 on delivery.
    pub cr2: Option<u64>,
    /// Bits to set in DR6, for debug exceptions.
    pub dr6: u64,
}

/// Error-code bits of a page fault (SDM vol. 3, 4.7).
pub mod page_fault {
    /// The fault was a protection violation; clear: a page was not present.
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    /// A reserved bit was set in a paging-structure entry.
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

/// Low bits of a selector error code (SDM vol. 3, 6.13).
pub mod selector_error {
    /// Raised while delivering an event external to the program.
    pub const EXT: u32 = 1 << 0;
    /// The index refers to the IDT.
    pub const IDT: u32 = 1 << 1;
    /// The index refers to the LDT (valid when `IDT` is clear).
    pub const TI: u32 = 1 << 2;
}

impl Exception {
    const fn new(vector: Vector, error: Option<u32>) -> Self {
        Self {
            vector,
            error,
            cr2: None,
            dr6: 0,
        }
    }
    /// #DE
    pub const fn divide_error() -> Self {
        Self::new(Vector::DivideError, None)
    }
    /// #DB with the DR6 bits that it reports.
    pub const fn debug(dr6: u64) -> Self {
        Self {
            vector: Vector::Debug,
            error: None,
            cr2: None,
            dr6,
        }
    }
    /// #UD
    pub const fn invalid_opcode() -> Self {
        Self::new(Vector::InvalidOpcode, None)
    }
    /// #NM
    pub const fn device_not_available() -> Self {
        Self::new(Vector::DeviceNotAvailable, None)
    }
    /// #GP
    pub const fn general_protection(error: u32) -> Self {
        Self::new(Vector::GeneralProtection, Some(error))
    }
    /// #SS
    pub const fn stack_fault(error: u32) -> Self {
        Self::new(Vector::StackFault, Some(error))
    }
    /// #TS
    pub const fn invalid_tss(error: u32) -> Self {
        Self::new(Vector::InvalidTss, Some(error))
    }
    /// #NP
    pub const fn segment_not_present(error: u32) -> Self {
        Self::new(Vector::SegmentNotPresent, Some(error))
    }
    /// #PF at a linear address, with [`page_fault`] bits.
    pub const fn page_fault(linear: u64, error: u32) -> Self {
        Self {
            vector: Vector::PageFault,
            error: Some(error),
            cr2: Some(linear),
            dr6: 0,
        }
    }
    /// #AC
    pub const fn alignment_check() -> Self {
        Self::new(Vector::AlignmentCheck, Some(0))
    }
    /// The exception that the host processor raised for the same instruction; `None` for a vector
    /// that no unprivileged instruction raises.
    pub const fn from_host_vector(vector: u8) -> Option<Self> {
        Some(match vector {
            0 => Self::divide_error(),
            6 => Self::invalid_opcode(),
            13 => Self::general_protection(0),
            16 => Self::new(Vector::X87FloatingPoint, None),
            17 => Self::alignment_check(),
            19 => Self::new(Vector::SimdFloatingPoint, None),
            _ => return None,
        })
    }

    /// Whether the saved instruction pointer is that of the instruction itself. #BP and #OF are
    /// traps; a debug exception may be either, and its raiser sets the instruction pointer.
    pub const fn is_fault(&self) -> bool {
        !matches!(
            self.vector,
            Vector::Breakpoint | Vector::Overflow | Vector::Debug
        )
    }

    /// Whether this exception counts as contributory in the double-fault rules (SDM vol. 3,
    /// table 6-5).
    pub const fn is_contributory(&self) -> bool {
        matches!(
            self.vector,
            Vector::DivideError
                | Vector::InvalidTss
                | Vector::SegmentNotPresent
                | Vector::StackFault
                | Vector::GeneralProtection
        )
    }
}
