//! A processor with a little identity-mapped RAM around it, for the tests of single instructions.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Decoder, DecoderOptions};
use trapline_x86::control::{cr0, cr4, efer};
use trapline_x86::exception::page_fault;
use trapline_x86::segment::{Rights, TableRegister};
use trapline_x86::{CpuState, Exception, Gpr, Segment, SegmentRegister};

use super::events::{self, Delivered, Event};
use super::{Executed, Flow};
use crate::access::{Core, Fault};
use crate::env::{Backing, Environment, MsrFault, Restart, Span, Translation};
use crate::tlb::{Access, Privilege, Tlb};

pub const RAM: usize = 0x10_0000;
pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x4000;
pub const LDT: u64 = 0x5000;
pub const CODE: u64 = 0x8000;
/// Top of the stack in use.
pub const STACK: u64 = 0x1_0000;
/// Top of the privilege-0 stack in the TSS.
pub const STACK0: u64 = 0x2_0008;
/// Top of IST1.
pub const STACK_IST: u64 = 0x3_0000;
pub const HANDLER: u64 = 0x9000;

/// Selectors of the test GDT.
pub const KERNEL_CS: u16 = 0x08;
pub const KERNEL_SS: u16 = 0x10;
pub const USER_CS: u16 = 0x1b;
pub const USER_SS: u16 = 0x23;
/// 32-bit user code, for compatibility mode.
pub const USER_CS32: u16 = 0x2b;
pub const NOT_PRESENT: u16 = 0x30;
pub const READ_ONLY: u16 = 0x38;
pub const TSS_SELECTOR: u16 = 0x40;
pub const CALL_GATE: u16 = 0x50;
pub const LDT_SELECTOR: u16 = 0x60;
pub const SECOND_TSS: u16 = 0x70;
const GDT_BYTES: u16 = 0x80;

pub struct Flat {
    pub ram: Vec<u8>,
    /// Pages that are not present.
    pub absent: BTreeSet<u64>,
    /// Accesses to these pages are sensed.
    pub sensed: BTreeSet<u64>,
    /// How many of the next sensed accesses have to restart.
    pub restarts: u32,
    pub ports: Vec<(u16, u8, Option<u32>)>,
    pub port_value: u32,
    pub msrs: BTreeMap<u32, u64>,
    pub vendor: &'static [u8; 12],
    pub flushes: u32,
    pub cr8: u64,
    pub pauses: u32,
    /// The privilege of each translation.
    pub privileges: Vec<(u64, Privilege)>,
}

impl Environment for Flat {
    fn translate(
        &mut self,
        _cpu: &CpuState,
        _tlb: &mut Tlb,
        linear: u64,
        privilege: Privilege,
        access: Access,
    ) -> Result<Translation, Fault> {
        self.privileges.push((linear, privilege));
        let page = linear & !0xfff;
        if self.absent.contains(&page) || linear >= RAM as u64 {
            let mut error = if access == Access::Write {
                page_fault::WRITE
            } else {
                0
            };
            if privilege.is_user() {
                error |= page_fault::USER;
            }
            return Err(Exception::page_fault(linear, error).into());
        }
        let host = self.ram.as_mut_ptr().wrapping_add(linear as usize);
        let backing = if self.sensed.contains(&page) {
            Backing::Sensed(host)
        } else {
            Backing::Ram(host)
        };
        Ok(Translation {
            gpa: linear,
            backing,
        })
    }
    fn sensed(
        &mut self,
        _tlb: &mut Tlb,
        _rip: u64,
        _spans: &[Span],
        _access: Access,
        perform: &mut dyn FnMut(),
    ) -> Result<(), Restart> {
        if self.restarts > 0 {
            self.restarts -= 1;
            return Err(Restart);
        }
        perform();
        Ok(())
    }
    fn exclusive(
        &mut self,
        _tlb: &mut Tlb,
        _rip: u64,
        _spans: &[Span],
        perform: &mut dyn FnMut(),
    ) -> Result<(), Restart> {
        perform();
        Ok(())
    }
    fn device_read(&mut self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn device_write(&mut self, _gpa: u64, _data: &[u8]) {}
    fn port_read(&mut self, port: u16, size: u8) -> u32 {
        self.ports.push((port, size, None));
        self.port_value
    }
    fn port_write(&mut self, port: u16, size: u8, value: u32) {
        self.ports.push((port, size, Some(value)));
    }
    fn tsc(&mut self, _cpu: &CpuState) -> u64 {
        0x1122_3344_5566_7788
    }
    fn cpuid(&mut self, _cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        let part = |n: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&self.vendor[n..n + 4]);
            u32::from_le_bytes(bytes)
        };
        match leaf {
            0 => [0xd, part(0), part(8), part(4)],
            0xd => [0xe7, 0, 0, 0],
            _ => [leaf, subleaf, 0, 0],
        }
    }
    fn msr_read(&mut self, _cpu: &CpuState, index: u32) -> Result<u64, MsrFault> {
        self.msrs.get(&index).copied().ok_or(MsrFault)
    }
    fn msr_write(
        &mut self,
        _cpu: &mut CpuState,
        _tlb: &mut Tlb,
        index: u32,
        value: u64,
    ) -> Result<(), MsrFault> {
        self.msrs
            .get_mut(&index)
            .map(|to| *to = value)
            .ok_or(MsrFault)
    }
    fn cr8_read(&mut self) -> u64 {
        self.cr8
    }
    fn cr8_write(&mut self, value: u64) {
        self.cr8 = value;
    }
    fn before_flush(&mut self, _tlb: &mut Tlb) {
        self.flushes += 1;
    }
    fn pause(&mut self) {
        self.pauses += 1;
    }
}

pub struct Rig {
    pub cpu: CpuState,
    pub tlb: Tlb,
    pub env: Flat,
}

/// A code or data descriptor with base 0 and the largest limit.
const fn flat(rights: u64) -> u64 {
    0x000f_0000_0000_ffff | (rights & 0xf0ff) << 40
}

/// A system descriptor.
pub const fn system(base: u64, limit: u64, rights: u64) -> u64 {
    limit & 0xffff | (base & 0xff_ffff) << 16 | (rights & 0xf0ff) << 40 | (base >> 24 & 0xff) << 56
}

impl Rig {
    fn bare() -> Self {
        let env = Flat {
            ram: vec![0; RAM],
            absent: BTreeSet::new(),
            sensed: BTreeSet::new(),
            restarts: 0,
            ports: Vec::new(),
            port_value: 0,
            msrs: BTreeMap::new(),
            vendor: b"AuthenticAMD",
            flushes: 0,
            cr8: 0,
            pauses: 0,
            privileges: Vec::new(),
        };
        let mut cpu = CpuState::reset();
        cpu.rip = CODE;
        cpu.set_gpr(Gpr::Rsp, STACK);
        Self {
            cpu,
            tlb: Tlb::default(),
            env,
        }
    }

    /// Real mode with all segments at 0.
    pub fn real() -> Self {
        let mut rig = Self::bare();
        for s in &mut rig.cpu.seg {
            s.base = 0;
            s.selector = 0;
        }
        rig.cpu.set_gpr(Gpr::Rsp, 0xf000);
        rig
    }

    /// Protected mode, or 64-bit mode, at privilege 0 with flat segments, a GDT, an IDT with
    /// present gates for all vectors, and a TSS.
    fn with_tables(long: bool) -> Self {
        let mut rig = Self::bare();
        let code = if long { 0xa09b } else { 0xc09b };
        let gdt = [
            0,
            flat(code),
            flat(0xc093),
            flat(code | 0x60),
            flat(0xc0f3),
            flat(0xc0fb),
            flat(0xc013),
            flat(0xc091),
            system(TSS, 0x67, 0x8b),
            0,
            0,
            0,
            system(LDT, 0x1f, 0x82),
            0,
            system(TSS + 0x100, 0x67, 0x89),
            0,
        ];
        for (n, raw) in gdt.into_iter().enumerate() {
            rig.write64(GDT + 8 * n as u64, raw);
        }
        let cpu = &mut rig.cpu;
        cpu.gdtr = TableRegister {
            base: GDT,
            limit: GDT_BYTES - 1,
        };
        cpu.idtr = TableRegister {
            base: IDT,
            limit: 0xfff,
        };
        cpu.cr0 = cr0::PE | cr0::ET | cr0::NE;
        cpu.cr4 = cr4::OSFXSR | cr4::OSXSAVE;
        cpu.xcr0 = 7;
        if long {
            cpu.cr0 |= cr0::PG;
            cpu.cr4 |= cr4::PAE;
            cpu.efer = efer::LME | efer::LMA | efer::SCE;
        }
        cpu.tr = Segment {
            base: TSS,
            limit: 0x67,
            rights: Rights(0x8b),
            selector: TSS_SELECTOR,
        };
        cpu.ldtr = Segment::null(0);
        rig.set_level(0);
        for vector in 0..=255 {
            rig.set_gate(vector, HANDLER + 16 * u64::from(vector), 0x8e, 0);
        }
        if long {
            rig.write64(TSS + 4, STACK0);
            rig.write64(TSS + 36, STACK_IST);
        } else {
            rig.write32(TSS + 4, STACK0 as u32);
            rig.write32(TSS + 8, u32::from(KERNEL_SS));
            rig.cpu.idtr.limit = 0x7ff;
        }
        rig
    }

    pub fn long() -> Self {
        Self::with_tables(true)
    }

    pub fn protected() -> Self {
        Self::with_tables(false)
    }

    pub fn is_long(&self) -> bool {
        self.cpu.efer & efer::LMA != 0
    }

    /// Puts a gate of the mode's width with type, DPL and P in `rights` into the IDT.
    pub fn set_gate(&mut self, vector: u8, offset: u64, rights: u64, ist: u64) {
        let raw = gate(KERNEL_CS, offset, rights) | ist << 32;
        if self.is_long() {
            let at = IDT + 16 * u64::from(vector);
            self.write64(at, raw);
            self.write64(at + 8, offset >> 32);
        } else {
            self.write64(IDT + 8 * u64::from(vector), raw);
        }
    }

    /// CS and SS of privilege `level`, 0 or 3.
    pub fn set_level(&mut self, level: u8) {
        let code = if self.is_long() { 0xa09b } else { 0xc09b };
        let (cs, ss) = if level == 0 {
            (KERNEL_CS, KERNEL_SS)
        } else {
            (USER_CS, USER_SS)
        };
        let segment = |selector, rights| Segment {
            base: 0,
            limit: 0xffff_ffff,
            rights: Rights(rights).with_dpl(level),
            selector,
        };
        for s in &mut self.cpu.seg {
            *s = segment(USER_SS, 0xc093);
            s.rights = s.rights.with_dpl(3);
        }
        self.cpu.seg[SegmentRegister::Cs as usize] = segment(cs, code);
        self.cpu.seg[SegmentRegister::Ss as usize] = segment(ss, 0xc093);
        self.cpu.cpl = level;
    }

    pub fn read64(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.env.ram[at as usize..][..8]);
        u64::from_le_bytes(bytes)
    }
    pub fn read32(&self, at: u64) -> u32 {
        self.read64(at) as u32
    }
    pub fn read16(&self, at: u64) -> u16 {
        self.read64(at) as u16
    }
    pub fn write64(&mut self, at: u64, value: u64) {
        self.env.ram[at as usize..][..8].copy_from_slice(&value.to_le_bytes());
    }
    pub fn write32(&mut self, at: u64, value: u32) {
        self.env.ram[at as usize..][..4].copy_from_slice(&value.to_le_bytes());
    }
    pub fn write16(&mut self, at: u64, value: u16) {
        self.env.ram[at as usize..][..2].copy_from_slice(&value.to_le_bytes());
    }

    /// Pushes `size`-byte values below the current stack pointer.
    pub fn frame(&mut self, size: u64, values: &[u64]) {
        for value in values {
            let rsp = self.cpu.gpr(Gpr::Rsp) - size;
            self.env.ram[rsp as usize..][..size as usize]
                .copy_from_slice(&value.to_le_bytes()[..size as usize]);
            self.cpu.set_gpr(Gpr::Rsp, rsp);
        }
    }

    pub fn core(&mut self) -> Core<'_, Flat> {
        Core::new(&mut self.cpu, &mut self.tlb, &mut self.env)
    }

    /// Executes one instruction at RIP as the run loop would.
    pub fn run(&mut self, bytes: &[u8]) -> Executed {
        let bits = self.cpu.mode().bits();
        let instr = Decoder::with_ip(bits, bytes, self.cpu.rip, DecoderOptions::NONE).decode();
        assert!(!instr.is_invalid(), "{bytes:02x?}");
        assert!(super::handles(&instr), "{instr:?}");
        let before = self.cpu.clone();
        let result = super::execute(&mut self.core(), &instr);
        match result {
            Ok(Flow::Jump | Flow::Again) => {}
            Ok(_) => self.cpu.rip = self.cpu.rip.wrapping_add(bytes.len() as u64),
            Err(_) => {
                let mut after = self.cpu.clone();
                after.cr2 = before.cr2;
                after.dr6 = before.dr6;
                // IRET unblocks NMIs even if it faults.
                after.nmi_blocked = before.nmi_blocked;
                assert_eq!(after, before, "a fault leaves the registers as they were");
            }
        }
        result
    }

    pub fn raise(&mut self, event: Event) -> Result<Delivered, Restart> {
        events::raise(&mut self.core(), event)
    }

    pub fn cs(&self) -> u16 {
        self.cpu.cs().selector
    }
    pub fn ss(&self) -> u16 {
        self.cpu.ss().selector
    }
    pub fn rsp(&self) -> u64 {
        self.cpu.gpr(Gpr::Rsp)
    }
}

/// A gate's low eight bytes.
pub const fn gate(selector: u16, offset: u64, rights: u64) -> u64 {
    offset & 0xffff | (selector as u64) << 16 | rights << 40 | (offset & 0xffff_0000) << 32
}

/// The result of an instruction that raises `e`.
pub const fn raises(e: Exception) -> Executed {
    Err(Fault::Exception(e))
}
