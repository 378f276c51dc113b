//! The local APICs of all VCPUs and the messages between them (SDM vol. 3, chapter "Advanced
//! Programmable Interrupt Controller").
//!
//! Requests are posted from any thread without a lock: every register is an atomic, and only the
//! timer has a mutex. A register is written by its own VCPU alone, except for the requests (IRR,
//! TMR), the LINT pins and the error bits.

mod base;
mod delivery;
mod mmio;
mod msr;
mod priority;
mod register;
#[cfg(test)]
mod tests;
mod timer;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use trapline_monitor::interrupt::{LocalInterrupts, VcpuSignals};

pub use delivery::{DeliveryMode, Destination, Message};
pub use mmio::{LocalApicPage, PAGE};
pub use timer::BUS_FREQUENCY;

use crate::timer::Timers;
use priority::VectorSet;
use register::Lvt;
use timer::{Countdown, Expiry};

/// Hears of the end of a level-triggered interrupt: the I/O APIC.
pub trait EoiBroadcast: Send + Sync {
    /// `vector` was level-triggered and is no longer in service on some VCPU.
    fn eoi(&self, vector: u8);
}

/// Supplies the vectors of external interrupts: the 8259 pair.
pub trait ExternalInterrupts: Send + Sync {
    /// The INTA cycle.
    fn acknowledge(&self) -> u8;
}

/// All local APICs of a machine; the index of one is its VCPU's index and its APIC ID.
pub struct LocalApics {
    apics: Box<[Apic]>,
    timers: Arc<Timers>,
    tsc_frequency: u64,
    eoi: OnceLock<Weak<dyn EoiBroadcast>>,
    external: OnceLock<Weak<dyn ExternalInterrupts>>,
    /// Where the next lowest-priority arbitration starts, so that equals take turns.
    arbitration: AtomicUsize,
}

/// The registers of one local APIC.
struct Apic {
    id: u8,
    signals: Arc<dyn VcpuSignals>,
    /// IA32_APIC_BASE.
    base: AtomicU64,
    requested: VectorSet,
    in_service: VectorSet,
    level_triggered: VectorSet,
    task_priority: AtomicU8,
    logical_destination: AtomicU32,
    destination_format: AtomicU32,
    spurious: AtomicU32,
    /// Errors since the last write of the error status register, and what that write showed.
    errors: AtomicU32,
    error_status: AtomicU32,
    interrupt_command: AtomicU64,
    lvt: [AtomicU32; Lvt::COUNT],
    /// The levels of LINT0 and LINT1.
    pins: [AtomicBool; 2],
    timer: Mutex<Countdown>,
    deadline: crate::timer::Timer,
    /// Keeps the target of `deadline` alive.
    _expiry: Arc<Expiry>,
}

impl LocalApics {
    /// One local APIC per entry of `signals`, all in the state after power-up: xAPIC mode,
    /// disabled by software. VCPU 0 is the bootstrap processor. `tsc_frequency` is the rate in Hz
    /// of the guest's time-stamp counter. Beyond 255 entries none gets an APIC.
    #[must_use]
    pub fn new(
        signals: &[Arc<dyn VcpuSignals>],
        timers: &Arc<Timers>,
        tsc_frequency: u64,
    ) -> Arc<Self> {
        Arc::new_cyclic(|apics: &Weak<Self>| {
            let build = |(id, signals): (u8, &Arc<dyn VcpuSignals>)| {
                let expiry = Arc::new(Expiry::new(apics.clone(), usize::from(id)));
                let target: Weak<Expiry> = Arc::downgrade(&expiry);
                let apic = Apic {
                    id,
                    signals: Arc::clone(signals),
                    base: AtomicU64::new(0),
                    requested: VectorSet::default(),
                    in_service: VectorSet::default(),
                    level_triggered: VectorSet::default(),
                    task_priority: AtomicU8::new(0),
                    logical_destination: AtomicU32::new(0),
                    destination_format: AtomicU32::new(0),
                    spurious: AtomicU32::new(0),
                    errors: AtomicU32::new(0),
                    error_status: AtomicU32::new(0),
                    interrupt_command: AtomicU64::new(0),
                    lvt: Default::default(),
                    pins: Default::default(),
                    timer: Mutex::default(),
                    deadline: timers.timer(target),
                    _expiry: expiry,
                };
                apic.power_up();
                apic
            };
            Self {
                apics: (0..=254u8).zip(signals).map(build).collect(),
                timers: Arc::clone(timers),
                tsc_frequency,
                eoi: OnceLock::new(),
                external: OnceLock::new(),
                arbitration: AtomicUsize::new(0),
            }
        })
    }

    /// Says who hears of level-triggered EOIs. The first call counts.
    pub fn connect_eoi(&self, listener: Weak<dyn EoiBroadcast>) {
        let _ = self.eoi.set(listener);
    }

    /// Says who supplies the vectors of external interrupts. The first call counts.
    pub fn connect_external(&self, source: Weak<dyn ExternalInterrupts>) {
        let _ = self.external.set(source);
    }

    /// The number of VCPUs.
    #[must_use]
    pub fn count(&self) -> usize {
        self.apics.len()
    }

    /// The view of VCPU `vcpu` on its local APIC, or `None` without such a VCPU.
    #[must_use]
    pub fn of(self: &Arc<Self>, vcpu: usize) -> Option<Arc<LocalApic>> {
        (vcpu < self.apics.len()).then(|| {
            Arc::new(LocalApic {
                all: Arc::clone(self),
                vcpu,
            })
        })
    }

    /// The machine's reset: every APIC as after power-up.
    pub fn power_up(&self) {
        for apic in &self.apics {
            apic.power_up();
        }
    }

    /// What firmware leaves behind on the bootstrap processor, so that a guest may use the 8259
    /// at once: enabled, LINT0 passes external interrupts, LINT1 is the NMI.
    pub fn enter_virtual_wire_mode(&self) {
        if let Some(apic) = self.apics.first() {
            apic.spurious.store(0x1ff, Ordering::SeqCst);
            apic.set_lvt(Lvt::Lint0, 0x700);
            apic.set_lvt(Lvt::Lint1, 0x400);
        }
    }

    fn apic(&self, vcpu: usize) -> Option<&Apic> {
        self.apics.get(vcpu)
    }
}

impl Apic {
    fn power_up(&self) {
        let bootstrap = if self.id == 0 { base::BOOTSTRAP } else { 0 };
        self.base
            .store(PAGE | base::ENABLED | bootstrap, Ordering::SeqCst);
        self.reset();
    }

    /// The reset state of all registers but the ID, the base and the pins.
    fn reset(&self) {
        *crate::lock(&self.timer) = Countdown::default();
        self.deadline.cancel();
        self.spurious.store(0xff, Ordering::SeqCst);
        for lvt in &self.lvt {
            lvt.store(register::MASKED, Ordering::SeqCst);
        }
        for set in [&self.requested, &self.in_service, &self.level_triggered] {
            set.clear_all();
        }
        self.task_priority.store(0, Ordering::SeqCst);
        self.logical_destination.store(0, Ordering::SeqCst);
        self.destination_format.store(u32::MAX, Ordering::SeqCst);
        self.errors.store(0, Ordering::SeqCst);
        self.error_status.store(0, Ordering::SeqCst);
        self.interrupt_command.store(0, Ordering::SeqCst);
    }

    /// Software enable, bit 8 of the spurious-interrupt vector register.
    fn software_enabled(&self) -> bool {
        self.spurious.load(Ordering::SeqCst) & 0x100 != 0
    }

    fn lvt(&self, entry: Lvt) -> u32 {
        self.lvt[entry as usize].load(Ordering::SeqCst)
    }

    fn set_lvt(&self, entry: Lvt, value: u32) {
        self.lvt[entry as usize].store(value, Ordering::SeqCst);
    }
}

/// One VCPU's local APIC.
pub struct LocalApic {
    all: Arc<LocalApics>,
    vcpu: usize,
}

impl LocalApic {
    fn apic(&self) -> &Apic {
        // `LocalApics::of` checked the index and the number of APICs never changes.
        &self.all.apics[self.vcpu]
    }
}

impl LocalInterrupts for LocalApic {
    fn pending(&self) -> bool {
        let apic = self.apic();
        apic.external_waits() || apic.deliverable().is_some()
    }

    fn acknowledge(&self) -> Option<u8> {
        let apic = self.apic();
        if apic.external_waits()
            && let Some(source) = self.all.external.get().and_then(Weak::upgrade)
        {
            return Some(source.acknowledge());
        }
        let vector = apic.deliverable()?;
        apic.requested.remove(vector);
        apic.in_service.insert(vector);
        Some(vector)
    }

    fn read_msr(&self, index: u32) -> Option<u64> {
        self.all.read_msr(self.vcpu, index)
    }

    fn write_msr(&self, index: u32, value: u64, tsc: u64) -> Option<()> {
        self.all.write_msr(self.vcpu, index, value, tsc)
    }

    fn task_priority_class(&self) -> u8 {
        self.apic().task_priority.load(Ordering::SeqCst) >> 4
    }

    fn set_task_priority_class(&self, class: u8) {
        self.apic().set_task_priority(class << 4);
    }

    fn id(&self) -> u32 {
        u32::from(self.apic().id)
    }

    fn init(&self) {
        self.apic().reset();
    }
}
