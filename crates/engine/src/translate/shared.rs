//! One look-up for several accesses at constant distances from each other.
//!
//! Accesses of a block whose addresses differ from the first one's by constants, because they are
//! formed from the same registers or from what was derived from those by additions of constants, are
//! a *group*: the first of them, its *leader*, looks up the *window* that all of them lie in and keeps the host
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

/// A register that gets the value of one, perhaps itself, plus a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub to: usize,
    pub from: usize,
    pub by: i32,
}

/// What an operation means for the groups.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Effect {
    /// The accesses in their order: of the operand, of the stack.
    pub accesses: [Option<Access>; 2],
    /// Registers that get a value of which nothing is known, a bit each.
    pub written: u16,
    /// One that gets a value that is known from before.
    pub moved: Option<Move>,
    /// A helper executes it, or the bases of segments change.
    pub barrier: bool,
}

impl Effect {
    /// A constant is added to a register.
    pub fn adjusted(register: usize, by: i32) -> Option<Move> {
        Some(Move {
            to: register,
            from: register,
            by,
        })
    }
}

/// A place in the block: operation and access.
type Position = (usize, usize);

/// What a register holds: something unknown, which has a number, plus a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Value {
    root: u32,
    offset: i64,
}

/// What all registers hold.
#[derive(Clone, Debug)]
struct Values {
    registers: [Value; 16],
    roots: u32,
}

impl Default for Values {
    fn default() -> Self {
        let registers = std::array::from_fn(|n| Value {
            root: n as u32,
            offset: 0,
        });
        Self {
            registers,
            roots: 16,
        }
    }
}

impl Values {
    fn get(&self, register: u8) -> Option<Value> {
        (register != NO_REGISTER).then(|| self.registers[usize::from(register & 15)])
    }

    fn forget(&mut self, register: usize) {
        self.registers[register & 15] = Value {
            root: self.roots,
            offset: 0,
        };
        self.roots += 1;
    }

    /// What they hold behind an operation.
    fn apply(&mut self, effect: &Effect) {
        if effect.barrier {
            // Whatever the helper did.
            (0..16).for_each(|register| self.forget(register));
            return;
        }
        let moved = effect.moved.map(|moved| {
            let from = self.registers[moved.from & 15];
            let offset = from.offset + i64::from(moved.by);
            (moved.to & 15, Value { offset, ..from })
        });
        for register in (0..16).filter(|register| effect.written >> register & 1 != 0) {
            self.forget(register);
        }
        match moved {
            Some((to, _)) if effect.written >> to & 1 != 0 => {}
            Some((to, value)) if value.offset.unsigned_abs() > FAR => self.forget(to),
            Some((to, value)) => self.registers[to] = value,
            None => {}
        }
    }

    /// What an address is formed from, and how far it is from that.
    fn form(&self, address: &FlatAddress) -> (Form, i64) {
        let (base, index) = (self.get(address.base), self.get(address.index));
        let scale = address.scale & 3;
        let form = Form {
            base: base.map(|value| value.root),
            index: index.map(|value| (value.root, scale)),
            segment: address.segment,
        };
        let base = base.map_or(0, |value| value.offset);
        (form, base + index.map_or(0, |value| value.offset << scale))
    }

    /// The register that is nearest to a root, and how far it is from that.
    fn holder(&self, root: u32) -> Option<(u8, i64)> {
        let numbered = self.registers.iter().enumerate();
        let (number, value) = numbered
            .filter(|(_, value)| value.root == root)
            .min_by_key(|(_, value)| value.offset.unsigned_abs())?;
        Some((number as u8, value.offset))
    }

    /// The address at a distance from what it is formed from, if there is still all that it takes
    /// and its displacement fits.
    fn address(&self, form: &Form, displacement: i64) -> Option<FlatAddress> {
        let part = |root: Option<u32>| match root {
            Some(root) => self.holder(root),
            None => Some((NO_REGISTER, 0)),
        };
        let (base, from_base) = part(form.base)?;
        let (index, from_index) = part(form.index.map(|(root, _)| root))?;
        let scale = form.index.map_or(0, |(_, scale)| scale);
        let offset = from_base + (from_index << scale);
        let displacement = displacement.wrapping_sub(offset);
        let fits = i32::try_from(displacement).is_ok();
        let absolute = form.base.is_none() && form.index.is_none();
        (fits || absolute).then_some(FlatAddress {
            base,
            index,
            scale,
            segment: form.segment,
            displacement: displacement as u64,
        })
    }
}

/// What an address is formed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Form {
    base: Option<u32>,
    index: Option<(u32, u8)>,
    segment: u8,
}

impl Form {
    /// Whether a distance from it is too far to be shared. Without registers it is the address
    /// itself, which has 64 bits.
    fn is_far(&self, distance: i64) -> bool {
        let limit = if self.base.is_none() && self.index.is_none() {
            1 << 62
        } else {
            FAR
        };
        distance.unsigned_abs() > limit
    }
}

#[derive(Clone, Debug)]
pub(super) struct Group {
    form: Form,
    /// The window: distances from that.
    low: i64,
    high: i64,
    /// What the leader's registers add to that, and the leader's address without displacement.
    leader: FlatAddress,
    from_leader: i64,
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
    /// What the registers hold before each operation.
    values: Vec<Values>,
}

struct Open {
    group: Group,
    members: Vec<(Position, i64)>,
}

impl Group {
    /// The window's address, by what the registers hold at the leader.
    pub fn window(&self) -> FlatAddress {
        FlatAddress {
            displacement: self.low.wrapping_sub(self.from_leader) as u64,
            ..self.leader
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
        let mut values = Values::default();
        let mut before = Vec::with_capacity(effects.len());
        for (n, effect) in effects.iter().enumerate() {
            before.push(values.clone());
            for (k, access) in effect.accesses.iter().enumerate() {
                let Some(access) = access else { continue };
                let joined = open
                    .iter_mut()
                    .any(|open| open.join((n, k), access, &values));
                if !joined {
                    open.extend(Open::new((n, k), access, &values));
                }
            }
            if effect.barrier {
                closed.append(&mut open);
            }
            values.apply(effect);
        }
        closed.extend(open);
        closed.retain(|open| open.members.len() > 1);
        closed.sort_by_key(|open| open.group.first);

        let mut shares = Self::default();
        if closed.is_empty() {
            return shares;
        }
        shares.shares = vec![[None; 2]; effects.len()];
        shares.values = before;
        let mut taken_until: [Option<Position>; field::SHARED_COUNT] = Default::default();
        for open in closed {
            let mut group = open.group;
            let free = taken_until
                .iter()
                .position(|until| until.is_none_or(|until| until < group.first));
            let Some(slot) = free else { continue };
            taken_until[slot] = Some(group.last);
            group.field = field::SHARED + slot as i32 * 8;
            for ((n, k), distance) in open.members {
                shares.shares[n][k] = Some(Share {
                    group: shares.groups.len(),
                    leads: (n, k) == group.first,
                    offset: (distance - group.low) as i32,
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
    /// address of their window by what the registers hold now, if they hold what it takes.
    pub fn in_use(&self, at: Position) -> impl Iterator<Item = (&Group, Option<FlatAddress>)> {
        self.groups
            .iter()
            .filter(move |group| group.first < at && at <= group.last)
            .map(move |group| {
                let values = self.values.get(at.0);
                (
                    group,
                    values.and_then(|v| v.address(&group.form, group.low)),
                )
            })
    }
}

impl Open {
    /// None for an access of which nobody may rely on the window.
    fn new(at: Position, access: &Access, values: &Values) -> Option<Self> {
        let (form, offset) = values.form(&access.address);
        let displacement = access.address.displacement as i64;
        if form.is_far(displacement) || form.is_far(displacement + offset) {
            return None;
        }
        let low = displacement + offset;
        Some(Self {
            group: Group {
                form,
                low,
                high: low + i64::from(access.size),
                leader: FlatAddress {
                    displacement: 0,
                    ..access.address
                },
                from_leader: offset,
                write: access.write,
                field: 0,
                first: at,
                last: at,
            },
            members: vec![(at, low)],
        })
    }

    /// Adds an access that is formed from the same unless the window would become too large.
    fn join(&mut self, at: Position, access: &Access, values: &Values) -> bool {
        let group = &mut self.group;
        let (form, offset) = values.form(&access.address);
        let displacement = access.address.displacement as i64;
        if form != group.form || form.is_far(displacement) || form.is_far(displacement + offset) {
            return false;
        }
        let distance = displacement + offset;
        let low = group.low.min(distance);
        let high = group.high.max(distance + i64::from(access.size));
        if high - low > WINDOW {
            return false;
        }
        (group.low, group.high, group.last) = (low, high, at);
        group.write |= access.write;
        self.members.push((at, distance));
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
            moved: Effect::adjusted(4, -8),
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
            .map(|(_, window)| window.unwrap().displacement as i64)
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
        assert!(shares.groups[0].leader.base == 5 && shares.groups[0].write);
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
            effect.moved = Effect::adjusted(3, by);
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
            moved: Effect::adjusted(5, 2),
            ..Effect::default()
        };
        let shares = Shares::of(&[indexed(0), at(3, 0, false), next, indexed(-4)]);
        assert_eq!(shares.groups.len(), 1);
        assert_eq!(shares.share(3, 0).unwrap().offset, 12);
        let after: Vec<_> = shares.in_use((3, 0)).collect();
        assert_eq!(after[0].1.unwrap().displacement as i64, -16);
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
        // What registers hold is not known any more either.
        let ops = [copy(7, 4, 8), helper, at(7, 0, true), at(4, 16, true)];
        assert!(Shares::of(&ops).groups.is_empty());
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

    fn copy(to: usize, from: usize, by: i32) -> Effect {
        Effect {
            moved: Some(Move { to, from, by }),
            ..Effect::default()
        }
    }

    fn unknown(register: usize) -> Effect {
        Effect {
            written: 1 << register,
            ..Effect::default()
        }
    }

    #[test]
    fn what_is_derived_from_a_register_shares_its_window() {
        // A frame pointer, an address on the stack, the stack itself.
        let ops = [
            push(),
            copy(5, 4, 0),
            copy(4, 4, -32),
            copy(7, 4, 12),
            at(5, -4, true),
            at(7, 0, false),
            push(),
        ];
        let shares = Shares::of(&ops);
        assert_eq!(shares.groups.len(), 1, "{:?}", shares.groups);
        let group = &shares.groups[0];
        assert_eq!((group.low, group.high), (-48, 0));
        let offsets = [(0, 1), (4, 0), (5, 0), (6, 1)].map(|(n, k)| shares.share(n, k).unwrap());
        assert_eq!(offsets.map(|share| share.offset), [40, 36, 20, 0]);
        // The leader looks it up by its own register.
        assert_eq!(group.window().base, 4);
        assert_eq!(group.window().displacement as i64, -48);
    }

    #[test]
    fn a_copy_outlives_its_source() {
        let ops = [
            at(3, 0, false),
            copy(6, 3, 8),
            unknown(3),
            at(6, 0, false),
            at(3, 0, false),
            at(6, 8, false),
        ];
        let shares = Shares::of(&ops);
        assert_eq!(shares.groups.len(), 1);
        assert_eq!(shares.share(4, 0), None);
        assert_eq!(shares.share(3, 0).unwrap().offset, 8);
        // Looked up again, it is found by the copy.
        let [(_, Some(window))] = shares.in_use((5, 0)).collect::<Vec<_>>()[..] else {
            panic!("not one group");
        };
        assert_eq!((window.base, window.displacement as i64), (6, -8));
        // Nothing is left of it.
        let ops = [
            at(3, 0, false),
            copy(6, 3, 8),
            unknown(3),
            at(6, 0, false),
            unknown(6),
            at(1, 0, true),
        ];
        let shares = Shares::of(&ops);
        assert_eq!(
            shares.in_use((3, 0)).filter(|(_, w)| w.is_some()).count(),
            1
        );
        let ops = [
            at(3, 0, false),
            unknown(3),
            at(1, 0, false),
            at(1, 8, false),
        ];
        assert!(Shares::of(&ops).groups.len() == 1);
    }

    #[test]
    fn a_window_whose_registers_are_gone_cannot_be_looked_up_again() {
        // XCHG and the like: both are unknown, though one access is still to come by a copy.
        let ops = [
            at(3, 0, false),
            copy(6, 3, 0),
            unknown(3),
            Effect {
                accesses: [Some(access(6, 8, 8, false)), Some(access(6, 16, 8, false))],
                written: 1 << 6,
                ..Effect::default()
            },
        ];
        let shares = Shares::of(&ops);
        assert!(shares.in_use((3, 1)).all(|(_, window)| window.is_some()));
        let values = &shares.values[3];
        let mut after = values.clone();
        after.apply(&ops[3]);
        assert_eq!(after.address(&shares.groups[0].form, 0), None);
    }

    #[test]
    fn a_window_is_looked_up_again_by_what_is_near() {
        let indexed = Effect {
            accesses: [
                Some(Access {
                    address: FlatAddress {
                        base: 3,
                        index: 2,
                        scale: 3,
                        segment: NO_REGISTER,
                        displacement: -8i64 as u64,
                    },
                    size: 8,
                    write: true,
                }),
                None,
            ],
            ..Effect::default()
        };
        // A copy that is as far as one may be, eight times that as an index.
        let ops = [indexed, copy(1, 2, FAR as i32), indexed];
        let shares = Shares::of(&ops);
        let [(_, Some(window))] = shares.in_use((2, 0)).collect::<Vec<_>>()[..] else {
            panic!("not one group");
        };
        assert_eq!((window.index, window.displacement as i64), (2, -8));
        // With the copy alone the displacement would not fit.
        let form = &shares.groups[0].form;
        let mut after = shares.values[2].clone();
        after.apply(&unknown(2));
        assert_eq!(after.address(form, -8), None);
        assert!(after.address(form, 8).is_some());
    }

    #[test]
    fn an_exchange_of_values_is_no_copy() {
        let both = Effect {
            written: 1 << 3 | 1 << 5,
            ..Effect::default()
        };
        let ops = [
            at(3, 0, false),
            at(5, 0, false),
            both,
            at(3, 8, false),
            at(5, 8, false),
        ];
        assert!(Shares::of(&ops).groups.is_empty());
        // POP of RSP: what it adds is lost.
        let pop = Effect {
            accesses: [None, Some(access(4, 0, 8, false))],
            written: 1 << 4,
            moved: Effect::adjusted(4, 8),
            ..Effect::default()
        };
        assert!(Shares::of(&[pop, at(4, 0, false)]).groups.is_empty());
    }
}
