//! Where time is spent, and where paths begin.

use foldhash::{HashMap, HashSet};

use super::recorder::Recorder;

/// Samples at a place that make it hot.
const HOT: u8 = 2;
/// Places that are counted at once.
const PLACES: usize = 256;
/// How often a path is recorded from one place, however often it is lost.
const ATTEMPTS: u8 = 8;
/// Places whose attempts are remembered: then all are forgotten.
const MOST: usize = 1 << 14;
/// Where: RIP, and the context's number.
type Place = (u64, u8);

#[derive(Clone, Copy, Default)]
struct Count {
    place: Place,
    samples: u8,
}

/// Where time is spent.
pub(crate) struct Heat {
    counts: Box<[Count; PLACES]>,
    attempts: HashMap<Place, u8>,
    /// Where paths start that were made, and whether they lead back there.
    heads: HashMap<Place, bool>,
    /// Where loops start that were once led elsewhere by what their registers held.
    misled: HashSet<Place>,
    /// The place from which a path is to be recorded when it is next come to.
    wanted: Option<Place>,
}

impl Default for Heat {
    fn default() -> Self {
        Self {
            counts: Box::new([Count::default(); PLACES]),
            attempts: HashMap::default(),
            heads: HashMap::default(),
            misled: HashSet::default(),
            wanted: None,
        }
    }
}

impl Heat {
    /// Notes that the VCPU was found here.
    pub fn note(&mut self, rip: u64, context: u8) {
        let place = (rip, context);
        let count = &mut self.counts[(rip ^ rip >> 8) as usize % PLACES];
        if count.place != place {
            // What is found more often stays.
            if count.samples > 0 {
                count.samples -= 1;
            } else {
                *count = Count { place, samples: 1 };
            }
            return;
        }
        count.samples = (count.samples + 1).min(HOT);
        let tried = self.attempts.get(&place).copied().unwrap_or(0);
        if count.samples == HOT && tried < ATTEMPTS && !self.heads.contains_key(&place) {
            self.wanted = Some(place);
        }
    }

    /// A recorder if a path is to be recorded from here; it is not any more when asked again.
    #[inline]
    pub fn take_wanted(&mut self, rip: u64, context: u8) -> Option<Recorder> {
        if self.wanted != Some((rip, context)) {
            return None;
        }
        self.wanted = None;
        if self.attempts.len() >= MOST {
            self.attempts.clear();
        }
        let attempts = self.attempts.entry((rip, context)).or_default();
        *attempts += 1;
        Some(Recorder::new(rip, *attempts == ATTEMPTS))
    }

    pub fn is_loop(&self, place: Place) -> bool {
        self.heads.get(&place) == Some(&true)
    }

    pub fn add_head(&mut self, place: Place, is_loop: bool) {
        if self.heads.len() >= MOST {
            self.heads.clear();
        }
        self.heads.insert(place, is_loop);
    }

    /// A path from here will not be possible for long.
    pub fn give_up(&mut self, place: Place) {
        self.attempts.insert(place, ATTEMPTS);
    }

    /// The path of the loop that starts here was led elsewhere.
    pub fn add_misled(&mut self, place: Place) {
        if self.misled.len() >= MOST {
            self.misled.clear();
        }
        self.misled.insert(place);
    }

    /// Whether that has happened at this place.
    pub fn is_misled(&self, place: Place) -> bool {
        self.misled.contains(&place)
    }

    /// There is no path here (any more).
    pub fn lost(&mut self, rip: u64, context: u8) {
        self.heads.remove(&(rip, context));
    }

    /// All paths are gone.
    pub fn all_lost(&mut self) {
        self.heads.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_become_hot_and_are_tried_a_few_times() {
        let mut heat = Heat::default();
        heat.note(0x1000, 1);
        assert!(heat.take_wanted(0x1000, 1).is_none());
        for attempt in 1..=ATTEMPTS {
            heat.note(0x1000, 1);
            assert!(heat.take_wanted(0x1000, 2).is_none());
            let recorder = heat.take_wanted(0x1000, 1).unwrap();
            assert_eq!(recorder.straight, attempt == ATTEMPTS);
            assert!(heat.take_wanted(0x1000, 1).is_none());
        }
        heat.note(0x1000, 1);
        assert!(heat.take_wanted(0x1000, 1).is_none());
    }

    #[test]
    fn a_place_with_a_path_is_not_wanted_until_it_is_lost() {
        let mut heat = Heat::default();
        heat.add_head((0x1000, 1), true);
        assert!(heat.is_loop((0x1000, 1)) && !heat.is_loop((0x1000, 2)));
        for _ in 0..5 {
            heat.note(0x1000, 1);
        }
        assert!(heat.take_wanted(0x1000, 1).is_none());
        heat.lost(0x1000, 1);
        heat.note(0x1000, 1);
        assert!(heat.take_wanted(0x1000, 1).is_some());
    }

    #[test]
    fn what_is_found_more_often_stays_counted() {
        let mut heat = Heat::default();
        heat.note(0x1000, 1);
        // The same slot, once each.
        heat.note(0x1000, 2);
        heat.note(0x1000, 1);
        heat.note(0x1000, 1);
        assert!(heat.take_wanted(0x1000, 1).is_some());
    }
}
