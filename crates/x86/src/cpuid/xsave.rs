//! The XSAVE leaf: sizes and offsets of state components (SDM vol. 1, 13.2 and 13.4).

use super::{CpuidModel, CpuidSource, Registers};
use crate::control::xcr0::{AVX, AVX512, SSE, X87};

/// Legacy region and header.
const FIXED_BYTES: u32 = 576;
/// ECX of a component's subleaf: aligned to 64 bytes in the compacted form.
const ALIGNED: u32 = 1 << 1;

/// Components of the host that the guest may enable.
pub(super) fn supported(source: &impl CpuidSource, highest_leaf: u32) -> u64 {
    if highest_leaf < 0xd {
        return X87 | SSE;
    }
    let enumerated = source.cpuid(0xd, 0)[0] as u64;
    let mut components = source.xcr0() & enumerated & (X87 | SSE | AVX | AVX512);
    components |= X87 | SSE;
    if components & AVX == 0 || components & AVX512 != AVX512 {
        components &= !AVX512;
    }
    components
}

pub(super) const fn has_avx(components: u64) -> bool {
    components & AVX != 0
}
pub(super) const fn has_avx512(components: u64) -> bool {
    components & AVX512 == AVX512
}

/// The subleaves of leaf 0xD; EBX of subleaves 0 and 1 is computed at the time of execution.
pub(super) fn subleaves(
    source: &impl CpuidSource,
    components: u64,
) -> impl Iterator<Item = (u32, Registers)> {
    let parts: Vec<_> = (2..64)
        .filter(|&i| components & (1 << i) != 0)
        .map(|i| {
            let [size, offset, ecx, _] = source.cpuid(0xd, i);
            (i, [size, offset, ecx & ALIGNED, 0])
        })
        .collect();
    let largest = parts
        .iter()
        .map(|(_, r)| r[0].wrapping_add(r[1]))
        .fold(FIXED_BYTES, u32::max);
    let instructions = source.cpuid(0xd, 1)[0] & 0b111;
    [
        (
            0,
            [components as u32, 0, largest, (components >> 32) as u32],
        ),
        (1, [instructions, 0, 0, 0]),
    ]
    .into_iter()
    .chain(parts)
}

impl CpuidModel {
    fn components(&self, xcr0: u64) -> impl Iterator<Item = &Registers> {
        (2..64)
            .filter(move |&i| xcr0 & (1 << i) != 0)
            .filter_map(|i| self.leaves.get(&(0xd, i)))
    }

    /// Bytes of an XSAVE area in standard form for the components enabled in `xcr0`.
    pub fn xsave_size(&self, xcr0: u64) -> u32 {
        self.components(xcr0)
            .map(|r| r[0].wrapping_add(r[1]))
            .fold(FIXED_BYTES, u32::max)
    }

    /// Bytes of an XSAVE area in compacted form; 0 without XSAVEC.
    pub fn xsave_compacted_size(&self, xcr0: u64) -> u32 {
        if !self.allows(super::Feature::XSAVEC) {
            return 0;
        }
        self.components(xcr0).fold(FIXED_BYTES, |end, r| {
            let start = if r[2] & ALIGNED != 0 {
                end.next_multiple_of(64)
            } else {
                end
            };
            start.saturating_add(r[0])
        })
    }
}
