//! Everything that is privileged, sensitive or far: which module executes it, and the small ones.

mod control;
mod debug;
mod flags;
#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
mod translation;

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use trapline_x86::control::{cr4, rflags};
use trapline_x86::state::Activity;
use trapline_x86::{CpuState, Exception, Gpr, Mode};

use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::frame::field;
use crate::step::address::{self, register_value, set_register};
use crate::step::segments::{self, require_kernel};
use crate::step::{Executed, Flow, events, io, syscall, transfer, xstate};
use crate::tlb::{Access, Privilege};

/// Which module executes an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    Segments,
    FarTransfer,
    FarReturn,
    InterruptReturn,
    FastCall,
    Control,
    Debug,
    Translation,
    Flags,
    ExtendedState,
    Ports,
    Interrupt,
    Information,
    Cache,
    Processor,
    Undefined,
}

/// The group of an instruction, `None` if it is not one of these.
fn group(instr: &Instruction) -> Option<Group> {
    use Mnemonic as M;
    Some(match instr.mnemonic() {
        M::Mov => match instr.code() {
            Code::Mov_rm16_Sreg
            | Code::Mov_r32m16_Sreg
            | Code::Mov_r64m16_Sreg
            | Code::Mov_Sreg_rm16
            | Code::Mov_Sreg_r32m16
            | Code::Mov_Sreg_r64m16 => Group::Segments,
            Code::Mov_r32_cr | Code::Mov_r64_cr | Code::Mov_cr_r32 | Code::Mov_cr_r64 => {
                Group::Control
            }
            Code::Mov_r32_dr | Code::Mov_r64_dr | Code::Mov_dr_r32 | Code::Mov_dr_r64 => {
                Group::Debug
            }
            Code::Mov_r32_tr | Code::Mov_tr_r32 => Group::Undefined,
            _ => return None,
        },
        M::Push | M::Pop
            if instr.op0_kind() == OpKind::Register
                && instr.op0_register().is_segment_register() =>
        {
            Group::Segments
        }
        M::Lds
        | M::Les
        | M::Lfs
        | M::Lgs
        | M::Lss
        | M::Lldt
        | M::Ltr
        | M::Sldt
        | M::Str
        | M::Sgdt
        | M::Sidt
        | M::Lgdt
        | M::Lidt
        | M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Arpl
        | M::Rdfsbase
        | M::Rdgsbase
        | M::Wrfsbase
        | M::Wrgsbase
        | M::Swapgs => Group::Segments,
        M::Jmp | M::Call if is_far(instr.code()) => Group::FarTransfer,
        M::Retf => Group::FarReturn,
        M::Iret | M::Iretd | M::Iretq => Group::InterruptReturn,
        M::Syscall | M::Sysret | M::Sysretq | M::Sysenter | M::Sysexit | M::Sysexitq => {
            Group::FastCall
        }
        M::Smsw | M::Lmsw | M::Clts | M::Xgetbv | M::Xsetbv => Group::Control,
        M::Invlpg | M::Invpcid => Group::Translation,
        M::Cli
        | M::Sti
        | M::Clac
        | M::Stac
        | M::Pushf
        | M::Pushfd
        | M::Pushfq
        | M::Popf
        | M::Popfd
        | M::Popfq => Group::Flags,
        M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xsaves
        | M::Xsaves64
        | M::Xrstor
        | M::Xrstor64
        | M::Xrstors
        | M::Xrstors64
        | M::Ldmxcsr
        | M::Vldmxcsr
        | M::Stmxcsr
        | M::Vstmxcsr
        | M::Vzeroupper
        | M::Vzeroall => Group::ExtendedState,
        M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => {
            Group::Ports
        }
        M::Int | M::Int1 | M::Int3 | M::Into | M::Bound => Group::Interrupt,
        M::Rdmsr | M::Wrmsr | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdpmc | M::Cpuid => {
            Group::Information
        }
        M::Wbinvd
        | M::Invd
        | M::Wbnoinvd
        | M::Clflush
        | M::Clflushopt
        | M::Clwb
        | M::Cldemote
        | M::Prefetch
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchit0
        | M::Prefetchit1 => Group::Cache,
        M::Hlt | M::Pause | M::Serialize => Group::Processor,
        M::Monitor
        | M::Mwait
        | M::Monitorx
        | M::Mwaitx
        | M::Umonitor
        | M::Umwait
        | M::Tpause
        | M::Ud0
        | M::Ud1
        | M::Ud2
        | M::Vmcall
        | M::Vmmcall
        | M::Vmlaunch
        | M::Vmresume
        | M::Vmxoff
        | M::Vmxon
        | M::Vmclear
        | M::Vmptrld
        | M::Vmptrst
        | M::Vmread
        | M::Vmwrite
        | M::Vmfunc
        | M::Vmrun
        | M::Vmload
        | M::Vmsave
        | M::Vmgexit
        | M::Stgi
        | M::Clgi
        | M::Skinit
        | M::Invlpga
        | M::Invlpgb
        | M::Tlbsync
        | M::Invept
        | M::Invvpid
        | M::Rsm
        | M::Getsec
        | M::Encls
        | M::Enclu
        | M::Enclv
        | M::Rdpru
        | M::Rdpkru
        | M::Wrpkru
        | M::Pconfig
        | M::Psmash
        | M::Pvalidate
        | M::Rmpadjust
        | M::Rmpupdate
        | M::Xbegin
        | M::Xend
        | M::Xtest
        | M::Senduipi
        | M::Stui
        | M::Clui
        | M::Testui
        | M::Uiret => Group::Undefined,
        _ => return None,
    })
}

fn is_far(code: Code) -> bool {
    matches!(
        code,
        Code::Jmp_ptr1616
            | Code::Jmp_ptr1632
            | Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_ptr1616
            | Code::Call_ptr1632
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
    )
}

/// Whether [`execute`] executes this instruction.
pub fn handles(instr: &Instruction) -> bool {
    group(instr).is_some()
}

/// Executes an instruction that [`handles`] accepts; #UD for any other.
///
/// # Errors
/// What the instruction raises: registers are as before it, except where a repeated string
/// instruction has completed iterations and where a task switch has begun the new task.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    if instr.has_lock_prefix() && !matches!(group(instr), Some(Group::Control)) {
        return Err(Exception::invalid_opcode().into());
    }
    match group(instr) {
        Some(Group::Segments) => segments::execute(core, instr),
        Some(Group::FarTransfer) => transfer::execute(core, instr),
        Some(Group::FarReturn) => transfer::far_return::far_return(core, instr),
        Some(Group::InterruptReturn) => events::interrupt_return::execute(core, instr),
        Some(Group::FastCall) => syscall::execute(core, instr),
        Some(Group::Control) => control::execute(core, instr),
        Some(Group::Debug) => debug::execute(core, instr),
        Some(Group::Translation) => translation::execute(core, instr),
        Some(Group::Flags) => flags::execute(core, instr),
        Some(Group::ExtendedState) => xstate::execute(core, instr),
        Some(Group::Ports) => io::execute(core, instr),
        Some(Group::Interrupt) => interrupt(core, instr),
        Some(Group::Information) => information(core, instr),
        Some(Group::Cache) => cache(core, instr),
        Some(Group::Processor) => processor(core, instr),
        Some(Group::Undefined) | None => Err(Exception::invalid_opcode().into()),
    }
}

/// INT n, INT1, INT3, INTO, BOUND.
fn interrupt<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let len = instr.len();
    let vector = match instr.mnemonic() {
        Mnemonic::Int => {
            // INT3 and INTO are not sensitive to IOPL.
            if core.cpu.mode() == Mode::Virtual8086 && core.cpu.iopl() < 3 {
                return Err(Exception::general_protection(0).into());
            }
            instr.immediate8()
        }
        Mnemonic::Int3 => 3,
        Mnemonic::Into => {
            if core.cpu.rflags & rflags::OF == 0 {
                return Ok(Flow::Next);
            }
            4
        }
        Mnemonic::Int1 => {
            // A trap like a debug exception: no privilege check, no bit of DR6.
            let rip = core.cpu.rip;
            core.cpu.rip = events::next_rip(core.cpu, len);
            return events::deliver(core, events::Event::Exception(Exception::debug(0)))
                .map(|()| Flow::Jump)
                .inspect_err(|_| core.cpu.rip = rip);
        }
        _ => return bound(core, instr),
    };
    events::software_interrupt(core, vector, len)?;
    Ok(Flow::Jump)
}

/// BOUND: #BR where a signed index lies outside two bounds in memory.
fn bound<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let register = instr.op0_register();
    let size = register.size().clamp(2, 4);
    let privilege = Privilege::of_data(core.cpu);
    let signed = |value: u64| match size {
        2 => i64::from(value as i16),
        _ => i64::from(value as i32),
    };
    // One after the other: a fault of the first comes before anything of the second.
    let low = address::linear(core, instr, size, Access::Read)?;
    let low = signed(core.read_sized(low, size, privilege)?);
    let high = address::linear_at(core, instr, size as u64, size, Access::Read)?;
    let high = signed(core.read_sized(high, size, privilege)?);
    let index = signed(register_value(core.cpu, register));
    if index < low || index > high {
        let exception = Exception {
            vector: trapline_x86::Vector::BoundRange,
            error: None,
            cr2: None,
            dr6: 0,
        };
        return Err(exception.into());
    }
    Ok(Flow::Next)
}

/// Writes a pair of 32-bit halves to EDX:EAX.
pub(super) fn set_edx_eax(cpu: &mut CpuState, value: u64) {
    cpu.set_gpr(Gpr::Rax, value & 0xffff_ffff);
    cpu.set_gpr(Gpr::Rdx, value >> 32);
}

/// EDX:EAX.
pub(super) fn edx_eax(cpu: &CpuState) -> u64 {
    cpu.gpr(Gpr::Rax) & 0xffff_ffff | cpu.gpr(Gpr::Rdx) << 32
}

/// RDMSR, WRMSR, RDTSC, RDTSCP, RDPID, RDPMC, CPUID.
fn information<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let ecx = core.cpu.gpr(Gpr::Rcx) as u32;
    match instr.mnemonic() {
        Mnemonic::Rdmsr => {
            require_kernel(core.cpu)?;
            let value = core
                .env
                .msr_read(core.cpu, ecx)
                .map_err(|_| Exception::general_protection(0))?;
            set_edx_eax(core.cpu, value);
        }
        Mnemonic::Wrmsr => {
            require_kernel(core.cpu)?;
            let value = edx_eax(core.cpu);
            core.env
                .msr_write(core.cpu, core.tlb, ecx, value)
                .map_err(|_| Exception::general_protection(0))?;
            return Ok(Flow::Leave);
        }
        Mnemonic::Rdtsc | Mnemonic::Rdtscp => {
            if core.cpu.cr4 & cr4::TSD != 0 {
                require_kernel(core.cpu)?;
            }
            let tsc = core.env.tsc(core.cpu);
            set_edx_eax(core.cpu, tsc);
            if instr.mnemonic() == Mnemonic::Rdtscp {
                core.cpu
                    .set_gpr(Gpr::Rcx, core.cpu.msr.tsc_aux & 0xffff_ffff);
            }
        }
        Mnemonic::Rdpid => {
            let aux = core.cpu.msr.tsc_aux & 0xffff_ffff;
            set_register(core.cpu, instr.op0_register(), aux);
        }
        // No counter is shown by CPUID, so every index is invalid.
        Mnemonic::Rdpmc => return Err(Exception::general_protection(0).into()),
        _ => {
            let leaf = core.cpu.gpr(Gpr::Rax) as u32;
            let values = core.env.cpuid(core.cpu, leaf, ecx);
            for (r, value) in [Gpr::Rax, Gpr::Rbx, Gpr::Rcx, Gpr::Rdx]
                .into_iter()
                .zip(values)
            {
                core.cpu.set_gpr(r, u64::from(value));
            }
        }
    }
    Ok(Flow::Next)
}

/// Caches are the host's: write-backs and prefetches have no effect that the guest could see.
fn cache<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    match instr.mnemonic() {
        Mnemonic::Wbinvd | Mnemonic::Invd | Mnemonic::Wbnoinvd => require_kernel(core.cpu)?,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => {
            let linear = address::linear(core, instr, 1, Access::Read)?;
            core.translate(
                core.wrap(linear),
                Privilege::of_data(core.cpu),
                Access::Read,
            )?;
        }
        _ => {}
    }
    Ok(Flow::Next)
}

/// PAUSE instructions after which the environment hears of it: some microseconds of spinning.
const PAUSES_PER_TURN: u64 = 64;

/// HLT, PAUSE, SERIALIZE.
fn processor<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    match instr.mnemonic() {
        Mnemonic::Hlt => {
            require_kernel(core.cpu)?;
            core.cpu.activity = Activity::Halted;
            Ok(Flow::Stop)
        }
        Mnemonic::Pause => {
            let frame = core.tlb.frame_mut();
            let left = frame.get(field::PAUSES);
            if left == 0 {
                frame.set(field::PAUSES, PAUSES_PER_TURN);
                core.env.pause();
            } else {
                frame.set(field::PAUSES, left - 1);
            }
            Ok(Flow::Next)
        }
        _ => Ok(Flow::Leave),
    }
}

/// The number of a control or debug register.
pub(super) fn register_number(register: Register) -> usize {
    register.number()
}

/// The value that a MOV to a control or debug register reads: 64 bits in 64-bit mode, else 32.
pub(super) fn source<E: Environment>(core: &Core<'_, E>, instr: &Instruction) -> u64 {
    register_value(core.cpu, instr.op1_register())
}

/// #GP(0) as a fault.
pub(super) fn general_protection<T>() -> Result<T, Fault> {
    Err(Exception::general_protection(0).into())
}
