//! What lies around the processor of one VCPU, as the engine asks for it: translation, traced
//! accesses, devices, CPUID and model-specific registers.
//!
//! The way of a fault: a TLB miss comes here ([`Environment::translate`]), is found in the shadow
//! page tables or walked, and is either entered into the TLB, or found to need sensing, or found to be no RAM. A sensed access
//! goes through the trace subsystem ([`Environment::sensed`]); notices that reach this VCPU are
//! applied to its derived structures by [`derived::Derived::apply`] and nowhere else.

mod derived;
mod walk;

use std::sync::Arc;

use trapline_engine::access::Fault;
use trapline_engine::env::{Backing, Environment, MsrFault, Restart, Span, Translation};
use trapline_engine::system_item::{Decoded, SystemItem};
use trapline_engine::tlb::{Access, Privilege, Tlb};
use trapline_memory::GuestMemory;
use trapline_memory::watch::Touch;
use trapline_trace::observer::Witness;
use trapline_trace::{Actor, Kind, Notice, Phase, Range, Sense, TraceSystem, VcpuId};
use trapline_x86::cpuid::{CpuidDynamic, CpuidModel};
use trapline_x86::paging::Request;
use trapline_x86::{CpuState, Exception, msr};

use crate::clock::Pace;
use crate::code_cache::CodeCache;
use crate::interrupt::LocalInterrupts;
use crate::lockstep::rehearsal::{MemoryDifference, Rehearsal};
use crate::platform::Platform;
use crate::shadow_descriptors::ShadowDescriptors;
use crate::shadow_pages::ShadowPages;
use crate::signals::attention;
use crate::statistics::Exits;
use crate::translated_code::CodeObserver;
use crate::turn::Turns;

/// The bit of a `watch` trace's cookie that says that nobody stops there: accesses are reported
/// ([`trapline_memory::watch`]), and that is all. Without it, it is a debugger's watchpoint.
pub const REPORT_ONLY: u64 = 1 << 63;

/// Everything of a sub-VMM but the registers and the TLB.
pub struct Surroundings {
    pub vcpu: VcpuId,
    pub trace: Arc<TraceSystem>,
    pub memory: Arc<GuestMemory>,
    pub apic: Arc<dyn LocalInterrupts>,
    pub platform: Arc<dyn Platform>,
    pub cpuid: Arc<CpuidModel>,
    /// This VCPU's decoded code.
    pub code: CodeCache,
    /// This VCPU's shadow page tables.
    pub shadow: ShadowPages,
    /// This VCPU's shadow descriptor tables.
    pub descriptors: ShadowDescriptors,
    /// Set where an interrupt may have become deliverable by what this VCPU did itself.
    pub look_for_interrupts: bool,
    pub exits: Exits,
    /// The watchpoint of a debugger that this VCPU's last access hit.
    pub watchpoint_hit: Option<u64>,
    turns: Turns,
    /// What the sensed write that follows will write.
    announced: Vec<u8>,
    /// In lock-step execution.
    pub(crate) rehearsal: Option<Box<Rehearsal>>,
    pub(crate) pace: Pace,
    /// Hears of translations.
    pub code_observer: Option<Arc<dyn CodeObserver>>,
}

/// The range of a span.
fn range(span: Span) -> Range {
    Range {
        lo: span.gpa,
        hi: span.gpa + u64::from(span.len),
    }
}

/// The ranges of the spans of an access, of which there are at most two, and how many there are.
fn ranges(spans: &[Span]) -> ([Range; 2], usize) {
    let mut ranges = [Range::new(0, 0); 2];
    for (place, &span) in ranges.iter_mut().zip(spans) {
        *place = range(span);
    }
    (ranges, spans.len().min(2))
}

/// An access by the instruction at `rip`.
fn touch(vcpu: VcpuId, rip: u64, ranges: &[Range], sense: Sense) -> Touch<'_> {
    Touch {
        actor: Actor::Vcpu(vcpu),
        rip: Some(rip),
        ranges,
        sense,
    }
}

fn sense(access: Access) -> Sense {
    match access {
        Access::Write => Sense::WRITE,
        Access::Read | Access::Fetch => Sense::READ,
    }
}

impl Surroundings {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        vcpu: VcpuId,
        trace: Arc<TraceSystem>,
        memory: Arc<GuestMemory>,
        apic: Arc<dyn LocalInterrupts>,
        platform: Arc<dyn Platform>,
        cpuid: Arc<CpuidModel>,
    ) -> Self {
        let witness = Witness::new(trace.observing().clone(), vcpu);
        let code = CodeCache::new(witness.clone());
        let shadow = ShadowPages::new(vcpu, cpuid.physical_address_bits(), witness.clone());
        let descriptors = ShadowDescriptors::new(witness);
        Self {
            vcpu,
            trace,
            memory,
            apic,
            platform,
            cpuid,
            code,
            shadow,
            descriptors,
            look_for_interrupts: false,
            turns: Turns::default(),
            exits: Exits::default(),
            watchpoint_hit: None,
            announced: Vec::new(),
            rehearsal: None,
            pace: Pace::HOST,
            code_observer: None,
        }
    }

    pub(crate) fn rehearse(&mut self, act: impl FnOnce(&mut Rehearsal)) {
        if let Some(rehearsal) = &mut self.rehearsal {
            act(rehearsal);
        }
    }

    /// Where memory is not what the first of two trials left.
    pub(crate) fn trial_differences(&self) -> Vec<MemoryDifference> {
        let rehearsal = self.rehearsal.as_ref();
        rehearsal.map_or_else(Vec::new, |r| r.differences(16))
    }

    /// Whether this access, which is not to memory directly, must not be made now.
    fn refuses(&self, access: Access) -> bool {
        let rehearsal = self.rehearsal.as_ref();
        access != Access::Fetch && rehearsal.is_some_and(|rehearsal| rehearsal.active)
    }

    fn dynamic(&self, cpu: &CpuState) -> CpuidDynamic {
        CpuidDynamic::of(cpu, self.apic.id())
    }
}

impl Environment for Surroundings {
    fn translate(
        &mut self,
        cpu: &CpuState,
        tlb: &mut Tlb,
        linear: u64,
        privilege: Privilege,
        access: Access,
    ) -> Result<Translation, Fault> {
        // Operands have been checked. The rest of an instruction that crosses into the hole of
        // addresses, or of a descriptor table that does, has not; the walk ignores the upper bits,
        // and the TLB holds canonical addresses only.
        if !CpuState::is_canonical(linear) {
            return Err(Exception::general_protection(0).into());
        }
        let request = Request {
            write: access == Access::Write,
            fetch: access == Access::Fetch,
            user: privilege.is_user(),
            smap_closed: privilege == Privilege::Supervisor && access != Access::Fetch,
        };
        let shadowed = self.shadow.lookup(cpu, linear);
        let page = match shadowed.filter(|page| page.cacheable(cpu, request)) {
            Some(page) => {
                self.shadow.statistics.hits += 1;
                page
            }
            None => self.walk(cpu, tlb, linear, request)?,
        };
        let gpa = page.gpa | (linear & 0xfff);
        let Some(host_page) = self.memory.host_address(page.gpa) else {
            if self.refuses(access) {
                return Err(Fault::Restart);
            }
            return Ok(Translation {
                gpa,
                backing: Backing::Device,
            });
        };
        let host = host_page.wrapping_add((linear & 0xfff) as usize);
        // What is fetched is decoded under a trace of its own; reading it needs no hold.
        // What may be written directly may be read through the same translation.
        let held = match access {
            Access::Write => Sense::BOTH,
            _ => Sense::READ,
        };
        let direct = access == Access::Fetch || self.memory.hold(self.vcpu, gpa, held);
        if !direct {
            if self.refuses(access) {
                return Err(Fault::Restart);
            }
            return Ok(Translation {
                gpa,
                backing: Backing::Sensed(host),
            });
        }
        tlb.insert(
            linear,
            privilege,
            access,
            page.gpa,
            host_page,
            page.global,
            page.size,
        );
        if access == Access::Write
            && let Some(rehearsal) = &mut self.rehearsal
        {
            rehearsal.grant(linear, privilege, page.gpa, host_page);
        }
        Ok(Translation {
            gpa,
            backing: Backing::Ram(host),
        })
    }

    fn announce(&mut self, bytes: &[u8]) {
        self.announced.extend_from_slice(bytes);
    }

    fn may_write_beside(&mut self, span: Span) -> bool {
        let (memory, vcpu) = (&self.memory, self.vcpu);
        self.trace.untraced(range(span), Sense::WRITE, &mut || {
            memory.hold_beside(vcpu, span.gpa)
        })
    }

    fn sensed(
        &mut self,
        tlb: &mut Tlb,
        rip: u64,
        spans: &[Span],
        access: Access,
        perform: &mut dyn FnMut(),
    ) -> Result<(), Restart> {
        self.exits.sensed += 1;
        let (ranges, pieces) = ranges(spans);
        let vcpu = self.vcpu;
        let touch = touch(vcpu, rip, &ranges, sense(access));
        let mut announced = std::mem::take(&mut self.announced);
        let (trace, mut derived) = self.derived(tlb);
        let memory = derived.memory;
        let mut watchpoint = None;
        let done = trace
            .access_foreseen(
                Actor::Vcpu(vcpu),
                &ranges[..pieces],
                sense(access),
                &mut |notice| {
                    if let Notice::Notification(n) = &notice
                        && n.kind == Kind::Watch
                        && n.actor == Actor::Vcpu(vcpu)
                        && n.cookie & REPORT_ONLY == 0
                    {
                        watchpoint = Some(n.cookie);
                    }
                    derived.apply(&notice);
                },
                &mut |phase| match phase {
                    Phase::Foresee(value) => value.extend_from_slice(&announced),
                    Phase::Perform => {
                        if access == Access::Write {
                            memory.before_write(&ranges);
                        }
                        memory.watches().perform(memory, touch, perform);
                    }
                },
            )
            .map_err(|_| Restart);
        announced.clear();
        self.announced = announced;
        done?;
        self.memory.after_writes(&self.trace);
        if access == Access::Write {
            for span in spans {
                self.descriptors.note_write(span.gpa);
            }
            // A page that is written often should cost no further time.
            if self.descriptors.has_released() {
                self.remove_descriptor_traces();
            }
        }
        if self.shadow.has_released() {
            self.remove_released_tables();
        }
        if watchpoint.is_some() {
            self.watchpoint_hit = watchpoint;
            self.trace.raise(vcpu, attention::DEBUG);
        }
        Ok(())
    }

    fn exclusive(
        &mut self,
        tlb: &mut Tlb,
        rip: u64,
        spans: &[Span],
        perform: &mut dyn FnMut(),
    ) -> Result<(), Restart> {
        self.exits.split_locks += 1;
        let (ranges, pieces) = ranges(spans);
        let vcpu = self.vcpu;
        let touch = touch(vcpu, rip, &ranges, Sense::BOTH);
        let (trace, mut derived) = self.derived(tlb);
        let memory = derived.memory;
        trace
            .exclusive(
                vcpu,
                &ranges[..pieces],
                &mut |notice| derived.apply(&notice),
                &mut || {
                    memory.before_write(&ranges);
                    memory.watches().perform(memory, touch, perform);
                },
            )
            .map_err(|_| Restart)?;
        self.memory.after_writes(&self.trace);
        Ok(())
    }

    fn device_read(&mut self, gpa: u64, data: &mut [u8]) {
        self.exits.device += 1;
        let end = gpa.saturating_add(data.len() as u64);
        let actor = Actor::Vcpu(self.vcpu);
        match self
            .trace
            .device_at(actor, Range { lo: gpa, hi: end }, Sense::READ)
        {
            Some((cookie, registers)) => {
                let offset = gpa.wrapping_sub(registers.lo);
                self.platform
                    .device_read(self.vcpu.index() as u8, cookie, offset, data);
            }
            None => data.fill(0xff),
        }
        self.look_for_interrupts = true;
    }

    fn device_write(&mut self, gpa: u64, data: &[u8]) {
        self.exits.device += 1;
        let end = gpa.saturating_add(data.len() as u64);
        let actor = Actor::Vcpu(self.vcpu);
        if let Some((cookie, registers)) =
            self.trace
                .device_at(actor, Range { lo: gpa, hi: end }, Sense::WRITE)
        {
            let offset = gpa.wrapping_sub(registers.lo);
            self.platform
                .device_write(self.vcpu.index() as u8, cookie, offset, data);
        }
        self.look_for_interrupts = true;
    }

    fn port_read(&mut self, port: u16, size: u8) -> u32 {
        self.exits.port += 1;
        self.platform.port_read(self.vcpu.index() as u8, port, size)
    }

    fn port_write(&mut self, port: u16, size: u8, value: u32) {
        self.exits.port += 1;
        self.platform
            .port_write(self.vcpu.index() as u8, port, size, value);
    }

    fn tsc(&mut self, cpu: &CpuState) -> u64 {
        let counter = self.pace.guest(crate::clock::host_tsc());
        counter.wrapping_add(cpu.msr.tsc_offset)
    }

    fn cpuid(&mut self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.exits.cpuid += 1;
        let dynamic = self.dynamic(cpu);
        self.cpuid.read(leaf, subleaf, dynamic)
    }

    fn msr_read(&mut self, cpu: &CpuState, index: u32) -> Result<u64, MsrFault> {
        self.exits.msr += 1;
        if is_apic_msr(index) {
            return self.apic.read_msr(index).ok_or(MsrFault);
        }
        let tsc = self.tsc(cpu);
        msr::read(cpu, &self.cpuid, index, tsc).ok_or_else(|| {
            tracing::debug!(target: "msr", "RDMSR of {index:#x} raises #GP");
            MsrFault
        })
    }

    fn msr_write(
        &mut self,
        cpu: &mut CpuState,
        tlb: &mut Tlb,
        index: u32,
        value: u64,
    ) -> Result<(), MsrFault> {
        self.exits.msr += 1;
        let tsc = self.tsc(cpu);
        if is_apic_msr(index) {
            self.look_for_interrupts = true;
            return self.apic.write_msr(index, value, tsc).ok_or(MsrFault);
        }
        match msr::write(cpu, &self.cpuid, index, value, tsc) {
            Some(effect) => {
                if effect != msr::Effect::None {
                    self.before_flush(tlb);
                    tlb.flush_all();
                }
                Ok(())
            }
            None => {
                tracing::debug!(target: "msr", "WRMSR of {value:#x} to {index:#x} raises #GP");
                Err(MsrFault)
            }
        }
    }

    fn cr8_read(&mut self) -> u64 {
        u64::from(self.apic.task_priority_class())
    }

    fn cr8_write(&mut self, value: u64) {
        self.apic.set_task_priority_class(value as u8 & 0xf);
        self.look_for_interrupts = true;
    }

    #[inline]
    fn shadowed(
        &mut self,
        cpu: &CpuState,
        tlb: &mut Tlb,
        linear: u64,
        item: SystemItem,
    ) -> Result<Option<Decoded>, Fault> {
        match self.descriptors.recent(tlb, linear, item) {
            Some(answer) => Ok(answer),
            None => self.shadow_descriptor(cpu, tlb, linear, item),
        }
    }

    fn before_flush(&mut self, tlb: &mut Tlb) {
        if self.shadow.has_released() {
            self.remove_released_tables();
        }
        if self.shadow.is_empty() {
            return;
        }
        let vcpu = self.vcpu;
        let (trace, mut derived) = self.derived(tlb);
        trace.settle(vcpu, &mut |notice| derived.apply(&notice));
        self.shadow.flushed();
    }

    fn is_wanted(&self, cpu: &CpuState) -> bool {
        self.look_for_interrupts && cpu.interrupts_enabled()
    }

    fn is_interrupt_due(&self) -> bool {
        self.look_for_interrupts
    }

    fn pause(&mut self) {
        self.turns.spins();
    }
}

/// IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC registers live with the local APIC.
fn is_apic_msr(index: u32) -> bool {
    matches!(index, 0x1b | 0x6e0 | 0x800..=0x8ff)
}
