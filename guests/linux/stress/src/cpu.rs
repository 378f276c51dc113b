//! Instructions that Rust has no words for.

use std::arch::asm;

/// Serializes: whatever code was written before is what runs afterwards.
pub fn serialize() {
    // SAFETY: CPUID only writes the four registers, and RBX is put back.
    unsafe {
        asm!("mov {saved}, rbx", "cpuid", "mov rbx, {saved}", saved = out(reg) _,
            inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _);
    }
}

/// `lock inc byte`.
pub fn locked_increment_8(counter: *mut u8) {
    // SAFETY: the callers pass the address of a live counter that is only used by locked access.
    unsafe { asm!("lock inc byte ptr [{}]", in(reg) counter) }
}

/// `lock dec word`.
pub fn locked_decrement_16(counter: *mut u16) {
    // SAFETY: as above.
    unsafe { asm!("lock dec word ptr [{}]", in(reg) counter) }
}

/// `lock add dword`.
pub fn locked_add_32(counter: *mut u32, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("lock add dword ptr [{}], {:e}", in(reg) counter, in(reg) value) }
}

/// `lock xor qword`.
pub fn locked_xor_64(word: *mut u64, value: u64) {
    // SAFETY: as above.
    unsafe { asm!("lock xor qword ptr [{}], {}", in(reg) word, in(reg) value) }
}

/// `lock xadd qword`; gives the value from before. The address need not be aligned.
pub fn locked_exchange_add_64(counter: *mut u64, value: u64) -> u64 {
    let old;
    // SAFETY: as above.
    unsafe { asm!("lock xadd [{}], {}", in(reg) counter, inout(reg) value => old) }
    old
}

/// `lock bts`; whether the bit was set before.
pub fn locked_set_bit(words: *mut u64, bit: u64) -> bool {
    let was: u8;
    // SAFETY: as above, and the callers pass bits within the words.
    unsafe {
        asm!("lock bts [{}], {}", "setc {}", in(reg) words, in(reg) bit, out(reg_byte) was);
    }
    was != 0
}

/// `lock btr`; whether the bit was set before.
pub fn locked_clear_bit(words: *mut u64, bit: u64) -> bool {
    let was: u8;
    // SAFETY: as above.
    unsafe {
        asm!("lock btr [{}], {}", "setc {}", in(reg) words, in(reg) bit, out(reg_byte) was);
    }
    was != 0
}

/// `lock cmpxchg8b`: stores `new` if the memory holds `expected`; gives what it held.
pub fn compare_exchange_8_bytes(memory: *mut u64, expected: u64, new: u64) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: as above; RBX is put back.
    unsafe {
        asm!("xchg {new}, rbx", "lock cmpxchg8b [{memory}]", "mov rbx, {new}",
            memory = in(reg) memory, new = inout(reg) new & 0xffff_ffff => _,
            inout("eax") expected as u32 => low, inout("edx") (expected >> 32) as u32 => high,
            in("ecx") (new >> 32) as u32);
    }
    u64::from(high) << 32 | u64::from(low)
}

/// `lock cmpxchg16b`: stores `new` if the memory holds `expected`; gives what it held.
pub fn compare_exchange_16_bytes(memory: *mut u128, expected: u128, new: u128) -> u128 {
    let (low, high): (u64, u64);
    // SAFETY: as above, the memory is aligned to 16 bytes; RBX is put back.
    unsafe {
        asm!("xchg {new}, rbx", "lock cmpxchg16b [{memory}]", "mov rbx, {new}",
            memory = in(reg) memory, new = inout(reg) new as u64 => _,
            inout("rax") expected as u64 => low, inout("rdx") (expected >> 64) as u64 => high,
            in("rcx") (new >> 64) as u64);
    }
    u128::from(high) << 64 | u128::from(low)
}
