//! Gaps between traces: bytes of a traced page that no trace covers, to which generated code may
//! store directly.
//!
//! The look-up's tables know whole pages, so a store to a page with a trace misses there. The code
//! that handles misses then looks here for exactly this access: its address, its size and its
//! privilege (its kind). An entry is as good as a slot of the tables: it exists only while the monitor may let
//! the VCPU write these bytes without being sensed, and goes with the same revocations and flushes.
//!
//! Opening a gap costs every later trace on that page a wait for the VCPU that has it, so it must
//! be worth it: an address has to miss some times in a row, and more often once gaps were closed
//! by new traces.

use crate::frame::{Frame, GAPS, gap_addresses, gap_hosts, gap_kinds};

/// Misses at one address until a gap is opened there, at first and at most.
const WANTED: u32 = 8;
const MOST_WANTED: u32 = 1 << 14;

/// What the tables hold for a closed gap: no access has kind 0, which has no size.
const CLOSED: u64 = 0;

#[derive(Clone, Copy, Default)]
struct Slot {
    /// The address and kind that missed here last, and how often in a row.
    linear: u64,
    kind: u32,
    misses: u32,
    /// The guest-physical page, if the gap is open.
    page: Option<u64>,
}

/// The gaps of one VCPU.
pub struct Gaps {
    slots: Box<[Slot; GAPS]>,
    open: usize,
    wanted: u32,
}

impl Default for Gaps {
    fn default() -> Self {
        Self {
            slots: Box::new([Slot::default(); GAPS]),
            open: 0,
            wanted: WANTED,
        }
    }
}

fn slot_of(linear: u64) -> usize {
    linear as usize & (GAPS - 1)
}

impl Gaps {
    /// Notes a miss of this kind (see [`crate::translate`]) at a linear address; whether it was
    /// missed so often that opening a gap there is worth it.
    pub fn is_wanted(&mut self, linear: u64, kind: u32) -> bool {
        let slot = &mut self.slots[slot_of(linear)];
        if (slot.linear, slot.kind) == (linear, kind) {
            slot.misses = slot.misses.saturating_add(1);
            slot.misses >= self.wanted
        } else {
            // What has the slot stays while it is open: two that alternate gain nothing.
            if slot.page.is_none() {
                slot.linear = linear;
                slot.kind = kind;
                slot.misses = 1;
            }
            false
        }
    }

    /// Opens a gap for accesses of this kind at `linear`, which lies at the guest-physical address
    /// `gpa` and which the host sees at `host`. After [`Self::is_wanted`] said so.
    pub fn open(&mut self, frame: &mut Frame, linear: u64, kind: u32, gpa: u64, host: u64) {
        let number = slot_of(linear);
        let slot = &mut self.slots[number];
        self.open += usize::from(slot.page.is_none());
        slot.page = Some(gpa >> 12);
        frame.set_gap(gap_addresses(), number, linear.wrapping_neg());
        frame.set_gap(gap_kinds(), number, u64::from(kind).wrapping_neg());
        frame.set_gap(gap_hosts(), number, host);
    }

    fn close_if(&mut self, frame: &mut Frame, wanted: impl Fn(u64) -> bool) -> bool {
        if self.open == 0 {
            return false;
        }
        let before = self.open;
        for (number, slot) in self.slots.iter_mut().enumerate() {
            if slot.page.is_some_and(&wanted) {
                slot.page = None;
                self.open -= 1;
                frame.set_gap(gap_kinds(), number, CLOSED);
            }
        }
        self.open != before
    }

    /// Closes all gaps: translations change. They open again at the next miss.
    pub fn close(&mut self, frame: &mut Frame) {
        self.close_if(frame, |_| true);
    }

    /// Closes the gaps on the page of `gpa`: a trace is being established there. It takes more
    /// misses from now on until gaps are opened.
    pub fn revoke(&mut self, frame: &mut Frame, gpa: u64) {
        if self.close_if(frame, |page| page == gpa >> 12) {
            self.wanted = (self.wanted * 2).min(MOST_WANTED);
            for slot in self.slots.iter_mut() {
                slot.misses = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(gaps: &mut Gaps, frame: &mut Frame, linear: u64, kind: u32) -> bool {
        let wanted = gaps.is_wanted(linear, kind);
        if wanted {
            gaps.open(frame, linear, kind, linear, 0x10_0000);
        }
        wanted
    }

    fn hits(frame: &Frame, linear: u64, kind: u32) -> bool {
        let slot = slot_of(linear);
        let sum = |offset, with: u64| frame.gap(offset, slot).wrapping_add(with) == 0;
        sum(gap_addresses(), linear) && sum(gap_kinds(), u64::from(kind))
    }

    #[test]
    fn a_gap_opens_after_misses_in_a_row_and_closes_with_its_page() {
        let (mut gaps, mut frame) = (Gaps::default(), Frame::default());
        // Fresh memory holds closed gaps: kinds begin at 1.
        assert!((1..9).all(|kind| !hits(&frame, 0, kind)));
        for n in 1..=WANTED {
            assert!(!hits(&frame, 0x5010, 9));
            assert_eq!(opened(&mut gaps, &mut frame, 0x5010, 9), n == WANTED);
        }
        assert!(hits(&frame, 0x5010, 9));
        assert!(!hits(&frame, 0x5010, 10) && !hits(&frame, 0x5110, 9));
        gaps.revoke(&mut frame, 0x6000);
        assert!(hits(&frame, 0x5010, 9));
        gaps.revoke(&mut frame, 0x5fff);
        assert!(!hits(&frame, 0x5010, 9));
        // Now it takes twice as many.
        let opens = (0..2 * WANTED).filter(|_| opened(&mut gaps, &mut frame, 0x5010, 9));
        assert_eq!(opens.count(), 1);
        gaps.close(&mut frame);
        assert!(!hits(&frame, 0x5010, 9));
        assert!(opened(&mut gaps, &mut frame, 0x5010, 9));
    }
}
