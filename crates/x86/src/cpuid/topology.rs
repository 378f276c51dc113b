//! Topology leaves: one package of single-threaded cores whose x2APIC ids are the VCPU indices.

use super::{CpuidConfig, CpuidSource, Registers};

/// Level types of leaf 0xB, in ECX bits 8 to 15.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// ECX of a leaf-0xB subleaf that lies beyond the last level carries type 0.
const CACHE_SUBLEAVES: u32 = 8;

/// Bits of an APIC id that tell the cores of the package apart.
pub(super) fn id_bits(vcpus: u32) -> u32 {
    vcpus.max(1).next_power_of_two().trailing_zeros()
}

/// Leaf 0xB or 0x1F; EDX, the id, is filled in at execution.
pub(super) fn extended_topology(vcpus: u32) -> [(u32, Registers); 2] {
    [
        (0, [0, 1, LEVEL_SMT << 8, 0]),
        (1, [id_bits(vcpus), vcpus, (LEVEL_CORE << 8) | 1, 0]),
    ]
}

/// Leaf 4 (Intel) or 0x8000_001D (AMD): the host's caches, level 3 and up shared by all cores, the
/// others private.
pub(super) fn caches(
    source: &impl CpuidSource,
    leaf: u32,
    config: &CpuidConfig,
) -> Vec<(u32, Registers)> {
    let ids = config.vcpus.max(1).next_power_of_two();
    let mut found = Vec::new();
    for subleaf in 0..CACHE_SUBLEAVES {
        let [eax, ebx, ecx, edx] = source.cpuid(leaf, subleaf);
        if eax & 0x1f == 0 {
            break;
        }
        let level = (eax >> 5) & 7;
        let sharing = if level >= 3 { (ids - 1).min(0xfff) } else { 0 };
        let mut eax = (eax & 0x3fff) | (sharing << 14);
        if leaf == 4 {
            // Addressable ids for cores in the package, less one.
            eax |= (ids - 1).min(0x3f) << 26;
        }
        found.push((subleaf, [eax, ebx, ecx, edx]));
    }
    found
}
