//! Runs guest instructions on the real processor.
//!
//! A *thunk* is a small function of the host: it loads the registers that one guest instruction
//! uses from a [`CpuState`], executes the instruction with its memory operand replaced by a host
//! pointer, and stores what the instruction wrote. Everything that the instruction computes,
//! undefined flags included, is therefore what this processor computes.

#![allow(unsafe_code)]

use iced_x86::Instruction;
use thiserror::Error;
use trapline_x86::CpuState;

/// The host refused what native execution needs.
#[derive(Debug, Error)]
pub enum NativeError {
    /// Executable memory could not be had.
    #[error(
        "the host refused {bytes} bytes of executable memory ({source}); allow memfd and PROT_EXEC mappings"
    )]
    Memory {
        bytes: usize,
        source: std::io::Error,
    },
    /// The fault handlers could not be installed.
    #[error("the host refused a handler for signal {signal} ({source})")]
    Signal { signal: i32, source: std::io::Error },
}

/// Why there is no thunk for an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ThunkError {
    /// The instruction must not or cannot run natively; see [`supports`].
    #[error("the instruction cannot run natively; interpret it")]
    Unsupported,
    /// The executable memory is used up. Forget every [`Thunk`], call [`NativeCode::reset`], retry.
    #[error("the executable memory for thunks is full; reset it and try again")]
    Full,
}

/// The host processor raised an exception for the guest's instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFault {
    /// Its vector: 0 #DE, 6 #UD, 13 #GP (misaligned operand), 16 #MF, 17 #AC, 19 #XM; 14 only when
    /// the operand pointer was wrong.
    pub vector: u8,
}

/// Entry point of one compiled instruction (or run of instructions). Valid until its
/// [`NativeCode`] is reset or dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thunk(unsafe extern "sysv64" fn(*mut CpuState, *mut u8) -> u32);

/// Owner of the executable memory of one VCPU's thunks.
pub struct NativeCode {}

impl NativeCode {
    /// Reserves the executable memory and, once per process, installs the fault handlers.
    pub fn new() -> Result<Self, NativeError> {
        todo!()
    }

    /// The thunk that executes `instruction`, decoded in any mode. Instructions that differ only in
    /// address, length or addressing of the memory operand share one thunk.
    pub fn thunk(&mut self, _instruction: &Instruction) -> Result<Thunk, ThunkError> {
        todo!()
    }

    /// One thunk for consecutive instructions, none of which has a memory operand. If one of them
    /// faults, none has had any effect: call them singly.
    pub fn thunk_run(&mut self, _instructions: &[Instruction]) -> Result<Thunk, ThunkError> {
        todo!()
    }

    /// Discards all thunks.
    pub fn reset(&mut self) {
        todo!()
    }
}

/// Whether `instruction` may run natively: it is unprivileged, not control flow, touches no other
/// memory than its one explicit operand, and reads or writes nothing that [`CpuState`] virtualizes
/// (segments, system registers, time stamp, stack). It may still raise #UD when the host lacks it.
pub fn supports(_instruction: &Instruction) -> bool {
    todo!()
}

/// Executes `thunk` on `cpu`. On a fault guest registers and memory are unchanged, except that
/// MXCSR has the flags of an unmasked SIMD exception. RIP is not advanced in either case.
///
/// Alignment checking (RFLAGS.AC) and RFLAGS.TF are not in force meanwhile. If the instruction is
/// x87 with a memory operand, the image's FDP becomes 0.
///
/// # Safety
/// - `thunk` comes from a [`NativeCode`] that has neither been dropped nor reset since.
/// - If the instruction has a memory operand, `operand` is valid for reads and writes (for reads
///   if it only reads) of the operand's full size, mapped, and congruent modulo 64 to the linear
///   address that it stands for, so that misalignment faults come out alike. Otherwise `operand`
///   is ignored. Other threads may access that memory concurrently.
#[inline]
pub unsafe fn call(thunk: Thunk, cpu: &mut CpuState, operand: *mut u8) -> Result<(), HostFault> {
    // SAFETY: as the caller promises; the thunk accesses nothing but `cpu` and the operand.
    let outcome = unsafe { (thunk.0)(cpu, operand) };
    if outcome == 0 {
        Ok(())
    } else {
        Err(HostFault {
            vector: outcome as u8,
        })
    }
}
