//! Extended state and ports.

use trapline_x86::control::{cr0, cr4, rflags};
use trapline_x86::vector::MXCSR_RESET;
use trapline_x86::{Exception, Gpr, Mode, Segment};

use crate::step::Flow;
use crate::step::tests_support::*;
use crate::step::xstate::image;

const GP: crate::step::Executed = raises(Exception::general_protection(0));
const UD: crate::step::Executed = raises(Exception::invalid_opcode());
const NM: crate::step::Executed = raises(Exception::device_not_available());
/// All with the operand [rbx].
const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x03];
const FXSAVE: &[u8] = &[0x0f, 0xae, 0x03];
const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x0b];
const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
const XSAVEOPT64: &[u8] = &[0x48, 0x0f, 0xae, 0x33];
const XSAVEC64: &[u8] = &[0x48, 0x0f, 0xc7, 0x23];
const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
const AREA: u64 = 0xa_0000;
const HEADER: u64 = AREA + 512;

fn filled() -> Rig {
    let mut rig = Rig::long();
    let v = &mut rig.cpu.vector;
    for (n, z) in v.zmm.iter_mut().enumerate() {
        z.0 = std::array::from_fn(|i| (n * 64 + i) as u8 | 1);
    }
    for n in 0..8 {
        v.k[n] = 0x0101_0101 * (n as u64 + 1);
        v.x87.0[32 + 16 * n..][..10].fill(n as u8 + 1);
    }
    v.x87.0[0] = 0x7e;
    v.x87.0[8..16].copy_from_slice(&0x1111_2222_3333_4444u64.to_le_bytes());
    v.mxcsr = 0x1fa0;
    rig.cpu.set_gpr(Gpr::Rbx, AREA);
    rig.cpu.set_gpr(Gpr::Rax, !0);
    rig.cpu.set_gpr(Gpr::Rdx, !0);
    rig
}

fn scramble(rig: &mut Rig) {
    let v = &mut rig.cpu.vector;
    v.zmm.iter_mut().for_each(|z| z.0.fill(0xee));
    v.k = [0xee; 8];
    v.x87.0[0..24].fill(0);
    v.x87.0[32..160].fill(0x77);
    v.mxcsr = MXCSR_RESET;
}

#[test]
fn fxsave_round_trip() {
    let mut rig = filled();
    let before = rig.cpu.vector.clone();
    rig.write64(AREA + 416, 0x5555);
    assert_eq!(rig.run(FXSAVE64), Ok(Flow::Next));
    assert_eq!(
        rig.read64(AREA + 416),
        0x5555,
        "the end of the area is software's"
    );
    assert_eq!(rig.read64(AREA + 8), 0x1111_2222_3333_4444);
    assert_eq!(rig.read32(AREA + 28), image::mxcsr_mask());
    scramble(&mut rig);
    assert_eq!(rig.run(FXRSTOR64), Ok(Flow::Next));
    let after = &rig.cpu.vector;
    assert_eq!((after.x87, after.mxcsr), (before.x87, before.mxcsr));
    assert!((0..16).all(|n| after.zmm[n].0[..16] == before.zmm[n].0[..16]));
    assert!(
        (0..16).all(|n| after.zmm[n].0[16] == 0xee),
        "only XMM registers are restored"
    );
}

#[test]
fn fxsave_without_rex_has_short_pointers() {
    let mut rig = filled();
    assert_eq!(rig.run(FXSAVE), Ok(Flow::Next));
    assert_eq!(rig.read64(AREA + 8), 0x3333_4444);
}

#[test]
fn fxrstor_checks_alignment_and_mxcsr() {
    let mut rig = filled();
    assert_eq!(rig.run(FXSAVE64), Ok(Flow::Next));
    rig.write32(AREA + 24, 1 << 31);
    assert_eq!(rig.run(FXRSTOR64), GP);
    rig.cpu.set_gpr(Gpr::Rbx, AREA + 8);
    assert_eq!(rig.run(FXRSTOR64), GP);
    rig.cpu.cr0 |= cr0::TS;
    assert_eq!(rig.run(FXRSTOR64), NM);
}

/// At CPL 3 with alignment checked.
fn check_alignment(rig: &mut Rig) {
    rig.set_level(3);
    rig.cpu.cr0 |= cr0::AM;
    rig.cpu.rflags |= rflags::AC;
}

#[test]
fn alignment_checking_of_save_areas_takes_their_words() {
    const AC: crate::step::Executed = raises(Exception::alignment_check());
    for (at, result) in [(2, AC), (4, GP), (8, GP), (16, Ok(Flow::Next))] {
        let mut rig = filled();
        check_alignment(&mut rig);
        rig.cpu.set_gpr(Gpr::Rbx, AREA + at);
        assert_eq!(rig.run(FXSAVE64), result, "at {at}");
        assert_eq!(rig.run(FXRSTOR64), result, "at {at}");
        rig.set_level(0);
        let result = if at == 16 { Ok(Flow::Next) } else { GP };
        assert_eq!(rig.run(FXSAVE64), result, "at {at}");
    }
    let mut rig = filled();
    check_alignment(&mut rig);
    rig.cpu.set_gpr(Gpr::Rbx, AREA + 2);
    assert_eq!(rig.run(XSAVE64), GP);
}

#[test]
fn xsave_round_trips_in_every_form() {
    for save in [XSAVE64, XSAVEOPT64, XSAVEC64] {
        for xcr0 in [3, 7, 0xe7] {
            let mut rig = filled();
            rig.cpu.xcr0 = xcr0;
            // It spans pages.
            rig.cpu.set_gpr(Gpr::Rbx, AREA + 0xf00);
            let before = rig.cpu.vector.clone();
            assert_eq!(rig.run(save), Ok(Flow::Next));
            assert_eq!(rig.read64(HEADER + 0xf00), xcr0);
            scramble(&mut rig);
            let untouched = rig.cpu.vector.clone();
            assert_eq!(rig.run(XRSTOR64), Ok(Flow::Next), "{save:02x?} {xcr0:#x}");
            let after = &rig.cpu.vector;
            assert_eq!((after.x87, after.mxcsr), (before.x87, before.mxcsr));
            let ymm = if xcr0 & 4 != 0 { &before } else { &untouched };
            let zmm = if xcr0 == 0xe7 { &before } else { &untouched };
            for n in 0..32 {
                if n < 16 {
                    assert_eq!(after.zmm[n].0[..16], before.zmm[n].0[..16]);
                    assert_eq!(after.zmm[n].0[16..32], ymm.zmm[n].0[16..32]);
                    assert_eq!(after.zmm[n].0[32..], zmm.zmm[n].0[32..]);
                } else {
                    assert_eq!(after.zmm[n], zmm.zmm[n]);
                }
            }
            assert_eq!(after.k, zmm.k);
        }
    }
}

#[test]
fn initial_components_are_marked_and_skipped() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rbx, AREA);
    rig.cpu.set_gpr(Gpr::Rax, 7);
    rig.cpu.vector.zmm[3].0[0] = 9;
    for at in (0..1024).step_by(8) {
        rig.write64(AREA + at, 0x5a5a_5a5a_5a5a_5a5a);
    }
    rig.write64(HEADER, 0x12);
    assert_eq!(rig.run(XSAVEOPT64), Ok(Flow::Next));
    // Bits that were not requested stay; x87 and AVX are initial.
    assert_eq!(rig.read64(HEADER), 0x12);
    assert_eq!(rig.read64(HEADER + 8), 0x5a5a_5a5a_5a5a_5a5a);
    assert_eq!(rig.read16(AREA), 0x5a5a);
    assert_eq!(rig.read32(AREA + 24), MXCSR_RESET);
    assert_eq!(rig.read64(AREA + 160 + 48), 9);
    // Restoring from a header without the bits initializes.
    (0..64)
        .step_by(8)
        .for_each(|at| rig.write64(HEADER + at, 0));
    rig.write32(AREA + 24, 0x1f80);
    scramble(&mut rig);
    assert_eq!(rig.run(XRSTOR64), Ok(Flow::Next));
    assert!(
        rig.cpu.vector.zmm[..16]
            .iter()
            .all(|z| z.0[..32] == [0; 32])
    );
    assert_eq!(image::in_use(&rig.cpu.vector) & 7, 0);
}

#[test]
fn xsavec_marks_the_form() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rbx, AREA);
    rig.cpu.set_gpr(Gpr::Rax, 6);
    assert_eq!(rig.run(XSAVEC64), Ok(Flow::Next));
    assert_eq!(
        (rig.read64(HEADER), rig.read64(HEADER + 8)),
        (0, 1 << 63 | 6)
    );
    rig.cpu.vector.mxcsr = 0x1fa0;
    assert_eq!(rig.run(XSAVEC64), Ok(Flow::Next));
    assert_eq!(rig.read64(HEADER), 2, "MXCSR counts for XSAVEC");
}

#[test]
fn xrstor_refuses_bad_headers() {
    let mut rig = filled();
    for (at, value) in [(0, 8), (8, 1), (16, 1), (8, 1 << 63 | 8), (8, 1 << 63)] {
        (0..64)
            .step_by(8)
            .for_each(|at| rig.write64(HEADER + at, 0));
        rig.write64(HEADER, 7);
        rig.write64(AREA + 24, 0x1f80);
        rig.write64(HEADER + at, value);
        assert_eq!(rig.run(XRSTOR64), GP, "{at} {value:#x}");
    }
    rig.write64(HEADER, 7);
    rig.write64(HEADER + 8, 1 << 63 | 7);
    assert_eq!(rig.run(XRSTOR64), Ok(Flow::Next));
    rig.write64(HEADER + 40, 1);
    assert_eq!(rig.run(XRSTOR64), GP);
    rig.cpu.set_gpr(Gpr::Rbx, AREA + 16);
    assert_eq!(rig.run(XSAVE64), GP);
    rig.cpu.cr0 |= cr0::TS;
    assert_eq!(rig.run(XSAVE64), NM);
    rig.cpu.cr4 &= !cr4::OSXSAVE;
    assert_eq!(rig.run(XSAVE64), UD);
}

#[test]
fn a_page_fault_in_the_area_writes_nothing() {
    let mut rig = filled();
    rig.cpu.set_gpr(Gpr::Rbx, AREA + 0xf00);
    rig.env.absent.insert(AREA + 0x1000);
    assert!(rig.run(XSAVE64).is_err());
    assert_eq!(rig.read64(AREA + 0xf00 + 32), 0);
}

#[test]
fn mxcsr() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rbx, AREA);
    // stmxcsr [rbx]; ldmxcsr [rbx]
    let (store, load) = ([0x0f, 0xae, 0x1b], [0x0f, 0xae, 0x13]);
    assert_eq!(rig.run(&store), Ok(Flow::Next));
    assert_eq!(rig.read32(AREA), MXCSR_RESET);
    rig.write32(AREA, 0x9fc0);
    assert_eq!(rig.run(&load), Ok(Flow::Next));
    assert_eq!(rig.cpu.vector.mxcsr, 0x9fc0);
    rig.write32(AREA, 1 << 20);
    assert_eq!(rig.run(&load), GP);
    rig.cpu.cr4 &= !cr4::OSFXSR;
    assert_eq!(rig.run(&load), UD);
}

#[test]
fn upper_halves_are_zeroed() {
    let mut rig = filled();
    let before = rig.cpu.vector.clone();
    assert_eq!(rig.run(&[0xc5, 0xf8, 0x77]), Ok(Flow::Next));
    let v = &rig.cpu.vector;
    assert!((0..16).all(|n| v.zmm[n].0[16..] == [0; 48]));
    assert!((0..16).all(|n| v.zmm[n].0[..16] == before.zmm[n].0[..16]));
    assert_eq!(v.zmm[16], before.zmm[16]);
    rig.cpu.xcr0 = 3;
    assert_eq!(rig.run(&[0xc5, 0xf8, 0x77]), UD);
}

#[test]
fn ports_need_permission() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rdx, 0x3f8);
    rig.cpu.set_gpr(Gpr::Rax, 0x1122_3344);
    assert_eq!(rig.run(&[0xee]), Ok(Flow::Leave));
    assert_eq!(rig.env.ports, [(0x3f8, 1, Some(0x44))]);
    rig.env.port_value = 0xaabb_ccdd;
    assert_eq!(rig.run(&[0xed]), Ok(Flow::Next));
    assert_eq!(rig.cpu.gpr(Gpr::Rax), 0xaabb_ccdd);
    rig.set_level(3);
    assert_eq!(rig.run(&[0xee]), GP);
    // A bitmap behind the TSS permits 0x3f8 alone.
    rig.cpu.tr.limit = 0x68 + 0x80;
    rig.write16(TSS + 0x66, 0x68);
    (0..0x90)
        .step_by(8)
        .for_each(|at| rig.write64(TSS + 0x68 + at, !0));
    assert_eq!(rig.run(&[0xee]), GP);
    rig.write16(TSS + 0x68 + 0x7f, 0xfffe);
    assert_eq!(rig.run(&[0xee]), Ok(Flow::Leave));
    assert_eq!(
        rig.run(&[0x66, 0xef]),
        GP,
        "the second port is not permitted"
    );
    rig.cpu.tr.limit = 0x68 + 0x7f;
    assert_eq!(
        rig.run(&[0xee]),
        GP,
        "the bitmap ends before the second byte"
    );
    rig.cpu.rflags |= rflags::IOPL;
    assert_eq!(rig.run(&[0xee]), Ok(Flow::Leave));
}

#[test]
fn repeated_port_transfers_stop_now_and_then() {
    let mut rig = Rig::long();
    rig.env.port_value = 0x1234;
    for (r, value) in [(Gpr::Rdx, 0x1f0), (Gpr::Rdi, AREA), (Gpr::Rcx, 300)] {
        rig.cpu.set_gpr(r, value);
    }
    // rep insw
    let rep = [0xf3, 0x66, 0x6d];
    assert_eq!(rig.run(&rep), Ok(Flow::Again));
    assert_eq!((rig.cpu.rip, rig.cpu.gpr(Gpr::Rcx)), (CODE, 44));
    assert_eq!(rig.run(&rep), Ok(Flow::Leave));
    assert_eq!(
        (rig.cpu.gpr(Gpr::Rcx), rig.cpu.gpr(Gpr::Rdi)),
        (0, AREA + 600)
    );
    assert_eq!(
        (rig.read16(AREA + 598), rig.read16(AREA + 600)),
        (0x1234, 0)
    );
    assert_eq!(rig.env.ports.len(), 300);
    assert_eq!(
        rig.run(&rep),
        Ok(Flow::Next),
        "a count of zero does nothing"
    );
}

#[test]
fn a_port_is_not_read_when_its_value_has_nowhere_to_go() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rdi, AREA);
    rig.env.absent.insert(AREA);
    assert!(rig.run(&[0x6c]).is_err());
    assert!(rig.env.ports.is_empty());
    // A restart of the write does not read the port again.
    rig.env.absent.clear();
    rig.env.sensed.insert(AREA);
    rig.env.restarts = 3;
    assert_eq!(rig.run(&[0x6c]), Ok(Flow::Leave));
    assert_eq!(rig.env.ports.len(), 1);
}

#[test]
fn output_reads_through_the_overridden_segment_downward() {
    let mut rig = Rig::real();
    assert_eq!(rig.cpu.mode(), Mode::Real);
    rig.cpu.seg[0] = Segment::real(0x1000);
    rig.write16(0x1_0004, 0xbeef);
    rig.cpu.set_gpr(Gpr::Rsi, 0x7_0004);
    rig.cpu.rflags |= rflags::DF;
    // es outsw
    assert_eq!(rig.run(&[0x26, 0x6f]), Ok(Flow::Leave));
    assert_eq!(rig.env.ports, [(0, 2, Some(0xbeef))]);
    assert_eq!(rig.cpu.gpr(Gpr::Rsi), 0x7_0002);
}
