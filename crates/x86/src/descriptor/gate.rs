//! Gates: call gates of the GDT and LDT, all gates of the IDT (SDM vol. 3, 5.8.3, 6.11, 6.14.1).

use super::{RawDescriptor, Selector, SystemType};

/// What a gate does and how wide its frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateKind {
    Call16,
    Call32,
    Call64,
    Task,
    Interrupt16,
    Interrupt32,
    Interrupt64,
    Trap16,
    Trap32,
    Trap64,
}

impl GateKind {
    /// The width in bits of what is pushed through the gate; 0 for a task gate.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Call16 | Self::Interrupt16 | Self::Trap16 => 16,
            Self::Call32 | Self::Interrupt32 | Self::Trap32 => 32,
            Self::Call64 | Self::Interrupt64 | Self::Trap64 => 64,
            Self::Task => 0,
        }
    }
    /// Delivery clears RFLAGS.IF.
    pub const fn is_interrupt(self) -> bool {
        matches!(
            self,
            Self::Interrupt16 | Self::Interrupt32 | Self::Interrupt64
        )
    }
    /// May stand in the IDT.
    pub const fn is_event(self) -> bool {
        !matches!(self, Self::Call16 | Self::Call32 | Self::Call64)
    }
    const fn system_type(self) -> SystemType {
        match self {
            Self::Call16 => SystemType::CallGate16,
            Self::Call32 | Self::Call64 => SystemType::CallGate,
            Self::Task => SystemType::TaskGate,
            Self::Interrupt16 => SystemType::InterruptGate16,
            Self::Interrupt32 | Self::Interrupt64 => SystemType::InterruptGate,
            Self::Trap16 => SystemType::TrapGate16,
            Self::Trap32 | Self::Trap64 => SystemType::TrapGate,
        }
    }
}

/// A gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    pub kind: GateKind,
    /// Of the code segment, or of the TSS for a task gate.
    pub selector: Selector,
    pub offset: u64,
    pub dpl: u8,
    pub present: bool,
    /// The interrupt stack, 1 to 7, or 0; 64-bit gates of the IDT.
    pub ist: u8,
    /// Parameters copied to the new stack, 0 to 31; 16- and 32-bit call gates.
    pub parameters: u8,
}

impl Gate {
    /// Reads a gate. `high` is the next eight bytes: in long mode gates have 16 bytes; otherwise
    /// it is ignored. `None` if the type is no gate, or the upper half of a 64-bit call gate is
    /// malformed (its type field must be clear).
    pub const fn parse(low: u64, high: u64, long_mode: bool) -> Option<Self> {
        let raw = RawDescriptor(low);
        let Some(system) = raw.system_type(long_mode) else {
            return None;
        };
        let kind = match (system, long_mode) {
            (SystemType::CallGate16, _) => GateKind::Call16,
            (SystemType::CallGate, false) => GateKind::Call32,
            (SystemType::CallGate, true) => {
                if high & (0x1f << 40) != 0 {
                    return None;
                }
                GateKind::Call64
            }
            (SystemType::TaskGate, _) => GateKind::Task,
            (SystemType::InterruptGate16, _) => GateKind::Interrupt16,
            (SystemType::InterruptGate, false) => GateKind::Interrupt32,
            (SystemType::InterruptGate, true) => GateKind::Interrupt64,
            (SystemType::TrapGate16, _) => GateKind::Trap16,
            (SystemType::TrapGate, false) => GateKind::Trap32,
            (SystemType::TrapGate, true) => GateKind::Trap64,
            _ => return None,
        };
        let offset = match kind.bits() {
            0 => 0,
            16 => low & 0xffff,
            32 => (low & 0xffff) | ((low >> 32) & 0xffff_0000),
            _ => (low & 0xffff) | ((low >> 32) & 0xffff_0000) | (high << 32),
        };
        Some(Self {
            kind,
            selector: Selector((low >> 16) as u16),
            offset,
            dpl: raw.dpl(),
            present: raw.is_present(),
            ist: match kind {
                GateKind::Interrupt64 | GateKind::Trap64 => (low >> 32) as u8 & 7,
                _ => 0,
            },
            parameters: match kind {
                GateKind::Call16 | GateKind::Call32 => (low >> 32) as u8 & 0x1f,
                _ => 0,
            },
        })
    }

    /// The gate as it stands in its table: low and high eight bytes; the high ones count for
    /// 64-bit gates only.
    pub const fn raw(&self) -> [u64; 2] {
        let system = self.kind.system_type() as u64;
        let low = (self.offset & 0xffff)
            | ((self.selector.0 as u64) << 16)
            | (((self.ist & 7) as u64 | (self.parameters & 0x1f) as u64) << 32)
            | (system << 40)
            | (((self.dpl & 3) as u64) << 45)
            | ((self.present as u64) << 47)
            | if self.kind.bits() >= 32 {
                (self.offset & 0xffff_0000) << 32
            } else {
                0
            };
        [
            low,
            if self.kind.bits() == 64 {
                self.offset >> 32
            } else {
                0
            },
        ]
    }
}
