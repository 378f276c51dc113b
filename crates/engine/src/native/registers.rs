//! Which host register stands for which guest register in a thunk.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::form::{Form, gpr_bit, is_high_byte};

const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RBX: u8 = 3;
const RSP: u8 = 4;
const RBP: u8 = 5;
const RSI: u8 = 6;
const RDI: u8 = 7;

/// Registers that the System V calling convention lets a function clobber.
const VOLATILE: u16 = bits(&[RAX, RCX, RDX, RSI, RDI, 8, 9, 10, 11]);

const fn bits(registers: &[u8]) -> u16 {
    let mut set = 0;
    let mut i = 0;
    while i < registers.len() {
        set |= 1 << registers[i];
        i += 1;
    }
    set
}

/// The assignment for one thunk. RAX and RCX are never [`Self::state`] or [`Self::operand`]: they
/// are scratch before the guest's registers are loaded and after they are stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Assignment {
    /// Indexed by guest register: the host register.
    host: [u8; 16],
    /// Holds the pointer to the guest's state.
    pub state: u8,
    /// Holds the pointer that replaces the memory operand; meaningless if there is none.
    pub operand: u8,
    /// Callee-saved host registers used, a bit each.
    pub saved: u16,
}

impl Assignment {
    /// An assignment under which all of `forms` can execute one after the other; `None` if there
    /// are too few registers.
    pub fn new(forms: &[Form]) -> Option<Self> {
        let used = forms.iter().fold(0, |set, form| set | form.gpr_used);
        let fixed = forms.iter().fold(0, |set, form| set | form.gpr_fixed);
        let memory = forms.iter().any(|form| form.memory);
        // Registers with a REX prefix are out of reach beside AH, CH, DH and BH.
        let high_byte = forms.iter().any(|form| form.high_byte);

        // RSP is the host's stack pointer at all times.
        let mut taken = used | bits(&[RSP]);
        let take = |taken: &mut u16, candidates: &[u8]| {
            let register = candidates
                .iter()
                .copied()
                .find(|&r| *taken & (1 << r) == 0)?;
            *taken |= 1 << register;
            Some(register)
        };

        // They arrive in RDI and RSI. Moved first, the state pointer must not go to RSI; nor the
        // operand pointer stay behind in RDI.
        let state = take(
            &mut taken,
            &[RDI, 8, 9, 10, 11, RDX, RBX, RBP, 12, 13, 14, 15],
        )?;
        let operand = if !memory {
            RSI
        } else if high_byte {
            take(&mut taken, &[RSI, RDX, RBX, RBP])?
        } else {
            take(
                &mut taken,
                &[RSI, 8, 9, 10, 11, RDX, RBX, RBP, 12, 13, 14, 15],
            )?
        };

        let mut host = std::array::from_fn(|guest| guest as u8);
        let movable = |guest: u8| used & !fixed & (1 << guest) != 0;
        let must_move = used & bits(&[RSP]) != 0;
        if must_move {
            if !movable(RSP) {
                return None;
            }
            // SPL takes a REX prefix wherever it goes, but an instruction that has it has no AH.
            let candidates: &[u8] = if high_byte {
                &[RCX, RDX, RAX, RSI, RDI, RBX, RBP]
            } else {
                &[
                    RCX, RDX, RAX, RSI, RDI, 8, 9, 10, 11, RBX, RBP, 12, 13, 14, 15,
                ]
            };
            host[RSP as usize] = take(&mut taken, candidates)?;
        }
        // Others would only have to be saved and restored.
        for guest in [RBX, RBP, 12, 13, 14, 15] {
            if movable(guest) {
                let candidates: &[u8] = if high_byte {
                    &[RCX, RDX, RAX]
                } else {
                    &[RCX, RDX, RAX, RSI, RDI, 8, 9, 10, 11]
                };
                if let Some(register) = take(&mut taken, candidates) {
                    host[guest as usize] = register;
                }
            }
        }

        let mut inhabited = 1u16 << state;
        if memory {
            inhabited |= 1 << operand;
        }
        for (guest, &register) in host.iter().enumerate() {
            if used & (1 << guest) != 0 {
                inhabited |= 1 << register;
            }
        }
        Some(Self {
            host,
            state,
            operand,
            saved: inhabited & !VOLATILE,
        })
    }

    /// The 64-bit host register for a guest register number.
    pub fn host(&self, guest: usize) -> Register {
        gpr64(self.host.get(guest).copied().unwrap_or(RAX))
    }

    /// The guest's instruction with its registers renamed and its memory operand replaced.
    pub fn apply(&self, form: &Form) -> Instruction {
        let mut instruction = form.instruction;
        for operand in 0..instruction.op_count() {
            if instruction.op_kind(operand) == OpKind::Register {
                let register = instruction.op_register(operand);
                if register.is_gpr() {
                    instruction.set_op_register(operand, self.rename(register));
                }
            }
        }
        if form.memory {
            instruction.set_memory_base(gpr64(self.operand));
        } else if instruction.mnemonic() == Mnemonic::Lea {
            instruction.set_memory_base(self.rename(instruction.memory_base()));
            instruction.set_memory_index(self.rename(instruction.memory_index()));
        }
        instruction
    }

    fn rename(&self, register: Register) -> Register {
        let Some(guest) = gpr_bit(register).map(u16::trailing_zeros) else {
            return register;
        };
        let host = self.host.get(guest as usize).copied().unwrap_or(RAX);
        if u32::from(host) == guest {
            return register;
        }
        match register.size() {
            1 if is_high_byte(register) => Register::AH + u32::from(host),
            1 => [
                Register::AL,
                Register::CL,
                Register::DL,
                Register::BL,
                Register::SPL,
                Register::BPL,
                Register::SIL,
                Register::DIL,
                Register::R8L,
                Register::R9L,
                Register::R10L,
                Register::R11L,
                Register::R12L,
                Register::R13L,
                Register::R14L,
                Register::R15L,
            ]
            .get(host as usize)
            .copied()
            .unwrap_or(Register::AL),
            2 => Register::AX + u32::from(host),
            4 => Register::EAX + u32::from(host),
            _ => gpr64(host),
        }
    }
}

/// The 64-bit register with this number.
pub(super) fn gpr64(number: u8) -> Register {
    Register::RAX + u32::from(number & 15)
}
