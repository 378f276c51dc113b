//! Small pieces of work that the host processor does directly: comparing, moving and filling as
//! the string instructions define them.
#![allow(unsafe_code)]

use std::arch::asm;
use std::sync::atomic::{AtomicU8, Ordering};

use trapline_x86::control::rflags;

/// The status flags of CMP `left`, `right` with operands of `size` bytes.
pub fn compare_flags(left: u64, right: u64, size: usize) -> u64 {
    // Shifted to the top, a narrow comparison gives the wide one's CF, ZF, SF and OF; PF and AF
    // come from the low byte, so every size has its own instruction.
    let flags: u64;
    // SAFETY: the assembly compares two registers and reads the flags through the stack.
    unsafe {
        match size {
            1 => {
                asm!("cmp {l}, {r}", "pushfq", "pop {f}", l = in(reg_byte) left as u8, r = in(reg_byte) right as u8, f = lateout(reg) flags)
            }
            2 => {
                asm!("cmp {l:x}, {r:x}", "pushfq", "pop {f}", l = in(reg) left, r = in(reg) right, f = lateout(reg) flags)
            }
            4 => {
                asm!("cmp {l:e}, {r:e}", "pushfq", "pop {f}", l = in(reg) left, r = in(reg) right, f = lateout(reg) flags)
            }
            _ => {
                asm!("cmp {l}, {r}", "pushfq", "pop {f}", l = in(reg) left, r = in(reg) right, f = lateout(reg) flags)
            }
        }
    }
    flags & rflags::STATUS
}

/// REP MOVS upwards: element by element where the ranges overlap so that it shows.
pub(super) fn move_elements(to: *mut u8, from: *const u8, bytes: usize, size: usize) {
    let distance = (to as usize).wrapping_sub(from as usize);
    // SAFETY: the caller found both ranges within directly accessible guest pages.
    unsafe {
        if distance >= bytes {
            std::ptr::copy(from, to, bytes);
            return;
        }
        // The destination starts inside the source: earlier elements feed later ones.
        let mut at = 0;
        while at < bytes {
            std::ptr::copy(from.add(at), to.add(at), size);
            at += size;
        }
    }
}

/// REP STOS upwards.
pub(super) fn fill(to: *mut u8, value: u64, elements: usize, size: usize) {
    let bytes = value.to_le_bytes();
    // SAFETY: the caller found the range within a directly accessible guest page.
    unsafe {
        if size == 1 || value == 0 {
            std::ptr::write_bytes(to, bytes[0], elements * size);
            return;
        }
        for n in 0..elements {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.add(n * size), size);
        }
    }
}

/// What a bit-string instruction does to its bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BitOperation {
    Test,
    Set,
    Reset,
    Complement,
}

/// Applies an operation to bit `index` (0 to 7) of a byte of guest memory; the old bit.
pub(super) fn bit(byte: *mut u8, index: u32, operation: BitOperation, locked: bool) -> bool {
    let mask = 1 << index;
    // SAFETY: the caller translated the byte for this access; other VCPUs reach it only by
    // accesses that the hardware makes atomic per byte.
    let byte = unsafe { AtomicU8::from_ptr(byte) };
    let old = if locked {
        match operation {
            BitOperation::Test => byte.load(Ordering::SeqCst),
            BitOperation::Set => byte.fetch_or(mask, Ordering::SeqCst),
            BitOperation::Reset => byte.fetch_and(!mask, Ordering::SeqCst),
            BitOperation::Complement => byte.fetch_xor(mask, Ordering::SeqCst),
        }
    } else {
        let old = byte.load(Ordering::Relaxed);
        match operation {
            BitOperation::Test => {}
            BitOperation::Set => byte.store(old | mask, Ordering::Relaxed),
            BitOperation::Reset => byte.store(old & !mask, Ordering::Relaxed),
            BitOperation::Complement => byte.store(old ^ mask, Ordering::Relaxed),
        }
        old
    };
    old & mask != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use trapline_x86::control::rflags::{AF, CF, OF, PF, SF, ZF};

    #[test]
    fn flags_of_every_size() {
        assert_eq!(compare_flags(5, 5, 1), ZF | PF);
        assert_eq!(compare_flags(0x100, 0, 1), ZF | PF);
        assert_eq!(compare_flags(0, 1, 2), CF | AF | SF | PF);
        assert_eq!(compare_flags(0x8000_0000, 1, 4), OF | AF | PF);
        assert_eq!(compare_flags(1 << 63, 1, 8), OF | AF | PF);
    }

    #[test]
    fn overlapping_moves_replicate() {
        let mut buffer = *b"abXXXXXX";
        let p = buffer.as_mut_ptr();
        move_elements(p.wrapping_add(2), p, 6, 2);
        assert_eq!(&buffer, b"abababab");
    }

    #[test]
    fn downward_overlap_is_a_plain_copy() {
        let mut buffer = *b"XXabcdef";
        let p = buffer.as_mut_ptr();
        move_elements(p, p.wrapping_add(2), 6, 1);
        assert_eq!(&buffer, b"abcdefef");
    }
}
