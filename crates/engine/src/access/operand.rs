//! Operands of instructions that the host's processor executes: a host pointer to guest memory
//! itself or, where that cannot be, to a copy.
#![allow(unsafe_code)]

use trapline_x86::{CpuState, Exception};

use super::bytes::{copy_from_guest, copy_to_guest};
use super::{Core, Fault, Piece, Pieces, host_fault};
use crate::env::Environment;
use crate::tlb::{Access, Privilege};

/// The largest operand that goes through the bounce buffer.
const LARGEST_OPERAND: usize = 512;

/// What a native operand access does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperandAccess {
    Read,
    Write,
    ReadWrite,
}

#[repr(C, align(64))]
struct Bounce([u8; LARGEST_OPERAND + 64]);

impl<E: Environment> Core<'_, E> {
    /// Runs `perform` with a host pointer to the operand at `linear`: on guest memory itself where
    /// it lies in one page of RAM, else on a copy. `perform` may fail with a host exception
    /// vector, having changed nothing; the guest then gets that exception.
    ///
    /// # Errors
    /// What the translation, the traces or the instruction raise.
    pub fn with_operand(
        &mut self,
        linear: u64,
        len: usize,
        access: OperandAccess,
        locked: bool,
        perform: &mut dyn FnMut(&mut CpuState, *mut u8) -> Result<(), u8>,
    ) -> Result<(), Fault> {
        let linear = self.wrap(linear);
        let privilege = Privilege::of_data(self.cpu);
        let kind = if access == OperandAccess::Read {
            Access::Read
        } else {
            Access::Write
        };
        if let Some(host) = self.fast(linear, len, privilege, kind) {
            return perform(self.cpu, host).map_err(host_fault);
        }
        self.with_operand_slow(linear, len, access, kind, locked, perform)
    }

    #[cold]
    fn with_operand_slow(
        &mut self,
        linear: u64,
        len: usize,
        access: OperandAccess,
        kind: Access,
        locked: bool,
        perform: &mut dyn FnMut(&mut CpuState, *mut u8) -> Result<(), u8>,
    ) -> Result<(), Fault> {
        let privilege = Privilege::of_data(self.cpu);
        self.check_alignment(linear, operand_alignment(len), privilege)?;
        let pieces = self.pieces(linear, len, privilege, kind)?;
        let rip = self.cpu.rip;
        if let (None, Some(host)) = (pieces.second, pieces.first.host()) {
            // One page of RAM: run on the memory itself, so that the access is as atomic as the
            // processor makes it.
            let mut result = Ok(());
            if pieces.first.is_sensed() {
                self.leave_block = true;
                let cpu = &mut *self.cpu;
                self.env
                    .sensed(self.tlb, rip, &[pieces.first.span()], kind, &mut || {
                        result = perform(cpu, host);
                    })?;
            } else {
                result = perform(self.cpu, host);
            }
            result.map_err(host_fault)?;
            self.note_breakpoints(linear, len, kind);
            return Ok(());
        }
        if len > LARGEST_OPERAND {
            return Err(Exception::general_protection(0).into());
        }
        if let (true, Some(second), Some(a), Some(b)) = (
            locked,
            pieces.second,
            pieces.first.host(),
            pieces.second.and_then(|p| p.host()),
        ) {
            return self.split_lock(linear, &pieces, second, a, b, perform);
        }
        // Keep the operand's alignment: the processor checks it for some instructions.
        let offset = (linear & 63) as usize;
        let mut copy = Bounce([0; LARGEST_OPERAND + 64]);
        let bytes = &mut copy.0[offset..offset + len];
        if access != OperandAccess::Write {
            let (head, tail) = bytes.split_at_mut(pieces.first.len);
            self.read_piece(pieces.first, head)?;
            if let Some(piece) = pieces.second {
                self.read_piece(piece, tail)?;
            }
        }
        if access == OperandAccess::Read {
            perform(self.cpu, bytes.as_mut_ptr()).map_err(host_fault)?;
            self.note_breakpoints(linear, len, kind);
            return Ok(());
        }
        // The instruction's effect on registers must be undone if the write has to restart.
        let before = self.cpu.clone();
        perform(self.cpu, bytes.as_mut_ptr()).map_err(host_fault)?;
        self.commit(linear, &pieces, bytes)
            .inspect_err(|_| *self.cpu = before)
    }

    /// A locked access to two pages of RAM: on hardware the bus is locked; here every other VCPU
    /// waits.
    fn split_lock(
        &mut self,
        linear: u64,
        pieces: &Pieces,
        second: Piece,
        a: *mut u8,
        b: *mut u8,
        perform: &mut dyn FnMut(&mut CpuState, *mut u8) -> Result<(), u8>,
    ) -> Result<(), Fault> {
        let offset = (linear & 63) as usize;
        let (first_len, len) = (pieces.first.len, pieces.first.len + second.len);
        let mut copy = Bounce([0; LARGEST_OPERAND + 64]);
        let mut result = Ok(());
        let cpu = &mut *self.cpu;
        let rip = cpu.rip;
        self.leave_block = true;
        self.env.exclusive(
            self.tlb,
            rip,
            &[pieces.first.span(), second.span()],
            &mut || {
                let bytes = &mut copy.0[offset..offset + len];
                let (head, tail) = bytes.split_at_mut(first_len);
                // SAFETY: both pieces are guest RAM of these lengths.
                unsafe {
                    copy_from_guest(a, head);
                    copy_from_guest(b, tail);
                }
                result = perform(cpu, bytes.as_mut_ptr());
                if result.is_ok() {
                    let (head, tail) = bytes.split_at(first_len);
                    // SAFETY: as above.
                    unsafe {
                        copy_to_guest(a, head);
                        copy_to_guest(b, tail);
                    }
                }
            },
        )?;
        result.map_err(host_fault)?;
        self.note_breakpoints(linear, len, Access::Write);
        Ok(())
    }
}

/// What an operand of `len` bytes should be aligned to where alignment is checked: numbers to their
/// size, extended precision to 8 bytes, vectors of any size to 16, x87 environments and states to
/// the size of their words (SDM vol. 3, table 6-7; vectors as measured on AMD Zen 4, where the SDM
/// leaves it to the processor). Instructions that demand more raise #GP instead, which comes first.
fn operand_alignment(len: usize) -> usize {
    match len {
        2 | 14 | 94 => 2,
        4 | 28 | 108 => 4,
        8 | 10 => 8,
        16 | 32 | 64 => 16,
        _ => 1,
    }
}
