//! Tests of the model.

use super::*;
use crate::control::xcr0;

/// A processor with every feature bit set.
struct Everything {
    vendor: &'static [u8; 12],
    highest: u32,
    xcr0: u64,
}

const INTEL: Everything = Everything {
    vendor: b"GenuineIntel",
    highest: 0x20,
    xcr0: 0xe7,
};
const AMD: Everything = Everything {
    vendor: b"AuthenticAMD",
    highest: 0x10,
    xcr0: 0xe7,
};

impl CpuidSource for Everything {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Registers {
        let word = |i: usize| u32::from_le_bytes(self.vendor[i..i + 4].try_into().unwrap());
        match (leaf, subleaf) {
            (0, _) => [self.highest, word(0), word(8), word(4)],
            (4 | 0x8000_001d, 0) => [0xfc00_4121, 0x01c0_003f, 0x3f, 0],
            (4 | 0x8000_001d, 1) => [0xfc00_4143, 0x01c0_003f, 0x3ff, 0],
            (4 | 0x8000_001d, 2) => [0xfc03_c163, 0x03c0_003f, 0xfff, 4],
            (4 | 0x8000_001d, _) => [0; 4],
            (7, 0) => [2, u32::MAX, u32::MAX, u32::MAX],
            (0xd, 0) => [0x602e7, 0xa88, 0x2b00, 0],
            (0xd, 1) => [0x1f, 0, 0x1900, 0],
            (0xd, 2) => [256, 576, 0, 0],
            (0xd, 5) => [64, 1088, 0, 0],
            (0xd, 6) => [512, 1152, 0, 0],
            (0xd, 7) => [1024, 1664, 0, 0],
            (0xd, 17) => [64, 2752, 2, 0],
            (0xd, 18) => [8192, 2816, 6, 0],
            (0x8000_0000, _) => [0x8000_0028, 1, 2, 3],
            (0x8000_0008, _) => [0x0034_3934, u32::MAX, u32::MAX, u32::MAX],
            _ => [u32::MAX; 4],
        }
    }
    fn xcr0(&self) -> u64 {
        self.xcr0
    }
}

/// A host that shows hardly anything.
struct Bare;

impl CpuidSource for Bare {
    fn cpuid(&self, leaf: u32, _: u32) -> Registers {
        match leaf {
            0 => [1, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
            0x8000_0000 => [0x8000_0001, 0, 0, 0],
            _ => [0; 4],
        }
    }
    fn xcr0(&self) -> u64 {
        0
    }
}

const CONFIG: CpuidConfig = CpuidConfig {
    vcpus: 6,
    tsc_khz: Some(2_500_000),
    apic_bus_khz: Some(1_000_000),
};

fn at(apic_id: u32) -> CpuidDynamic {
    CpuidDynamic {
        apic_id,
        osxsave: false,
        xcr0: 1,
        apic_enabled: true,
    }
}

fn intel() -> CpuidModel {
    CpuidModel::from_source(&INTEL, CONFIG)
}
fn amd() -> CpuidModel {
    CpuidModel::from_source(&AMD, CONFIG)
}

#[test]
fn what_is_not_implemented_is_hidden() {
    for model in [intel(), amd()] {
        for feature in [
            Feature::VME,
            Feature::DS,
            Feature::ACPI,
            Feature::TM,
            Feature::MONITOR,
            Feature::VMX,
            Feature::SMX,
            Feature::EIST,
            Feature::PDCM,
            Feature::SGX,
            Feature::HLE,
            Feature::RTM,
            Feature::MPX,
            Feature::PKU,
            Feature::OSPKE,
            Feature::OSXSAVE,
            Feature::WAITPKG,
            Feature::CET_SS,
            Feature::CET_IBT,
            Feature::LA57,
            Feature::KEY_LOCKER,
            Feature::MOVDIR64B,
            Feature::ENQCMD,
            Feature::SERIALIZE,
            Feature::AMX_TILE,
            Feature::SPEC_CTRL,
            Feature::STIBP,
            Feature::SSBD,
            Feature::ARCH_CAPABILITIES,
            Feature::XSAVES,
            Feature::SVM,
            Feature::OSVW,
            Feature::IBS,
            Feature::XOP,
            Feature::LWP,
            Feature::FMA4,
            Feature::TBM,
            Feature::PERFCTR_CORE,
            Feature::MWAITX,
            Feature::FFXSR,
            Feature::AMD_3DNOW,
            Feature::AMD_3DNOWEXT,
            Feature::CLZERO,
            Feature::IRPERF,
            Feature::RDPRU,
            Feature::WBNOINVD,
            Feature::IBPB,
        ] {
            assert!(!model.allows(feature), "{feature:x?}");
        }
        for leaf in [
            3,
            5,
            9,
            0xa,
            0xf,
            0x10,
            0x12,
            0x14,
            0x20,
            0x8000_000a,
            0x8000_001b,
            0x8000_001f,
        ] {
            assert_eq!(model.read(leaf, 0, at(0)), [0; 4], "leaf {leaf:#x}");
        }
        // Only ARAT of the thermal and power leaf.
        assert_eq!(model.read(6, 0, at(0)), [4, 0, 0, 0]);
        assert_eq!(model.read(0x8000_0007, 0, at(0)), [0, 0, 0, 1 << 8]);
    }
}

#[test]
fn every_named_feature_is_where_the_manual_has_it() {
    // A few far apart; the macro does the rest.
    assert_eq!(Feature::AVX2, Feature::new(7, 0, Register::Ebx, 5));
    assert_eq!(Feature::LM, Feature::new(0x8000_0001, 0, Register::Edx, 29));
    assert_eq!(Feature::RDRAND, Feature::new(1, 0, Register::Ecx, 30));
    for (i, (name, feature)) in NAMED.iter().enumerate() {
        assert!(feature.bit < 32);
        let twice = NAMED[..i].iter().find(|(_, other)| other == feature);
        assert_eq!(twice, None, "{name}");
    }
}

#[test]
fn what_the_monitor_provides_needs_no_host() {
    let model = CpuidModel::from_source(&Bare, CONFIG);
    for &feature in shown::PROVIDED {
        assert!(model.allows(feature), "{feature:x?}");
    }
    assert!(!model.allows(Feature::AVX) && !model.allows(Feature::XSAVE));
    assert_eq!(model.xcr0_supported(), 3);
    assert_eq!(model.physical_address_bits(), 36);
    assert_eq!(model.read(0, 0, at(0))[0], 0x16);
    assert_eq!(model.read(0x8000_0000, 0, at(0))[0], 0x8000_0008);
}

#[test]
fn vector_features_follow_the_state_that_the_host_enables() {
    let with = |xcr0| CpuidModel::from_source(&Everything { xcr0, ..INTEL }, CONFIG);
    let (full, avx, sse) = (with(0x602e7), with(0x27), with(3));
    assert_eq!(full.xcr0_supported(), 0xe7);
    assert!(full.allows(Feature::AVX512F) && full.allows(Feature::AVX512_BF16));
    assert_eq!(avx.xcr0_supported(), 7);
    assert!(avx.allows(Feature::VAES) && !avx.allows(Feature::AVX512F));
    assert!(!avx.allows(Feature::AVX512_BF16) && avx.allows(Feature::AVX_VNNI));
    assert_eq!(sse.xcr0_supported(), 3);
    assert!(!sse.allows(Feature::AVX) && !sse.allows(Feature::FMA) && sse.allows(Feature::AES));
}

#[test]
fn xsave_areas_follow_xcr0() {
    let model = intel();
    let dynamic = |xcr0| CpuidDynamic {
        xcr0,
        osxsave: true,
        ..at(0)
    };
    for (xcr0, size) in [(1, 576), (3, 576), (7, 832), (0xe7, 2688)] {
        assert_eq!(model.read(0xd, 0, dynamic(xcr0)), [0xe7, size, 2688, 0]);
        assert_eq!(model.xsave_size(xcr0), size);
    }
    // XSAVEOPT, XSAVEC, XGETBV with ECX = 1.
    assert_eq!(model.read(0xd, 1, dynamic(7)), [7, 832, 0, 0]);
    // Compacted: the components without the gap.
    assert_eq!(
        model.xsave_compacted_size(0xe7),
        576 + 256 + 64 + 512 + 1024
    );
    assert_eq!(model.read(0xd, 2, dynamic(7)), [256, 576, 0, 0]);
    for subleaf in [3, 4, 8, 9, 17, 18, 63, u32::MAX] {
        assert_eq!(model.read(0xd, subleaf, dynamic(7)), [0; 4]);
    }
    for (value, valid) in [
        (1, true),
        (3, true),
        (7, true),
        (0xe7, true),
        (0, false),
        (2, false),
        (5, false),
        (0x27, false),
        (0xe3, false),
        (0x207, false),
        (0x602e7, false),
        (u64::MAX, false),
    ] {
        let accepted = xcr0::valid(value, model.xcr0_supported());
        assert_eq!(accepted, valid, "{value:#x}");
    }
}

#[test]
fn dynamic_bits() {
    let model = intel();
    let osxsave = CpuidDynamic {
        osxsave: true,
        ..at(3)
    };
    let ecx = |dynamic| model.read(1, 0, dynamic)[2];
    assert_eq!(ecx(osxsave) ^ ecx(at(3)), Feature::OSXSAVE.mask());
    assert_eq!(model.read(1, 0, at(3))[1] >> 24, 3);
    let off = CpuidDynamic {
        apic_enabled: false,
        ..at(0)
    };
    assert_eq!(
        model.read(1, 0, off)[3] ^ model.read(1, 0, at(0))[3],
        Feature::APIC.mask()
    );
    assert_eq!(amd().read(0x8000_0001, 0, off)[3] & Feature::APIC.mask(), 0);
}

#[test]
fn topology_is_one_package_of_cores() {
    for model in [intel(), amd()] {
        for id in 0..6 {
            assert_eq!(model.read(0xb, 0, at(id)), [0, 1, 0x100, id]);
            assert_eq!(model.read(0xb, 1, at(id)), [3, 6, 0x201, id]);
            assert_eq!(model.read(0xb, 2, at(id)), [0, 0, 2, id]);
        }
        assert!(model.allows(Feature::HTT));
    }
    let model = intel();
    assert_eq!(model.read(0x1f, 1, at(5)), [3, 6, 0x201, 5]);
    assert_eq!((model.read(1, 0, at(0))[1] >> 16) & 0xff, 8);
    // Level 1 private, level 3 shared by all ids; eight addressable cores.
    assert_eq!(model.read(4, 0, at(0))[0], 7 << 26 | 0x121);
    assert_eq!(model.read(4, 2, at(0))[0], 7 << 26 | 7 << 14 | 0x163);
    assert_eq!(model.read(4, 3, at(0)), [0; 4]);
    let model = amd();
    assert!(model.allows(Feature::CMP_LEGACY));
    assert_eq!((model.read(1, 0, at(0))[1] >> 16) & 0xff, 6);
    assert_eq!(model.read(0x8000_0008, 0, at(0))[2], 3 << 12 | 5);
    assert_eq!(model.read(0x8000_001d, 2, at(0))[0], 7 << 14 | 0x163);
    assert_eq!(model.read(0x8000_001e, 0, at(5)), [5, 5, 0, 0]);
    let single = CpuidModel::from_source(&AMD, CpuidConfig { vcpus: 1, ..CONFIG });
    assert!(!single.allows(Feature::HTT) && !single.allows(Feature::CMP_LEGACY));
    assert_eq!(single.read(0xb, 1, at(0)), [0, 1, 0x201, 0]);
}

#[test]
fn many_processors_have_ids_beyond_a_byte() {
    let model = CpuidModel::from_source(
        &INTEL,
        CpuidConfig {
            vcpus: 1024,
            ..CONFIG
        },
    );
    assert_eq!(model.read(1, 0, at(1023))[1] >> 16, 0xffff);
    assert_eq!(model.read(0xb, 1, at(1023)), [10, 1024, 0x201, 1023]);
}

#[test]
fn rates_are_given_where_known() {
    let model = intel();
    let [max, ebx, ecx, edx] = model.read(0x4000_0000, 0, at(0));
    let name: Vec<u8> = [ebx, ecx, edx]
        .iter()
        .flat_map(|r| r.to_le_bytes())
        .collect();
    assert_eq!(
        (max, name.as_slice()),
        (0x4000_0010, b"TraplineVMM\0".as_slice())
    );
    assert_eq!(
        model.read(0x4000_0010, 0, at(0)),
        [2_500_000, 1_000_000, 0, 0]
    );
    // TSC rate = ECX * EBX / EAX.
    let [denominator, numerator, hertz, _] = model.read(0x15, 0, at(0)).map(u64::from);
    assert_eq!(hertz * numerator / denominator, 2_500_000_000);
    assert_eq!(model.read(0x16, 0, at(0)), [2500, 2500, 1000, 0]);
    let unknown = CpuidConfig {
        tsc_khz: None,
        apic_bus_khz: None,
        ..CONFIG
    };
    let model = CpuidModel::from_source(&INTEL, unknown);
    assert_eq!(model.read(0x4000_0000, 0, at(0))[0], 0x4000_0000);
    assert_eq!(model.read(0x15, 0, at(0)), [0; 4]);
    assert_eq!(amd().read(0x15, 0, at(0)), [0; 4]);
}

#[test]
fn identity_is_the_hosts() {
    let model = intel();
    assert_eq!(
        (model.vendor(), amd().vendor()),
        (Vendor::Intel, Vendor::Amd)
    );
    assert_eq!(
        model.read(0, 0, at(0)),
        [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]
    );
    assert_eq!(amd().read(0, 0, at(0))[0], 0xd);
    assert_eq!(model.read(1, 0, at(0))[0], u32::MAX);
    assert_eq!(model.read(0x8000_0000, 0, at(0))[0], 0x8000_0008);
    assert_eq!(amd().read(0x8000_0000, 0, at(0))[0], 0x8000_0021);
    assert_eq!(model.read(0x8000_0008, 0, at(0))[0], 48 << 8 | 46);
    assert_eq!(model.read(0x8000_0021, 0, at(0)), [0; 4]);
    assert_eq!(amd().read(0x8000_0021, 0, at(0)), [0x2000_0144, 0, 0, 0]);
}

#[test]
fn amd_repeats_leaf_one() {
    let model = amd();
    let [basic, extended] = [1, 0x8000_0001].map(|leaf| model.read(leaf, 0, at(0))[3]);
    assert_eq!((basic ^ extended) & shown::REPEATED_BY_AMD, 0);
    assert_eq!(
        intel().read(0x8000_0001, 0, at(0))[3] & shown::REPEATED_BY_AMD & 0x3ff,
        0
    );
}

#[test]
fn this_host_makes_a_model() {
    let model = CpuidModel::from_host(CONFIG);
    for feature in [
        Feature::LM,
        Feature::SSE2,
        Feature::FXSR,
        Feature::CX8,
        Feature::HYPERVISOR,
    ] {
        assert!(model.allows(feature), "{feature:x?}");
    }
    let highest = model.read(0, 0, at(0))[0];
    assert!((0xd..=0x1f).contains(&highest));
    assert!((36..=46).contains(&model.physical_address_bits()));
    assert_eq!(
        model.allows(Feature::AVX2),
        std::is_x86_feature_detected!("avx2")
    );
    assert_eq!(
        model.allows(Feature::AVX512BW),
        std::is_x86_feature_detected!("avx512bw")
    );
    if model.allows(Feature::XSAVE) {
        assert!(model.xsave_size(model.xcr0_supported()) >= 576);
    }
}
