//! Numbers of model-specific registers.

pub const TSC: u32 = 0x10;
pub const PLATFORM_ID: u32 = 0x17;
/// Of the local APIC.
pub const APIC_BASE: u32 = 0x1b;
pub const EBL_CR_POWERON: u32 = 0x2a;
pub const SMI_COUNT: u32 = 0x34;
pub const FEATURE_CONTROL: u32 = 0x3a;
pub const TSC_ADJUST: u32 = 0x3b;
pub const BIOS_UPDATE_TRIGGER: u32 = 0x79;
/// AMD: PATCH_LEVEL.
pub const BIOS_SIGN_ID: u32 = 0x8b;
pub const MTRR_CAP: u32 = 0xfe;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const PERF_STATUS: u32 = 0x198;
pub const PERF_CTL: u32 = 0x199;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const DEBUGCTL: u32 = 0x1d9;
pub const LAST_BRANCH_FROM: u32 = 0x1db;
pub const LAST_INT_TO: u32 = 0x1de;
/// Base and mask of eight variable ranges, up to 0x20f.
pub const MTRR_PHYSBASE0: u32 = 0x200;
pub const MTRR_PHYSMASK7: u32 = 0x20f;
pub const MTRR_FIX64K_00000: u32 = 0x250;
pub const MTRR_FIX16K_80000: u32 = 0x258;
pub const MTRR_FIX16K_A0000: u32 = 0x259;
/// Eight registers, up to 0x26f.
pub const MTRR_FIX4K_C0000: u32 = 0x268;
pub const MTRR_FIX4K_F8000: u32 = 0x26f;
pub const PAT: u32 = 0x277;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
/// Of the local APIC.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// The first and last of the local APIC's x2APIC registers.
pub const X2APIC_FIRST: u32 = 0x800;
pub const X2APIC_LAST: u32 = 0x8ff;

pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;

pub const AMD_SYSCFG: u32 = 0xc001_0010;
pub const AMD_HWCR: u32 = 0xc001_0015;
pub const AMD_TOP_MEM: u32 = 0xc001_001a;
pub const AMD_TOP_MEM2: u32 = 0xc001_001d;
pub const AMD_NB_CFG: u32 = 0xc001_001f;
pub const AMD_PATCH_LOADER: u32 = 0xc001_0020;
pub const AMD_INT_PENDING: u32 = 0xc001_0055;
pub const AMD_MMIO_CONF_BASE: u32 = 0xc001_0058;
/// P-state limit, control, status and eight definitions, up to 0xc001_006b.
pub const AMD_PSTATE_LIMIT: u32 = 0xc001_0061;
pub const AMD_PSTATE_7: u32 = 0xc001_006b;
pub const AMD_OSVW_ID_LENGTH: u32 = 0xc001_0140;
pub const AMD_OSVW_STATUS: u32 = 0xc001_0141;
pub const AMD_LS_CFG: u32 = 0xc001_1020;
pub const AMD_DC_CFG: u32 = 0xc001_1022;
pub const AMD_DE_CFG: u32 = 0xc001_1029;
pub const AMD_BU_CFG2: u32 = 0xc001_102a;
