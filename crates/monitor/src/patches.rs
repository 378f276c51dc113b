//! Which bytes of code are rewritten again and again, so that what is derived from them can be made
//! cheaper to lose.
//!
//! Counted are the writes that invalidated something of this VCPU's. Bytes that were rewritten
//! [`OFTEN`] times stand apart from then on: their instruction gets a block of its own (so that its
//! neighbours live on), and if they lie in its immediate, the immediate is read at run time
//! ([`trapline_engine::translate::tail`]) and its bytes are not traced at all. What is rewritten
//! [`ALWAYS`] times all the same is stepped.

use std::collections::BTreeMap;

use trapline_trace::Range;

/// Writes after which bytes count as rewritten often.
pub const OFTEN: u32 = 4;
/// Writes after which an instruction is stepped rather than translated again, if nothing else has
/// helped: translating it costs more than executing it ten times.
pub const ALWAYS: u32 = 256;
/// Executions without a write after which it is translated after all.
const QUIET: u32 = 16;
/// Longer writes replace code rather than patch it.
const LONGEST: u64 = 16;
/// The most places remembered: then all are forgotten.
const MOST: usize = 4096;

#[derive(Debug)]
struct Place {
    hi: u64,
    writes: u32,
    /// Executions that were stepped since the last one.
    stepped: u32,
}

/// The places that were written, by where they begin.
#[derive(Debug, Default)]
pub struct Patches {
    places: BTreeMap<u64, Place>,
}

impl Patches {
    /// Notes a write that invalidated something; whether its bytes count as rewritten often from
    /// now on, and did not before.
    pub fn note(&mut self, written: Range) -> bool {
        if written.hi.saturating_sub(written.lo) > LONGEST {
            return false;
        }
        if self.places.len() >= MOST {
            self.places.clear();
        }
        let place = self.places.entry(written.lo).or_insert(Place {
            hi: written.hi,
            writes: 0,
            stepped: 0,
        });
        place.stepped = 0;
        place.hi = place.hi.max(written.hi);
        place.writes = place.writes.saturating_add(1);
        place.writes == OFTEN
    }

    /// Whether the instruction in `range`, which is about to be executed, is to be stepped: it is
    /// rewritten about as often as it is executed.
    pub fn is_stepped(&mut self, range: Range) -> bool {
        let from = range.lo.saturating_sub(LONGEST);
        let mut places = self.places.range_mut(from..range.hi);
        let always = |place: &Place| place.writes >= ALWAYS && place.hi > range.lo;
        let Some((_, place)) = places.find(|(_, place)| always(place)) else {
            return false;
        };
        place.stepped += 1;
        if place.stepped <= QUIET {
            return true;
        }
        // It has to be rewritten as often again.
        place.writes = OFTEN;
        false
    }

    /// The first place that is rewritten often and has bytes in `range`.
    pub fn first_in(&self, range: Range) -> Option<Range> {
        let from = range.lo.saturating_sub(LONGEST);
        let mut places = self.places.range(from..range.hi);
        places
            .find(|(_, place)| place.writes >= OFTEN && place.hi > range.lo)
            .map(|(&lo, place)| Range::new(lo, place.hi))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_apart_when_written_often() {
        let mut patches = Patches::default();
        let written = Range::new(0x101, 0x105);
        for n in 1..=6 {
            assert_eq!(patches.note(written), n == OFTEN);
            let found = patches.first_in(Range::new(0x100, 0x110));
            assert_eq!(found, (n >= OFTEN).then_some(written));
        }
        // Parts, neighbours.
        let within = |lo, hi| patches.first_in(Range::new(lo, hi));
        assert_eq!(within(0x103, 0x104), Some(written));
        assert_eq!(within(0x105, 0x200), None);
        assert_eq!(within(0x0, 0x101), None);
    }

    #[test]
    fn what_never_stops_changing_is_known() {
        let mut patches = Patches::default();
        for n in 1..=ALWAYS {
            patches.note(Range::new(0x100, 0x101));
            assert_eq!(patches.is_stepped(Range::new(0xfd, 0x102)), n == ALWAYS);
        }
        assert!(!patches.is_stepped(Range::new(0x101, 0x110)));
        assert!(!patches.is_stepped(Range::new(0xf0, 0x100)));
    }

    #[test]
    fn what_stops_changing_is_stepped_no_more() {
        let mut patches = Patches::default();
        let place = Range::new(0x100, 0x101);
        for _ in 0..ALWAYS {
            patches.note(place);
        }
        for _ in 0..3 {
            // A write begins the count anew.
            patches.note(place);
            assert!((0..QUIET).all(|_| patches.is_stepped(place)));
        }
        assert!(!patches.is_stepped(place) && !patches.is_stepped(place));
        patches.note(place);
        assert!(!patches.is_stepped(place));
    }

    #[test]
    fn the_first_of_several_is_found() {
        let mut patches = Patches::default();
        for _ in 0..OFTEN {
            patches.note(Range::new(0x100, 0x101));
            patches.note(Range::new(0x108, 0x10c));
            // What replaces code is not counted.
            patches.note(Range::new(0x80, 0x180));
        }
        let within = |lo, hi| patches.first_in(Range::new(lo, hi));
        assert_eq!(within(0xf0, 0x200), Some(Range::new(0x100, 0x101)));
        assert_eq!(within(0x101, 0x200), Some(Range::new(0x108, 0x10c)));
    }

    #[test]
    fn the_number_of_places_is_bounded() {
        let mut patches = Patches::default();
        for n in 0..3 * MOST as u64 {
            patches.note(Range::new(n, n + 1));
        }
        assert!(patches.places.len() <= MOST);
    }
}
