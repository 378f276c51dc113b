//! Task-state segments: offsets of their fields in bytes (SDM vol. 3, figures 8-2, 8-10, 8-11).

/// 64-bit TSS.
pub mod tss64 {
    /// The last byte of the smallest one.
    pub const MINIMUM_LIMIT: u32 = 0x67;
    /// The I/O permission bitmap's offset, 16 bits.
    pub const IOMAP_BASE: u64 = 0x66;
    /// RSP for privilege level 0 to 2, 64 bits.
    pub const fn rsp(level: u8) -> u64 {
        4 + 8 * level as u64
    }
    /// Interrupt stack 1 to 7, 64 bits.
    pub const fn ist(number: u8) -> u64 {
        0x1c + 8 * number as u64
    }
}

/// 32-bit TSS.
pub mod tss32 {
    pub const MINIMUM_LIMIT: u32 = 0x67;
    pub const LINK: u64 = 0;
    /// ESP for privilege level 0 to 2, 32 bits.
    pub const fn esp(level: u8) -> u64 {
        4 + 8 * level as u64
    }
    /// SS for privilege level 0 to 2, 16 bits.
    pub const fn ss(level: u8) -> u64 {
        8 + 8 * level as u64
    }
    pub const CR3: u64 = 0x1c;
    pub const EIP: u64 = 0x20;
    pub const EFLAGS: u64 = 0x24;
    /// EAX; the others follow in the order of their encoding, 32 bits each.
    pub const EAX: u64 = 0x28;
    /// ES; CS, SS, DS, FS, GS follow, 16 bits in 4 bytes each.
    pub const ES: u64 = 0x48;
    pub const LDT: u64 = 0x60;
    /// Bit 0: debug trap on a switch to this task.
    pub const TRAP: u64 = 0x64;
    pub const IOMAP_BASE: u64 = 0x66;
}

/// 16-bit TSS.
pub mod tss16 {
    pub const MINIMUM_LIMIT: u32 = 0x2b;
    pub const LINK: u64 = 0;
    /// SP for privilege level 0 to 2, 16 bits.
    pub const fn sp(level: u8) -> u64 {
        2 + 4 * level as u64
    }
    /// SS for privilege level 0 to 2, 16 bits.
    pub const fn ss(level: u8) -> u64 {
        4 + 4 * level as u64
    }
    pub const IP: u64 = 0x0e;
    pub const FLAGS: u64 = 0x10;
    /// AX; the others follow in the order of their encoding, 16 bits each.
    pub const AX: u64 = 0x12;
    /// ES; CS, SS, DS follow, 16 bits each.
    pub const ES: u64 = 0x22;
    pub const LDT: u64 = 0x2a;
}
