//! Control and debug registers, flags, translations, fast calls and the rest of the system
//! instructions.

use trapline_x86::control::{cr0, cr3, cr4, dr6, efer, rflags};
use trapline_x86::state::{Activity, InterruptShadow};
use trapline_x86::{Exception, Gpr, Mode, SegmentRegister, Vector};

use crate::step::Flow;
use crate::step::tests_support::*;

const SYSCALL: &[u8] = &[0x0f, 0x05];
const SYSRETQ: &[u8] = &[0x48, 0x0f, 0x07];
const SYSRET: &[u8] = &[0x0f, 0x07];
const SYSENTER: &[u8] = &[0x0f, 0x34];
const SYSEXITQ: &[u8] = &[0x48, 0x0f, 0x35];
/// mov crN, rax
const fn to_cr(n: u8) -> [u8; 3] {
    [0x0f, 0x22, 0xc0 | n << 3]
}
/// mov rax, crN
const fn from_cr(n: u8) -> [u8; 3] {
    [0x0f, 0x20, 0xc0 | n << 3]
}
const GP: crate::step::Executed = raises(Exception::general_protection(0));
const UD: crate::step::Executed = raises(Exception::invalid_opcode());

fn with_syscall(level: u8) -> Rig {
    let mut rig = Rig::long();
    rig.set_level(level);
    // SYSRET's base: CS32 is base, SS base + 8, CS64 base + 16.
    rig.cpu.msr.star = u64::from(KERNEL_CS) << 32 | 0x1b << 48;
    rig.cpu.msr.lstar = 0xffff_8000_0000_5000;
    rig.cpu.msr.sfmask = rflags::IF | rflags::DF;
    rig
}

#[test]
fn syscall_and_back() {
    let mut rig = with_syscall(3);
    rig.cpu.rflags |= rflags::IF | rflags::DF | rflags::CF;
    let flags = rig.cpu.rflags;
    assert_eq!(rig.run(SYSCALL), Ok(Flow::Jump));
    assert_eq!((rig.cpu.rip, rig.cpu.cpl), (0xffff_8000_0000_5000, 0));
    assert_eq!(
        (rig.cs(), rig.ss(), rig.cpu.mode()),
        (KERNEL_CS, KERNEL_SS, Mode::Long64)
    );
    assert_eq!(
        (rig.cpu.gpr(Gpr::Rcx), rig.cpu.gpr(Gpr::R11)),
        (CODE + 2, flags)
    );
    assert_eq!(rig.cpu.rflags, rflags::ONE | rflags::CF);
    assert_eq!(rig.run(SYSRETQ), Ok(Flow::Jump));
    assert_eq!(
        (rig.cpu.rip, rig.cpu.cpl, rig.cpu.rflags),
        (CODE + 2, 3, flags)
    );
    assert_eq!(
        (rig.cs(), rig.ss(), rig.cpu.mode()),
        (0x2b, 0x23, Mode::Long64)
    );
}

#[test]
fn sysret_to_compatibility_mode() {
    let mut rig = with_syscall(0);
    rig.cpu.set_gpr(Gpr::Rcx, 0x1_0000_1234);
    rig.cpu.set_gpr(Gpr::R11, u64::MAX);
    assert_eq!(rig.run(SYSRET), Ok(Flow::Jump));
    assert_eq!((rig.cpu.rip, rig.cpu.mode()), (0x1234, Mode::Protected32));
    assert_eq!(rig.cpu.rflags & (rflags::RF | rflags::VM), 0);
}

#[test]
fn syscall_and_sysret_are_refused() {
    let mut rig = with_syscall(3);
    assert_eq!(rig.run(SYSRETQ), GP);
    rig.cpu.efer &= !efer::SCE;
    assert_eq!(rig.run(SYSCALL), UD);
}

#[test]
fn vendors_differ_in_a_return_to_nowhere() {
    let mut rig = with_syscall(0);
    rig.cpu.set_gpr(Gpr::Rcx, 0x8000_0000_0000);
    rig.env.vendor = b"GenuineIntel";
    assert_eq!(rig.run(SYSRETQ), GP);
    rig.env.vendor = b"AuthenticAMD";
    assert_eq!(rig.run(SYSRETQ), Ok(Flow::Jump));
    assert_eq!((rig.cpu.rip, rig.cpu.cpl), (0x8000_0000_0000, 3));
}

#[test]
fn sysenter_is_intels_in_long_mode() {
    let mut rig = with_syscall(3);
    rig.cpu.msr.sysenter_cs = u64::from(KERNEL_CS);
    rig.cpu.msr.sysenter_eip = 0x5000;
    rig.cpu.msr.sysenter_esp = 0x6000;
    assert_eq!(rig.run(SYSENTER), UD);
    rig.env.vendor = b"GenuineIntel";
    assert_eq!(rig.run(SYSENTER), Ok(Flow::Jump));
    assert_eq!((rig.cpu.rip, rig.rsp(), rig.cpu.cpl), (0x5000, 0x6000, 0));
    rig.cpu.set_gpr(Gpr::Rdx, 0x7000);
    rig.cpu.set_gpr(Gpr::Rcx, 0x7100);
    assert_eq!(rig.run(SYSEXITQ), Ok(Flow::Jump));
    assert_eq!(
        (rig.cpu.rip, rig.rsp(), rig.cs()),
        (0x7000, 0x7100, KERNEL_CS + 35)
    );
    rig.cpu.msr.sysenter_cs = 0;
    assert_eq!(rig.run(SYSENTER), GP);
}

#[test]
fn into_long_mode_and_out() {
    let mut rig = Rig::protected();
    rig.cpu.efer = efer::LME;
    let enable = rig.cpu.cr0 | cr0::PG;
    rig.cpu.set_gpr(Gpr::Rax, enable);
    assert_eq!(rig.run(&to_cr(0)), GP, "paging of long mode needs PAE");
    rig.cpu.cr4 |= cr4::PAE;
    assert_eq!(rig.run(&to_cr(0)), Ok(Flow::Leave));
    assert!(rig.cpu.long_mode());
    assert_eq!((rig.cpu.mode(), rig.env.flushes), (Mode::Protected32, 1));
    rig.cpu.set_gpr(Gpr::Rax, enable & !cr0::PG);
    assert_eq!(rig.run(&to_cr(0)), Ok(Flow::Leave));
    assert!(!rig.cpu.long_mode());

    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rax, rig.cpu.cr0 & !cr0::PG);
    assert_eq!(rig.run(&to_cr(0)), GP, "64-bit code cannot leave paging");
}

#[test]
fn cr0_combinations() {
    let mut rig = Rig::long();
    let cr0 = rig.cpu.cr0;
    for bad in [cr0 | 1 << 32, cr0 & !cr0::PE, cr0 | cr0::NW] {
        rig.cpu.set_gpr(Gpr::Rax, bad);
        assert_eq!(rig.run(&to_cr(0)), GP, "{bad:#x}");
    }
    let flushes = rig.env.flushes;
    rig.cpu.set_gpr(Gpr::Rax, cr0 & !cr0::ET | cr0::TS);
    assert_eq!(rig.run(&to_cr(0)), Ok(Flow::Leave));
    assert_eq!((rig.cpu.cr0, rig.env.flushes), (cr0 | cr0::TS, flushes));
    assert_eq!(rig.run(&[0x0f, 0x06]), Ok(Flow::Leave));
    assert_eq!(rig.cpu.cr0, cr0);
    rig.set_level(3);
    assert_eq!(rig.run(&to_cr(0)), GP);
    assert_eq!(rig.run(&[0x0f, 0x06]), GP);
}

#[test]
fn lmsw_sets_but_does_not_clear_protection() {
    let mut rig = Rig::protected();
    rig.cpu.set_gpr(Gpr::Rax, 0xffff_0008);
    assert_eq!(rig.run(&[0x0f, 0x01, 0xf0]), Ok(Flow::Leave));
    assert_eq!(rig.cpu.cr0, cr0::PE | cr0::ET | cr0::NE | cr0::TS);
}

#[test]
fn cr3_flushes_and_hides_its_hint() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rax, 0x7000 | cr3::NO_FLUSH);
    assert_eq!(rig.run(&to_cr(3)), GP);
    rig.cpu.cr4 |= cr4::PCIDE;
    assert_eq!(rig.run(&to_cr(3)), Ok(Flow::Leave));
    assert_eq!((rig.cpu.cr3, rig.env.flushes), (0x7000, 1));
    assert_eq!(rig.run(&from_cr(3)), Ok(Flow::Next));
    assert_eq!(rig.cpu.gpr(Gpr::Rax), 0x7000);
}

#[test]
fn cr4_and_process_contexts() {
    let mut rig = Rig::long();
    let cr4 = rig.cpu.cr4;
    for bad in [cr4 & !cr4::PAE, cr4 | 1 << 13, cr4 | 1 << 40] {
        rig.cpu.set_gpr(Gpr::Rax, bad);
        assert_eq!(rig.run(&to_cr(4)), GP, "{bad:#x}");
    }
    rig.cpu.set_gpr(Gpr::Rax, cr4 | cr4::PCIDE);
    rig.cpu.cr3 = 1;
    assert_eq!(rig.run(&to_cr(4)), GP);
    rig.cpu.cr3 = 0x1000;
    assert_eq!(rig.run(&to_cr(4)), Ok(Flow::Leave));
    rig.cpu.set_gpr(Gpr::Rax, rig.cpu.cr0 & !cr0::PG);
    assert_eq!(rig.run(&to_cr(0)), GP);
}

#[test]
fn cr8_is_the_task_priority() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rax, 9);
    assert_eq!(rig.run(&[0x44, 0x0f, 0x22, 0xc0]), Ok(Flow::Leave));
    assert_eq!(rig.env.cr8, 9);
    rig.cpu.set_gpr(Gpr::Rax, 16);
    assert_eq!(rig.run(&[0x44, 0x0f, 0x22, 0xc0]), GP);
    assert_eq!(rig.run(&[0x44, 0x0f, 0x20, 0xc0]), Ok(Flow::Next));
    assert_eq!(rig.cpu.gpr(Gpr::Rax), 9);
}

#[test]
fn debug_registers() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rax, 0xffff_ffff);
    assert_eq!(rig.run(&[0x0f, 0x23, 0xf0]), Ok(Flow::Leave));
    assert_eq!(rig.cpu.dr6, 0xffff_efff);
    assert_eq!(rig.cpu.dr6 & 1 << 12, 0);
    assert_eq!(
        rig.run(&[0x0f, 0x23, 0xe8]),
        Ok(Flow::Leave),
        "DR5 is DR7 without CR4.DE"
    );
    assert_eq!(rig.cpu.dr7, 0xffff_27ff);
    rig.cpu.dr7 = 0x400;
    rig.cpu.cr4 |= cr4::DE;
    assert_eq!(rig.run(&[0x0f, 0x23, 0xe8]), UD);
    rig.cpu.set_gpr(Gpr::Rax, 1 << 32);
    assert_eq!(rig.run(&[0x0f, 0x23, 0xf8]), GP);
    assert_eq!(rig.run(&[0x0f, 0x23, 0xd8]), Ok(Flow::Leave));
    assert_eq!(rig.cpu.dr[3], 1 << 32);
    rig.set_level(3);
    assert_eq!(rig.run(&[0x0f, 0x23, 0xd8]), GP);
    assert_eq!(dr6::RESET & 1 << 12, 0);
}

#[test]
fn interrupts_wait_behind_sti_only_if_they_were_off() {
    let mut rig = Rig::long();
    assert_eq!(rig.run(&[0xfb]), Ok(Flow::Leave));
    assert_eq!(
        (rig.cpu.shadow, rig.cpu.interrupts_enabled()),
        (InterruptShadow::Sti, true)
    );
    rig.cpu.shadow = InterruptShadow::None;
    assert_eq!(rig.run(&[0xfb]), Ok(Flow::Leave));
    assert_eq!(rig.cpu.shadow, InterruptShadow::None);
    assert_eq!(rig.run(&[0xfa]), Ok(Flow::Next));
    assert!(!rig.cpu.interrupts_enabled());
    rig.set_level(3);
    assert_eq!(rig.run(&[0xfa]), GP);
    rig.cpu.rflags |= rflags::IOPL;
    assert_eq!(rig.run(&[0xfb]), Ok(Flow::Leave));
}

#[test]
fn popf_changes_what_the_level_permits() {
    let mut rig = Rig::long();
    rig.frame(8, &[u64::MAX]);
    assert_eq!(rig.run(&[0x9d]), Ok(Flow::Leave));
    assert_eq!(rig.cpu.rflags, 0x24_7fd7);
    rig.cpu.rflags |= rflags::RF;
    assert_eq!(rig.run(&[0x9c]), Ok(Flow::Next));
    assert_eq!((rig.read64(rig.rsp()), rig.rsp()), (0x24_7fd7, STACK - 8));
    rig.set_level(3);
    rig.cpu.rflags = rflags::ONE;
    rig.frame(8, &[u64::MAX]);
    assert_eq!(rig.run(&[0x9d]), Ok(Flow::Leave));
    assert_eq!(rig.cpu.rflags, 0x24_4dd7);
    // popf with an operand-size prefix leaves the upper flags.
    rig.frame(2, &[0]);
    assert_eq!(rig.run(&[0x66, 0x9d]), Ok(Flow::Leave));
    assert_eq!(rig.cpu.rflags, 0x24_0002);
}

#[test]
fn access_control_flag() {
    let mut rig = Rig::long();
    assert_eq!(rig.run(&[0x0f, 0x01, 0xcb]), Ok(Flow::Leave));
    assert_ne!(rig.cpu.rflags & rflags::AC, 0);
    assert_eq!(rig.run(&[0x0f, 0x01, 0xca]), Ok(Flow::Leave));
    assert_eq!(rig.cpu.rflags & rflags::AC, 0);
    rig.set_level(3);
    assert_eq!(rig.run(&[0x0f, 0x01, 0xcb]), UD);
}

#[test]
fn invalidations_apply_what_is_queued_first() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rax, 0x8000_0000_0000);
    assert_eq!(
        rig.run(&[0x0f, 0x01, 0x38]),
        Ok(Flow::Leave),
        "not canonical: no effect"
    );
    rig.cpu.set_gpr(Gpr::Rax, 0x7000);
    assert_eq!(rig.run(&[0x0f, 0x01, 0x38]), Ok(Flow::Leave));
    assert_eq!(rig.env.flushes, 2);
    // invpcid rcx, [rax]
    let invpcid = [0x66, 0x0f, 0x38, 0x82, 0x08];
    for (kind, context, linear, valid) in [
        (0, 0, 0x1000, true),
        (0, 0, 0x8000_0000_0000, false),
        (1, 1, 0, false),
        (2, 0, 0, true),
        (3, 0, 0, true),
        (3, 0x1000, 0, false),
        (4, 0, 0, false),
    ] {
        rig.cpu.set_gpr(Gpr::Rcx, kind);
        rig.write64(0x7000, context);
        rig.write64(0x7008, linear);
        assert_eq!(
            rig.run(&invpcid),
            if valid { Ok(Flow::Leave) } else { GP },
            "{kind}"
        );
    }
    rig.cpu.cr4 |= cr4::PCIDE;
    rig.cpu.set_gpr(Gpr::Rcx, 1);
    rig.write64(0x7000, 0xfff);
    assert_eq!(rig.run(&invpcid), Ok(Flow::Leave));
}

#[test]
fn model_specific_registers() {
    let mut rig = Rig::long();
    rig.env.msrs.insert(0x10a, 0x1_2345_6789);
    rig.cpu.set_gpr(Gpr::Rcx, 0xffff_0000_0000_010a);
    assert_eq!(rig.run(&[0x0f, 0x32]), Ok(Flow::Next));
    assert_eq!(
        (rig.cpu.gpr(Gpr::Rax), rig.cpu.gpr(Gpr::Rdx)),
        (0x2345_6789, 1)
    );
    rig.cpu.set_gpr(Gpr::Rax, !0);
    assert_eq!(rig.run(&[0x0f, 0x30]), Ok(Flow::Leave));
    assert_eq!(rig.env.msrs[&0x10a], 0x1_ffff_ffff);
    rig.cpu.set_gpr(Gpr::Rcx, 7);
    assert_eq!(rig.run(&[0x0f, 0x32]), GP);
    assert_eq!(rig.run(&[0x0f, 0x30]), GP);
    rig.cpu.set_gpr(Gpr::Rcx, 0x10a);
    rig.set_level(3);
    assert_eq!(rig.run(&[0x0f, 0x32]), GP);
}

#[test]
fn time_and_identification() {
    let mut rig = Rig::long();
    rig.set_level(3);
    rig.cpu.msr.tsc_aux = 5;
    assert_eq!(rig.run(&[0x0f, 0x01, 0xf9]), Ok(Flow::Next));
    let r = |rig: &Rig| [Gpr::Rax, Gpr::Rdx, Gpr::Rcx].map(|r| rig.cpu.gpr(r));
    assert_eq!(r(&rig), [0x5566_7788, 0x1122_3344, 5]);
    rig.cpu.cr4 |= cr4::TSD;
    assert_eq!(rig.run(&[0x0f, 0x31]), GP);
    rig.cpu.set_gpr(Gpr::Rax, 0xffff_ffff_0000_0003);
    rig.cpu.set_gpr(Gpr::Rcx, 0xffff_ffff_0000_0004);
    assert_eq!(rig.run(&[0x0f, 0xa2]), Ok(Flow::Next));
    assert_eq!((rig.cpu.gpr(Gpr::Rax), rig.cpu.gpr(Gpr::Rbx)), (3, 4));
}

#[test]
fn halting_and_spinning() {
    let mut rig = Rig::long();
    assert_eq!(rig.run(&[0xf3, 0x90]), Ok(Flow::Next));
    assert_eq!(rig.env.pauses, 1);
    assert_eq!(rig.run(&[0xf4]), Ok(Flow::Stop));
    assert_eq!(
        (rig.cpu.activity, rig.cpu.rip),
        (Activity::Halted, CODE + 3)
    );
    rig.set_level(3);
    assert_eq!(rig.run(&[0xf4]), GP);
    assert_eq!(rig.run(&[0x0f, 0x0b]), UD);
    assert_eq!(rig.run(&[0x0f, 0x01, 0xc8]), UD);
}

#[test]
fn bounds() {
    let mut rig = Rig::protected();
    rig.write32(0x7000, -5i32 as u32);
    rig.write32(0x7004, 5);
    rig.cpu.set_gpr(Gpr::Rbx, 0x7000);
    rig.cpu.set_gpr(Gpr::Rax, (-5i32 as u32).into());
    assert_eq!(rig.run(&[0x62, 0x03]), Ok(Flow::Next));
    rig.cpu.set_gpr(Gpr::Rax, 6);
    let e = Exception {
        vector: Vector::BoundRange,
        error: None,
        cr2: None,
        dr6: 0,
    };
    assert_eq!(rig.run(&[0x62, 0x03]), raises(e));
    // The first bound is not present, the second is behind the limit.
    rig.cpu.segment_mut(SegmentRegister::Ds).limit = 0x7003;
    rig.env.absent.insert(0x7000);
    let not_present = Exception::page_fault(0x7000, 0);
    assert_eq!(rig.run(&[0x62, 0x03]), raises(not_present));
}

#[test]
fn extended_control_register() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rcx, 0);
    for (value, valid) in [(7, true), (0, false), (5, false), (0x100_0001, false)] {
        rig.cpu.set_gpr(Gpr::Rax, value);
        rig.cpu.set_gpr(Gpr::Rdx, 0);
        let expected = if valid { Ok(Flow::Leave) } else { GP };
        assert_eq!(rig.run(&[0x0f, 0x01, 0xd1]), expected, "{value}");
    }
    assert_eq!(rig.run(&[0x0f, 0x01, 0xd0]), Ok(Flow::Next));
    assert_eq!(rig.cpu.gpr(Gpr::Rax), 7);
    rig.cpu.set_gpr(Gpr::Rcx, 1);
    rig.cpu.vector.zmm[15].0[31] = 1;
    assert_eq!(rig.run(&[0x0f, 0x01, 0xd0]), Ok(Flow::Next));
    assert_eq!(rig.cpu.gpr(Gpr::Rax), 4);
    rig.cpu.cr4 &= !cr4::OSXSAVE;
    assert_eq!(rig.run(&[0x0f, 0x01, 0xd0]), UD);
}
