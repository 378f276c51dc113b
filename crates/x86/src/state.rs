//! The architectural state of one virtual processor.

use crate::control::{cr0, cr4, dr6, dr7, efer, rflags};
use crate::segment::{Rights, Segment, SegmentRegister, TableRegister};
use crate::vector::VectorState;

/// General-purpose registers in the order of their encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Gpr {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

/// How the current code segment's instructions are decoded and addressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Mode {
    /// CR0.PE clear.
    Real,
    /// RFLAGS.VM set: 16-bit code at CPL 3 with real-mode addressing.
    Virtual8086,
    /// Protected or compatibility mode with a 16-bit code segment.
    Protected16,
    /// Protected or compatibility mode with a 32-bit code segment.
    Protected32,
    /// 64-bit mode.
    Long64,
}

impl Mode {
    /// The default operand and address size of code in this mode: 16, 32 or 64.
    pub const fn bits(self) -> u32 {
        match self {
            Mode::Real | Mode::Virtual8086 | Mode::Protected16 => 16,
            Mode::Protected32 => 32,
            Mode::Long64 => 64,
        }
    }
}

/// What the processor is doing between instructions (SDM vol. 3, 24.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Executes instructions.
    Active,
    /// HLT: waits for an interrupt.
    Halted,
    /// After INIT: waits for a start-up IPI.
    WaitForSipi,
    /// Triple fault.
    Shutdown,
}

/// What holds off interrupts for one instruction (SDM vol. 3, 24.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptShadow {
    None,
    /// STI made interrupts possible: maskable interrupts wait for the next instruction.
    Sti,
    /// SS was loaded by MOV or POP: interrupts and debug traps wait for the next instruction.
    MovSs,
}

/// MSRs that live with the processor; those of the local APIC live with it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    /// Base and mask of the variable ranges.
    pub mtrr_variable: [(u64, u64); 8],
    pub tsc_adjust: u64,
    /// What RDTSC adds to the host's counter.
    pub tsc_offset: u64,
    pub debug_ctl: u64,
    pub xss: u64,
    /// MCG_STATUS and the like: written and read back, no effect.
    pub mcg_status: u64,
}

/// The registers of one virtual processor. `repr(C)`: generated code uses the offsets of `gpr`,
/// `rip`, `rflags` and `vector`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct CpuState {
    /// Indexed by [`Gpr`].
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// Indexed by [`SegmentRegister`].
    pub seg: [Segment; 6],
    /// The current privilege level. Real mode: 0; virtual-8086 mode: 3. Whoever loads CS, changes
    /// RFLAGS.VM or CR0.PE keeps it.
    pub cpl: u8,
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub ldtr: Segment,
    pub tr: Segment,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    /// DR0 to DR3: breakpoint linear addresses.
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub msr: Msrs,
    pub activity: Activity,
    pub shadow: InterruptShadow,
    /// An NMI is being handled: further ones wait for IRET.
    pub nmi_blocked: bool,
    pub vector: VectorState,
}

impl CpuState {
    /// The state after power-up or RESET (SDM vol. 3, table 9-1), executing at the reset vector.
    pub fn reset() -> Self {
        let mut cs = Segment::real(0xf000);
        cs.base = 0xffff_0000;
        cs.rights = Rights(cs.rights.0 | Rights::CODE);
        let ldtr = Segment {
            base: 0,
            limit: 0xffff,
            rights: Rights(Rights::P | 2),
            selector: 0,
        };
        let tr = Segment {
            base: 0,
            limit: 0xffff,
            rights: Rights(Rights::P | 11),
            selector: 0,
        };
        let data = Segment::real(0);
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: rflags::ONE,
            seg: [data, cs, data, data, data, data],
            cpl: 0,
            gdtr: TableRegister {
                base: 0,
                limit: 0xffff,
            },
            idtr: TableRegister {
                base: 0,
                limit: 0xffff,
            },
            ldtr,
            tr,
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: dr6::RESET,
            dr7: dr7::RESET,
            msr: Msrs {
                pat: 0x0007_0406_0007_0406,
                misc_enable: 1,
                ..Msrs::default()
            },
            activity: Activity::Active,
            shadow: InterruptShadow::None,
            nmi_blocked: false,
            vector: VectorState::default(),
        }
    }

    /// INIT (SDM vol. 3, table 9-1): as reset, but vector state, MTRRs, TSC and most MSRs keep
    /// their values, CR0.CD and CR0.NW too. An application processor then waits for a start-up
    /// IPI; the bootstrap processor starts at the reset vector.
    pub fn init(&mut self, bootstrap: bool) {
        let keep = self.clone();
        *self = Self::reset();
        self.vector = keep.vector;
        self.msr = keep.msr;
        self.xcr0 = keep.xcr0;
        self.cr0 = (keep.cr0 & (cr0::CD | cr0::NW)) | cr0::ET;
        self.activity = if bootstrap {
            Activity::Active
        } else {
            Activity::WaitForSipi
        };
    }

    /// A start-up IPI with `vector`: execution begins in real mode at `vector` << 12.
    pub fn startup(&mut self, vector: u8) {
        let cs = &mut self.seg[SegmentRegister::Cs as usize];
        cs.selector = (vector as u16) << 8;
        cs.base = (vector as u64) << 12;
        self.rip = 0;
        self.activity = Activity::Active;
    }

    pub fn gpr(&self, r: Gpr) -> u64 {
        self.gpr[r as usize]
    }
    pub fn set_gpr(&mut self, r: Gpr, value: u64) {
        self.gpr[r as usize] = value;
    }
    pub fn segment(&self, s: SegmentRegister) -> &Segment {
        &self.seg[s as usize]
    }
    pub fn segment_mut(&mut self, s: SegmentRegister) -> &mut Segment {
        &mut self.seg[s as usize]
    }
    pub fn cs(&self) -> &Segment {
        &self.seg[SegmentRegister::Cs as usize]
    }
    pub fn ss(&self) -> &Segment {
        &self.seg[SegmentRegister::Ss as usize]
    }

    #[inline]
    pub fn cpl(&self) -> u8 {
        self.cpl
    }
    /// Long mode (64-bit or compatibility) is active: EFER.LMA.
    #[inline]
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }
    #[inline]
    pub fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }
    #[inline]
    pub fn interrupts_enabled(&self) -> bool {
        self.rflags & rflags::IF != 0
    }
    /// The privilege level at which I/O instructions, CLI and STI are permitted.
    pub fn iopl(&self) -> u8 {
        ((self.rflags & rflags::IOPL) >> rflags::IOPL_SHIFT) as u8
    }
    /// How the current code is decoded.
    #[inline]
    pub fn mode(&self) -> Mode {
        if self.cr0 & cr0::PE == 0 {
            return Mode::Real;
        }
        if self.rflags & rflags::VM != 0 {
            return Mode::Virtual8086;
        }
        let rights = self.cs().rights;
        if self.long_mode() && rights.has(Rights::L) {
            Mode::Long64
        } else if rights.has(Rights::DB) {
            Mode::Protected32
        } else {
            Mode::Protected16
        }
    }
    /// Whether the linear address is canonical for 4-level paging.
    #[inline]
    pub const fn is_canonical(linear: u64) -> bool {
        ((linear as i64) << 16 >> 16) as u64 == linear
    }
    /// Whether CR4 lets user code execute SGDT, SIDT, SLDT, SMSW and STR.
    pub fn umip(&self) -> bool {
        self.cr4 & cr4::UMIP != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_is_real_mode_at_the_reset_vector() {
        let cpu = CpuState::reset();
        assert_eq!(cpu.mode(), Mode::Real);
        assert_eq!(cpu.cs().base + cpu.rip, 0xffff_fff0);
        assert_eq!(cpu.cpl(), 0);
    }

    #[test]
    fn startup_ipi_starts_at_its_page() {
        let mut cpu = CpuState::reset();
        cpu.init(false);
        assert_eq!(cpu.activity, Activity::WaitForSipi);
        cpu.startup(0x9a);
        assert_eq!(
            (cpu.cs().base, cpu.rip, cpu.cs().selector),
            (0x9a000, 0, 0x9a00)
        );
        assert_eq!(cpu.activity, Activity::Active);
    }

    #[test]
    fn canonical_addresses() {
        assert!(CpuState::is_canonical(0x7fff_ffff_ffff));
        assert!(!CpuState::is_canonical(0x8000_0000_0000));
        assert!(CpuState::is_canonical(0xffff_8000_0000_0000));
    }
}
