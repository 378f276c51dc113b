//! Placing an initramfs.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::{InitramfsFault, LoadError};
use super::image::open_regular;

const PAGE: u64 = 4096;

/// An initramfs file, opened.
pub struct Initramfs {
    path: PathBuf,
    file: File,
    /// Its size in bytes, not zero.
    size: u64,
}

/// Where an initramfs lies in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    pub start: u64,
    pub size: u64,
}

/// Which end of the free memory it goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Directly behind the kernel, where small kernels expect their modules.
    Low,
    /// As high as possible, out of the kernel's way.
    High,
}

impl Initramfs {
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let fail = |fault| LoadError::Initramfs {
            path: path.to_owned(),
            fault,
        };
        let file = open_regular(path)
            .map_err(|e| fail(InitramfsFault::Open(e)))?
            .ok_or_else(|| fail(InitramfsFault::NotRegular))?;
        let size = file
            .metadata()
            .map_err(|e| fail(InitramfsFault::Read(e)))?
            .len();
        if size == 0 {
            return Err(fail(InitramfsFault::Empty));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            size,
        })
    }

    /// Loads it to a page boundary within [`low`, `high`), which is RAM.
    pub fn place(
        &mut self,
        memory: &GuestMemoryMmap<()>,
        low: u64,
        high: u64,
        side: Side,
    ) -> Result<Placed, LoadError> {
        let fail = |fault| LoadError::Initramfs {
            path: self.path.clone(),
            fault,
        };
        let start = find_room(self.size, low, high, side).ok_or_else(|| {
            fail(InitramfsFault::DoesNotFit {
                size: self.size,
                low,
                high,
            })
        })?;
        memory
            .read_exact_volatile_from(GuestAddress(start), &mut self.file, self.size as usize)
            .map_err(|e| fail(InitramfsFault::Read(io::Error::other(e))))?;
        Ok(Placed {
            start,
            size: self.size,
        })
    }
}

/// A page-aligned start for `size` bytes within [`low`, `high`).
fn find_room(size: u64, low: u64, high: u64, side: Side) -> Option<u64> {
    let first = low.checked_next_multiple_of(PAGE)?;
    let last = high.checked_sub(size)? & !(PAGE - 1);
    (first <= last).then_some(match side {
        Side::Low => first,
        Side::High => last,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_page_aligned_and_inside() {
        assert_eq!(
            find_room(0x1001, 0x10_0001, 0x20_0000, Side::High),
            Some(0x1f_e000)
        );
        assert_eq!(
            find_room(0x1001, 0x10_0001, 0x20_0000, Side::Low),
            Some(0x10_1000)
        );
        assert_eq!(find_room(0x1000, 0x1000, 0x2000, Side::High), Some(0x1000));
        assert_eq!(find_room(0x1001, 0x1000, 0x2000, Side::High), None);
        assert_eq!(find_room(u64::MAX, 0x1000, 0x2000, Side::High), None);
        assert_eq!(find_room(1, u64::MAX, 0x2000, Side::Low), None);
    }
}
