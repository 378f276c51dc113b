//! Saving and restoring extended state: FXSAVE, XSAVE and their kin, MXCSR, VZEROUPPER (SDM
//! vol. 1, chapter 13; vol. 2).

mod available;
pub mod image;
#[cfg(test)]
mod tests;

use iced_x86::{Instruction, Mnemonic};
use trapline_x86::control::{cr4, xcr0};
use trapline_x86::{CpuState, Exception, Mode};

pub use self::available::check;
use self::available::{check_avx, check_sse, check_task_switched, check_x87};
use crate::access::{Core, Fault};
use crate::env::Environment;
use crate::step::segments::require_kernel;
use crate::step::system::edx_eax;
use crate::step::{Executed, Flow, address};
use crate::tlb::{Access, Privilege};

/// XCOMP_BV: the area has the compacted form.
const COMPACTED: u64 = 1 << 63;
const HEADER_AT: usize = image::LEGACY;
/// What FXSAVE and FXRSTOR ask of their operand's address; the others ask for 64 bytes.
const FXSAVE_ALIGN: u64 = 16;

/// Executes one of these instructions.
///
/// # Errors
/// #UD, #NM, #GP, #SS, page faults, restart.
pub fn execute<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    use Mnemonic as M;
    match instr.mnemonic() {
        M::Fxsave | M::Fxsave64 => fxsave(core, instr),
        M::Fxrstor | M::Fxrstor64 => fxrstor(core, instr),
        M::Xrstor | M::Xrstor64 | M::Xrstors | M::Xrstors64 => xrstor(core, instr),
        M::Ldmxcsr | M::Vldmxcsr => load_mxcsr(core, instr),
        M::Stmxcsr | M::Vstmxcsr => store_mxcsr(core, instr),
        M::Vzeroupper | M::Vzeroall => zero(core, instr),
        _ => xsave(core, instr),
    }
}

/// Whether the instruction has REX.W: 64-bit pointers in the x87 image.
fn is_wide(instr: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instr.mnemonic(),
        M::Fxsave64
            | M::Fxrstor64
            | M::Xsave64
            | M::Xsaveopt64
            | M::Xsavec64
            | M::Xsaves64
            | M::Xrstor64
            | M::Xrstors64
    )
}

/// An area in guest memory and a copy of it that an instruction works on.
struct Area {
    linear: u64,
    bytes: Box<[u8; image::LARGEST]>,
}

impl Area {
    /// Of `len` bytes at the instruction's operand, aligned to `align`.
    fn new<E: Environment>(
        core: &Core<'_, E>,
        instr: &Instruction,
        len: usize,
        align: u64,
        access: Access,
    ) -> Result<Self, Fault> {
        let linear = address::linear(core, instr, len, access)?;
        if align == FXSAVE_ALIGN {
            // Of what FXSAVE and FXRSTOR ask, alignment checking takes the words (measured).
            core.check_alignment(linear, 4, Privilege::of_data(core.cpu))?;
        }
        if linear & (align - 1) != 0 {
            return Err(Exception::general_protection(0).into());
        }
        Ok(Self {
            linear,
            bytes: Box::new([0; image::LARGEST]),
        })
    }

    fn read<E: Environment>(
        &mut self,
        core: &mut Core<'_, E>,
        at: usize,
        len: usize,
    ) -> Result<(), Fault> {
        let privilege = Privilege::of_data(core.cpu);
        let linear = self.linear.wrapping_add(at as u64);
        core.read_bytes(linear, &mut self.bytes[at..at + len], privilege)
    }

    /// Writes the given ranges: all or, on a page fault, none.
    fn write<E: Environment>(
        &self,
        core: &mut Core<'_, E>,
        ranges: &[(usize, usize)],
    ) -> Result<(), Fault> {
        for &(at, len) in ranges {
            self.probe_write(core, at, len)?;
        }
        let privilege = Privilege::of_data(core.cpu);
        for &(at, len) in ranges {
            let linear = self.linear.wrapping_add(at as u64);
            core.write_bytes(linear, &self.bytes[at..at + len], privilege)?;
        }
        Ok(())
    }

    fn probe_write<E: Environment>(
        &self,
        core: &mut Core<'_, E>,
        at: usize,
        len: usize,
    ) -> Result<(), Fault> {
        let privilege = Privilege::of_data(core.cpu);
        core.probe_write(self.linear.wrapping_add(at as u64), len, privilege)
    }

    fn quadword(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.bytes[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    fn set_quadword(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
}

fn fxsave<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    check_x87(core.cpu)?;
    let mut area = Area::new(core, instr, image::LEGACY, FXSAVE_ALIGN, Access::Write)?;
    let long = core.cpu.mode() == Mode::Long64;
    let v = &core.cpu.vector;
    image::store_x87(v, &mut area.bytes[..], is_wide(instr));
    image::store_mxcsr(v, &mut area.bytes[..]);
    image::store_xmm(v, &mut area.bytes[..], long);
    let (at, len) = image::xmm_range(long);
    area.write(core, &[(0, at + len)])?;
    Ok(Flow::Next)
}

fn fxrstor<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    check_x87(core.cpu)?;
    let mut area = Area::new(core, instr, image::LEGACY, FXSAVE_ALIGN, Access::Read)?;
    area.read(core, 0, image::LEGACY_WRITTEN)?;
    let mxcsr = checked_mxcsr(&area)?;
    let long = core.cpu.mode() == Mode::Long64;
    let v = &mut core.cpu.vector;
    image::load_x87(v, &area.bytes[..], is_wide(instr));
    image::load_xmm(v, &area.bytes[..], long);
    v.mxcsr = mxcsr;
    Ok(Flow::Next)
}

fn checked_mxcsr(area: &Area) -> Result<u32, Exception> {
    let mxcsr = image::mxcsr_of(&area.bytes[..]);
    if mxcsr & !image::mxcsr_mask() != 0 {
        return Err(Exception::general_protection(0));
    }
    Ok(mxcsr)
}

/// What XSAVE and XRSTOR check first; gives the requested-feature bitmap.
fn requested<E: Environment>(core: &Core<'_, E>, supervisor: bool) -> Result<u64, Exception> {
    if core.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::invalid_opcode());
    }
    check_task_switched(core.cpu)?;
    if supervisor {
        require_kernel(core.cpu)?;
    }
    Ok(edx_eax(core.cpu) & core.cpu.xcr0)
}

/// XSAVE, XSAVEOPT, XSAVEC, XSAVES.
fn xsave<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    use Mnemonic as M;
    let mnemonic = instr.mnemonic();
    let supervisor = matches!(mnemonic, M::Xsaves | M::Xsaves64);
    let compact = supervisor || matches!(mnemonic, M::Xsavec | M::Xsavec64);
    let skips_initial = compact || matches!(mnemonic, M::Xsaveopt | M::Xsaveopt64);
    let wanted = requested(core, supervisor)?;
    let mut area = Area::new(core, instr, image::EXTENDED_AT, 64, Access::Write)?;
    let long = core.cpu.mode() == Mode::Long64;
    let mut used = image::in_use(&core.cpu.vector);
    let mxcsr_initial = core.cpu.vector.mxcsr == image::MXCSR_INITIAL;
    if compact && !mxcsr_initial {
        used |= xcr0::SSE;
    }
    if !compact {
        // It reads these eight bytes, but a processor (AMD Zen) reports a write that was refused.
        area.probe_write(core, HEADER_AT, 8)?;
        area.read(core, HEADER_AT, 8)?;
    }
    let v = &core.cpu.vector;
    let saved = if skips_initial { wanted & used } else { wanted };
    let mut ranges = [(0, 0); 16];
    let mut n = 0;
    let mut range = |at: usize, len: usize| {
        if len != 0 {
            ranges[n] = (at, len);
            n += 1;
        }
    };
    if saved & xcr0::X87 != 0 {
        image::store_x87(v, &mut area.bytes[..], is_wide(instr));
        image::X87_RANGES
            .into_iter()
            .for_each(|(at, len)| range(at, len));
    }
    let mxcsr = if compact {
        saved & xcr0::SSE
    } else {
        wanted & (xcr0::SSE | xcr0::AVX)
    };
    if mxcsr != 0 {
        image::store_mxcsr(v, &mut area.bytes[..]);
        range(image::MXCSR_AT, 8);
    }
    if saved & xcr0::SSE != 0 {
        image::store_xmm(v, &mut area.bytes[..], long);
        let (at, len) = image::xmm_range(long);
        range(at, len);
    }
    let mut component = |i: usize, at: usize, len: usize| {
        let len = image::visible_bytes(i, len, long);
        if saved >> i & 1 != 0 {
            image::store_component(v, i, &mut area.bytes[at..at + len]);
            range(at, len);
        }
    };
    if compact {
        image::compacted(wanted).for_each(|(i, at, len)| component(i, at, len));
        area.set_quadword(HEADER_AT, wanted & used);
        area.set_quadword(HEADER_AT + 8, wanted | COMPACTED);
        range(HEADER_AT, 16);
    } else {
        image::standard(wanted).for_each(|(i, at, len)| component(i, at, len));
        let old = area.quadword(HEADER_AT);
        area.set_quadword(HEADER_AT, old & !wanted | wanted & used);
        range(HEADER_AT, 8);
    }
    area.write(core, &ranges[..n])?;
    Ok(Flow::Next)
}

/// XRSTOR and XRSTORS.
fn xrstor<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    let supervisor = matches!(instr.mnemonic(), Mnemonic::Xrstors | Mnemonic::Xrstors64);
    let wanted = requested(core, supervisor)?;
    let mut area = Area::new(core, instr, image::EXTENDED_AT, 64, Access::Read)?;
    area.read(core, 0, image::LEGACY_WRITTEN)?;
    area.read(core, HEADER_AT, 64)?;
    let present = area.quadword(HEADER_AT);
    let layout = area.quadword(HEADER_AT + 8);
    let compact = layout & COMPACTED != 0;
    check_header(core.cpu.xcr0, &area, present, layout, supervisor)?;
    let long = core.cpu.mode() == Mode::Long64;
    let loaded = wanted & present;

    // All that can fault comes before all that changes registers.
    let mut places = [(0, 0, 0); 8];
    let mut n = 0;
    let mut place = |i: usize, at: usize, len: usize| {
        let len = image::visible_bytes(i, len, long);
        if loaded >> i & 1 != 0 && len != 0 {
            places[n] = (i, at, len);
            n += 1;
        }
    };
    if compact {
        image::compacted(layout).for_each(|(i, at, len)| place(i, at, len));
    } else {
        image::standard(loaded).for_each(|(i, at, len)| place(i, at, len));
    }
    for &(_, at, len) in &places[..n] {
        area.read(core, at, len)?;
    }
    let mxcsr = match (compact, wanted & (xcr0::SSE | xcr0::AVX)) {
        (_, 0) => None,
        (false, _) => Some(checked_mxcsr(&area)?),
        (true, _) if loaded & xcr0::SSE != 0 => Some(checked_mxcsr(&area)?),
        (true, parts) => (parts & xcr0::SSE != 0).then_some(image::MXCSR_INITIAL),
    };

    let v = &mut core.cpu.vector;
    image::initialize(v, wanted & !present, long);
    if loaded & xcr0::X87 != 0 {
        image::load_x87(v, &area.bytes[..], is_wide(instr));
    }
    if loaded & xcr0::SSE != 0 {
        image::load_xmm(v, &area.bytes[..], long);
    }
    for &(i, at, len) in &places[..n] {
        image::load_component(v, i, &area.bytes[at..at + len]);
    }
    if let Some(mxcsr) = mxcsr {
        v.mxcsr = mxcsr;
    }
    Ok(Flow::Next)
}

/// The header's rules (SDM vol. 1, 13.8.1, 13.8.2 and 13.12).
fn check_header(
    xcr0: u64,
    area: &Area,
    present: u64,
    layout: u64,
    supervisor: bool,
) -> Result<(), Exception> {
    let reserved = |from: usize| {
        area.bytes[HEADER_AT + from..HEADER_AT + 64]
            .iter()
            .any(|b| *b != 0)
    };
    let invalid = if layout & COMPACTED != 0 {
        let layout = layout & !COMPACTED;
        layout & !xcr0 != 0 || present & !layout != 0 || reserved(16)
    } else {
        supervisor || present & !xcr0 != 0 || layout != 0 || area.quadword(HEADER_AT + 16) != 0
    };
    if invalid {
        Err(Exception::general_protection(0))
    } else {
        Ok(())
    }
}

fn check_mxcsr_access(cpu: &CpuState, instr: &Instruction) -> Result<(), Exception> {
    match instr.mnemonic() {
        Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr => check_avx(cpu),
        _ => check_sse(cpu),
    }
}

fn load_mxcsr<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    check_mxcsr_access(core.cpu, instr)?;
    let linear = address::linear(core, instr, 4, Access::Read)?;
    let value = core.read::<4>(linear, Privilege::of_data(core.cpu))? as u32;
    if value & !image::mxcsr_mask() != 0 {
        return Err(Exception::general_protection(0).into());
    }
    core.cpu.vector.mxcsr = value;
    Ok(Flow::Next)
}

fn store_mxcsr<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    check_mxcsr_access(core.cpu, instr)?;
    let linear = address::linear(core, instr, 4, Access::Write)?;
    let value = u64::from(core.cpu.vector.mxcsr);
    core.write::<4>(linear, value, Privilege::of_data(core.cpu))?;
    Ok(Flow::Next)
}

/// VZEROUPPER and VZEROALL.
fn zero<E: Environment>(core: &mut Core<'_, E>, instr: &Instruction) -> Executed {
    check_avx(core.cpu)?;
    let registers = if core.cpu.mode() == Mode::Long64 {
        16
    } else {
        8
    };
    let from = if instr.mnemonic() == Mnemonic::Vzeroall {
        0
    } else {
        16
    };
    core.cpu.vector.zmm[..registers]
        .iter_mut()
        .for_each(|z| z.0[from..].fill(0));
    Ok(Flow::Next)
}
