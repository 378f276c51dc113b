//! Bits of paging-structure entries (SDM vol. 3, tables 4-4 to 4-20).

pub const P: u64 = 1 << 0;
pub const RW: u64 = 1 << 1;
pub const US: u64 = 1 << 2;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
/// Page size: the entry maps a page. In a 4 KiB page's entry the bit belongs to the PAT index.
pub const PS: u64 = 1 << 7;
pub const G: u64 = 1 << 8;
pub const XD: u64 = 1 << 63;

/// Bits `lo` up to but not including `hi`.
pub const fn bits(lo: u32, hi: u32) -> u64 {
    if lo >= hi {
        0
    } else {
        (u64::MAX >> (64 - (hi - lo))) << lo
    }
}
