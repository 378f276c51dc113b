//! Vector arithmetic, recomputed by scalar instructions, and its registers among many threads.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::Load;
use crate::bracket::{Outcome, Verdict, mix};
use crate::registers::{self, Width};

/// Doublewords that one round takes in: one 512-bit register or several narrower ones.
const LANES: usize = 16;

/// One lane of one round: integers (multiply, add, shift, exclusive or), and floats that are exact
/// by IEEE 754 (multiply, add, divide, square root).
fn lane(x: u32, y: u32) -> (u32, f32) {
    let product = x.wrapping_mul(y).wrapping_add(0x9e37_79b9);
    let integer = product ^ (product >> 15) ^ (product << 7);
    let a = (x >> 8) as i32 as f32;
    let b = (y >> 8) as i32 as f32;
    (integer, ((a * b + a) / (b + 1.0)).sqrt())
}

fn start(index: usize) -> (u32, u32) {
    (mix(index as u64) as u32, mix(!(index as u64)) as u32)
}

/// Runs the rounds on every lane with scalar instructions.
fn scalar(rounds: u32) -> [(u32, u32); LANES] {
    std::array::from_fn(|index| {
        let (mut x, mut y) = start(index);
        for _ in 0..rounds {
            let (integer, float) = lane(std::hint::black_box(x), y);
            (x, y) = (y, integer ^ float.to_bits());
        }
        (x, y)
    })
}

/// Compares the lanes of a vector run with the scalar ones.
fn compare(load: Load, x: [u32; LANES], y: [u32; LANES]) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let mut sum = 0;
    for (index, (sx, sy)) in scalar(load.rounds).into_iter().enumerate() {
        verdict.equal(&format!("x of lane {index}"), x[index], sx);
        verdict.equal(&format!("y of lane {index}"), y[index], sy);
        sum = mix(sum ^ u64::from(x[index]) << 32 ^ u64::from(y[index]));
    }
    verdict.finish(sum)
}

/// The same rounds with one set of vector instructions.
macro_rules! vectorized {
    ($name:ident, $feature:literal, $integer:ident, $lanes:literal, $load:ident, $store:ident,
     $set:ident, $multiply:ident, $add:ident, $xor:ident, $right:ident, $left:ident,
     $convert:ident, $fmul:ident, $fadd:ident, $fdiv:ident, $sqrt:ident, $one:ident, $bits:ident) => {
        #[target_feature(enable = $feature)]
        unsafe fn $name(rounds: u32, x: &mut [u32; LANES], y: &mut [u32; LANES]) {
            for (xs, ys) in x.chunks_exact_mut($lanes).zip(y.chunks_exact_mut($lanes)) {
                // SAFETY: the chunks have the size of the vector, and the loads are unaligned ones.
                let (mut a, mut b) = unsafe {
                    (
                        $load(xs.as_ptr().cast::<$integer>()),
                        $load(ys.as_ptr().cast::<$integer>()),
                    )
                };
                for _ in 0..rounds {
                    let product = $add($multiply(a, b), $set(0x9e37_79b9_u32 as i32));
                    let mixed = $xor($xor(product, $right::<15>(product)), $left::<7>(product));
                    let fa = $convert($right::<8>(a));
                    let fb = $convert($right::<8>(b));
                    let float = $sqrt($fdiv($fadd($fmul(fa, fb), fa), $fadd(fb, $one(1.0))));
                    a = b;
                    b = $xor(mixed, $bits(float));
                }
                // SAFETY: as above.
                unsafe {
                    $store(xs.as_mut_ptr().cast::<$integer>(), a);
                    $store(ys.as_mut_ptr().cast::<$integer>(), b);
                }
            }
        }
    };
}

vectorized!(
    rounds_128,
    "sse4.1",
    __m128i,
    4,
    _mm_loadu_si128,
    _mm_storeu_si128,
    _mm_set1_epi32,
    _mm_mullo_epi32,
    _mm_add_epi32,
    _mm_xor_si128,
    _mm_srli_epi32,
    _mm_slli_epi32,
    _mm_cvtepi32_ps,
    _mm_mul_ps,
    _mm_add_ps,
    _mm_div_ps,
    _mm_sqrt_ps,
    _mm_set1_ps,
    _mm_castps_si128
);
vectorized!(
    rounds_256,
    "avx2",
    __m256i,
    8,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    _mm256_set1_epi32,
    _mm256_mullo_epi32,
    _mm256_add_epi32,
    _mm256_xor_si256,
    _mm256_srli_epi32,
    _mm256_slli_epi32,
    _mm256_cvtepi32_ps,
    _mm256_mul_ps,
    _mm256_add_ps,
    _mm256_div_ps,
    _mm256_sqrt_ps,
    _mm256_set1_ps,
    _mm256_castps_si256
);
vectorized!(
    rounds_512,
    "avx512f",
    __m512i,
    16,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    _mm512_set1_epi32,
    _mm512_mullo_epi32,
    _mm512_add_epi32,
    _mm512_xor_si512,
    _mm512_srli_epi32,
    _mm512_slli_epi32,
    _mm512_cvtepi32_ps,
    _mm512_mul_ps,
    _mm512_add_ps,
    _mm512_div_ps,
    _mm512_sqrt_ps,
    _mm512_set1_ps,
    _mm512_castps_si512
);

/// The code of one width.
type Rounds = unsafe fn(u32, &mut [u32; LANES], &mut [u32; LANES]);

fn run(load: Load, rounds: Rounds) -> Result<Outcome, String> {
    let mut x = std::array::from_fn(|index| start(index).0);
    let mut y = std::array::from_fn(|index| start(index).1);
    // SAFETY: the callers have detected the instructions.
    unsafe { rounds(load.rounds, &mut x, &mut y) };
    compare(load, x, y)
}

pub fn sse(load: Load) -> Result<Outcome, String> {
    if !is_x86_feature_detected!("sse4.1") {
        return Ok(Outcome::Skipped("no SSE4.1 in CPUID"));
    }
    run(load, rounds_128)
}

pub fn avx2(load: Load) -> Result<Outcome, String> {
    if !is_x86_feature_detected!("avx2") {
        return Ok(Outcome::Skipped("no AVX2 in CPUID"));
    }
    run(load, rounds_256)
}

pub fn avx512(load: Load) -> Result<Outcome, String> {
    if !is_x86_feature_detected!("avx512f") {
        return Ok(Outcome::Skipped("no AVX-512 in CPUID"));
    }
    run(load, rounds_512)
}

/// 63-bit products and sums on the x87 stack, which are exact in its 64-bit significand.
pub fn x87(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let mut sum = 0;
    for round in 0..load.rounds {
        let a = (mix(u64::from(round)) >> 33) as i64;
        let b = (mix(!u64::from(round)) >> 33) as i64 - (1 << 30);
        let c = i64::from(round);
        let mut result = 0_i64;
        let operands = [a, b, c];
        // SAFETY: the stack is empty before and after, and the operands are alive.
        unsafe {
            asm!("fild qword ptr [{i}]", "fild qword ptr [{i} + 8]", "fmulp st(1), st",
                "fild qword ptr [{i} + 16]", "fsubp st(1), st", "fistp qword ptr [{o}]",
                i = in(reg) operands.as_ptr(), o = in(reg) &raw mut result,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _);
        }
        if !verdict.equal(&format!("the result of round {round}"), result, a * b - c) {
            break;
        }
        sum = mix(sum ^ result as u64);
    }
    verdict.finish(sum)
}

/// Many threads hold different values in all registers and let each other run.
pub fn threads(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let width = Width::detect();
    let count = u64::from(load.threads) * 2;
    std::thread::scope(|scope| {
        for thread in 0..count {
            let verdict = &verdict;
            scope.spawn(move || {
                for round in 0..load.rounds {
                    let seed = thread << 32 | u64::from(round);
                    if let Err(message) = registers::hold(width, seed, 10, true) {
                        verdict.fail(format!("thread {thread}, round {round}: {message}"));
                    }
                    if verdict.has_failed() {
                        return;
                    }
                }
            });
        }
    });
    verdict.finish(mix(count << 32 | u64::from(load.rounds)))
}
