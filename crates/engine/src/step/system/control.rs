//! Control registers, and XCR0 (SDM vol. 3, 2.5, 2.6, 4.1, 9.8.5).

use iced_x86::{Code, Instruction, Mnemonic, Register};
use trapline_x86::control::{cr0, cr3, cr4, efer, xcr0};
use trapline_x86::segment::Rights;
use trapline_x86::{CpuState, Exception, Gpr, Mode};

use crate::access::Core;
use crate::env::Environment;
use crate::step::address::set_register;
use crate::step::segments::{self, require_kernel};
use crate::step::system::{self, edx_eax, general_protection, register_number, set_edx_eax};
use crate::step::{Executed, Flow};

/// The bits of CR0 that exist.
const CR0_DEFINED: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// The bits of CR0 whose change affects translations.
const CR0_TRANSLATION: u64 = cr0::PE | cr0::PG | cr0::WP | cr0::CD | cr0::NW;
/// The bits of CR4 that exist; setting any other is #GP. Virtual-8086 mode extensions do not.
const CR4_DEFINED: u64 = cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::FSGSBASE
    | cr4::PCIDE
    | cr4::OSXSAVE
    | cr4::SMEP
    | cr4::SMAP;
/// The bits of CR4 whose change affects translations.
const CR4_TRANSLATION: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;
/// The bits of CR3 above every physical address that 4-level paging can have.
const CR3_RESERVED: u64 = 0x7ff0_0000_0000_0000;

/// MOV to and from CRn, SMSW, LMSW, CLTS, XGETBV, XSETBV.
///
/// # Errors
/// #UD, #GP, #SS, page faults, restart.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    match instr.mnemonic() {
        Mnemonic::Smsw => return segments::store_machine_status(core, instr),
        Mnemonic::Lmsw => {
            let value = segments::machine_status(core, instr)?;
            return write_cr0(core, value);
        }
        Mnemonic::Clts => {
            require_kernel(core.cpu)?;
            core.cpu.cr0 &= !cr0::TS;
            return Ok(Flow::Leave);
        }
        Mnemonic::Xgetbv => return xgetbv(core),
        Mnemonic::Xsetbv => return xsetbv(core),
        _ => {}
    }
    let writes = matches!(instr.code(), Code::Mov_cr_r32 | Code::Mov_cr_r64);
    let control = if writes {
        instr.op0_register()
    } else {
        instr.op1_register()
    };
    if !matches!(
        control,
        Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8
    ) {
        return Err(Exception::invalid_opcode().into());
    }
    require_kernel(core.cpu)?;
    let number = register_number(control);
    if !writes {
        let value = match number {
            0 => core.cpu.cr0,
            2 => core.cpu.cr2,
            3 => core.cpu.cr3,
            4 => core.cpu.cr4,
            _ => core.env.cr8_read(),
        };
        set_register(core.cpu, instr.op0_register(), value);
        return Ok(Flow::Next);
    }
    let value = system::source(core, instr);
    match number {
        0 => write_cr0(core, value),
        2 => {
            core.cpu.cr2 = value;
            Ok(Flow::Next)
        }
        3 => write_cr3(core, value),
        4 => write_cr4(core, value),
        _ if value > 15 => general_protection(),
        _ => {
            core.env.cr8_write(value);
            Ok(Flow::Leave)
        }
    }
}

fn flush_all<E: Environment>(core: &mut Core<'_, E>) {
    core.env.before_flush(core.tlb);
    core.tlb.flush_all();
}

fn write_cr0<E: Environment>(core: &mut Core<'_, E>, value: u64) -> Executed {
    let old = core.cpu.cr0;
    let new = value & CR0_DEFINED | cr0::ET;
    let has = |bit: u64| new & bit != 0;
    if value >> 32 != 0 || (has(cr0::PG) && !has(cr0::PE)) || (has(cr0::NW) && !has(cr0::CD)) {
        return general_protection();
    }
    let cpu = &mut *core.cpu;
    let starts = has(cr0::PG) && old & cr0::PG == 0;
    let ends = !has(cr0::PG) && old & cr0::PG != 0;
    if starts && cpu.efer & efer::LME != 0 {
        // Into long mode, from a code segment that is not 64-bit already.
        if cpu.cr4 & cr4::PAE == 0 || cpu.cs().rights.has(Rights::L) {
            return general_protection();
        }
        cpu.efer |= efer::LMA;
    }
    if ends {
        if cpu.mode() == Mode::Long64 || cpu.cr4 & cr4::PCIDE != 0 {
            return general_protection();
        }
        cpu.efer &= !efer::LMA;
    }
    cpu.cr0 = new;
    if (old ^ new) & cr0::PE != 0 {
        cpu.cpl = 0;
    }
    if (old ^ new) & CR0_TRANSLATION != 0 {
        flush_all(core);
    }
    Ok(Flow::Leave)
}

fn write_cr3<E: Environment>(core: &mut Core<'_, E>, value: u64) -> Executed {
    let mut value = value;
    if core.cpu.long_mode() {
        // The translations of other process contexts are not kept, so there are none to spare.
        if core.cpu.cr4 & cr4::PCIDE != 0 {
            value &= !cr3::NO_FLUSH;
        }
        if value & (CR3_RESERVED | cr3::NO_FLUSH) != 0 {
            return general_protection();
        }
    }
    core.env.before_flush(core.tlb);
    core.cpu.cr3 = value;
    core.tlb.flush_non_global();
    Ok(Flow::Leave)
}

fn write_cr4<E: Environment>(core: &mut Core<'_, E>, value: u64) -> Executed {
    let cpu = &mut *core.cpu;
    let old = cpu.cr4;
    if value & !CR4_DEFINED != 0 {
        return general_protection();
    }
    if cpu.long_mode() && value & cr4::PAE == 0 {
        return general_protection();
    }
    let tags = value & !old & cr4::PCIDE != 0;
    if tags && (!cpu.long_mode() || cpu.cr3 & cr3::PCID != 0) {
        return general_protection();
    }
    cpu.cr4 = value;
    if (old ^ value) & CR4_TRANSLATION != 0 {
        flush_all(core);
    }
    Ok(Flow::Leave)
}

/// Which of the enabled state components are not in their initial configuration.
fn in_use(cpu: &CpuState) -> u64 {
    crate::step::xstate::image::in_use(&cpu.vector) & cpu.xcr0
}

fn xgetbv<E: Environment>(core: &mut Core<'_, E>) -> Executed {
    if core.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::invalid_opcode().into());
    }
    let value = match core.cpu.gpr(Gpr::Rcx) as u32 {
        0 => core.cpu.xcr0,
        1 => in_use(core.cpu),
        _ => return general_protection(),
    };
    set_edx_eax(core.cpu, value);
    Ok(Flow::Next)
}

fn xsetbv<E: Environment>(core: &mut Core<'_, E>) -> Executed {
    if core.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::invalid_opcode().into());
    }
    require_kernel(core.cpu)?;
    let value = edx_eax(core.cpu);
    let [low, _, _, high] = core.env.cpuid(core.cpu, 0xd, 0);
    let shown = u64::from(low) | u64::from(high) << 32;
    if core.cpu.gpr(Gpr::Rcx) as u32 != 0 || !xcr0::valid(value, shown) {
        return general_protection();
    }
    core.cpu.xcr0 = value;
    Ok(Flow::Leave)
}
