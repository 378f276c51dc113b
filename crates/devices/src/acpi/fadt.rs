//! The fixed ACPI description table.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::acpi_pm::{CONTROL_BLOCK, EVENT_BLOCK, TIMER_BLOCK};
use crate::reset_control::{RESET_PORT, RESET_VALUE};
use crate::{cmos, lines};

/// IAPC_BOOT_ARCH: devices on fixed ISA ports exist (the serial line), an 8042 does not announce
/// itself, there is no VGA, and no PCI Express.
const BOOT_ARCHITECTURE: u16 = 1 | 1 << 2 | 1 << 4;

/// The table, with the 32-bit addresses of FACS and DSDT.
pub(super) fn fadt(facs: u32, dsdt: u32) -> FADT {
    let port = |address: u16, bits: u8, access| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, address.into())
    };
    // No PWR_BUTTON flag: the power button is one of the fixed registers. The sleep button and the
    // clock's wake-up are not.
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .preferred_pm_profile(PmProfile::Unspecified)
        .firmware_ctrl_32(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    table.dsdt = dsdt.into();
    table.x_dsdt = u64::from(dsdt).into();
    table.sci_int = u16::from(lines::SYSTEM_CONTROL).into();
    table.pm1a_evt_blk = u32::from(EVENT_BLOCK).into();
    table.pm1a_cnt_blk = u32::from(CONTROL_BLOCK).into();
    table.pm_tmr_blk = u32::from(TIMER_BLOCK).into();
    table.pm1_evt_len = 4;
    table.pm1_cnt_len = 2;
    table.pm_tmr_len = 4;
    table.x_pm1a_evt_blk = port(EVENT_BLOCK, 32, AccessSize::WordAccess);
    table.x_pm1a_cnt_blk = port(CONTROL_BLOCK, 16, AccessSize::WordAccess);
    table.x_pm_tmr_blk = port(TIMER_BLOCK, 32, AccessSize::DwordAccess);
    // C2 and C3 do not exist: latencies beyond what a system uses.
    table.p_lvl2_lat = 0xfff.into();
    table.p_lvl3_lat = 0xfff.into();
    table.century = cmos::CENTURY;
    table.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    table.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    table.reset_value = RESET_VALUE;
    table.finalize()
}
