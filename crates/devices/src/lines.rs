//! The interrupt request lines of the board: each reaches the 8259 pair and the I/O APIC.

use std::sync::Arc;

use crate::io_apic::IoApic;
use crate::pic::Pic;

/// The ISA line of the interval timer.
pub const TIMER: u8 = 0;
/// The first serial line.
pub const SERIAL: u8 = 4;
/// ACPI's system control interrupt, level-triggered.
pub const SYSTEM_CONTROL: u8 = 9;

/// The I/O APIC's pin of the interval timer, as the MADT says.
pub const TIMER_PIN: u8 = 2;

/// Drives lines; clones drive the same ones.
#[derive(Clone)]
pub struct InterruptLines {
    pic: Arc<Pic>,
    io_apic: Arc<IoApic>,
}

impl InterruptLines {
    #[must_use]
    pub fn new(pic: Arc<Pic>, io_apic: Arc<IoApic>) -> Self {
        Self { pic, io_apic }
    }

    /// Makes the ISA line (0 to 15) or I/O APIC pin (16 to 23) `irq` active or inactive.
    pub fn set(&self, irq: u8, active: bool) {
        self.pic.set_line(irq, active);
        let pin = match irq {
            TIMER => TIMER_PIN,
            // The pin belongs to the timer; the line is the 8259's cascade.
            TIMER_PIN => return,
            irq => irq,
        };
        self.io_apic.set_line(usize::from(pin), active);
    }
}
