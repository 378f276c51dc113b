//! Model-specific registers of the processor itself (SDM vol. 4; AMD's APM vol. 2, appendix A).
//! Those of the local APIC (IA32_APIC_BASE, 0x800 to 0x8ff, IA32_TSC_DEADLINE) live with it.

pub mod index;
mod memory_type;
mod read;
mod write;

#[cfg(test)]
mod tests;

pub use read::read;
pub use write::write;

/// What a write to a model-specific register changed besides the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    /// Translations may mean something else now: all of them must go.
    FlushTlb,
    /// How instructions execute changed: what is cached about the current mode must go.
    ModeChanged,
    /// The time-stamp counter jumped: a TSC deadline must be armed anew.
    TscChanged,
}

/// Bits of MSRs that have no place in [`crate::control`].
pub(crate) mod bits {
    /// IA32_FEATURE_CONTROL: locked, so that nothing else can be switched on.
    pub const FEATURE_CONTROL_LOCKED: u64 = 1;
    /// IA32_MISC_ENABLE: fast string operations.
    pub const FAST_STRINGS: u64 = 1;
    /// IA32_MISC_ENABLE: no branch trace store, no precise event-based sampling.
    pub const NO_BTS_NO_PEBS: u64 = 3 << 11;
    /// HWCR: the time-stamp counter runs at the P0 frequency.
    pub const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
    /// DE_CFG: LFENCE serializes.
    pub const DE_CFG_LFENCE_SERIALIZES: u64 = 1 << 1;
    /// IA32_MTRRCAP: number of variable ranges, fixed ranges, write-combining.
    pub const MTRR_CAP: u64 = 8 | (1 << 8) | (1 << 10);
    /// IA32_MTRR_DEF_TYPE: default type, fixed ranges enabled, enabled.
    pub const MTRR_DEF_TYPE: u64 = 0xff | (1 << 10) | (1 << 11);
    /// IA32_MTRR_PHYSMASK: valid.
    pub const MTRR_MASK_VALID: u64 = 1 << 11;
    /// IA32_DEBUGCTL: last branch record, single-step on branches.
    pub const DEBUGCTL: u64 = 3;
}
