//! The memory that generated code addresses by displacements from its stack pointer: what it needs
//! of one VCPU's state, the look-up tables of its TLB and of its jumps.
//!
//! The layout is a contract among the emitters ([`crate::translate`]), the TLB ([`crate::tlb`])
//! and whoever calls generated code. While generated code runs, the host's RSP is
//! [`Frame::stack_pointer`]: fields lie above it, a stack for calls and signals below it.
//!
//! RSP's low six bits are 12 then, so that a shift by RSP (SHRX takes its count from a register,
//! modulo 64) gives an address's page number without touching a flag. Its low 16 bits, 0x100c, make
//! BEXTR by RSP extract the 16 bits from bit 12 on: the slot of an address.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Bytes below the stack pointer: for a return address and for signal frames.
const STACK_BYTES: usize = 256 << 10;
/// From the stack pointer to the first field.
pub const SKEW: i32 = 52;
/// The low 16 bits of the stack pointer, and what they are of.
const STACK_POINTER: usize = 0x100c;
const ALIGNMENT: usize = 1 << 16;

/// Slots of each look-up table: a 16-bit index takes no masking.
pub const SLOTS: usize = 1 << 16;
const TABLE_BYTES: usize = SLOTS * 8;
/// Data tables of the TLB: three privileges, reads and writes.
pub const TLB_TABLES: usize = 6;
/// Jump tables: one for each privilege.
pub const JUMP_TABLES: usize = 3;
/// Cells, each for one target of jumps and calls to a constant address.
pub const JUMP_CELLS: usize = 1 << 17;
/// Gaps between traces that can be open at once: one for each low byte of an address.
pub const GAPS: usize = 256;

/// Offsets of the fields in bytes from the first one.
pub mod field {
    /// The general-purpose registers, in the order of their encoding.
    pub const GPR: i32 = 0;
    /// RIP where generated code leaves.
    pub const RIP: i32 = 128;
    /// The status flags: OF in the low byte (0 or 1), the others as LAHF gives them in the high.
    pub const FLAGS: i32 = 136;
    /// The same, while a look-up needs the flags for itself.
    pub const KEPT_FLAGS: i32 = 138;
    /// Pointer to the VCPU's attention word.
    pub const ATTENTION: i32 = 144;
    /// The host's stack pointer outside generated code.
    pub const HOST_STACK: i32 = 152;
    /// Pointer to the vector state in the VCPU's registers.
    pub const VECTOR: i32 = 160;
    /// What the helpers work on.
    pub const CONTEXT: i32 = 168;
    /// The helper for a look-up that missed.
    pub const MISS: i32 = 176;
    /// The helper that executes one instruction.
    pub const ASSIST: i32 = 184;
    /// 0 while the guest's vector registers are in the host's.
    pub const VECTORS_AWAY: i32 = 192;
    /// The site by which generated code left.
    pub const EXIT: i32 = 200;
    /// The host's MXCSR.
    pub const HOST_MXCSR: i32 = 208;
    /// Where a helper goes back to; where a host fault happened.
    pub const RETURN: i32 = 216;
    /// The bases of FS and GS.
    pub const FS_BASE: i32 = 224;
    pub const GS_BASE: i32 = 232;
    /// The target of an indirect call while its return address is pushed.
    pub const TARGET: i32 = 240;
    /// What PUSH has read while its stack slot is looked up.
    pub const SPILL: i32 = 248;
    /// The address of a look-up that missed.
    pub const MISSED: i32 = 256;
    /// RFLAGS.IF, 0 or 1.
    pub const INTERRUPTS: i32 = 264;
    /// RFLAGS without the status flags, IF, AC and the bit that is always set.
    pub const OTHER_FLAGS: i32 = 272;
    /// IA32_KERNEL_GS_BASE.
    pub const KERNEL_GS_BASE: i32 = 280;
    /// PAUSE instructions to go until the thread may give up its turn.
    pub const PAUSES: i32 = 288;
    /// RFLAGS.AC, 0 or 1.
    pub const ACCESS: i32 = 296;
    /// Not 0 if there may be an interrupt to take as soon as RFLAGS.IF allows.
    pub const INTERRUPT_DUE: i32 = 304;
    /// Host addresses that several accesses of a block share.
    pub const SHARED: i32 = 312;
    /// How many of them.
    pub const SHARED_COUNT: usize = 6;
    /// The kind of the access that missed.
    pub const MISSED_KIND: i32 = SHARED + 8 * SHARED_COUNT as i32;
    /// An immediate that was read from guest memory.
    pub const IMMEDIATE: i32 = MISSED_KIND + 8;
    /// An operand that is read from two pages, with room to keep its place within 64 bytes.
    pub const OPERAND: i32 = 512;
    /// The tables begin.
    pub const TABLES: i32 = 4096;
}

/// Offset of a TLB table's page addresses, negated; a zero slot is empty (but for slot 0, see
/// [`empty`]).
pub const fn tlb_pages(table: usize) -> i32 {
    field::TABLES + (2 * table * TABLE_BYTES) as i32
}
/// Offset of a TLB table's host pages.
pub const fn tlb_hosts(table: usize) -> i32 {
    tlb_pages(table) + TABLE_BYTES as i32
}
/// Offset of a jump table's targets, negated.
pub const fn jump_targets(table: usize) -> i32 {
    field::TABLES + ((2 * TLB_TABLES + 2 * table) * TABLE_BYTES) as i32
}
/// Offset of a jump table's host addresses.
pub const fn jump_hosts(table: usize) -> i32 {
    jump_targets(table) + TABLE_BYTES as i32
}

/// Offset of a cell: the host address where a jump goes.
pub const fn jump_cell(cell: u32) -> i32 {
    jump_targets(JUMP_TABLES) + (cell as i32 & (JUMP_CELLS as i32 - 1)) * 8
}

/// Offset of the gaps' linear addresses, negated.
pub const fn gap_addresses() -> i32 {
    jump_targets(JUMP_TABLES) + (JUMP_CELLS * 8) as i32
}
/// Offset of the gaps' kinds of access, negated.
pub const fn gap_kinds() -> i32 {
    gap_addresses() + (GAPS * 8) as i32
}
/// Offset of the gaps' host addresses.
pub const fn gap_hosts() -> i32 {
    gap_kinds() + (GAPS * 8) as i32
}

const FIELD_BYTES: usize = gap_hosts() as usize + GAPS * 8;
const BYTES: usize = STACK_BYTES + STACK_POINTER + SKEW as usize + FIELD_BYTES + ALIGNMENT;

/// What an empty slot holds: no address with this index gives an offset below 4096 when it is
/// added, nor does one of the bytes behind that address that an access may cover. Fresh memory is
/// right for all but the first slot and the last, whose addresses may be just below 2^64.
pub const fn empty(slot: usize) -> u64 {
    match slot {
        0 => 4096,
        LAST_SLOT => 8192,
        _ => 0,
    }
}

const LAST_SLOT: usize = SLOTS - 1;

/// One VCPU's frame.
pub struct Frame {
    memory: NonNull<u8>,
}

// SAFETY: the mapping belongs to this value alone and is not bound to a thread.
unsafe impl Send for Frame {}

impl Default for Frame {
    /// # Panics
    /// The host refuses the address space (some megabytes, of which only what is used costs memory).
    fn default() -> Self {
        // SAFETY: a new mapping at an address that the kernel chooses.
        let memory = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        let memory = memory
            .ok()
            .and_then(|p| NonNull::new(p.cast::<u8>()))
            .unwrap_or_else(|| panic!("the host refused {BYTES} bytes of address space"));
        let mut frame = Self { memory };
        for table in 0..TLB_TABLES {
            frame.set(tlb_pages(table), empty(0));
            frame.set_slot(tlb_pages(table), LAST_SLOT, empty(LAST_SLOT));
        }
        for table in 0..JUMP_TABLES {
            frame.set(jump_targets(table), empty(0));
            frame.set_slot(jump_targets(table), LAST_SLOT, empty(LAST_SLOT));
        }
        frame
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        // SAFETY: the mapping made above; the call cannot fail for it.
        let _ = unsafe { munmap(self.memory.as_ptr().cast(), BYTES) };
    }
}

impl Frame {
    fn fields(&self) -> *mut u8 {
        let start = self.memory.as_ptr() as usize;
        let offset = start.wrapping_neg() % ALIGNMENT + STACK_BYTES + STACK_POINTER + SKEW as usize;
        // SAFETY: within the mapping, which has room for the alignment.
        unsafe { self.memory.as_ptr().add(offset) }
    }

    /// RSP in generated code.
    pub fn stack_pointer(&self) -> u64 {
        self.fields() as u64 - SKEW as u64
    }

    #[inline(always)]
    fn place(&self, offset: i32) -> *mut u64 {
        let offset = (offset as usize).min(FIELD_BYTES - 8) & !7;
        // SAFETY: within the mapping.
        unsafe { self.fields().add(offset).cast() }
    }

    /// The field (eight bytes) at an offset.
    #[inline(always)]
    pub fn get(&self, offset: i32) -> u64 {
        // SAFETY: within the mapping and aligned; only this VCPU's thread uses it.
        unsafe { self.place(offset).read() }
    }

    /// Sets the field (eight bytes) at an offset.
    #[inline(always)]
    pub fn set(&mut self, offset: i32, value: u64) {
        // SAFETY: as in `get`.
        unsafe { self.place(offset).write(value) }
    }

    /// Keeps the bytes (at most 64) of an operand at `linear` for generated code to read: at the host
    /// address that this gives, which is as aligned as `linear` is, up to 64 bytes.
    pub fn keep_operand(&mut self, linear: u64, bytes: &[u8]) -> u64 {
        let len = bytes.len().min(64);
        // SAFETY: 128 bytes from that field on are its own; at most 63 + 64 are used.
        unsafe {
            let place = self.fields().add(field::OPERAND as usize);
            let place = place.add((linear & 63) as usize);
            place.copy_from_nonoverlapping(bytes.as_ptr(), len);
            place as u64
        }
    }

    /// What one of the tables of gaps holds.
    pub fn gap(&self, table: i32, slot: usize) -> u64 {
        self.get(table + ((slot & (GAPS - 1)) * 8) as i32)
    }

    /// Sets what one of the tables of gaps holds.
    pub fn set_gap(&mut self, table: i32, slot: usize, value: u64) {
        self.set(table + ((slot & (GAPS - 1)) * 8) as i32, value);
    }

    /// A slot of the table at an offset.
    #[inline(always)]
    pub fn slot(&self, table: i32, slot: usize) -> u64 {
        self.get(table + ((slot & (SLOTS - 1)) * 8) as i32)
    }

    /// Sets a slot of the table at an offset.
    #[inline(always)]
    pub fn set_slot(&mut self, table: i32, slot: usize, value: u64) {
        self.set(table + ((slot & (SLOTS - 1)) * 8) as i32, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifting_by_the_stack_pointer_gives_pages() {
        let frame = Frame::default();
        assert_eq!(frame.stack_pointer() % 64, 12);
        // BEXTR: start in the low byte, length in the next.
        assert_eq!(frame.stack_pointer() & 0xffff, 16 << 8 | 12);
        let last = frame.fields() as usize + FIELD_BYTES;
        assert!(last <= frame.memory.as_ptr() as usize + BYTES);
    }

    #[test]
    fn a_kept_operand_is_aligned_as_it_was() {
        let mut frame = Frame::default();
        for linear in [0xfff, 0x1ff1, 0x2fc0, 0x7ff8] {
            let host = frame.keep_operand(linear, &[1, 2, 3, 4, 5, 6, 7, 8]);
            assert_eq!((host ^ linear) & 63, 0);
            let offset = host - frame.fields() as u64;
            assert!(offset >= field::OPERAND as u64 && offset < field::OPERAND as u64 + 64);
            assert_eq!(frame.get(field::OPERAND + 128), 0);
        }
    }

    #[test]
    fn an_empty_slot_matches_no_address() {
        let frame = Frame::default();
        for address in [
            0u64,
            0xfff,
            0x1000,
            0xffff_ffff_ffff_ffff,
            0xffff_ffff_ffff_f000,
            0xffff_ffff_ffff_fff9,
            0xffff_ffff_ffff_ffc1,
            0x0fff_ffff,
            0xffff_ffff_f000_0000,
            0x1000_0000,
            0x1000_1000,
        ] {
            let slot = (address >> 12) as usize & (SLOTS - 1);
            for table in 0..TLB_TABLES {
                let offset = address.wrapping_add(frame.slot(tlb_pages(table), slot));
                assert!(offset >= 4096, "{address:#x}");
                // As the look-up without flags compares: the page of the last byte.
                for size in [1u64, 2, 8, 64, 1024] {
                    let last = offset.wrapping_add(size - 1);
                    assert!(last >> 12 != 0, "{address:#x}, {size} bytes");
                }
            }
        }
    }

    #[test]
    fn tables_do_not_overlap() {
        let last = jump_hosts(JUMP_TABLES - 1) as usize + TABLE_BYTES;
        assert_eq!(last, jump_cell(0) as usize);
        assert_eq!(jump_cell(JUMP_CELLS as u32 - 1) + 8, gap_addresses());
        assert_eq!(
            jump_targets(0),
            tlb_hosts(TLB_TABLES - 1) + TABLE_BYTES as i32
        );
    }
}
