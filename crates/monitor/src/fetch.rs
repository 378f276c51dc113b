//! From RIP to derived code: translating the fetch, finding the block, or deriving it anew from
//! bytes that a trace protects.

use std::rc::Rc;

use trapline_engine::access::{Core, Fault};
use trapline_engine::decode::{Block, DecodeEnd, decode};
use trapline_engine::env::Backing;
use trapline_engine::native::ThunkError;
use trapline_engine::step::events::Event;
use trapline_engine::tlb::{Access, Privilege};
use trapline_engine::translate::{BlockId, Context, RunTime, Source, tail};
use trapline_trace::{Kind, Range, TraceId};
use trapline_x86::{CpuState, Exception, Mode};

use crate::code_cache::{CachedBlock, Form, Key};
use crate::earlier::Earlier;
use crate::lockstep::comparable;
use crate::surroundings::Surroundings;
use crate::translated_code::TranslatedCode;
use crate::vcpu::Vcpu;

const PAGE: u64 = 4096;

/// What is to be derived from the code at RIP.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted {
    /// Operations to step through.
    Decoded,
    /// One operation.
    Single,
    /// Host code; whether such as shares no look-ups.
    Translated(Context, bool),
}

impl Wanted {
    fn form(self) -> Form {
        match self {
            Self::Decoded => Form::Decoded,
            Self::Single => Form::Single,
            Self::Translated(context, unshared) => Form::Translated(context.number(), unshared),
        }
    }
}

impl Vcpu {
    /// What a block's validity at a linear address depends on besides the translation, as one
    /// byte: mode, privilege and form.
    #[inline]
    fn context(&self, single: bool) -> u8 {
        self.cpu.mode() as u8 | u8::from(single) << 6 | u8::from(self.cpu.cpl() == 3) << 7
    }

    /// As [`Self::fetch`]; `None` if the instruction is to start again or raised an exception, which
    /// is noted to be delivered.
    #[inline]
    pub(crate) fn fetched(&mut self, wanted: Wanted) -> Option<Rc<CachedBlock>> {
        match self.fetch(wanted) {
            Ok(block) => return Some(block),
            Err(Fault::Restart) => self.surroundings.exits.restarts += 1,
            Err(Fault::Exception(e)) => self.undelivered = Some(Event::Exception(e)),
        }
        None
    }

    /// The block at RIP.
    #[inline]
    pub(crate) fn fetch(&mut self, wanted: Wanted) -> Result<Rc<CachedBlock>, Fault> {
        let mode = self.cpu.mode();
        let linear = if mode == Mode::Long64 {
            self.cpu.rip
        } else {
            self.cpu.cs().base.wrapping_add(self.cpu.rip) & 0xffff_ffff
        };
        let translated = matches!(wanted, Wanted::Translated(..));
        let context = self.context(matches!(wanted, Wanted::Single));
        // Flat segments make offset and linear address the same; for others the base belongs to
        // what the jump cache must compare, so it is keyed by the linear address.
        if !translated
            && let Some(block) = self
                .surroundings
                .code
                .jump(linear, self.tlb.epoch(), context)
            && block.block.rip == self.cpu.rip
        {
            return Ok(block);
        }
        let block = self.fetch_slow(mode, linear, wanted)?;
        if !translated && block.second.is_none() && mode == Mode::Long64 {
            let epoch = self.tlb.epoch();
            self.surroundings
                .code
                .remember(linear, epoch, context, &block);
        }
        Ok(block)
    }

    /// Translates the fetch of one byte: its guest-physical address, and whether it is RAM.
    pub(crate) fn translate_fetch(&mut self, linear: u64) -> Result<(u64, bool), Fault> {
        let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.surroundings);
        let privilege = Privilege::of_fetch(core.cpu);
        let translation = core.translate(linear, privilege, Access::Fetch)?;
        let ram = !matches!(translation.backing, Backing::Device);
        Ok((translation.gpa, ram))
    }

    fn fetch_slow(
        &mut self,
        mode: Mode,
        linear: u64,
        wanted: Wanted,
    ) -> Result<Rc<CachedBlock>, Fault> {
        let rip = self.cpu.rip;
        if mode == Mode::Long64 {
            if !CpuState::is_canonical(linear) {
                return Err(Exception::general_protection(0).into());
            }
        } else if rip > u64::from(self.cpu.cs().limit) {
            return Err(Exception::general_protection(0).into());
        }
        let (gpa, ram) = self.translate_fetch(linear)?;
        let key = Key {
            gpa,
            rip,
            mode,
            form: wanted.form(),
        };
        if let Some(block) = self.surroundings.code.get(&key) {
            let block = Rc::clone(block);
            match block.second {
                None => return Ok(block),
                Some(second) => {
                    let next = self.next_page(mode, linear);
                    let (second_gpa, _) = self.translate_fetch(next)?;
                    if second_gpa == second.lo {
                        return Ok(block);
                    }
                }
            }
        }
        self.derive(key, linear, ram, wanted)
    }

    fn next_page(&self, mode: Mode, linear: u64) -> u64 {
        let next = (linear & !(PAGE - 1)).wrapping_add(PAGE);
        if mode == Mode::Long64 {
            next
        } else {
            next & 0xffff_ffff
        }
    }

    /// Derives the block at `key`: protects its bytes with a trace, then reads them.
    pub(crate) fn derive(
        &mut self,
        key: Key,
        linear: u64,
        ram: bool,
        wanted: Wanted,
    ) -> Result<Rc<CachedBlock>, Fault> {
        if self.surroundings.code.is_full() {
            self.drop_code();
        }
        if self.surroundings.code.has_many_released() {
            self.surroundings.remove_released();
        }
        let room = (PAGE - (linear & (PAGE - 1))) as usize;
        let mut bytes = [0xff; 256 + 16];
        let read = |s: &Surroundings, gpa: u64, into: &mut [u8]| {
            // A hole reads as ones.
            if !s.memory.read(gpa, into) {
                into.fill(0xff);
            }
        };
        let translated = matches!(wanted, Wanted::Translated(..));
        let mut may_read = true;
        loop {
            // The first reading only tells how long the block is.
            let first_len = room.min(256);
            read(&self.surroundings, key.gpa, &mut bytes[..first_len]);
            if translated
                && ram
                && let Some(earlier) =
                    (self.surroundings.code).take_earlier(&key, &bytes[..first_len])
            {
                match self.revive(key, earlier)? {
                    Some(block) => return Ok(block),
                    // It has changed again.
                    None => continue,
                }
            }
            let mut second_gpa = None;
            let mut end = self.try_decode(&bytes[..first_len], key, wanted)?;
            let mut second_len = 0;
            if matches!(end, DecodeEnd::NeedMoreBytes) {
                if self.code_left(key) < first_len as u64 {
                    // It crosses the segment's limit.
                    return Err(Exception::general_protection(0).into());
                }
                let next = self.next_page(key.mode, linear);
                let (gpa, _) = self.translate_fetch(next)?;
                second_gpa = Some(gpa);
                read(
                    &self.surroundings,
                    gpa,
                    &mut bytes[first_len..first_len + 15],
                );
                end = self.try_decode(&bytes[..first_len + 15], key, wanted)?;
            }
            let DecodeEnd::Block(mut block) = end else {
                return Err(Exception::general_protection(0).into());
            };
            if self.lockstep.is_some() && matches!(wanted, Wanted::Translated(..)) {
                comparable::cut(&mut block);
            }
            if second_gpa.is_some() {
                // Only the crossing instruction: what follows it lies on the other page.
                block.truncate_to_first();
                second_len = (block.len as usize).saturating_sub(first_len);
            }
            let mut used_first = (block.len as usize).min(first_len);
            let mut run_time = None;
            if translated && ram && second_gpa.is_none() {
                run_time = self.set_apart(&mut block, key.gpa).filter(|_| may_read);
                used_first = run_time.map_or(block.len as usize, |(offset, _)| offset);
            }
            if translated && run_time.is_none() && self.is_stepped(&block, key.gpa) {
                // Without host code it is stepped.
                let none = Range::new(key.gpa, key.gpa);
                self.surroundings.code.statistics.stepped_rewrites += 1;
                return Ok(Rc::new(CachedBlock::new(
                    block,
                    None,
                    none,
                    None,
                    [None, None],
                )));
            }
            let first = Range {
                lo: key.gpa,
                hi: key.gpa + used_first as u64,
            };
            let second = second_gpa.map(|gpa| Range {
                lo: gpa,
                hi: gpa + second_len.max(1) as u64,
            });
            if !ram {
                // Nothing can change in a hole; device registers are not executed from twice.
                return Ok(Rc::new(CachedBlock::new(
                    block,
                    None,
                    first,
                    second,
                    [None, None],
                )));
            }
            let code = &mut self.surroundings.code;
            if (code.take_recut() || run_time.is_some()) && code.has_released() {
                // The traces that cover the immediate too, and those of larger blocks.
                self.surroundings.remove_released();
            }
            // Protect, then read.
            let mut traces = [self.establish(first)?, None];
            if let Some(second) = second {
                match self.establish(second) {
                    Ok(id) => traces[1] = id,
                    Err(fault) => {
                        self.release(traces);
                        return Err(fault);
                    }
                }
            }
            let mut now = [0xff; 256 + 16];
            read(&self.surroundings, first.lo, &mut now[..used_first]);
            if let Some(second) = second {
                let len = (second.hi - second.lo) as usize;
                read(
                    &self.surroundings,
                    second.lo,
                    &mut now[used_first..used_first + len],
                );
            }
            let len = used_first + second_len;
            if now[..len] == bytes[..len] {
                let immediate = run_time.map(|(_, immediate)| immediate);
                let all = &bytes[..block.len as usize];
                let translated = match wanted {
                    Wanted::Translated(context, unshared) => {
                        let page = key.gpa >> 12;
                        let source = Source {
                            block: &block,
                            guest: all,
                            context,
                            page,
                            unshared,
                            wary: false,
                            run_time: immediate,
                        };
                        match self.translate_block(source) {
                            Ok(id) => Some(id),
                            Err(ThunkError::Unsupported) if immediate.is_some() => {
                                self.release(traces);
                                may_read = false;
                                continue;
                            }
                            Err(ThunkError::Full) => {
                                self.release(traces);
                                self.drop_code();
                                continue;
                            }
                            Err(ThunkError::Unsupported) => {
                                self.release(traces);
                                return Err(Exception::invalid_opcode().into());
                            }
                        }
                    }
                    _ => None,
                };
                if translated.is_some() {
                    block.ops = Vec::new();
                    if let Wanted::Translated(context, false) = wanted {
                        self.heat.lost(key.rip, context.number());
                    }
                    self.surroundings.code.statistics.run_time_immediates +=
                        u64::from(immediate.is_some());
                }
                let mut cached = CachedBlock::new(block, translated, first, second, traces);
                if translated.is_some() && second.is_none() && self.surroundings.code.is_gone(&key)
                {
                    // What was rewritten once may be again, and be what it was.
                    cached = cached.kept_with(&now[..len]);
                }
                return Ok(self.surroundings.code.insert(key, cached));
            }
            self.release(traces);
        }
    }

    /// Whether the block is one instruction that is rewritten all the time.
    fn is_stepped(&mut self, block: &Block, gpa: u64) -> bool {
        let [op] = &block.ops[..] else { return false };
        let range = Range::new(gpa, gpa + u64::from(op.len));
        self.surroundings.code.patches.is_stepped(range)
    }

    /// Puts a translation that was set aside back, if its bytes are still what it was derived from
    /// once they are protected.
    fn revive(&mut self, key: Key, earlier: Earlier) -> Result<Option<Rc<CachedBlock>>, Fault> {
        let first = Range::new(key.gpa, key.gpa + earlier.bytes.len() as u64);
        let traces = [self.establish(first)?, None];
        let mut now = vec![0; earlier.bytes.len()];
        if !self.surroundings.memory.read(first.lo, &mut now) || *now != *earlier.bytes {
            self.release(traces);
            return Ok(None);
        }
        let block = Block {
            rip: key.rip,
            mode: key.mode,
            ops: Vec::new(),
            len: earlier.len,
        };
        let cached = CachedBlock::new(block, Some(earlier.id), first, None, traces);
        let code = &mut self.surroundings.code;
        code.statistics.revived_blocks += 1;
        Ok(Some(code.insert(key, cached.kept_with(&earlier.bytes))))
    }

    /// Gives an instruction that is rewritten often, in a block at `gpa` that lies on one page, a
    /// block of its own: `block` ends before it, or is it alone. Then, if it is its immediate that
    /// is rewritten: how many bytes stand before that, and how it is read at run time.
    fn set_apart(&mut self, block: &mut Block, gpa: u64) -> Option<(usize, RunTime)> {
        let at = |offset: u32| gpa + u64::from(offset);
        let code = &self.surroundings.code;
        let often = code.patches.first_in(Range::new(gpa, at(block.len)))?;
        block.truncate_before(often.lo.saturating_sub(gpa) as u32);
        if often.lo >= at(block.len) {
            return None;
        }
        block.truncate_before(0);
        let tail = tail(block.ops.first()?)?;
        let (lo, hi) = (at(u32::from(tail.offset)), at(block.len));
        // All of it is written, and read, at once: within eight aligned bytes the processor
        // promises that.
        let whole = lo >> 3 == (hi - 1) >> 3;
        let within = |place: Range| lo <= place.lo && place.hi <= hi;
        if !whole
            || !code
                .patches
                .first_in(Range::new(lo, hi))
                .is_some_and(within)
        {
            return None;
        }
        let host = self.surroundings.memory.host_address(lo)? as u64;
        let immediate = RunTime {
            len: tail.len,
            host,
        };
        Some((usize::from(tail.offset), immediate))
    }

    pub(crate) fn translate_block(&mut self, source: Source<'_>) -> Result<BlockId, ThunkError> {
        let Some(translator) = &mut self.surroundings.code.translator else {
            return Err(ThunkError::Unsupported);
        };
        let id = translator.translate(source, &mut self.native, &mut self.tlb)?;
        if let Some(observer) = &self.surroundings.code_observer
            && let Some((address, code, is_path)) = translator.code(id)
        {
            observer.translated(TranslatedCode {
                rip: source.block.rip,
                privilege: source.context.privilege,
                is_path,
                address,
                code: &code,
            });
        }
        self.statistics.translated_blocks += 1;
        self.statistics.translated_bytes += u64::from(translator.code_bytes(id));
        Ok(id)
    }

    /// Bytes from the block's start to the end of the code segment.
    fn code_left(&self, key: Key) -> u64 {
        if key.mode == Mode::Long64 {
            return u64::MAX;
        }
        u64::from(self.cpu.cs().limit)
            .saturating_sub(key.rip)
            .saturating_add(1)
    }

    fn try_decode(&mut self, bytes: &[u8], key: Key, wanted: Wanted) -> Result<DecodeEnd, Fault> {
        let left = usize::try_from(self.code_left(key)).unwrap_or(usize::MAX);
        let bytes = &bytes[..bytes.len().min(left)];
        loop {
            let (native, limit) = match wanted {
                Wanted::Decoded => (Some(&mut self.native), usize::MAX),
                Wanted::Single => (Some(&mut self.native), 1),
                Wanted::Translated(..) => (None, usize::MAX),
            };
            match decode(bytes, key.rip, key.mode, &self.features, native, limit) {
                Ok(end) => return Ok(end),
                Err(ThunkError::Full) => self.drop_code(),
                Err(ThunkError::Unsupported) => return Err(Exception::invalid_opcode().into()),
            }
        }
    }

    /// Drops all derived code, so that its thunks can go too.
    fn drop_code(&mut self) {
        self.surroundings.code.clear();
        self.surroundings.remove_released();
        self.native.reset();
        self.tlb.bump_epoch();
        self.tlb.forget_cells();
        self.code_drops += 1;
        self.heat.all_lost();
    }

    pub(crate) fn establish(&mut self, range: Range) -> Result<Option<TraceId>, Fault> {
        let s = &mut self.surroundings;
        let id = s.trace_writes(&mut self.tlb, range, Kind::Code)?.id;
        s.code.use_trace(id);
        Ok(Some(id))
    }

    fn release(&mut self, traces: [Option<TraceId>; 2]) {
        for id in traces.into_iter().flatten() {
            self.surroundings.code.release_trace(id);
        }
    }
}
