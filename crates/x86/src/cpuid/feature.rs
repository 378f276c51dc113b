//! Names of CPUID feature bits: leaf, subleaf, register and bit (SDM vol. 2, CPUID; AMD's APM
//! vol. 3, appendix E).

/// A register that CPUID returns, in the order of its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Register {
    Eax = 0,
    Ebx = 1,
    Ecx = 2,
    Edx = 3,
}

/// One feature bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Feature {
    pub leaf: u32,
    pub subleaf: u32,
    pub register: Register,
    /// 0 to 31.
    pub bit: u8,
}

impl Feature {
    pub const fn new(leaf: u32, subleaf: u32, register: Register, bit: u8) -> Self {
        Self {
            leaf,
            subleaf,
            register,
            bit,
        }
    }
    pub(super) const fn mask(self) -> u32 {
        1u32.wrapping_shl(self.bit as u32)
    }
}

macro_rules! features {
    ($($leaf:literal $subleaf:literal $register:ident { $($name:ident $bit:literal)* })*) => {
        impl Feature {
            $($(pub const $name: Self = Self::new($leaf, $subleaf, Register::$register, $bit);)*)*
        }
        /// The names above, for messages and tests.
        pub const NAMED: &[(&str, Feature)] = &[$($((stringify!($name), Feature::$name),)*)*];
    };
}

features! {
    1 0 Edx {
        FPU 0 VME 1 DE 2 PSE 3 TSC 4 MSR 5 PAE 6 MCE 7 CX8 8 APIC 9 SEP 11 MTRR 12 PGE 13 MCA 14
        CMOV 15 PAT 16 PSE36 17 CLFLUSH 19 DS 21 ACPI 22 MMX 23 FXSR 24 SSE 25 SSE2 26 HTT 28 TM 29
    }
    1 0 Ecx {
        SSE3 0 PCLMULQDQ 1 MONITOR 3 VMX 5 SMX 6 EIST 7 SSSE3 9 FMA 12 CX16 13 PDCM 15 PCID 17
        SSE4_1 19 SSE4_2 20 X2APIC 21 MOVBE 22 POPCNT 23 TSC_DEADLINE 24 AES 25 XSAVE 26 OSXSAVE 27
        AVX 28 F16C 29 RDRAND 30 HYPERVISOR 31
    }
    6 0 Eax { ARAT 2 }
    7 0 Ebx {
        FSGSBASE 0 TSC_ADJUST 1 SGX 2 BMI1 3 HLE 4 AVX2 5 FDP_EXCPTN_ONLY 6 SMEP 7 BMI2 8 ERMS 9
        INVPCID 10 RTM 11 FCS_FDS_DEPRECATED 13 MPX 14 AVX512F 16 AVX512DQ 17 RDSEED 18 ADX 19
        SMAP 20 AVX512_IFMA 21 CLFLUSHOPT 23 CLWB 24 AVX512CD 28 SHA 29 AVX512BW 30 AVX512VL 31
    }
    7 0 Ecx {
        AVX512_VBMI 1 UMIP 2 PKU 3 OSPKE 4 WAITPKG 5 AVX512_VBMI2 6 CET_SS 7 GFNI 8 VAES 9
        VPCLMULQDQ 10 AVX512_VNNI 11 AVX512_BITALG 12 AVX512_VPOPCNTDQ 14 LA57 16 RDPID 22
        KEY_LOCKER 23 CLDEMOTE 25 MOVDIRI 27 MOVDIR64B 28 ENQCMD 29
    }
    7 0 Edx {
        FSRM 4 AVX512_VP2INTERSECT 8 SERIALIZE 14 CET_IBT 20 AMX_BF16 22 AVX512_FP16 23 AMX_TILE 24
        AMX_INT8 25 SPEC_CTRL 26 STIBP 27 ARCH_CAPABILITIES 29 SSBD 31
    }
    7 1 Eax { AVX_VNNI 4 AVX512_BF16 5 }
    0xd 1 Eax { XSAVEOPT 0 XSAVEC 1 XGETBV_ECX1 2 XSAVES 3 }
    0x8000_0001 0 Ecx {
        LAHF_SAHF 0 CMP_LEGACY 1 SVM 2 CR8_LEGACY 4 ABM 5 SSE4A 6 MISALIGNSSE 7 PREFETCHW 8 OSVW 9
        IBS 10 XOP 11 LWP 15 FMA4 16 TBM 21 TOPOEXT 22 PERFCTR_CORE 23 MWAITX 29
    }
    0x8000_0001 0 Edx {
        SYSCALL 11 NX 20 MMXEXT 22 FFXSR 25 PAGE_1G 26 RDTSCP 27 LM 29 AMD_3DNOWEXT 30 AMD_3DNOW 31
    }
    0x8000_0007 0 Edx { INVARIANT_TSC 8 }
    0x8000_0008 0 Ebx { CLZERO 0 IRPERF 1 XSAVEERPTR 2 RDPRU 4 WBNOINVD 9 IBPB 12 }
    0x8000_0021 0 Eax {
        LFENCE_SERIALIZING 2 NULL_SELECTOR_CLEARS_BASE 6 AUTOMATIC_IBRS 8 SRSO_NO 29
    }
}
