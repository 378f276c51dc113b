//! The XSAVE area: where each state component lies in it, and conversion from and to the registers
//! (SDM vol. 1, 10.5 and 13.4).

use std::sync::OnceLock;

use trapline_x86::control::xcr0;
use trapline_x86::vector::{FCW_INIT, MXCSR_RESET, VectorState, X87};

/// State components behind the legacy region by their bit in XCR0 (SDM vol. 1, 13.1).
const OPMASK: usize = 5;
const ZMM_HI256: usize = 6;
const HI16_ZMM: usize = 7;
/// Components that lie behind the header, in the order of their bits.
const EXTENDED: [usize; 4] = [2, OPMASK, ZMM_HI256, HI16_ZMM];

/// Bytes of the legacy region that FXSAVE writes; the rest is left to software.
pub const LEGACY_WRITTEN: usize = 416;
/// Bytes of the legacy region.
pub const LEGACY: usize = 512;
/// Offset of the extended region: legacy region and header.
pub const EXTENDED_AT: usize = 576;
/// At least as large as any area of these components, in either form.
pub const LARGEST: usize = 4096;
/// Where MXCSR lies; its mask follows.
pub const MXCSR_AT: usize = 24;
const XMM_AT: usize = 160;
/// The x87 part of the legacy region: before MXCSR, and ST0 to ST7.
pub const X87_RANGES: [(usize, usize); 2] = [(0, 24), (32, 128)];

/// One component's place, from CPUID leaf 0xD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    offset: usize,
    size: usize,
    /// Aligned to 64 bytes in the compacted form.
    aligned: bool,
}

#[derive(Debug)]
struct Host {
    places: [Place; 8],
}

/// What the host says; the guest's CPUID repeats it.
fn host() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(|| {
        use std::arch::x86_64::__cpuid_count;
        let mut places = [Place::default(); 8];
        if __cpuid_count(0, 0).eax >= 0xd {
            for i in EXTENDED {
                let found = __cpuid_count(0xd, i as u32);
                let place = Place {
                    offset: found.ebx as usize,
                    size: found.eax as usize,
                    aligned: found.ecx & 2 != 0,
                };
                let end = place.offset.saturating_add(place.size);
                if place.size >= component_bytes(i) && end <= LARGEST {
                    places[i] = place;
                }
            }
        }
        Host { places }
    })
}

/// Bytes that the registers of a component take.
const fn component_bytes(component: usize) -> usize {
    match component {
        2 => 256,
        OPMASK => 64,
        ZMM_HI256 => 512,
        _ => 1024,
    }
}

/// The bits that may be set in MXCSR. AMD's bit 17, MM (APM vol. 1, 4.2.2), is not: misaligned-SSE
/// mode would reach some instructions only, so CPUID does not show it.
pub const fn mxcsr_mask() -> u32 {
    0xffff
}

/// Offset and length of each extended component of `components` in the standard form.
pub fn standard(components: u64) -> impl Iterator<Item = (usize, usize, usize)> {
    EXTENDED.into_iter().filter_map(move |i| {
        let place = host().places[i];
        (components >> i & 1 != 0 && place.size != 0).then_some((
            i,
            place.offset,
            component_bytes(i),
        ))
    })
}

/// As [`standard`] in the compacted form of an area whose XCOMP_BV has `components`.
pub fn compacted(components: u64) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut end = EXTENDED_AT;
    EXTENDED.into_iter().filter_map(move |i| {
        let place = host().places[i];
        if components >> i & 1 == 0 || place.size == 0 {
            return None;
        }
        let at = if place.aligned {
            end.next_multiple_of(64)
        } else {
            end
        };
        end = at + place.size;
        Some((i, at, component_bytes(i)))
    })
}

/// Components that are not in their initial configuration.
pub fn in_use(v: &VectorState) -> u64 {
    let zero = |from: usize, to: usize, registers: std::ops::Range<usize>| {
        v.zmm[registers]
            .iter()
            .all(|z| z.0[from..to].iter().all(|b| *b == 0))
    };
    let mut used = 0;
    if !x87_is_initial(&v.x87) {
        used |= xcr0::X87;
    }
    if !zero(0, 16, 0..16) {
        used |= xcr0::SSE;
    }
    if !zero(16, 32, 0..16) {
        used |= xcr0::AVX;
    }
    if v.k.iter().any(|k| *k != 0) {
        used |= 1 << OPMASK;
    }
    if !zero(32, 64, 0..16) {
        used |= 1 << ZMM_HI256;
    }
    if !zero(0, 64, 16..32) {
        used |= 1 << HI16_ZMM;
    }
    used
}

fn x87_is_initial(x87: &X87) -> bool {
    x87.0[..2] == FCW_INIT.to_le_bytes()
        && x87.0[2..24].iter().all(|b| *b == 0)
        && (0..8).all(|i| x87.0[32 + 16 * i..][..10].iter().all(|b| *b == 0))
}

/// Sets components to their initial configuration; MXCSR is not one.
pub fn initialize(v: &mut VectorState, components: u64, long: bool) {
    let low = if long { 16 } else { 8 };
    if components & xcr0::X87 != 0 {
        let initial = X87::init();
        for (at, len) in X87_RANGES {
            v.x87.0[at..at + len].copy_from_slice(&initial.0[at..at + len]);
        }
    }
    if components & xcr0::SSE != 0 {
        v.zmm[..low].iter_mut().for_each(|z| z.0[..16].fill(0));
    }
    if components & xcr0::AVX != 0 {
        v.zmm[..low].iter_mut().for_each(|z| z.0[16..32].fill(0));
    }
    if components >> OPMASK & 1 != 0 {
        v.k = [0; 8];
    }
    if components >> ZMM_HI256 & 1 != 0 {
        v.zmm[..low].iter_mut().for_each(|z| z.0[32..].fill(0));
    }
    if components >> HI16_ZMM & 1 != 0 && long {
        v.zmm[16..].iter_mut().for_each(|z| z.0.fill(0));
    }
}

/// Writes the legacy region's x87 part to `area`. `wide` is the form with 64-bit instruction and
/// data pointers (REX.W); the other has 32-bit pointers and selectors, which read as zero.
pub fn store_x87(v: &VectorState, area: &mut [u8], wide: bool) {
    for (at, len) in X87_RANGES {
        area[at..at + len].copy_from_slice(&v.x87.0[at..at + len]);
    }
    area[5] = 0;
    if !wide {
        area[12..16].fill(0);
        area[20..24].fill(0);
    }
}

/// Reads the legacy region's x87 part.
pub fn load_x87(v: &mut VectorState, area: &[u8], wide: bool) {
    for (at, len) in X87_RANGES {
        v.x87.0[at..at + len].copy_from_slice(&area[at..at + len]);
    }
    v.x87.0[5] = 0;
    if !wide {
        v.x87.0[12..16].fill(0);
        v.x87.0[20..24].fill(0);
    }
}

/// Writes MXCSR and its mask.
pub fn store_mxcsr(v: &VectorState, area: &mut [u8]) {
    area[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&v.mxcsr.to_le_bytes());
    area[MXCSR_AT + 4..MXCSR_AT + 8].copy_from_slice(&mxcsr_mask().to_le_bytes());
}

/// MXCSR in an area.
pub fn mxcsr_of(area: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&area[MXCSR_AT..MXCSR_AT + 4]);
    u32::from_le_bytes(bytes)
}

/// Offset and length of the XMM registers in the legacy region.
pub const fn xmm_range(long: bool) -> (usize, usize) {
    (XMM_AT, if long { 256 } else { 128 })
}

/// Writes the XMM registers.
pub fn store_xmm(v: &VectorState, area: &mut [u8], long: bool) {
    let (at, len) = xmm_range(long);
    for (to, z) in area[at..at + len].chunks_exact_mut(16).zip(&v.zmm) {
        to.copy_from_slice(&z.0[..16]);
    }
}

/// Reads the XMM registers.
pub fn load_xmm(v: &mut VectorState, area: &[u8], long: bool) {
    let (at, len) = xmm_range(long);
    for (from, z) in area[at..at + len].chunks_exact(16).zip(&mut v.zmm) {
        z.0[..16].copy_from_slice(from);
    }
}

/// Bytes of an extended component that exist outside 64-bit mode.
pub const fn visible_bytes(component: usize, bytes: usize, long: bool) -> usize {
    match component {
        _ if long => bytes,
        2 | ZMM_HI256 => bytes / 2,
        HI16_ZMM => 0,
        _ => bytes,
    }
}

/// Writes an extended component to `area`, its place; a shorter `area` takes the first registers.
pub fn store_component(v: &VectorState, component: usize, area: &mut [u8]) {
    match component {
        2 => {
            for (to, z) in area.chunks_exact_mut(16).zip(&v.zmm) {
                to.copy_from_slice(&z.0[16..32]);
            }
        }
        OPMASK => {
            for (to, k) in area.chunks_exact_mut(8).zip(&v.k) {
                to.copy_from_slice(&k.to_le_bytes());
            }
        }
        ZMM_HI256 => {
            for (to, z) in area.chunks_exact_mut(32).zip(&v.zmm) {
                to.copy_from_slice(&z.0[32..]);
            }
        }
        _ => {
            for (to, z) in area.chunks_exact_mut(64).zip(&v.zmm[16..]) {
                to.copy_from_slice(&z.0);
            }
        }
    }
}

/// Reads an extended component from `area`, its place.
pub fn load_component(v: &mut VectorState, component: usize, area: &[u8]) {
    match component {
        2 => {
            for (from, z) in area.chunks_exact(16).zip(&mut v.zmm) {
                z.0[16..32].copy_from_slice(from);
            }
        }
        OPMASK => {
            for (from, k) in area.chunks_exact(8).zip(&mut v.k) {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(from);
                *k = u64::from_le_bytes(bytes);
            }
        }
        ZMM_HI256 => {
            for (from, z) in area.chunks_exact(32).zip(&mut v.zmm) {
                z.0[32..].copy_from_slice(from);
            }
        }
        _ => {
            for (from, z) in area.chunks_exact(64).zip(&mut v.zmm[16..]) {
                z.0.copy_from_slice(from);
            }
        }
    }
}

/// MXCSR's initial value.
pub const MXCSR_INITIAL: u32 = MXCSR_RESET;
