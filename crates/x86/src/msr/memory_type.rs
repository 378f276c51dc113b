//! Memory types (SDM vol. 3, table 12-2): accepted and kept; caches are the host's affair.

/// Whether a MTRR may hold the type: UC, WC, WT, WP or WB.
const fn in_mtrr(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

/// Whether `value` may be written to a fixed-range MTRR, a byte per range.
pub(super) fn valid_fixed(value: u64) -> bool {
    value.to_le_bytes().into_iter().all(in_mtrr)
}

/// Whether the low byte of `value` is a type that a MTRR may hold.
pub(super) fn valid_low(value: u64) -> bool {
    in_mtrr(value as u8)
}

/// Whether `value` may be written to IA32_PAT: the MTRR types and UC-.
pub(super) fn valid_pat(value: u64) -> bool {
    value
        .to_le_bytes()
        .into_iter()
        .all(|kind| in_mtrr(kind) || kind == 7)
}

/// The index of a fixed-range MTRR in ascending order of the memory that it covers.
pub(super) fn fixed_index(msr: u32) -> Option<usize> {
    use super::index::*;
    Some(match msr {
        MTRR_FIX64K_00000 => 0,
        MTRR_FIX16K_80000 => 1,
        MTRR_FIX16K_A0000 => 2,
        MTRR_FIX4K_C0000..=MTRR_FIX4K_F8000 => 3 + (msr - MTRR_FIX4K_C0000) as usize,
        _ => return None,
    })
}

/// The range of a variable-range MTRR, and whether it is its mask.
pub(super) fn variable_index(msr: u32) -> Option<(usize, bool)> {
    use super::index::*;
    (MTRR_PHYSBASE0..=MTRR_PHYSMASK7)
        .contains(&msr)
        .then(|| (((msr - MTRR_PHYSBASE0) / 2) as usize, msr & 1 != 0))
}
