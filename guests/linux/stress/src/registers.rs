//! Holding known values in all registers while something else happens to the thread.

use std::arch::asm;

use crate::bracket::mix;

/// Contents of the vector and mask registers; a narrower register set uses the front.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct Values {
    vectors: [u8; 32 * 64],
    masks: [u64; 7],
}

impl Values {
    /// A pattern that differs in every word and for every seed.
    pub fn pattern(seed: u64) -> Self {
        let mut vectors = [0; 32 * 64];
        for (index, word) in vectors.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&mix(seed << 16 | index as u64).to_le_bytes());
        }
        // The narrowest mask registers have 16 bits.
        let masks = std::array::from_fn(|i| mix(!seed ^ i as u64) & 0xffff);
        Self { vectors, masks }
    }

    fn zero() -> Self {
        Self {
            vectors: [0; 32 * 64],
            masks: [0; 7],
        }
    }
}

/// The widest set of vector registers that the processor shows.
#[derive(Clone, Copy, PartialEq)]
pub enum Width {
    /// XMM0 to XMM15.
    Sse,
    /// YMM0 to YMM15.
    Avx,
    /// ZMM0 to ZMM31 and K1 to K7.
    Avx512,
}

impl Width {
    /// Of this processor.
    pub fn detect() -> Self {
        if is_x86_feature_detected!("avx512f") {
            Self::Avx512
        } else if is_x86_feature_detected!("avx") {
            Self::Avx
        } else {
            Self::Sse
        }
    }

    /// The number of registers, and the bytes of one.
    fn shape(self) -> (usize, usize) {
        match self {
            Self::Sse => (16, 16),
            Self::Avx => (16, 32),
            Self::Avx512 => (32, 64),
        }
    }
}

/// What is held beside the vectors, and how long.
struct Hold {
    /// R12 to R15 and RDX.
    general: [u64; 5],
    /// The caller's MXCSR, the one that is held, and what is left of it.
    mxcsr: [u32; 3],
    /// Rounds of the loop.
    spins: u64,
    /// Whether each round makes the system call sched_yield.
    yields: bool,
}

/// The code of [`hold`] for one width.
macro_rules! holder {
    ($name:ident, $feature:literal, $move:literal, $register:literal, $size:literal,
     [$($n:literal)*], [$($extra_in:literal)*], [$($extra_out:literal)*], [$($clobber:tt)*]) => {
        #[target_feature(enable = $feature)]
        unsafe fn $name(hold: &mut Hold, input: &Values, output: &mut Values) {
            let [mut a, mut b, mut c, mut d, mut e] = hold.general;
            // SAFETY: the vectors lie in the buffers, everything that changes is named, and the
            // caller's MXCSR is put back.
            unsafe {
                asm!(
                    "stmxcsr [r9]",
                    "ldmxcsr [r9 + 4]",
                    $(concat!($move, " ", $register, $n, ", [rsi + ", $n, "*", $size, "]"),)*
                    $($extra_in,)*
                    "2:",
                    "test r10, r10",
                    "jz 3f",
                    "mov eax, 24", // sched_yield
                    "syscall",
                    "3:",
                    "dec r8",
                    "jnz 2b",
                    $(concat!($move, " [rdi + ", $n, "*", $size, "], ", $register, $n),)*
                    $($extra_out,)*
                    "stmxcsr [r9 + 8]",
                    "ldmxcsr [r9]",
                    inout("r8") hold.spins => _,
                    in("r9") hold.mxcsr.as_mut_ptr(),
                    in("r10") u64::from(hold.yields),
                    in("rsi") std::ptr::from_ref(input),
                    in("rdi") std::ptr::from_mut(output),
                    inout("r12") a, inout("r13") b, inout("r14") c, inout("r15") d,
                    inout("rdx") e,
                    out("rax") _, out("rcx") _, out("r11") _,
                    $(out($clobber) _,)*
                );
            }
            hold.general = [a, b, c, d, e];
        }
    };
}

holder!(hold_sse, "sse2", "movups", "xmm", 16,
    [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], [], [],
    ["xmm0" "xmm1" "xmm2" "xmm3" "xmm4" "xmm5" "xmm6" "xmm7"
     "xmm8" "xmm9" "xmm10" "xmm11" "xmm12" "xmm13" "xmm14" "xmm15"]);

holder!(hold_avx, "avx", "vmovups", "ymm", 32,
    [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], [], [],
    ["ymm0" "ymm1" "ymm2" "ymm3" "ymm4" "ymm5" "ymm6" "ymm7"
     "ymm8" "ymm9" "ymm10" "ymm11" "ymm12" "ymm13" "ymm14" "ymm15"]);

holder!(hold_avx512, "avx512f", "vmovups", "zmm", 64,
    [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31],
    ["kmovw k1, [rsi + 2048]" "kmovw k2, [rsi + 2056]" "kmovw k3, [rsi + 2064]"
     "kmovw k4, [rsi + 2072]" "kmovw k5, [rsi + 2080]" "kmovw k6, [rsi + 2088]"
     "kmovw k7, [rsi + 2096]"],
    ["kmovw [rdi + 2048], k1" "kmovw [rdi + 2056], k2" "kmovw [rdi + 2064], k3"
     "kmovw [rdi + 2072], k4" "kmovw [rdi + 2080], k5" "kmovw [rdi + 2088], k6"
     "kmovw [rdi + 2096], k7"],
    ["zmm0" "zmm1" "zmm2" "zmm3" "zmm4" "zmm5" "zmm6" "zmm7" "zmm8" "zmm9" "zmm10" "zmm11"
     "zmm12" "zmm13" "zmm14" "zmm15" "zmm16" "zmm17" "zmm18" "zmm19" "zmm20" "zmm21" "zmm22"
     "zmm23" "zmm24" "zmm25" "zmm26" "zmm27" "zmm28" "zmm29" "zmm30" "zmm31"
     "k1" "k2" "k3" "k4" "k5" "k6" "k7"]);

/// Loads all registers, spends `spins` rounds (each with the system call sched_yield if `yields`)
/// and compares.
///
/// # Errors
/// Which register changed.
pub fn hold(width: Width, seed: u64, spins: u64, yields: bool) -> Result<(), String> {
    let (input, mut output) = (Values::pattern(seed), Values::zero());
    let general = std::array::from_fn(|i| mix(seed ^ (i as u64) << 32));
    // All exceptions masked, and one of the four rounding modes.
    let mxcsr = 0x1f80 | (seed as u32 & 3) << 13;
    let mut hold = Hold {
        general,
        mxcsr: [0, mxcsr, 0],
        spins: spins.max(1),
        yields,
    };
    // SAFETY: the width was detected.
    unsafe {
        match width {
            Width::Sse => hold_sse(&mut hold, &input, &mut output),
            Width::Avx => hold_avx(&mut hold, &input, &mut output),
            Width::Avx512 => hold_avx512(&mut hold, &input, &mut output),
        }
    }
    let (count, size) = width.shape();
    if let Some(at) = (0..count * size).find(|&at| input.vectors[at] != output.vectors[at]) {
        return Err(format!(
            "vector register {}, byte {} changed",
            at / size,
            at % size
        ));
    }
    if width == Width::Avx512 && input.masks != output.masks {
        return Err(format!(
            "masks changed from {:x?} to {:x?}",
            input.masks, output.masks
        ));
    }
    if hold.general != general {
        return Err(format!(
            "registers changed from {general:x?} to {:x?}",
            hold.general
        ));
    }
    if hold.mxcsr[2] != mxcsr {
        return Err(format!(
            "MXCSR changed from {mxcsr:#x} to {:#x}",
            hold.mxcsr[2]
        ));
    }
    Ok(())
}

/// Destroys the contents of all vector registers of the set.
pub fn clobber(width: Width) {
    // Any other pattern does; what `hold` checks of its own registers is not of interest here.
    let _ = hold(width, 0xdead, 1, false);
}
