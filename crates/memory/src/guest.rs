//! The bytes of guest RAM.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, OnceLock};

use rustix::fs::{MemfdFlags, memfd_create};
use trapline_trace::{Actor, Phase, Range, Sense, Sensor, TraceSystem, VcpuId, VcpuSet};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use crate::atomic::{HostBytes, exchange32, exchange64};
use crate::pages::Pages;
use crate::sharing::{Member, MemberStatistics};
use crate::watch::{Touch, Watches};

const PAGE_SHIFT: u32 = 12;
const PAGE: u64 = 1 << PAGE_SHIFT;
/// RAM from address 0 ends here at the latest; devices have the space up to 4 GiB.
pub const LOW_END: u64 = 3 << 30;
/// Where RAM goes on.
pub const HIGH_START: u64 = 4 << 30;

/// The ranges of RAM of a guest with so many bytes.
pub fn guest_ram(bytes: u64) -> Vec<Range> {
    let low = bytes.min(LOW_END);
    let mut ranges = vec![Range::new(0, low)];
    if bytes > low {
        ranges.push(Range::new(HIGH_START, HIGH_START + (bytes - low)));
    }
    ranges
}

/// The host does not give the memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("guest memory of {bytes} bytes is no positive multiple of 4096; round the size")]
    Size { bytes: u64 },
    #[error("the host refused {bytes} bytes of guest memory ({source}); ask for less")]
    Refused { bytes: u64, source: io::Error },
}

/// Bytes from `gpa` to the end of its page.
fn room(gpa: u64) -> usize {
    (PAGE - (gpa & (PAGE - 1))) as usize
}

pub(crate) struct Piece {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    host: usize,
    /// Index of its first page in [`Pages`], and in the file.
    pub(crate) first_page: usize,
}

/// Guest RAM, mapped as long as this lives.
pub struct GuestMemory {
    mapped: GuestMemoryMmap<()>,
    pub(crate) pieces: Vec<Piece>,
    pages: Pages,
    watches: Arc<Watches>,
    /// Where all pages of RAM lie in order, unless they are shared.
    pub(crate) file: File,
    pub(crate) sharing: OnceLock<Member>,
}

impl GuestMemory {
    /// `bytes` of zeroed RAM, in one file in memory: from 0 up to 3 GiB, the rest from 4 GiB.
    ///
    /// # Errors
    /// The size is no multiple of a page, or the host refuses.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE) {
            return Err(MemoryError::Size { bytes });
        }
        let refused = |source| MemoryError::Refused { bytes, source };
        let file =
            memfd_create("trapline-guest", MemfdFlags::CLOEXEC).map_err(|e| refused(e.into()))?;
        let file = File::from(file);
        file.set_len(bytes).map_err(refused)?;
        let low = bytes.min(LOW_END);
        let share = |offset| file.try_clone().map(|f| Some(FileOffset::new(f, offset)));
        let mut ranges = vec![(GuestAddress(0), low as usize, share(0).map_err(refused)?)];
        if bytes > low {
            let high = share(low).map_err(refused)?;
            ranges.push((GuestAddress(HIGH_START), (bytes - low) as usize, high));
        }
        let mapped = GuestMemoryMmap::from_ranges_with_files(ranges)
            .map_err(|e| refused(io::Error::other(e.to_string())))?;
        let mut pieces = Vec::new();
        let mut first_page = 0;
        for region in mapped.iter() {
            let start = region.start_addr().0;
            let host = mapped
                .get_host_address(region.start_addr())
                .map_err(|e| refused(io::Error::other(e.to_string())))?;
            pieces.push(Piece {
                start,
                bytes: region.len(),
                host: host as usize,
                first_page,
            });
            first_page += (region.len() >> PAGE_SHIFT) as usize;
        }
        Ok(Self {
            mapped,
            pieces,
            pages: Pages::new(first_page),
            watches: Arc::default(),
            file,
            sharing: OnceLock::new(),
        })
    }

    /// Has sensed accesses reported to these watches.
    #[must_use]
    pub fn watched_by(self, watches: Arc<Watches>) -> Self {
        Self { watches, ..self }
    }

    /// Whoever performs a sensed access does so through them.
    pub fn watches(&self) -> &Watches {
        &self.watches
    }

    /// For loaders, before any VCPU runs.
    pub fn inner(&self) -> &GuestMemoryMmap<()> {
        &self.mapped
    }

    fn piece(&self, gpa: u64) -> Option<&Piece> {
        self.pieces
            .iter()
            .find(|p| gpa.wrapping_sub(p.start) < p.bytes)
    }

    /// The index of the page of RAM at `gpa`.
    fn page(&self, gpa: u64) -> Option<usize> {
        let piece = self.piece(gpa)?;
        Some(piece.first_page + ((gpa - piece.start) >> PAGE_SHIFT) as usize)
    }

    /// The host address of the byte of RAM at `gpa`; valid up to the end of its page.
    #[inline]
    pub fn host_address(&self, gpa: u64) -> Option<*mut u8> {
        let piece = self.piece(gpa)?;
        Some((piece.host + (gpa - piece.start) as usize) as *mut u8)
    }

    fn word(&self, gpa: u64, bytes: u64) -> Option<HostBytes> {
        // A word does not cross a page, so its first byte decides.
        ((gpa & (PAGE - 1)) + bytes <= PAGE).then(|| self.host_address(gpa).map(HostBytes))?
    }

    /// The aligned word at `gpa`; `None` where there is no RAM.
    pub fn read_u64(&self, gpa: u64) -> Option<u64> {
        let word = self.word(gpa, 8)?;
        Some(word.word64()?.load(std::sync::atomic::Ordering::SeqCst))
    }

    /// As [`Self::read_u64`], 32 bits wide.
    pub fn read_u32(&self, gpa: u64) -> Option<u32> {
        let word = self.word(gpa, 4)?;
        Some(word.word32()?.load(std::sync::atomic::Ordering::SeqCst))
    }

    /// Replaces `old` by `new` atomically; `None` where there is no RAM, else whether it was `old`
    /// or what was found. The caller has direct access ([`Self::hold`]) or is being sensed.
    pub fn compare_exchange_u64(&self, gpa: u64, old: u64, new: u64) -> Option<Result<(), u64>> {
        let word = self.word(gpa, 8)?;
        Some(exchange64(word.word64()?, old, new))
    }

    /// As [`Self::compare_exchange_u64`], 32 bits wide.
    pub fn compare_exchange_u32(&self, gpa: u64, old: u32, new: u32) -> Option<Result<(), u32>> {
        let word = self.word(gpa, 4)?;
        Some(exchange32(word.word32()?, old, new))
    }

    /// Reads bytes; whether all of them are RAM.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        self.mapped.read_slice(data, GuestAddress(gpa)).is_ok()
    }

    /// Reads bytes for anyone who is no VCPU, as an event of the read traces that it hits. Whether
    /// all of them are RAM.
    pub fn read_sensed(
        &self,
        trace: &TraceSystem,
        actor: Actor,
        gpa: u64,
        data: &mut [u8],
    ) -> bool {
        let mut good = true;
        let mut at = 0;
        while at < data.len() {
            let here = gpa.wrapping_add(at as u64);
            let len = room(here).min(data.len() - at);
            let part = &mut data[at..at + len];
            let range = Range::new(here, here.saturating_add(len as u64));
            let touch = by(actor, &range, Sense::READ);
            let _ = trace.access(actor, &[range], Sense::READ, &mut |_| {}, &mut || {
                let mut read = || good &= self.read(here, part);
                self.watches.perform(self, touch, &mut read);
            });
            at += len;
        }
        good
    }

    /// Writes bytes for anyone who is no VCPU (a device by DMA, a debugger): sensed and notified
    /// like any other write, one event per page. Whether all of them are RAM. Words of eight bytes
    /// at addresses that eight divides are written whole.
    ///
    /// Called on a thread that is no VCPU's, without a lock that a running VCPU may wait for: it
    /// may wait for all VCPUs.
    pub fn write(&self, trace: &TraceSystem, actor: Actor, gpa: u64, data: &[u8]) -> bool {
        let mut good = true;
        let mut at = 0;
        while at < data.len() {
            let here = gpa.wrapping_add(at as u64);
            let part = &data[at..data.len().min(at + room(here))];
            let range = Range::new(here, here.saturating_add(part.len() as u64));
            // A writer that is no VCPU has nothing to start again.
            let touch = by(actor, &range, Sense::WRITE);
            let mut perform = |phase: Phase<'_>| match phase {
                Phase::Foresee(value) => value.extend_from_slice(part),
                Phase::Perform => {
                    let mut write = || {
                        self.before_write(&[range]);
                        good &= self.write_page(here, part);
                    };
                    self.watches.perform(self, touch, &mut write);
                }
            };
            let ranges = [range];
            let _ = trace.access_foreseen(actor, &ranges, Sense::WRITE, &mut |_| {}, &mut perform);
            self.after_writes(trace);
            at += part.len();
        }
        good
    }

    /// Writes bytes within one page; whether it is RAM.
    fn write_page(&self, gpa: u64, data: &[u8]) -> bool {
        if self.host_address(gpa).is_none() {
            return false;
        }
        let edge = |at: usize| GuestAddress(gpa + at as u64);
        let head = data.len().min(gpa.wrapping_neg() as usize & 7);
        let mut good = self.mapped.write_slice(&data[..head], edge(0)).is_ok();
        let words = data[head..].chunks_exact(8);
        let (rest, mut at) = (words.remainder(), head);
        for word in words {
            let value = word.iter().rev().fold(0, |sum, &b| sum << 8 | u64::from(b));
            let host = self.word(gpa + at as u64, 8);
            good &= host.is_some_and(|host| host.store64(value));
            at += 8;
        }
        good & self.mapped.write_slice(rest, edge(at)).is_ok()
    }

    /// To be called in the trace subsystem's lane, right before a sensed write to `ranges`: a page
    /// that is shared becomes the machine's own.
    #[inline]
    pub fn before_write(&self, ranges: &[Range]) {
        let Some(member) = self.sharing.get() else {
            return;
        };
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            for page in range.lo >> PAGE_SHIFT..=(range.hi - 1) >> PAGE_SHIFT {
                if let Some(page) = self.page(page << PAGE_SHIFT) {
                    member.before_write(self, page);
                }
            }
        }
    }

    /// To be called after sensed writes, outside the lane: takes pages out of traces that the writes
    /// made needless.
    #[inline]
    pub fn after_writes(&self, trace: &TraceSystem) {
        if let Some(member) = self.sharing.get() {
            member.pool.remove_released(self, member, trace);
        }
    }

    /// What page sharing did; `None` if the machine takes no part in it.
    pub fn sharing_statistics(&self) -> Option<MemberStatistics> {
        let member = self.sharing.get()?;
        Some(member.pool.member_statistics(member))
    }

    /// The host memory that is this machine's alone, in bytes: copies that it shares are the pool's.
    pub fn resident_bytes(&self) -> u64 {
        // The unit of st_blocks is 512 bytes.
        let in_file = self.file.metadata().map_or(0, |m| m.blocks() * 512);
        let private = self.sharing_statistics().map_or(0, |s| s.private_pages);
        in_file + private * PAGE
    }

    /// Takes direct access to the page of `gpa` for a VCPU, before it makes a translation that
    /// allows it. Whether it may: otherwise such accesses have to be sensed.
    pub fn hold(&self, vcpu: VcpuId, gpa: u64, sense: Sense) -> bool {
        self.page(gpa)
            .is_some_and(|page| self.pages.hold(page, vcpu, sense))
    }

    /// The VCPU will write some bytes of the page of `gpa` directly though writes to the page are
    /// sensed: no trace covers these bytes. To be called within
    /// [`TraceSystem::untraced`]. Whether there is such a page.
    pub fn hold_beside(&self, vcpu: VcpuId, gpa: u64) -> bool {
        self.page(gpa)
            .is_some_and(|page| self.pages.hold_beside(page, vcpu))
    }

    /// The VCPU has dropped its direct translations of the page of `gpa` for these accesses.
    pub fn release(&self, vcpu: VcpuId, gpa: u64, sense: Sense) {
        if let Some(page) = self.page(gpa) {
            self.pages.release(page, vcpu, sense);
        }
    }
}

/// The access of an actor that executes no instruction.
fn by(actor: Actor, range: &Range, sense: Sense) -> Touch<'_> {
    Touch {
        actor,
        rip: None,
        ranges: std::slice::from_ref(range),
        sense,
    }
}

impl Sensor for GuestMemory {
    fn protect(&self, gpa: u64, sense: Sense) -> VcpuSet {
        self.page(gpa)
            .map_or(VcpuSet::EMPTY, |page| self.pages.protect(page, sense))
    }
    fn relax(&self, gpa: u64, sense: Sense) {
        if let Some(page) = self.page(gpa) {
            self.pages.relax(page, sense);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trapline_trace::{Kind, Notice, Semantics, TRACE};

    #[test]
    fn sizes_must_be_pages() {
        assert!(matches!(GuestMemory::new(0), Err(MemoryError::Size { .. })));
        assert!(matches!(
            GuestMemory::new(4097),
            Err(MemoryError::Size { .. })
        ));
    }

    #[test]
    fn memory_above_the_hole() {
        let memory = GuestMemory::new(LOW_END + 2 * PAGE).unwrap();
        assert!(memory.host_address(LOW_END - 1).is_some());
        assert!(memory.host_address(LOW_END).is_none());
        assert!(memory.host_address(HIGH_START + 2 * PAGE - 1).is_some());
        assert!(memory.host_address(HIGH_START + 2 * PAGE).is_none());
        assert_eq!(memory.compare_exchange_u64(HIGH_START, 0, 7), Some(Ok(())));
        assert_eq!(memory.read_u64(HIGH_START), Some(7));
        assert_eq!(memory.read_u64(HIGH_START + 4092), None);
        assert_eq!(memory.compare_exchange_u64(HIGH_START, 0, 9), Some(Err(7)));
    }

    #[test]
    fn a_device_write_notifies() {
        let memory = Arc::new(GuestMemory::new(4 * PAGE).unwrap());
        let trace = TraceSystem::new(1, memory.clone());
        let vcpu = VcpuId::new(0);
        let range = Range::new(0x1100, 0x1110);
        trace
            .establish(
                None,
                VcpuSet::one(vcpu),
                range,
                Kind::Code,
                Sense::WRITE,
                0,
                &mut |_| {},
            )
            .unwrap();
        assert!(!memory.hold(vcpu, 0x1000, Sense::WRITE));
        assert!(memory.hold(vcpu, 0x2000, Sense::WRITE));
        assert!(memory.write(&trace, Actor::Device, 0xfff, &[1; 0x100]));
        assert!(!trace.attention(vcpu).pending());
        assert!(memory.write(&trace, Actor::Device, 0xfff, &[1; 0x102]));
        assert_eq!(trace.attention(vcpu).take(u32::MAX), TRACE);
        trace.set_semantics(Kind::Code, Semantics::PreWriteValue);
        assert!(memory.write(&trace, Actor::Device, 0x110f, &[6, 7]));
        let mut values = Vec::new();
        trace.boundary(vcpu, &mut |notice| {
            if let Notice::Notification(n) = notice {
                values.push(n.value.map(|value| value.to_vec()));
            }
        });
        assert_eq!(values, [None, Some(vec![6, 7])]);
        assert!(!memory.write(&trace, Actor::Device, 4 * PAGE, &[1]));
    }

    #[test]
    fn a_write_has_head_words_and_rest() {
        let memory = Arc::new(GuestMemory::new(4 * PAGE).unwrap());
        let trace = TraceSystem::new(1, memory.clone());
        for start in 0..17 {
            for len in 0..40 {
                let data: Vec<u8> = (1..=len).collect();
                let at = PAGE - 20 + start;
                assert!(memory.write(&trace, Actor::Device, at - 8, &[0xff; 64]));
                assert!(memory.write(&trace, Actor::Device, at, &data));
                let mut seen = [0; 64];
                assert!(memory.read_sensed(&trace, Actor::Device, at - 8, &mut seen));
                assert_eq!(seen[8..][..data.len()], data);
                assert!(seen[..8].iter().all(|b| *b == 0xff));
                assert!(seen[8 + data.len()..].iter().all(|b| *b == 0xff));
            }
        }
        assert!(!memory.write(&trace, Actor::Device, u64::MAX - 3, &[1; 4]));
        assert!(!memory.read_sensed(&trace, Actor::Device, u64::MAX - 3, &mut [0; 4]));
    }
}
