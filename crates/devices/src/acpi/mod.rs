//! The ACPI tables that firmware would leave in memory.

mod dsdt;
mod fadt;
mod madt;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

/// Who made the tables.
const OEM: [u8; 6] = *b"TRAPLN";
const OEM_TABLE: [u8; 8] = *b"TRAPLINE";
const OEM_REVISION: u32 = 1;

/// Where a PC's firmware leaves the tables, and where a system looks for the root pointer.
pub const BIOS_AREA: std::ops::Range<u64> = 0xe_0000..0x10_0000;

/// What the tables tell of the machine.
#[derive(Clone, Copy, Debug)]
pub struct TablesConfig {
    /// The number of VCPUs; their APIC IDs count from 0.
    pub vcpus: u32,
}

/// The tables and where they belong.
#[derive(Clone, Debug)]
pub struct Tables {
    /// What to write at `base`.
    pub bytes: Vec<u8>,
    pub base: u64,
    /// The guest-physical address of the root pointer.
    pub rsdp: u64,
}

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum TablesError {
    #[error(
        "the ACPI tables' address {base:#x} is not a multiple of 64 below 4 GiB; \
         place them elsewhere"
    )]
    Misplaced { base: u64 },
    #[error("the ACPI tables hold 1 to 255 VCPUs, not {vcpus}; ask for fewer")]
    Vcpus { vcpus: u32 },
}

/// Lays the tables out from `base` on, a multiple of 64 and usually [`BIOS_AREA`]'s start. The
/// root pointer comes first.
///
/// # Errors
/// [`TablesError`] for an address or a number of VCPUs that the tables cannot express.
pub fn build_tables(config: &TablesConfig, base: u64) -> Result<Tables, TablesError> {
    if !base.is_multiple_of(64) || base > 0xffff_0000 {
        return Err(TablesError::Misplaced { base });
    }
    if !(1..=255).contains(&config.vcpus) {
        return Err(TablesError::Vcpus {
            vcpus: config.vcpus,
        });
    }
    let mut layout = Layout {
        base,
        bytes: vec![0; ROOT],
    };
    let facs = layout.add(&FACS::new());
    let dsdt = layout.add(&dsdt::dsdt(config.vcpus));
    let fadt = layout.add(&fadt::fadt(facs as u32, dsdt as u32));
    let madt = layout.add(&madt::madt(config.vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = layout.add(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    layout.bytes[..root.len()].copy_from_slice(&root);
    Ok(Tables {
        bytes: layout.bytes,
        base,
        rsdp: base,
    })
}

/// The room for the root pointer in front, which keeps the FACS behind it aligned.
const ROOT: usize = 64;

struct Layout {
    base: u64,
    bytes: Vec<u8>,
}

impl Layout {
    /// Appends a table at the next multiple of 64, as the FACS wants it, and gives its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = self.base + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

#[cfg(test)]
mod tests;
