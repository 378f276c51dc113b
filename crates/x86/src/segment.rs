//! Segment registers: the visible selector and the hidden part (SDM vol. 3, 3.4.3).

/// Segment registers in the order of their encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SegmentRegister {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// Access rights of a loaded segment, laid out as in a VMX guest-state area (SDM vol. 3, table
/// 24-2): type in bits 0 to 3, S 4, DPL 5 and 6, P 7, AVL 12, L 13, D/B 14, G 15, and bit 16 set
/// for an unusable (null) segment.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Rights(pub u32);

impl Rights {
    /// Accessed.
    pub const ACCESSED: u32 = 1 << 0;
    /// Writable, for data; readable, for code.
    pub const WRITABLE_OR_READABLE: u32 = 1 << 1;
    /// Expand-down, for data; conforming, for code.
    pub const EXPAND_DOWN_OR_CONFORMING: u32 = 1 << 2;
    /// Of a TSS: its task runs, or another is nested in it.
    pub const BUSY: u32 = 1 << 1;
    /// Code, not data (when [`Self::S`] is set).
    pub const CODE: u32 = 1 << 3;
    /// Code or data, not system.
    pub const S: u32 = 1 << 4;
    pub const P: u32 = 1 << 7;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;

    /// A null segment: every access through it faults (outside 64-bit mode).
    pub const fn unusable() -> Self {
        Self(Self::UNUSABLE)
    }
    /// The type field, bits 0 to 3.
    pub const fn kind(self) -> u8 {
        (self.0 & 0xf) as u8
    }
    pub const fn dpl(self) -> u8 {
        ((self.0 >> 5) & 3) as u8
    }
    pub const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
    pub const fn is_unusable(self) -> bool {
        self.has(Self::UNUSABLE)
    }
    pub const fn is_code(self) -> bool {
        self.has(Self::S) && self.has(Self::CODE)
    }
    /// A data segment, or a code segment that may be read.
    pub const fn is_readable(self) -> bool {
        self.has(Self::S) && (!self.has(Self::CODE) || self.has(Self::WRITABLE_OR_READABLE))
    }
    pub const fn is_writable_data(self) -> bool {
        self.has(Self::S) && !self.has(Self::CODE) && self.has(Self::WRITABLE_OR_READABLE)
    }
    pub const fn is_conforming(self) -> bool {
        self.is_code() && self.has(Self::EXPAND_DOWN_OR_CONFORMING)
    }
    pub const fn is_expand_down(self) -> bool {
        self.has(Self::S) && !self.has(Self::CODE) && self.has(Self::EXPAND_DOWN_OR_CONFORMING)
    }
    /// A copy with another DPL.
    pub const fn with_dpl(self, dpl: u8) -> Self {
        Self((self.0 & !(3 << 5)) | ((dpl as u32 & 3) << 5))
    }
}

impl std::fmt::Debug for Rights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#07x}", self.0)
    }
}

/// A segment register: selector and the hidden part that was loaded with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Segment {
    pub base: u64,
    /// The last valid offset in bytes, granularity applied.
    pub limit: u32,
    pub rights: Rights,
    pub selector: u16,
}

impl Segment {
    /// A segment as a load in real mode leaves it: base is the selector times 16, limit and rights
    /// are kept by the processor and here given as after reset.
    pub const fn real(selector: u16) -> Self {
        Self {
            base: (selector as u64) << 4,
            limit: 0xffff,
            rights: Rights(Rights::P | Rights::S | Rights::WRITABLE_OR_READABLE | Rights::ACCESSED),
            selector,
        }
    }
    /// A null segment with the given selector (0 to 3).
    pub const fn null(selector: u16) -> Self {
        Self {
            base: 0,
            limit: 0,
            rights: Rights::unusable(),
            selector,
        }
    }
    /// The selector's requested privilege level.
    pub const fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct TableRegister {
    pub base: u64,
    /// The last valid offset in bytes.
    pub limit: u16,
}
