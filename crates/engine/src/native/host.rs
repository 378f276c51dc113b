//! How much vector state the host processor has.

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
