//! The binary translator: 64-bit guest code becomes host code that runs by itself.
//!
//! A decoded block ([`crate::decode`]) is emitted once ([`emit`]): instructions that may run as
//! they are keep their form and only get their registers renamed ([`plain`], [`registers`]) and
//! their memory operand looked up ([`memory`]); stack operations and branches are emitted
//! sequences ([`control`]); everything else is a call to a helper that lets the stepping engine
//! execute one instruction. Guest registers live in host registers, guest flags in host flags, and
//! the guest's vector registers in the host's as long as no helper runs.
//!
//! [`run()`] executes translated code until it leaves, by a [`Site`] or because an instruction must
//! be stepped. Branches within a page are linked directly ([`Translator::link`]); jumps to constant
//! addresses on other pages go through cells, computed ones through jump tables, which live and die
//! with the translations of their pages ([`crate::tlb`]).
//!
//! Accesses off the same registers share one look-up ([`shared`]); where that is not possible at run
//! time, the block goes on in an unshared translation of its own.
//!
//! Every block begins with a poll of the VCPU's attention word; forward branches within a page
//! skip it. Code that is executed often becomes a path over several blocks ([`path`]).

mod assembler;
mod control;
mod emit;
mod exits;
#[cfg(test)]
mod goldens;
mod immediate;
mod liveness;
mod memory;
mod path;
mod plain;
mod registers;
mod run;
mod shared;
mod stubs;
mod treatment;
mod values;

use iced_x86::{Encoder, InstructionInfoFactory};
use trapline_x86::control::{cr0, cr4, dr7, rflags, xcr0};
use trapline_x86::state::InterruptShadow;
use trapline_x86::{CpuState, Mode};

use crate::decode::Block;
use crate::decode::op::OpKind;
use crate::native::arena::Arena;
use crate::native::host::Host;
use crate::native::{NativeCode, NativeError, ThunkError, fault};
use crate::tlb::{Privilege, Tlb, data_table};
use assembler::Assembler;
pub use emit::{Site, StackEffect};
pub use immediate::{RunTime, Tail, tail};
pub use liveness::dead_flags;
pub use run::{Entry, Left, finish_branch, run};
use stubs::Stubs;

/// Bytes of executable memory for one VCPU's translations.
const ARENA_BYTES: usize = 32 << 20;

/// What translated code depends on besides its bytes and their address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Context {
    /// Of its data accesses.
    pub privilege: Privilege,
    /// The current privilege level is 0.
    pub ring0: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// SSE, AVX and AVX-512 instructions do not fault.
    pub sse: bool,
    pub avx: bool,
    pub avx512: bool,
}

/// Whether code in this state may run translated: 64-bit, and no check is due at every instruction.
#[inline]
pub fn may_run(cpu: &CpuState) -> bool {
    let special = cpu.shadow != InterruptShadow::None
        || cpu.rflags & (rflags::TF | rflags::RF) != 0
        || cpu.dr7 & dr7::ENABLES != 0
        || cpu.rflags & rflags::AC != 0 && cpu.cr0 & cr0::AM != 0 && cpu.cpl() == 3;
    !special && cpu.mode() == Mode::Long64
}

impl Context {
    pub fn of(cpu: &CpuState) -> Self {
        // A state that the host refuses to load is left to the stepping engine.
        let loadable = cpu.vector.mxcsr & !0xffff == 0;
        let sse = loadable && cpu.cr0 & (cr0::EM | cr0::TS) == 0 && cpu.cr4 & cr4::OSFXSR != 0;
        let extended = |bits| {
            loadable
                && cpu.cr0 & cr0::TS == 0
                && cpu.cr4 & cr4::OSXSAVE != 0
                && cpu.xcr0 & bits == bits
        };
        Self {
            privilege: Privilege::of_data(cpu),
            ring0: cpu.cpl() == 0,
            smap: cpu.cr4 & cr4::SMAP != 0,
            sse,
            avx: extended(xcr0::SSE | xcr0::AVX),
            avx512: extended(xcr0::SSE | xcr0::AVX | xcr0::AVX512),
        }
    }

    /// As a number below 128, the privilege in the lowest two bits.
    pub fn number(self) -> u8 {
        self.privilege as u8
            | u8::from(self.sse) << 2
            | u8::from(self.avx) << 3
            | u8::from(self.avx512) << 4
            | u8::from(self.ring0) << 5
            | u8::from(self.smap) << 6
    }

    fn data_table(self, write: bool) -> usize {
        data_table(self.privilege, write)
    }

    fn jump_table(self) -> usize {
        self.privilege as usize
    }
}

/// A translated block, by number. Numbers are not used again until the translator is reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BlockId(u32);

struct Translated {
    rip: u64,
    /// Where its bytes lie, and its context: a direct link needs both the same.
    page: u64,
    context: u8,
    unshared: bool,
    /// Offsets in the arena: the entry that polls is the first byte.
    start: u32,
    entry: u32,
    end: u32,
    points: Box<[(u32, u16)]>,
    /// In a path: where its instructions are, to which `points` give numbers instead of offsets.
    path: Option<Box<[u64]>>,
    /// Sites that were linked to it.
    incoming: Vec<u32>,
}

/// What is to be translated.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub block: &'a Block,
    /// The bytes that its operations were decoded from, one behind the other.
    pub guest: &'a [u8],
    pub context: Context,
    /// The number of the guest-physical page that they lie on.
    pub page: u64,
    /// Each access is to look up its address by itself.
    pub unshared: bool,
    /// It is a path of a loop that was once led elsewhere by what its registers held
    /// ([`Site::Misled`]): it is to look at that in each turn.
    pub wary: bool,
    /// The block is one operation that has a [`tail`], which is read each time it executes.
    pub run_time: Option<RunTime>,
}

/// The translated code of one VCPU.
pub struct Translator {
    arena: Arena,
    stubs: Stubs,
    stub_bytes: usize,
    bmi2: bool,
    /// The address of the VCPU's attention word.
    attention: u64,
    encoder: Encoder,
    factory: InstructionInfoFactory,
    blocks: Vec<Translated>,
    /// Where each of them starts, for a search that touches little memory.
    starts: Vec<u32>,
    sites: Vec<Site>,
    /// Operations that code points to.
    assisted: emit::Kept,
}

impl Translator {
    /// Reserves executable memory and installs the fault handlers. Its code polls `attention`, the
    /// VCPU's attention word.
    ///
    /// # Errors
    /// The host refused one of them.
    pub fn new(attention: *const u32) -> Result<Self, NativeError> {
        fault::install()?;
        let mut arena = Arena::new(ARENA_BYTES)?;
        let mut assembler = Assembler::new(arena.start());
        let stubs = stubs::emit(&mut assembler, Host::detect()).unwrap_or_default();
        let _ = arena.append(&assembler.bytes);
        let stub_bytes = assembler.here();
        arena.recover_at(stub_bytes, stubs.fault);
        Ok(Self {
            arena,
            stubs,
            stub_bytes,
            attention: attention as u64,
            bmi2: is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2"),
            encoder: Encoder::new(64),
            factory: InstructionInfoFactory::new(),
            blocks: Vec::new(),
            starts: Vec::new(),
            sites: Vec::new(),
            assisted: Vec::new(),
        })
    }
    /// As [`Self::new`], but the code has none of the instructions of BMI1 and BMI2, as on a
    /// processor without them: for tests.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn plain(attention: *const u32) -> Result<Self, NativeError> {
        Ok(Self {
            bmi2: false,
            ..Self::new(attention)?
        })
    }

    /// Translates a block of 64-bit code.
    ///
    /// # Errors
    /// [`ThunkError::Full`]: forget every block, call [`Self::reset`] and [`Tlb::forget_cells`], retry.
    pub fn translate(
        &mut self,
        source: Source<'_>,
        native: &mut NativeCode,
        tlb: &mut Tlb,
    ) -> Result<BlockId, ThunkError> {
        let Source {
            block,
            guest,
            context,
            page,
            unshared,
            wary,
            run_time,
        } = source;
        let start = self.arena.next();
        let offset = start.wrapping_sub(self.arena.start()) as u32;
        let request = emit::Request {
            block,
            guest,
            context,
            run_time,
            stubs: &self.stubs,
            bmi2: self.bmi2,
            attention: self.attention,
            start,
            offset,
            first_site: self.sites.len(),
            unshared,
            wary,
            tlb,
        };
        let emitted = emit::emit(request, &mut self.encoder, &mut self.factory)?;
        let mut assisted = emitted.assisted;
        for op in &mut assisted {
            if op.thunk.is_some()
                || !matches!(
                    op.kind,
                    OpKind::Native | OpKind::NativeMemory(_) | OpKind::NativeMasked(_)
                )
            {
                continue;
            }
            match native.thunk(&op.instruction) {
                Ok(thunk) => op.thunk = Some(thunk),
                Err(ThunkError::Full) => return Err(ThunkError::Full),
                Err(ThunkError::Unsupported) => op.kind = OpKind::Undefined,
            }
        }
        self.arena.append(&emitted.bytes).ok_or(ThunkError::Full)?;
        self.assisted.append(&mut assisted);
        self.sites.extend_from_slice(&emitted.sites);
        self.starts.push(offset);
        self.blocks.push(Translated {
            rip: block.rip,
            page,
            context: context.number(),
            unshared,
            start: offset,
            entry: offset + emitted.entry as u32,
            end: offset + emitted.bytes.len() as u32,
            points: emitted.points.into_boxed_slice(),
            path: block
                .is_path()
                .then(|| block.ops.iter().map(|op| op.instruction.ip()).collect()),
            incoming: Vec::new(),
        });
        Ok(BlockId(self.blocks.len() as u32 - 1))
    }

    /// Where to begin a block: behind its poll, since the caller has polled. So every turn gets on.
    pub fn entry(&self, block: BlockId) -> Option<Entry> {
        let block = self.blocks.get(block.0 as usize)?;
        Some(Entry {
            function: self.stubs.enter,
            address: self.arena.start() + u64::from(block.entry),
            attention: self.attention,
        })
    }

    /// Where to begin at what [`Self::address`] gave: with the poll.
    pub fn entry_at(&self, address: u64) -> Entry {
        Entry {
            function: self.stubs.enter,
            address,
            attention: self.attention,
        }
    }

    /// The host address of a block with its poll, for the jump tables.
    pub fn address(&self, block: BlockId) -> Option<u64> {
        let block = self.blocks.get(block.0 as usize)?;
        Some(self.arena.start() + u64::from(block.start))
    }

    /// What a cell holds that leads nowhere ([`Tlb::jump_cell`]).
    pub fn way_out(&self) -> u64 {
        self.stubs.leave
    }

    /// Bytes of host code of a block.
    pub fn code_bytes(&self, block: BlockId) -> u32 {
        self.blocks
            .get(block.0 as usize)
            .map_or(0, |block| block.end - block.start)
    }

    /// The host code of a block, where it is, and whether it is a path.
    pub fn code(&self, block: BlockId) -> Option<(u64, Vec<u8>, bool)> {
        let block = self.blocks.get(block.0 as usize)?;
        let (start, len) = (block.start as usize, (block.end - block.start) as usize);
        let address = self.arena.start() + u64::from(block.start);
        Some((address, self.arena.copy(start, len), block.path.is_some()))
    }

    /// The site with this number.
    pub fn site(&self, number: u64) -> Option<Site> {
        self.sites.get(usize::try_from(number).ok()?).copied()
    }

    /// Makes the direct branch at a site go to `block` without leaving.
    pub fn link(&mut self, site: u64, block: BlockId) {
        let number = site as usize;
        let Some(&Site::Link {
            patch,
            backward,
            target: rip,
            unshared,
            ..
        }) = self.sites.get(number)
        else {
            return;
        };
        let source = self.block_at(patch).map(|b| (b.page, b.context));
        let Some(target) = self.blocks.get_mut(block.0 as usize) else {
            return;
        };
        let right = target.rip == rip && target.unshared == unshared;
        if source != Some((target.page, target.context)) || !right {
            // The page was mapped anew, or an event came in between.
            return;
        }
        let place = if backward { target.start } else { target.entry };
        target.incoming.push(number as u32);
        let distance = place.wrapping_sub(patch + 4);
        self.arena.patch(patch as usize, distance.to_le_bytes());
    }

    /// Nothing leads to the block from other blocks any more.
    pub fn unlink(&mut self, block: BlockId) {
        let Some(target) = self.blocks.get_mut(block.0 as usize) else {
            return;
        };
        for number in std::mem::take(&mut target.incoming) {
            if let Some(&Site::Link {
                patch, unlinked, ..
            }) = self.sites.get(number as usize)
            {
                self.arena.patch(patch as usize, unlinked.to_le_bytes());
            }
        }
    }

    fn block_at(&self, offset: u32) -> Option<&Translated> {
        let after = self.starts.partition_point(|&start| start <= offset);
        self.blocks.get(after.checked_sub(1)?)
    }

    /// The guest instruction that the code at a host address stands for.
    pub fn rip_of(&self, address: u64) -> Option<u64> {
        let offset = u32::try_from(address.checked_sub(self.arena.start())?).ok()?;
        let block = self.block_at(offset)?;
        let within = offset - block.start;
        let after = block.points.partition_point(|&(at, _)| at <= within);
        let &(_, instruction) = block.points.get(after.checked_sub(1)?)?;
        match &block.path {
            Some(path) => path.get(usize::from(instruction)).copied(),
            None => Some(block.rip.wrapping_add(u64::from(instruction))),
        }
    }

    /// Discards all translations. No code may be running, and nobody may keep a block, a site or
    /// an entry.
    pub fn reset(&mut self) {
        self.blocks.clear();
        self.starts.clear();
        self.sites.clear();
        self.assisted.clear();
        self.arena.truncate(self.stub_bytes);
    }
}
