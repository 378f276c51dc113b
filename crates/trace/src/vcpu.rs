//! Virtual processors and sets of them.

/// The most VCPUs of a machine: a set of them is one word.
pub const MAX_VCPUS: usize = 64;

/// One VCPU, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(u8);

impl VcpuId {
    /// The VCPU with this index; indices wrap at [`MAX_VCPUS`].
    pub const fn new(index: usize) -> Self {
        Self((index % MAX_VCPUS) as u8)
    }
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A set of VCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VcpuSet(u64);

impl VcpuSet {
    pub const EMPTY: Self = Self(0);

    /// The set whose member `n` is bit `n`.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
    pub const fn bits(self) -> u64 {
        self.0
    }
    pub const fn one(vcpu: VcpuId) -> Self {
        Self(1 << vcpu.0)
    }
    /// The first `count` VCPUs.
    pub const fn first(count: usize) -> Self {
        if count >= MAX_VCPUS {
            Self(u64::MAX)
        } else {
            Self((1 << count) - 1)
        }
    }
    pub const fn contains(self, vcpu: VcpuId) -> bool {
        self.0 & (1 << vcpu.0) != 0
    }
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    pub const fn without(self, vcpu: VcpuId) -> Self {
        Self(self.0 & !(1 << vcpu.0))
    }
    pub const fn minus(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
    pub const fn overlaps(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }
    /// The members in ascending order.
    pub fn iter(self) -> impl Iterator<Item = VcpuId> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            let index = left.trailing_zeros() as usize;
            left &= left.wrapping_sub(1);
            (index < MAX_VCPUS).then(|| VcpuId::new(index))
        })
    }
}

impl FromIterator<VcpuId> for VcpuSet {
    fn from_iter<I: IntoIterator<Item = VcpuId>>(vcpus: I) -> Self {
        vcpus
            .into_iter()
            .fold(Self::EMPTY, |set, v| set.union(Self::one(v)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members() {
        let set = VcpuSet::from_bits(1 << 63 | 0b101);
        let members: Vec<usize> = set.iter().map(VcpuId::index).collect();
        assert_eq!(members, [0, 2, 63]);
        assert_eq!(set.iter().collect::<VcpuSet>(), set);
        assert_eq!(VcpuSet::EMPTY.iter().count(), 0);
        assert_eq!(VcpuSet::first(64).len(), 64);
        assert_eq!(set.minus(VcpuSet::first(2)).bits(), 1 << 63 | 0b100);
        assert!(set.overlaps(VcpuSet::first(1)) && !set.overlaps(VcpuSet::from_bits(2)));
    }
}
