//! Guest memory as page sharing sees it: pages by index, and the file behind them.

use std::fs::File;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};

use super::{Bytes, Member, PAGE};
use crate::GuestMemory;
use crate::atomic::{HostBytes, exchange64};

impl GuestMemory {
    /// Joins a pool, once and for all; whether it was in none.
    pub(super) fn join(&self, member: Member) -> bool {
        self.sharing.set(member).is_ok()
    }

    pub(super) fn member(&self) -> Option<&Member> {
        self.sharing.get()
    }

    pub(super) fn page_count(&self) -> usize {
        let last = self.pieces.last();
        last.map_or(0, |p| p.first_page + p.bytes as usize / PAGE)
    }

    /// The file that holds the pages in order, unless they are shared or were copied by the host.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The host address of a run of pages; `None` unless it is RAM in one piece.
    pub(super) fn host_of_pages(&self, first: usize, count: usize) -> Option<*mut u8> {
        let last = first.checked_add(count)?.checked_sub(1)?;
        let (gpa, end) = (self.gpa_of_page(first)?, self.gpa_of_page(last)?);
        let whole = count > 0 && end - gpa == ((count - 1) * PAGE) as u64;
        whole.then(|| self.host_address(gpa))?
    }

    /// The guest-physical address of a page.
    pub(super) fn gpa_of_page(&self, page: usize) -> Option<u64> {
        let pages = |p: &crate::guest::Piece| p.bytes as usize / PAGE;
        let piece = self
            .pieces
            .iter()
            .find(|p| page >= p.first_page && page - p.first_page < pages(p))?;
        Some(piece.start + ((page - piece.first_page) * PAGE) as u64)
    }

    /// A page's bytes, word by word: VCPUs may be writing.
    pub(super) fn read_page(&self, page: usize) -> Option<Bytes> {
        let host = self.host_of_pages(page, 1)?;
        let mut bytes = [0; PAGE / 8];
        for (n, word) in bytes.iter_mut().enumerate() {
            let at = HostBytes(host.wrapping_add(n * 8));
            *word = at.word64()?.load(std::sync::atomic::Ordering::Relaxed);
        }
        Some(bytes)
    }

    /// Writes to a page without changing it: the host gives a private mapping a page of its own. In
    /// the lane.
    pub(super) fn touch(&self, page: usize) {
        let host = self.host_of_pages(page, 1).map(HostBytes);
        if let Some(word) = host.as_ref().and_then(HostBytes::word64) {
            // A compare-and-exchange writes whatever the outcome (SDM volume 2, CMPXCHG).
            let value = word.load(std::sync::atomic::Ordering::SeqCst);
            let _ = exchange64(word, value, value);
        }
    }

    /// The runs of pages that take memory in the file. The others were never touched, or are shared.
    pub(super) fn pages_in_file(&self) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        let mut at = 0;
        // The end of the file ends both searches with an error.
        while let Ok(data) = seek(&self.file, SeekFrom::Data(at)) {
            let Ok(hole) = seek(&self.file, SeekFrom::Hole(data)) else {
                break;
            };
            runs.push(data as usize / PAGE..(hole as usize).div_ceil(PAGE));
            at = hole;
        }
        runs
    }
}
