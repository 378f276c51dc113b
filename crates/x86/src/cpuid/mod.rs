//! CPUID as the guest sees it: the host's leaves less what is not implemented, plus what the
//! monitor provides whatever the host (SDM vol. 2, CPUID; AMD's APM vol. 3, appendix E).

mod build;
mod feature;
mod shown;
mod topology;
mod xsave;

#[cfg(test)]
mod tests;

pub use feature::{Feature, NAMED, Register};

use std::collections::BTreeMap;

use crate::CpuState;
use crate::control::cr4;

/// CPUID's result: EAX, EBX, ECX, EDX.
pub type Registers = [u32; 4];

/// Who made the processor, as far as the guest's software behaves differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    Intel,
    /// AMD and Hygon.
    Amd,
    Other,
}

/// What the model depends on besides the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidConfig {
    /// Virtual processors: one package of single-threaded cores, x2APIC ids from 0.
    pub vcpus: u32,
    /// Rate of the guest's time-stamp counter in kHz, if known.
    pub tsc_khz: Option<u32>,
    /// Input clock of the local APIC timer in kHz, if known.
    pub apic_bus_khz: Option<u32>,
}

/// Where the model starts from: a processor's own CPUID and XCR0.
pub trait CpuidSource {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Registers;
    /// State components that the host's system has enabled.
    fn xcr0(&self) -> u64;
}

/// What CPUID's result depends on at the time of execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidDynamic {
    /// The x2APIC id of the executing VCPU, its index.
    pub apic_id: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    pub xcr0: u64,
    /// The local APIC is enabled in IA32_APIC_BASE.
    pub apic_enabled: bool,
}

impl CpuidDynamic {
    /// Of a processor with its local APIC enabled.
    pub fn of(cpu: &CpuState, apic_id: u32) -> Self {
        Self {
            apic_id,
            osxsave: cpu.cr4 & cr4::OSXSAVE != 0,
            xcr0: cpu.xcr0,
            apic_enabled: true,
        }
    }
}

/// The CPUID leaves of a virtual machine.
#[derive(Clone, Debug)]
pub struct CpuidModel {
    vcpus: u32,
    vendor: Vendor,
    /// Leaves without subleaves have subleaf 0 only.
    leaves: BTreeMap<(u32, u32), Registers>,
    xcr0_supported: u64,
}

/// Leaves whose result depends on ECX.
const INDEXED: &[u32] = &[4, 7, 0xb, 0xd, 0x1f, 0x8000_001d];

impl CpuidModel {
    /// Executes CPUID: EAX, EBX, ECX, EDX. Leaves and subleaves that are not there read as zero.
    pub fn read(&self, leaf: u32, subleaf: u32, dynamic: CpuidDynamic) -> Registers {
        let subleaf_key = if INDEXED.contains(&leaf) { subleaf } else { 0 };
        let mut registers = match self.leaves.get(&(leaf, subleaf_key)) {
            Some(registers) => *registers,
            // Topology leaves give the id and echo the level for every subleaf.
            None if matches!(leaf, 0xb | 0x1f) && self.leaves.contains_key(&(leaf, 0)) => {
                [0, 0, subleaf & 0xff, 0]
            }
            None => return [0; 4],
        };
        let [eax, ebx, ecx, edx] = &mut registers;
        match (leaf, subleaf_key) {
            (1, _) => {
                *ebx = (*ebx & 0x00ff_ffff) | (dynamic.apic_id << 24);
                if dynamic.osxsave && self.allows(Feature::XSAVE) {
                    *ecx |= Feature::OSXSAVE.mask();
                }
                if !dynamic.apic_enabled {
                    *edx &= !Feature::APIC.mask();
                }
            }
            (0xb | 0x1f, _) => *edx = dynamic.apic_id,
            (0xd, 0) => *ebx = self.xsave_size(dynamic.xcr0),
            (0xd, 1) => *ebx = self.xsave_compacted_size(dynamic.xcr0),
            (0x8000_0001, _) if !dynamic.apic_enabled && self.vendor == Vendor::Amd => {
                *edx &= !Feature::APIC.mask();
            }
            (0x8000_001e, _) => {
                *eax = dynamic.apic_id;
                *ebx = (*ebx & !0xff) | (dynamic.apic_id & 0xff);
            }
            _ => {}
        }
        registers
    }

    /// Whether the guest is shown a feature: the engine raises #UD for an instruction whose
    /// feature is not.
    pub fn allows(&self, feature: Feature) -> bool {
        self.leaves
            .get(&(feature.leaf, feature.subleaf))
            .is_some_and(|registers| registers[feature.register as usize] & feature.mask() != 0)
    }

    /// The components that XSETBV may enable in XCR0.
    pub fn xcr0_supported(&self) -> u64 {
        self.xcr0_supported
    }

    /// The physical-address width: what [`crate::paging::PhysicalMemory::address_bits`] must give.
    pub fn physical_address_bits(&self) -> u32 {
        self.leaves
            .get(&(0x8000_0008, 0))
            .map_or(crate::paging::DEFAULT_ADDRESS_BITS, |registers| {
                registers[0] & 0xff
            })
    }

    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }
}
