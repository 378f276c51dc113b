//! The jump tables of one VCPU: from a linear address to the generated code that stands for it.
//!
//! An entry is right as long as the translation of its page is, so it goes with the page's
//! translation. Entries of global pages survive a change of the address space.

use foldhash::HashMap;

use crate::frame::{Frame, JUMP_TABLES, SLOTS, empty, jump_hosts, jump_targets};

const PAGE_MASK: u64 = !0xfff;
/// Entries noted before all are dropped: bounds what a guest can make the list grow to.
const MANY: usize = 1 << 17;

/// The entries of one linear page: table and slot.
type Page = Vec<(u8, u16)>;

/// What was entered, by linear page; the global pages are the second. A page that was marked both
/// ways is in both.
#[derive(Default)]
pub(crate) struct Jumps {
    pages: [HashMap<u64, Page>; 2],
    count: usize,
}

fn slot(target: u64) -> usize {
    target as usize & (SLOTS - 1)
}

fn clear(frame: &mut Frame, page: &[(u8, u16)]) {
    for &(table, slot) in page {
        let (table, slot) = (usize::from(table), usize::from(slot));
        frame.set_slot(jump_targets(table), slot, empty(slot));
    }
}

/// The host address for `target`.
#[inline]
pub(crate) fn find(frame: &Frame, table: usize, target: u64) -> Option<u64> {
    let slot = slot(target);
    (target.wrapping_add(frame.slot(jump_targets(table), slot)) == 0)
        .then(|| frame.slot(jump_hosts(table), slot))
}

impl Jumps {
    pub fn insert(
        &mut self,
        frame: &mut Frame,
        table: usize,
        target: u64,
        host: u64,
        global: bool,
    ) {
        if self.count >= MANY {
            self.clear(frame);
        }
        let page = self.pages[usize::from(global)]
            .entry(target & PAGE_MASK)
            .or_default();
        // Targets that share a slot take turns in it, and each comes here every time.
        let entry = (table as u8, slot(target) as u16);
        if !page.contains(&entry) {
            page.push(entry);
            self.count += 1;
        }
        frame.set_slot(jump_targets(table), slot(target), target.wrapping_neg());
        frame.set_slot(jump_hosts(table), slot(target), host);
    }

    pub fn remove(&mut self, frame: &mut Frame, target: u64) {
        for table in 0..JUMP_TABLES {
            if frame.slot(jump_targets(table), slot(target)) == target.wrapping_neg() {
                frame.set_slot(jump_targets(table), slot(target), empty(slot(target)));
            }
        }
    }

    pub fn clear(&mut self, frame: &mut Frame) {
        for (_, page) in self.pages.iter_mut().flat_map(HashMap::drain) {
            clear(frame, &page);
        }
        self.count = 0;
    }

    pub fn clear_non_global(&mut self, frame: &mut Frame) {
        for (_, page) in self.pages[0].drain() {
            self.count -= page.len();
            clear(frame, &page);
        }
    }

    pub fn clear_page(&mut self, frame: &mut Frame, page: u64) {
        for pages in &mut self.pages {
            if let Some(page) = pages.remove(&page) {
                self.count -= page.len();
                clear(frame, &page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(frame: &Frame, table: usize, target: u64) -> bool {
        target.wrapping_add(frame.slot(jump_targets(table), slot(target))) == 0
    }

    #[test]
    fn entries_go_with_their_page() {
        let (mut frame, mut jumps) = (Frame::default(), Jumps::default());
        jumps.insert(&mut frame, 0, 0x1234, 1, true);
        jumps.insert(&mut frame, 2, 0x5678, 2, false);
        jumps.insert(&mut frame, 2, 0x5abc, 2, false);
        assert!(found(&frame, 0, 0x1234) && found(&frame, 2, 0x5678));
        assert!(!found(&frame, 1, 0x1234) && !found(&frame, 0, 0x1_1234));
        jumps.clear_non_global(&mut frame);
        assert!(found(&frame, 0, 0x1234) && !found(&frame, 2, 0x5678));
        jumps.clear_page(&mut frame, 0x1000);
        assert!(!found(&frame, 0, 0x1234));
        assert_eq!(jumps.count, 0);
    }

    #[test]
    fn targets_that_take_turns_are_noted_once() {
        let (mut frame, mut jumps) = (Frame::default(), Jumps::default());
        for _ in 0..10 {
            jumps.insert(&mut frame, 0, 0x1_1234, 1, true);
            jumps.insert(&mut frame, 0, 0x2_1234, 2, true);
        }
        assert_eq!(jumps.count, 2);
        assert_eq!(find(&frame, 0, 0x2_1234), Some(2));
        assert_eq!(find(&frame, 0, 0x1_1234), None);
    }

    #[test]
    fn slot_zero_is_never_found_empty() {
        let (mut frame, mut jumps) = (Frame::default(), Jumps::default());
        assert!(!found(&frame, 0, 0));
        jumps.insert(&mut frame, 0, 0, 1, false);
        assert!(found(&frame, 0, 0));
        jumps.remove(&mut frame, 0);
        assert!(!found(&frame, 0, 0));
    }
}
