//! Whether the register state that an instruction uses is available (SDM vol. 1, 13.5; vol. 3,
//! tables 2-2 and 13-1).

use trapline_x86::control::{cr0, cr4, xcr0};
use trapline_x86::{CpuState, Exception, Mode};

use crate::decode::op::StateCheck;

/// Whether an instruction that needs this state may run.
///
/// # Errors
/// #UD, #NM.
pub fn check(cpu: &CpuState, needed: StateCheck) -> Result<(), Exception> {
    match needed {
        StateCheck::None => Ok(()),
        StateCheck::X87 => check_x87(cpu),
        StateCheck::Wait if cpu.cr0 & cr0::MP != 0 => check_task_switched(cpu),
        StateCheck::Wait => Ok(()),
        StateCheck::Mmx if cpu.cr0 & cr0::EM != 0 => Err(Exception::invalid_opcode()),
        StateCheck::Mmx => check_task_switched(cpu),
        StateCheck::Sse => check_sse(cpu),
        StateCheck::Avx => check_avx(cpu),
        StateCheck::Avx512 => check_extended(cpu, xcr0::SSE | xcr0::AVX | xcr0::AVX512),
    }
}

/// For x87 instructions.
pub(super) fn check_x87(cpu: &CpuState) -> Result<(), Exception> {
    if cpu.cr0 & cr0::EM != 0 {
        return Err(Exception::device_not_available());
    }
    check_task_switched(cpu)
}

pub(super) fn check_task_switched(cpu: &CpuState) -> Result<(), Exception> {
    if cpu.cr0 & cr0::TS != 0 {
        Err(Exception::device_not_available())
    } else {
        Ok(())
    }
}

/// For SSE instructions.
pub(super) fn check_sse(cpu: &CpuState) -> Result<(), Exception> {
    if cpu.cr0 & cr0::EM != 0 || cpu.cr4 & cr4::OSFXSR == 0 {
        return Err(Exception::invalid_opcode());
    }
    check_task_switched(cpu)
}

/// For VEX-encoded instructions.
pub(super) fn check_avx(cpu: &CpuState) -> Result<(), Exception> {
    check_extended(cpu, xcr0::SSE | xcr0::AVX)
}

/// Real and virtual-8086 mode have neither VEX nor EVEX.
fn check_extended(cpu: &CpuState, components: u64) -> Result<(), Exception> {
    let protected = cpu.mode() >= Mode::Protected16;
    if !protected || cpu.cr4 & cr4::OSXSAVE == 0 || cpu.xcr0 & components != components {
        return Err(Exception::invalid_opcode());
    }
    check_task_switched(cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_mode_has_no_vex() {
        let mut cpu = CpuState::reset();
        cpu.cr4 |= cr4::OSXSAVE;
        cpu.xcr0 = 0xe7;
        for needed in [StateCheck::Avx, StateCheck::Avx512] {
            cpu.cr0 = 0;
            assert_eq!(check(&cpu, needed), Err(Exception::invalid_opcode()));
            cpu.cr0 = cr0::PE;
            assert_eq!(check(&cpu, needed), Ok(()));
            cpu.cr0 = cr0::PE | cr0::TS;
            assert_eq!(check(&cpu, needed), Err(Exception::device_not_available()));
        }
    }
}
