//! Debug registers (SDM vol. 3, 17.2).

use iced_x86::{Code, Instruction};
use trapline_x86::Exception;
use trapline_x86::control::{cr4, dr6, dr7};

use crate::access::Core;
use crate::env::Environment;
use crate::step::address::set_register;
use crate::step::segments::require_kernel;
use crate::step::system::{self, general_protection, register_number};
use crate::step::{Executed, Flow};

/// The bits of DR6 that a MOV writes.
const DR6_WRITABLE: u64 = dr6::B | dr6::BD | dr6::BS | dr6::BT;
/// The bits of DR7 that a MOV writes.
const DR7_WRITABLE: u64 = 0xffff_23ff;

/// MOV to and from DRn.
///
/// # Errors
/// #UD, #GP, #DB.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let writes = matches!(instr.code(), Code::Mov_dr_r32 | Code::Mov_dr_r64);
    let register = if writes {
        instr.op0_register()
    } else {
        instr.op1_register()
    };
    let number = match register_number(register) {
        n @ (4 | 5) if core.cpu.cr4 & cr4::DE == 0 => n + 2,
        n @ (0..=3 | 6 | 7) => n,
        _ => return Err(Exception::invalid_opcode().into()),
    };
    require_kernel(core.cpu)?;
    if core.cpu.dr7 & dr7::GD != 0 {
        return Err(Exception::debug(dr6::BD).into());
    }
    let cpu = &mut *core.cpu;
    if !writes {
        let value = match number {
            6 => cpu.dr6,
            7 => cpu.dr7,
            n => cpu.dr[n & 3],
        };
        set_register(cpu, instr.op0_register(), value);
        return Ok(Flow::Next);
    }
    let value = system::source(core, instr);
    if number >= 6 && value >> 32 != 0 {
        return general_protection();
    }
    let cpu = &mut *core.cpu;
    match number {
        6 => cpu.dr6 = value & DR6_WRITABLE | dr6::RESET,
        7 => cpu.dr7 = value & DR7_WRITABLE | dr7::RESET,
        n => cpu.dr[n & 3] = value,
    }
    Ok(Flow::Leave)
}
