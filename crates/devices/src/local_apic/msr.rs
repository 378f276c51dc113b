//! The MSRs of the local APIC: IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC registers.

use std::sync::atomic::Ordering;

use super::base::Mode;
use super::delivery::Destination;
use super::register::{Lvt, number};
use super::{Apic, LocalApics};

pub(super) const IA32_APIC_BASE: u32 = 0x1b;
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;
const X2APIC: u32 = 0x800;

/// The bits of the 64-bit command register that are not reserved.
const COMMAND: u64 = 0xffff_ffff_000c_cfff;

impl LocalApics {
    pub(super) fn read_msr(&self, vcpu: usize, index: u32) -> Option<u64> {
        let apic = self.apic(vcpu)?;
        match index {
            IA32_APIC_BASE => Some(apic.base.load(Ordering::SeqCst)),
            IA32_TSC_DEADLINE => Some(apic.tsc_deadline(self.timers.now())),
            _ => {
                let register = x2apic_register(apic, index)?;
                match register {
                    number::COMMAND_LOW => Some(apic.interrupt_command.load(Ordering::SeqCst)),
                    // EOI and SELF IPI are write-only; the others that are missing here do not
                    // exist at all.
                    _ => self.read_register(apic, register).map(u64::from),
                }
            }
        }
    }

    pub(super) fn write_msr(&self, vcpu: usize, index: u32, value: u64, tsc: u64) -> Option<()> {
        let apic = self.apic(vcpu)?;
        match index {
            IA32_APIC_BASE => {
                apic.set_base(value)?;
                apic.announce();
                Some(())
            }
            IA32_TSC_DEADLINE => {
                apic.set_tsc_deadline(value, tsc, self.timers.now(), self.tsc_frequency);
                Some(())
            }
            _ => {
                let register = x2apic_register(apic, index)?;
                self.write_x2apic(vcpu, register, value)
            }
        }
    }

    fn write_x2apic(&self, vcpu: usize, register: u8, value: u64) -> Option<()> {
        let apic = self.apic(vcpu)?;
        if register == number::COMMAND_LOW {
            if value & !COMMAND != 0 {
                return None;
            }
            apic.interrupt_command.store(value, Ordering::SeqCst);
            let command = value as u32;
            let destination = Destination::wide((value >> 32) as u32, command & 1 << 11 != 0);
            self.command(vcpu, command, destination);
            return Some(());
        }
        let value = u32::try_from(value).ok()?;
        if value & !writable(register)? != 0 {
            return None;
        }
        if register == number::SELF_IPI {
            // The shorthand "self" with an edge-triggered fixed interrupt.
            self.command(vcpu, 1 << 18 | value, Destination::Broadcast);
            return Some(());
        }
        self.write_register(vcpu, register, value)
    }
}

/// The number of the x2APIC register behind an MSR, outside x2APIC mode none.
fn x2apic_register(apic: &Apic, index: u32) -> Option<u8> {
    if apic.mode() != Mode::X2Apic {
        return None;
    }
    // The architecture reserves 0x800 to 0x8ff; above 0x83f nothing is defined.
    let register = u8::try_from(index.checked_sub(X2APIC)?).ok()?;
    (register <= number::SELF_IPI).then_some(register)
}

/// The bits that WRMSR may set in an x2APIC register; `None` for one that cannot be written.
fn writable(register: u8) -> Option<u32> {
    Some(match register {
        number::TASK_PRIORITY | number::SELF_IPI => 0xff,
        number::EOI | number::ERROR_STATUS => 0,
        number::SPURIOUS => 0x1ff,
        0x32 => Lvt::Timer.writable() | Lvt::READ_ONLY,
        0x33 | 0x34 => Lvt::Thermal.writable() | Lvt::READ_ONLY,
        0x35 | 0x36 => Lvt::Lint0.writable() | Lvt::READ_ONLY,
        0x37 => Lvt::Error.writable() | Lvt::READ_ONLY,
        number::INITIAL_COUNT => u32::MAX,
        number::DIVIDE => 0xb,
        _ => return None,
    })
}
