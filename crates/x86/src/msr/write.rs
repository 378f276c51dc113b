//! WRMSR.

use super::index::*;
use super::memory_type::{fixed_index, valid_fixed, valid_low, valid_pat, variable_index};
use super::{Effect, bits};
use crate::control::efer;
use crate::cpuid::{CpuidModel, Feature, Vendor};
use crate::{CpuState, SegmentRegister};

/// Writes a register of the processor. `tsc` is the guest's time-stamp counter now. `None`: the
/// register is not there (or with the local APIC) or does not take the value, and nothing has
/// changed: #GP(0) if nobody else has it.
pub fn write(
    cpu: &mut CpuState,
    model: &CpuidModel,
    index: u32,
    value: u64,
    tsc: u64,
) -> Option<Effect> {
    if let Some(i) = fixed_index(index) {
        *cpu.msr
            .mtrr_fixed
            .get_mut(i)
            .filter(|_| valid_fixed(value))? = value;
        return Some(Effect::None);
    }
    if let Some((i, is_mask)) = variable_index(index) {
        return write_variable_range(cpu, model, i, is_mask, value);
    }
    let canonical = || CpuState::is_canonical(value).then_some(value);
    let msr = &mut cpu.msr;
    match index {
        EFER => return write_efer(cpu, model, value),
        TSC => {
            // The adjustment follows the counter (SDM vol. 3, 18.17.3).
            let delta = value.wrapping_sub(tsc);
            msr.tsc_offset = msr.tsc_offset.wrapping_add(delta);
            msr.tsc_adjust = msr.tsc_adjust.wrapping_add(delta);
            return Some(Effect::TscChanged);
        }
        TSC_ADJUST => {
            let delta = value.wrapping_sub(msr.tsc_adjust);
            msr.tsc_offset = msr.tsc_offset.wrapping_add(delta);
            msr.tsc_adjust = value;
            return Some(Effect::TscChanged);
        }
        // AMD's processors have 32 bits there and drop the others.
        TSC_AUX if model.vendor() == Vendor::Amd => msr.tsc_aux = value & 0xffff_ffff,
        TSC_AUX => msr.tsc_aux = u32::try_from(value).ok()?.into(),
        STAR => msr.star = value,
        LSTAR => msr.lstar = canonical()?,
        CSTAR => msr.cstar = canonical()?,
        SFMASK => msr.sfmask = value & 0xffff_ffff,
        FS_BASE => cpu.segment_mut(SegmentRegister::Fs).base = canonical()?,
        GS_BASE => cpu.segment_mut(SegmentRegister::Gs).base = canonical()?,
        KERNEL_GS_BASE => msr.kernel_gs_base = canonical()?,
        SYSENTER_CS => msr.sysenter_cs = value & 0xffff_ffff,
        // AMD's SYSENTER works in legacy mode only, with 32-bit addresses.
        SYSENTER_ESP if model.vendor() == Vendor::Amd => msr.sysenter_esp = value & 0xffff_ffff,
        SYSENTER_EIP if model.vendor() == Vendor::Amd => msr.sysenter_eip = value & 0xffff_ffff,
        SYSENTER_ESP => msr.sysenter_esp = canonical()?,
        SYSENTER_EIP => msr.sysenter_eip = canonical()?,
        PAT => msr.pat = Some(value).filter(|&v| valid_pat(v))?,
        MTRR_DEF_TYPE => {
            let valid = value & !bits::MTRR_DEF_TYPE == 0 && valid_low(value);
            msr.mtrr_def_type = valid.then_some(value)?;
        }
        MCG_STATUS => msr.mcg_status = value & 7,
        DEBUGCTL => msr.debug_ctl = Some(value).filter(|v| v & !bits::DEBUGCTL == 0)?,
        // Software writes zero and executes CPUID to learn the revision; an update is dropped.
        BIOS_SIGN_ID => {}
        _ => {
            return match model.vendor() {
                Vendor::Intel | Vendor::Other => write_intel(cpu, index, value),
                Vendor::Amd => write_amd(index, value),
            };
        }
    }
    Some(Effect::None)
}

fn write_intel(cpu: &mut CpuState, index: u32, value: u64) -> Option<Effect> {
    match index {
        // Only fast strings can be switched, and that has no effect.
        MISC_ENABLE => cpu.msr.misc_enable = value & bits::FAST_STRINGS,
        BIOS_UPDATE_TRIGGER | EBL_CR_POWERON | PERF_CTL => {}
        // FEATURE_CONTROL is locked; the others are read-only.
        _ => return None,
    }
    Some(Effect::None)
}

fn write_amd(index: u32, value: u64) -> Option<Effect> {
    /// HWCR: ignore CPUID-limit-like bits that firmware sets, and the ones that Linux toggles.
    const HWCR_WRITABLE: u64 = (1 << 3) | (1 << 6) | (1 << 8) | (1 << 18) | (1 << 24);
    match index {
        AMD_HWCR if value & !HWCR_WRITABLE == 0 => {}
        AMD_SYSCFG | AMD_NB_CFG | AMD_TOP_MEM | AMD_TOP_MEM2 | AMD_INT_PENDING
        | AMD_MMIO_CONF_BASE | AMD_PATCH_LOADER | AMD_DC_CFG | AMD_DE_CFG | AMD_BU_CFG2
        | AMD_OSVW_ID_LENGTH | AMD_OSVW_STATUS => {}
        AMD_PSTATE_LIMIT..=AMD_PSTATE_7 => {}
        _ => return None,
    }
    Some(Effect::None)
}

fn write_efer(cpu: &mut CpuState, model: &CpuidModel, value: u64) -> Option<Effect> {
    let mut writable = 0;
    for (feature, bits) in [
        (Feature::SYSCALL, efer::SCE),
        (Feature::LM, efer::LME),
        (Feature::NX, efer::NXE),
        (Feature::AUTOMATIC_IBRS, efer::AIBRSE),
    ] {
        if model.allows(feature) {
            writable |= bits;
        }
    }
    // A written LMA is ignored: it follows LME and CR0.PG.
    if value & !(writable | efer::LMA) != 0 {
        return None;
    }
    let new = (value & writable) | (cpu.efer & efer::LMA);
    let changed = new ^ cpu.efer;
    if changed & efer::LME != 0 && cpu.paging() {
        return None;
    }
    cpu.efer = new;
    Some(if changed & efer::NXE != 0 {
        Effect::FlushTlb
    } else if changed != 0 {
        Effect::ModeChanged
    } else {
        Effect::None
    })
}

fn write_variable_range(
    cpu: &mut CpuState,
    model: &CpuidModel,
    range: usize,
    is_mask: bool,
    value: u64,
) -> Option<Effect> {
    let address = (1u64 << model.physical_address_bits().clamp(12, 52)) - 0x1000;
    let (base, mask) = cpu.msr.mtrr_variable.get_mut(range)?;
    let (register, valid) = if is_mask {
        (mask, value & !(address | bits::MTRR_MASK_VALID) == 0)
    } else {
        (base, value & !(address | 0xff) == 0 && valid_low(value))
    };
    *register = valid.then_some(value)?;
    Some(Effect::None)
}
