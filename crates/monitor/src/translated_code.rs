//! What is told about translations, for those who profile them.

use trapline_engine::tlb::Privilege;

/// A translation that was made.
#[derive(Clone, Copy, Debug)]
pub struct TranslatedCode<'a> {
    /// Where its guest code begins.
    pub rip: u64,
    pub privilege: Privilege,
    /// It goes on behind branches.
    pub is_path: bool,
    /// Where its host code begins.
    pub address: u64,
    pub code: &'a [u8],
}

/// Hears of translations on the thread of the VCPU that makes them.
pub trait CodeObserver: Send + Sync {
    fn translated(&self, code: TranslatedCode<'_>);
}
