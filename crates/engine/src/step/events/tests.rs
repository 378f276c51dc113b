//! Delivery of events and returns from them, in every mode.

use trapline_x86::control::{dr6, dr7, rflags};
use trapline_x86::segment::Rights;
use trapline_x86::state::{Activity, InterruptShadow};
use trapline_x86::{Exception, Gpr, Mode, Segment, SegmentRegister, Vector};

use crate::access::Fault;
use crate::env::Restart;
use crate::step::Flow;
use crate::step::events::{Delivered, Event};
use crate::step::tests_support::*;
use crate::step::transfer::far_return::virtual_segment;
use crate::tlb::Privilege;

const IRETQ: &[u8] = &[0x48, 0xcf];
const IRETD: &[u8] = &[0xcf];

fn handler(vector: u64) -> u64 {
    HANDLER + 16 * vector
}

#[test]
fn real_mode_uses_the_vector_table() {
    let mut rig = Rig::real();
    rig.write16(4 * 0x21, 0x1234);
    rig.write16(4 * 0x21 + 2, 0x0800);
    rig.cpu.rflags |= rflags::IF | rflags::TF | rflags::CF;
    let flags = rig.cpu.rflags;
    assert_eq!(rig.run(&[0xcd, 0x21]), Ok(Flow::Jump));
    assert_eq!(
        (rig.cs(), rig.cpu.cs().base, rig.cpu.rip),
        (0x800, 0x8000, 0x1234)
    );
    assert_eq!(rig.cpu.rflags, flags & !(rflags::IF | rflags::TF));
    assert_eq!(rig.rsp(), 0xeffa);
    assert_eq!(u64::from(rig.read16(0xeffa)), CODE + 2);
    assert_eq!(rig.read16(0xeffc), 0);
    assert_eq!(u64::from(rig.read16(0xeffe)), flags);
    assert_eq!(rig.run(IRETD), Ok(Flow::Jump));
    assert_eq!((rig.cs(), rig.cpu.rip, rig.rsp()), (0, CODE + 2, 0xf000));
    assert_eq!(rig.cpu.rflags, flags);
}

#[test]
fn a_sixteen_bit_stack_wraps() {
    let mut rig = Rig::real();
    rig.cpu.set_gpr(Gpr::Rsp, 0x5_0002);
    rig.write16(4 * 3, 0x1000);
    assert_eq!(rig.run(&[0xcc]), Ok(Flow::Jump));
    assert_eq!(rig.rsp(), 0x5_fffc);
    assert_eq!(u64::from(rig.read16(0xfffc)), CODE + 1);
    assert_eq!(u64::from(rig.read16(0)), rflags::ONE);
}

#[test]
fn a_data_breakpoint_on_the_frame_traps_behind_the_delivery() {
    let mut rig = Rig::long();
    rig.set_level(3);
    let frame = (STACK0 & !15) - 40;
    rig.cpu.dr[1] = frame + 16;
    // Writes of eight bytes, by DR1.
    rig.cpu.dr7 |= 0b1001 << 20 | 1 << 2;
    let trap = Exception::debug(2);
    assert_eq!(
        rig.raise(Event::Interrupt(0x30)),
        Ok(Delivered::Breakpoint(trap))
    );
    assert_eq!(rig.cpu.rip, handler(0x30));
    // On the way to its own handler it meets none.
    assert_eq!(rig.raise(Event::Exception(trap)), Ok(Delivered::Handler));
    assert_eq!((rig.cpu.rip, rig.cpu.dr6 & 0xf), (handler(1), 2));
    assert_eq!(rig.read64(rig.rsp()), handler(0x30));
    // One that nothing writes to.
    let mut rig = Rig::long();
    rig.cpu.dr[1] = STACK;
    rig.cpu.dr7 |= 0b1001 << 20 | 1 << 2;
    assert_eq!(rig.raise(Event::Nmi), Ok(Delivered::Handler));
}

#[test]
fn an_interrupt_from_user_code_switches_stacks() {
    let mut rig = Rig::long();
    rig.set_level(3);
    rig.cpu.rflags |= rflags::IF | rflags::TF | rflags::NT;
    let flags = rig.cpu.rflags;
    rig.cpu.shadow = InterruptShadow::Sti;
    rig.cpu.activity = Activity::Halted;
    assert_eq!(rig.raise(Event::Interrupt(0x30)), Ok(Delivered::Handler));
    assert_eq!((rig.cs(), rig.ss(), rig.cpu.cpl), (KERNEL_CS, 0, 0));
    assert!(rig.cpu.ss().rights.is_unusable());
    assert_eq!(rig.cpu.rip, handler(0x30));
    // The pointer in the TSS is rounded down to 16 bytes.
    let rsp = (STACK0 & !15) - 40;
    assert_eq!(rig.rsp(), rsp);
    let saved = [0, 8, 16, 24, 32].map(|at| rig.read64(rsp + at));
    let expected = [CODE, u64::from(USER_CS), flags, STACK, u64::from(USER_SS)];
    assert_eq!(saved, expected);
    assert_eq!(rig.cpu.rflags, rflags::ONE);
    assert_eq!(
        (rig.cpu.shadow, rig.cpu.activity),
        (InterruptShadow::None, Activity::Active)
    );

    assert_eq!(rig.run(IRETQ), Ok(Flow::Jump));
    assert_eq!((rig.cs(), rig.ss(), rig.cpu.cpl), (USER_CS, USER_SS, 3));
    assert_eq!(
        (rig.cpu.rip, rig.rsp(), rig.cpu.rflags),
        (CODE, STACK, flags)
    );
}

#[test]
fn an_exception_pushes_its_error_code_and_sets_rf_and_cr2() {
    let mut rig = Rig::long();
    let rsp = STACK - 3;
    rig.cpu.set_gpr(Gpr::Rsp, rsp);
    let e = Exception::page_fault(0xdead_b000, 2);
    assert_eq!(rig.raise(Event::Exception(e)), Ok(Delivered::Handler));
    assert_eq!(rig.cpu.cr2, 0xdead_b000);
    let frame = (rsp & !15) - 48;
    assert_eq!(rig.rsp(), frame);
    assert_eq!(rig.read64(frame), 2);
    assert_eq!(rig.read64(frame + 24), rflags::ONE | rflags::RF);
    assert_eq!(rig.read64(frame + 32), rsp);
    assert_eq!(rig.cpu.rflags & rflags::RF, 0);
    assert_eq!(
        rig.ss(),
        KERNEL_SS,
        "without a change of privilege SS stays"
    );
}

#[test]
fn an_interrupt_stack_entry_wins() {
    let mut rig = Rig::long();
    rig.set_gate(2, 0xffff_8000_0000_1000, 0x8e, 1);
    assert_eq!(rig.raise(Event::Nmi), Ok(Delivered::Handler));
    assert_eq!(rig.rsp(), STACK_IST - 40);
    assert_eq!(rig.cpu.rip, 0xffff_8000_0000_1000);
    assert!(rig.cpu.nmi_blocked);
    assert_eq!(rig.run(IRETQ), Ok(Flow::Jump));
    assert!(!rig.cpu.nmi_blocked);
}

#[test]
fn trap_gates_leave_interrupts_enabled() {
    let mut rig = Rig::long();
    rig.set_gate(0x80, 0x7000, 0xef, 0);
    rig.set_level(3);
    rig.cpu.rflags |= rflags::IF;
    assert_eq!(rig.run(&[0xcd, 0x80]), Ok(Flow::Jump));
    assert_eq!((rig.cpu.rip, rig.cpu.interrupts_enabled()), (0x7000, true));
    assert_eq!(rig.read64(rig.rsp()), CODE + 2);
}

#[test]
fn user_code_needs_permission_for_software_interrupts() {
    let mut rig = Rig::long();
    rig.set_level(3);
    let error = 0x80 << 3 | 2;
    assert_eq!(
        rig.run(&[0xcd, 0x80]),
        raises(Exception::general_protection(error))
    );
    // A hardware interrupt needs none; a gate that is missing is the kernel's fault.
    rig.set_gate(0x80, 0x7000, 0x6e, 0);
    assert_eq!(
        rig.run(&[0xcd, 0x80]),
        raises(Exception::segment_not_present(error))
    );
    rig.set_gate(0x80, 0x7000, 0x8c, 0);
    assert_eq!(
        rig.run(&[0xcd, 0x80]),
        raises(Exception::general_protection(error))
    );
}

#[test]
fn system_structures_are_read_as_supervisor_and_the_stack_as_its_level() {
    let mut rig = Rig::long();
    rig.set_level(3);
    assert_eq!(rig.raise(Event::Interrupt(0x30)), Ok(Delivered::Handler));
    assert!(
        rig.env
            .privileges
            .iter()
            .all(|(_, p)| *p != Privilege::User)
    );
    rig.env.privileges.clear();
    rig.set_level(3);
    rig.cpu.set_gpr(Gpr::Rsp, STACK);
    rig.frame(8, &[u64::from(USER_SS), STACK, 2, u64::from(USER_CS), CODE]);
    assert_eq!(rig.run(IRETQ), Ok(Flow::Jump));
    for (linear, privilege) in &rig.env.privileges {
        let table = (GDT..GDT + 0x1000).contains(linear);
        assert_eq!(*privilege == Privilege::User, !table, "{linear:#x}");
    }
}

#[test]
fn a_fault_while_delivering_a_fault_is_a_double_fault() {
    let mut rig = Rig::long();
    // #GP whose gate is not present: #NP is contributory too.
    rig.set_gate(13, 0, 0x0e, 0);
    let e = Exception::general_protection(0);
    assert_eq!(rig.raise(Event::Exception(e)), Ok(Delivered::Handler));
    assert_eq!(rig.cpu.rip, handler(8));
    assert_eq!(rig.read64(rig.rsp()), 0);
    assert_eq!(rig.read64(rig.rsp() + 8), CODE);
}

#[test]
fn a_page_fault_while_delivering_a_benign_event_is_delivered() {
    let mut rig = Rig::long();
    rig.set_gate(14, handler(14), 0x8e, 1);
    rig.cpu.set_gpr(Gpr::Rsp, 0x6_0000);
    rig.env.absent.insert(0x5_f000);
    assert_eq!(rig.raise(Event::Interrupt(0x30)), Ok(Delivered::Handler));
    assert_eq!((rig.cpu.rip, rig.cpu.cr2), (handler(14), 0x5_fff8));
    assert_eq!(rig.read64(rig.rsp() + 8), CODE);
}

#[test]
fn a_kernel_stack_overflow_is_a_double_fault_with_its_address() {
    let mut rig = Rig::long();
    rig.set_gate(8, handler(8), 0x8e, 1);
    rig.cpu.set_gpr(Gpr::Rsp, 0x6_0000);
    rig.env.absent.insert(0x5_f000);
    let e = Exception::page_fault(0x5_fff0, 2);
    assert_eq!(rig.raise(Event::Exception(e)), Ok(Delivered::Handler));
    assert_eq!((rig.cpu.rip, rig.cpu.cr2), (handler(8), 0x5_fff8));
    assert_eq!(rig.rsp(), STACK_IST - 48);
}

#[test]
fn a_triple_fault_shuts_down_with_the_registers_of_the_fault() {
    let mut rig = Rig::long();
    rig.cpu.idtr.limit = 0;
    let (rip, rsp) = (rig.cpu.rip, rig.rsp());
    let e = Exception::invalid_opcode();
    assert_eq!(rig.raise(Event::Exception(e)), Ok(Delivered::TripleFault));
    assert_eq!(rig.cpu.activity, Activity::Shutdown);
    assert_eq!((rig.cpu.rip, rig.rsp()), (rip, rsp));
}

#[test]
fn a_restart_leaves_everything_for_another_attempt() {
    let mut rig = Rig::long();
    rig.env.sensed.insert(STACK - 0x1000);
    rig.env.restarts = 1;
    let before = rig.cpu.clone();
    assert_eq!(rig.raise(Event::Interrupt(0x30)), Err(Restart));
    assert_eq!(rig.cpu, before);
    assert_eq!(rig.raise(Event::Interrupt(0x30)), Ok(Delivered::Handler));
    assert_eq!(rig.cpu.rip, handler(0x30));
}

#[test]
fn debug_exceptions_report_in_dr6() {
    let mut rig = Rig::long();
    rig.cpu.dr7 |= dr7::GD;
    // mov rax, dr0
    let fault = rig.run(&[0x0f, 0x21, 0xc0]);
    let e = Exception::debug(dr6::BD);
    assert_eq!(fault, raises(e));
    assert_eq!(rig.raise(Event::Exception(e)), Ok(Delivered::Handler));
    assert_eq!(rig.cpu.dr6 & dr6::BD, dr6::BD);
    assert_eq!(rig.cpu.dr7 & dr7::GD, 0);
    assert_eq!(rig.read64(rig.rsp() + 16) & rflags::RF, rflags::RF);
    rig.cpu.rip = CODE;
    let e = Exception::debug(dr6::BS);
    assert_eq!(rig.raise(Event::Exception(e)), Ok(Delivered::Handler));
    assert_eq!(rig.read64(rig.rsp() + 16) & rflags::RF, 0);
}

#[test]
fn protected_mode_switches_stacks_too() {
    let mut rig = Rig::protected();
    rig.set_level(3);
    rig.cpu.rflags |= rflags::IF;
    let e = Exception::general_protection(0x18);
    assert_eq!(rig.raise(Event::Exception(e)), Ok(Delivered::Handler));
    assert_eq!((rig.cs(), rig.ss(), rig.cpu.cpl), (KERNEL_CS, KERNEL_SS, 0));
    let rsp = STACK0 - 24;
    assert_eq!((rig.cpu.rip, rig.rsp()), (handler(13), rsp));
    let flags = (rflags::ONE | rflags::IF | rflags::RF) as u32;
    let expected = [
        0x18,
        CODE as u32,
        u32::from(USER_CS),
        flags,
        STACK as u32,
        u32::from(USER_SS),
    ];
    assert_eq!(
        [0, 4, 8, 12, 16, 20].map(|at| rig.read32(rsp + at)),
        expected
    );
    rig.cpu.set_gpr(Gpr::Rsp, rsp + 4);
    *rig.cpu.segment_mut(SegmentRegister::Ds) = *rig.cpu.ss();
    assert_eq!(rig.run(IRETD), Ok(Flow::Jump));
    assert_eq!(
        (rig.cs(), rig.ss(), rig.cpu.rip, rig.rsp()),
        (USER_CS, USER_SS, CODE, STACK)
    );
    assert!(
        rig.cpu.seg[3].rights.is_unusable(),
        "kernel data is not for user code"
    );
    assert!(!rig.cpu.seg[0].rights.is_unusable());
}

#[test]
fn sixteen_bit_gates_push_words() {
    let mut rig = Rig::protected();
    rig.set_gate(0x40, 0x5_7000, 0x86, 0);
    assert_eq!(rig.raise(Event::Interrupt(0x40)), Ok(Delivered::Handler));
    assert_eq!((rig.cpu.rip, rig.rsp()), (0x7000, STACK - 6));
    assert_eq!(u64::from(rig.read16(STACK - 6)), CODE);
}

#[test]
fn virtual_8086_mode_saves_and_drops_its_segments() {
    let mut rig = Rig::protected();
    let selectors = [0x100, 0x200, 0x300, 0x400, 0x500, 0x600];
    for (n, selector) in selectors.into_iter().enumerate() {
        rig.cpu.seg[n] = virtual_segment(selector);
    }
    rig.cpu.rflags |= rflags::VM | rflags::IF;
    rig.cpu.cpl = 3;
    rig.cpu.rip = 0x77;
    rig.cpu.set_gpr(Gpr::Rsp, 0x1000);
    assert_eq!(rig.cpu.mode(), Mode::Virtual8086);
    assert_eq!(
        rig.run(&[0xcd, 0x21]),
        raises(Exception::general_protection(0))
    );
    let flags = rig.cpu.rflags;
    assert_eq!(rig.raise(Event::Interrupt(0x30)), Ok(Delivered::Handler));
    let rsp = STACK0 - 36;
    assert_eq!((rig.cpu.mode(), rig.rsp()), (Mode::Protected32, rsp));
    let saved: Vec<_> = (0..9).map(|n| rig.read32(rsp + 4 * n)).collect();
    let expected = [
        0x77,
        0x200,
        flags as u32,
        0x1000,
        0x300,
        0x100,
        0x400,
        0x500,
        0x600,
    ];
    assert_eq!(saved, expected);
    assert!(rig.cpu.seg[0].rights.is_unusable());
    assert_eq!(rig.run(IRETD), Ok(Flow::Jump));
    assert_eq!(
        (rig.cpu.mode(), rig.cpu.rip, rig.rsp()),
        (Mode::Virtual8086, 0x77, 0x1000)
    );
    assert_eq!(rig.cpu.seg.map(|s| s.selector), selectors);
    assert_eq!((rig.cpu.rflags, rig.cpu.cpl), (flags, 3));
}

#[test]
fn iret_checks_where_it_goes() {
    let mut rig = Rig::long();
    let frame = |cs: u16, ss: u16, rip: u64| [u64::from(ss), STACK, 2, u64::from(cs), rip];
    let gp = |selector: u16| raises(Exception::general_protection(u32::from(selector & !3)));
    let mut case = |cs, ss, rip, expected| {
        rig.cpu.set_gpr(Gpr::Rsp, STACK);
        rig.frame(8, &frame(cs, ss, rip));
        assert_eq!(rig.run(IRETQ), expected, "{cs:#x} {ss:#x} {rip:#x}");
    };
    case(0, USER_SS, CODE, gp(0));
    case(USER_SS, USER_SS, CODE, gp(USER_SS));
    case(USER_CS & !3, USER_SS, CODE, gp(USER_CS));
    case(0xff8, USER_SS, CODE, gp(0xff8));
    case(USER_CS, KERNEL_SS, CODE, gp(KERNEL_SS));
    case(USER_CS, 0, CODE, gp(0));
    case(USER_CS, USER_SS, 0x8000_0000_0000, gp(0));
    case(USER_CS32, USER_SS, CODE, Ok(Flow::Jump));
    assert_eq!((rig.cpu.mode(), rig.cpu.cpl), (Mode::Protected32, 3));
}

#[test]
fn iret_to_kernel_code_takes_a_null_stack_segment() {
    let mut rig = Rig::long();
    rig.frame(8, &[0, 0x1_2345, 2, u64::from(KERNEL_CS), CODE]);
    assert_eq!(rig.run(IRETQ), Ok(Flow::Jump));
    assert_eq!((rig.ss(), rig.rsp()), (0, 0x1_2345));
}

#[test]
fn user_code_cannot_raise_its_privilege_with_flags() {
    let mut rig = Rig::long();
    rig.set_level(3);
    let popped = rflags::IOPL | rflags::IF | rflags::CF | rflags::ID | rflags::RF;
    rig.frame(
        8,
        &[u64::from(USER_SS), STACK, popped, u64::from(USER_CS), CODE],
    );
    assert_eq!(rig.run(IRETQ), Ok(Flow::Jump));
    assert_eq!(
        rig.cpu.rflags,
        rflags::ONE | rflags::CF | rflags::ID | rflags::RF
    );
}

#[test]
fn a_nested_task_cannot_return_in_long_mode() {
    let mut rig = Rig::long();
    rig.cpu.rflags |= rflags::NT;
    assert_eq!(rig.run(IRETQ), raises(Exception::general_protection(0)));
}

#[test]
fn a_task_gate_switches_tasks_and_iret_returns() {
    let mut rig = Rig::protected();
    let new = TSS + 0x100;
    rig.write32(new + 0x20, 0x6000);
    rig.write32(new + 0x24, 2);
    rig.write32(new + 0x28 + 16, 0x1_8000);
    for (n, s) in [USER_SS, KERNEL_CS, KERNEL_SS, 0, 0, 0]
        .into_iter()
        .enumerate()
    {
        rig.write32(new + 0x48 + 4 * n as u64, u32::from(s));
    }
    rig.write64(IDT + 8 * 8, gate(SECOND_TSS, 0, 0x85));
    rig.cpu.set_gpr(Gpr::Rbx, 0x1234);
    let e = Exception {
        vector: Vector::DoubleFault,
        error: Some(0),
        cr2: None,
        dr6: 0,
    };
    assert_eq!(rig.raise(Event::Exception(e)), Ok(Delivered::Handler));
    assert_eq!(
        (rig.cpu.tr.selector, rig.cpu.rip, rig.rsp()),
        (SECOND_TSS, 0x6000, 0x1_7ffc)
    );
    assert_eq!(rig.cpu.rflags & rflags::NT, rflags::NT);
    assert_eq!(rig.read16(new), TSS_SELECTOR);
    assert_eq!(rig.read32(TSS + 0x28 + 12), 0x1234);
    assert_eq!(rig.cpu.gpr(Gpr::Rbx), 0);
    assert_eq!(rig.run(IRETD), Ok(Flow::Jump));
    assert_eq!((rig.cpu.tr.selector, rig.cpu.rip), (TSS_SELECTOR, CODE));
    assert_eq!((rig.cpu.gpr(Gpr::Rbx), rig.rsp()), (0x1234, STACK));
    assert_eq!(rig.cs(), KERNEL_CS);
}

#[test]
fn a_missing_handler_segment_or_stack_is_reported_with_its_selector() {
    let mut rig = Rig::protected();
    rig.set_level(3);
    rig.write32(TSS + 8, u32::from(READ_ONLY));
    let deliver = |rig: &mut Rig| {
        crate::step::events::deliver(&mut rig.core(), Event::Interrupt(0x30)).map(|()| Flow::Jump)
    };
    let ts = Exception::invalid_tss(u32::from(READ_ONLY) | 1);
    assert_eq!(deliver(&mut rig), Err(Fault::Exception(ts)));
    rig.cpu.tr = Segment {
        rights: Rights::unusable(),
        ..rig.cpu.tr
    };
    let ts = Exception::invalid_tss(u32::from(TSS_SELECTOR) | 1);
    assert_eq!(deliver(&mut rig), Err(Fault::Exception(ts)));
    rig.write64(IDT + 8 * 0x30, gate(NOT_PRESENT, 0, 0x8e));
    let gp = Exception::general_protection(u32::from(NOT_PRESENT) | 1);
    assert_eq!(deliver(&mut rig), Err(Fault::Exception(gp)));
}

#[test]
fn a_sixteen_bit_stack_wraps_even_in_a_large_segment() {
    let mut rig = Rig::protected();
    rig.cpu.seg[2].rights.0 &= !Rights::DB;
    rig.cpu.set_gpr(Gpr::Rsp, 0xab_0004);
    assert_eq!(rig.raise(Event::Interrupt(0x30)), Ok(Delivered::Handler));
    assert_eq!(rig.rsp(), 0xab_fff8);
    assert_eq!((rig.read32(0xfff8), rig.read32(0)), (CODE as u32, 2));
}

#[test]
fn a_return_that_faults_unblocks_nmis_but_not_one_that_restarts() {
    let mut rig = Rig::long();
    rig.cpu.nmi_blocked = true;
    rig.cpu.rflags |= rflags::NT;
    assert_eq!(rig.run(IRETQ), raises(Exception::general_protection(0)));
    assert!(!rig.cpu.nmi_blocked);

    let mut rig = Rig::long();
    rig.cpu.nmi_blocked = true;
    rig.frame(
        8,
        &[u64::from(KERNEL_SS), STACK, 2, u64::from(KERNEL_CS), CODE],
    );
    rig.env.sensed.insert(GDT);
    rig.env.restarts = 1;
    assert_eq!(rig.run(IRETQ), Err(Fault::Restart));
    assert!(rig.cpu.nmi_blocked);
    assert_eq!(rig.run(IRETQ), Ok(Flow::Jump));
    assert!(!rig.cpu.nmi_blocked);
}

#[test]
fn a_task_gate_leads_to_a_task_with_a_16_bit_tss_and_back() {
    let mut rig = Rig::protected();
    let new = TSS + 0x100;
    rig.write64(GDT + u64::from(SECOND_TSS), system(new, 0x2b, 0x81));
    // Upper halves of registers are not zero in such a task: its stack needs a 16-bit segment.
    rig.write64(GDT + u64::from(NOT_PRESENT), 0x0000_9300_0000_ffff);
    rig.write16(new + 0x0e, 0x6000);
    rig.write16(new + 0x10, 2);
    rig.write16(new + 0x12, 0x1357);
    rig.write16(new + 0x12 + 8, 0x8000);
    for (n, s) in [USER_SS, KERNEL_CS, NOT_PRESENT, 0].into_iter().enumerate() {
        rig.write16(new + 0x22 + 2 * n as u64, s);
    }
    rig.write64(IDT + 8 * 8, gate(SECOND_TSS, 0, 0x85));
    let cr3 = rig.cpu.cr3;
    let e = Exception {
        vector: Vector::DoubleFault,
        error: Some(0),
        cr2: None,
        dr6: 0,
    };
    assert_eq!(rig.raise(Event::Exception(e)), Ok(Delivered::Handler));
    // The error code is as wide as the task.
    assert_eq!(
        (rig.cpu.tr.selector, rig.cpu.rip, rig.rsp() & 0xffff),
        (SECOND_TSS, 0x6000, 0x7ffe)
    );
    assert_eq!(rig.cpu.gpr(Gpr::Rax), 0xffff_1357);
    assert_eq!(rig.cpu.seg[SegmentRegister::Fs as usize].selector, 0);
    assert_eq!((rig.read16(new), rig.cpu.cr3), (TSS_SELECTOR, cr3));
    assert_eq!(rig.read64(GDT + u64::from(SECOND_TSS)) >> 40 & 0xf, 3);
    rig.cpu.set_gpr(Gpr::Rbx, 0x1_2345);
    assert_eq!(rig.run(IRETD), Ok(Flow::Jump));
    assert_eq!((rig.cpu.tr.selector, rig.cpu.rip), (TSS_SELECTOR, CODE));
    assert_eq!(rig.read16(new + 0x12 + 6), 0x2345);
    assert_eq!(rig.read64(GDT + u64::from(SECOND_TSS)) >> 40 & 0xf, 1);
    assert_eq!(rig.cs(), KERNEL_CS);
}

#[test]
fn a_16_bit_tss_that_is_too_short_is_refused() {
    let mut rig = Rig::protected();
    rig.write64(GDT + u64::from(SECOND_TSS), system(TSS, 0x2a, 0x81));
    // ljmp SECOND_TSS:0
    let [low, high] = SECOND_TSS.to_le_bytes();
    let jump = [0xea, 0, 0, 0, 0, low, high];
    assert_eq!(
        rig.run(&jump),
        raises(Exception::invalid_tss(u32::from(SECOND_TSS)))
    );
}

#[test]
fn an_entered_task_does_not_start_again() {
    let mut rig = Rig::protected();
    let new = TSS + 0x100;
    rig.write32(new + 0x20, 0x6000);
    rig.write32(new + 0x24, 2);
    rig.write32(new + 0x28 + 16, 0x1_8000);
    for (n, s) in [USER_SS, KERNEL_CS, KERNEL_SS].into_iter().enumerate() {
        rig.write32(new + 0x48 + 4 * n as u64, u32::from(s));
    }
    // The error code's push has to wait once, when everything else is done.
    rig.env.sensed.insert(0x1_7000);
    rig.env.restarts = 1;
    rig.write64(IDT + 8 * 8, gate(SECOND_TSS, 0, 0x85));
    let e = Exception {
        vector: Vector::DoubleFault,
        error: Some(0),
        cr2: None,
        dr6: 0,
    };
    assert_eq!(rig.raise(Event::Exception(e)), Ok(Delivered::Handler));
    assert_eq!((rig.cpu.rip, rig.rsp()), (0x6000, 0x1_7ffc));
    assert_eq!(rig.env.restarts, 0);
}
