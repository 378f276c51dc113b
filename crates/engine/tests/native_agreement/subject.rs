//! What is compared with the processor.

#![allow(unsafe_code)]

use iced_x86::Instruction;
use trapline_engine::native::{self, NativeCode, Thunk, ThunkError};
use trapline_x86::CpuState;

use crate::case::{Case, DATA, NO_FAULT, Outcome};

/// Executes single instructions.
pub trait Subject {
    /// Executes the instruction of `case`, which is `instruction` decoded and has its memory
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

impl Thunks {
    /// Executes several instructions as one thunk; false if that is not possible.
    pub fn execute_run(
        &mut self,
        case: &Case,
        instructions: &[Instruction],
        outcome: &mut Outcome,
    ) -> bool {
        let thunk = match self.native.thunk_run(instructions) {
            Err(ThunkError::Full) => {
                self.native.reset();
                self.native.thunk_run(instructions)
            }
            other => other,
        };
        let Ok(thunk) = thunk else { return false };
        outcome.after.data = case.before.data;
        self.call(thunk, case, std::ptr::null_mut(), outcome);
        true
    }

    fn call(&mut self, thunk: Thunk, case: &Case, operand: *mut u8, outcome: &mut Outcome) {
        let registers = &case.before.registers;
        self.cpu.gpr = registers.gpr;
        self.cpu.rflags = registers.rflags;
        self.cpu.rip = case.ip();
        self.cpu.vector.clone_from(&registers.vector);
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
        outcome.after.data = case.before.data;
        let offset = address.wrapping_sub(DATA) as usize;
        let operand = outcome.after.data.0.as_mut_ptr().wrapping_add(offset);
        self.call(thunk, case, operand, outcome);
    }
}
