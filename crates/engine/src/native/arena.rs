//! Executable memory: one memory file mapped twice, writable and executable, never both at one
//! address. And the process-wide list of such mappings, which the fault handlers read.

use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::NativeError;

/// Bytes of an arena of thunks.
pub(super) const ARENA_BYTES: usize = 16 << 20;
/// Thunks start at multiples of this, as branch targets like it.
const ALIGNMENT: usize = 16;

/// A NOP whose displacement is the way from its end to the recovery code. It stands before every
/// instruction of a thunk that may fault.
const MARKER: [u8; 3] = [0x0f, 0x1f, 0x80];
/// Bytes of the marker with its displacement.
pub(super) const MARKER_BYTES: usize = 7;

/// The marker for recovery code `distance` bytes after the marker's end.
pub(super) fn marker(distance: i32) -> [u8; MARKER_BYTES] {
    let mut bytes = [0; MARKER_BYTES];
    bytes[..3].copy_from_slice(&MARKER);
    bytes[3..].copy_from_slice(&distance.to_le_bytes());
    bytes
}

/// Executable memory that grows until it is full.
pub(crate) struct Arena {
    bytes: usize,
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    used: usize,
    entry: &'static Registered,
}

// SAFETY: the mappings belong to this value alone and are not bound to a thread.
unsafe impl Send for Arena {}

impl Arena {
    pub fn new(bytes: usize) -> Result<Self, NativeError> {
        let refused = |source: rustix::io::Errno| NativeError::Memory {
            bytes,
            source: source.into(),
        };
        let file = memfd_create("trapline-thunks", MemfdFlags::CLOEXEC).map_err(refused)?;
        ftruncate(&file, bytes as u64).map_err(refused)?;
        let map = |protection| {
            // SAFETY: a new mapping at an address that the kernel chooses.
            unsafe {
                mmap(
                    ptr::null_mut(),
                    bytes,
                    protection,
                    MapFlags::SHARED,
                    &file,
                    0,
                )
            }
        };
        let writable = map(ProtFlags::READ | ProtFlags::WRITE).map_err(refused)?;
        let executable = match map(ProtFlags::READ | ProtFlags::EXEC) {
            Ok(executable) => executable,
            Err(errno) => {
                unmap(writable, bytes);
                return Err(refused(errno));
            }
        };
        let (Some(writable), Some(executable)) = (
            NonNull::new(writable.cast()),
            NonNull::new(executable.cast::<u8>()),
        ) else {
            return Err(refused(rustix::io::Errno::NOMEM));
        };
        let entry = register(executable.as_ptr() as usize, bytes);
        Ok(Self {
            bytes,
            writable,
            executable,
            used: 0,
            entry,
        })
    }

    /// The executable address at which the next [`Self::append`] puts its bytes.
    pub fn next(&self) -> u64 {
        self.executable.as_ptr() as u64 + self.used as u64
    }

    /// Makes `code` executable at [`Self::next`]; `None` if it does not fit.
    pub fn append(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let end = self
            .used
            .checked_add(code.len())?
            .checked_next_multiple_of(ALIGNMENT)?;
        if end > self.bytes {
            return None;
        }
        // SAFETY: `used..end` lies within both mappings, and nothing refers to it yet.
        let address = unsafe {
            ptr::copy_nonoverlapping(
                code.as_ptr(),
                self.writable.as_ptr().add(self.used),
                code.len(),
            );
            self.executable.add(self.used)
        };
        self.used = end;
        Some(address)
    }

    /// The executable address of the first byte.
    pub fn start(&self) -> u64 {
        self.executable.as_ptr() as u64
    }

    /// A copy of bytes that [`Self::append`] has filled; empty for others.
    pub fn copy(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut copy = vec![0; len];
        if offset.checked_add(len).is_none_or(|end| end > self.used) {
            return Vec::new();
        }
        // SAFETY: within the writable mapping, where only this thread writes.
        unsafe {
            ptr::copy_nonoverlapping(self.writable.as_ptr().add(offset), copy.as_mut_ptr(), len);
        }
        copy
    }

    /// Overwrites four bytes at an offset that [`Self::append`] has filled; another offset does
    /// nothing. Only for the thread that executes the code.
    pub fn patch(&mut self, offset: usize, bytes: [u8; 4]) {
        if offset.checked_add(4).is_some_and(|end| end <= self.used) {
            // SAFETY: within the writable mapping; the processor notices stores to code by their
            // physical address, and nobody else executes it.
            unsafe {
                self.writable
                    .as_ptr()
                    .add(offset)
                    .cast::<[u8; 4]>()
                    .write_unaligned(bytes);
            }
        }
    }

    /// From now on a fault at an address behind the first `behind` bytes goes on at `recovery`
    /// with the faulting address in RCX, instead of at the recovery code that a marker tells.
    pub fn recover_at(&mut self, behind: usize, recovery: u64) {
        self.entry.behind.store(behind, Ordering::Relaxed);
        self.entry
            .recovery
            .store(recovery as usize, Ordering::Release);
    }

    /// Forgets everything after the first `keep` bytes.
    pub fn truncate(&mut self, keep: usize) {
        self.used = keep.next_multiple_of(ALIGNMENT).min(self.used);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.entry.start.store(0, Ordering::Release);
        self.entry.recovery.store(0, Ordering::Relaxed);
        unmap(self.writable.as_ptr().cast(), self.bytes);
        unmap(self.executable.as_ptr().cast(), self.bytes);
    }
}

fn unmap(address: *mut c_void, bytes: usize) {
    // SAFETY: a mapping of `Arena`, no longer used. The call cannot fail for it.
    let _ = unsafe { munmap(address, bytes) };
}

/// A place in the list of executable mappings; places are reused, never freed.
struct Registered {
    /// First address; 0: a free place.
    start: AtomicUsize,
    bytes: AtomicUsize,
    /// Where faults go on; 0: as the marker tells.
    recovery: AtomicUsize,
    /// Bytes at the start in which faults are not recovered.
    behind: AtomicUsize,
    next: AtomicPtr<Registered>,
}

static REGISTERED: AtomicPtr<Registered> = AtomicPtr::new(ptr::null_mut());

fn places() -> impl Iterator<Item = &'static Registered> {
    // SAFETY: places are leaked boxes and stay valid; the list only grows.
    let follow = |place: &AtomicPtr<Registered>| unsafe { place.load(Ordering::Acquire).as_ref() };
    std::iter::successors(follow(&REGISTERED), move |place| follow(&place.next))
}

fn register(start: usize, bytes: usize) -> &'static Registered {
    let take = |place: &&Registered| {
        // Reserved first, so that nobody sees a start with another's size.
        place
            .start
            .compare_exchange(0, usize::MAX, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    };
    if let Some(place) = places().find(take) {
        place.bytes.store(bytes, Ordering::Relaxed);
        place.start.store(start, Ordering::Release);
        return place;
    }
    let place: &'static Registered = Box::leak(Box::new(Registered {
        start: AtomicUsize::new(start),
        bytes: AtomicUsize::new(bytes),
        recovery: AtomicUsize::new(0),
        behind: AtomicUsize::new(0),
        next: AtomicPtr::new(ptr::null_mut()),
    }));
    let mut head = REGISTERED.load(Ordering::Acquire);
    loop {
        place.next.store(head, Ordering::Relaxed);
        let new = ptr::from_ref(place).cast_mut();
        match REGISTERED.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return place,
            Err(other) => head = other,
        }
    }
}

/// Where a thread that faulted goes on.
pub(super) enum Recovery {
    /// At this address, with the vector in RAX.
    Thunk(usize),
    /// At this address, with the faulting address in RCX.
    Translated(usize),
}

/// The recovery code for a fault at `address`, if a guest instruction lies there in an arena.
/// Async-signal-safe.
pub(super) fn recovery(address: usize) -> Option<Recovery> {
    let place = places().find(|place| {
        let start = place.start.load(Ordering::Acquire);
        let bytes = place.bytes.load(Ordering::Relaxed);
        start != 0 && start != usize::MAX && address.wrapping_sub(start) < bytes
    })?;
    let start = place.start.load(Ordering::Acquire);
    let bytes = place.bytes.load(Ordering::Relaxed);
    match place.recovery.load(Ordering::Acquire) {
        0 => {}
        recovery => {
            let inside = address.wrapping_sub(start) >= place.behind.load(Ordering::Relaxed);
            return inside.then_some(Recovery::Translated(recovery));
        }
    }
    let marker = address
        .checked_sub(MARKER_BYTES)
        .filter(|&marker| marker >= start)?;
    // SAFETY: within the executable mapping, which is in use: this thread executes in it.
    let code = unsafe { (marker as *const [u8; MARKER_BYTES]).read() };
    let distance = code.strip_prefix(&MARKER)?.first_chunk::<4>()?;
    let recovery = address.wrapping_add_signed(i32::from_le_bytes(*distance) as isize);
    (recovery.wrapping_sub(start) < bytes).then_some(Recovery::Thunk(recovery))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_recovery_code_of_marked_addresses_only() {
        let mut arena = Arena::new(ARENA_BYTES).expect("arena");
        let mut code = marker(5).to_vec();
        code.extend_from_slice(&[0x90; 6]);
        let address = arena.append(&code).expect("room").as_ptr() as usize;
        let marked = address + MARKER_BYTES;
        assert!(matches!(recovery(marked), Some(Recovery::Thunk(at)) if at == marked + 5));
        assert!(recovery(marked + 1).is_none());
        assert!(recovery(0x1000).is_none());
        drop(arena);
        assert!(recovery(marked).is_none());
    }

    #[test]
    fn is_bounded() {
        let mut arena = Arena::new(ARENA_BYTES).expect("arena");
        let block = vec![0x90; 1 << 20];
        assert!((0..16).all(|_| arena.append(&block).is_some()));
        assert!(arena.append(&[0x90]).is_none());
        arena.truncate(16);
        assert!(arena.append(&[0x90]).is_some());
    }
}
