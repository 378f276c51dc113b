//! The xAPIC page at 0xfee00000. One range serves all VCPUs: who accesses it decides whose
//! registers answer.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::base::Mode;
use super::delivery::Destination;
use super::register::{Error, number};
use super::{Apic, LocalApics};
use crate::mmio::{Initiator, MmioDevice};

/// The guest-physical address of the page.
pub const PAGE: u64 = 0xfee0_0000;

/// The command register's bits in xAPIC mode without the read-only delivery status.
const COMMAND: u32 = 0x000c_cfff;

/// The page as a device.
pub struct LocalApicPage(Arc<LocalApics>);

impl LocalApicPage {
    #[must_use]
    pub fn new(apics: Arc<LocalApics>) -> Self {
        Self(apics)
    }

    /// The VCPU whose registers the access reaches: none from elsewhere, nor outside xAPIC mode.
    fn accessed(&self, initiator: Initiator) -> Option<(usize, &Apic)> {
        let Initiator::Vcpu(vcpu) = initiator else {
            return None;
        };
        let apic = self.0.apic(usize::from(vcpu))?;
        (apic.mode() == Mode::XApic).then_some((usize::from(vcpu), apic))
    }
}

impl MmioDevice for LocalApicPage {
    fn read(&self, initiator: Initiator, offset: u64, data: &mut [u8]) {
        let Some((_, apic)) = self.accessed(initiator) else {
            data.fill(0xff);
            return;
        };
        data.fill(0);
        // Registers are the low 4 of every 16 bytes; parts of one are readable.
        let register = ((offset >> 4) & 0xff) as u8;
        let value = self.0.read_page(apic, register).to_le_bytes();
        let skip = usize::try_from(offset & 0xf).unwrap_or(0);
        for (byte, value) in data.iter_mut().zip(value.iter().skip(skip)) {
            *byte = *value;
        }
    }

    fn write(&self, initiator: Initiator, offset: u64, data: &[u8]) {
        let Some((vcpu, _)) = self.accessed(initiator) else {
            return;
        };
        // Anything but an aligned access of 32 bits is undefined; wider ones count for their
        // first 4 bytes, narrower ones not at all.
        let Some(&value) = data.first_chunk::<4>() else {
            return;
        };
        if offset & 0xf == 0 {
            let register = ((offset >> 4) & 0xff) as u8;
            self.0.write_page(vcpu, register, u32::from_le_bytes(value));
        }
    }
}

impl LocalApics {
    fn read_page(&self, apic: &Apic, register: u8) -> u32 {
        match register {
            number::ARBITRATION_PRIORITY | number::REMOTE_READ | number::EOI => 0,
            number::DESTINATION_FORMAT => apic.destination_format.load(Ordering::SeqCst),
            number::COMMAND_HIGH => (apic.interrupt_command.load(Ordering::SeqCst) >> 32) as u32,
            _ => self.read_register(apic, register).unwrap_or_else(|| {
                apic.error(Error::IllegalRegister);
                0
            }),
        }
    }

    fn write_page(&self, vcpu: usize, register: u8, value: u32) {
        let Some(apic) = self.apic(vcpu) else {
            return;
        };
        match register {
            number::LOGICAL_DESTINATION => apic
                .logical_destination
                .store(value & 0xff00_0000, Ordering::SeqCst),
            number::DESTINATION_FORMAT => apic
                .destination_format
                .store(value | 0x0fff_ffff, Ordering::SeqCst),
            number::COMMAND_HIGH => {
                let low = apic.interrupt_command.load(Ordering::SeqCst) & 0xffff_ffff;
                let high = u64::from(value & 0xff00_0000) << 32;
                apic.interrupt_command.store(high | low, Ordering::SeqCst);
            }
            number::COMMAND_LOW => {
                let high = apic.interrupt_command.load(Ordering::SeqCst) >> 32;
                let command = value & COMMAND;
                apic.interrupt_command
                    .store(high << 32 | u64::from(command), Ordering::SeqCst);
                let destination = Destination::narrow((high >> 24) as u8, command & 1 << 11 != 0);
                self.command(vcpu, command, destination);
            }
            // Read-only, and there is nothing wrong with writing them.
            number::ID
            | number::VERSION
            | number::ARBITRATION_PRIORITY
            | number::PROCESSOR_PRIORITY
            | number::REMOTE_READ
            | number::IN_SERVICE..=0x27
            | number::CURRENT_COUNT => {}
            _ => {
                if self.write_register(vcpu, register, value).is_none() {
                    apic.error(Error::IllegalRegister);
                }
            }
        }
    }
}
