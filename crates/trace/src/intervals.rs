//! A set of byte ranges that tells which of them overlap a given one.
//!
//! A treap: a search tree by bounds whose nodes are also a heap by random priority, so that it
//! is balanced whatever is inserted in which order; every node knows the greatest upper bound below
//! it. Insertion and removal take logarithmic time, a look-up that plus a step for each overlap.

use std::cmp::Ordering;

use crate::kind::Range;

/// No node.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Node {
    range: Range,
    /// The greatest upper bound in this subtree.
    reach: u64,
    /// What the caller knows the range by; behind the range, the search key.
    name: u32,
    priority: u32,
    left: u32,
    right: u32,
}

impl Node {
    fn key(&self) -> Key {
        key(self.range, self.name)
    }
}

/// What the tree is ordered by: lower bound, upper bound, name.
type Key = (u64, u64, u32);

fn key(range: Range, name: u32) -> Key {
    (range.lo, range.hi, name)
}

/// Ranges, each with a name; the same range may be there under several names.
#[derive(Debug)]
pub struct Intervals {
    nodes: Vec<Node>,
    root: u32,
}

impl Default for Intervals {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            root: NONE,
        }
    }
}

impl Intervals {
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Adds a range under a name that it has not got yet. `priority` is random: whoever chooses the
    /// ranges must not be able to foresee it.
    pub fn insert(&mut self, range: Range, name: u32, priority: u32) {
        let index = self.nodes.len() as u32;
        if self.nodes.len() == self.nodes.capacity() {
            // There may be a set for every page, most of them small: grow by a quarter.
            self.nodes.reserve_exact(1 + self.nodes.len() / 4);
        }
        let node = Node {
            range,
            reach: range.hi,
            name,
            priority,
            left: NONE,
            right: NONE,
        };
        self.nodes.push(node);
        let (below, above) = self.split(self.root, node.key());
        let below = self.merge(below, index);
        self.root = self.merge(below, above);
    }

    /// Takes a range away that is there under this name.
    pub fn remove(&mut self, range: Range, name: u32) {
        let Some(gone) = self.unlink(key(range, name)) else {
            return;
        };
        // The last node moves into the gap, so that the nodes stay dense.
        let last = self.nodes.len() as u32 - 1;
        if gone != last {
            let key = self.nodes[last as usize].key();
            self.relink(key, last, gone);
        }
        self.nodes.swap_remove(gone as usize);
        if self.nodes.capacity() > 64 && self.nodes.len() < self.nodes.capacity() / 4 {
            self.nodes.shrink_to(self.nodes.len() * 2);
        }
    }

    /// Calls `found` with the name of every range that overlaps `range`, by ascending bounds.
    pub fn overlaps(&self, range: Range, found: &mut impl FnMut(u32)) {
        self.overlaps_below(self.root, range, found);
    }

    fn overlaps_below(&self, mut at: u32, range: Range, found: &mut impl FnMut(u32)) {
        while let Some(node) = self.nodes.get(at as usize) {
            if node.reach <= range.lo {
                return;
            }
            self.overlaps_below(node.left, range, found);
            if node.range.lo >= range.hi {
                return;
            }
            if node.range.hi > range.lo {
                found(node.name);
            }
            at = node.right;
        }
    }

    /// Calls `found` with the name of every range that has exactly these bounds.
    pub fn same(&self, range: Range, found: &mut impl FnMut(u32)) {
        self.same_below(self.root, range, found);
    }

    fn same_below(&self, mut at: u32, range: Range, found: &mut impl FnMut(u32)) {
        while let Some(node) = self.nodes.get(at as usize) {
            let bounds = (node.range.lo, node.range.hi);
            at = match bounds.cmp(&(range.lo, range.hi)) {
                Ordering::Less => node.right,
                Ordering::Greater => node.left,
                Ordering::Equal => {
                    self.same_below(node.left, range, found);
                    found(node.name);
                    node.right
                }
            };
        }
    }

    fn reach(&self, at: u32) -> u64 {
        self.nodes.get(at as usize).map_or(0, |node| node.reach)
    }

    fn update(&mut self, at: u32) {
        let node = self.nodes[at as usize];
        let below = self.reach(node.left).max(self.reach(node.right));
        self.nodes[at as usize].reach = node.range.hi.max(below);
    }

    /// Splits a subtree into the nodes before `key` and the others.
    fn split(&mut self, at: u32, key: Key) -> (u32, u32) {
        let Some(node) = self.nodes.get(at as usize).copied() else {
            return (NONE, NONE);
        };
        if node.key() < key {
            let (below, above) = self.split(node.right, key);
            self.nodes[at as usize].right = below;
            self.update(at);
            (at, above)
        } else {
            let (below, above) = self.split(node.left, key);
            self.nodes[at as usize].left = above;
            self.update(at);
            (below, at)
        }
    }

    /// Joins two subtrees, all of the first before all of the second.
    fn merge(&mut self, first: u32, second: u32) -> u32 {
        if first == NONE {
            return second;
        }
        if second == NONE {
            return first;
        }
        let (a, b) = (self.nodes[first as usize], self.nodes[second as usize]);
        if a.priority > b.priority {
            self.nodes[first as usize].right = self.merge(a.right, second);
            self.update(first);
            first
        } else {
            self.nodes[second as usize].left = self.merge(first, b.left);
            self.update(second);
            second
        }
    }

    /// Takes the node with this key out of the tree; it stays in `nodes`.
    fn unlink(&mut self, key: Key) -> Option<u32> {
        let (root, gone) = self.unlink_below(self.root, key);
        self.root = root;
        gone
    }

    fn unlink_below(&mut self, at: u32, key: Key) -> (u32, Option<u32>) {
        let Some(node) = self.nodes.get(at as usize).copied() else {
            return (NONE, None);
        };
        if node.key() == key {
            return (self.merge(node.left, node.right), Some(at));
        }
        let gone;
        if key < node.key() {
            let (left, found) = self.unlink_below(node.left, key);
            self.nodes[at as usize].left = left;
            gone = found;
        } else {
            let (right, found) = self.unlink_below(node.right, key);
            self.nodes[at as usize].right = right;
            gone = found;
        }
        self.update(at);
        (at, gone)
    }

    /// Makes what points at the node `from`, found by its key, point at `to`.
    fn relink(&mut self, key: Key, from: u32, to: u32) {
        if self.root == from {
            self.root = to;
            return;
        }
        let mut at = self.root;
        while let Some(node) = self.nodes.get_mut(at as usize) {
            let next = if key < node.key() {
                &mut node.left
            } else {
                &mut node.right
            };
            if *next == from {
                *next = to;
                return;
            }
            at = *next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn found(intervals: &Intervals, range: Range) -> Vec<u32> {
        let mut names = Vec::new();
        intervals.overlaps(range, &mut |name| names.push(name));
        names
    }

    #[derive(Clone, Debug)]
    enum Action {
        Insert(u64, u64, u32),
        Remove(usize),
        Ask(u64, u64),
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            // Some have the same bounds.
            (0..200u64, 1..60u64, any::<u32>()).prop_map(|(lo, len, priority)| Action::Insert(
                lo / 20,
                lo / 20 + len / 20 + 1,
                priority
            )),
            (0..200u64, 1..60u64, any::<u32>()).prop_map(|(lo, len, priority)| Action::Insert(
                lo,
                lo + len,
                priority
            )),
            any::<usize>().prop_map(Action::Remove),
            (0..260u64, 1..20u64).prop_map(|(lo, len)| Action::Ask(lo, lo + len)),
        ]
    }

    proptest! {
        #[test]
        fn as_a_plain_list(actions in proptest::collection::vec(action(), 1..200)) {
            let mut intervals = Intervals::default();
            let mut list: Vec<(Range, u32)> = Vec::new();
            for (name, action) in (0u32..).zip(actions) {
                match action {
                    Action::Insert(lo, hi, priority) => {
                        intervals.insert(Range::new(lo, hi), name, priority);
                        list.push((Range::new(lo, hi), name));
                    }
                    Action::Remove(n) if !list.is_empty() => {
                        let (range, name) = list.swap_remove(n % list.len());
                        intervals.remove(range, name);
                    }
                    Action::Remove(_) => intervals.remove(Range::new(1, 2), name),
                    Action::Ask(lo, hi) => {
                        let asked = Range::new(lo, hi);
                        let mut expected: Vec<_> =
                            list.iter().filter(|(range, _)| range.overlaps(&asked)).collect();
                        expected.sort_by_key(|(range, name)| key(*range, *name));
                        let expected: Vec<u32> = expected.iter().map(|(_, name)| *name).collect();
                        prop_assert_eq!(found(&intervals, asked), expected);
                        for (range, _) in &list {
                            let mut names = Vec::new();
                            intervals.same(*range, &mut |name| names.push(name));
                            let same = list.iter().filter(|(r, _)| r == range);
                            let mut expected: Vec<u32> = same.map(|(_, name)| *name).collect();
                            expected.sort_unstable();
                            prop_assert_eq!(names, expected);
                        }
                    }
                }
            }
            prop_assert_eq!(intervals.is_empty(), list.is_empty());
        }
    }

    #[test]
    fn ascending_insertion_with_random_priorities_is_no_list() {
        let mut intervals = Intervals::default();
        let mut random = 1u32;
        for n in 0..10_000 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            intervals.insert(Range::new(n, n + 1), n as u32, random);
        }
        let mut depth = 0;
        let mut level = vec![intervals.root];
        while !level.is_empty() {
            depth += 1;
            level = level
                .iter()
                .flat_map(|at| {
                    let node = intervals.nodes[*at as usize];
                    [node.left, node.right]
                })
                .filter(|at| *at != NONE)
                .collect();
        }
        assert!(depth < 60, "{depth} levels for 10,000 ranges");
    }
}
