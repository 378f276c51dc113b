//! Frames on the current stack, or on one that is about to become current (SDM vol. 1, 6.2; vol. 3,
//! 5.12.1).

use trapline_x86::control::{cr4, rflags};
use trapline_x86::segment::Rights;
use trapline_x86::{CpuState, Exception, Gpr, Mode, Segment};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::address::{mask, permits, set_sized};
use crate::step::stack::address_bits;
use crate::tlb::{Access, Privilege};

/// The most values that one event or instruction pushes at a time.
const MOST_PUSHES: usize = 40;

/// The privilege of an explicit access at `level`.
pub fn privilege_at(cpu: &CpuState, level: u8) -> Privilege {
    if level == 3 {
        Privilege::User
    } else if cpu.rflags & rflags::AC != 0 || cpu.cr4 & cr4::SMAP == 0 {
        Privilege::SupervisorOpen
    } else {
        Privilege::Supervisor
    }
}

/// A stack with a pointer of its own, so that the registers change only when all accesses have
/// succeeded.
#[derive(Clone, Copy, Debug)]
pub struct Stack {
    pub segment: Segment,
    pub pointer: u64,
    /// 16, 32 or 64; 64 means that base and limit do not count.
    pub bits: u32,
    pub privilege: Privilege,
    /// Error code of #SS when an access lies outside.
    pub error: u32,
    protected: bool,
}

impl Stack {
    /// The current stack.
    pub fn current(cpu: &CpuState) -> Self {
        let mode = cpu.mode();
        Self {
            segment: *cpu.ss(),
            pointer: cpu.gpr(Gpr::Rsp),
            bits: address_bits(cpu),
            privilege: Privilege::of_data(cpu),
            error: 0,
            protected: mode >= Mode::Protected16,
        }
    }

    /// A stack of 64-bit mode at privilege `level`.
    pub fn long(cpu: &CpuState, pointer: u64, level: u8) -> Self {
        Self {
            segment: Segment::null(0),
            pointer,
            bits: 64,
            privilege: privilege_at(cpu, level),
            error: 0,
            protected: true,
        }
    }

    /// A stack in `segment` at privilege `level`; `error` is that of #SS.
    pub fn in_segment(
        cpu: &CpuState,
        segment: Segment,
        pointer: u64,
        level: u8,
        error: u32,
    ) -> Self {
        let bits = if segment.rights.has(Rights::DB) {
            32
        } else {
            16
        };
        let privilege = privilege_at(cpu, level);
        Self {
            segment,
            pointer,
            bits,
            privilege,
            error,
            protected: true,
        }
    }

    fn linear(&self, offset: u64, size: usize, access: Access) -> Result<u64, Exception> {
        let long = self.bits == 64;
        let permitted = if long {
            let last = offset.wrapping_add(size as u64 - 1);
            CpuState::is_canonical(offset) && CpuState::is_canonical(last)
        } else {
            permits(&self.segment, self.protected, offset, size, access)
        };
        if !permitted {
            return Err(Exception::stack_fault(self.error));
        }
        Ok(if long {
            offset
        } else {
            self.segment.base.wrapping_add(offset) & 0xffff_ffff
        })
    }

    /// Pushes `values` in order, `size` (2, 4 or 8) bytes each: all or, on a fault, none.
    ///
    /// # Errors
    /// #SS(`error`), page faults, restart. The pointer is then unchanged.
    pub fn push_all<E: Environment>(
        &mut self,
        core: &mut Core<'_, E>,
        size: usize,
        values: &[u64],
    ) -> Result<(), Fault> {
        let wrap = mask(self.bits);
        let len = size * values.len();
        let bottom = (self.pointer & wrap).wrapping_sub(len as u64) & wrap;
        // In range: it does not wrap around the end of the stack's offsets.
        if len != 0
            && bottom <= wrap - (len as u64 - 1)
            && values.len() <= MOST_PUSHES
            && let Ok(linear) = self.linear(bottom, len, Access::Write)
        {
            // The whole frame lies in the segment: one write of it.
            let mut bytes = [0; MOST_PUSHES * 8];
            for (i, value) in values.iter().rev().enumerate() {
                bytes[i * size..][..size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
            core.check_alignment(linear, size, self.privilege)?;
            if let Err(fault) = core.write_bytes(linear, &bytes[..len], self.privilege) {
                // The value pushed first is the one that faults.
                if matches!(fault, Fault::Exception(e) if e.cr2.is_some()) {
                    for n in 1..=values.len() {
                        let at = linear.wrapping_add((len - n * size) as u64);
                        core.probe_write(at, size, self.privilege)?;
                    }
                }
                return Err(fault);
            }
            self.pointer = bottom;
            return Ok(());
        }
        // It wraps, or part of it lies outside: one by one, to find the element that faults.
        let element = |i: usize| (self.pointer & wrap).wrapping_sub((size * (i + 1)) as u64) & wrap;
        for i in 0..values.len() {
            let linear = self.linear(element(i), size, Access::Write)?;
            core.check_alignment(linear, size, self.privilege)?;
            core.probe_write(linear, size, self.privilege)?;
        }
        for (i, value) in values.iter().enumerate() {
            let linear = self.linear(element(i), size, Access::Write)?;
            core.write_sized(linear, size, *value, self.privilege)?;
        }
        self.pointer = bottom;
        Ok(())
    }

    /// Pops one value of `size` (2, 4 or 8) bytes.
    ///
    /// # Errors
    /// #SS(`error`), page faults, restart.
    pub fn pop<E: Environment>(
        &mut self,
        core: &mut Core<'_, E>,
        size: usize,
    ) -> Result<u64, Fault> {
        let offset = self.pointer & mask(self.bits);
        let linear = self.linear(offset, size, Access::Read)?;
        let value = core.read_sized(linear, size, self.privilege)?;
        self.skip(size as u64);
        Ok(value)
    }

    /// Releases `bytes` of the stack.
    pub fn skip(&mut self, bytes: u64) {
        self.pointer = self.pointer.wrapping_add(bytes) & mask(self.bits);
    }

    /// Makes the pointer current, leaving the part of RSP that the stack's width does not cover.
    pub fn commit_pointer(&self, cpu: &mut CpuState) {
        set_sized(cpu, Gpr::Rsp, self.bits, self.pointer);
    }
}
