//! Permissions: every combination against a table written down from the manual (SDM vol. 3, 4.6.1).

use super::*;

/// Rows: the access. Columns: supervisor read-only, supervisor writable, user read-only, user
/// writable page. `y` allowed; `n` not; `w` if CR0.WP is clear; `s` if SMAP does not forbid it;
/// `b` if both; `e` if CR4.SMEP is clear. Fetches need also that nothing forbids execution.
const TABLE: [(Request, &str); 6] = [
    (Request::read(true), "nnyy"),
    (Request::write(true), "nnny"),
    (Request::fetch(true), "nnyy"),
    (Request::read(false), "yyss"),
    (Request::write(false), "wybs"),
    (Request::fetch(false), "yyee"),
];

/// Settings of one case, each a bit of a counter.
struct Case(u32);

impl Case {
    fn bit(&self, n: u32) -> bool {
        self.0 & (1 << n) != 0
    }
    fn flags(&self, base: u32) -> u64 {
        let mut flags = 0;
        for (n, bit) in [US, RW, XD].into_iter().enumerate() {
            if self.bit(base + n as u32) {
                flags |= bit;
            }
        }
        flags
    }
}

/// The flags that take rights away are those cleared, except XD; `Case` bits 0 to 2 are the leaf's,
/// 3 to 5 the upper entry's at `upper`.
fn check(
    case: &Case,
    cpu: &CpuState,
    flags: &[u64],
    allow_xd: bool,
    run: impl Fn(&[u64], Request) -> Result<Page, Exception>,
) {
    let user = flags.iter().all(|f| f & US != 0);
    let writable = flags.iter().all(|f| f & RW != 0);
    let xd = flags.iter().any(|f| f & XD != 0);
    let closed = case.bit(9);
    let wp = cpu.cr0 & cr0::WP != 0;
    let smep = cpu.cr4 & cr4::SMEP != 0;
    let open = !(cpu.cr4 & cr4::SMAP != 0 && closed);
    for (request, row) in TABLE {
        let request = Request {
            smap_closed: closed && !request.fetch,
            ..request
        };
        let column = user as usize * 2 + writable as usize;
        let mut allowed = match row.as_bytes()[column] {
            b'y' => true,
            b'n' => false,
            b'w' => !wp,
            b's' => open,
            b'b' => open && !wp,
            b'e' => !smep,
            _ => unreachable!(),
        };
        if request.fetch && xd {
            allowed = false;
        }
        let mut expected = pf::PRESENT;
        if xd && !allow_xd {
            allowed = false;
            expected |= pf::RESERVED;
        }
        if request.write {
            expected |= pf::WRITE;
        }
        if request.user {
            expected |= pf::USER;
        }
        if request.fetch && (allow_xd || smep) {
            expected |= pf::FETCH;
        }
        let result = run(flags, request);
        let context = || format!("case {:#x} flags {flags:x?} {request:?}", case.0);
        match result {
            Ok(page) => {
                assert!(allowed, "{}: allowed", context());
                assert_eq!((page.user, page.writable), (user, writable));
                assert_eq!(page.dirty, request.write);
                assert!(page.cacheable(cpu, request));
            }
            Err(fault) => {
                assert!(!allowed, "{}: {fault:?}", context());
                assert_eq!(fault.error, Some(expected), "{}", context());
            }
        }
    }
}

fn processor(case: &Case, base: CpuState) -> CpuState {
    let mut cpu = base;
    cpu.cr0 = cr0::PE | cr0::PG | if case.bit(6) { cr0::WP } else { 0 };
    cpu.cr4 |= if case.bit(7) { cr4::SMEP } else { 0 };
    cpu.cr4 |= if case.bit(8) { cr4::SMAP } else { 0 };
    if case.bit(10) {
        cpu.efer |= efer::NXE;
    } else {
        cpu.efer &= !efer::NXE;
    }
    cpu
}

#[test]
fn four_level_combinations() {
    for levels in 2..=4 {
        for upper in 0..levels - 1 {
            for case in (0..1 << 11).map(Case) {
                let cpu = processor(&case, long_mode());
                let mut flags = vec![P | RW | US; levels];
                flags[levels - 1] = P | case.flags(0) | if levels < 4 { PS } else { 0 };
                flags[upper] = P | case.flags(3);
                check(&case, &cpu, &flags, case.bit(10), |flags, request| {
                    let mut memory = Memory::new();
                    map(&mut memory, 0x12_3456_7000, flags);
                    walk(&cpu, &mut memory, 0x12_3456_7000, request)
                });
            }
        }
    }
}

#[test]
fn pae_combinations() {
    for large in [false, true] {
        for case in (0..1 << 11).map(Case) {
            let cpu = processor(&case, pae());
            let leaf = P | case.flags(0);
            // A large page has one entry that counts.
            let flags = if large {
                vec![leaf | PS]
            } else {
                vec![P | case.flags(3), leaf]
            };
            check(&case, &cpu, &flags, case.bit(10), |flags, request| {
                let mut memory = Memory::new();
                memory.set(0x1000, 0x2000 | P);
                memory.set(0x2000, flags[0] | if large { PAGE } else { 0x3000 });
                memory.set(0x3000, flags.get(1).unwrap_or(&0) | PAGE);
                walk(&cpu, &mut memory, 0, request)
            });
        }
    }
}

#[test]
fn two_level_combinations() {
    for large in [false, true] {
        for case in (0..1 << 11).map(Case).filter(|case| !case.bit(10)) {
            let cpu = processor(&case, two_level());
            let leaf = P | case.flags(0) & !XD;
            let upper = P | case.flags(3) & !XD;
            let flags = if large {
                vec![leaf | PS]
            } else {
                vec![upper, leaf]
            };
            check(&case, &cpu, &flags, false, |flags, request| {
                let mut memory = Memory::new();
                let first = flags[0] | if large { PAGE } else { 0x3000 };
                memory.set_u32(0x1000, first as u32);
                memory.set_u32(0x3000, (flags.get(1).unwrap_or(&0) | PAGE) as u32);
                walk(&cpu, &mut memory, 0, request)
            });
        }
    }
}
