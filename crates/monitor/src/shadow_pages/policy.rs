//! Which guest tables are worth a trace.
//!
//! A trace is established, at a cost of microseconds (other VCPUs must reach an instruction
//! boundary if they may write the page), and then every write of the page is sensed, a fraction of
//! a microsecond. A look-up in the copies instead of a walk saves some tens of nanoseconds. So a
//! table is traced once it has been used by [`WALKS`] walks, and goes untraced, with everything
//! derived from it, when it was written [`WRITES`] times without being used in between: it is being
//! filled, emptied, or has become something else. A page that went untraced must be walked twice as
//! often before it is traced again, each time, up to [`MOST_DOUBLINGS`]; if its trace lasted for
//! [`LASTING`] flushes it begins anew. docs/coherence.md says what other numbers gave.

/// Walks before a table is traced.
pub const WALKS: u32 = 256;
/// Writes without a use in between before a table goes untraced.
pub const WRITES: u32 = 4;
/// The most times that the number of walks is doubled.
const MOST_DOUBLINGS: u8 = 10;
/// Flushes that a trace must have lasted for its page not to count as often written.
const LASTING: u64 = 1024;
/// Pages remembered; a power of two.
const REMEMBERED: usize = 1024;

#[derive(Clone, Copy, Default)]
struct Page {
    page: u64,
    walks: u32,
    doublings: u8,
}

/// How often untraced tables are walked. Remembers a fixed number of pages: of those that share a
/// place the one that is walked more often stays.
pub struct Heat {
    pages: Box<[Page]>,
    /// [`WALKS`], except in tests.
    pub walks: u32,
}

impl Default for Heat {
    fn default() -> Self {
        Self {
            pages: vec![Page::default(); REMEMBERED].into(),
            walks: WALKS,
        }
    }
}

impl Heat {
    fn place(&mut self, gpa: u64) -> &mut Page {
        let page = gpa >> 12;
        &mut self.pages[(page ^ page >> 10) as usize % REMEMBERED]
    }

    /// Notes a walk through the untraced table at `gpa`; whether it is worth a trace now.
    pub fn is_wanted(&mut self, gpa: u64) -> bool {
        let walks = self.walks;
        let place = self.place(gpa);
        if place.page != gpa >> 12 {
            if place.walks > 0 {
                place.walks -= 1;
                return false;
            }
            *place = Page {
                page: gpa >> 12,
                ..Page::default()
            };
        }
        place.walks = place.walks.saturating_add(1);
        place.walks >= walks << place.doublings
    }

    /// The table has been traced: it begins anew when that ends.
    pub fn cool(&mut self, gpa: u64) {
        let place = self.place(gpa);
        if place.page == gpa >> 12 {
            place.walks = 0;
        }
    }

    /// The table went untraced because it was written often, after so many flushes.
    pub fn written_often(&mut self, gpa: u64, lasted: u64) {
        let place = self.place(gpa);
        let before = if place.page == gpa >> 12 && lasted < LASTING {
            place.doublings + 1
        } else {
            u8::from(lasted < LASTING)
        };
        *place = Page {
            page: gpa >> 12,
            walks: 0,
            doublings: before.min(MOST_DOUBLINGS),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walks_until_wanted(heat: &mut Heat, gpa: u64) -> u32 {
        (1..).find(|_| heat.is_wanted(gpa)).unwrap()
    }

    #[test]
    fn each_flood_doubles_the_walks() {
        let mut heat = Heat::default();
        assert_eq!(walks_until_wanted(&mut heat, 0x5000), WALKS);
        heat.cool(0x5000);
        heat.written_often(0x5000, 3);
        assert_eq!(walks_until_wanted(&mut heat, 0x5000), 2 * WALKS);
        heat.cool(0x5000);
        heat.written_often(0x5000, 3);
        assert_eq!(walks_until_wanted(&mut heat, 0x5000), 4 * WALKS);
        heat.cool(0x5000);
        heat.written_often(0x5000, LASTING);
        assert_eq!(walks_until_wanted(&mut heat, 0x5000), WALKS);
    }

    #[test]
    fn the_doublings_end() {
        let mut heat = Heat::default();
        for _ in 0..1000 {
            heat.written_often(0x5000, 0);
        }
        let walks = walks_until_wanted(&mut heat, 0x5000);
        assert_eq!(walks, WALKS << MOST_DOUBLINGS);
    }

    #[test]
    fn the_page_that_is_walked_more_often_stays() {
        let mut heat = Heat::default();
        let (often, seldom) = (0x5000, 0x5000 + ((REMEMBERED as u64) << 12 << 10));
        let first = std::ptr::from_ref(heat.place(often));
        assert_eq!(first, std::ptr::from_ref(heat.place(seldom)));
        let mut wanted = false;
        for _ in 0..WALKS {
            wanted |= heat.is_wanted(often) | heat.is_wanted(often);
            heat.is_wanted(seldom);
        }
        assert!(wanted);
    }
}
