//! Changing what lies behind the host addresses of guest RAM.
//!
//! Rust code touches guest RAM only by atomic and volatile accesses through pointers
//! ([`crate::atomic`]), so exchanging the memory behind an address changes values at most.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};

use super::PAGE;
use crate::GuestMemory;

/// A run of whole pages of a machine's RAM: proof that the range is mapped and stays so.
pub struct Run<'a> {
    memory: &'a GuestMemory,
    first: usize,
    count: usize,
    host: *mut c_void,
}

const ACCESS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

impl<'a> Run<'a> {
    /// The pages `first..first + count` of `memory`; `None` unless they are RAM in one piece.
    pub fn new(memory: &'a GuestMemory, first: usize, count: usize) -> Option<Self> {
        let host = memory.host_of_pages(first, count)?.cast();
        Some(Self {
            memory,
            first,
            count,
            host,
        })
    }

    fn bytes(&self) -> usize {
        self.count * PAGE
    }

    /// Maps copies in place of the pages: those from `offset` of `copies`, privately.
    pub fn map_copies(&self, copies: &File, offset: u64) -> io::Result<()> {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: `host` and the bytes behind it belong to the guest's RAM, which `memory` keeps
        // mapped; the protection stays the same.
        unsafe { mmap(self.host, self.bytes(), ACCESS, flags, copies, offset) }?;
        Ok(())
    }

    /// Maps zeros in place of the pages, which take no memory until they are written.
    pub fn map_zeros(&self) -> io::Result<()> {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: as in `map_copies`.
        unsafe { mmap_anonymous(self.host, self.bytes(), ACCESS, flags) }?;
        // One written byte must not cost a large page. A kernel without large pages refuses, which
        // is as good.
        // SAFETY: the advice changes no byte.
        let _ = unsafe { madvise(self.host, self.bytes(), Advice::LinuxNoHugepage) };
        Ok(())
    }

    /// Maps the machine's own file again.
    pub fn map_own(&self) -> io::Result<()> {
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
        let offset = (self.first * PAGE) as u64;
        let file = self.memory.file();
        // SAFETY: as in `map_copies`; pages of RAM lie in the file in order.
        unsafe { mmap(self.host, self.bytes(), ACCESS, flags, file, offset) }?;
        Ok(())
    }
}
