//! Builds the guest's leaves from a processor's own.

use std::collections::BTreeMap;

use super::shown::{OF_HOST, OF_HOST_WITH_AVX, OF_HOST_WITH_AVX512, PROVIDED, REPEATED_BY_AMD};
use super::{
    CpuidConfig, CpuidModel, CpuidSource, Feature, Register, Registers, Vendor, topology, xsave,
};

const EXTENDED: u32 = 0x8000_0000;
const HYPERVISOR: u32 = 0x4000_0000;
/// Where hypervisors give the TSC's and the APIC timer's rates.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// Twelve bytes that tell the guest where it runs.
const SIGNATURE: &[u8; 12] = b"TraplineVMM\0";
/// The highest basic leaf that is ever shown.
const HIGHEST_INTEL: u32 = 0x1f;
const HIGHEST_OTHER: u32 = 0xd;
/// Linear-address bits of 4-level paging.
const LINEAR_ADDRESS_BITS: u32 = 48;
/// The narrowest physical address that a 64-bit system expects, and the widest that is shown.
const PHYSICAL_ADDRESS_BITS: std::ops::RangeInclusive<u32> = 36..=46;

/// The processor that this program runs on.
struct Host;

impl CpuidSource for Host {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Registers {
        let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    }
    fn xcr0(&self) -> u64 {
        // The detection of these features looks at XCR0; reading it needs an unsafe intrinsic.
        let mut components = 0b11;
        if std::is_x86_feature_detected!("avx") {
            components |= 0b100;
        }
        if std::is_x86_feature_detected!("avx512f") {
            components |= 0b1110_0000;
        }
        components
    }
}

fn vendor_of([_, ebx, ecx, edx]: Registers) -> Vendor {
    let mut name = [0; 12];
    for (bytes, register) in name.chunks_mut(4).zip([ebx, edx, ecx]) {
        bytes.copy_from_slice(&register.to_le_bytes());
    }
    match &name {
        b"GenuineIntel" => Vendor::Intel,
        b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
        _ => Vendor::Other,
    }
}

fn word(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, &byte| (value << 8) | byte as u32)
}

impl CpuidModel {
    /// The model for a virtual machine on the processor that this program runs on.
    pub fn from_host(config: CpuidConfig) -> Self {
        Self::from_source(&Host, config)
    }

    /// The model derived from another processor's leaves.
    pub fn from_source(source: &impl CpuidSource, config: CpuidConfig) -> Self {
        Builder::new(source, config).build()
    }
}

struct Builder<'a, S> {
    source: &'a S,
    config: CpuidConfig,
    vendor: Vendor,
    host_highest: u32,
    host_highest_extended: u32,
    leaves: BTreeMap<(u32, u32), Registers>,
    xcr0: u64,
}

impl<'a, S: CpuidSource> Builder<'a, S> {
    fn new(source: &'a S, config: CpuidConfig) -> Self {
        let basic = source.cpuid(0, 0);
        let extended = source.cpuid(EXTENDED, 0)[0];
        Self {
            source,
            config,
            vendor: vendor_of(basic),
            host_highest: basic[0],
            // A processor without extended leaves answers with something else.
            host_highest_extended: if extended >> 16 == 0x8000 {
                extended
            } else {
                EXTENDED
            },
            leaves: BTreeMap::new(),
            xcr0: xsave::supported(source, basic[0]),
        }
    }

    /// The host's leaf; zero where the host does not have it (Intel repeats its highest leaf).
    fn host(&self, leaf: u32, subleaf: u32) -> Registers {
        let highest = if leaf >= EXTENDED {
            self.host_highest_extended
        } else {
            self.host_highest
        };
        if leaf > highest {
            [0; 4]
        } else {
            self.source.cpuid(leaf, subleaf)
        }
    }

    fn host_has(&self, feature: Feature) -> bool {
        if feature.leaf == 7 && feature.subleaf > self.host(7, 0)[0] {
            return false;
        }
        self.host(feature.leaf, feature.subleaf)[feature.register as usize] & feature.mask() != 0
    }

    fn leaf(&mut self, leaf: u32, subleaf: u32) -> &mut Registers {
        self.leaves.entry((leaf, subleaf)).or_default()
    }

    fn show(&mut self, feature: Feature) {
        self.leaf(feature.leaf, feature.subleaf)[feature.register as usize] |= feature.mask();
    }

    fn hide(&mut self, feature: Feature) {
        self.leaf(feature.leaf, feature.subleaf)[feature.register as usize] &= !feature.mask();
    }

    fn build(mut self) -> CpuidModel {
        self.identity();
        self.features();
        self.topology();
        self.xsave();
        self.timing();
        self.extended();
        CpuidModel {
            vcpus: self.config.vcpus,
            vendor: self.vendor,
            leaves: self.leaves,
            xcr0_supported: self.xcr0,
        }
    }

    /// Vendor, family, model, stepping and name.
    fn identity(&mut self) {
        let mut basic = self.host(0, 0);
        let highest = if self.vendor == Vendor::Intel {
            HIGHEST_INTEL
        } else {
            HIGHEST_OTHER
        };
        basic[0] = basic[0].clamp(HIGHEST_OTHER, highest);
        if self.vendor == Vendor::Intel && self.config.tsc_khz.is_some() {
            basic[0] = basic[0].max(0x16);
        }
        *self.leaf(0, 0) = basic;
        let [eax, ebx, ..] = self.host(1, 0);
        // Brand index and CLFLUSH line size.
        *self.leaf(1, 0) = [eax, ebx & 0xffff, 0, 0];
        if self.vendor == Vendor::Intel {
            *self.leaf(2, 0) = self.host(2, 0);
        }
        let mut extended = self.host(EXTENDED, 0);
        let highest = if self.vendor == Vendor::Amd {
            0x8000_0021
        } else {
            0x8000_0008
        };
        extended[0] = self.host_highest_extended.clamp(0x8000_0008, highest);
        *self.leaf(EXTENDED, 0) = extended;
        let [eax, ebx, ..] = self.host(0x8000_0001, 0);
        let ebx = if self.vendor == Vendor::Amd { ebx } else { 0 };
        *self.leaf(0x8000_0001, 0) = [eax, ebx, 0, 0];
        for leaf in 0x8000_0002..=0x8000_0006 {
            *self.leaf(leaf, 0) = self.host(leaf, 0);
        }
    }

    fn features(&mut self) {
        self.leaf(7, 0)[0] = self.host(7, 0)[0].min(1);
        let avx = xsave::has_avx(self.xcr0);
        let avx512 = xsave::has_avx512(self.xcr0);
        let lists = [
            (OF_HOST, true),
            (OF_HOST_WITH_AVX, avx),
            (OF_HOST_WITH_AVX512, avx512),
        ];
        for (list, enabled) in lists {
            for &feature in list {
                if enabled && self.host_has(feature) {
                    self.show(feature);
                }
            }
        }
        for &feature in PROVIDED {
            self.show(feature);
        }
        if !self.host_has(Feature::OSXSAVE) {
            self.hide(Feature::XSAVE);
        }
        if self.vendor == Vendor::Amd {
            let repeated = self.leaf(1, 0)[Register::Edx as usize] & REPEATED_BY_AMD;
            self.leaf(0x8000_0001, 0)[Register::Edx as usize] |= repeated;
        }
    }

    fn topology(&mut self) {
        let vcpus = self.config.vcpus;
        let ids = vcpus.max(1).next_power_of_two();
        if vcpus > 1 {
            self.show(Feature::HTT);
            if self.vendor == Vendor::Amd {
                self.show(Feature::CMP_LEGACY);
            }
        }
        let logical = if self.vendor == Vendor::Amd {
            vcpus
        } else {
            ids
        };
        self.leaf(1, 0)[1] |= logical.min(255) << 16;
        let highest = self.leaf(0, 0)[0];
        for leaf in [0xb, 0x1f] {
            if leaf <= highest {
                for (subleaf, registers) in topology::extended_topology(vcpus) {
                    *self.leaf(leaf, subleaf) = registers;
                }
            }
        }
        let cache_leaf = match self.vendor {
            Vendor::Intel if self.host_highest >= 4 => Some(4),
            Vendor::Amd if self.host_has(Feature::TOPOEXT) => Some(0x8000_001d),
            _ => None,
        };
        if let Some(leaf) = cache_leaf {
            for (subleaf, registers) in topology::caches(self.source, leaf, &self.config) {
                *self.leaf(leaf, subleaf) = registers;
            }
        }
        if self.vendor == Vendor::Amd && self.host_has(Feature::TOPOEXT) {
            // One thread per core, one node; ids are filled in at execution.
            *self.leaf(0x8000_001e, 0) = [0; 4];
        }
    }

    fn xsave(&mut self) {
        if self.leaf(1, 0)[Register::Ecx as usize] & Feature::XSAVE.mask() == 0 {
            self.xcr0 = 0b11;
            return;
        }
        for (subleaf, registers) in xsave::subleaves(self.source, self.xcr0) {
            *self.leaf(0xd, subleaf) = registers;
        }
    }

    /// Rates, where they are known: in the processor's leaves (Intel) and the hypervisor's.
    fn timing(&mut self) {
        let (tsc_khz, bus_khz) = (self.config.tsc_khz, self.config.apic_bus_khz);
        let known = tsc_khz.is_some();
        *self.leaf(HYPERVISOR, 0) = [
            if known { HYPERVISOR_TIMING } else { HYPERVISOR },
            word(&SIGNATURE[0..4]),
            word(&SIGNATURE[4..8]),
            word(&SIGNATURE[8..12]),
        ];
        let Some(tsc_khz) = tsc_khz else { return };
        *self.leaf(HYPERVISOR_TIMING, 0) = [tsc_khz, bus_khz.unwrap_or(0), 0, 0];
        if self.vendor != Vendor::Intel {
            return;
        }
        // The core crystal clock is also the APIC timer's input: TSC = crystal * EBX / EAX.
        if let Some((bus_khz, hertz)) = bus_khz.and_then(|khz| Some((khz, khz.checked_mul(1000)?)))
        {
            *self.leaf(0x15, 0) = [bus_khz, tsc_khz, hertz, 0];
        }
        let megahertz = tsc_khz.saturating_add(500) / 1000;
        let bus_megahertz = bus_khz.map_or(100, |khz| khz / 1000);
        *self.leaf(0x16, 0) = [megahertz, megahertz, bus_megahertz, 0];
    }

    fn extended(&mut self) {
        let host = self.host(0x8000_0008, 0);
        let physical =
            (host[0] & 0xff).clamp(*PHYSICAL_ADDRESS_BITS.start(), *PHYSICAL_ADDRESS_BITS.end());
        self.leaf(0x8000_0008, 0)[0] = physical | (LINEAR_ADDRESS_BITS << 8);
        if self.vendor == Vendor::Amd {
            let cores = (self.config.vcpus.max(1) - 1).min(0xff);
            let id_bits = topology::id_bits(self.config.vcpus).min(15);
            self.leaf(0x8000_0008, 0)[2] = cores | (id_bits << 12);
            // TLBs for 1 GiB pages and performance hints.
            for leaf in [0x8000_0019, 0x8000_001a] {
                *self.leaf(leaf, 0) = self.host(leaf, 0);
            }
            if self.host_highest_extended >= 0x8000_0021 {
                // Loading a null selector clears the hidden base here.
                self.show(Feature::NULL_SELECTOR_CLEARS_BASE);
                // A guest's branches are looked up, whatever calls and returns it makes of them:
                // the sequences by which a system guards them would shield nothing here.
                self.show(Feature::AUTOMATIC_IBRS);
                self.show(Feature::SRSO_NO);
            }
        }
        // Leaves past the highest one would be found by software that does not look there.
        let highest = self.leaf(EXTENDED, 0)[0];
        let basic = self.leaf(0, 0)[0];
        self.leaves.retain(|&(leaf, _), _| {
            leaf <= if leaf >= EXTENDED {
                highest
            } else if leaf < HYPERVISOR {
                basic
            } else {
                u32::MAX
            }
        });
    }
}
