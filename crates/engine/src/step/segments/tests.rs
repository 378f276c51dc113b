//! Segment loads, descriptor tables and far transfers.

use trapline_x86::control::{cr0, cr4, rflags};
use trapline_x86::segment::{Rights, TableRegister};
use trapline_x86::state::InterruptShadow;
use trapline_x86::{Exception, Gpr, Mode, Segment, SegmentRegister};

use crate::step::Flow;
use crate::step::stack;
use crate::step::tests_support::*;

const GP: crate::step::Executed = raises(Exception::general_protection(0));
const UD: crate::step::Executed = raises(Exception::invalid_opcode());
/// mov ds, eax
const MOV_DS: &[u8] = &[0x8e, 0xd8];
/// mov ss, eax
const MOV_SS: &[u8] = &[0x8e, 0xd0];

fn load(rig: &mut Rig, instr: &[u8], selector: u16) -> crate::step::Executed {
    rig.cpu.set_gpr(Gpr::Rax, u64::from(selector));
    rig.run(instr)
}

fn gp(selector: u16) -> crate::step::Executed {
    raises(Exception::general_protection(u32::from(selector & !3)))
}

#[test]
fn data_segment_loads() {
    let mut rig = Rig::protected();
    assert_eq!(load(&mut rig, MOV_DS, USER_SS), Ok(Flow::Next));
    let ds = rig.cpu.seg[3];
    assert_eq!((ds.base, ds.limit, ds.selector), (0, 0xffff_ffff, USER_SS));
    assert_eq!(load(&mut rig, MOV_DS, 3), Ok(Flow::Next));
    assert!(rig.cpu.seg[3].rights.is_unusable());
    assert_eq!(load(&mut rig, MOV_DS, 0xff8), gp(0xff8));
    assert_eq!(load(&mut rig, MOV_DS, TSS_SELECTOR), gp(TSS_SELECTOR));
    let absent = raises(Exception::segment_not_present(u32::from(NOT_PRESENT)));
    assert_eq!(load(&mut rig, MOV_DS, NOT_PRESENT), absent);
    assert_eq!(load(&mut rig, MOV_DS, KERNEL_SS | 3), gp(KERNEL_SS));
    assert_eq!(load(&mut rig, MOV_DS, 4), gp(4), "no LDT is loaded");
    rig.set_level(3);
    assert_eq!(load(&mut rig, MOV_DS, KERNEL_SS), gp(KERNEL_SS));
}

#[test]
fn a_load_marks_the_descriptor_accessed() {
    let mut rig = Rig::protected();
    let at = GDT + u64::from(READ_ONLY);
    let descriptor = rig.read64(at) & !(1 << 40);
    rig.write64(at, descriptor);
    assert_eq!(load(&mut rig, MOV_DS, READ_ONLY), Ok(Flow::Next));
    assert_eq!(rig.read64(at), descriptor | 1 << 40);
    assert!(rig.cpu.seg[3].rights.has(Rights::ACCESSED));
}

#[test]
fn stack_segment_loads() {
    let mut rig = Rig::protected();
    assert_eq!(load(&mut rig, MOV_SS, KERNEL_SS), Ok(Flow::Leave));
    assert_eq!(rig.cpu.shadow, InterruptShadow::MovSs);
    assert_eq!(load(&mut rig, MOV_SS, 0), GP);
    assert_eq!(load(&mut rig, MOV_SS, USER_SS), gp(USER_SS));
    assert_eq!(load(&mut rig, MOV_SS, READ_ONLY), gp(READ_ONLY));
    let mut rig = Rig::long();
    assert_eq!(load(&mut rig, MOV_SS, 0), Ok(Flow::Leave));
    rig.set_level(3);
    assert_eq!(load(&mut rig, MOV_SS, 3), GP);
}

#[test]
fn real_mode_keeps_limits() {
    let mut rig = Rig::real();
    rig.cpu.seg[3].limit = 0xffff_ffff;
    assert_eq!(load(&mut rig, MOV_DS, 0x1234), Ok(Flow::Next));
    assert_eq!(
        (rig.cpu.seg[3].base, rig.cpu.seg[3].limit),
        (0x1_2340, 0xffff_ffff)
    );
}

#[test]
fn pushes_and_pops() {
    let mut rig = Rig::protected();
    // push ds; pop es
    assert_eq!(rig.run(&[0x1e]), Ok(Flow::Next));
    assert_eq!(
        (rig.rsp(), rig.read32(STACK - 4)),
        (STACK - 4, u32::from(USER_SS))
    );
    rig.write32(STACK - 4, 0xabcd_0000 | u32::from(KERNEL_SS));
    assert_eq!(rig.run(&[0x07]), Ok(Flow::Next));
    assert_eq!((rig.cpu.seg[0].selector, rig.rsp()), (KERNEL_SS, STACK));
    // A fault leaves the stack pointer (checked by the rig).
    rig.frame(4, &[u64::from(NOT_PRESENT)]);
    let absent = raises(Exception::segment_not_present(u32::from(NOT_PRESENT)));
    assert_eq!(rig.run(&[0x07]), absent);
}

#[test]
fn real_mode_keeps_the_width_of_its_stack() {
    let mut rig = Rig::real();
    rig.cpu.set_gpr(Gpr::Rsp, 0x1_0000);
    assert_eq!(stack::push(&mut rig.core(), 2, 7), Ok(()));
    assert_eq!(rig.rsp(), 0x1_fffe, "16 bits");
    let ss = &mut rig.cpu.seg[SegmentRegister::Ss as usize];
    ss.rights.0 |= Rights::DB;
    ss.limit = u32::MAX;
    rig.cpu.set_gpr(Gpr::Rsp, 0x1_0000);
    assert_eq!(stack::push(&mut rig.core(), 2, 7), Ok(()));
    assert_eq!((rig.rsp(), rig.read16(0xfffe)), (0xfffe, 7), "32 bits");
    assert_eq!(stack::pop(&mut rig.core(), 2), Ok(7));
    assert_eq!(rig.rsp(), 0x1_0000);
}

#[test]
fn far_pointers_load_both_or_nothing() {
    let mut rig = Rig::protected();
    rig.cpu.set_gpr(Gpr::Rbx, 0x7000);
    rig.write32(0x7000, 0x1234_5678);
    rig.write16(0x7004, USER_SS);
    // lds eax, [ebx]; lss eax, [ebx]
    assert_eq!(rig.run(&[0xc5, 0x03]), Ok(Flow::Next));
    assert_eq!(
        (rig.cpu.gpr(Gpr::Rax), rig.cpu.seg[3].selector),
        (0x1234_5678, USER_SS)
    );
    assert_eq!(rig.run(&[0x0f, 0xb2, 0x03]), gp(USER_SS));
}

#[test]
fn the_task_register_marks_its_tss_busy() {
    let mut rig = Rig::long();
    // ltr ax; str rax
    let ltr = [0x0f, 0x00, 0xd8];
    assert_eq!(
        load(&mut rig, &ltr, TSS_SELECTOR),
        gp(TSS_SELECTOR),
        "busy already"
    );
    assert_eq!(load(&mut rig, &ltr, SECOND_TSS), Ok(Flow::Next));
    assert_eq!(rig.read64(GDT + u64::from(SECOND_TSS)) >> 40 & 0xf, 11);
    assert_eq!(
        (rig.cpu.tr.base, rig.cpu.tr.rights.kind()),
        (TSS + 0x100, 11)
    );
    assert_eq!(rig.run(&[0x48, 0x0f, 0x00, 0xc8]), Ok(Flow::Next));
    assert_eq!(rig.cpu.gpr(Gpr::Rax), u64::from(SECOND_TSS));
    assert_eq!(load(&mut rig, &ltr, 0), GP);
}

#[test]
fn the_local_table() {
    let mut rig = Rig::long();
    let lldt = [0x0f, 0x00, 0xd0];
    assert_eq!(load(&mut rig, &lldt, KERNEL_SS), gp(KERNEL_SS));
    assert_eq!(load(&mut rig, &lldt, LDT_SELECTOR), Ok(Flow::Next));
    assert_eq!((rig.cpu.ldtr.base, rig.cpu.ldtr.limit), (LDT, 0x1f));
    let data = rig.read64(GDT + u64::from(USER_SS & !7));
    rig.write64(LDT + 8, data);
    assert_eq!(load(&mut rig, MOV_DS, 0xf), Ok(Flow::Next));
    assert_eq!(load(&mut rig, MOV_DS, 0x27), gp(0x24));
    assert_eq!(load(&mut rig, &lldt, 0), Ok(Flow::Next));
    assert!(rig.cpu.ldtr.rights.is_unusable());
    rig.write64(GDT + u64::from(LDT_SELECTOR) + 8, 0x8000);
    assert_eq!(
        load(&mut rig, &lldt, LDT_SELECTOR),
        gp(LDT_SELECTOR),
        "a base that is not canonical"
    );
}

#[test]
fn table_registers() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rbx, 0x7000);
    rig.write64(0x7000, 0x8000_0000_0000_0123);
    rig.write16(0x7008, 0x7fff);
    // lgdt [rbx]; sgdt [rbx + 0x10]
    assert_eq!(
        rig.run(&[0x0f, 0x01, 0x13]),
        GP,
        "the base is not canonical"
    );
    rig.write16(0x7008, 0xffff);
    assert_eq!(rig.run(&[0x0f, 0x01, 0x13]), Ok(Flow::Next));
    let expected = TableRegister {
        base: 0xffff_8000_0000_0000,
        limit: 0x123,
    };
    assert_eq!(rig.cpu.gdtr, expected);
    assert_eq!(rig.run(&[0x0f, 0x01, 0x43, 0x10]), Ok(Flow::Next));
    assert_eq!(
        (rig.read64(0x7010), rig.read16(0x7018)),
        (0x8000_0000_0000_0123, 0xffff)
    );
    rig.set_level(3);
    assert_eq!(rig.run(&[0x0f, 0x01, 0x13]), GP);
    rig.cpu.cr4 |= cr4::UMIP;
    assert_eq!(rig.run(&[0x0f, 0x01, 0x43, 0x10]), GP);
    let mut rig = Rig::real();
    rig.cpu.set_gpr(Gpr::Rbx, 0x7000);
    rig.write64(0x7000, 0xaabb_ccdd_eeff_0123);
    // lidt [bx]: 24 bits of base.
    assert_eq!(rig.run(&[0x0f, 0x01, 0x1f]), Ok(Flow::Next));
    assert_eq!(
        rig.cpu.idtr,
        TableRegister {
            base: 0xdd_eeff,
            limit: 0x123
        }
    );
}

#[test]
fn looking_at_descriptors() {
    let mut rig = Rig::long();
    rig.set_level(3);
    // lar ecx, eax; lsl ecx, eax; verw ax
    let (lar, lsl, verw) = ([0x0f, 0x02, 0xc8], [0x0f, 0x03, 0xc8], [0x0f, 0x00, 0xe8]);
    let zero = |rig: &Rig| rig.cpu.rflags & rflags::ZF != 0;
    assert_eq!(load(&mut rig, &lsl, USER_SS), Ok(Flow::Next));
    assert_eq!((rig.cpu.gpr(Gpr::Rcx), zero(&rig)), (0xffff_ffff, true));
    assert_eq!(load(&mut rig, &lar, USER_SS), Ok(Flow::Next));
    assert_eq!((rig.cpu.gpr(Gpr::Rcx), zero(&rig)), (0x00cf_f300, true));
    assert_eq!(load(&mut rig, &lar, KERNEL_SS), Ok(Flow::Next));
    assert_eq!((rig.cpu.gpr(Gpr::Rcx), zero(&rig)), (0x00cf_f300, false));
    assert_eq!(load(&mut rig, &verw, USER_SS), Ok(Flow::Next));
    assert!(zero(&rig));
    assert_eq!(load(&mut rig, &verw, USER_CS), Ok(Flow::Next));
    assert!(!zero(&rig));
    let mut rig = Rig::real();
    assert_eq!(load(&mut rig, &verw, 8), UD);
}

#[test]
fn bases_of_fs_and_gs() {
    let mut rig = Rig::long();
    // wrgsbase rax; rdgsbase rcx
    let (write, read) = (
        [0xf3, 0x48, 0x0f, 0xae, 0xd8],
        [0xf3, 0x48, 0x0f, 0xae, 0xc9],
    );
    assert_eq!(rig.run(&write), UD);
    rig.cpu.cr4 |= cr4::FSGSBASE;
    rig.cpu.set_gpr(Gpr::Rax, 0xffff_8000_1234_0000);
    assert_eq!(rig.run(&write), Ok(Flow::Next));
    assert_eq!(rig.run(&read), Ok(Flow::Next));
    assert_eq!(rig.cpu.gpr(Gpr::Rcx), 0xffff_8000_1234_0000);
    rig.cpu.set_gpr(Gpr::Rax, 0x8000_0000_0000);
    assert_eq!(rig.run(&write), GP);
    rig.cpu.msr.kernel_gs_base = 0x5000;
    assert_eq!(rig.run(&[0x0f, 0x01, 0xf8]), Ok(Flow::Next));
    assert_eq!(rig.cpu.segment(SegmentRegister::Gs).base, 0x5000);
    assert_eq!(rig.cpu.msr.kernel_gs_base, 0xffff_8000_1234_0000);
}

#[test]
fn far_jumps_into_protected_mode_and_compatibility_mode() {
    let mut rig = Rig::protected();
    // jmp 0x08:0x1234
    assert_eq!(rig.run(&[0xea, 0x34, 0x12, 0, 0, 8, 0]), Ok(Flow::Jump));
    assert_eq!((rig.cs(), rig.cpu.rip), (KERNEL_CS, 0x1234));
    assert_eq!(rig.run(&[0xea, 0, 0, 0, 0, 0, 0]), GP);
    assert_eq!(rig.run(&[0xea, 0, 0, 0, 0, USER_CS as u8, 0]), gp(USER_CS));
    let mut rig = Rig::long();
    rig.set_level(3);
    rig.cpu.set_gpr(Gpr::Rbx, 0x7000);
    rig.write32(0x7000, 0x4321);
    rig.write16(0x7004, USER_CS32);
    // jmp far dword [rbx]
    assert_eq!(rig.run(&[0xff, 0x2b]), Ok(Flow::Jump));
    assert_eq!(
        (rig.cpu.rip, rig.cpu.mode(), rig.cpu.cpl),
        (0x4321, Mode::Protected32, 3)
    );
}

#[test]
fn far_calls_return() {
    let mut rig = Rig::long();
    rig.cpu.set_gpr(Gpr::Rbx, 0x7000);
    rig.write64(0x7000, 0x7777);
    rig.write16(0x7008, KERNEL_CS);
    // call far qword [rbx]
    assert_eq!(rig.run(&[0x48, 0xff, 0x1b]), Ok(Flow::Jump));
    assert_eq!((rig.cpu.rip, rig.rsp()), (0x7777, STACK - 16));
    assert_eq!(
        (rig.read64(STACK - 16), rig.read64(STACK - 8)),
        (CODE + 3, 8)
    );
    // retf 8, 64 bits
    assert_eq!(rig.run(&[0x48, 0xca, 8, 0]), Ok(Flow::Jump));
    assert_eq!((rig.cpu.rip, rig.rsp()), (CODE + 3, STACK + 8));
    let mut rig = Rig::real();
    assert_eq!(rig.run(&[0x9a, 0x34, 0x12, 0x00, 0x80]), Ok(Flow::Jump));
    assert_eq!(
        (rig.cpu.cs().base, rig.cpu.rip, rig.rsp()),
        (0x8_0000, 0x1234, 0xeffc)
    );
    assert_eq!(rig.run(&[0xcb]), Ok(Flow::Jump));
    assert_eq!((rig.cs(), rig.cpu.rip, rig.rsp()), (0, CODE + 5, 0xf000));
}

#[test]
fn a_far_return_to_user_code_loads_its_stack() {
    let mut rig = Rig::protected();
    rig.cpu.seg[3] = *rig.cpu.ss();
    rig.frame(
        4,
        &[u64::from(USER_SS), 0x1_8000, u64::from(USER_CS), 0x6000],
    );
    assert_eq!(rig.run(&[0xcb]), Ok(Flow::Jump));
    assert_eq!((rig.cs(), rig.ss(), rig.cpu.cpl), (USER_CS, USER_SS, 3));
    assert_eq!((rig.cpu.rip, rig.rsp()), (0x6000, 0x1_8000));
    assert!(rig.cpu.seg[3].rights.is_unusable());
    // It cannot go inward.
    rig.frame(4, &[u64::from(KERNEL_CS), 0x6000]);
    assert_eq!(rig.run(&[0xcb]), gp(KERNEL_CS));
}

#[test]
fn call_gates_copy_parameters_to_the_inner_stack() {
    let mut rig = Rig::protected();
    rig.set_level(3);
    rig.write64(
        GDT + u64::from(CALL_GATE),
        gate(KERNEL_CS, 0x6000, 0xec) | 2 << 32,
    );
    rig.frame(4, &[0x1111, 0x2222]);
    let selector = CALL_GATE as u8 | 3;
    // call CALL_GATE:0, whose offset does not count
    assert_eq!(rig.run(&[0x9a, 1, 2, 3, 4, selector, 0]), Ok(Flow::Jump));
    assert_eq!(
        (rig.cpu.rip, rig.cs(), rig.ss(), rig.cpu.cpl),
        (0x6000, KERNEL_CS, KERNEL_SS, 0)
    );
    let rsp = STACK0 - 24;
    assert_eq!(rig.rsp(), rsp);
    let expected = [
        CODE as u32 + 7,
        u32::from(USER_CS),
        0x2222,
        0x1111,
        STACK as u32 - 8,
        u32::from(USER_SS),
    ];
    assert_eq!(
        [0, 4, 8, 12, 16, 20].map(|at| rig.read32(rsp + at)),
        expected
    );
    // retf 8 releases them from both stacks.
    assert_eq!(rig.run(&[0xca, 8, 0]), Ok(Flow::Jump));
    assert_eq!((rig.cpu.rip, rig.rsp(), rig.cpu.cpl), (CODE + 7, STACK, 3));
    // A gate for the kernel alone.
    rig.write64(GDT + u64::from(CALL_GATE), gate(KERNEL_CS, 0x6000, 0x8c));
    assert_eq!(rig.run(&[0x9a, 1, 2, 3, 4, selector, 0]), gp(CALL_GATE));
}

#[test]
fn call_gates_of_long_mode() {
    let mut rig = Rig::long();
    rig.set_level(3);
    rig.write64(GDT + u64::from(CALL_GATE), gate(KERNEL_CS, 0x6000, 0xec));
    rig.write64(GDT + u64::from(CALL_GATE) + 8, 0xffff_8000);
    rig.cpu.set_gpr(Gpr::Rbx, 0x7000);
    rig.write16(0x7004, CALL_GATE | 3);
    // call far dword [rbx]
    assert_eq!(rig.run(&[0xff, 0x1b]), Ok(Flow::Jump));
    assert_eq!(
        (rig.cpu.rip, rig.ss(), rig.cpu.cpl),
        (0xffff_8000_0000_6000, 0, 0)
    );
    let rsp = STACK0 - 32;
    let expected = [CODE + 2, u64::from(USER_CS), STACK, u64::from(USER_SS)];
    assert_eq!([0, 8, 16, 24].map(|at| rig.read64(rsp + at)), expected);
    assert_eq!(rig.run(&[0x48, 0xcb]), Ok(Flow::Jump));
    assert_eq!((rig.cpu.rip, rig.rsp(), rig.cpu.cpl), (CODE + 2, STACK, 3));
}

#[test]
fn each_value_of_a_frame_is_aligned_by_itself() {
    for (stack, aligned) in [(STACK, true), (STACK - 4, true), (STACK - 2, false)] {
        let mut rig = Rig::protected();
        rig.set_level(3);
        rig.cpu.cr0 |= cr0::AM;
        rig.cpu.rflags |= rflags::AC;
        rig.cpu.set_gpr(Gpr::Rsp, stack);
        let result = match aligned {
            true => Ok(Flow::Jump),
            false => raises(Exception::alignment_check()),
        };
        let selector = USER_CS.to_le_bytes();
        let call = [0x9a, 0, 0x90, 0, 0, selector[0], selector[1]];
        assert_eq!(rig.run(&call), result, "{stack:#x}");
    }
}

#[test]
fn a_stack_that_ends_faults_without_effect() {
    let mut rig = Rig::protected();
    rig.cpu.seg[2] = Segment {
        limit: 0xfff,
        ..*rig.cpu.ss()
    };
    rig.cpu.set_gpr(Gpr::Rsp, 0x1002);
    assert_eq!(rig.run(&[0x1e]), raises(Exception::stack_fault(0)));
    rig.cpu.set_gpr(Gpr::Rsp, 4);
    // call 8:0x1234 needs eight bytes
    let call = [0x9a, 0x34, 0x12, 0, 0, 8, 0];
    assert_eq!(rig.run(&call), raises(Exception::stack_fault(0)));
}

#[test]
fn the_accessed_bit_is_not_put_into_another_descriptor() {
    let mut rig = Rig::long();
    let at = GDT + u64::from(NOT_PRESENT) + 5;
    let byte = |rig: &Rig| rig.env.ram[at as usize];
    let old = byte(&rig);
    assert_eq!(
        rig.core().exchange_byte(at, old ^ 0x80, 0xff),
        Err(crate::access::Fault::Restart)
    );
    assert_eq!(byte(&rig), old);
    assert_eq!(rig.core().exchange_byte(at, old, 0x93), Ok(()));
    assert_eq!(byte(&rig), 0x93);
    // To a page with traces it goes as a write that they see.
    rig.env.sensed.insert(GDT);
    rig.env.restarts = 1;
    assert!(rig.core().exchange_byte(at, 0x93, 0x92).is_err());
    assert_eq!(byte(&rig), 0x93);
    assert_eq!(rig.core().exchange_byte(at, 0x93, 0x92), Ok(()));
    assert_eq!(byte(&rig), 0x92);
}
