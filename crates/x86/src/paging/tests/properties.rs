//! Properties that hold whatever the guest puts into its tables.

use proptest::prelude::*;

use super::*;

/// Entries that often lead on: into one of eight tables, or anywhere.
fn entry() -> impl Strategy<Value = u64> {
    let near = (1u64..9, any::<u64>()).prop_map(|(table, flags)| {
        (table << 12) | (flags & 0x8000_0000_0000_0fff & !(PS | G) | P) | flags & (PS & flags >> 20)
    });
    prop_oneof![4 => near, 1 => any::<u64>()]
}

fn request() -> impl Strategy<Value = Request> {
    (0..3u8, any::<bool>(), any::<bool>()).prop_map(|(kind, user, smap_closed)| Request {
        write: kind == 1,
        fetch: kind == 2,
        user,
        smap_closed,
    })
}

fn processor() -> impl Strategy<Value = CpuState> {
    (0..3u8, any::<u64>(), any::<bool>(), any::<bool>()).prop_map(|(mode, bits, wp, nx)| {
        let mut cpu = match mode {
            0 => long_mode(),
            // Pointers in a table of their own: there accessed bits are reserved.
            1 => CpuState {
                cr3: 0x9000,
                ..pae()
            },
            _ => two_level(),
        };
        cpu.cr4 |= bits & (cr4::SMEP | cr4::SMAP);
        cpu.cr4 ^= bits & cr4::PSE;
        if !wp {
            cpu.cr0 &= !cr0::WP;
        }
        if !nx {
            cpu.efer &= !efer::NXE;
        }
        cpu
    })
}

/// Tables 1 to 9, the last of which none refers to; of whose entries only the first eight exist.
fn memory() -> impl Strategy<Value = Memory> {
    proptest::collection::vec(entry(), 72).prop_map(|entries| {
        let mut memory = Memory::new();
        for (i, entry) in entries.into_iter().enumerate() {
            memory.set(0x1000 * (1 + i as u64 / 8) + 8 * (i as u64 % 8), entry);
        }
        memory
    })
}

/// An address that indexes the entries that exist.
fn linear() -> impl Strategy<Value = u64> {
    (any::<[u8; 4]>(), 0u64..4096, any::<u64>()).prop_map(|(index, offset, wild)| {
        let near = index.iter().fold(0u64, |l, &i| (l << 9) | (i & 7) as u64) << 12 | offset;
        if wild.is_multiple_of(8) { wild } else { near }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn a_walk_changes_only_what_it_says(
        cpu in processor(),
        before in memory(),
        linear in linear(),
        request in request(),
    ) {
        let mut memory = before.clone();
        let first = walk(&cpu, &mut memory, linear, request);
        let Ok(page) = first else {
            prop_assert_eq!(&memory, &before, "a fault writes nothing");
            return Ok(());
        };
        for (gpa, word) in &before.words {
            let set = memory.words[gpa] ^ word;
            let bits = if request.write { A | D } else { A };
            prop_assert_eq!(set & !(bits as u32) | set & word, 0, "at {:#x}", gpa);
        }
        prop_assert!(page.cacheable(&cpu, request));
        prop_assert_eq!(page.gpa & 0xfff, 0);
        prop_assert!(page.gpa < 1 << 46);
        // Once the bits are set a walk writes nothing, and gives the same unless it went through
        // an entry twice, whose dirty bit it then set itself.
        let writes = memory.writes;
        let again = walk(&cpu, &mut memory, linear, request).unwrap();
        prop_assert_eq!(memory.writes, writes);
        prop_assert_eq!((again.gpa, again.size, again.user), (page.gpa, page.size, page.user));
    }

    #[test]
    fn other_accesses_agree_with_the_rights(
        cpu in processor(),
        memory in memory(),
        linear in linear(),
        first in request(),
        second in request(),
    ) {
        if let Ok(page) = walk(&cpu, &mut memory.clone(), linear, first) {
            let other = walk(&cpu, &mut memory.clone(), linear, second);
            prop_assert_eq!(page.permits(&cpu, second), other.is_ok());
        }
    }
}
