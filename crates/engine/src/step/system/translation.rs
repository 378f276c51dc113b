//! INVLPG and INVPCID (SDM vol. 2; vol. 3, 4.10.4).

use iced_x86::{Instruction, Mnemonic, Register};
use trapline_x86::control::{cr3, cr4};
use trapline_x86::{CpuState, Mode};

use crate::access::Core;
use crate::env::Environment;
use crate::step::address::{self, register_value, segment_register};
use crate::step::segments::require_kernel;
use crate::step::system::general_protection;
use crate::step::{Executed, Flow};
use crate::tlb::{Access, Privilege};

/// Executes one of them.
///
/// # Errors
/// #GP, #SS, page faults, restart.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    require_kernel(core.cpu)?;
    match instr.mnemonic() {
        Mnemonic::Invlpg => invalidate_page(core, instr),
        _ => invalidate_context(core, instr),
    }
}

fn invalidate_page<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    // The operand is an address, not an access: no limit or type is checked.
    let offset = address::effective_offset(core.cpu, instr);
    let segment = instr.memory_segment();
    let long = core.cpu.mode() == Mode::Long64;
    let base = match segment {
        Register::FS | Register::GS => core.cpu.segment(segment_register(segment)).base,
        _ if long => 0,
        _ => core.cpu.segment(segment_register(segment)).base,
    };
    let linear = base.wrapping_add(offset);
    let linear = if long { linear } else { linear & 0xffff_ffff };
    core.env.before_flush(core.tlb);
    if CpuState::is_canonical(linear) {
        core.tlb.flush_page(linear);
    }
    Ok(Flow::Leave)
}

fn invalidate_context<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let kind = register_value(core.cpu, instr.op0_register());
    let at = address::linear(core, instr, 16, Access::Read)?;
    let mut descriptor = [0; 16];
    core.read_bytes(at, &mut descriptor, Privilege::of_data(core.cpu))?;
    let descriptor = u128::from_le_bytes(descriptor);
    let (context, linear) = (descriptor as u64, (descriptor >> 64) as u64);
    let tagged = core.cpu.cr4 & cr4::PCIDE != 0;
    let invalid = match kind {
        0 | 1 => {
            context & !cr3::PCID != 0
                || (!tagged && context != 0)
                || (kind == 0 && !CpuState::is_canonical(linear))
        }
        2 | 3 => context & !cr3::PCID != 0,
        _ => true,
    };
    if invalid {
        return general_protection();
    }
    core.env.before_flush(core.tlb);
    // Only the current context's translations are kept, so the context does not matter.
    match kind {
        0 => core.tlb.flush_page(linear),
        2 => core.tlb.flush_all(),
        _ => core.tlb.flush_non_global(),
    }
    Ok(Flow::Leave)
}
