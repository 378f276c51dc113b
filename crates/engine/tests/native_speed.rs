//! How long calls of thunks take. Measures, asserts nothing:
//! `cargo test -p trapline-engine --test native_speed -- --ignored --nocapture`.

#![allow(unsafe_code)]

use std::hint::black_box;
use std::time::Instant;

use iced_x86::{Decoder, DecoderOptions, Instruction};
use trapline_engine::native::{self, NativeCode};
use trapline_x86::CpuState;

fn decode(bytes: &[u8]) -> Instruction {
    Decoder::new(64, bytes, DecoderOptions::NONE).decode()
}

const CALLS: u32 = 20_000_000;

#[test]
#[ignore = "measures speed"]
fn calls_per_second() {
    let single: [(&str, &[u8]); 14] = [
        ("mov rax,rbx", &[0x48, 0x89, 0xd8]),
        ("add rax,rbx", &[0x48, 0x01, 0xd8]),
        ("adc rax,rbx", &[0x48, 0x11, 0xd8]),
        ("cmp rax,rbx", &[0x48, 0x39, 0xd8]),
        ("shl rax,3", &[0x48, 0xc1, 0xe0, 3]),
        ("inc rax", &[0x48, 0xff, 0xc0]),
        ("imul rax,rbx", &[0x48, 0x0f, 0xaf, 0xc3]),
        ("setz al", &[0x0f, 0x94, 0xc0]),
        ("mov [m],rax", &[0x48, 0x89, 0x01]),
        ("mov rax,[m]", &[0x48, 0x8b, 0x01]),
        ("paddd xmm0,xmm1", &[0x66, 0x0f, 0xfe, 0xc1]),
        ("movdqu xmm0,[m]", &[0xf3, 0x0f, 0x6f, 0x01]),
        ("addsd xmm0,xmm1", &[0xf2, 0x0f, 0x58, 0xc1]),
        ("fadd st,st(1)", &[0xd8, 0xc1]),
    ];
    let mut code = NativeCode::new().expect("native code");
    let mut cpu = CpuState::reset();
    let mut memory = [0u64; 8];
    let operand: *mut u8 = memory.as_mut_ptr().cast();
    let mut measure = |name: &str, thunk, per_call: u32| {
        let begin = Instant::now();
        for _ in 0..CALLS / per_call {
            // SAFETY: the thunk is fresh; the operand is large enough.
            let _ = unsafe { native::call(black_box(thunk), black_box(&mut cpu), operand) };
        }
        let each = begin.elapsed().as_secs_f64() / f64::from(CALLS / per_call * per_call);
        println!(
            "{name:18} {:6.2} ns an instruction, {:7.1} million/s",
            each * 1e9,
            1e-6 / each
        );
    };
    for (name, bytes) in single {
        measure(name, code.thunk(&decode(bytes)).expect("supported"), 1);
    }
    let run: Vec<Instruction> = [
        &[0x48, 0x01, 0xd8][..],
        &[0x48, 0x31, 0xd1],
        &[0x48, 0x29, 0xce],
        &[0x48, 0x8d, 0x3c, 0x08],
    ]
    .into_iter()
    .map(decode)
    .collect();
    measure("run of 4", code.thunk_run(&run).expect("supported"), 4);

    let begin = Instant::now();
    for i in 0..100_000u32 {
        let mut bytes = [0x48, 0x05, 0, 0, 0, 0];
        bytes[2..].copy_from_slice(&i.to_le_bytes());
        code.thunk(&decode(&bytes)).expect("room");
    }
    println!(
        "compiling          {:6.0} ns an instruction",
        begin.elapsed().as_secs_f64() * 1e4
    );
}
