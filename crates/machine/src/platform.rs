//! The machine as its sub-VMMs see it: ports and device registers.

use std::sync::Arc;

use trapline_devices::chipset::Chipset;
use trapline_devices::mmio::Initiator;
use trapline_monitor::platform::Platform;

/// The buses of a machine.
pub struct Buses {
    pub chipset: Arc<Chipset>,
}

impl Platform for Buses {
    fn port_read(&self, _vcpu: u8, port: u16, size: u8) -> u32 {
        self.chipset.ports().read(port, size)
    }
    fn port_write(&self, _vcpu: u8, port: u16, size: u8, value: u32) {
        self.chipset.ports().write(port, size, value);
    }
    fn device_read(&self, vcpu: u8, cookie: u64, offset: u64, data: &mut [u8]) {
        self.chipset
            .mmio()
            .read(cookie, Initiator::Vcpu(vcpu), offset, data);
    }
    fn device_write(&self, vcpu: u8, cookie: u64, offset: u64, data: &[u8]) {
        self.chipset
            .mmio()
            .write(cookie, Initiator::Vcpu(vcpu), offset, data);
    }
}
