//! Which instruction-set extensions the guest may use: those that its CPUID shows.

use iced_x86::{CpuidFeature, Instruction};

/// The set of extensions; an instruction of any other raises #UD.
#[derive(Clone, Debug)]
pub struct Features([u64; WORDS]);

/// Words of a set of extensions, a bit each.
const WORDS: usize = 4;

/// CPUID output registers.
const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Extension, leaf, subleaf, register, bit.
const TABLE: &[(CpuidFeature, u32, u32, usize, u32)] = &[
    (CpuidFeature::FPU, 1, 0, EDX, 0),
    (CpuidFeature::TSC, 1, 0, EDX, 4),
    (CpuidFeature::MSR, 1, 0, EDX, 5),
    (CpuidFeature::CX8, 1, 0, EDX, 8),
    (CpuidFeature::SEP, 1, 0, EDX, 11),
    (CpuidFeature::CMOV, 1, 0, EDX, 15),
    (CpuidFeature::CLFSH, 1, 0, EDX, 19),
    (CpuidFeature::MMX, 1, 0, EDX, 23),
    (CpuidFeature::FXSR, 1, 0, EDX, 24),
    (CpuidFeature::SSE, 1, 0, EDX, 25),
    (CpuidFeature::SSE2, 1, 0, EDX, 26),
    (CpuidFeature::SSE3, 1, 0, ECX, 0),
    (CpuidFeature::PCLMULQDQ, 1, 0, ECX, 1),
    (CpuidFeature::SSSE3, 1, 0, ECX, 9),
    (CpuidFeature::FMA, 1, 0, ECX, 12),
    (CpuidFeature::CMPXCHG16B, 1, 0, ECX, 13),
    (CpuidFeature::SSE4_1, 1, 0, ECX, 19),
    (CpuidFeature::SSE4_2, 1, 0, ECX, 20),
    (CpuidFeature::MOVBE, 1, 0, ECX, 22),
    (CpuidFeature::POPCNT, 1, 0, ECX, 23),
    (CpuidFeature::AES, 1, 0, ECX, 25),
    (CpuidFeature::XSAVE, 1, 0, ECX, 26),
    (CpuidFeature::AVX, 1, 0, ECX, 28),
    (CpuidFeature::F16C, 1, 0, ECX, 29),
    (CpuidFeature::RDRAND, 1, 0, ECX, 30),
    (CpuidFeature::FSGSBASE, 7, 0, EBX, 0),
    (CpuidFeature::BMI1, 7, 0, EBX, 3),
    (CpuidFeature::AVX2, 7, 0, EBX, 5),
    (CpuidFeature::BMI2, 7, 0, EBX, 8),
    (CpuidFeature::INVPCID, 7, 0, EBX, 10),
    (CpuidFeature::AVX512F, 7, 0, EBX, 16),
    (CpuidFeature::AVX512DQ, 7, 0, EBX, 17),
    (CpuidFeature::RDSEED, 7, 0, EBX, 18),
    (CpuidFeature::ADX, 7, 0, EBX, 19),
    (CpuidFeature::SMAP, 7, 0, EBX, 20),
    (CpuidFeature::AVX512_IFMA, 7, 0, EBX, 21),
    (CpuidFeature::CLFLUSHOPT, 7, 0, EBX, 23),
    (CpuidFeature::CLWB, 7, 0, EBX, 24),
    (CpuidFeature::AVX512CD, 7, 0, EBX, 28),
    (CpuidFeature::SHA, 7, 0, EBX, 29),
    (CpuidFeature::AVX512BW, 7, 0, EBX, 30),
    (CpuidFeature::AVX512VL, 7, 0, EBX, 31),
    (CpuidFeature::AVX512_VBMI, 7, 0, ECX, 1),
    (CpuidFeature::AVX512_VBMI2, 7, 0, ECX, 6),
    (CpuidFeature::GFNI, 7, 0, ECX, 8),
    (CpuidFeature::VAES, 7, 0, ECX, 9),
    (CpuidFeature::VPCLMULQDQ, 7, 0, ECX, 10),
    (CpuidFeature::AVX512_VNNI, 7, 0, ECX, 11),
    (CpuidFeature::AVX512_BITALG, 7, 0, ECX, 12),
    (CpuidFeature::AVX512_VPOPCNTDQ, 7, 0, ECX, 14),
    (CpuidFeature::RDPID, 7, 0, ECX, 22),
    (CpuidFeature::AVX512_VP2INTERSECT, 7, 0, EDX, 8),
    (CpuidFeature::SERIALIZE, 7, 0, EDX, 14),
    (CpuidFeature::AVX512_FP16, 7, 0, EDX, 23),
    (CpuidFeature::AVX_VNNI, 7, 1, EAX, 4),
    (CpuidFeature::AVX512_BF16, 7, 1, EAX, 5),
    (CpuidFeature::AVX_IFMA, 7, 1, EAX, 23),
    (CpuidFeature::XSAVEOPT, 0xd, 1, EAX, 0),
    (CpuidFeature::XSAVEC, 0xd, 1, EAX, 1),
    (CpuidFeature::XSAVES, 0xd, 1, EAX, 3),
    (CpuidFeature::SYSCALL, 0x8000_0001, 0, EDX, 11),
    (CpuidFeature::RDTSCP, 0x8000_0001, 0, EDX, 27),
    (CpuidFeature::X64, 0x8000_0001, 0, EDX, 29),
    (CpuidFeature::LZCNT, 0x8000_0001, 0, ECX, 5),
    (CpuidFeature::SSE4A, 0x8000_0001, 0, ECX, 6),
    (CpuidFeature::PREFETCHW, 0x8000_0001, 0, ECX, 8),
    (CpuidFeature::WBNOINVD, 0x8000_0008, 0, EBX, 9),
];

/// Extensions that every x86-64 processor has, or that CPUID does not tell.
const ALWAYS: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL8086_ONLY,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL286_ONLY,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL386_ONLY,
    CpuidFeature::INTEL486,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::CPUID,
    CpuidFeature::RDPMC,
    CpuidFeature::UDBG,
    CpuidFeature::PREFETCHITI,
];

impl Features {
    /// Reads them off the guest's CPUID.
    pub fn new(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Self {
        let mut set = Self([0; WORDS]);
        ALWAYS.iter().for_each(|&feature| set.insert(feature));
        for &(feature, leaf, subleaf, register, bit) in TABLE {
            if cpuid(leaf, subleaf)[register] >> bit & 1 != 0 {
                set.insert(feature);
            }
        }
        set
    }

    /// Whether all extensions that the instruction needs are shown.
    pub fn allow(&self, instruction: &Instruction) -> bool {
        instruction
            .cpuid_features()
            .iter()
            .all(|&f| self.0[f as usize / 64 % WORDS] >> (f as usize % 64) & 1 != 0)
    }

    fn insert(&mut self, feature: CpuidFeature) {
        self.0[feature as usize / 64 % WORDS] |= 1 << (feature as usize % 64);
    }
}
