//! Entry formats: page sizes, reserved bits, addresses.

use super::*;

const ALL: u64 = P | RW | US;

#[test]
fn four_level_page_sizes() {
    let cpu = long_mode();
    let linear = 0xffff_8123_5678_9abc;
    for (levels, size) in [(4, 1u64 << 12), (3, 1 << 21), (2, 1 << 30)] {
        let mut memory = Memory::new();
        let mut flags = vec![ALL; levels];
        flags[levels - 1] |= G | if levels < 4 { PS } else { 0 };
        map(&mut memory, linear, &flags);
        let page = walk(&cpu, &mut memory, linear, Request::read(true)).unwrap();
        assert_eq!(page.size, size);
        assert_eq!(page.gpa, PAGE | (linear & (size - 1) & !0xfff));
        assert!(page.global);
        let local = CpuState {
            cr4: cr4::PAE,
            ..cpu.clone()
        };
        assert!(
            !walk(&local, &mut memory, linear, Request::read(true))
                .unwrap()
                .global
        );
    }
}

#[test]
fn four_level_reserved_bits() {
    let reserved_of = |cpu: &CpuState, levels: usize, depth: usize, bit: u32| {
        let mut memory = Memory::new();
        let mut flags = vec![ALL; levels];
        flags[levels - 1] |= if levels < 4 { PS } else { 0 };
        flags[depth] ^= 1 << bit;
        // Flipping PS or P changes what the entry is; those are other tests' matter.
        map(&mut memory, 0, &flags);
        match walk(cpu, &mut memory, 0, Request::read(false)) {
            Ok(_) => false,
            Err(e) => {
                assert_eq!(
                    e.error,
                    Some(pf::PRESENT | pf::RESERVED),
                    "bit {bit} depth {depth}"
                );
                true
            }
        }
    };
    let cpu = long_mode();
    let no_nx = CpuState {
        efer: cpu.efer & !efer::NXE,
        ..cpu.clone()
    };
    for levels in 2..=4 {
        for depth in 0..levels {
            for bit in (1..64).filter(|&bit| bit != 7 && bit != 12) {
                // Changing address bits of a table entry leads elsewhere.
                let is_leaf = depth + 1 == levels;
                if !is_leaf && (12..46).contains(&bit) {
                    continue;
                }
                let in_page = is_leaf && (13..39 - 9 * depth as u32).contains(&bit);
                let expected = (46..52).contains(&bit) || in_page;
                assert_eq!(
                    reserved_of(&cpu, levels, depth, bit),
                    expected,
                    "{levels} {depth} {bit}"
                );
                assert_eq!(
                    reserved_of(&no_nx, levels, depth, bit),
                    expected || bit == 63
                );
            }
        }
    }
    assert!(reserved_of(&cpu, 4, 0, 7), "PS in a PML4 entry");
}

#[test]
fn wide_addresses_are_not_reserved() {
    let mut memory = Memory {
        address_bits: 52,
        ..Memory::new()
    };
    let entries = map(&mut memory, 0, &[ALL; 4]);
    memory.set(entries[3], ALL | 0x000f_ffff_ffff_f000);
    let page = walk(&long_mode(), &mut memory, 0, Request::read(false)).unwrap();
    assert_eq!(page.gpa, 0x000f_ffff_ffff_f000);
}

#[test]
fn unmapped_tables_read_as_ones() {
    let result = walk(&long_mode(), &mut Memory::new(), 0, Request::read(true));
    assert_eq!(error(result), pf::PRESENT | pf::RESERVED | pf::USER);
}

#[test]
fn pae_pages() {
    let cpu = CpuState {
        cr3: 0x1020,
        ..pae()
    };
    let linear = 0xffff_ffff_8060_5123;
    let mut memory = Memory::new();
    memory.set(0x1020 + 8 * 2, 0x2000 | P);
    memory.set(0x2000 + 8 * 3, 0x3000 | ALL);
    memory.set(0x3000 + 8 * 5, 0x20_0000_7000 | ALL | XD);
    let page = walk(&cpu, &mut memory, linear, Request::write(true)).unwrap();
    assert_eq!((page.gpa, page.size), (0x20_0000_7000, 4096));
    assert!(page.user && page.writable && !page.executable);
    // Pointers have no accessed bit.
    assert_eq!(memory.get(0x1030), 0x2000 | P);
    assert_eq!(memory.get(0x2018), 0x3000 | ALL | A);
    assert_eq!(memory.get(0x3028), 0x20_0000_7000 | ALL | XD | A | D);
    memory.set(0x2018, 0x20_0060_0000 | ALL | PS);
    let page = walk(&cpu, &mut memory, linear, Request::read(true)).unwrap();
    assert_eq!((page.gpa, page.size), (0x20_0060_5000, 1 << 21));
    for bit in [1, 2, 5, 6, 7, 8, 46, 51, 52, 62, 63] {
        memory.set(0x1030, 0x2000 | P | 1 << bit);
        let result = walk(&cpu, &mut memory, linear, Request::read(false));
        assert_eq!(
            error(result),
            pf::PRESENT | pf::RESERVED,
            "pointer bit {bit}"
        );
    }
    memory.set(0x1030, 0x2000 | P);
    memory.set(0x2018, 0x3000 | ALL | 1 << 52);
    let result = walk(&cpu, &mut memory, linear, Request::read(false));
    assert_eq!(error(result), pf::PRESENT | pf::RESERVED);
}

#[test]
fn two_level_pages() {
    let cpu = two_level();
    let linear = 0xc040_5678;
    let mut memory = Memory::new();
    let directory = 0x1000 + 4 * 0x301;
    memory.set_u32(directory, 0x2000 | ALL as u32);
    memory.set_u32(0x2000 + 4 * 5, 0xffff_f000 | (ALL | PS | G) as u32);
    let page = walk(&cpu, &mut memory, linear, Request::write(true)).unwrap();
    assert_eq!(
        (page.gpa, page.size, page.global),
        (0xffff_f000, 4096, true)
    );
    assert_eq!(memory.words[&directory], 0x2000 | (ALL | A) as u32);
    assert_eq!(
        memory.words[&0x2014],
        0xffff_f000 | (ALL | PS | G | A | D) as u32
    );

    // PSE-36: bits 13 to 20 are address bits 32 to 39.
    memory.set_u32(directory, 0x0080_0000 | 0xa5 << 13 | (ALL | PS) as u32);
    let page = walk(&cpu, &mut memory, linear, Request::write(true)).unwrap();
    assert_eq!((page.gpa, page.size), (0xa5_0080_5000, 1 << 22));
    memory.set_u32(directory, 0x0080_0000 | 1 << 21 | (ALL | PS) as u32);
    let result = walk(&cpu, &mut memory, linear, Request::read(false));
    assert_eq!(error(result), pf::PRESENT | pf::RESERVED);
    memory.address_bits = 36;
    memory.set_u32(directory, 0x0080_0000 | 0x10 << 13 | (ALL | PS) as u32);
    let result = walk(&cpu, &mut memory, linear, Request::read(false));
    assert_eq!(error(result), pf::PRESENT | pf::RESERVED);

    // Without CR4.PSE the bit is ignored.
    let old = CpuState { cr4: 0, ..cpu };
    memory.set_u32(directory, 0x2000 | (ALL | PS) as u32);
    let page = walk(&old, &mut memory, linear, Request::read(false)).unwrap();
    assert_eq!(
        (page.gpa, page.size, page.global),
        (0xffff_f000, 4096, false)
    );
}

#[test]
fn fetches_are_told_where_execution_can_be_forbidden() {
    let fetch = |cpu: &CpuState| {
        let mut memory = Memory::new();
        memory.set(0x1000, 0);
        error(walk(cpu, &mut memory, 0, Request::fetch(true)))
    };
    let nx = long_mode();
    let plain = CpuState {
        efer: nx.efer & !efer::NXE,
        ..nx.clone()
    };
    let smep = CpuState {
        cr4: plain.cr4 | cr4::SMEP,
        ..plain.clone()
    };
    assert_eq!(fetch(&nx), pf::USER | pf::FETCH);
    assert_eq!(fetch(&plain), pf::USER);
    assert_eq!(fetch(&smep), pf::USER | pf::FETCH);
    let narrow = CpuState {
        efer: efer::NXE,
        ..two_level()
    };
    assert_eq!(fetch(&narrow), pf::USER);
}

#[test]
fn cr2_is_the_linear_address() {
    let mut memory = Memory::new();
    memory.set(0x1000, 0);
    let fault = walk(&long_mode(), &mut memory, 0x1abc, Request::write(false)).unwrap_err();
    assert_eq!((fault.cr2, fault.error), (Some(0x1abc), Some(pf::WRITE)));
}
