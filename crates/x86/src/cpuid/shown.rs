//! Which feature bits are shown: those implemented, by whom.
//!
//! A bit that is in neither list is hidden, so a feature of a future processor stays hidden until
//! it is entered here.

use super::Feature;

/// Shown if the host has it: the instructions run on the host processor as they are, or the bit
/// describes how they behave there.
pub(super) const OF_HOST: &[Feature] = &[
    Feature::FPU,
    Feature::CX8,
    Feature::CMOV,
    Feature::CLFLUSH,
    Feature::MMX,
    Feature::FXSR,
    Feature::SSE,
    Feature::SSE2,
    Feature::SSE3,
    Feature::PCLMULQDQ,
    Feature::SSSE3,
    Feature::CX16,
    Feature::SSE4_1,
    Feature::SSE4_2,
    Feature::MOVBE,
    Feature::POPCNT,
    Feature::AES,
    Feature::XSAVE,
    Feature::RDRAND,
    Feature::BMI1,
    Feature::FDP_EXCPTN_ONLY,
    Feature::BMI2,
    Feature::ERMS,
    Feature::FCS_FDS_DEPRECATED,
    Feature::RDSEED,
    Feature::ADX,
    Feature::CLFLUSHOPT,
    Feature::CLWB,
    Feature::SHA,
    Feature::GFNI,
    Feature::FSRM,
    Feature::LAHF_SAHF,
    Feature::CR8_LEGACY,
    Feature::ABM,
    Feature::SSE4A,
    Feature::PREFETCHW,
    Feature::TOPOEXT,
    Feature::MMXEXT,
    Feature::XSAVEERPTR,
    Feature::LFENCE_SERIALIZING,
];

/// As [`OF_HOST`], where the host's system enables YMM state.
pub(super) const OF_HOST_WITH_AVX: &[Feature] = &[
    Feature::AVX,
    Feature::FMA,
    Feature::F16C,
    Feature::AVX2,
    Feature::VAES,
    Feature::VPCLMULQDQ,
    Feature::AVX_VNNI,
];

/// As [`OF_HOST`], where the host's system enables opmask and ZMM state.
pub(super) const OF_HOST_WITH_AVX512: &[Feature] = &[
    Feature::AVX512F,
    Feature::AVX512DQ,
    Feature::AVX512_IFMA,
    Feature::AVX512CD,
    Feature::AVX512BW,
    Feature::AVX512VL,
    Feature::AVX512_VBMI,
    Feature::AVX512_VBMI2,
    Feature::AVX512_VNNI,
    Feature::AVX512_BITALG,
    Feature::AVX512_VPOPCNTDQ,
    Feature::AVX512_VP2INTERSECT,
    Feature::AVX512_FP16,
    Feature::AVX512_BF16,
];

/// Provided by the monitor whatever the host.
pub(super) const PROVIDED: &[Feature] = &[
    Feature::DE,
    Feature::PSE,
    Feature::TSC,
    Feature::MSR,
    Feature::PAE,
    Feature::MCE,
    Feature::APIC,
    Feature::SEP,
    Feature::MTRR,
    Feature::PGE,
    Feature::MCA,
    Feature::PAT,
    Feature::PSE36,
    Feature::PCID,
    Feature::X2APIC,
    Feature::TSC_DEADLINE,
    Feature::HYPERVISOR,
    Feature::ARAT,
    Feature::FSGSBASE,
    Feature::TSC_ADJUST,
    Feature::SMEP,
    Feature::INVPCID,
    Feature::SMAP,
    Feature::UMIP,
    Feature::RDPID,
    Feature::SYSCALL,
    Feature::NX,
    Feature::PAGE_1G,
    Feature::RDTSCP,
    Feature::LM,
    Feature::INVARIANT_TSC,
];

/// Bits of leaf 1 EDX that AMD repeats in leaf 0x8000_0001 EDX.
pub(super) const REPEATED_BY_AMD: u32 = 0x0183_f3ff;
