//! ELF kernels: segments and the PVH entry note.
//!
//! linux-loader reads ELF64 only, leaves what is not in the file as it is, and stops at the first
//! damaged note; Multiboot images are ELF32 and a guest may be reset, so the format is read here.

use super::error::KernelFault;
use super::image::{Image, Source, require_ram, u16_at, u32_at, u64_at};
use super::{Context, Fault};

const MAGIC: &[u8] = b"\x7fELF";
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// The type of the note in which Xen's PVH protocol has the 32-bit entry point.
const XEN_PHYS32_ENTRY: u32 = 18;
/// More program headers than this are no kernel's.
const MAX_SEGMENTS: u16 = 256;
/// Longer notes are no kernel's.
const MAX_NOTE_BYTES: u64 = 1 << 20;

const TRUNCATED_HEADER: KernelFault = KernelFault::Damaged("its ELF header is too short");

/// A segment to be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadSegment {
    /// Where its bytes are in the file.
    pub offset: u64,
    pub file_bytes: u64,
    pub virtual_address: u64,
    pub physical_address: u64,
    /// At least `file_bytes`; what is beyond is zero.
    pub memory_bytes: u64,
}

/// What an ELF file says about itself.
#[derive(Debug)]
pub struct Elf {
    pub entry: u64,
    pub segments: Vec<LoadSegment>,
    /// The PVH entry point, if there is a note with one.
    pub pvh_entry: Option<u32>,
}

/// A program header of either class.
struct ProgramHeader {
    kind: u32,
    segment: LoadSegment,
    alignment: u64,
}

/// Whether a file that begins so is an ELF file.
pub fn detect(beginning: &[u8]) -> bool {
    beginning.starts_with(MAGIC)
}

impl Elf {
    pub fn parse<S: Source>(image: &mut Image<S>) -> Result<Self, KernelFault> {
        let header = image.beginning(64)?;
        let byte = |n| header.get(n).copied().ok_or(TRUNCATED_HEADER);
        let wide = match byte(4)? {
            CLASS_32 => false,
            CLASS_64 => true,
            _ => {
                return Err(KernelFault::Damaged(
                    "its ELF class is neither 32 nor 64 bits",
                ));
            }
        };
        if byte(5)? != LITTLE_ENDIAN {
            return Err(KernelFault::Unsuitable("a big-endian ELF file"));
        }
        let short = |n| u16_at(&header, n).ok_or(TRUNCATED_HEADER);
        if !matches!(short(18)?, MACHINE_386 | MACHINE_X86_64) {
            return Err(KernelFault::Unsuitable("an ELF file for another processor"));
        }
        let word = |narrow, wide_offset| match wide {
            true => u64_at(&header, wide_offset),
            false => u32_at(&header, narrow).map(u64::from),
        };
        let entry = word(24, 24).ok_or(TRUNCATED_HEADER)?;
        let table = word(28, 32).ok_or(TRUNCATED_HEADER)?;
        let (entry_bytes, count) = match wide {
            true => (short(54)?, short(56)?),
            false => (short(42)?, short(44)?),
        };
        if entry_bytes != if wide { 56 } else { 32 } {
            return Err(KernelFault::Damaged(
                "its program headers have an impossible size",
            ));
        }
        if count > MAX_SEGMENTS {
            return Err(KernelFault::Damaged(
                "it has more program headers than a kernel can have",
            ));
        }
        let mut bytes = vec![0; usize::from(entry_bytes) * usize::from(count)];
        image.read(table, &mut bytes)?;

        let mut elf = Self {
            entry,
            segments: Vec::new(),
            pvh_entry: None,
        };
        for bytes in bytes.chunks_exact(entry_bytes.into()) {
            let Some(header) = ProgramHeader::parse(bytes, wide) else {
                continue;
            };
            let segment = header.segment;
            match header.kind {
                PT_LOAD if segment.memory_bytes > 0 => elf.segments.push(segment),
                PT_NOTE if elf.pvh_entry.is_none() => {
                    elf.pvh_entry = read_pvh_entry(image, &header)?;
                }
                _ => {}
            }
        }
        elf.check(image)?;
        Ok(elf)
    }

    /// Checks that the segments are in the file and apart from each other in memory.
    fn check<S: Source>(&mut self, image: &Image<S>) -> Result<(), KernelFault> {
        if self.segments.is_empty() {
            return Err(KernelFault::Damaged("it has nothing to load"));
        }
        self.segments.sort_by_key(|s| s.physical_address);
        let mut free_from = 0;
        for segment in &self.segments {
            image.require(segment.offset, segment.file_bytes)?;
            if segment.file_bytes > segment.memory_bytes {
                return Err(KernelFault::Damaged(
                    "a segment is longer in the file than in memory",
                ));
            }
            // So loading is bounded by the size of memory too.
            if segment.physical_address < free_from {
                return Err(KernelFault::Damaged("its segments overlap in memory"));
            }
            free_from = segment
                .physical_address
                .checked_add(segment.memory_bytes)
                .ok_or(KernelFault::Damaged(
                    "a segment lies beyond any memory's end",
                ))?;
        }
        Ok(())
    }

    /// Loads every segment to its physical address and returns the end of the last one.
    pub(super) fn load<S: Source>(
        &self,
        context: &Context<'_>,
        image: &mut Image<S>,
    ) -> Result<u64, Fault> {
        // All are checked before the first one is loaded.
        let mut end = 0;
        for segment in &self.segments {
            end = require_ram(
                context.memory,
                segment.physical_address,
                segment.memory_bytes,
            )?;
        }
        for s in &self.segments {
            image.load(
                context.memory,
                s.offset,
                s.file_bytes,
                s.physical_address,
                s.memory_bytes,
            )?;
        }
        Ok(end)
    }

    /// Whether the physical address is in a loaded segment.
    pub fn holds(&self, physical: u64) -> bool {
        self.segments.iter().any(|s| {
            physical
                .checked_sub(s.physical_address)
                .is_some_and(|o| o < s.memory_bytes)
        })
    }

    /// The physical address of the entry point, which the header gives as a virtual one where
    /// the two differ.
    pub fn physical_entry(&self) -> Option<u64> {
        let translated = self.segments.iter().find_map(|s| {
            let offset = self.entry.checked_sub(s.virtual_address)?;
            (offset < s.memory_bytes).then(|| s.physical_address + offset)
        });
        translated.or_else(|| self.holds(self.entry).then_some(self.entry))
    }
}

impl ProgramHeader {
    fn parse(bytes: &[u8], wide: bool) -> Option<Self> {
        let kind = u32_at(bytes, 0)?;
        let word = |index: usize| match wide {
            true => u64_at(bytes, 8 * index),
            false => u32_at(bytes, 4 * index).map(u64::from),
        };
        // With 64 bits the flags come second, with 32 bits second to last.
        Some(Self {
            kind,
            segment: LoadSegment {
                offset: word(1)?,
                virtual_address: word(2)?,
                physical_address: word(3)?,
                file_bytes: word(4)?,
                memory_bytes: word(5)?,
            },
            alignment: word(if wide { 6 } else { 7 })?,
        })
    }
}

/// The PVH entry point from a segment of notes.
fn read_pvh_entry<S: Source>(
    image: &mut Image<S>,
    header: &ProgramHeader,
) -> Result<Option<u32>, KernelFault> {
    let LoadSegment {
        offset, file_bytes, ..
    } = header.segment;
    image.require(offset, file_bytes)?;
    if file_bytes > MAX_NOTE_BYTES {
        return Err(KernelFault::Damaged(
            "its notes are longer than a kernel's can be",
        ));
    }
    let mut notes = vec![0; file_bytes as usize];
    image.read(offset, &mut notes)?;
    // Kernels align notes to 4 bytes even where the header says 8.
    let found = find_pvh_note(&notes, 4);
    Ok(if found.is_none() && header.alignment == 8 {
        find_pvh_note(&notes, 8)
    } else {
        found
    })
}

/// Walks notes, each a header of three words, a name and a descriptor, the latter two padded.
/// A damaged note ends the walk.
fn find_pvh_note(mut notes: &[u8], alignment: usize) -> Option<u32> {
    loop {
        let name_bytes = u32_at(notes, 0)? as usize;
        let descriptor_bytes = u32_at(notes, 4)? as usize;
        let kind = u32_at(notes, 8)?;
        let body = notes.get(12..)?;
        let descriptor = body.get(name_bytes.checked_next_multiple_of(alignment)?..)?;
        if kind == XEN_PHYS32_ENTRY && body.get(..name_bytes)? == b"Xen\0" && descriptor_bytes >= 4
        {
            return u32_at(descriptor, 0);
        }
        notes = descriptor.get(descriptor_bytes.checked_next_multiple_of(alignment)?..)?;
    }
}
