//! One look-up for several accesses at constant distances from each other.
//!
//! Accesses of a block whose addresses differ from the first one's by constants, because they are
//! formed from the same registers, are a *group*: the
//! first of them, its *leader*, looks up the *window* that all of them lie in and keeps the host
//! address of its start in the frame; the others use that. The window is found only if it lies on
//! one page and, if some of the accesses write, may be written to. Otherwise the block goes on in
//! its *unshared* translation, which looks up each access by itself: so nothing is asked of the
//! guest's page tables for an access before its time.
//!
//! What a look-up found stays right until the block ends, but for what helpers do: behind a helper
//! that filled the TLB, every group that is still in use is looked up again; other helpers end all
//! groups.

use crate::decode::op::{FlatAddress, NO_REGISTER};
use crate::frame::field;

/// The largest window in bytes: the larger, the more of them cross a page.
const WINDOW: i64 = 1024;
/// Beyond this distance from its registers nothing is shared: a window's displacement, at the
/// leader and wherever it is looked up again, has to fit in 32 bits.
const FAR: u64 = 1 << 28;

/// An access, by the registers' values before the operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub address: FlatAddress,
    pub size: u16,
    pub write: bool,
}

/// What an operation means for the groups.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Effect {
    /// The accesses in their order: of the operand, of the stack.
    pub accesses: [Option<Access>; 2],
    /// Registers that get another value, a bit each.
    pub written: u16,
    /// A register to which a constant is added.
    pub adjusted: Option<(usize, i32)>,
    /// A helper executes it, or the bases of segments change.
    pub barrier: bool,
}

/// A place in the block: operation and access.
type Position = (usize, usize);

#[derive(Clone, Debug)]
pub(super) struct Group {
    /// The registers, without displacement.
    address: FlatAddress,
    /// The window: displacements from what they give at the leader.
    low: i64,
    high: i64,
    pub write: bool,
    /// Where in the frame the window's host address is kept.
    pub field: i32,
    first: Position,
    last: Position,
}

/// The part of an access in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub group: usize,
    pub leads: bool,
    /// From the window's start to the access.
    pub offset: i32,
}

/// The groups of a block.
#[derive(Default)]
pub(super) struct Shares {
    pub groups: Vec<Group>,
    shares: Vec<[Option<Share>; 2]>,
    adjusted: Vec<Option<(usize, i32)>>,
}

struct Open {
    group: Group,
    /// How much the registers' sum has grown since the leader.
    delta: i64,
    members: Vec<(Position, i64)>,
}

/// How much adding `by` to a register adds to an address.
fn growth(address: &FlatAddress, register: usize, by: i32) -> i64 {
    let part = |number: u8, shift: u8| {
        if usize::from(number) == register {
            i64::from(by) << (shift & 3)
        } else {
            0
        }
    };
    part(address.base, 0) + part(address.index, address.scale)
}

/// Whether a displacement of this address is too far to be shared. Without registers it is the
/// address itself, which has 64 bits.
fn is_far(address: &FlatAddress, distance: i64) -> bool {
    let limit = if registers(address) == 0 {
        1 << 62
    } else {
        FAR
    };
    distance.unsigned_abs() > limit
}

/// The registers of an address, a bit each.
fn registers(address: &FlatAddress) -> u16 {
    let bit = |number: u8| {
        if number == NO_REGISTER {
            0
        } else {
            1 << (number & 15)
        }
    };
    bit(address.base) | bit(address.index)
}

impl Group {
    /// The window's address, by what the registers hold at the leader.
    pub fn window(&self) -> FlatAddress {
        self.window_after(0)
    }

    /// The same when their sum has grown by `delta`.
    fn window_after(&self, delta: i64) -> FlatAddress {
        FlatAddress {
            displacement: self.low.wrapping_sub(delta) as u64,
            ..self.address
        }
    }

    /// Bytes of the window; at most [`WINDOW`].
    pub fn size(&self) -> u16 {
        (self.high - self.low) as u16
    }
}

impl Shares {
    /// Forms groups over a block's operations.
    pub fn of(effects: &[Effect]) -> Self {
        let mut open: Vec<Open> = Vec::new();
        let mut closed = Vec::new();
        for (n, effect) in effects.iter().enumerate() {
            for (k, access) in effect.accesses.iter().enumerate() {
                let Some(access) = access else { continue };
                let joined = open.iter_mut().any(|open| open.join((n, k), access));
                if !joined {
                    open.extend(Open::new((n, k), access));
                }
            }
            let ends = |open: &mut Open| {
                effect.barrier || registers(&open.group.address) & effect.written != 0
            };
            closed.extend(open.extract_if(.., ends));
            if let Some((register, by)) = effect.adjusted {
                for open in &mut open {
                    open.delta += growth(&open.group.address, register, by);
                }
                closed.extend(open.extract_if(.., |open| is_far(&open.group.address, open.delta)));
            }
        }
        closed.extend(open);
        closed.retain(|open| open.members.len() > 1);
        closed.sort_by_key(|open| open.group.first);

        let mut shares = Self {
            groups: Vec::new(),
            shares: Vec::new(),
            adjusted: Vec::new(),
        };
        if closed.is_empty() {
            return shares;
        }
        shares.shares = vec![[None; 2]; effects.len()];
        shares.adjusted = effects.iter().map(|effect| effect.adjusted).collect();
        let mut taken_until: [Option<Position>; field::SHARED_COUNT] = Default::default();
        for open in closed {
            let mut group = open.group;
            let free = taken_until
                .iter()
                .position(|until| until.is_none_or(|until| until < group.first));
            let Some(slot) = free else { continue };
            taken_until[slot] = Some(group.last);
            group.field = field::SHARED + slot as i32 * 8;
            for ((n, k), displacement) in open.members {
                shares.shares[n][k] = Some(Share {
                    group: shares.groups.len(),
                    leads: (n, k) == group.first,
                    offset: (displacement - group.low) as i32,
                });
            }
            shares.groups.push(group);
        }
        shares
    }

    pub fn share(&self, operation: usize, access: usize) -> Option<Share> {
        self.shares.get(operation)?.get(access).copied().flatten()
    }

    /// The groups that were looked up before this access and are used by it or behind it, with the
    /// address of their window by what the registers hold now.
    pub fn in_use(&self, at: Position) -> impl Iterator<Item = (&Group, FlatAddress)> {
        self.groups
            .iter()
            .filter(move |group| group.first < at && at <= group.last)
            .map(move |group| {
                let since = self.adjusted.get(group.first.0..at.0).unwrap_or_default();
                let delta = since
                    .iter()
                    .flatten()
                    .map(|&(register, by)| growth(&group.address, register, by))
                    .sum();
                (group, group.window_after(delta))
            })
    }
}

impl Open {
    /// None for an access of which nobody may rely on the window.
    fn new(at: Position, access: &Access) -> Option<Self> {
        let low = access.address.displacement as i64;
        if is_far(&access.address, low) {
            return None;
        }
        Some(Self {
            group: Group {
                address: FlatAddress {
                    displacement: 0,
                    ..access.address
                },
                low,
                high: low + i64::from(access.size),
                write: access.write,
                field: 0,
                first: at,
                last: at,
            },
            delta: 0,
            members: vec![(at, low)],
        })
    }

    /// Adds an access of the same registers unless the window would become too large.
    fn join(&mut self, at: Position, access: &Access) -> bool {
        let group = &mut self.group;
        let registers = FlatAddress {
            displacement: 0,
            ..access.address
        };
        if registers != group.address {
            return false;
        }
        let displacement = access.address.displacement as i64;
        if is_far(&group.address, displacement) {
            return false;
        }
        let displacement = displacement + self.delta;
        let low = group.low.min(displacement);
        let high = group.high.max(displacement + i64::from(access.size));
        if high - low > WINDOW {
            return false;
        }
        (group.low, group.high, group.last) = (low, high, at);
        group.write |= access.write;
        self.members.push((at, displacement));
        true
    }
}

/// An access at a distance from one register.
pub(super) fn access(base: usize, displacement: i64, size: u16, write: bool) -> Access {
    Access {
        address: FlatAddress {
            base: base as u8,
            index: NO_REGISTER,
            scale: 0,
            segment: NO_REGISTER,
            displacement: displacement as u64,
        },
        size,
        write,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(base: usize, displacement: i64, write: bool) -> Effect {
        Effect {
            accesses: [Some(access(base, displacement, 8, write)), None],
            ..Effect::default()
        }
    }

    fn push() -> Effect {
        Effect {
            accesses: [None, Some(access(4, -8, 8, true))],
            adjusted: Some((4, -8)),
            ..Effect::default()
        }
    }

    #[test]
    fn pushes_share_one_window() {
        let shares = Shares::of(&[push(), push(), push()]);
        let [group] = &shares.groups[..] else {
            panic!("{:?}", shares.groups);
        };
        assert_eq!((group.low, group.size(), group.write), (-24, 24, true));
        let offsets = [0, 1, 2].map(|n| shares.share(n, 1).unwrap().offset);
        assert_eq!(offsets, [16, 8, 0]);
        assert!(shares.share(0, 1).unwrap().leads && !shares.share(1, 1).unwrap().leads);
        // Before the third push, RSP is 16 lower than at the leader.
        let in_use: Vec<_> = shares
            .in_use((2, 0))
            .map(|(_, window)| window.displacement as i64)
            .collect();
        assert_eq!(in_use, [-8]);
        assert_eq!(shares.in_use((0, 1)).count(), 0);
    }

    #[test]
    fn a_new_value_of_the_base_ends_its_group_only() {
        let change = Effect {
            written: 1 << 3,
            ..Effect::default()
        };
        let ops = [
            at(3, 0, false),
            at(5, 0, false),
            change,
            at(3, 8, false),
            at(5, 8, true),
        ];
        let shares = Shares::of(&ops);
        assert_eq!(shares.groups.len(), 1);
        assert!(shares.groups[0].address.base == 5 && shares.groups[0].write);
        assert_eq!(shares.share(0, 0), None);
    }

    #[test]
    fn what_is_far_is_not_shared() {
        let far = [
            i64::MAX - 3,
            i64::MIN,
            i64::from(i32::MIN),
            i64::from(i32::MAX),
        ];
        for displacement in far {
            // The second ends where a displacement may wrap.
            let near = displacement.wrapping_sub(8);
            let shares = Shares::of(&[at(3, displacement, true), at(3, near, true)]);
            assert_eq!(shares.groups.len(), 0, "{:?}", shares.groups);
        }
        let global = |displacement: i64| {
            let mut effect = at(3, displacement, true);
            if let Some(access) = &mut effect.accesses[0] {
                access.address.base = NO_REGISTER;
            }
            effect
        };
        for (displacement, groups) in [(-0x7000_0000, 1), (i64::MAX - 3, 0), (i64::MIN, 0)] {
            let near = displacement.wrapping_sub(8);
            let shares = Shares::of(&[global(displacement), global(near)]);
            assert_eq!(shares.groups.len(), groups, "{:?}", shares.groups);
        }
        // The register moves as far as an instruction can move it, once and many times.
        for by in [i32::MIN, i32::MAX] {
            let mut effect = at(3, 0, true);
            effect.adjusted = Some((3, by));
            let shares = Shares::of(&[effect, at(3, 0, true), at(3, 8, true)]);
            assert_eq!(shares.groups.len(), 1, "{:?}", shares.groups);
            assert_eq!(
                (shares.groups[0].first, shares.groups[0].size()),
                ((1, 0), 16)
            );
            let shares = Shares::of(&[effect; 64]);
            assert_eq!(shares.groups.len(), 0, "{:?}", shares.groups);
        }
    }

    #[test]
    fn an_index_counts_by_its_scale() {
        let indexed = |displacement: i64| Effect {
            accesses: [
                Some(Access {
                    address: FlatAddress {
                        base: 3,
                        index: 5,
                        scale: 3,
                        segment: NO_REGISTER,
                        displacement: displacement as u64,
                    },
                    size: 4,
                    write: false,
                }),
                None,
            ],
            ..Effect::default()
        };
        let next = Effect {
            adjusted: Some((5, 2)),
            ..Effect::default()
        };
        let shares = Shares::of(&[indexed(0), at(3, 0, false), next, indexed(-4)]);
        assert_eq!(shares.groups.len(), 1);
        assert_eq!(shares.share(3, 0).unwrap().offset, 12);
        let after: Vec<_> = shares.in_use((3, 0)).collect();
        assert_eq!(after[0].1.displacement as i64, -16);
        let change = Effect {
            written: 1 << 5,
            ..Effect::default()
        };
        assert!(
            Shares::of(&[indexed(0), change, indexed(4)])
                .groups
                .is_empty()
        );
    }

    #[test]
    fn helpers_end_all_groups() {
        let helper = Effect {
            barrier: true,
            ..Effect::default()
        };
        let shares = Shares::of(&[at(3, 0, false), helper, at(3, 8, false)]);
        assert!(shares.groups.is_empty());
    }

    #[test]
    fn windows_are_small() {
        let ops = [at(3, 0, false), at(3, 1017, false), at(3, 1023, false)];
        let shares = Shares::of(&ops);
        assert_eq!(shares.groups.len(), 1);
        assert!(shares.share(0, 0).is_none() && shares.share(1, 0).unwrap().leads);
    }

    #[test]
    fn groups_that_overlap_use_different_fields() {
        let ops: Vec<_> = (0..2)
            .flat_map(|round| (0..6).map(move |base| at(base, round * 8, false)))
            .collect();
        let shares = Shares::of(&ops);
        assert_eq!(shares.groups.len(), field::SHARED_COUNT);
        let mut fields: Vec<_> = shares.groups.iter().map(|g| g.field).collect();
        fields.sort_unstable();
        fields.dedup();
        assert_eq!(fields.len(), field::SHARED_COUNT);
    }
}
