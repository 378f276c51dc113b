//! One look-up for several accesses off the same register.
//!
//! Accesses of a block whose addresses differ from the first one's by constants form a *group*: the
//! first of them, its *leader*, looks up the *window* that all of them lie in and keeps the host
//! address of its start in the frame; the others use that. The window is found only if it lies on
//! one page and, if some of the accesses write, may be written to. Otherwise the block goes on in
//! its *unshared* translation, which looks up each access by itself: so nothing is asked of the
//! guest's page tables for an access before its time.
//!
//! What a look-up found stays right until the block ends, but for what helpers do: behind a helper
//! that filled the TLB, every group that is still in use is looked up again; other helpers end all
//! groups.

use crate::frame::field;

/// The largest window in bytes: the larger, the more of them cross a page.
const WINDOW: i32 = 1024;
/// Displacements and adjustments beyond this are left alone.
const FAR: i32 = 1 << 20;

/// An access at a constant distance from a guest register's value before the operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub base: usize,
    pub displacement: i32,
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
    /// A helper executes it.
    pub barrier: bool,
}

/// A place in the block: operation and access.
type Position = (usize, usize);

#[derive(Clone, Debug)]
pub(super) struct Group {
    pub base: usize,
    /// The window, from what the base holds at the leader.
    pub low: i32,
    pub high: i32,
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
    /// How much was added to the base since the leader.
    delta: i32,
    members: Vec<(Position, i32)>,
}

impl Shares {
    /// Forms groups over a block's operations.
    pub fn of(effects: &[Effect]) -> Self {
        let mut open: [Option<Open>; 16] = Default::default();
        let mut closed = Vec::new();
        for (n, effect) in effects.iter().enumerate() {
            for (k, access) in effect.accesses.iter().enumerate() {
                let Some(access) = access else { continue };
                let place = &mut open[access.base & 15];
                let joined = place.as_mut().is_some_and(|open| open.join((n, k), access));
                if !joined {
                    closed.extend(place.take());
                    *place = Some(Open::new((n, k), access));
                }
            }
            for (register, place) in open.iter_mut().enumerate() {
                let adjusted = effect.adjusted.filter(|&(r, _)| r == register);
                if effect.barrier || effect.written >> register & 1 != 0 {
                    closed.extend(place.take());
                } else if let (Some((_, by)), Some(open)) = (adjusted, place.as_mut()) {
                    open.delta = open.delta.saturating_add(by);
                    if open.delta.abs() > FAR {
                        closed.extend(place.take());
                    }
                }
            }
        }
        closed.extend(open.into_iter().flatten());
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
                    offset: displacement - group.low,
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
    /// displacement of their window from what their base holds now.
    pub fn in_use(&self, at: Position) -> impl Iterator<Item = (&Group, i32)> {
        self.groups
            .iter()
            .filter(move |group| group.first < at && at <= group.last)
            .map(move |group| {
                let since = self.adjusted.get(group.first.0..at.0).unwrap_or_default();
                let delta: i32 = since
                    .iter()
                    .flatten()
                    .filter(|(register, _)| *register == group.base)
                    .map(|(_, by)| by)
                    .sum();
                (group, group.low - delta)
            })
    }
}

impl Open {
    fn new(at: Position, access: &Access) -> Self {
        Self {
            group: Group {
                base: access.base & 15,
                low: access.displacement,
                high: access.displacement + i32::from(access.size),
                write: access.write,
                field: 0,
                first: at,
                last: at,
            },
            delta: 0,
            members: vec![(at, access.displacement)],
        }
    }

    /// Adds an access unless the window would become too large.
    fn join(&mut self, at: Position, access: &Access) -> bool {
        let displacement = access.displacement + self.delta;
        let low = self.group.low.min(displacement);
        let high = self.group.high.max(displacement + i32::from(access.size));
        if high - low > WINDOW {
            return false;
        }
        let group = &mut self.group;
        (group.low, group.high, group.last) = (low, high, at);
        group.write |= access.write;
        self.members.push((at, displacement));
        true
    }
}

/// An access if its displacement is not far.
pub(super) fn access(base: usize, displacement: i64, size: u16, write: bool) -> Option<Access> {
    let displacement = i32::try_from(displacement).ok()?;
    (displacement.abs() <= FAR && i32::from(size) <= WINDOW).then_some(Access {
        base,
        displacement,
        size,
        write,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(base: usize, displacement: i64, write: bool) -> Effect {
        Effect {
            accesses: [access(base, displacement, 8, write), None],
            ..Effect::default()
        }
    }

    fn push() -> Effect {
        Effect {
            accesses: [None, access(4, -8, 8, true)],
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
        assert_eq!((group.low, group.high, group.write), (-24, 0, true));
        let offsets = [0, 1, 2].map(|n| shares.share(n, 1).unwrap().offset);
        assert_eq!(offsets, [16, 8, 0]);
        assert!(shares.share(0, 1).unwrap().leads && !shares.share(1, 1).unwrap().leads);
        // Before the third push, RSP is 16 lower than at the leader.
        let in_use: Vec<_> = shares.in_use((2, 0)).map(|(_, low)| low).collect();
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
        assert!(shares.groups[0].base == 5 && shares.groups[0].write);
        assert_eq!(shares.share(0, 0), None);
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
