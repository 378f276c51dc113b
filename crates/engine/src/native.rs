//! Runs guest instructions on the real processor.
//!
//! A *thunk* is a small function of the host: it loads the registers that one guest instruction
//! uses from a [`CpuState`], executes the instruction with its memory operand replaced by a host
//! pointer, and stores what the instruction wrote. Everything that the instruction computes,
//! undefined flags included, is therefore what this processor computes.

#![allow(unsafe_code)]

pub(crate) mod arena;
mod emit;
pub(crate) mod fault;
pub(crate) mod form;
pub(crate) mod host;
mod registers;

use foldhash::HashMap;

use iced_x86::{CodeSize, Instruction, InstructionInfoFactory};
use thiserror::Error;
use trapline_x86::CpuState;
use trapline_x86::vector::MXCSR_RESET;

use arena::Arena;
use form::Form;
use host::Host;

/// Instructions remembered at most, with or without a thunk.
const KNOWN_LIMIT: usize = 1 << 18;

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
#[derive(Clone, Copy, Debug)]
pub struct Thunk(unsafe extern "sysv64" fn(*mut CpuState, *mut u8) -> u32);

/// What distinguishes thunks: the normalized instruction, and whether it was decoded in 64-bit mode.
type Key = (Instruction, bool);

/// Owner of the executable memory of one VCPU's thunks.
pub struct NativeCode {
    arena: Arena,
    host: Host,
    single: HashMap<Key, Result<Thunk, ThunkError>>,
    runs: HashMap<Box<[Key]>, Result<Thunk, ThunkError>>,
    factory: InstructionInfoFactory,
    /// Where the arena holds the MXCSR value for Rust.
    host_mxcsr: u64,
}

impl NativeCode {
    /// Reserves the executable memory and, once per process, installs the fault handlers.
    pub fn new() -> Result<Self, NativeError> {
        fault::install()?;
        let mut arena = Arena::new(arena::ARENA_BYTES)?;
        let host_mxcsr = arena.next();
        // Always fits: it is the first.
        let _ = arena.append(&MXCSR_RESET.to_le_bytes());
        Ok(Self {
            arena,
            host: Host::detect(),
            single: HashMap::default(),
            runs: HashMap::default(),
            factory: InstructionInfoFactory::new(),
            host_mxcsr,
        })
    }

    /// The thunk that executes `instruction`, decoded in any mode. Instructions that differ only in
    /// address, length or addressing of the memory operand share one thunk.
    pub fn thunk(&mut self, instruction: &Instruction) -> Result<Thunk, ThunkError> {
        let key = key(instruction);
        if let Some(known) = self.single.get(&key) {
            return *known;
        }
        let made = match Form::of(instruction, &mut self.factory) {
            Some(form) => self.make(&[form]),
            None => Err(ThunkError::Unsupported),
        };
        if !matches!(made, Err(ThunkError::Full)) {
            // Hostile code may bring up any number of instructions that do not fill the arena.
            if self.single.len() >= KNOWN_LIMIT {
                return Err(ThunkError::Full);
            }
            self.single.insert(key, made);
        }
        made
    }

    /// One thunk for consecutive instructions, none of which has a memory operand or touches x87
    /// state. If one of them faults, none has had any effect but on MXCSR: call them singly then,
    /// after putting back MXCSR.
    pub fn thunk_run(&mut self, instructions: &[Instruction]) -> Result<Thunk, ThunkError> {
        let key: Box<[Key]> = instructions.iter().map(key).collect();
        if let Some(known) = self.runs.get(&key) {
            return *known;
        }
        let forms: Option<Vec<Form>> = instructions
            .iter()
            .map(|instruction| Form::of(instruction, &mut self.factory))
            .collect();
        let made = match forms {
            Some(forms) => self.make(&forms),
            None => Err(ThunkError::Unsupported),
        };
        if !matches!(made, Err(ThunkError::Full)) {
            if self.runs.len() >= KNOWN_LIMIT {
                return Err(ThunkError::Full);
            }
            self.runs.insert(key, made);
        }
        made
    }

    fn make(&mut self, forms: &[Form]) -> Result<Thunk, ThunkError> {
        let code = emit::thunk(forms, self.host, self.arena.next(), self.host_mxcsr)
            .map_err(|_| ThunkError::Unsupported)?;
        let address = self.arena.append(&code).ok_or(ThunkError::Full)?;
        // SAFETY: a function of this signature has just been written there.
        Ok(Thunk(unsafe {
            std::mem::transmute::<*mut u8, unsafe extern "sysv64" fn(*mut CpuState, *mut u8) -> u32>(
                address.as_ptr(),
            )
        }))
    }

    /// Discards all thunks.
    pub fn reset(&mut self) {
        self.single.clear();
        self.runs.clear();
        self.arena.truncate(size_of_val(&MXCSR_RESET));
    }
}

fn key(instruction: &Instruction) -> Key {
    (
        form::normalize(instruction),
        instruction.code_size() == CodeSize::Code64,
    )
}

/// Whether `instruction` may run natively: it is unprivileged, not control flow, touches no other
/// memory than its one explicit operand, and reads or writes nothing that [`CpuState`] virtualizes
/// (segments, system registers, time stamp, stack). It may still raise #UD when the host lacks it.
pub fn supports(instruction: &Instruction, factory: &mut InstructionInfoFactory) -> bool {
    Form::of(instruction, factory).is_some()
}

/// Executes `thunk` on `cpu`. On a fault guest registers and memory are unchanged, except that
/// MXCSR has the flags of an unmasked SIMD exception (and the x87 tags are valid if that came from a
/// conversion with an MMX register, where the processor does so). RIP is not advanced in either case.
///
/// The caller checks what depends on more than the instruction and its operand: CR0.TS, CR0.EM,
/// CR4.OSFXSR, XCR0, segment limits, canonical addresses. MXCSR must have no reserved bit set: #GP
/// otherwise. AMD's misaligned exception mask (MXCSR bit 17) is in force only in instructions that
/// compute with floating-point numbers. Alignment checking (RFLAGS.AC) and RFLAGS.TF are not in
/// force meanwhile. If the instruction is x87, FIP becomes `cpu.rip`; FDP becomes 0 where it would
/// be the operand's host address, and FOP tells the thunk's addressing of the operand.
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

#[cfg(test)]
mod tests;
