//! Vector, mask and x87 register state, as memory that thunks load from and store to.

/// Bytes of an FXSAVE image (SDM vol. 1, table 10-2).
pub const FXSAVE_BYTES: usize = 512;
/// MXCSR after reset: all exceptions masked, round to nearest.
pub const MXCSR_RESET: u32 = 0x1f80;
/// x87 control word after reset and FNINIT (SDM vol. 3, table 9-1, the FINIT column: Linux starts
/// with it as hypervisors leave it).
pub const FCW_INIT: u16 = 0x037f;

/// One ZMM register; the lower halves are the YMM and XMM registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(64))]
pub struct Zmm(pub [u8; 64]);

/// The x87/MMX registers as an FXSAVE64 image. Only its x87 part counts: control, status, abridged
/// tag, opcode, last instruction and data pointers, ST0 to ST7. Its XMM part is scratch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(64))]
pub struct X87(pub [u8; FXSAVE_BYTES]);

impl X87 {
    /// The state after FNINIT, with an MXCSR field that FXRSTOR accepts.
    pub fn init() -> Self {
        let mut image = [0; FXSAVE_BYTES];
        image[0..2].copy_from_slice(&FCW_INIT.to_le_bytes());
        image[24..28].copy_from_slice(&MXCSR_RESET.to_le_bytes());
        Self(image)
    }
}

/// Everything that XSAVE saves for the features passed through.
#[derive(Clone, PartialEq, Eq, Debug)]
#[repr(C, align(64))]
pub struct VectorState {
    pub zmm: [Zmm; 32],
    pub x87: X87,
    /// Opmask registers k0 to k7.
    pub k: [u64; 8],
    pub mxcsr: u32,
}

impl Default for VectorState {
    fn default() -> Self {
        Self {
            zmm: [Zmm([0; 64]); 32],
            x87: X87::init(),
            k: [0; 8],
            mxcsr: MXCSR_RESET,
        }
    }
}
