//! Reading a kernel file that may be anything.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

use super::error::KernelFault;
use super::layout::{DEVICE_HOLE, HIGH_RAM, low_memory_end};

/// How much guest memory is looked at in one go when clearing.
const CLEAR_BYTES: usize = 64 << 10;

/// What a kernel is read from: a file, or bytes in memory.
pub trait Source: Read + ReadVolatile + Seek {}
impl<T: Read + ReadVolatile + Seek> Source for T {}

/// A kernel image of known length. Every read is checked against it.
pub struct Image<S> {
    pub source: S,
    length: u64,
}

/// Opens a regular file for reading. A pipe would let a wrong path hang the start.
pub fn open_regular(path: &Path) -> io::Result<Option<File>> {
    if !std::fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    File::open(path).map(Some)
}

impl<S: Source> Image<S> {
    pub fn new(mut source: S) -> Result<Self, KernelFault> {
        let length = source.seek(SeekFrom::End(0)).map_err(KernelFault::Read)?;
        Ok(Self { source, length })
    }

    /// The image's length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Checks that the image has the `count` bytes from `offset`.
    pub fn require(&self, offset: u64, count: u64) -> Result<(), KernelFault> {
        let need = offset.checked_add(count).ok_or(KernelFault::Damaged(
            "an offset in its headers is beyond any file's end",
        ))?;
        if need > self.length {
            return Err(KernelFault::Truncated {
                have: self.length,
                need,
            });
        }
        Ok(())
    }

    /// Fills `buffer` from `offset`.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), KernelFault> {
        self.require(offset, buffer.len() as u64)?;
        self.source
            .seek(SeekFrom::Start(offset))
            .map_err(KernelFault::Read)?;
        self.source.read_exact(buffer).map_err(KernelFault::Read)
    }

    /// The first `count` bytes, fewer if the image is shorter.
    pub fn beginning(&mut self, count: usize) -> Result<Vec<u8>, KernelFault> {
        let mut bytes = vec![0; self.length.min(count as u64) as usize];
        self.read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies `count` bytes from `offset` to guest memory at `address` and clears what follows up
    /// to `memory_bytes`.
    pub fn load(
        &mut self,
        memory: &GuestMemoryMmap<()>,
        offset: u64,
        count: u64,
        address: u64,
        memory_bytes: u64,
    ) -> Result<(), KernelFault> {
        self.require(offset, count)?;
        require_ram(memory, address, memory_bytes.max(count))?;
        self.source
            .seek(SeekFrom::Start(offset))
            .map_err(KernelFault::Read)?;
        memory
            .read_exact_volatile_from(GuestAddress(address), &mut self.source, count as usize)
            .map_err(|e| KernelFault::Read(io::Error::other(e)))?;
        // Within RAM, so below 3 GiB: nothing overflows.
        if memory_bytes > count {
            clear(memory, address + count, memory_bytes - count)?;
        }
        Ok(())
    }
}

/// Checks that [address, address + count) is RAM a kernel may be loaded to, and returns its end.
pub fn require_ram(
    memory: &GuestMemoryMmap<()>,
    address: u64,
    count: u64,
) -> Result<u64, KernelFault> {
    if address < HIGH_RAM {
        return Err(KernelFault::TooLow { start: address });
    }
    let end = address.saturating_add(count);
    if end > DEVICE_HOLE {
        return Err(KernelFault::TooHigh { end });
    }
    let ram_end = low_memory_end(memory);
    if end > ram_end {
        return Err(KernelFault::TooLittleMemory { end, ram_end });
    }
    Ok(end)
}

/// Clears guest memory that is known to be RAM. Only what is not zero yet is written, so that the
/// host need not give pages to memory that was never used.
fn clear(memory: &GuestMemoryMmap<()>, address: u64, count: u64) -> Result<(), KernelFault> {
    let failed = |e| KernelFault::Read(io::Error::other(e));
    let zeros = vec![0; CLEAR_BYTES];
    let mut found = vec![0; CLEAR_BYTES];
    let mut done = 0;
    while done < count {
        let n = (count - done).min(CLEAR_BYTES as u64) as usize;
        let at = GuestAddress(address + done);
        memory.read_slice(&mut found[..n], at).map_err(failed)?;
        if found[..n] != zeros[..n] {
            memory.write_slice(&zeros[..n], at).map_err(failed)?;
        }
        done += n as u64;
    }
    Ok(())
}

/// A little-endian number at `offset` of `bytes`, or `None` if they end before.
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(
        bytes.get(offset..)?.first_chunk().copied()?,
    ))
}
/// As [`u16_at`].
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(offset..)?.first_chunk().copied()?,
    ))
}
/// As [`u16_at`].
pub fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(
        bytes.get(offset..)?.first_chunk().copied()?,
    ))
}
