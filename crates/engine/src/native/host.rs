//! What the host processor has and does.
#![allow(unsafe_code)]

use std::arch::asm;
use std::sync::OnceLock;

/// The adjust flag in AH, as LAHF and SAHF see it.
const ADJUST: u16 = 0x10 << 8;

/// Whether AND, OR, XOR and TEST clear the adjust flag, whatever it was: the manuals leave that
/// open, so it is tried.
pub(crate) fn logic_clears_adjust() -> bool {
    static CLEARS: OnceLock<bool> = OnceLock::new();
    macro_rules! after {
        ($($instruction:literal),*) => {
            [$({
                let flags: u16;
                // SAFETY: only registers and flags that are named here change.
                unsafe {
                    asm!(
                        "sahf",
                        $instruction,
                        "lahf",
                        inout("ax") 0xd700u16 => flags,
                        inout("ecx") 0x1234_5678u32 => _,
                        in("edx") 0x0f1e_2d3cu32,
                        options(nomem, nostack),
                    );
                }
                flags
            }),*]
        };
    }
    *CLEARS.get_or_init(|| {
        let flags = after![
            "and ecx, edx",
            "or ecx, edx",
            "xor ecx, edx",
            "xor ecx, ecx",
            "test ecx, edx",
            "and cl, dl",
            "test ecx, 8",
            "or rcx, rdx"
        ];
        flags.iter().all(|flags| flags & ADJUST == 0)
    })
}

/// The widest vector registers of the host, all of which thunks load and store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum VectorWidth {
    Xmm,
    Ymm,
    Zmm,
}

/// Vector features of the host processor that its operating system has enabled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    pub width: VectorWidth,
    /// Opmask registers have 64 bits, not 16.
    pub wide_masks: bool,
}

impl Host {
    pub fn detect() -> Self {
        let width = if is_x86_feature_detected!("avx512f") {
            VectorWidth::Zmm
        } else if is_x86_feature_detected!("avx") {
            VectorWidth::Ymm
        } else {
            VectorWidth::Xmm
        };
        Self {
            width,
            wide_masks: is_x86_feature_detected!("avx512bw"),
        }
    }

    /// Vector registers, a bit each.
    pub fn vectors(self) -> u32 {
        if self.width == VectorWidth::Zmm {
            u32::MAX
        } else {
            0xffff
        }
    }

    pub fn masks(self) -> u8 {
        if self.width == VectorWidth::Zmm {
            0xff
        } else {
            0
        }
    }
}
