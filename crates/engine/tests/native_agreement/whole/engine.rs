//! The stepping engine or the translator around a few pages of memory.

#![allow(unsafe_code)]

use std::arch::x86_64::__cpuid_count;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use iced_x86::Mnemonic;
use trapline_engine::access::{Core, Fault};
use trapline_engine::decode::block::may_be_followed;
use trapline_engine::decode::features::Features;
use trapline_engine::decode::{Block, DecodeEnd, Op, OpKind, decode};
use trapline_engine::env::{Backing, Environment, MsrFault, Restart, Span, Translation};
use trapline_engine::native::{NativeCode, ThunkError};
use trapline_engine::step::run::{Turn, run, run_one};
use trapline_engine::tlb::{Access, Privilege, Tlb};
use trapline_engine::translate::{
    self, BlockId, Context, Left, Site, Source, Translator, finish_branch,
};
use trapline_x86::control::{cr0, cr4, efer};
use trapline_x86::exception::page_fault;
use trapline_x86::segment::Rights;
use trapline_x86::state::InterruptShadow;
use trapline_x86::{CpuState, Exception, Mode, Segment, SegmentRegister};

use super::case::{
    ASTRAY, CODE, CODE_BYTES, Case, DATA, ERROR_BITS, Memory, Outcome, PAGE, PAGES, Page, Run,
    backing, data_base,
};

/// How memory is reached: each way is another path through the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backed {
    /// Through the TLB.
    Direct,
    /// Directly, but every access asks the environment.
    Untracked,
    /// As if traces lay on all pages.
    Sensed,
    /// One page as if it were a device's registers, traces on the others.
    Mixed,
}

impl Backed {
    pub const ALL: [Self; 4] = [Self::Direct, Self::Untracked, Self::Sensed, Self::Mixed];
}

/// Steps that a run may take at most: generated code does not loop, but repeats string instructions.
const MOST_STEPS: u32 = 20_000;

/// What the processor can do, as CPUID tells.
pub fn features() -> Features {
    Features::new(|leaf, subleaf| {
        let r = __cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    })
}

/// Aligned as the guest sees it: some operands must be.
#[repr(align(4096))]
struct CodePage([u8; PAGE]);

struct Surroundings {
    memory: Box<Memory>,
    code: Box<CodePage>,
    backed: Backed,
}

impl Surroundings {
    fn page(&self, linear: u64) -> Option<(usize, Page)> {
        let page = usize::try_from(linear.checked_sub(DATA)? / PAGE as u64).ok()?;
        Some((page, *PAGES.get(page)?))
    }
}

impl Environment for Surroundings {
    fn translate(
        &mut self,
        _: &CpuState,
        tlb: &mut Tlb,
        linear: u64,
        privilege: Privilege,
        access: Access,
    ) -> Result<Translation, Fault> {
        let write = if access == Access::Write {
            page_fault::WRITE
        } else {
            0
        };
        let fault = |present| Exception::page_fault(linear, present | write | page_fault::USER);
        if linear & !0xfff == CODE {
            if access == Access::Write {
                return Err(fault(page_fault::PRESENT).into());
            }
            let host = self
                .code
                .0
                .as_mut_ptr()
                .wrapping_add(linear as usize % PAGE);
            let backing = Backing::Ram(host);
            return Ok(Translation {
                gpa: linear,
                backing,
            });
        }
        let (page, kind) = match self.page(linear) {
            None | Some((_, Page::Hole)) => return Err(fault(0).into()),
            Some(place) => place,
        };
        if kind == Page::ReadOnly && access == Access::Write {
            return Err(fault(page_fault::PRESENT).into());
        }
        let host = self.memory.0[page].as_mut_ptr();
        if self.backed == Backed::Direct {
            tlb.insert(linear, privilege, access, linear, host, false, 4096);
        }
        let host = host.wrapping_add(linear as usize % PAGE);
        Ok(Translation {
            gpa: linear,
            backing: backing(self.backed, page, host),
        })
    }
    fn sensed(
        &mut self,
        _: &mut Tlb,
        _: u64,
        _: &[Span],
        _: Access,
        perform: &mut dyn FnMut(),
    ) -> Result<(), Restart> {
        perform();
        Ok(())
    }
    fn exclusive(
        &mut self,
        _: &mut Tlb,
        _: u64,
        _: &[Span],
        perform: &mut dyn FnMut(),
    ) -> Result<(), Restart> {
        perform();
        Ok(())
    }
    fn device_read(&mut self, gpa: u64, data: &mut [u8]) {
        let at = (gpa - DATA) as usize;
        data.copy_from_slice(&self.memory.0.as_flattened()[at..at + data.len()]);
    }
    fn device_write(&mut self, gpa: u64, data: &[u8]) {
        let at = (gpa - DATA) as usize;
        self.memory.0.as_flattened_mut()[at..at + data.len()].copy_from_slice(data);
    }
    fn port_read(&mut self, _: u16, _: u8) -> u32 {
        unreachable!("user code has no ports")
    }
    fn port_write(&mut self, _: u16, _: u8, _: u32) {
        unreachable!("user code has no ports")
    }
    fn tsc(&mut self, _: &CpuState) -> u64 {
        0
    }
    fn cpuid(&mut self, _: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        let r = __cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    }
    fn msr_read(&mut self, _: &CpuState, _: u32) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    fn msr_write(&mut self, _: &mut CpuState, _: &mut Tlb, _: u32, _: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
    fn cr8_read(&mut self) -> u64 {
        0
    }
    fn cr8_write(&mut self, _: u64) {}
    fn before_flush(&mut self, _: &mut Tlb) {}
    fn pause(&mut self) {}
}

/// The second of the two that are compared.
pub struct Engine {
    native: NativeCode,
    features: Features,
    cpu: CpuState,
    tlb: Tlb,
    around: Surroundings,
    /// Translates, if there is one.
    translator: Option<Translator>,
    /// Cases so far.
    loaded: u64,
    /// What was translated of the run.
    translated: HashMap<(u64, bool), BlockId>,
    /// The branch by which translated code was left last.
    left_by: Option<Site>,
    site: u64,
    how: How,
    /// Paths that were made of runs.
    pub paths: u64,
}

/// What executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Steps,
    Translates,
    /// Without the instructions of BMI1 and BMI2.
    TranslatesPlainly,
    /// A run is stepped first, and becomes a path of what was executed.
    TranslatesPaths,
}

/// Something always asks for attention: so loops are left, and steps can be counted.
static ATTENTION: AtomicU32 = AtomicU32::new(1);
/// Nothing does as a rule: a path that is a loop goes on.
static RARE_ATTENTION: AtomicU32 = AtomicU32::new(0);
/// Cases that were begun with it.
static BEGUN: AtomicU32 = AtomicU32::new(0);
/// Instructions of a path at most.
const LONGEST: usize = 64;

/// Has a case that goes on for long counted by steps, as it may go on for ever.
fn watch() {
    let mut last = 0;
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let now = BEGUN.load(Relaxed);
        if now == last {
            RARE_ATTENTION.store(1, Relaxed);
        }
        last = now;
    }
}

impl Engine {
    pub fn new(how: How) -> Self {
        if how == How::TranslatesPaths {
            std::thread::spawn(watch);
        }
        let mut cpu = CpuState::reset();
        cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.efer = efer::LME | efer::LMA | efer::SCE;
        cpu.xcr0 = 0xe7;
        cpu.cpl = 3;
        cpu.tr.limit = 0;
        Self {
            native: NativeCode::new().expect("native code"),
            features: features(),
            cpu,
            tlb: Tlb::default(),
            around: Surroundings {
                memory: Box::default(),
                code: Box::new(CodePage([0xcc; PAGE])),
                backed: Backed::Direct,
            },
            translator: match how {
                How::Steps => None,
                How::Translates => Some(Translator::new(ATTENTION.as_ptr())),
                How::TranslatesPlainly => Some(Translator::plain(ATTENTION.as_ptr())),
                How::TranslatesPaths => Some(Translator::new(RARE_ATTENTION.as_ptr())),
            }
            .map(|translator| translator.expect("executable memory")),
            loaded: 0,
            translated: HashMap::new(),
            left_by: None,
            site: 0,
            how,
            paths: 0,
        }
    }

    pub fn translates(&self) -> bool {
        self.translator.is_some()
    }

    pub fn set_backing(&mut self, backed: Backed) {
        self.around.backed = backed;
        self.tlb.flush_all();
    }

    pub fn backing(&self) -> Backed {
        self.around.backed
    }

    fn load(&mut self, case: &Case) {
        self.translated.clear();
        self.left_by = None;
        self.tlb.remove_jumps();
        self.loaded += 1;
        if self.loaded.is_multiple_of(2) {
            // Look-ups miss again.
            self.tlb.flush_all();
        }
        self.around.code.0[..CODE_BYTES].copy_from_slice(&case.code);
        self.around.memory.as_mut().clone_from(&case.memory);
        let cpu = &mut self.cpu;
        cpu.gpr = case.registers.gpr;
        cpu.rflags = case.registers.rflags;
        cpu.vector.clone_from(&case.registers.vector);
        cpu.shadow = InterruptShadow::None;
        let (code, limit) = case.code_segment();
        cpu.rip = case.ip();
        let segment = |base, limit, rights, selector| Segment {
            base,
            limit,
            rights: Rights(rights),
            selector,
        };
        let (cs, other) = match case.bits {
            64 => (
                segment(0, u32::MAX, 0xa0fb, 0x33),
                segment(0, u32::MAX, 0xc0f3, 0x2b),
            ),
            32 => (
                segment(0, u32::MAX, 0xc0fb, 0x23),
                segment(0, u32::MAX, 0xc0f3, 0x2b),
            ),
            _ => (
                segment(code, limit, 0x00fb, 0x17 + ((case.segment as u16) << 3)),
                segment(data_base(16), 0xffff, 0x00f3, 0xf),
            ),
        };
        cpu.seg = [other, cs, other, other, Segment::null(0), Segment::null(0)];
    }

    /// Runs a case to its exception. Returns the number of instructions completed, and counts what
    /// executed them.
    pub fn execute(
        &mut self,
        Run { case, instructions }: &Run,
        outcome: &mut Outcome,
        kinds: &mut BTreeMap<&'static str, u64>,
    ) -> u64 {
        self.load(case);
        if self.how == How::TranslatesPaths {
            let rips = self.record(case);
            self.loaded -= 1;
            self.load(case);
            self.make_path(&rips);
            BEGUN.fetch_add(1, Relaxed);
            RARE_ATTENTION.store(0, Relaxed);
        }
        let (mut done, mut steps) = (0, 0);
        let starts = instructions.iter().map(|i| i.ip());
        let end = case.ip() + u64::from(case.len);
        let exception = loop {
            steps += 1;
            let ip = self.cpu.rip;
            let inside = (case.ip()..end).contains(&ip) && starts.clone().all(|start| start != ip);
            if inside || steps == MOST_STEPS {
                outcome.vector = ASTRAY;
                return done;
            }
            match self.step(&mut done, kinds) {
                Turn::Exception(exception) => break exception,
                Turn::Continue => {}
                turn => panic!("{:02x?}: {turn:?}", case.code),
            }
        };
        outcome.vector = exception.vector as u32;
        outcome.rip = self.cpu.rip;
        outcome.address = exception.cr2.unwrap_or(0);
        outcome.error = match exception.cr2 {
            Some(_) => exception.error.unwrap_or(0) & ERROR_BITS,
            None => 0,
        };
        outcome.registers.gpr = self.cpu.gpr;
        outcome.registers.rflags = self.cpu.rflags;
        outcome.registers.vector.clone_from(&self.cpu.vector);
        outcome.memory.clone_from(&self.around.memory);
        done
    }

    /// Steps a run until it ends or comes back to its start: where its instructions are.
    fn record(&mut self, case: &Case) -> Vec<u64> {
        let mut rips: Vec<u64> = Vec::new();
        let run = case.ip()..case.ip() + u64::from(case.len);
        for _ in 0..MOST_STEPS {
            let rip = self.cpu.rip;
            let back = rip == case.ip() && rips.last().is_some_and(|&last| last != rip);
            if !run.contains(&rip) || back || rips.len() == LONGEST {
                break;
            }
            let Some(block) = self.single(rip) else { break };
            let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.around);
            if run_one(&mut core, &block).0 != Turn::Continue {
                break;
            }
            // A repeated one is executed several times.
            if rips.last() != Some(&rip) {
                rips.push(rip);
            }
        }
        rips
    }

    /// The instruction at an address of the run, to be stepped.
    fn single(&mut self, rip: u64) -> Option<Block> {
        let bytes = &self.around.code.0[(rip - CODE) as usize..];
        let native = Some(&mut self.native);
        match decode(bytes, rip, Mode::Long64, &self.features, native, 1) {
            Ok(DecodeEnd::Block(block)) => Some(block),
            _ => {
                self.drop_all();
                let bytes = &self.around.code.0[(rip - CODE) as usize..];
                let native = Some(&mut self.native);
                match decode(bytes, rip, Mode::Long64, &self.features, native, 1) {
                    Ok(DecodeEnd::Block(block)) => Some(block),
                    _ => None,
                }
            }
        }
    }

    /// Makes room. Operations of translated code point to thunks, too.
    fn drop_all(&mut self) {
        if let Some(translator) = &mut self.translator {
            translator.reset();
        }
        self.native.reset();
        self.translated.clear();
        self.tlb.forget_cells();
        self.left_by = None;
    }

    /// Translates what was executed as a path, as far as there may be one, in the place of the block at
    /// its start.
    fn make_path(&mut self, rips: &[u64]) {
        let (mut ops, mut guest) = (Vec::new(), Vec::new());
        for &rip in rips {
            let goes_on = ops.last().is_none_or(|op: &Op| {
                let behind = rip == op.instruction.next_ip();
                match op.kind {
                    OpKind::Jump | OpKind::Call => rip == op.target,
                    OpKind::JumpIf(_) => behind || rip == op.target,
                    OpKind::JumpIndirect | OpKind::CallIndirect | OpKind::Return(_) => true,
                    _ => behind && may_be_followed(op),
                }
            });
            let bytes = &self.around.code.0[(rip - CODE) as usize..];
            let decoded = decode(bytes, rip, Mode::Long64, &self.features, None, 1);
            let Ok(DecodeEnd::Block(Block { ops: one, .. })) = decoded else {
                break;
            };
            let Some(op) = one.into_iter().next().filter(|_| goes_on) else {
                break;
            };
            guest.extend_from_slice(&bytes[..usize::from(op.len)]);
            ops.push(op);
        }
        let Some(&rip) = rips.first() else { return };
        let block = Block {
            rip,
            mode: Mode::Long64,
            len: guest.len() as u32,
            ops,
        };
        if !block.is_path() {
            return;
        }
        let source = Source {
            block: &block,
            guest: &guest,
            context: Context::of(&self.cpu),
            page: 1,
            unshared: false,
            wary: false,
            run_time: None,
        };
        let translator = self.translator.as_mut().expect("paths are translated");
        match translator.translate(source, &mut self.native, &mut self.tlb) {
            Ok(id) => {
                self.paths += 1;
                self.translated.insert((rip, false), id);
            }
            Err(ThunkError::Full) => self.drop_all(),
            Err(ThunkError::Unsupported) => {}
        }
    }

    /// One translated block, and what it is linked to.
    fn run_translated(&mut self, block: &Block, bytes: &[u8], done: &mut u64) -> Turn {
        let context = Context::of(&self.cpu);
        let Some(translator) = &mut self.translator else {
            unreachable!("only called if there is one");
        };
        let unshared = matches!(self.left_by, Some(Site::Link { unshared: true, .. }));
        let key = (block.rip, unshared);
        let source = Source {
            block,
            guest: bytes,
            context,
            page: 1,
            unshared,
            wary: false,
            run_time: None,
        };
        let id = match self.translated.get(&key) {
            Some(&id) => id,
            None => {
                let native = &mut self.native;
                let made = translator.translate(source, native, &mut self.tlb);
                let id = match made {
                    Ok(id) => id,
                    Err(_) => {
                        translator.reset();
                        native.reset();
                        self.translated.clear();
                        self.tlb.forget_cells();
                        self.left_by = None;
                        translator
                            .translate(source, native, &mut self.tlb)
                            .expect("room for one block")
                    }
                };
                self.translated.insert(key, id);
                id
            }
        };
        match self.left_by.take() {
            Some(Site::Link { .. }) => translator.link(self.site, id),
            Some(Site::Jump { cell, .. }) => {
                let address = translator.address(id).expect("a live block");
                let (privilege, number) = (context.privilege, context.number());
                self.tlb
                    .fill_cell(cell, privilege, number, block.rip, address);
            }
            Some(Site::Branch { .. }) => {
                let address = translator.address(id).expect("a live block");
                self.tlb.insert_jump(context.privilege, block.rip, address);
            }
            _ => {}
        }
        let entry = translator.entry(id).expect("a live block");
        let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.around);
        // SAFETY: translated for this context and RIP; the translator is reset only above.
        let left = unsafe { translate::run(&mut core, entry) };
        *done += 1;
        let step_at = match left {
            Left::Turn(turn) => return turn,
            Left::Site(number) => {
                self.site = number;
                self.left_by = translator.site(number);
                match self.left_by {
                    Some(Site::Link { target, .. } | Site::Jump { target, .. }) => {
                        self.cpu.rip = target;
                        return Turn::Continue;
                    }
                    Some(Site::Attention { rip }) => {
                        self.left_by = None;
                        self.cpu.rip = rip;
                        return Turn::Continue;
                    }
                    Some(Site::Misled { rip }) => {
                        self.left_by = None;
                        self.translated.remove(&(rip, false));
                        self.cpu.rip = rip;
                        return Turn::Continue;
                    }
                    Some(Site::Branch { rip, effect }) => {
                        self.cpu.rip = rip;
                        let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.around);
                        if finish_branch(&mut core, effect) {
                            return Turn::Continue;
                        }
                        rip
                    }
                    other => panic!("{other:?}"),
                }
            }
            Left::Step { address, .. } => translator.rip_of(address).expect("an instruction"),
        };
        self.cpu.rip = step_at;
        let single = self.single(step_at).expect("the translator has decoded it");
        let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.around);
        run_one(&mut core, &single).0
    }

    /// One block.
    fn step(&mut self, done: &mut u64, kinds: &mut BTreeMap<&'static str, u64>) -> Turn {
        let mode = self.cpu.mode();
        let linear = self
            .cpu
            .segment(SegmentRegister::Cs)
            .base
            .wrapping_add(self.cpu.rip);
        if !CpuState::is_canonical(linear) {
            return Turn::Exception(Exception::general_protection(0));
        }
        let cs = self.cpu.cs();
        let past_limit = mode != Mode::Long64 && self.cpu.rip > u64::from(cs.limit);
        if past_limit {
            return Turn::Exception(Exception::general_protection(0));
        }
        if linear & !0xfff != CODE {
            let present = match self.around.page(linear) {
                None | Some((_, Page::Hole)) => 0,
                Some(_) => page_fault::PRESENT,
            };
            let error = present | page_fault::FETCH | page_fault::USER;
            return Turn::Exception(Exception::page_fault(linear, error));
        }
        let bytes = &self.around.code.0[(linear - CODE) as usize..];
        let left = u64::from(cs.limit) - self.cpu.rip.min(u64::from(cs.limit)) + 1;
        let limited = mode != Mode::Long64 && left < bytes.len() as u64;
        let bytes = if limited {
            &bytes[..left as usize]
        } else {
            bytes
        };
        let rip = self.cpu.rip;
        let bytes = &bytes.to_vec();
        let translates = self.translator.is_some() && translate::may_run(&self.cpu);
        let decoded = match decode(
            bytes,
            rip,
            mode,
            &self.features,
            (!translates).then_some(&mut self.native),
            usize::MAX,
        ) {
            Err(ThunkError::Full) => {
                self.native.reset();
                decode(
                    bytes,
                    rip,
                    mode,
                    &self.features,
                    Some(&mut self.native),
                    usize::MAX,
                )
            }
            other => other,
        };
        let Ok(DecodeEnd::Block(mut block)) = decoded else {
            if limited {
                return Turn::Exception(Exception::general_protection(0));
            }
            // Behind the last breakpoint of the page.
            let error = page_fault::FETCH | page_fault::USER;
            return Turn::Exception(Exception::page_fault(CODE + PAGE as u64, error));
        };
        // Breakpoints are not delivered: there is no kernel.
        let breakpoint = block
            .ops
            .last()
            .is_some_and(|op| op.instruction.mnemonic() == Mnemonic::Int3);
        if breakpoint {
            block.ops.pop();
            block.len -= 1;
        }
        for op in &block.ops {
            let text = format!("{:?}", op.kind);
            let name = text.split(['(', ' ']).next().unwrap_or_default();
            match kinds.iter_mut().find(|(kind, _)| **kind == name) {
                Some((_, count)) => *count += 1,
                None => {
                    kinds.insert(String::leak(name.to_owned()), 1);
                }
            }
        }
        let alone = block.ops.is_empty();
        if !alone && translates {
            return self.run_translated(&block, bytes, done);
        }
        if !alone {
            let mut core = Core::new(&mut self.cpu, &mut self.tlb, &mut self.around);
            let (turn, completed) = run(&mut core, &block);
            *done += completed;
            // The count tells how far it came.
            let singles = |op: &&trapline_engine::decode::Op| !matches!(op.kind, OpKind::Run(_));
            debug_assert!(completed as usize <= block.ops.iter().filter(singles).count());
            return turn;
        }
        self.cpu.rip = self.cpu.rip.wrapping_add(1);
        Turn::Exception(Exception {
            vector: trapline_x86::Vector::Breakpoint,
            error: None,
            cr2: None,
            dr6: 0,
        })
    }
}
