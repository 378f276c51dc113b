//! The multiple APIC description table.

use acpi_tables::sdt::Sdt;

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::lines::{SYSTEM_CONTROL, TIMER, TIMER_PIN};
use crate::{io_apic, local_apic};

/// There is a pair of 8259s.
const PCAT_COMPATIBLE: u32 = 1;

/// Polarity and trigger mode of an override: active high and level-triggered.
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

/// The table for so many VCPUs, whose processor UIDs are their APIC IDs.
pub(super) fn madt(vcpus: u32) -> Sdt {
    let mut table = Sdt::new(*b"APIC", 44, 5, OEM, OEM_TABLE, OEM_REVISION);
    table.write_u32(36, local_apic::PAGE as u32);
    table.write_u32(40, PCAT_COMPATIBLE);
    for id in 0..vcpus {
        match u8::try_from(id) {
            // Local APIC: enabled. ID 255 is the broadcast.
            Ok(id @ 0..=254) => table.append_slice(&[0, 8, id, id, 1, 0, 0, 0]),
            _ => {
                // Local x2APIC.
                let id = id.to_le_bytes();
                table.append_slice(&[9, 16, 0, 0]);
                table.append_slice(&id);
                table.append_slice(&[1, 0, 0, 0]);
                table.append_slice(&id);
            }
        }
    }
    // The I/O APIC with ID 0 starts the global interrupts.
    table.append_slice(&[1, 12, 0, 0]);
    table.append_slice(&(io_apic::BASE as u32).to_le_bytes());
    table.append_slice(&[0; 4]);
    source_override(&mut table, TIMER, TIMER_PIN, 0);
    source_override(
        &mut table,
        SYSTEM_CONTROL,
        SYSTEM_CONTROL,
        ACTIVE_HIGH_LEVEL,
    );
    // LINT1 of every processor is the NMI.
    table.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    table
}

/// ISA line `source` is the global interrupt `pin`.
fn source_override(table: &mut Sdt, source: u8, pin: u8, flags: u16) {
    let [low, high] = flags.to_le_bytes();
    table.append_slice(&[2, 10, 0, source, pin, 0, 0, 0, low, high]);
}
