//! What is compared with the processor.

#![allow(unsafe_code)]

use iced_x86::Instruction;
use trapline_engine::native::{self, NativeCode, ThunkError};
use trapline_x86::CpuState;

use crate::case::{CODE, Case, DATA, NO_FAULT, Outcome};

/// Executes single instructions.
pub trait Subject {
    /// Executes the instruction of `case`, which is `instruction` at [`CODE`] and has its memory
    /// operand, if any, at the linear address `address`.
    fn execute(
        &mut self,
        case: &Case,
        instruction: &Instruction,
        address: u64,
        outcome: &mut Outcome,
    );
}

/// Thunks alone, with addresses computed by the test.
pub struct Thunks {
    native: NativeCode,
    cpu: CpuState,
}

impl Thunks {
    pub fn new() -> Self {
        Self {
            native: NativeCode::new().expect("native code"),
            cpu: CpuState::reset(),
        }
    }
}

impl Subject for Thunks {
    fn execute(
        &mut self,
        case: &Case,
        instruction: &Instruction,
        address: u64,
        outcome: &mut Outcome,
    ) {
        let thunk = match self.native.thunk(instruction) {
            Err(ThunkError::Full) => {
                self.native.reset();
                self.native.thunk(instruction)
            }
            other => other,
        };
        let thunk = thunk.expect("a thunk for what is supported");
        let registers = &case.before.registers;
        self.cpu.gpr = registers.gpr;
        self.cpu.rflags = registers.rflags;
        self.cpu.rip = CODE;
        self.cpu.vector.clone_from(&registers.vector);
        outcome.after.data = case.before.data;
        let offset = address.wrapping_sub(DATA) as usize;
        let operand = outcome.after.data.0.as_mut_ptr().wrapping_add(offset);
        // SAFETY: the thunk is fresh; operands start in the first 129 of the data's bytes, leaving
        // more than the largest operand's.
        let result = unsafe { native::call(thunk, &mut self.cpu, operand) };
        outcome.fault = result
            .err()
            .map_or(NO_FAULT, |fault| u32::from(fault.vector));
        outcome.after.registers.gpr = self.cpu.gpr;
        outcome.after.registers.rflags = self.cpu.rflags;
        outcome.after.registers.vector.clone_from(&self.cpu.vector);
    }
}
