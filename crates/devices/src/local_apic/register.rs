//! The registers that the xAPIC page and the x2APIC MSRs have in common, by their number: offset
//! in the page divided by 16, or MSR less 0x800.

use std::sync::atomic::Ordering;

use super::base::Mode;
use super::{Apic, LocalApics};

/// The mask bit of a local vector table entry.
pub(super) const MASKED: u32 = 1 << 16;

/// The local vector table's entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lvt {
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

impl Lvt {
    pub const COUNT: usize = 6;
    /// Remote IRR, read-only.
    pub const REMOTE_REQUEST: u32 = 1 << 14;
    /// Level-triggered.
    pub const LEVEL: u32 = 1 << 15;
    /// Delivery status and remote IRR: writes do not reach them, nor are they reserved.
    pub const READ_ONLY: u32 = 1 << 12 | Self::REMOTE_REQUEST;

    fn of(number: u8) -> Option<Self> {
        Some(match number {
            0x32 => Self::Timer,
            0x33 => Self::Thermal,
            0x34 => Self::Performance,
            0x35 => Self::Lint0,
            0x36 => Self::Lint1,
            0x37 => Self::Error,
            _ => return None,
        })
    }

    /// The bits that can be written.
    pub fn writable(self) -> u32 {
        match self {
            Self::Timer => 0x7_00ff,
            Self::Thermal | Self::Performance => 0x1_07ff,
            Self::Lint0 | Self::Lint1 => 0x1_a7ff,
            Self::Error => 0x1_00ff,
        }
    }
}

/// The bits of the error status register.
#[derive(Clone, Copy)]
pub(super) enum Error {
    SendIllegalVector = 1 << 5,
    ReceiveIllegalVector = 1 << 6,
    IllegalRegister = 1 << 7,
}

/// Register numbers.
pub(super) mod number {
    pub const ID: u8 = 0x02;
    pub const VERSION: u8 = 0x03;
    pub const TASK_PRIORITY: u8 = 0x08;
    pub const ARBITRATION_PRIORITY: u8 = 0x09;
    pub const PROCESSOR_PRIORITY: u8 = 0x0a;
    pub const EOI: u8 = 0x0b;
    pub const REMOTE_READ: u8 = 0x0c;
    pub const LOGICAL_DESTINATION: u8 = 0x0d;
    pub const DESTINATION_FORMAT: u8 = 0x0e;
    pub const SPURIOUS: u8 = 0x0f;
    pub const IN_SERVICE: u8 = 0x10;
    pub const TRIGGER_MODE: u8 = 0x18;
    pub const REQUEST: u8 = 0x20;
    pub const ERROR_STATUS: u8 = 0x28;
    pub const COMMAND_LOW: u8 = 0x30;
    pub const COMMAND_HIGH: u8 = 0x31;
    pub const LVT_TIMER: u8 = 0x32;
    pub const LVT_ERROR: u8 = 0x37;
    pub const INITIAL_COUNT: u8 = 0x38;
    pub const CURRENT_COUNT: u8 = 0x39;
    pub const DIVIDE: u8 = 0x3e;
    pub const SELF_IPI: u8 = 0x3f;
}

/// 6 local vector table entries, an integrated APIC without directed EOI.
const VERSION: u32 = 0x0005_0014;

impl LocalApics {
    /// Reads a register that both interfaces show alike; `None` when there is no such register.
    pub(super) fn read_register(&self, apic: &Apic, register: u8) -> Option<u32> {
        Some(match register {
            number::ID if apic.mode() == Mode::X2Apic => u32::from(apic.id),
            number::ID => u32::from(apic.id) << 24,
            number::VERSION => VERSION,
            number::TASK_PRIORITY => u32::from(apic.task_priority.load(Ordering::SeqCst)),
            number::PROCESSOR_PRIORITY => u32::from(apic.processor_priority()),
            number::LOGICAL_DESTINATION if apic.mode() == Mode::X2Apic => {
                apic.extended_logical_destination()
            }
            number::LOGICAL_DESTINATION => apic.logical_destination.load(Ordering::SeqCst),
            number::SPURIOUS => apic.spurious.load(Ordering::SeqCst),
            number::IN_SERVICE..=0x17 => apic.in_service.word(register),
            number::TRIGGER_MODE..=0x1f => apic.level_triggered.word(register),
            number::REQUEST..=0x27 => apic.requested.word(register),
            number::ERROR_STATUS => apic.error_status.load(Ordering::SeqCst),
            number::COMMAND_LOW => apic.interrupt_command.load(Ordering::SeqCst) as u32,
            number::LVT_TIMER..=number::LVT_ERROR => apic.lvt(Lvt::of(register)?),
            number::INITIAL_COUNT => apic.initial_count(),
            number::CURRENT_COUNT => apic.current_count(self.timers.now()),
            number::DIVIDE => apic.divide_configuration(),
            _ => return None,
        })
    }

    /// Writes a register that both interfaces write alike, its reserved bits already checked;
    /// `None` when there is no such register or it is read-only.
    pub(super) fn write_register(&self, vcpu: usize, register: u8, value: u32) -> Option<()> {
        let apic = self.apic(vcpu)?;
        match register {
            number::TASK_PRIORITY => apic.set_task_priority(value as u8),
            number::EOI => self.end_of_interrupt(vcpu),
            number::SPURIOUS => apic.set_spurious(value),
            number::ERROR_STATUS => {
                let errors = apic.errors.swap(0, Ordering::SeqCst);
                apic.error_status.store(errors, Ordering::SeqCst);
            }
            number::LVT_TIMER..=number::LVT_ERROR => {
                let entry = Lvt::of(register)?;
                apic.write_lvt(entry, value);
            }
            number::INITIAL_COUNT => apic.set_initial_count(value, self.timers.now()),
            number::DIVIDE => apic.set_divide_configuration(value, self.timers.now()),
            _ => return None,
        }
        Some(())
    }
}

impl Apic {
    fn set_spurious(&self, value: u32) {
        self.spurious.store(value & 0x3ff, Ordering::SeqCst);
        if !self.software_enabled() {
            self.mask_all(self.deadline.now());
        }
    }

    fn write_lvt(&self, entry: Lvt, value: u32) {
        let mut value = value & entry.writable();
        if !self.software_enabled() {
            value |= MASKED;
        }
        let old = self.lvt(entry);
        if value & Lvt::LEVEL != 0 {
            value |= old & Lvt::REMOTE_REQUEST;
        }
        if entry == Lvt::Timer {
            return self.write_timer_entry(value, self.deadline.now());
        }
        self.set_lvt(entry, value);
        match entry {
            // An 8259 may have waited behind the mask; a level-triggered pin too.
            Lvt::Lint0 if self.pins[0].load(Ordering::SeqCst) => {
                let asked = value & Lvt::REMOTE_REQUEST != 0;
                if value & Lvt::LEVEL != 0 && value & MASKED == 0 && !asked {
                    self.pin_rose(entry);
                }
                self.announce();
            }
            _ => {}
        }
    }
}
