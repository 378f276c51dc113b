//! RDMSR.

use super::bits;
use super::index::*;
use super::memory_type::{fixed_index, variable_index};
use crate::cpuid::{CpuidModel, Feature, Vendor};
use crate::{CpuState, SegmentRegister};

/// Reads a register of the processor. `tsc` is the guest's time-stamp counter now. `None`: the
/// register is not there, or not here but with the local APIC: #GP(0) if nobody has it.
pub fn read(cpu: &CpuState, model: &CpuidModel, index: u32, tsc: u64) -> Option<u64> {
    let msr = &cpu.msr;
    if let Some(i) = fixed_index(index) {
        return msr.mtrr_fixed.get(i).copied();
    }
    if let Some((i, is_mask)) = variable_index(index) {
        return msr
            .mtrr_variable
            .get(i)
            .map(|&(base, mask)| if is_mask { mask } else { base });
    }
    Some(match index {
        TSC => tsc,
        TSC_ADJUST => msr.tsc_adjust,
        TSC_AUX => msr.tsc_aux,
        EFER => cpu.efer,
        STAR => msr.star,
        LSTAR => msr.lstar,
        CSTAR => msr.cstar,
        SFMASK => msr.sfmask,
        FS_BASE => cpu.segment(SegmentRegister::Fs).base,
        GS_BASE => cpu.segment(SegmentRegister::Gs).base,
        KERNEL_GS_BASE => msr.kernel_gs_base,
        SYSENTER_CS => msr.sysenter_cs,
        SYSENTER_ESP => msr.sysenter_esp,
        SYSENTER_EIP => msr.sysenter_eip,
        PAT => msr.pat,
        MTRR_CAP => bits::MTRR_CAP,
        MTRR_DEF_TYPE => msr.mtrr_def_type,
        // No banks, no control register.
        MCG_CAP => 0,
        MCG_STATUS => msr.mcg_status,
        DEBUGCTL => msr.debug_ctl,
        LAST_BRANCH_FROM..=LAST_INT_TO => 0,
        BIOS_SIGN_ID => match model.vendor() {
            Vendor::Intel => 1 << 32,
            Vendor::Amd | Vendor::Other => 1,
        },
        _ => {
            return match model.vendor() {
                Vendor::Intel | Vendor::Other => read_intel(cpu, index),
                Vendor::Amd => read_amd(model, index),
            };
        }
    })
}

fn read_intel(cpu: &CpuState, index: u32) -> Option<u64> {
    Some(match index {
        MISC_ENABLE => cpu.msr.misc_enable | bits::NO_BTS_NO_PEBS,
        FEATURE_CONTROL => bits::FEATURE_CONTROL_LOCKED,
        PLATFORM_ID | EBL_CR_POWERON | SMI_COUNT | PERF_STATUS | PERF_CTL => 0,
        _ => return None,
    })
}

fn read_amd(model: &CpuidModel, index: u32) -> Option<u64> {
    Some(match index {
        AMD_HWCR => bits::HWCR_TSC_FREQ_SEL,
        AMD_DE_CFG if model.allows(Feature::SSE2) => bits::DE_CFG_LFENCE_SERIALIZES,
        AMD_SYSCFG | AMD_NB_CFG | AMD_TOP_MEM | AMD_TOP_MEM2 | AMD_INT_PENDING
        | AMD_MMIO_CONF_BASE | AMD_OSVW_ID_LENGTH | AMD_OSVW_STATUS | AMD_DC_CFG | AMD_BU_CFG2 => 0,
        AMD_PSTATE_LIMIT..=AMD_PSTATE_7 => 0,
        _ => return None,
    })
}
