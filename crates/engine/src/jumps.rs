//! Where one VCPU's generated code goes on: from a linear address to the code that stands for it.
//!
//! Jumps whose target is computed look it up in the frame's tables. Those to a constant address go
//! through a *cell* of their own, which holds the host address or, as long as there is none, that
//! of the code that leaves.
//!
//! An entry or a cell is right as long as the translation of its page is, so it goes with the
//! page's translation. Those of global pages survive a change of the address space.

use foldhash::HashMap;

use crate::frame::{
    Frame, JUMP_CELLS, JUMP_TABLES, SLOTS, empty, jump_cell, jump_hosts, jump_targets,
};

const PAGE_MASK: u64 = !0xfff;
/// Entries noted before all are dropped: bounds what a guest can make the list grow to.
const MANY: usize = 1 << 17;

/// What holds the host address of a target.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Table and slot.
    Entry(u8, u16),
    Cell(u32),
}

/// The places filled for the targets on one linear page.
type Page = Vec<Place>;

/// What was entered, by linear page; the global pages are the second. A page that was marked both
/// ways is in both.
#[derive(Default)]
pub(crate) struct Jumps {
    pages: [HashMap<u64, Page>; 2],
    count: usize,
    /// Target and context of each cell.
    cells: Vec<(u64, u8)>,
    /// Context and number of the cells for a target.
    cells_for: HashMap<u64, Vec<(u8, u32)>>,
    /// What a cell holds that leads nowhere.
    leave: u64,
}

fn slot(target: u64) -> usize {
    target as usize & (SLOTS - 1)
}

fn clear(frame: &mut Frame, page: &[Place], leave: u64) {
    for &place in page {
        match place {
            Place::Entry(table, slot) => {
                let (table, slot) = (usize::from(table), usize::from(slot));
                frame.set_slot(jump_targets(table), slot, empty(slot));
            }
            Place::Cell(cell) => frame.set(jump_cell(cell), leave),
        }
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
        // Targets that share a slot take turns in it, and each comes here every time.
        self.note(
            frame,
            target,
            Place::Entry(table as u8, slot(target) as u16),
            global,
        );
        frame.set_slot(jump_targets(table), slot(target), target.wrapping_neg());
        frame.set_slot(jump_hosts(table), slot(target), host);
    }

    fn note(&mut self, frame: &mut Frame, target: u64, place: Place, global: bool) {
        if self.count >= MANY {
            self.clear(frame);
        }
        let page = self.pages[usize::from(global)]
            .entry(target & PAGE_MASK)
            .or_default();
        if !page.contains(&place) {
            page.push(place);
            self.count += 1;
        }
    }

    /// The cell for jumps to `target` in a context; a new one holds `leave`. `None`: there are too
    /// many.
    pub fn cell(&mut self, frame: &mut Frame, context: u8, target: u64, leave: u64) -> Option<u32> {
        let cells = self.cells_for.entry(target).or_default();
        if let Some(&(_, cell)) = cells.iter().find(|(c, _)| *c == context) {
            return Some(cell);
        }
        if self.cells.len() >= JUMP_CELLS {
            return None;
        }
        let cell = self.cells.len() as u32;
        self.cells.push((target, context));
        cells.push((context, cell));
        self.leave = leave;
        frame.set(jump_cell(cell), leave);
        Some(cell)
    }

    /// Lets jumps through the cell go to `host`, if it is for this context and target.
    pub fn fill(
        &mut self,
        frame: &mut Frame,
        cell: u32,
        context: u8,
        target: u64,
        host: u64,
        global: bool,
    ) {
        if self.cells.get(cell as usize) == Some(&(target, context)) {
            self.note(frame, target, Place::Cell(cell), global);
            frame.set(jump_cell(cell), host);
        }
    }

    /// Forgets what cells are for; no code may use them any more.
    pub fn forget_cells(&mut self, frame: &mut Frame) {
        self.clear(frame);
        self.cells.clear();
        self.cells_for.clear();
    }

    pub fn remove(&mut self, frame: &mut Frame, target: u64) {
        for &(_, cell) in self.cells_for.get(&target).into_iter().flatten() {
            frame.set(jump_cell(cell), self.leave);
        }
        for table in 0..JUMP_TABLES {
            if frame.slot(jump_targets(table), slot(target)) == target.wrapping_neg() {
                frame.set_slot(jump_targets(table), slot(target), empty(slot(target)));
            }
        }
    }

    pub fn clear(&mut self, frame: &mut Frame) {
        for (_, page) in self.pages.iter_mut().flat_map(HashMap::drain) {
            clear(frame, &page, self.leave);
        }
        self.count = 0;
    }

    pub fn clear_non_global(&mut self, frame: &mut Frame) {
        for (_, page) in self.pages[0].drain() {
            self.count -= page.len();
            clear(frame, &page, self.leave);
        }
    }

    pub fn clear_page(&mut self, frame: &mut Frame, page: u64) {
        for pages in &mut self.pages {
            if let Some(page) = pages.remove(&page) {
                self.count -= page.len();
                clear(frame, &page, self.leave);
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
    fn cells_lead_where_they_are_told() {
        let (mut frame, mut jumps) = (Frame::default(), Jumps::default());
        let global = jumps.cell(&mut frame, 1, 0x1234, 7).unwrap();
        let local = jumps.cell(&mut frame, 2, 0x1234, 7).unwrap();
        let place = |frame: &Frame| [global, local].map(|cell| frame.get(jump_cell(cell)));
        assert_eq!(jumps.cell(&mut frame, 1, 0x1234, 7), Some(global));
        assert_eq!(place(&frame), [7, 7]);
        // Not its context, not its target.
        jumps.fill(&mut frame, global, 2, 0x1234, 100, true);
        jumps.fill(&mut frame, global, 1, 0x1235, 100, true);
        assert_eq!(place(&frame), [7, 7]);
        jumps.fill(&mut frame, global, 1, 0x1234, 100, true);
        jumps.fill(&mut frame, local, 2, 0x1234, 200, false);
        assert_eq!(place(&frame), [100, 200]);
        jumps.clear_non_global(&mut frame);
        assert_eq!(place(&frame), [100, 7]);
        jumps.fill(&mut frame, local, 2, 0x1234, 200, false);
        jumps.clear_page(&mut frame, 0x1000);
        assert_eq!(place(&frame), [7, 7]);
        jumps.fill(&mut frame, local, 2, 0x1234, 200, false);
        jumps.remove(&mut frame, 0x1234);
        assert_eq!(place(&frame), [7, 7]);
        jumps.forget_cells(&mut frame);
        assert_eq!(jumps.cell(&mut frame, 5, 0x5678, 7), Some(0));
    }

    #[test]
    fn cells_are_limited() {
        let (mut frame, mut jumps) = (Frame::default(), Jumps::default());
        for target in 0..JUMP_CELLS as u64 {
            assert!(jumps.cell(&mut frame, 0, target, 7).is_some());
        }
        assert_eq!(jumps.cell(&mut frame, 0, 1 << 40, 7), None);
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
