//! Executable memory: one memory file mapped twice, writable and executable, never both at one
//! address. And the process-wide list of such mappings, which the fault handlers read.

use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::NativeError;

/// Bytes of one arena.
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
pub(super) struct Arena {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    used: usize,
    entry: &'static Registered,
}

// SAFETY: the mappings belong to this value alone and are not bound to a thread.
unsafe impl Send for Arena {}

impl Arena {
    pub fn new() -> Result<Self, NativeError> {
        let refused = |source: rustix::io::Errno| NativeError::Memory {
            bytes: ARENA_BYTES,
            source: source.into(),
        };
        let file = memfd_create("trapline-thunks", MemfdFlags::CLOEXEC).map_err(refused)?;
        ftruncate(&file, ARENA_BYTES as u64).map_err(refused)?;
        let map = |protection| {
            // SAFETY: a new mapping at an address that the kernel chooses.
            unsafe {
                mmap(
                    ptr::null_mut(),
                    ARENA_BYTES,
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
                unmap(writable);
                return Err(refused(errno));
            }
        };
        let (Some(writable), Some(executable)) = (
            NonNull::new(writable.cast()),
            NonNull::new(executable.cast::<u8>()),
        ) else {
            return Err(refused(rustix::io::Errno::NOMEM));
        };
        let entry = register(executable.as_ptr() as usize);
        Ok(Self {
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
        if end > ARENA_BYTES {
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

    /// Forgets everything after the first `keep` bytes.
    pub fn truncate(&mut self, keep: usize) {
        self.used = keep.next_multiple_of(ALIGNMENT).min(self.used);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.entry.start.store(0, Ordering::Release);
        unmap(self.writable.as_ptr().cast());
        unmap(self.executable.as_ptr().cast());
    }
}

fn unmap(address: *mut c_void) {
    // SAFETY: a mapping of `Arena`, no longer used. The call cannot fail for it.
    let _ = unsafe { munmap(address, ARENA_BYTES) };
}

/// A place in the list of executable mappings; places are reused, never freed.
struct Registered {
    /// First address; 0: a free place.
    start: AtomicUsize,
    next: AtomicPtr<Registered>,
}

static REGISTERED: AtomicPtr<Registered> = AtomicPtr::new(ptr::null_mut());

fn places() -> impl Iterator<Item = &'static Registered> {
    // SAFETY: places are leaked boxes and stay valid; the list only grows.
    let follow = |place: &AtomicPtr<Registered>| unsafe { place.load(Ordering::Acquire).as_ref() };
    std::iter::successors(follow(&REGISTERED), move |place| follow(&place.next))
}

fn register(start: usize) -> &'static Registered {
    let take = |place: &&Registered| {
        place
            .start
            .compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    };
    if let Some(place) = places().find(take) {
        return place;
    }
    let place: &'static Registered = Box::leak(Box::new(Registered {
        start: AtomicUsize::new(start),
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

/// The recovery code for a fault at `address`, if a guest instruction lies there in an arena.
/// Async-signal-safe.
pub(super) fn recovery(address: usize) -> Option<usize> {
    let inside =
        |start: usize, address: usize| start != 0 && address.wrapping_sub(start) < ARENA_BYTES;
    let start = places()
        .map(|place| place.start.load(Ordering::Acquire))
        .find(|&start| inside(start, address))?;
    let marker = address
        .checked_sub(MARKER_BYTES)
        .filter(|&marker| marker >= start)?;
    // SAFETY: within the executable mapping, which is in use: this thread executes in it.
    let bytes = unsafe { (marker as *const [u8; MARKER_BYTES]).read() };
    let distance = bytes.strip_prefix(&MARKER)?.first_chunk::<4>()?;
    let recovery = address.wrapping_add_signed(i32::from_le_bytes(*distance) as isize);
    inside(start, recovery).then_some(recovery)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_recovery_code_of_marked_addresses_only() {
        let mut arena = Arena::new().expect("arena");
        let mut code = marker(5).to_vec();
        code.extend_from_slice(&[0x90; 6]);
        let address = arena.append(&code).expect("room").as_ptr() as usize;
        let marked = address + MARKER_BYTES;
        assert_eq!(recovery(marked), Some(marked + 5));
        assert_eq!(recovery(marked + 1), None);
        assert_eq!(recovery(0x1000), None);
        drop(arena);
        assert_eq!(recovery(marked), None);
    }

    #[test]
    fn is_bounded() {
        let mut arena = Arena::new().expect("arena");
        let block = vec![0x90; 1 << 20];
        assert!((0..16).all(|_| arena.append(&block).is_some()));
        assert!(arena.append(&[0x90]).is_none());
        arena.truncate(16);
        assert!(arena.append(&[0x90]).is_some());
    }
}
