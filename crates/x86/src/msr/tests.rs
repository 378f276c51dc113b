//! Tests of the registers.

use proptest::prelude::*;

use super::index::*;
use super::*;
use crate::control::{cr0, efer};
use crate::cpuid::{CpuidConfig, CpuidModel, CpuidSource, Registers};
use crate::{CpuState, SegmentRegister};

struct Maker(&'static [u8; 12]);

impl CpuidSource for Maker {
    fn cpuid(&self, leaf: u32, _: u32) -> Registers {
        let word = |i: usize| u32::from_le_bytes(self.0[i..i + 4].try_into().unwrap());
        match leaf {
            0 => [0xd, word(0), word(8), word(4)],
            1 => [0, 0, 0, 1 << 26],
            0x8000_0000 => [0x8000_0008, 0, 0, 0],
            0x8000_0008 => [46, 0, 0, 0],
            _ => [0; 4],
        }
    }
    fn xcr0(&self) -> u64 {
        3
    }
}

fn model(vendor: &'static [u8; 12]) -> CpuidModel {
    let config = CpuidConfig {
        vcpus: 1,
        tsc_khz: None,
        apic_bus_khz: None,
    };
    CpuidModel::from_source(&Maker(vendor), config)
}
fn intel() -> CpuidModel {
    model(b"GenuineIntel")
}
fn amd() -> CpuidModel {
    model(b"AuthenticAMD")
}

const ODD: u64 = 0x8000_0000_0000;
const TYPES: u64 = 0x0605_0401_0006_0504;

#[test]
fn values_are_kept_or_refused() {
    // Register, a value that it takes, values that it refuses.
    let cases: &[(u32, u64, &[u64])] = &[
        (
            EFER,
            efer::SCE | efer::LME | efer::NXE,
            &[1 << 12, 1 << 13, 1 << 14, 1 << 15, 2, 1 << 63],
        ),
        (STAR, 0x0023_0010_0000_0000, &[]),
        (LSTAR, 0xffff_8000_0000_1000, &[ODD]),
        (CSTAR, 0xffff_8000_0000_1000, &[ODD]),
        (SFMASK, 0x4_7700, &[]),
        (FS_BASE, 0x7fff_0000_0000, &[ODD, 1 << 63]),
        (GS_BASE, 0x7fff_0000_0000, &[ODD]),
        (KERNEL_GS_BASE, 0xffff_8880_0000_0000, &[ODD]),
        (TSC_AUX, 0x1003, &[1 << 32]),
        (SYSENTER_CS, 0x10, &[]),
        (SYSENTER_ESP, 0xffff_8000_0000_0000, &[ODD]),
        (SYSENTER_EIP, 0xffff_8000_0000_0000, &[ODD]),
        (PAT, 0x0407_0506_0007_0106, &[2, 3, 0x800, 8 << 56]),
        (MTRR_DEF_TYPE, 0xc06, &[0xc02, 0x1006, 0xc07, 1 << 32]),
        (MTRR_PHYSBASE0, 0x3fff_ffff_f006, &[1 << 46, 0x106, 7]),
        (MTRR_PHYSMASK7, 0x3fff_ffff_f800, &[1 << 46, 0x400, 1]),
        (MTRR_FIX64K_00000, TYPES, &[2, 7 << 8]),
        (MTRR_FIX16K_A0000, TYPES, &[0xff]),
        (MTRR_FIX4K_F8000, TYPES, &[3 << 56]),
        (MCG_STATUS, 4, &[]),
        (DEBUGCTL, 2, &[1 << 6]),
    ];
    let (mut cpu, model) = (CpuState::reset(), intel());
    for &(index, good, bad) in cases {
        assert!(
            write(&mut cpu, &model, index, good, 0).is_some(),
            "{index:#x}"
        );
        assert_eq!(read(&cpu, &model, index, 0), Some(good), "{index:#x}");
        let before = cpu.clone();
        for &value in bad {
            assert_eq!(
                write(&mut cpu, &model, index, value, 0),
                None,
                "{index:#x} {value:#x}"
            );
        }
        assert_eq!(cpu, before);
    }
    assert_eq!(cpu.segment(SegmentRegister::Fs).base, 0x7fff_0000_0000);
    assert_eq!(cpu.msr.mtrr_fixed[0], TYPES);
    assert_eq!(cpu.msr.mtrr_fixed[2], TYPES);
    assert_eq!(cpu.msr.mtrr_fixed[10], TYPES);
}

#[test]
fn efer_follows_the_modes() {
    let (mut cpu, model) = (CpuState::reset(), intel());
    assert_eq!(
        write(&mut cpu, &model, EFER, efer::NXE, 0),
        Some(Effect::FlushTlb)
    );
    assert_eq!(
        write(&mut cpu, &model, EFER, efer::NXE, 0),
        Some(Effect::None)
    );
    let long = efer::NXE | efer::LME;
    assert_eq!(
        write(&mut cpu, &model, EFER, long, 0),
        Some(Effect::ModeChanged)
    );
    cpu.cr0 |= cr0::PE | cr0::PG;
    cpu.efer |= efer::LMA;
    // LMA can be neither set nor cleared by a write.
    assert_eq!(write(&mut cpu, &model, EFER, long, 0), Some(Effect::None));
    assert_eq!(cpu.efer, long | efer::LMA);
    assert_eq!(write(&mut cpu, &model, EFER, efer::NXE, 0), None);
    assert_eq!(
        write(&mut cpu, &model, EFER, long | efer::SCE, 0),
        Some(Effect::ModeChanged)
    );
    assert_eq!(cpu.efer, long | efer::LMA | efer::SCE);
}

#[test]
fn the_counter_and_its_adjustment_move_together() {
    let (mut cpu, model) = (CpuState::reset(), intel());
    let host = 5_000;
    let tsc = |cpu: &CpuState| cpu.msr.tsc_offset.wrapping_add(host);
    let now = tsc(&cpu);
    assert_eq!(
        write(&mut cpu, &model, TSC, 100, now),
        Some(Effect::TscChanged)
    );
    assert_eq!(tsc(&cpu), 100);
    assert_eq!(read(&cpu, &model, TSC_ADJUST, 100), Some(-4_900i64 as u64));
    assert_eq!(
        write(&mut cpu, &model, TSC_ADJUST, 0, 100),
        Some(Effect::TscChanged)
    );
    assert_eq!(tsc(&cpu), 5_000);
    assert_eq!(read(&cpu, &model, TSC, 77), Some(77));
}

#[test]
fn what_linux_reads_on_intel() {
    let (cpu, model) = (CpuState::reset(), intel());
    let get = |index| read(&cpu, &model, index, 0);
    assert_eq!(get(MISC_ENABLE), Some(0x1801));
    assert_eq!(get(FEATURE_CONTROL), Some(1));
    assert_eq!(get(BIOS_SIGN_ID), Some(1 << 32));
    assert_eq!(get(MTRR_CAP), Some(0x508));
    for index in [PLATFORM_ID, SMI_COUNT, MCG_CAP, MCG_STATUS, DEBUGCTL] {
        assert_eq!(get(index), Some(0), "{index:#x}");
    }
    assert_eq!(get(AMD_HWCR), None);
}

#[test]
fn what_linux_reads_on_amd() {
    let (mut cpu, model) = (CpuState::reset(), amd());
    let get = |index| read(&cpu, &model, index, 0);
    assert_eq!(get(AMD_HWCR), Some(1 << 24));
    assert_eq!(get(AMD_DE_CFG), Some(2));
    for index in [
        AMD_SYSCFG,
        AMD_NB_CFG,
        AMD_OSVW_ID_LENGTH,
        AMD_OSVW_STATUS,
        0xc001_0064,
        MCG_CAP,
    ] {
        assert_eq!(get(index), Some(0), "{index:#x}");
    }
    assert_eq!((get(MISC_ENABLE), get(FEATURE_CONTROL)), (None, None));
    // Linux toggles McStatusWrEn and switches on extended configuration accesses.
    assert_eq!(
        write(&mut cpu, &model, AMD_HWCR, 1 << 24 | 1 << 18, 0),
        Some(Effect::None)
    );
    assert_eq!(
        write(&mut cpu, &model, AMD_NB_CFG, 1 << 46, 0),
        Some(Effect::None)
    );
    assert_eq!(write(&mut cpu, &model, AMD_HWCR, 1, 0), None);
    // SYSENTER's registers have 32 bits.
    assert_eq!(
        write(&mut cpu, &model, SYSENTER_EIP, ODD | 5, 0),
        Some(Effect::None)
    );
    assert_eq!(read(&cpu, &model, SYSENTER_EIP, 0), Some(5));
    assert_eq!(
        write(&mut cpu, &model, TSC_AUX, 1 << 32 | 7, 0),
        Some(Effect::None)
    );
    assert_eq!(read(&cpu, &model, TSC_AUX, 0), Some(7));
}

#[test]
fn what_is_not_there() {
    let mut cpu = CpuState::reset();
    for model in [intel(), amd()] {
        // Counters, speculation control, local APIC, past the ends of ranges.
        for index in [
            0xc1,
            0x186,
            0x38f,
            0x48,
            0x10a,
            0xda0,
            APIC_BASE,
            TSC_DEADLINE,
            X2APIC_FIRST,
            0x17b,
            0x210,
            0x26f + 1,
            0x251,
            0x267,
            0xc001_0000,
            0xc001_006c,
            0xc001_0200,
            0xc000_0104,
            0,
            u32::MAX,
        ] {
            assert_eq!(read(&cpu, &model, index, 0), None, "{index:#x}");
            assert_eq!(write(&mut cpu, &model, index, 0, 0), None, "{index:#x}");
        }
        for index in [MTRR_CAP, MCG_CAP, FEATURE_CONTROL, LAST_BRANCH_FROM] {
            assert_eq!(write(&mut cpu, &model, index, 0, 0), None, "{index:#x}");
        }
    }
    assert_eq!(cpu, CpuState::reset());
}

proptest! {
    #[test]
    fn nothing_panics_and_a_refused_write_changes_nothing(index: u32, value: u64, low in 0u32..0x1000) {
        for model in [intel(), amd()] {
            for index in [index, low, 0xc000_0080 + (low & 0xff), 0xc001_0000 + low] {
                let mut cpu = CpuState::reset();
                let _ = read(&cpu, &model, index, value);
                if write(&mut cpu, &model, index, value, 3).is_none() {
                    prop_assert_eq!(&cpu, &CpuState::reset());
                }
            }
        }
    }
}
