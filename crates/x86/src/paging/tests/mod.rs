//! Tests of the page walk.

mod formats;
mod permissions;
mod properties;

use std::collections::BTreeMap;

use super::*;
use crate::Exception;
use crate::control::efer;
use crate::exception::page_fault as pf;

pub(super) const P: u64 = 1;
pub(super) const RW: u64 = 2;
pub(super) const US: u64 = 4;
pub(super) const A: u64 = 0x20;
pub(super) const D: u64 = 0x40;
pub(super) const PS: u64 = 0x80;
pub(super) const G: u64 = 0x100;
pub(super) const XD: u64 = 1 << 63;

/// Sparse memory: 32-bit words by address; what is not there is not mapped.
#[derive(Clone, Default, PartialEq, Debug)]
pub(super) struct Memory {
    pub words: BTreeMap<u64, u32>,
    pub writes: usize,
    pub read_only: bool,
    /// Done before the next exchange, as by another VCPU.
    pub intruder: Option<(u64, u64)>,
    pub address_bits: u32,
}

impl Memory {
    pub fn new() -> Self {
        Self {
            address_bits: DEFAULT_ADDRESS_BITS,
            ..Self::default()
        }
    }
    pub fn set(&mut self, gpa: u64, value: u64) {
        self.words.insert(gpa, value as u32);
        self.words.insert(gpa + 4, (value >> 32) as u32);
    }
    pub fn set_u32(&mut self, gpa: u64, value: u32) {
        self.words.insert(gpa, value);
    }
    pub fn get(&mut self, gpa: u64) -> u64 {
        self.read_u64(gpa).unwrap()
    }
}

impl PhysicalMemory for Memory {
    fn read_u64(&mut self, gpa: u64) -> Option<u64> {
        assert_eq!(gpa % 8, 0);
        let (low, high) = (self.words.get(&gpa)?, self.words.get(&(gpa + 4))?);
        Some(*low as u64 | (*high as u64) << 32)
    }
    fn read_u32(&mut self, gpa: u64) -> Option<u32> {
        assert_eq!(gpa % 4, 0);
        self.words.get(&gpa).copied()
    }
    fn compare_exchange_u64(&mut self, gpa: u64, old: u64, new: u64) -> Result<(), u64> {
        if let Some((gpa, value)) = self.intruder.take() {
            self.set(gpa, value);
        }
        let found = self.read_u64(gpa).unwrap_or(u64::MAX);
        if found != old || self.read_only {
            return Err(found);
        }
        self.writes += 1;
        self.set(gpa, new);
        Ok(())
    }
    fn compare_exchange_u32(&mut self, gpa: u64, old: u32, new: u32) -> Result<(), u32> {
        let found = self.read_u32(gpa).unwrap_or(u32::MAX);
        if found != old || self.read_only {
            return Err(found);
        }
        self.writes += 1;
        self.set_u32(gpa, new);
        Ok(())
    }
    fn address_bits(&self) -> u32 {
        self.address_bits
    }
}

/// A processor in 4-level paging with its root at 0x1000.
pub(super) fn long_mode() -> CpuState {
    CpuState {
        cr0: cr0::PE | cr0::PG | cr0::WP,
        cr3: 0x1000,
        cr4: cr4::PAE | cr4::PGE,
        efer: efer::LME | efer::LMA | efer::NXE,
        ..CpuState::reset()
    }
}

/// A processor in PAE paging.
pub(super) fn pae() -> CpuState {
    CpuState {
        efer: efer::NXE,
        ..long_mode()
    }
}

/// A processor in 32-bit paging with 4 MiB pages.
pub(super) fn two_level() -> CpuState {
    CpuState {
        efer: 0,
        cr4: cr4::PSE | cr4::PGE,
        ..long_mode()
    }
}

pub(super) fn error(result: Result<Page, Exception>) -> u32 {
    let exception = result.unwrap_err();
    assert_eq!(exception.vector, crate::Vector::PageFault);
    exception.error.unwrap()
}

/// Where [`map`] puts the page: aligned for every size.
pub(super) const PAGE: u64 = 0x4000_0000;

/// Maps `linear` in 4-level paging by entries with these flags, from the root down: tables at
/// 0x1000, 0x2000 and so on, the last entry refers to [`PAGE`]. Gives the entries' addresses.
pub(super) fn map(memory: &mut Memory, linear: u64, flags: &[u64]) -> Vec<u64> {
    let last = flags.len() - 1;
    (0..flags.len())
        .map(|depth| {
            let table = 0x1000 * (depth as u64 + 1);
            let gpa = table + ((linear >> (39 - 9 * depth)) & 0x1ff) * 8;
            let target = if depth == last { PAGE } else { table + 0x1000 };
            memory.set(gpa, target | flags[depth]);
            gpa
        })
        .collect()
}

#[test]
fn without_paging_addresses_are_physical() {
    let cpu = CpuState::reset();
    let page = walk(
        &cpu,
        &mut Memory::new(),
        0x1_2345_6789,
        Request::write(true),
    )
    .unwrap();
    assert_eq!(
        (page.gpa, page.size, page.global),
        (0x2345_6000, 4096, false)
    );
    assert!(page.cacheable(&cpu, Request::write(true)));
}

#[test]
fn bits_are_set_where_used() {
    let (cpu, linear) = (long_mode(), 0x7f12_3456_7abc);
    let mut memory = Memory::new();
    let entries = map(&mut memory, linear, &[P | RW | US; 4]);
    let page = walk(&cpu, &mut memory, linear, Request::read(true)).unwrap();
    assert_eq!((page.gpa, page.size, page.dirty), (PAGE, 4096, false));
    assert!(!page.cacheable(&cpu, Request::write(true)));
    assert!(page.permits(&cpu, Request::write(true)));
    let flags = |memory: &mut Memory| -> Vec<u64> {
        entries.iter().map(|&e| memory.get(e) & (A | D)).collect()
    };
    assert_eq!(flags(&mut memory), [A; 4]);
    let page = walk(&cpu, &mut memory, linear, Request::write(true)).unwrap();
    assert!(page.dirty && page.cacheable(&cpu, Request::write(true)));
    assert_eq!(flags(&mut memory), [A, A, A, A | D]);
    let writes = memory.writes;
    walk(&cpu, &mut memory, linear, Request::write(true)).unwrap();
    assert_eq!(memory.writes, writes);
}

#[test]
fn read_only_tables_translate() {
    let mut memory = Memory::new();
    map(&mut memory, 0x5000, &[P | RW; 4]);
    memory.read_only = true;
    let page = walk(&long_mode(), &mut memory, 0x5000, Request::write(false)).unwrap();
    assert_eq!((page.gpa, memory.writes), (PAGE, 0));
}

#[test]
fn a_lost_race_walks_again() {
    let mut memory = Memory::new();
    let entries = map(&mut memory, 0x5000, &[P | RW; 4]);
    memory.intruder = Some((entries[3], 0x9000 | P | RW));
    let page = walk(&long_mode(), &mut memory, 0x5000, Request::write(false)).unwrap();
    assert_eq!(page.gpa, 0x9000);
    assert_eq!(memory.get(entries[3]), 0x9000 | P | RW | A | D);

    let mut memory = Memory::new();
    let entries = map(&mut memory, 0x5000, &[P | RW; 4]);
    memory.intruder = Some((entries[3], 0x9000 | P));
    let result = walk(&long_mode(), &mut memory, 0x5000, Request::write(false));
    assert_eq!(error(result), pf::PRESENT | pf::WRITE);
    assert_eq!(memory.get(entries[3]), 0x9000 | P);
}
