use iced_x86::{Decoder, DecoderOptions, Instruction};
use trapline_x86::CpuState;

use super::*;

fn decode(bitness: u32, bytes: &[u8]) -> Instruction {
    Decoder::new(bitness, bytes, DecoderOptions::NONE).decode()
}

/// Runs one instruction and gives its outcome.
fn run(cpu: &mut CpuState, bitness: u32, bytes: &[u8], operand: *mut u8) -> Result<(), HostFault> {
    let mut native = NativeCode::new().expect("native code");
    let thunk = native.thunk(&decode(bitness, bytes)).expect("supported");
    // SAFETY: `native` lives; the tests pass operands of the right size.
    unsafe { call(thunk, cpu, operand) }
}

fn registers(bitness: u32, bytes: &[u8], set: &[(usize, u64)]) -> CpuState {
    let mut cpu = CpuState::reset();
    for &(register, value) in set {
        cpu.gpr[register] = value;
    }
    run(&mut cpu, bitness, bytes, std::ptr::null_mut()).expect("no fault");
    cpu
}

#[test]
fn adds_and_sets_flags() {
    let cpu = registers(64, &[0x48, 0x01, 0xd8], &[(0, u64::MAX), (3, 1)]);
    assert_eq!(cpu.gpr[0], 0);
    assert_eq!(cpu.rflags, 2 | 0x40 | 0x10 | 0x4 | 1);
}

#[test]
fn renames_the_stack_pointer() {
    // add rsp, rax; mov ah, bh; mov spl, 7
    assert_eq!(
        registers(64, &[0x48, 0x01, 0xc4], &[(0, 5), (4, 0x1000)]).gpr[4],
        0x1005
    );
    assert_eq!(
        registers(64, &[0x88, 0xfc], &[(0, 5), (3, 0x1234)]).gpr[0],
        0x1205
    );
    assert_eq!(
        registers(64, &[0x40, 0xb4, 7], &[(4, 0xffff)]).gpr[4],
        0xff07
    );
}

#[test]
fn runs_short_forms_of_other_modes() {
    // inc eax; add al, 3 (82 /0)
    assert_eq!(registers(32, &[0x40], &[(0, 7)]).gpr[0], 8);
    assert_eq!(registers(32, &[0x82, 0xc0, 3], &[(0, 7)]).gpr[0], 10);
    // inc ax
    assert_eq!(registers(16, &[0x40], &[(0, 0x1_ffff)]).gpr[0], 0x1_0000);
}

#[test]
fn keeps_flags_that_a_shift_by_zero_keeps() {
    let mut cpu = CpuState::reset();
    for flags in [2, 2 | 0x8d5, 2 | 0x801, 2 | 0x44] {
        cpu.rflags = flags;
        cpu.gpr[1] = 0;
        // shl eax, cl
        run(&mut cpu, 64, &[0xd3, 0xe0], std::ptr::null_mut()).expect("no fault");
        assert_eq!(cpu.rflags, flags);
    }
}

#[test]
fn replaces_the_memory_operand() {
    let mut cpu = CpuState::reset();
    let mut memory = 5u64;
    let operand = (&raw mut memory).cast();
    cpu.gpr[7] = 3;
    // lock xadd [rsp+rsi*8+0x12345678], rdi
    let bytes = [0xf0, 0x48, 0x0f, 0xc1, 0xbc, 0xf4, 0x78, 0x56, 0x34, 0x12];
    run(&mut cpu, 64, &bytes, operand).expect("no fault");
    assert_eq!((memory, cpu.gpr[7]), (8, 5));
    // mov [rdi], ah
    cpu.gpr[0] = 0x4200;
    run(&mut cpu, 64, &[0x88, 0x27], operand).expect("no fault");
    assert_eq!(memory, 0x42);
}

#[test]
fn reports_faults_without_effect() {
    let mut cpu = CpuState::reset();
    cpu.gpr[3] = 77;
    let before = cpu.clone();
    // div bl with 0 in ebp as r13... : div ebp; ud via an unaligned movaps
    assert_eq!(
        run(&mut cpu, 64, &[0xf7, 0xf5], std::ptr::null_mut()),
        Err(HostFault { vector: 0 })
    );
    assert_eq!(cpu, before);
    let mut memory = [0u128; 3];
    let unaligned = memory.as_mut_ptr().cast::<u8>().wrapping_add(8);
    let outcome = run(&mut cpu, 64, &[0x0f, 0x28, 0x00], unaligned);
    assert_eq!(outcome, Err(HostFault { vector: 13 }));
    assert_eq!(
        run(&mut cpu, 64, &[0x8b, 0x00], std::ptr::null_mut()),
        Err(HostFault { vector: 14 })
    );
    assert_eq!(cpu, before);
}

#[test]
fn raises_unmasked_simd_exceptions_with_their_flags() {
    let mut cpu = CpuState::reset();
    cpu.vector.mxcsr = 0x1f80 & !0x200;
    cpu.vector.zmm[0].0[..4].copy_from_slice(&1f32.to_le_bytes());
    // divss xmm0, xmm1
    let bytes = [0xf3, 0x0f, 0x5e, 0xc1];
    assert_eq!(
        run(&mut cpu, 64, &bytes, std::ptr::null_mut()),
        Err(HostFault { vector: 19 })
    );
    assert_eq!(cpu.vector.mxcsr, (0x1f80 & !0x200) | 4);
    assert_eq!(cpu.vector.zmm[0].0[..4], 1f32.to_le_bytes());
    cpu.vector.mxcsr = 0x1f80;
    run(&mut cpu, 64, &bytes, std::ptr::null_mut()).expect("masked");
    assert_eq!(cpu.vector.zmm[0].0[..4], f32::INFINITY.to_le_bytes());
    assert_eq!(cpu.vector.mxcsr, 0x1f84);
}

#[test]
fn keeps_host_addresses_out_of_the_x87_image() {
    let mut cpu = CpuState::reset();
    cpu.rip = 0x1234_5678;
    let mut memory = 2.5f64;
    // fld qword [rax]
    run(&mut cpu, 64, &[0xdd, 0x00], (&raw mut memory).cast()).expect("no fault");
    assert_eq!(cpu.vector.x87.0[4], 0x80);
    let pointer = |at: usize| u64::from_le_bytes(cpu.vector.x87.0[at..at + 8].try_into().unwrap());
    assert!([0, 0x1234_5678].contains(&pointer(8)), "{:x}", pointer(8));
    assert_eq!(pointer(16), 0);
}

#[test]
fn a_run_executes_all_or_nothing() {
    let mut native = NativeCode::new().expect("native code");
    // mov ebx, 7; add rax, rbx; sbb rdx, rdx
    let code = [
        &[0xbb, 7, 0, 0, 0][..],
        &[0x48, 0x01, 0xd8],
        &[0x48, 0x19, 0xd2],
    ];
    let instructions: Vec<Instruction> = code.iter().map(|bytes| decode(64, bytes)).collect();
    let thunk = native.thunk_run(&instructions).expect("supported");
    let mut cpu = CpuState::reset();
    cpu.gpr[0] = u64::MAX;
    // SAFETY: `native` lives; no memory operand.
    unsafe { call(thunk, &mut cpu, std::ptr::null_mut()) }.expect("no fault");
    assert_eq!((cpu.gpr[0], cpu.gpr[3], cpu.gpr[2]), (6, 7, u64::MAX));

    let code = [&[0xbb, 0, 0, 0, 0][..], &[0x48, 0xf7, 0xf3]];
    let instructions: Vec<Instruction> = code.iter().map(|bytes| decode(64, bytes)).collect();
    let thunk = native.thunk_run(&instructions).expect("supported");
    let before = cpu.clone();
    // SAFETY: as above.
    let outcome = unsafe { call(thunk, &mut cpu, std::ptr::null_mut()) };
    assert_eq!(outcome, Err(HostFault { vector: 0 }));
    assert_eq!(cpu, before);
}

#[test]
fn leaves_what_is_not_native_alone() {
    let not: [(u32, &[u8]); 22] = [
        (64, &[0xc3]),
        (64, &[0x50]),
        (64, &[0x9c]),
        (64, &[0xa4]),
        (64, &[0x0f, 0xa2]),
        (64, &[0x0f, 0x31]),
        (64, &[0x0f, 0x01, 0xd0]),
        (64, &[0x0f, 0xae, 0x00]),
        (64, &[0x0f, 0xae, 0x10]),
        (64, &[0x0f, 0xae, 0x18]),
        (64, &[0x8e, 0xd8]),
        (64, &[0x8c, 0xd8]),
        (64, &[0x0f, 0x20, 0xc0]),
        (64, &[0xe4, 0x10]),
        (64, &[0xfa]),
        (64, &[0xfc]),
        (64, &[0xd7]),
        (64, &[0x0f, 0xa3, 0x08]),
        (64, &[0x48, 0x8d, 0x05, 0, 0, 0, 0]),
        (64, &[0x66, 0x0f, 0xf7, 0xc1]),
        (32, &[0x27]),
        (32, &[0x62, 0x00]),
    ];
    for (bitness, bytes) in not {
        let instruction = decode(bitness, bytes);
        assert!(!instruction.is_invalid());
        assert!(
            !supports(&instruction, &mut InstructionInfoFactory::new()),
            "{:?}",
            instruction.code()
        );
    }
}

#[test]
fn thunks_are_shared_and_discarded() {
    let mut native = NativeCode::new().expect("native code");
    let first = native
        .thunk(&decode(64, &[0x48, 0x8b, 0x43, 0x10]))
        .expect("supported");
    let second = native
        .thunk(&decode(64, &[0x48, 0x8b, 0x04, 0x9e]))
        .expect("supported");
    assert_eq!(first.0 as usize, second.0 as usize);
    native.reset();
    let third = native.thunk(&decode(64, &[0x01, 0xc0])).expect("supported");
    assert_eq!(first.0 as usize, third.0 as usize);
}

#[test]
fn bad_state_is_a_fault_not_the_end() {
    let mut cpu = CpuState::reset();
    cpu.vector.mxcsr = u32::MAX;
    let before = cpu.clone();
    // addss xmm0, xmm1; cvtpi2ps xmm0, mm1
    for bytes in [&[0xf3, 0x0f, 0x58, 0xc1][..], &[0x0f, 0x2a, 0xc1]] {
        let outcome = run(&mut cpu, 64, bytes, std::ptr::null_mut());
        assert_eq!(outcome, Err(HostFault { vector: 13 }));
        assert_eq!(cpu.vector.mxcsr, before.vector.mxcsr);
    }
    // fld1, with reserved MXCSR bits in the image
    cpu.vector.x87.0[24..28].fill(0xff);
    run(&mut cpu, 64, &[0xd9, 0xe8], std::ptr::null_mut()).expect("no fault");
    assert_eq!(cpu.vector.x87.0[4], 0x80);
}
