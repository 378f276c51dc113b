//! Everything on the board but processors and memory, wired up.

use std::io::{self, Write};
use std::sync::{Arc, Weak};

use trapline_monitor::interrupt::VcpuSignals;

use crate::BusError;
use crate::acpi_pm::PowerManagement;
use crate::clock::TimeSource;
use crate::cmos::Cmos;
use crate::debug_exit::{DebugConsole, DebugExit};
use crate::dma::{DmaPort, DmaThread};
use crate::dma_probe::{self, DmaProbe};
use crate::events::SystemEvents;
use crate::io_apic::{self, IoApic};
use crate::lines::InterruptLines;
use crate::local_apic::{self, LocalApic, LocalApicPage, LocalApics};
use crate::mmio::MmioBus;
use crate::pic::Pic;
use crate::pit::Pit;
use crate::port::{PortBus, PortDevice};
use crate::reset_control::{KeyboardController, ResetControl};
use crate::serial::{SerialInput, SerialLine};
use crate::timer::{TimerThread, Timers};

/// What the board is built from.
pub struct ChipsetConfig {
    /// One entry per VCPU, at most 255; the index is the APIC ID.
    pub signals: Vec<Arc<dyn VcpuSignals>>,
    pub events: Arc<dyn SystemEvents>,
    pub time: Arc<dyn TimeSource>,
    /// The rate in Hz of the guest's time-stamp counter.
    pub tsc_frequency: u64,
    pub serial_output: Box<dyn Write + Send>,
    /// Where ports 0xe9 and 0x402 write to, if they exist.
    pub debug_console: Option<Box<dyn Write + Send>>,
    /// Bytes of memory below and above 4 GiB.
    pub memory_below_4g: u64,
    pub memory_above_4g: u64,
    /// Whether there is the test device of [`crate::dma_probe`].
    pub dma_probe: bool,
}

/// The board.
pub struct Chipset {
    ports: Arc<PortBus>,
    mmio: Arc<MmioBus>,
    timers: Arc<Timers>,
    apics: Arc<LocalApics>,
    io_apic: Arc<IoApic>,
    pic: Arc<Pic>,
    pit: Arc<Pit>,
    serial: Arc<SerialLine>,
    power: Arc<PowerManagement>,
    keyboard: Arc<KeyboardController>,
    reset_control: Arc<ResetControl>,
    dma_probe: Option<Arc<DmaProbe>>,
}

impl Chipset {
    /// Builds the board in its state after power-up and firmware. No timer fires before
    /// [`Self::spawn_timers`].
    ///
    /// # Errors
    /// [`BusError`] when devices claim the same registers.
    pub fn new(config: ChipsetConfig) -> Result<Self, BusError> {
        let ChipsetConfig {
            signals,
            events,
            time,
            tsc_frequency,
            serial_output,
            debug_console,
            memory_below_4g,
            memory_above_4g,
            dma_probe,
        } = config;
        let timers = Timers::new(Arc::clone(&time));
        let apics = LocalApics::new(&signals, &timers, tsc_frequency);
        let io_apic = Arc::new(IoApic::new(Arc::clone(&apics)));
        let pic = Arc::new(Pic::new(Arc::clone(&apics)));
        let (weak_io_apic, weak_pic): (Weak<IoApic>, Weak<Pic>) =
            (Arc::downgrade(&io_apic), Arc::downgrade(&pic));
        apics.connect_eoi(weak_io_apic);
        apics.connect_external(weak_pic);
        let lines = InterruptLines::new(Arc::clone(&pic), Arc::clone(&io_apic));
        let cmos = Arc::new(Cmos::new(
            Arc::clone(&time),
            memory_below_4g,
            memory_above_4g,
        ));
        let chipset_events = Arc::clone(&events);
        let mut chipset = Self {
            ports: Arc::default(),
            mmio: Arc::default(),
            pit: Pit::new(&timers, lines.clone()),
            dma_probe: dma_probe.then(|| DmaProbe::new(lines.clone())),
            serial: SerialLine::new(serial_output, lines.clone()),
            power: Arc::new(PowerManagement::new(time, lines, Arc::clone(&events))),
            keyboard: Arc::new(KeyboardController::new(Arc::clone(&events))),
            reset_control: Arc::new(ResetControl::new(events)),
            timers,
            apics,
            io_apic,
            pic,
        };
        chipset.register(cmos, chipset_events, debug_console)?;
        chipset.firmware();
        Ok(chipset)
    }

    fn register(
        &mut self,
        cmos: Arc<Cmos>,
        events: Arc<dyn SystemEvents>,
        debug_console: Option<Box<dyn Write + Send>>,
    ) -> Result<(), BusError> {
        let mut ports = PortBus::new();
        ports.register(&Pic::PORTS, Arc::clone(&self.pic) as _)?;
        ports.register(&Pit::PORTS, Arc::clone(&self.pit) as _)?;
        ports.register(&[SerialLine::PORTS], Arc::clone(&self.serial) as _)?;
        ports.register(&[PowerManagement::PORTS], Arc::clone(&self.power) as _)?;
        ports.register(&KeyboardController::PORTS, Arc::clone(&self.keyboard) as _)?;
        ports.register(&[ResetControl::PORTS], Arc::clone(&self.reset_control) as _)?;
        ports.register(&[Cmos::PORTS], cmos)?;
        ports.register(&[DebugExit::PORTS], Arc::new(DebugExit::new(events)))?;
        if let Some(sink) = debug_console {
            ports.register(&DebugConsole::PORTS, Arc::new(DebugConsole::new(sink)))?;
        }
        let mut mmio = MmioBus::new();
        mmio.register(
            "local APIC",
            local_apic::PAGE..local_apic::PAGE + 0x1000,
            Arc::new(LocalApicPage::new(Arc::clone(&self.apics))),
        )?;
        mmio.register(
            "I/O APIC",
            io_apic::BASE..io_apic::BASE + io_apic::LENGTH,
            Arc::clone(&self.io_apic) as _,
        )?;
        if let Some(probe) = &self.dma_probe {
            mmio.register(
                "DMA probe",
                dma_probe::BASE..dma_probe::BASE + dma_probe::LENGTH,
                Arc::clone(probe) as _,
            )?;
        }
        self.ports = Arc::new(ports);
        self.mmio = Arc::new(mmio);
        Ok(())
    }

    /// What firmware sets up: the 8259 pair reaches VCPU 0, and the system control interrupt is
    /// level-triggered there.
    fn firmware(&self) {
        self.apics.enter_virtual_wire_mode();
        self.pic.write(0x4d1, 1, 0x02);
    }

    /// Starts the thread that fires the timers. It ends when the handle drops.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn spawn_timers(&self) -> io::Result<TimerThread> {
        self.timers.spawn()
    }

    /// Starts the threads of the devices that perform DMA. They end when the handles drop.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn spawn_dma(&self, port: &DmaPort) -> io::Result<Vec<DmaThread>> {
        let probe = self.dma_probe.iter();
        probe.map(|probe| probe.spawn(port.clone())).collect()
    }

    #[must_use]
    pub fn ports(&self) -> &Arc<PortBus> {
        &self.ports
    }

    #[must_use]
    pub fn mmio(&self) -> &Arc<MmioBus> {
        &self.mmio
    }

    #[must_use]
    pub fn timers(&self) -> &Arc<Timers> {
        &self.timers
    }

    /// The local APIC of a VCPU, or `None` without such a VCPU.
    #[must_use]
    pub fn local_apic(&self, vcpu: usize) -> Option<Arc<LocalApic>> {
        self.apics.of(vcpu)
    }

    /// The way for the host to type into the serial line.
    #[must_use]
    pub fn serial_input(&self) -> SerialInput {
        self.serial.input()
    }

    /// Asks the guest politely to power off; false when it does not listen.
    pub fn press_power_button(&self) -> bool {
        self.power.press_power_button()
    }

    /// Brings every device back to the state that [`Self::new`] built, for a reset of the machine.
    /// The clock keeps its time. No VCPU may run meanwhile.
    pub fn reset(&self) {
        self.apics.power_up();
        self.io_apic.reset();
        self.pic.reset();
        self.pit.reset();
        self.serial.reset();
        self.power.reset();
        self.keyboard.reset();
        self.reset_control.reset();
        if let Some(probe) = &self.dma_probe {
            probe.reset();
        }
        self.firmware();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::Duration;

    use trapline_monitor::interrupt::LocalInterrupts;

    use super::*;
    use crate::board::Silent;
    use trapline_monitor::clock::Pace;

    use crate::clock::{HostClock, VirtualClock};
    use crate::debug_exit::tests::Log;
    use crate::events::SystemEvent;
    use crate::mmio::Initiator;

    fn chipset(vcpus: usize, time: Arc<dyn TimeSource>) -> (Arc<Chipset>, Arc<Log>) {
        let log = Arc::new(Log::default());
        let chipset = Chipset::new(ChipsetConfig {
            signals: (0..vcpus).map(|_| Arc::new(Silent) as _).collect(),
            events: log.clone(),
            time,
            tsc_frequency: 1_000_000_000,
            serial_output: Box::new(io::sink()),
            debug_console: Some(Box::new(io::sink())),
            memory_below_4g: 1 << 30,
            memory_above_4g: 0,
            dma_probe: false,
        });
        (Arc::new(chipset.unwrap()), log)
    }

    fn cookie(chipset: &Chipset, address: u64) -> u64 {
        let mut regions = chipset.mmio().regions();
        regions
            .find(|(_, region)| region.range.contains(&address))
            .unwrap()
            .0
    }

    fn store(chipset: &Chipset, vcpu: u8, address: u64, value: u32) {
        let cookie = cookie(chipset, address);
        let bytes = value.to_le_bytes();
        chipset
            .mmio()
            .write(cookie, Initiator::Vcpu(vcpu), address & 0xfff, &bytes);
    }

    #[test]
    fn serial_input_becomes_an_interrupt_of_the_chosen_vcpu() {
        let (chipset, _) = chipset(2, Arc::new(VirtualClock::new(Duration::ZERO)));
        store(&chipset, 1, 0xfee0_00f0, 0x1ff);
        store(&chipset, 0, 0xfec0_0000, 0x19);
        store(&chipset, 0, 0xfec0_0010, 1 << 24);
        store(&chipset, 0, 0xfec0_0000, 0x18);
        store(&chipset, 0, 0xfec0_0010, 0x51);
        chipset.ports().write(0x3f9, 1, 1);
        chipset.serial_input().push(b"a");
        let local = chipset.local_apic(1).unwrap();
        assert_eq!(local.acknowledge(), Some(0x51));
        assert_eq!(chipset.ports().read(0x3f8, 1), u32::from(b'a'));
        assert!(chipset.local_apic(2).is_none());
    }

    #[test]
    fn a_held_level_comes_again_after_the_eoi() {
        let (chipset, _) = chipset(1, Arc::new(VirtualClock::new(Duration::ZERO)));
        store(&chipset, 0, 0xfec0_0000, 0x22);
        store(&chipset, 0, 0xfec0_0010, 0x8059);
        // Keep the 8259 out of it.
        chipset.ports().write(0x21, 1, 0xff);
        chipset.ports().write(0x602, 2, 0x100);
        assert!(chipset.press_power_button());
        let local = chipset.local_apic(0).unwrap();
        for _ in 0..3 {
            assert_eq!(local.acknowledge(), Some(0x59));
            assert!(!local.pending());
            store(&chipset, 0, 0xfee0_00b0, 0);
        }
        chipset.ports().write(0x600, 2, 0x100);
        assert_eq!(local.acknowledge(), Some(0x59));
        store(&chipset, 0, 0xfee0_00b0, 0);
        assert!(!local.pending());
    }

    #[test]
    fn reset_forgets_what_the_guest_set_up() {
        let (chipset, log) = chipset(1, Arc::new(VirtualClock::new(Duration::ZERO)));
        let local = chipset.local_apic(0).unwrap();
        local.write_msr(0x1b, 0xfee0_0d00, 0).unwrap();
        local.write_msr(0x832, 0x4_0030, 0).unwrap();
        local.write_msr(0x6e0, 1_000, 0).unwrap();
        chipset.ports().write(0x602, 2, 0x100);
        chipset.press_power_button();
        chipset.ports().write(0x43, 1, 0x34);
        chipset.ports().write(0x40, 2, 0x0101);
        chipset.ports().write(0xcf9, 1, 6);
        assert_eq!(log.take(), [SystemEvent::Reset]);
        chipset.reset();
        assert_eq!(local.read_msr(0x1b), Some(0xfee0_0900));
        assert_eq!(chipset.timers().next_deadline(), None);
        assert_eq!(chipset.ports().read(0x600, 4), 0);
        assert_eq!(chipset.ports().read(0x4d1, 1), 2);
        chipset.ports().write(0xcf9, 1, 6);
        assert_eq!(log.take(), [SystemEvent::Reset], "it can be reset again");
    }

    /// All ways between devices at once; a wrong order of locks would hang here.
    #[test]
    fn nothing_deadlocks() {
        let (chipset, _) = chipset(4, Arc::new(HostClock::new(Pace::HOST)));
        let timers = chipset.spawn_timers().unwrap();
        let stop = AtomicBool::new(false);
        let (done, finished) = std::sync::mpsc::channel();
        for vcpu in 0..4 {
            store(&chipset, vcpu, 0xfee0_00f0, 0x1ff);
            store(&chipset, vcpu, 0xfee0_0320, 0x2_0040);
            store(&chipset, vcpu, 0xfee0_0380, 1_000);
        }
        for (pin, entry) in [(2u32, 0x50u32), (4, 0x8060), (9, 0x8070)] {
            store(&chipset, 0, 0xfec0_0000, 0x10 + 2 * pin);
            store(&chipset, 0, 0xfec0_0010, entry);
        }
        chipset.ports().write(0x43, 1, 0x34);
        chipset.ports().write(0x40, 2, 0x0101);
        chipset.ports().write(0x602, 2, 0x100);
        let watchdog = thread::spawn(move || {
            let outcome = finished.recv_timeout(Duration::from_secs(60));
            if outcome.is_err() {
                eprintln!("the devices hang");
                std::process::abort();
            }
        });
        thread::scope(|scope| {
            let (chipset, stop) = (&chipset, &stop);
            for vcpu in 0..4u8 {
                scope.spawn(move || {
                    let local = chipset.local_apic(usize::from(vcpu)).unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        store(chipset, vcpu, 0xfee0_0300, 0xc_0080);
                        // A level that nobody serves comes back for ever.
                        for _ in 0..16 {
                            if local.acknowledge().is_none() {
                                break;
                            }
                            store(chipset, vcpu, 0xfee0_00b0, 0);
                            chipset.ports().write(0x20, 1, 0x20);
                        }
                        chipset.ports().write(0x3f9, 1, 3);
                        let _ = chipset.ports().read(0x3fa, 1);
                        let _ = chipset.ports().read(0x3f8, 1);
                        chipset.serial_input().push(b"x");
                        chipset.press_power_button();
                        chipset.ports().write(0x600, 2, 0x100);
                    }
                });
            }
            thread::sleep(Duration::from_millis(300));
            stop.store(true, Ordering::Relaxed);
        });
        drop(timers);
        done.send(()).unwrap();
        watchdog.join().unwrap();
    }
}
