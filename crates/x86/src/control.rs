//! Bits of RFLAGS, the control registers, EFER and the debug registers.

/// RFLAGS bits (SDM vol. 1, 3.4.3).
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    /// Bit 1 reads as one always.
    pub const ONE: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const IOPL_SHIFT: u32 = 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six status flags that arithmetic instructions write.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits (SDM vol. 3, 2.5).
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR3 bits (SDM vol. 3, 2.5 and 4.10.4.1).
pub mod cr3 {
    /// With CR4.PCIDE the low 12 bits hold the process-context identifier.
    pub const PCID: u64 = 0xfff;
    /// In a MOV to CR3 with CR4.PCIDE: do not invalidate the PCID's translations.
    pub const NO_FLUSH: u64 = 1 << 63;
}

/// CR4 bits (SDM vol. 3, 2.5).
pub mod cr4 {
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// EFER bits (SDM vol. 3, 2.2.1).
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    /// Automatic IBRS (AMD).
    pub const AIBRSE: u64 = 1 << 21;
}

/// DR6 bits (SDM vol. 3, 17.2.3).
pub mod dr6 {
    /// Breakpoint conditions detected, B0 to B3.
    pub const B: u64 = 0xf;
    /// General detect: access to a debug register with DR7.GD set.
    pub const BD: u64 = 1 << 13;
    /// Single step.
    pub const BS: u64 = 1 << 14;
    /// Task switch.
    pub const BT: u64 = 1 << 15;
    /// Bits that read as one; the value after reset.
    pub const RESET: u64 = 0xffff_0ff0;
}

/// DR7 bits (SDM vol. 3, 17.2.4).
pub mod dr7 {
    /// Local and global enables of breakpoints 0 to 3.
    pub const ENABLES: u64 = 0xff;
    /// General detect enable.
    pub const GD: u64 = 1 << 13;
    /// The value after reset.
    pub const RESET: u64 = 0x400;
}

/// State components by their bits in XCR0 (SDM vol. 1, 13.1 and 13.3).
pub mod xcr0 {
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    /// Opmask, ZMM_Hi256 and Hi16_ZMM: enabled together or not at all.
    pub const AVX512: u64 = 7 << 5;

    /// Whether XCR0 takes a value, given the components that CPUID shows.
    pub const fn valid(value: u64, shown: u64) -> bool {
        let avx512 = value & AVX512;
        value & X87 != 0
            && value & !(shown & (X87 | SSE | AVX | AVX512)) == 0
            && (value & AVX == 0 || value & SSE != 0)
            && (avx512 == 0 || (avx512 == AVX512 && value & AVX != 0))
    }

    #[test]
    fn groups_are_whole() {
        assert!(valid(1, 0xe7));
        assert!(valid(7, 0xe7));
        assert!(valid(0xe7, 0xe7));
        for bad in [0, 6, 5, 0x27, 0x67, 0xe3, 0x207, 7 | 1 << 63] {
            assert!(!valid(bad, 0xe7 | 0x200), "{bad:#x}");
        }
        assert!(!valid(0xe7, 7));
    }
}
