//! The decoded and translated code of one VCPU: a derived structure, kept coherent by traces of
//! kind `code`.
//!
//! Every block has a trace on exactly its bytes, set before they are read for the last time. A
//! notification removes the blocks that overlap what was written. The cache belongs to its VCPU's
//! thread; nobody else touches it.

use foldhash::{HashMap, HashSet};
use std::rc::Rc;

use trapline_engine::decode::Block;
use trapline_engine::translate::{BlockId, Translator};
use trapline_trace::observer::Witness;
use trapline_trace::{Kind, Range, TraceId};
use trapline_x86::Mode;

use crate::earlier::{Earlier, EarlierCode};
use crate::patches::Patches;

/// The most blocks kept: then all go. Bounds the memory that guest code can make the VMM use.
const MAX_BLOCKS: usize = 24 * 1024;
/// The most translated blocks kept; the translator's memory is bounded by itself.
const MAX_TRANSLATED: usize = 128 * 1024;
/// The most operations in them: ordinary blocks reach the other bound first, but a block may be
/// long.
const MAX_OPERATIONS: usize = 256 * 1024;
/// Traces without a block that may wait for their removal while nothing else is to be done.
const MANY_RELEASED: usize = 256;
/// Entries of the jump cache; a power of two.
const JUMP_ENTRIES: usize = 4096;

/// A block and where its bytes lie.
#[derive(Debug)]
pub struct CachedBlock {
    /// Without operations if it is translated.
    pub block: Block,
    pub translated: Option<BlockId>,
    /// Guest-physical range of the bytes on the first page.
    pub first: Range,
    /// Of the bytes on the second page, for an instruction that crosses.
    pub second: Option<Range>,
    /// Of the further pieces of a path.
    others: Box<[Range]>,
    traces: Box<[TraceId]>,
    /// What it was derived from, if it is to be kept once that changes.
    bytes: Option<Box<[u8]>>,
}

impl CachedBlock {
    pub fn new(
        block: Block,
        translated: Option<BlockId>,
        first: Range,
        second: Option<Range>,
        traces: [Option<TraceId>; 2],
    ) -> Self {
        Self {
            block,
            translated,
            first,
            second,
            others: Box::default(),
            traces: traces.into_iter().flatten().collect(),
            bytes: None,
        }
    }

    /// A path, whose first instructions' bytes are `first`.
    pub fn path(
        block: Block,
        translated: BlockId,
        first: Range,
        others: Box<[Range]>,
        traces: Vec<TraceId>,
    ) -> Self {
        Self {
            block,
            translated: Some(translated),
            first,
            second: None,
            others,
            traces: traces.into_boxed_slice(),
            bytes: None,
        }
    }

    /// All ranges of bytes that it was derived from.
    fn ranges(&self) -> impl Iterator<Item = Range> + '_ {
        let others = self.others.iter().copied();
        std::iter::once(self.first).chain(self.second).chain(others)
    }

    /// The pages that they lie on, each once.
    fn pages(&self) -> Vec<u64> {
        let mut pages: Vec<u64> = self.ranges().map(|range| range.lo >> 12).collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// The same, to be set aside and found again by these bytes once they have changed.
    pub fn kept_with(mut self, bytes: &[u8]) -> Self {
        self.bytes = Some(bytes.into());
        self
    }

    fn overlaps(&self, range: Range) -> bool {
        self.ranges().any(|own| own.overlaps(&range))
    }
}

/// What is derived from code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Operations to be stepped through.
    Decoded,
    /// One operation.
    Single,
    /// Host code, for the context with this number; whether it shares no look-ups.
    Translated(u8, bool),
}

/// What a block is found by. Decoded operations hold absolute branch targets, so the instruction
/// pointer is part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub gpa: u64,
    pub rip: u64,
    pub mode: Mode,
    pub form: Form,
}

#[derive(Clone)]
struct Jump {
    rip: u64,
    /// The TLB's epoch when the entry was made: as long as it is the same, the linear address
    /// still leads to the same bytes.
    epoch: u64,
    context: u8,
    block: Rc<CachedBlock>,
}

/// Statistics of a code cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CodeStatistics {
    pub decoded_blocks: u64,
    pub decoded_bytes: u64,
    pub invalidated_blocks: u64,
    /// Blocks decoded again after they had been invalidated.
    pub rederived_blocks: u64,
    /// The whole cache was dropped because it was full.
    pub drops: u64,
    /// Blocks of an instruction that is rewritten often, with an immediate that is read at run
    /// time.
    pub run_time_immediates: u64,
    /// Executions of instructions that are rewritten all the time, and stepped.
    pub stepped_rewrites: u64,
    /// Paths over several blocks that were made.
    pub paths: u64,
    /// Translations used again because their bytes were what they had been.
    pub revived_blocks: u64,
}

/// The blocks of one VCPU.
pub struct CodeCache {
    blocks: HashMap<Key, Rc<CachedBlock>>,
    by_page: HashMap<u64, Vec<Key>>,
    /// In all blocks.
    operations: usize,
    jumps: Vec<Option<Jump>>,
    /// How many blocks need a trace. Blocks of the same bytes share one (the same page under two
    /// addresses), and a trace that waits for its removal is given out again if the same bytes are
    /// decoded anew.
    uses: HashMap<TraceId, u32>,
    /// Traces that lost their last block, to be removed at the next opportunity if they are still
    /// without one then.
    released: Vec<TraceId>,
    /// Keys of blocks that were invalidated and have not been decoded again since.
    gone: HashSet<Key>,
    witness: Witness,
    /// Makes and holds the host code, if there is any.
    pub translator: Option<Translator>,
    translated: usize,
    /// Bytes that are rewritten often.
    pub(crate) patches: Patches,
    /// Translations of what was rewritten.
    earlier: EarlierCode,
    /// How code is cut into blocks has changed since [`Self::take_recut`].
    recut: bool,
    /// Where blocks began that are gone: the jumps to them must go too.
    removed: Vec<u64>,
    pub statistics: CodeStatistics,
}

impl Default for CodeCache {
    fn default() -> Self {
        Self::new(Witness::none())
    }
}

fn jump_slot(rip: u64) -> usize {
    ((rip ^ rip >> 12) as usize) & (JUMP_ENTRIES - 1)
}

impl CodeCache {
    /// An empty cache, whose invalidations `witness` sees.
    pub fn new(witness: Witness) -> Self {
        Self {
            blocks: HashMap::default(),
            by_page: HashMap::default(),
            operations: 0,
            jumps: vec![None; JUMP_ENTRIES],
            uses: HashMap::default(),
            released: Vec::new(),
            gone: HashSet::default(),
            witness,
            translator: None,
            translated: 0,
            patches: Patches::default(),
            earlier: EarlierCode::default(),
            recut: false,
            removed: Vec::new(),
            statistics: CodeStatistics::default(),
        }
    }

    /// The block at `rip` if it was entered at the same epoch in the same context (mode and
    /// privilege).
    #[inline]
    pub fn jump(&self, rip: u64, epoch: u64, context: u8) -> Option<Rc<CachedBlock>> {
        match &self.jumps[jump_slot(rip)] {
            Some(j) if j.rip == rip && j.epoch == epoch && j.context == context => {
                Some(Rc::clone(&j.block))
            }
            _ => None,
        }
    }

    /// Remembers for [`Self::jump`].
    pub fn remember(&mut self, rip: u64, epoch: u64, context: u8, block: &Rc<CachedBlock>) {
        self.jumps[jump_slot(rip)] = Some(Jump {
            rip,
            epoch,
            context,
            block: Rc::clone(block),
        });
    }

    pub fn get(&self, key: &Key) -> Option<&Rc<CachedBlock>> {
        self.blocks.get(key)
    }

    /// Whether the cache has reached its bound; the caller then drops everything.
    pub fn is_full(&self) -> bool {
        self.blocks.len() - self.translated >= MAX_BLOCKS
            || self.translated >= MAX_TRANSLATED
            || self.operations >= MAX_OPERATIONS
    }

    /// Notes that a block needs the trace: between its being established and the block's being
    /// inserted, or given up by [`Self::release_trace`].
    pub fn use_trace(&mut self, id: TraceId) {
        *self.uses.entry(id).or_default() += 1;
    }

    /// Takes back one [`Self::use_trace`].
    pub fn release_trace(&mut self, id: TraceId) {
        let Some(uses) = self.uses.get_mut(&id) else {
            return;
        };
        *uses -= 1;
        if *uses == 0 {
            self.uses.remove(&id);
            self.released.push(id);
        }
    }

    /// Adds a block whose traces are established and noted by [`Self::use_trace`]. Replaces one
    /// with the same key.
    pub fn insert(&mut self, key: Key, block: CachedBlock) -> Rc<CachedBlock> {
        self.statistics.decoded_blocks += 1;
        self.statistics.decoded_bytes += u64::from(block.block.len);
        self.statistics.rederived_blocks += u64::from(self.gone.remove(&key));
        self.remove(key);
        let block = Rc::new(block);
        for page in block.pages() {
            self.by_page.entry(page).or_default().push(key);
        }
        self.operations += block.block.ops.len();
        self.translated += usize::from(block.translated.is_some());
        self.blocks.insert(key, Rc::clone(&block));
        block
    }

    /// Whether the block with this key was invalidated and has not been derived again.
    pub fn is_gone(&self, key: &Key) -> bool {
        self.gone.contains(key)
    }

    /// Whether code is cut into blocks in another way since the last call: the traces that wait for
    /// their removal then cover what no block will cover again, and their consumers would be told
    /// of writes that are none of theirs.
    pub fn take_recut(&mut self) -> bool {
        std::mem::take(&mut self.recut)
    }

    /// A translation of the block with this key, derived from what `bytes` begin with, that was set
    /// aside when they changed. It may be inserted again, once the bytes have been protected and
    /// read.
    pub fn take_earlier(&mut self, key: &Key, bytes: &[u8]) -> Option<Earlier> {
        self.earlier.take(key, bytes)
    }

    /// Removes the block with this key, if there is one. None of its code may be running.
    pub fn drop_block(&mut self, key: Key) {
        self.remove(key);
    }

    fn remove(&mut self, key: Key) -> bool {
        let Some(block) = self.blocks.remove(&key) else {
            return false;
        };
        self.operations -= block.block.ops.len();
        if let Some(id) = block.translated {
            self.translated -= 1;
            self.removed.push(key.rip);
            if let Some(translator) = &mut self.translator {
                translator.unlink(id);
            }
            if let Some(bytes) = &block.bytes {
                let (bytes, len) = (bytes.clone(), block.block.len);
                self.earlier.keep(key, Earlier { id, bytes, len });
            }
        }
        for page in block.pages() {
            if let Some(keys) = self.by_page.get_mut(&page) {
                keys.retain(|k| *k != key);
                if keys.is_empty() {
                    self.by_page.remove(&page);
                }
            }
        }
        for &id in &block.traces {
            self.release_trace(id);
        }
        true
    }

    /// Removes the blocks that overlap `range`; whether there were any. The caller makes the jump
    /// cache look again by a new epoch.
    pub fn invalidate(&mut self, range: Range) -> bool {
        let start = self.witness.now();
        let mut hit = Vec::new();
        for page in range.lo >> 12..=(range.hi.max(range.lo + 1) - 1) >> 12 {
            for key in self.by_page.get(&page).into_iter().flatten() {
                if self.blocks.get(key).is_some_and(|b| b.overlaps(range)) {
                    hit.push(*key);
                }
            }
        }
        let mut count = 0;
        for key in hit {
            if self.remove(key) {
                count += 1;
                self.note_gone(key);
            }
        }
        self.statistics.invalidated_blocks += count;
        if count > 0 {
            if self.patches.note(range) {
                // From now on these bytes get a block of their own.
                self.earlier.clear();
                self.recut = true;
            }
            self.witness.invalidated(start, Kind::Code, range, count);
        }
        count > 0
    }

    /// Remembers a key whose block was invalidated. Forgets all rather than to grow with what a
    /// guest does.
    fn note_gone(&mut self, key: Key) {
        if self.gone.len() >= MAX_BLOCKS {
            self.gone.clear();
        }
        self.gone.insert(key);
    }

    /// Where translated blocks began that were removed since the last call.
    pub fn take_removed(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.removed)
    }

    /// Removes everything, the host code too: none of it may be running.
    pub fn clear(&mut self) {
        if let Some(translator) = &mut self.translator {
            translator.reset();
        }
        self.earlier.clear();
        self.translated = 0;
        self.removed.clear();
        for (_, block) in std::mem::take(&mut self.blocks) {
            for &id in &block.traces {
                self.release_trace(id);
            }
        }
        self.by_page.clear();
        self.operations = 0;
        self.jumps.fill(None);
        self.statistics.drops += 1;
    }

    /// Traces that no block needs any more.
    pub fn take_released(&mut self) -> Vec<TraceId> {
        let mut released = std::mem::take(&mut self.released);
        released.retain(|id| !self.uses.contains_key(id));
        released
    }

    /// Whether so many wait that it should not go on without a removal: a guest may change code for
    /// long without anything that asks for attention.
    pub fn has_many_released(&self) -> bool {
        self.released.len() >= MANY_RELEASED
    }

    pub fn has_released(&self) -> bool {
        !self.released.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use trapline_trace::{AlwaysSensed, Kind, Sense, TraceSystem, VcpuId, VcpuSet};

    use super::*;

    fn block(gpa: u64, len: u32, traces: [Option<TraceId>; 2]) -> CachedBlock {
        let block = Block {
            rip: gpa,
            mode: Mode::Long64,
            ops: Vec::new(),
            len,
        };
        let range = Range::new(gpa, gpa + u64::from(len));
        CachedBlock::new(block, None, range, None, traces)
    }

    fn add_with(cache: &mut CodeCache, gpa: u64, len: u32, traces: [Option<TraceId>; 2]) -> Key {
        let key = Key {
            gpa,
            rip: gpa,
            mode: Mode::Long64,
            form: Form::Decoded,
        };
        cache.insert(key, block(gpa, len, traces));
        key
    }

    fn add(cache: &mut CodeCache, gpa: u64, len: u32) -> Key {
        add_with(cache, gpa, len, [None, None])
    }

    #[test]
    fn only_overlapping_blocks_go() {
        let mut cache = CodeCache::default();
        let a = add(&mut cache, 0x1000, 0x10);
        let b = add(&mut cache, 0x1010, 0x10);
        assert!(!cache.invalidate(Range {
            lo: 0x1020,
            hi: 0x1021
        }));
        assert!(cache.invalidate(Range {
            lo: 0x100f,
            hi: 0x1010
        }));
        assert!(cache.get(&a).is_none());
        assert!(cache.get(&b).is_some());
        assert_eq!(cache.statistics.invalidated_blocks, 1);
    }

    #[test]
    fn only_what_was_invalidated_counts_as_derived_again() {
        let mut cache = CodeCache::default();
        add(&mut cache, 0x1000, 0x10);
        assert!(cache.invalidate(Range::new(0x1000, 0x1001)));
        add(&mut cache, 0x1000, 0x10);
        assert_eq!(cache.statistics.rederived_blocks, 1);
        // Replaced, and decoded again because the cache was full.
        add(&mut cache, 0x1000, 0x10);
        cache.clear();
        add(&mut cache, 0x1000, 0x10);
        assert_eq!(cache.statistics.rederived_blocks, 1);
    }

    /// A trace that is established.
    fn trace() -> TraceId {
        let vcpu = VcpuId::new(0);
        TraceSystem::new(1, Arc::new(AlwaysSensed))
            .establish(
                Some(vcpu),
                VcpuSet::one(vcpu),
                Range::new(0x1000, 0x1010),
                Kind::Code,
                Sense::WRITE,
                0,
                &mut |_| {},
            )
            .unwrap()
    }

    #[test]
    fn a_trace_given_out_again_is_not_removed() {
        let mut cache = CodeCache::default();
        let id = trace();
        cache.use_trace(id);
        let key = add_with(&mut cache, 0x1000, 0x10, [Some(id), None]);
        assert!(cache.invalidate(Range::new(0x1004, 0x1008)));
        assert!(cache.has_released());
        // The same bytes are decoded again before the removal.
        cache.use_trace(id);
        add_with(&mut cache, 0x1000, 0x10, [Some(id), None]);
        assert!(cache.take_released().is_empty());
        assert!(cache.get(&key).is_some());
        assert!(cache.invalidate(Range::new(0x1004, 0x1008)));
        assert_eq!(cache.take_released(), [id]);
    }

    #[test]
    fn blocks_of_the_same_bytes_share_their_trace() {
        let mut cache = CodeCache::default();
        let id = trace();
        for rip in [0x7000, 0x9000] {
            cache.use_trace(id);
            let key = Key {
                gpa: 0x1000,
                rip,
                mode: Mode::Long64,
                form: Form::Decoded,
            };
            cache.insert(key, block(0x1000, 0x10, [Some(id), None]));
        }
        // Another block takes the place of one of them.
        let key = Key {
            gpa: 0x1000,
            rip: 0x7000,
            mode: Mode::Long64,
            form: Form::Decoded,
        };
        cache.insert(key, block(0x1000, 0x8, [None, None]));
        assert!(cache.take_released().is_empty());
        cache.clear();
        assert_eq!(cache.take_released(), [id]);
    }

    #[test]
    fn the_jump_cache_needs_the_same_epoch_and_context() {
        let mut cache = CodeCache::default();
        let key = add(&mut cache, 0x1000, 0x10);
        let block = Rc::clone(cache.get(&key).unwrap());
        cache.remember(0x1000, 7, 1, &block);
        assert!(cache.jump(0x1000, 7, 1).is_some());
        assert!(cache.jump(0x1000, 8, 1).is_none());
        assert!(cache.jump(0x1000, 7, 0).is_none());
        assert!(cache.jump(0x2000, 7, 1).is_none());
    }

    #[test]
    fn a_crossing_block_is_found_from_its_second_page() {
        let mut cache = CodeCache::default();
        let key = Key {
            gpa: 0x1ffe,
            rip: 0x1ffe,
            mode: Mode::Long64,
            form: Form::Decoded,
        };
        let block = Block {
            rip: 0x1ffe,
            mode: Mode::Long64,
            ops: Vec::new(),
            len: 5,
        };
        let (first, second) = (
            Range {
                lo: 0x1ffe,
                hi: 0x2000,
            },
            Range {
                lo: 0x7000,
                hi: 0x7003,
            },
        );
        cache.insert(
            key,
            CachedBlock::new(block, None, first, Some(second), [None, None]),
        );
        assert!(!cache.invalidate(Range {
            lo: 0x7003,
            hi: 0x7004
        }));
        assert!(cache.invalidate(Range {
            lo: 0x7002,
            hi: 0x7003
        }));
        assert!(cache.get(&key).is_none());
    }
}
