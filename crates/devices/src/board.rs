//! A small board for the tests: one VCPU, its interrupt controllers and virtual time.

use std::sync::{Arc, Weak};

use trapline_monitor::interrupt::{LocalInterrupts, VcpuSignals};

use crate::io_apic::IoApic;
use crate::lines::InterruptLines;
use crate::local_apic::{LocalApic, LocalApics};
use crate::mmio::{Initiator, MmioDevice};
use crate::pic::Pic;
use crate::port::PortDevice;
use crate::timer::tests::Bench;

pub struct Silent;

impl VcpuSignals for Silent {
    fn interrupt(&self) {}
    fn nmi(&self) {}
    fn init(&self) {}
    fn startup(&self, _: u8) {}
}

pub struct Board {
    pub bench: Bench,
    pub lines: InterruptLines,
    pub io_apic: Arc<IoApic>,
    pic: Arc<Pic>,
    local: Arc<LocalApic>,
}

impl Board {
    /// The 8259 pair gives vectors 0x30 to 0x3f, through VCPU 0's LINT0.
    pub fn new() -> Self {
        let bench = Bench::new();
        let signals: Vec<Arc<dyn VcpuSignals>> = vec![Arc::new(Silent)];
        let apics = LocalApics::new(&signals, &bench.timers, 1_000_000_000);
        apics.enter_virtual_wire_mode();
        let pic = Arc::new(Pic::new(apics.clone()));
        let weak: Weak<Pic> = Arc::downgrade(&pic);
        apics.connect_external(weak);
        let io_apic = Arc::new(IoApic::new(apics.clone()));
        for (port, base) in [(0x20, 0x30), (0xa0, 0x38)] {
            pic.write(port, 1, 0x11);
            for value in [base, 0, 1] {
                pic.write(port + 1, 1, value);
            }
        }
        pic.write(0x4d1, 1, 0x02);
        Self {
            bench,
            lines: InterruptLines::new(pic.clone(), io_apic.clone()),
            io_apic,
            pic,
            local: apics.of(0).unwrap(),
        }
    }

    /// The ISA lines that the 8259 pair delivers now, ended one by one, each at most once.
    pub fn interrupts(&self) -> Vec<u8> {
        let mut irqs = Vec::new();
        while irqs.len() < 16
            && let Some(vector) = self.local.acknowledge()
        {
            irqs.push(vector - 0x30);
            self.pic.write(0xa0, 1, 0x20);
            self.pic.write(0x20, 1, 0x20);
            if vector - 0x30 == crate::lines::SYSTEM_CONTROL {
                break;
            }
        }
        irqs
    }

    /// Writes an I/O APIC register.
    pub fn redirect(&self, register: u8, value: u32) {
        self.io_apic.write(Initiator::Other, 0, &[register]);
        self.io_apic
            .write(Initiator::Other, 0x10, &value.to_le_bytes());
    }

    pub fn local(&self) -> &LocalApic {
        &self.local
    }
}
