//! Selectors, segment and system descriptors, gates, task-state segments, and the checks made when
//! a segment register is loaded (SDM vol. 3, chapters 3, 5, 6 and 8).
//!
//! Nothing here reads memory: whoever executes an instruction fetches the descriptor, asks a check
//! what loading it gives, and writes back the accessed or busy bit.

mod check;
mod gate;
pub mod tss;

#[cfg(test)]
mod tests;

pub use check::{
    GateUse, check_data_load, check_far_transfer, check_gate_target, check_ldt_load, check_return,
    check_stack_load, check_stack_switch, check_task_load, null_stack_load, survives_return,
};
pub use gate::{Gate, GateKind};

use crate::exception::selector_error;
use crate::segment::{Rights, Segment};

/// A segment selector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Selector(pub u16);

impl Selector {
    /// The descriptor's number in its table.
    pub const fn index(self) -> u16 {
        self.0 >> 3
    }
    /// The descriptor's first byte in its table.
    pub const fn offset(self) -> u16 {
        self.0 & !7
    }
    /// Refers to the LDT.
    pub const fn ti(self) -> bool {
        self.0 & 4 != 0
    }
    /// The requested privilege level.
    pub const fn rpl(self) -> u8 {
        (self.0 & 3) as u8
    }
    /// 0 to 3: no segment.
    pub const fn is_null(self) -> bool {
        self.0 & !3 == 0
    }
    pub const fn with_rpl(self, rpl: u8) -> Self {
        Self((self.0 & !3) | (rpl & 3) as u16)
    }
    /// The error code that names this selector, without EXT.
    pub const fn error(self) -> u32 {
        (self.0 & !3) as u32
    }
    /// Whether a table whose last byte is at `limit` holds `bytes` bytes of descriptor.
    pub const fn within(self, limit: u32, bytes: u32) -> bool {
        self.offset() as u32 + (bytes - 1) <= limit
    }
}

/// The error code of a fault concerning vector `vector`'s gate in the IDT.
pub const fn idt_error(vector: u8, external: bool) -> u32 {
    ((vector as u32) << 3) | selector_error::IDT | if external { selector_error::EXT } else { 0 }
}

/// System descriptors and gates by their type field (SDM vol. 3, table 3-2). In long mode the
/// 32-bit types are the 64-bit ones and the 16-bit types, except the LDT's, are reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SystemType {
    Tss16Available = 1,
    Ldt = 2,
    Tss16Busy = 3,
    CallGate16 = 4,
    TaskGate = 5,
    InterruptGate16 = 6,
    TrapGate16 = 7,
    TssAvailable = 9,
    TssBusy = 11,
    CallGate = 12,
    InterruptGate = 14,
    TrapGate = 15,
}

impl SystemType {
    /// `None` for a reserved type.
    pub const fn of(kind: u8, long_mode: bool) -> Option<Self> {
        Some(match kind {
            2 => Self::Ldt,
            9 => Self::TssAvailable,
            11 => Self::TssBusy,
            12 => Self::CallGate,
            14 => Self::InterruptGate,
            15 => Self::TrapGate,
            _ if long_mode => return None,
            1 => Self::Tss16Available,
            3 => Self::Tss16Busy,
            4 => Self::CallGate16,
            5 => Self::TaskGate,
            6 => Self::InterruptGate16,
            7 => Self::TrapGate16,
            _ => return None,
        })
    }
}

/// Eight bytes of a descriptor table, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct RawDescriptor(pub u64);

impl RawDescriptor {
    /// The accessed bit of a code or data segment.
    pub const ACCESSED: u64 = 1 << 40;
    /// The busy bit of a TSS.
    pub const BUSY: u64 = 1 << 41;
    /// Descriptor bits that go to bits 0 to 7 and 12 to 15 of [`Rights`].
    const RIGHTS: u32 = 0xf0ff;

    /// A descriptor of `base` and `limit` (the last valid offset). With [`Rights::G`] the limit
    /// counts in pages: its low 12 bits are dropped and read back as ones.
    pub const fn new(base: u32, limit: u32, rights: Rights) -> Self {
        let scaled = if rights.has(Rights::G) {
            limit >> 12
        } else {
            limit & 0xf_ffff
        };
        let low = ((base & 0xffff) << 16) | (scaled & 0xffff);
        let high = (base & 0xff00_0000)
            | (scaled & 0xf_0000)
            | ((rights.0 & Self::RIGHTS) << 8)
            | ((base >> 16) & 0xff);
        Self(((high as u64) << 32) | low as u64)
    }
    /// Flat 64-bit code of a privilege level.
    pub const fn code64(dpl: u8) -> Self {
        Self::new(0, u32::MAX, Rights(FLAT | CODE | Rights::L).with_dpl(dpl))
    }
    /// Flat 32-bit code of a privilege level.
    pub const fn code32(dpl: u8) -> Self {
        Self::new(0, u32::MAX, Rights(FLAT | CODE | Rights::DB).with_dpl(dpl))
    }
    /// Flat writable data of a privilege level.
    pub const fn data(dpl: u8) -> Self {
        Self::new(0, u32::MAX, Rights(FLAT | Rights::DB).with_dpl(dpl))
    }
    /// A system segment: an LDT or a TSS.
    pub const fn system(kind: SystemType, base: u32, limit: u32) -> Self {
        Self::new(base, limit, Rights(kind as u32 | Rights::P))
    }

    pub const fn base(self) -> u32 {
        ((self.0 >> 16) as u32 & 0xff_ffff) | ((self.0 >> 32) as u32 & 0xff00_0000)
    }
    /// The last valid offset in bytes, granularity applied.
    pub const fn limit(self) -> u32 {
        let scaled = (self.0 as u32 & 0xffff) | ((self.0 >> 32) as u32 & 0xf_0000);
        if self.rights().has(Rights::G) {
            (scaled << 12) | 0xfff
        } else {
            scaled
        }
    }
    pub const fn rights(self) -> Rights {
        Rights((self.0 >> 40) as u32 & Self::RIGHTS)
    }
    /// The type field.
    pub const fn kind(self) -> u8 {
        self.rights().kind()
    }
    pub const fn dpl(self) -> u8 {
        self.rights().dpl()
    }
    pub const fn is_present(self) -> bool {
        self.rights().has(Rights::P)
    }
    /// A system segment or gate, not code or data.
    pub const fn is_system(self) -> bool {
        !self.rights().has(Rights::S)
    }
    /// The type of a system segment or gate; `None` for code, data and reserved types.
    pub const fn system_type(self, long_mode: bool) -> Option<SystemType> {
        if self.is_system() {
            SystemType::of(self.kind(), long_mode)
        } else {
            None
        }
    }
    /// The segment register that loading this descriptor gives, unchecked.
    pub const fn segment(self, selector: Selector) -> Segment {
        Segment {
            base: self.base() as u64,
            limit: self.limit(),
            rights: self.rights(),
            selector: selector.0,
        }
    }
}

/// Present, code or data, page granularity, readable or writable, accessed.
const FLAT: u32 =
    Rights::P | Rights::S | Rights::G | Rights::WRITABLE_OR_READABLE | Rights::ACCESSED;
const CODE: u32 = Rights::CODE;

/// A 16-byte system descriptor of long mode: an LDT or a TSS anywhere in the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WideDescriptor {
    pub low: RawDescriptor,
    /// Bits 0 to 31: base bits 32 to 63. Bits 40 to 44 must be clear, so that the half cannot be
    /// taken for a descriptor.
    pub high: u64,
}

impl WideDescriptor {
    pub const fn new(kind: SystemType, base: u64, limit: u32) -> Self {
        Self {
            low: RawDescriptor::system(kind, base as u32, limit),
            high: base >> 32,
        }
    }
    pub const fn base(self) -> u64 {
        self.low.base() as u64 | (self.high << 32)
    }
    /// The upper half's type field is clear.
    pub const fn is_well_formed(self) -> bool {
        self.high & (0x1f << 40) == 0
    }
}
