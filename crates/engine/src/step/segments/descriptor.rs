//! Descriptors in the guest's tables: reading them, marking them used (SDM vol. 3, 3.4.5, 3.5).

use trapline_x86::control::dr7;
use trapline_x86::descriptor::{RawDescriptor, Selector, SystemType, WideDescriptor};
use trapline_x86::segment::Rights;
use trapline_x86::{Exception, Segment};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::system_item::{Decoded, SystemItem};
use crate::tlb::Privilege;

/// Eight bytes of a descriptor table and where they were found.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub selector: Selector,
    pub raw: RawDescriptor,
    /// Bytes 8 to 15 of a system descriptor of long mode, else 0.
    pub high: u64,
    /// The descriptor's linear address.
    pub linear: u64,
    /// What a segment register holds after loading it.
    segment: Segment,
}

impl Descriptor {
    pub const fn rights(&self) -> Rights {
        self.segment.rights
    }
    pub const fn base(&self) -> u64 {
        self.segment.base
    }
    /// The last valid offset, granularity applied.
    pub const fn limit(&self) -> u32 {
        self.segment.limit
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
    /// The error code that names this descriptor.
    pub const fn error(&self) -> u32 {
        self.selector.error()
    }
    /// The segment register's content after loading this descriptor, unchecked.
    pub const fn segment(&self) -> Segment {
        self.segment
    }
    /// With its second half, which only system descriptors of long mode have.
    pub const fn wide(&self) -> WideDescriptor {
        WideDescriptor {
            low: self.raw,
            high: self.high,
        }
    }
    /// The type of a system segment or gate; `None` for code, data and reserved types.
    pub const fn system_type(&self, long_mode: bool) -> Option<SystemType> {
        self.raw.system_type(long_mode)
    }
}

/// The linear address of a descriptor whose `len` bytes lie within its table.
fn descriptor_address<E: Environment>(
    core: &Core<'_, E>,
    selector: Selector,
    len: u32,
) -> Option<u64> {
    let cpu = &core.cpu;
    let (base, limit) = if !selector.ti() {
        (cpu.gdtr.base, u32::from(cpu.gdtr.limit))
    } else if cpu.ldtr.rights.is_unusable() || !cpu.ldtr.rights.has(Rights::P) {
        return None;
    } else {
        (cpu.ldtr.base, cpu.ldtr.limit)
    };
    let offset = u64::from(selector.offset());
    selector
        .within(limit, len)
        .then(|| base.wrapping_add(offset))
}

/// Reads a descriptor; `None` if it lies outside its table. System descriptors of long mode are
/// read whole.
///
/// # Errors
/// Page faults, restart.
pub fn lookup<E: Environment>(
    core: &mut Core<'_, E>,
    selector: Selector,
) -> Result<Option<Descriptor>, Fault> {
    let Some(linear) = descriptor_address(core, selector, 8) else {
        return Ok(None);
    };
    let found = read_descriptor(core, selector, linear, SystemItem::Segment)?;
    if core.cpu.long_mode() && found.is_system() && found.rights().kind() != 0 {
        if descriptor_address(core, selector, 16).is_none() {
            return Ok(None);
        }
        return read_descriptor(core, selector, linear, SystemItem::WideSegment).map(Some);
    }
    Ok(Some(found))
}

fn read_descriptor<E: Environment>(
    core: &mut Core<'_, E>,
    selector: Selector,
    linear: u64,
    item: SystemItem,
) -> Result<Descriptor, Fault> {
    let (raw, high, segment) = match read_item(core, linear, item)? {
        Decoded::Segment { raw, high, segment } => (raw, high, segment),
        Decoded::Gate(_) | Decoded::Stack(_) => (0, 0, Segment::null(0)),
    };
    let segment = Segment {
        selector: selector.0,
        ..segment
    };
    Ok(Descriptor {
        selector,
        raw: RawDescriptor(raw),
        high,
        linear,
        segment,
    })
}

/// Reads an item of a descriptor table or a task-state segment, from the environment's shadow if it
/// keeps one.
///
/// # Errors
/// Page faults, restart.
pub fn read_item<E: Environment>(
    core: &mut Core<'_, E>,
    linear: u64,
    item: SystemItem,
) -> Result<Decoded, Fault> {
    let linear = core.wrap(linear);
    // Reads of a shadow would not meet the data breakpoints.
    if core.cpu.dr7 & dr7::ENABLES == 0
        && let Some(decoded) = core.env.shadowed(core.cpu, core.tlb, linear, item)?
    {
        return Ok(decoded);
    }
    let bytes = item.bytes();
    let low = core.read_sized(linear, bytes.min(8), Privilege::Supervisor)?;
    let high = if bytes > 8 {
        core.read::<8>(linear.wrapping_add(8), Privilege::Supervisor)?
    } else {
        0
    };
    Ok(item.decode(low, high))
}

/// Reads a descriptor that must lie within its table.
///
/// # Errors
/// What `outside` makes of the selector; page faults, restart.
pub fn fetch<E: Environment>(
    core: &mut Core<'_, E>,
    selector: Selector,
    outside: fn(u32) -> Exception,
    ext: u32,
) -> Result<Descriptor, Fault> {
    match lookup(core, selector)? {
        Some(found) => Ok(found),
        None => Err(outside(selector.error() | ext).into()),
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

/// Replaces the byte with type, S, DPL and P of a descriptor in memory by a locked access, as
/// processors do (SDM vol. 3, 8.1.2.1).
///
/// # Errors
/// Page faults; restart, also when the descriptor has changed since it was read.
pub fn write_type<E: Environment>(
    core: &mut Core<'_, E>,
    descriptor: &Descriptor,
    rights: u32,
) -> Result<(), Fault> {
    let byte = descriptor.linear.wrapping_add(5);
    core.exchange_byte(byte, (descriptor.raw.0 >> 40) as u8, rights as u8)
}
