//! Descriptors in the guest's tables: reading them, marking them used (SDM vol. 3, 3.4.5, 3.5).

use trapline_x86::segment::Rights;
use trapline_x86::{Exception, Segment};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::tlb::Privilege;

/// System descriptor types (SDM vol. 3, table 3-2).
pub mod system_type {
    pub const TSS16_AVAILABLE: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS_AVAILABLE: u8 = 9;
    pub const TSS_BUSY: u8 = 11;
    pub const CALL_GATE: u8 = 12;
    pub const INTERRUPT_GATE: u8 = 14;
    pub const TRAP_GATE: u8 = 15;
}

/// The part of a selector that goes into an error code: index and table.
pub const fn selector_error(selector: u16) -> u32 {
    selector as u32 & 0xfffc
}

/// Whether a selector is null: index 0 of the GDT.
pub const fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// Eight bytes of a descriptor table and where they were found.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub selector: u16,
    pub raw: u64,
    /// Bytes 8 to 15 of a system descriptor of long mode, else 0.
    pub high: u64,
    /// The descriptor's linear address.
    pub linear: u64,
}

impl Descriptor {
    pub const fn rights(&self) -> Rights {
        Rights((self.raw >> 40) as u32 & 0xf0ff)
    }
    pub const fn base(&self) -> u64 {
        (self.raw >> 16 & 0xff_ffff) | (self.raw >> 32 & 0xff00_0000) | self.high << 32
    }
    /// The last valid offset, granularity applied.
    pub const fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff) as u32 | (self.raw >> 32) as u32 & 0xf_0000;
        if self.rights().has(Rights::G) {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }
    pub const fn is_system(&self) -> bool {
        !self.rights().has(Rights::S)
    }
    pub const fn is_present(&self) -> bool {
        self.rights().has(Rights::P)
    }
    pub const fn dpl(&self) -> u8 {
        self.rights().dpl()
    }
    pub const fn error(&self) -> u32 {
        selector_error(self.selector)
    }
    /// The segment register's content after loading this descriptor.
    pub const fn segment(&self) -> Segment {
        Segment {
            base: self.base(),
            limit: self.limit(),
            rights: self.rights(),
            selector: self.selector,
        }
    }
    /// A gate's target selector.
    pub const fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }
    /// A gate's target offset.
    pub const fn gate_offset(&self) -> u64 {
        self.raw & 0xffff | self.raw >> 32 & 0xffff_0000 | self.high << 32
    }
}

/// The linear address of a descriptor whose `len` bytes lie within its table.
fn descriptor_address<E: Environment>(core: &Core<'_, E>, selector: u16, len: u64) -> Option<u64> {
    let cpu = &core.cpu;
    let (base, limit) = if selector & 4 == 0 {
        (cpu.gdtr.base, u64::from(cpu.gdtr.limit))
    } else if cpu.ldtr.rights.is_unusable() || !cpu.ldtr.rights.has(Rights::P) {
        return None;
    } else {
        (cpu.ldtr.base, u64::from(cpu.ldtr.limit))
    };
    let offset = u64::from(selector & 0xfff8);
    (offset + len - 1 <= limit).then(|| base.wrapping_add(offset))
}

/// Reads a descriptor; `None` if it lies outside its table. System descriptors of long mode are
/// read whole.
///
/// # Errors
/// Page faults, restart.
pub fn lookup<E: Environment>(
    core: &mut Core<'_, E>,
    selector: u16,
) -> Result<Option<Descriptor>, Fault> {
    let Some(linear) = descriptor_address(core, selector, 8) else {
        return Ok(None);
    };
    let raw = core.read::<8>(linear, Privilege::Supervisor)?;
    let mut found = Descriptor {
        selector,
        raw,
        high: 0,
        linear,
    };
    if core.cpu.long_mode() && found.is_system() && found.rights().kind() != 0 {
        if descriptor_address(core, selector, 16).is_none() {
            return Ok(None);
        }
        found.high = core.read::<8>(linear.wrapping_add(8), Privilege::Supervisor)?;
    }
    Ok(Some(found))
}

/// Reads a descriptor that must lie within its table.
///
/// # Errors
/// What `outside` makes of the selector; page faults, restart.
pub fn fetch<E: Environment>(
    core: &mut Core<'_, E>,
    selector: u16,
    outside: fn(u32) -> Exception,
    ext: u32,
) -> Result<Descriptor, Fault> {
    match lookup(core, selector)? {
        Some(found) => Ok(found),
        None => Err(outside(selector_error(selector) | ext).into()),
    }
}

/// Sets the accessed bit of a code or data descriptor in memory, if clear.
///
/// # Errors
/// Page faults, restart.
pub fn mark_accessed<E: Environment>(
    core: &mut Core<'_, E>,
    descriptor: &Descriptor,
) -> Result<(), Fault> {
    if descriptor.rights().has(Rights::ACCESSED) {
        return Ok(());
    }
    write_type(core, descriptor, descriptor.rights().0 | Rights::ACCESSED)
}

/// Replaces the byte with type, S, DPL and P of a descriptor in memory.
///
/// # Errors
/// Page faults, restart.
pub fn write_type<E: Environment>(
    core: &mut Core<'_, E>,
    descriptor: &Descriptor,
    rights: u32,
) -> Result<(), Fault> {
    let byte = descriptor.linear.wrapping_add(5);
    core.write::<1>(byte, u64::from(rights & 0xff), Privilege::Supervisor)
}
