//! The differentiated system description table: what no register tells.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::acpi_pm::{PowerManagement, SOFT_OFF};
use crate::lines::{SERIAL, TIMER};
use crate::serial::SerialLine;
use crate::{io_apic, local_apic};

pub(super) fn dsdt(vcpus: u32) -> Sdt {
    let mut body = Vec::new();
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&SOFT_OFF, &SOFT_OFF, &0u8, &0u8]),
    )
    .to_aml_bytes(&mut body);
    processors(vcpus, &mut body);
    board(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
}

/// A processor device per VCPU, whose UID finds its MADT entry.
fn processors(vcpus: u32, body: &mut Vec<u8>) {
    let mut devices = Vec::new();
    for id in 0..vcpus {
        let name = format!("C{id:03X}");
        Device::new(
            name.as_str().into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0007"),
                &Name::new("_UID".into(), &id),
            ],
        )
        .to_aml_bytes(&mut devices);
    }
    body.extend(Scope::raw("_SB_".into(), devices));
}

/// The devices on fixed ports.
fn board(body: &mut Vec<u8>) {
    let ports = |first: u16, length: u8| IO::new(first, first, 1, length);
    let line = |irq: u8| Interrupt::new(true, true, false, false, irq.into());
    let length = |ports: std::ops::RangeInclusive<u16>| ports.count() as u8;

    // What the system must not give to others.
    let reserved = device(
        "MBRD",
        "PNP0C02",
        &ResourceTemplate::new(vec![
            &ports(
                *PowerManagement::PORTS.start(),
                length(PowerManagement::PORTS),
            ),
            &ports(0x4d0, 2),
            &Memory32Fixed::new(true, io_apic::BASE as u32, io_apic::LENGTH as u32),
            &Memory32Fixed::new(true, local_apic::PAGE as u32, 0x1000),
        ]),
    );
    let serial = device(
        "COM1",
        "PNP0501",
        &ResourceTemplate::new(vec![
            &ports(*SerialLine::PORTS.start(), length(SerialLine::PORTS)),
            &line(SERIAL),
        ]),
    );
    // The clock has no working interrupt, so it claims none.
    let clock = device(
        "RTC_",
        "PNP0B00",
        &ResourceTemplate::new(vec![&ports(0x70, 2)]),
    );
    let timer = device(
        "TIMR",
        "PNP0100",
        &ResourceTemplate::new(vec![&ports(0x40, 4), &line(TIMER)]),
    );
    let all: Vec<u8> = [reserved, serial, clock, timer].concat();
    body.extend(Scope::raw("_SB_".into(), all));
}

/// A device with its ID and its fixed resources.
fn device(name: &str, id: &str, resources: &ResourceTemplate) -> Vec<u8> {
    let mut bytes = Vec::new();
    Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(id)),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), resources),
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}
