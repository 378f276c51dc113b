//! Execution on trial: what it writes to guest memory can be looked at and taken back.
//!
//! A page is noted, with its bytes, when the VCPU gets a translation with which it may write the
//! page directly; the TLB holds no such translation when a trial begins. What is not such a page
//! is refused while the trial lasts: the instruction has no effect and the trial ends there. So
//! devices and traces see nothing of it.
//!
//! For machines of one VCPU: what others write to the noted pages meanwhile may be taken back too,
//! byte for byte where the trial wrote.
#![allow(unsafe_code)]

use trapline_engine::tlb::{Access, Privilege, Tlb};

const PAGE: usize = 4096;
/// Bytes that are compared at a time.
const PIECE: usize = 64;
type Bytes = Box<[u8; PAGE]>;

/// The accessed and dirty bits of a paging-structure entry.
const WALKERS_BITS: u8 = 0x60;

/// A page that may have been written on trial.
struct Noted {
    gpa: u64,
    host: *mut u8,
    before: Bytes,
    /// What the first of the two trials left.
    first: Bytes,
}

/// Bytes that two trials left different.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryDifference {
    pub gpa: u64,
    /// Bytes that count, from the first on.
    pub len: usize,
    pub before: [u8; 16],
    pub first: [u8; 16],
    pub second: [u8; 16],
}

/// What there is to know of trials, and of the pages that the VCPU may write directly.
#[derive(Default)]
pub struct Rehearsal {
    /// A trial lasts.
    pub active: bool,
    /// Every translation for direct writes that the TLB may hold.
    granted: Vec<(u64, Privilege)>,
    noted: Vec<Noted>,
    /// Buffers of earlier trials.
    spare: Vec<(Bytes, Bytes)>,
    /// Entries whose accessed or dirty bits the page walker set.
    walked: Vec<u64>,
}

// SAFETY: the pointers lead to guest RAM, which is not bound to a thread.
unsafe impl Send for Rehearsal {}

fn read(host: *const u8, into: &mut [u8; PAGE]) {
    // SAFETY: `host` is the first byte of a page of guest RAM, which stays mapped while VCPUs run;
    // `into` is the host's own memory.
    unsafe { std::ptr::copy_nonoverlapping(host, into.as_mut_ptr(), PAGE) };
}

impl Rehearsal {
    /// The TLB got a translation for direct writes of the page of `linear`, which lies at `gpa` and
    /// which the host sees at `host` (the page's first byte).
    pub fn grant(&mut self, linear: u64, privilege: Privilege, gpa: u64, host: *mut u8) {
        self.granted.push((linear, privilege));
        if !self.active || self.noted.iter().any(|page| page.gpa == gpa) {
            return;
        }
        let fresh = || (Box::new([0; PAGE]), Box::new([0; PAGE]));
        let (mut before, mut first) = self.spare.pop().unwrap_or_else(fresh);
        read(host, &mut before);
        first.copy_from_slice(&*before);
        self.noted.push(Noted {
            gpa,
            host,
            before,
            first,
        });
    }

    /// The page walker has set bits in the entry at `gpa`.
    pub fn walked(&mut self, gpa: u64) {
        if self.active {
            self.walked.push(gpa);
        }
    }

    fn revoke(&mut self, tlb: &mut Tlb) {
        for (linear, privilege) in self.granted.drain(..) {
            tlb.forget(linear, privilege, Access::Write);
        }
    }

    /// Begins the first trial.
    pub fn begin(&mut self, tlb: &mut Tlb) {
        self.revoke(tlb);
        for page in self.noted.drain(..) {
            self.spare.push((page.before, page.first));
        }
        self.walked.clear();
        self.active = true;
    }

    /// Keeps what the first trial left, takes it back, and begins the second.
    pub fn again(&mut self, tlb: &mut Tlb) {
        self.revoke(tlb);
        for page in &mut self.noted {
            read(page.host, &mut page.first);
            let pieces = page.first.chunks_exact(PIECE);
            let pieces = pieces.zip(page.before.chunks_exact(PIECE)).enumerate();
            for (n, (now, before)) in pieces.filter(|(_, (now, before))| now != before) {
                for (m, (byte, before)) in now.iter().zip(before).enumerate() {
                    if byte != before {
                        // SAFETY: within a page of guest RAM.
                        unsafe { page.host.add(n * PIECE + m).write_volatile(*before) };
                    }
                }
            }
        }
        let noted = &self.noted;
        let in_noted = |gpa: &u64| noted.iter().any(|page| page.gpa == gpa & !0xfff);
        if self.walked.iter().any(in_noted) {
            // What the walker wrote may be gone while the TLB relies on it.
            tlb.flush_all();
        }
    }

    /// Ends the second trial. What it wrote stays.
    pub fn end(&mut self) {
        self.active = false;
    }

    /// Where memory now is not what the first trial left; the first few places.
    pub fn differences(&self, most: usize) -> Vec<MemoryDifference> {
        let mut found = Vec::new();
        let mut now = [0; PAGE];
        for page in &self.noted {
            read(page.host, &mut now);
            if now == *page.first {
                continue;
            }
            let mut at = 0;
            while at < PAGE && found.len() < most {
                let piece = at..(at + PIECE).min(PAGE);
                if at % PIECE == 0 && now[piece.clone()] == page.first[piece] {
                    at += PIECE;
                    continue;
                }
                let gpa = page.gpa + at as u64;
                let walked = at % 4 == 0 && self.walked.contains(&gpa);
                let ignored = if walked { WALKERS_BITS } else { 0 };
                if (now[at] ^ page.first[at]) & !ignored == 0 {
                    at += 1;
                    continue;
                }
                let len = (PAGE - at).min(16);
                let piece = |bytes: &[u8; PAGE]| {
                    let mut piece = [0; 16];
                    piece[..len].copy_from_slice(&bytes[at..at + len]);
                    piece
                };
                found.push(MemoryDifference {
                    gpa,
                    len,
                    before: piece(&page.before),
                    first: piece(&page.first),
                    second: piece(&now),
                });
                at += len;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rig {
        ram: Vec<u8>,
        tlb: Tlb,
        rehearsal: Rehearsal,
    }

    impl Rig {
        fn new() -> Self {
            Self {
                ram: (0..2 * PAGE).map(|n| n as u8).collect(),
                tlb: Tlb::default(),
                rehearsal: Rehearsal::default(),
            }
        }

        fn write(&mut self, at: usize, value: u8) {
            let linear = at as u64;
            if self.tlb.host(linear, Privilege::User, true).is_none() {
                let page = linear & !0xfff;
                let host = self.ram.as_mut_ptr().wrapping_add(page as usize);
                self.tlb.insert(
                    linear,
                    Privilege::User,
                    Access::Write,
                    page,
                    host,
                    false,
                    4096,
                );
                self.rehearsal.grant(linear, Privilege::User, page, host);
            }
            let host = self.tlb.host(linear, Privilege::User, true).unwrap();
            // SAFETY: the host pointer of a byte of `ram`.
            unsafe { host.write(value) };
        }
    }

    #[test]
    fn a_trial_is_taken_back_and_compared() {
        let mut rig = Rig::new();
        rig.write(5, 1);
        rig.rehearsal.begin(&mut rig.tlb);
        rig.write(5, 2);
        rig.write(4097, 3);
        rig.rehearsal.again(&mut rig.tlb);
        assert_eq!((rig.ram[5], rig.ram[4097]), (1, 1));
        rig.write(4097, 3);
        let [difference] = rig.rehearsal.differences(8)[..] else {
            panic!("one place differs");
        };
        assert_eq!(difference.gpa, 5);
        let bytes = (
            difference.before[0],
            difference.first[0],
            difference.second[0],
        );
        assert_eq!(bytes, (1, 2, 1));
        rig.write(5, 2);
        assert_eq!(rig.rehearsal.differences(8), []);
        rig.rehearsal.end();
        assert_eq!((rig.ram[5], rig.ram[4097]), (2, 3));
    }

    #[test]
    fn what_only_the_second_trial_writes_is_found() {
        let mut rig = Rig::new();
        rig.rehearsal.begin(&mut rig.tlb);
        rig.rehearsal.again(&mut rig.tlb);
        rig.write(7, 0x77);
        let found = rig.rehearsal.differences(8);
        assert_eq!((found.len(), found[0].gpa, found[0].first[0]), (1, 7, 7));
    }

    #[test]
    fn the_walkers_bits_do_not_count() {
        let mut rig = Rig::new();
        rig.rehearsal.begin(&mut rig.tlb);
        rig.write(8, 0x21);
        rig.rehearsal.walked(8);
        rig.rehearsal.again(&mut rig.tlb);
        rig.write(8, 0x61);
        assert_eq!(rig.rehearsal.differences(8), []);
        rig.write(8, 0x63);
        assert_eq!(rig.rehearsal.differences(8).len(), 1);
    }
}
