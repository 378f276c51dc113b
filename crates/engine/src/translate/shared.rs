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
//!
//! In a path that is a loop, the groups whose address is the same in every turn are looked up once
//! before the loop, and are in use everywhere: between turns there is nothing but a poll, which
//! leaves the path if anything is to be done that could change a look-up.

use crate::decode::op::{FlatAddress, NO_REGISTER};
use crate::frame::field;

use super::memory::{Address, Look};
use super::values::{Access, Effect, Form, Value, Values};

/// The largest window in bytes: the larger, the more of them cross a page.
const WINDOW: i64 = 1024;
/// Look-ups that a loop has made before it at most: the others need places, too.
const BEFORE_LOOP: usize = field::SHARED_COUNT - 3;
/// A place in the block: operation and access.
type Position = (usize, usize);

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
    /// It is looked up before the loop, and has no leader.
    pub before_loop: bool,
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
    effects: Vec<Effect>,
    /// The registers that hold the same whenever the block starts anew, if it is a loop without
    /// helpers.
    unchanged: Option<u16>,
}

struct Open {
    group: Group,
    members: Vec<(Position, i64)>,
}

impl Group {
    /// The window's address, by what the registers hold at the leader, or at the loop's start.
    pub fn window(&self) -> FlatAddress {
        if self.before_loop {
            // Of initial values.
            return FlatAddress {
                base: self.form.base.map_or(NO_REGISTER, |root| root as u8),
                index: self.form.index.map_or(NO_REGISTER, |(root, _)| root as u8),
                displacement: self.low as u64,
                ..self.leader
            };
        }
        FlatAddress {
            displacement: self.low.wrapping_sub(self.from_leader) as u64,
            ..self.leader
        }
    }

    /// The look-up of the window.
    pub fn look(&self, keep_flags: bool) -> Look {
        Look {
            address: Address::Flat(self.window()),
            size: self.size(),
            write: self.write,
            keep_flags,
        }
    }

    /// Bytes of the window; at most [`WINDOW`].
    pub fn size(&self) -> u16 {
        (self.high - self.low) as u16
    }
}

impl Shares {
    /// Forms groups over a block's operations. `is_loop`: the last one may lead to the first.
    pub fn of(effects: Vec<Effect>, is_loop: bool) -> Self {
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
        let is_loop = is_loop && effects.iter().all(|effect| !effect.barrier);
        let unchanged = is_loop.then(|| values.unchanged());
        if let Some(unchanged) = unchanged {
            // Those that save most.
            closed.sort_by_key(|open| std::cmp::Reverse(open.members.len()));
            let constant = closed
                .iter_mut()
                .filter(|open| open.group.form.is_of(unchanged));
            for open in constant.take(BEFORE_LOOP) {
                open.group.before_loop = true;
            }
        }
        closed.retain(|open| open.members.len() > 1 || open.group.before_loop);
        closed.sort_by_key(|open| (!open.group.before_loop, open.group.first));
        if closed.is_empty() && !is_loop {
            return Self::default();
        }

        let mut shares = Self {
            shares: vec![[None; 2]; effects.len()],
            values: before,
            effects,
            unchanged,
            ..Self::default()
        };
        let mut taken_until: [Option<Position>; field::SHARED_COUNT] = Default::default();
        for open in closed {
            let mut group = open.group;
            let free = taken_until
                .iter()
                .position(|until| until.is_none_or(|until| until < group.first));
            let Some(slot) = free else { continue };
            let end = (usize::MAX, 0);
            taken_until[slot] = Some(if group.before_loop { end } else { group.last });
            group.field = field::SHARED + slot as i32 * 8;
            for ((n, k), distance) in open.members {
                shares.shares[n][k] = Some(Share {
                    group: shares.groups.len(),
                    leads: (n, k) == group.first && !group.before_loop,
                    offset: (distance - group.low) as i32,
                });
            }
            shares.groups.push(group);
        }
        shares
    }

    /// Whether the block is a loop that has a way back to behind what is done before it.
    pub fn is_loop(&self) -> bool {
        self.unchanged.is_some()
    }

    /// Whether a register holds at the start of an operation what it holds whenever the loop starts.
    pub fn is_constant(&self, operation: usize, register: usize) -> bool {
        self.unchanged
            .is_some_and(|all| all >> (register & 15) & 1 != 0)
            && self.values.get(operation).is_some_and(|values| {
                values.registers[register & 15] == Value::initial(register & 15)
            })
    }

    /// The operation that has certainly written, as a whole, what an access reads, and nothing of
    /// the VCPU's since.
    pub fn writer_of(&self, operation: usize, access: usize) -> Option<usize> {
        let read = self.share(operation, access)?;
        let size = self
            .effects
            .get(operation)?
            .accesses
            .get(access)?
            .as_ref()?
            .size;
        for n in (0..operation).rev() {
            let effect = self.effects.get(n)?;
            if effect.barrier {
                return None;
            }
            for (k, written) in effect.accesses.iter().enumerate().rev() {
                let Some(written) = written.as_ref().filter(|access| access.write) else {
                    continue;
                };
                // What is formed from something else may be anywhere.
                let share = self.share(n, k).filter(|share| share.group == read.group)?;
                if (share.offset, written.size) == (read.offset, size) {
                    return Some(n);
                }
                let apart = share.offset + i32::from(written.size) <= read.offset
                    || read.offset + i32::from(size) <= share.offset;
                if !apart {
                    return None;
                }
            }
        }
        None
    }

    pub fn share(&self, operation: usize, access: usize) -> Option<Share> {
        self.shares.get(operation)?.get(access).copied().flatten()
    }

    /// The groups that were looked up before this access and are used by it or behind it, with the
    /// address of their window by what the registers hold now, if they hold what it takes.
    pub fn in_use(&self, at: Position) -> impl Iterator<Item = (&Group, Option<FlatAddress>)> {
        self.groups
            .iter()
            .filter(move |group| group.before_loop || group.first < at && at <= group.last)
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
                before_loop: false,
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

#[cfg(test)]
mod tests {
    use super::super::values::{FAR, Move, access};
    use super::*;
    use crate::decode::op::NO_REGISTER;

    fn at(base: usize, displacement: i64, write: bool) -> Effect {
        Effect {
            accesses: [Some(access(base, displacement, 8, write)), None],
            ..Effect::default()
        }
    }

    fn of(effects: Vec<Effect>) -> Shares {
        Shares::of(effects, false)
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
        let shares = of(vec![push(), push(), push()]);
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
        let shares = of(ops.to_vec());
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
            let shares = of(vec![at(3, displacement, true), at(3, near, true)]);
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
            let shares = of(vec![global(displacement), global(near)]);
            assert_eq!(shares.groups.len(), groups, "{:?}", shares.groups);
        }
        // The register moves as far as an instruction can move it, once and many times.
        for by in [i32::MIN, i32::MAX] {
            let mut effect = at(3, 0, true);
            effect.moved = Effect::adjusted(3, by);
            let shares = of(vec![effect, at(3, 0, true), at(3, 8, true)]);
            assert_eq!(shares.groups.len(), 1, "{:?}", shares.groups);
            assert_eq!(
                (shares.groups[0].first, shares.groups[0].size()),
                ((1, 0), 16)
            );
            let shares = of(vec![effect; 64]);
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
        let shares = of(vec![indexed(0), at(3, 0, false), next, indexed(-4)]);
        assert_eq!(shares.groups.len(), 1);
        assert_eq!(shares.share(3, 0).unwrap().offset, 12);
        let after: Vec<_> = shares.in_use((3, 0)).collect();
        assert_eq!(after[0].1.unwrap().displacement as i64, -16);
        let change = Effect {
            written: 1 << 5,
            ..Effect::default()
        };
        assert!(of(vec![indexed(0), change, indexed(4)]).groups.is_empty());
    }

    #[test]
    fn helpers_end_all_groups() {
        let helper = Effect {
            barrier: true,
            ..Effect::default()
        };
        let shares = of(vec![at(3, 0, false), helper, at(3, 8, false)]);
        assert!(shares.groups.is_empty());
        // What registers hold is not known any more either.
        let ops = [copy(7, 4, 8), helper, at(7, 0, true), at(4, 16, true)];
        assert!(of(ops.to_vec()).groups.is_empty());
    }

    #[test]
    fn windows_are_small() {
        let ops = [at(3, 0, false), at(3, 1017, false), at(3, 1023, false)];
        let shares = of(ops.to_vec());
        assert_eq!(shares.groups.len(), 1);
        assert!(shares.share(0, 0).is_none() && shares.share(1, 0).unwrap().leads);
    }

    #[test]
    fn groups_that_overlap_use_different_fields() {
        let ops: Vec<_> = (0..2)
            .flat_map(|round| (0..6).map(move |base| at(base, round * 8, false)))
            .collect();
        let shares = of(ops.to_vec());
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
        let shares = of(ops.to_vec());
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
        let shares = of(ops.to_vec());
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
        let shares = of(ops.to_vec());
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
        assert!(of(ops.to_vec()).groups.len() == 1);
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
        let shares = of(ops.to_vec());
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
        let shares = of(ops.to_vec());
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
        assert!(of(ops.to_vec()).groups.is_empty());
        // POP of RSP: what it adds is lost.
        let pop = Effect {
            accesses: [None, Some(access(4, 0, 8, false))],
            written: 1 << 4,
            moved: Effect::adjusted(4, 8),
            ..Effect::default()
        };
        assert!(of(vec![pop, at(4, 0, false)]).groups.is_empty());
    }

    /// A call and its return, with something in between.
    fn call(within: &[Effect]) -> Vec<Effect> {
        let ret = Effect {
            accesses: [None, Some(access(4, 0, 8, false))],
            moved: Effect::adjusted(4, 8),
            ..Effect::default()
        };
        let mut all = vec![push()];
        all.extend_from_slice(within);
        all.push(ret);
        all
    }

    #[test]
    fn what_a_loop_does_not_change_is_looked_up_before_it() {
        let next = Effect {
            moved: Effect::adjusted(5, 8),
            ..Effect::default()
        };
        let mut ops = vec![at(3, 0, false), at(5, 0, true), next];
        ops.extend(call(&[]));
        let shares = Shares::of(ops.clone(), true);
        let before: Vec<_> = shares.groups.iter().filter(|g| g.before_loop).collect();
        let bases: Vec<_> = before.iter().map(|g| g.window().base).collect();
        assert_eq!(bases, [3, 4]);
        assert!(!shares.share(0, 0).unwrap().leads && !shares.share(3, 1).unwrap().leads);
        // RBX alone once, RSP in two accesses; RBP changes.
        assert_eq!(shares.share(1, 0), None);
        assert_eq!(before[1].window().displacement as i64, -8);
        // Behind its last use it is still needed: in the next turn.
        for at in 0..ops.len() {
            let in_use = shares.in_use((at, 0)).filter(|(_, w)| w.is_some()).count();
            assert_eq!(in_use, 2, "at {at}");
        }
        // RSP is lower within the call.
        let stack = shares.in_use((4, 1)).last().unwrap().1.unwrap();
        assert_eq!((stack.base, stack.displacement), (4, 0));
        assert!(!Shares::of(ops, false).is_loop());
    }

    #[test]
    fn a_loop_with_helpers_looks_up_nothing_before_it() {
        let helper = Effect {
            barrier: true,
            ..Effect::default()
        };
        let shares = Shares::of(vec![at(3, 0, false), at(3, 8, false), helper], true);
        assert!(!shares.is_loop() && !shares.groups[0].before_loop);
    }

    #[test]
    fn a_register_is_constant_where_it_has_its_first_value() {
        // Kept in RSI meanwhile; RDX is not the same at the end.
        let ops = [
            copy(6, 7, 0),
            unknown(7),
            copy(7, 6, 0),
            unknown(2),
            unknown(6),
        ];
        let shares = Shares::of(ops.to_vec(), true);
        let constant = |register| [0, 1, 2, 3].map(|n| shares.is_constant(n, register));
        assert_eq!(constant(7), [true, true, false, true]);
        assert_eq!(constant(2), [false; 4]);
        assert!(!Shares::of(ops.to_vec(), false).is_constant(0, 7));
    }

    #[test]
    fn a_return_finds_what_the_call_pushed_unless_it_may_be_overwritten() {
        let writer = |within: &[Effect]| {
            let ops = call(within);
            let last = ops.len() - 1;
            Shares::of(ops, true).writer_of(last, 1)
        };
        assert_eq!(writer(&[]), Some(0));
        // Reads, and writes beside it.
        assert_eq!(writer(&[at(3, 0, false), at(4, 8, true)]), Some(0));
        assert_eq!(writer(&[at(4, -8, true)]), Some(0));
        // A part of it, all of it, by what may point anywhere, by a helper.
        assert_eq!(writer(&[at(4, 4, true)]), None);
        assert_eq!(writer(&[at(4, 0, true)]), Some(1));
        assert_eq!(writer(&[at(3, 0, true)]), None);
        let helper = Effect {
            barrier: true,
            ..Effect::default()
        };
        assert_eq!(writer(&[helper]), None);
    }
}
