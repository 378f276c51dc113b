//! A guest instruction that the real processor executes, re-encoded: its registers renamed to the
//! host's, its memory operand replaced by the address that the look-up left.

use iced_x86::{Encoder, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};

use super::assembler::{Assembler, Mem, reg};
use super::registers::{
    ADDRESS, COUNT, GUEST_COUNT, GUEST_RCX, GUEST_RSP, INDEX, home, host, part,
};
use crate::native::form::{Form, gpr_bit, is_fixed};

/// What is emitted for one instruction.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Scratch registers that stand for guest registers of the frame.
    frame: Vec<Stand>,
    /// One of these guest registers is read from here instead.
    instead: Option<(usize, Mem)>,
    /// RCX stands for the guest's.
    count: bool,
    /// And is written.
    count_written: bool,
    /// The operand's address goes to RCX too, for want of a register that needs no prefix.
    address_in_count: bool,
    bytes: Vec<u8>,
    pub vectors: bool,
    constant: Option<(usize, u64)>,
}

/// A scratch register that stands for a guest register of the frame.
#[derive(Clone, Copy, Debug)]
struct Stand {
    guest: usize,
    scratch: u8,
    /// It is loaded before.
    read: bool,
    /// It is stored afterwards.
    written: bool,
}

fn bit(guest: usize) -> u16 {
    1 << (guest & 15)
}

/// The displacement from RSP of a register operand that lies in the frame, if the instruction can
/// take it from there: it then needs no scratch register.
fn in_frame(form: &Form, instruction: &Instruction, n: u32, register: Register) -> Option<i32> {
    use Mnemonic as M;
    use OpCodeOperandKind as K;
    let guest = gpr_bit(register)?.trailing_zeros() as usize;
    if host(guest).is_some() || form.memory || form.high_byte {
        return None;
    }
    // As memory operands these would be locked, or bit strings, or addresses.
    let other = matches!(
        instruction.mnemonic(),
        M::Xchg | M::Xadd | M::Cmpxchg | M::Bt | M::Bts | M::Btr | M::Btc | M::Lea | M::Nop
    );
    let kind = instruction.op_code().op_kind(n);
    let either = matches!(
        kind,
        K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem
    );
    // A smaller result would leave the rest as it is; some write less to memory than to a register.
    let whole = register.size() == 8 && instruction.memory_size().size() == 8;
    let whole = whole || form.gpr_written & bit(guest) == 0;
    let once = (0..instruction.op_count())
        .filter(|&m| instruction.op_kind(m) == OpKind::Register)
        .filter(|&m| gpr_bit(instruction.op_register(m)) == Some(bit(guest)))
        .count()
        == 1;
    (either && whole && once && !other).then(|| home(guest).displacement)
}

impl Plan {
    /// A constant for a guest register.
    pub fn constant(guest: usize, value: u64) -> Self {
        Self {
            constant: Some((guest, value)),
            ..Self::default()
        }
    }

    /// `None` if registers are wanting. `original` are the guest's bytes, `displacement` the
    /// distance of the memory operand from the address that the look-up leaves.
    pub fn of(
        form: &Form,
        instruction: &Instruction,
        original: Option<&[u8]>,
        displacement: i32,
        encoder: &mut Encoder,
    ) -> Option<Self> {
        let mut plan = Self {
            vectors: form.vector_used != 0 || form.mask_used != 0 || form.mxcsr,
            ..Self::default()
        };
        let mut renamed = form.instruction;
        let fixed = form.gpr_fixed;
        let elsewhere = (0..16).filter(|&guest| host(guest) != Some(guest as u8));
        for guest in elsewhere {
            if fixed & bit(guest) != 0 && guest != GUEST_RCX {
                return None;
            }
        }
        plan.count =
            fixed & bit(GUEST_RCX) != 0 || form.high_byte && form.gpr_used & bit(GUEST_RCX) != 0;

        let mut pool = Vec::with_capacity(3);
        if !form.high_byte {
            if !plan.count {
                pool.push(COUNT);
            }
            pool.push(INDEX);
            if !form.memory {
                pool.push(ADDRESS);
            }
        }
        let (mut changed, mut named) = (false, false);
        for n in 0..renamed.op_count() {
            if renamed.op_kind(n) != OpKind::Register {
                continue;
            }
            let register = renamed.op_register(n);
            if !register.is_gpr() || is_fixed(renamed.op_code().op_kind(n)) {
                continue;
            }
            if let Some(field) = in_frame(form, instruction, n, register) {
                changed = true;
                renamed.set_op_kind(n, OpKind::Memory);
                renamed.set_memory_base(Register::RSP);
                renamed.set_memory_displacement64(field as u64);
                renamed.set_memory_displ_size(8);
                continue;
            }
            let to = plan.place(form, register, &mut pool)?;
            changed |= to != register;
            named |= gpr_bit(register) == Some(bit(GUEST_RCX));
            renamed.set_op_register(n, to);
        }
        // An operand that names RCX goes to the register that stands for it, unless it must not have
        // a prefix; what an instruction does to RCX unasked happens to RCX.
        plan.count_written =
            plan.count && form.gpr_written & bit(GUEST_RCX) != 0 && (form.high_byte || !named);
        if form.memory {
            changed = true;
            let base = if form.high_byte {
                if plan.count {
                    return None;
                }
                plan.address_in_count = true;
                Register::RCX
            } else {
                part(Register::RAX, ADDRESS)
            };
            renamed.set_memory_base(base);
            if displacement != 0 {
                renamed.set_memory_displacement64(i64::from(displacement) as u64);
                renamed.set_memory_displ_size(8);
            }
        } else if renamed.mnemonic() == Mnemonic::Lea {
            for (register, set) in [
                (
                    renamed.memory_base(),
                    Instruction::set_memory_base as fn(&mut Instruction, Register),
                ),
                (renamed.memory_index(), Instruction::set_memory_index),
            ] {
                if register != Register::None {
                    let to = plan.place(form, register, &mut pool)?;
                    changed |= to != register;
                    set(&mut renamed, to);
                }
            }
        }
        match original {
            Some(original) if !changed && renamed.code() == instruction.code() => {
                plan.bytes.extend_from_slice(original);
            }
            _ => {
                // Position does not matter: no operand is relative to it.
                encoder.encode(&renamed, 0).ok()?;
                plan.bytes = encoder.take_buffer();
            }
        }
        Some(plan)
    }

    /// Reads a guest register, one that is only read, from somewhere else; whether it is one that
    /// lies in the frame.
    pub fn read_instead(&mut self, guest: usize, from: Mem) -> bool {
        self.instead = Some((guest, from));
        self.frame
            .iter()
            .any(|stand| stand.guest == guest && stand.read && !stand.written)
    }

    /// The register to be used for a guest register.
    fn place(&mut self, form: &Form, register: Register, pool: &mut Vec<u8>) -> Option<Register> {
        let guest = gpr_bit(register)?.trailing_zeros() as usize;
        if self.count && guest == GUEST_RCX && form.high_byte {
            return Some(register);
        }
        if let Some(host) = host(guest) {
            if form.high_byte && (usize::from(host) != guest || guest == GUEST_RSP) {
                return None;
            }
            return Some(if usize::from(host) == guest {
                register
            } else {
                part(register, host)
            });
        }
        let scratch = match self.frame.iter().find(|stand| stand.guest == guest) {
            Some(stand) => stand.scratch,
            None => {
                let scratch = pool.pop()?;
                self.frame.push(Stand {
                    guest,
                    scratch,
                    read: form.gpr_read & bit(guest) != 0,
                    written: form.gpr_written & bit(guest) != 0,
                });
                scratch
            }
        };
        Some(part(register, scratch))
    }

    pub fn emit(&self, a: &mut Assembler) {
        if let Some((guest, value)) = self.constant {
            match host(guest) {
                Some(host) => a.mov_immediate(host, value),
                None => {
                    a.mov_immediate(INDEX, value);
                    a.store(home(guest), INDEX);
                }
            }
            return;
        }
        for stand in self.frame.iter().filter(|stand| stand.read) {
            let from = match self.instead {
                Some((instead, mem)) if instead == stand.guest => mem,
                _ => home(stand.guest),
            };
            a.load(stand.scratch, from);
        }
        if self.count {
            a.mov(reg::RCX, GUEST_COUNT);
        } else if self.address_in_count {
            a.mov(reg::RCX, ADDRESS);
        }
        a.raw(&self.bytes);
        if self.count_written {
            a.mov(GUEST_COUNT, reg::RCX);
        }
        for stand in self.frame.iter().filter(|stand| stand.written) {
            a.store(home(stand.guest), stand.scratch);
        }
    }

    /// Whether it uses scratch registers.
    pub fn uses_scratch(&self) -> bool {
        !self.frame.is_empty() || self.constant.is_some()
    }
}
