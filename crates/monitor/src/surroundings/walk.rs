//! Page walks: what they read is kept in the shadow page tables, under traces, and the bits that
//! they set are sensed like any other write.

use std::sync::Arc;

use trapline_engine::access::Fault;
use trapline_engine::env::{Environment, Span};
use trapline_engine::tlb::{Access, Tlb};
use trapline_memory::GuestMemory;
use trapline_trace::{Kind, Range, Sense};
use trapline_x86::CpuState;
use trapline_x86::paging::{self, Page, PhysicalMemory, Request};

use super::Surroundings;
use crate::shadow_pages::Fill;

impl Surroundings {
    /// Translates by a walk of guest memory, and keeps what it read in the shadow page tables.
    pub(super) fn walk(
        &mut self,
        cpu: &CpuState,
        tlb: &mut Tlb,
        linear: u64,
        request: Request,
    ) -> Result<Page, Fault> {
        self.shadow.before_walk();
        loop {
            let mut walk_memory = WalkMemory {
                surroundings: self,
                tlb,
                rip: cpu.rip,
                restart: false,
            };
            let walked = paging::walk_path(cpu, &mut walk_memory, linear, request);
            if walk_memory.restart {
                return Err(Fault::Restart);
            }
            let (page, path) = walked?;
            let memory = &self.memory;
            match self
                .shadow
                .fill(&path, |gpa| memory.host_address(gpa).is_some())
            {
                Fill::Done => return Ok(page),
                Fill::Trace(range) => self.trace_table(tlb, range)?,
            }
        }
    }

    /// Traces a guest page table: its entries are read for copying only after that.
    ///
    /// # Errors
    /// The instruction must start again: it may already have translated another operand to a page
    /// that this VCPU may not access directly any more.
    fn trace_table(&mut self, tlb: &mut Tlb, range: Range) -> Result<(), Fault> {
        if self.shadow.has_released() {
            self.remove_released_tables();
        }
        let established = self.trace_writes(tlb, range, Kind::Mmu)?;
        self.shadow.add_trace(range, established.id);
        if established.noticed {
            return Err(Fault::Restart);
        }
        Ok(())
    }
}

/// Guest-physical memory for the page walk: its writes (accessed and dirty bits) are sensed like
/// any other.
struct WalkMemory<'a> {
    surroundings: &'a mut Surroundings,
    tlb: &'a mut Tlb,
    /// Of the instruction for which the tables are walked.
    rip: u64,
    /// A sensed write had to wait and found something changed: the instruction starts again.
    restart: bool,
}

impl WalkMemory<'_> {
    fn exchange<T>(
        &mut self,
        gpa: u64,
        bytes: u32,
        old: T,
        exchange: impl Fn(&GuestMemory) -> Option<Result<(), T>>,
    ) -> Result<(), T> {
        let s = &mut *self.surroundings;
        s.rehearse(|trial| trial.walked(gpa));
        if s.memory.hold(s.vcpu, gpa, Sense::WRITE) {
            return exchange(&s.memory).unwrap_or(Err(old));
        }
        let mut result = None;
        let memory = Arc::clone(&s.memory);
        s.shadow.updating = true;
        let sensed = s.sensed(
            self.tlb,
            self.rip,
            &[Span { gpa, len: bytes }],
            Access::Write,
            &mut || result = exchange(&memory),
        );
        s.shadow.updating = false;
        if sensed.is_err() {
            self.restart = true;
            return Err(old);
        }
        result.unwrap_or(Err(old))
    }
}

impl PhysicalMemory for WalkMemory<'_> {
    fn address_bits(&self) -> u32 {
        self.surroundings.cpuid.physical_address_bits()
    }
    fn read_u64(&mut self, gpa: u64) -> Option<u64> {
        self.surroundings.memory.read_u64(gpa)
    }
    fn read_u32(&mut self, gpa: u64) -> Option<u32> {
        self.surroundings.memory.read_u32(gpa)
    }
    fn compare_exchange_u64(&mut self, gpa: u64, old: u64, new: u64) -> Result<(), u64> {
        self.exchange(gpa, 8, old, |m| m.compare_exchange_u64(gpa, old, new))
    }
    fn compare_exchange_u32(&mut self, gpa: u64, old: u32, new: u32) -> Result<(), u32> {
        self.exchange(gpa, 4, old, |m| m.compare_exchange_u32(gpa, old, new))
    }
}
