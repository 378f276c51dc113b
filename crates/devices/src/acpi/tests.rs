use super::*;

fn word32(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()))
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sums_to_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
}

/// The table at an address, its checksum verified.
fn table(tables: &Tables, address: u64) -> &[u8] {
    let bytes = &tables.bytes[(address - tables.base) as usize..];
    let table = &bytes[..word32(bytes, 4) as usize];
    if &table[..4] != b"FACS" {
        assert!(sums_to_zero(table), "{:?}", &table[..4]);
    }
    table
}

fn build(vcpus: u32) -> Tables {
    build_tables(&TablesConfig { vcpus }, BIOS_AREA.start).unwrap()
}

#[test]
fn every_table_is_found_from_the_root() {
    let tables = build(4);
    assert_eq!(&tables.bytes[..8], b"RSD PTR ");
    assert!(sums_to_zero(&tables.bytes[..20]) && sums_to_zero(&tables.bytes[..36]));
    let xsdt = table(&tables, word64(&tables.bytes, 24));
    assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 16));
    let fadt = table(&tables, word64(xsdt, 36));
    assert_eq!((&fadt[..4], fadt.len()), (&b"FACP"[..], 276));
    let facs = word32(fadt, 36);
    assert!(facs.is_multiple_of(64));
    assert_eq!(&table(&tables, facs)[..4], b"FACS");
    assert_eq!(word32(fadt, 40), word64(fadt, 140));
    assert_eq!(&table(&tables, word32(fadt, 40))[..4], b"DSDT");
    // Reset register in I/O space, 0x06 at 0xcf9, and that it exists.
    assert_eq!((fadt[116], word64(fadt, 120), fadt[128]), (1, 0xcf9, 6));
    assert_eq!(word32(fadt, 112) >> 10 & 1, 1);
    assert_eq!(word32(fadt, 112) >> 20 & 1, 0, "not hardware-reduced");
    assert_eq!(&table(&tables, word64(xsdt, 44))[..4], b"APIC");
}

#[test]
fn the_madt_lists_processors_and_overrides() {
    let tables = build(3);
    let xsdt = table(&tables, word64(&tables.bytes, 24));
    let madt = table(&tables, word64(xsdt, 44));
    let mut entries = Vec::new();
    let mut rest = &madt[44..];
    while let [kind, length, ..] = *rest {
        entries.push((kind, rest[..usize::from(length)].to_vec()));
        rest = &rest[usize::from(length)..];
    }
    let kinds: Vec<u8> = entries.iter().map(|entry| entry.0).collect();
    assert_eq!(kinds, [0, 0, 0, 1, 2, 2, 4]);
    assert_eq!(entries[2].1, [0, 8, 2, 2, 1, 0, 0, 0]);
    assert_eq!(entries[4].1, [2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    assert_eq!(entries[5].1, [2, 10, 0, 9, 9, 0, 0, 0, 13, 0]);
}

#[test]
fn they_fit_and_refuse() {
    let largest = build(255);
    assert!(largest.bytes.len() as u64 <= BIOS_AREA.end - BIOS_AREA.start);
    assert!(build_tables(&TablesConfig { vcpus: 0 }, 0xe0000).is_err());
    assert!(build_tables(&TablesConfig { vcpus: 256 }, 0xe0000).is_err());
    assert!(build_tables(&TablesConfig { vcpus: 1 }, 0xe0008).is_err());
    assert!(build_tables(&TablesConfig { vcpus: 1 }, 1 << 32).is_err());
}

/// Writes the tables where `iasl -d` can read them: set TRAPLINE_TABLES to a directory.
#[test]
fn dump_for_the_disassembler() {
    let Some(directory) = std::env::var_os("TRAPLINE_TABLES") else {
        return;
    };
    let tables = build(4);
    let xsdt = table(&tables, word64(&tables.bytes, 24));
    let (fadt, madt) = (word64(xsdt, 36), word64(xsdt, 44));
    let dsdt = word32(table(&tables, fadt), 40);
    for (name, address) in [("facp", fadt), ("apic", madt), ("dsdt", dsdt)] {
        let path = std::path::Path::new(&directory).join(format!("{name}.dat"));
        std::fs::write(path, table(&tables, address)).unwrap();
    }
}
