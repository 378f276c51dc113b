//! The I/O port space: 65,536 byte ports, each claimed by at most one device.

use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::BusError;

/// A device behind I/O ports. Accesses come from any VCPU's thread at once: a device locks itself.
pub trait PortDevice: Send + Sync {
    /// The widest access in bytes that the device decodes as one; the bus splits wider ones.
    fn width(&self) -> u8 {
        1
    }
    /// Reads `size` (1, 2 or 4, at most [`Self::width`]) bytes at `port`, all of them claimed by
    /// this device. Bits above `size` are ignored.
    fn read(&self, port: u16, size: u8) -> u32;
    /// Writes `size` bytes; bits of `value` above `size` are zero.
    fn write(&self, port: u16, size: u8, value: u32);
}

/// Dispatches port accesses. It is filled while the machine is built and only read afterwards.
pub struct PortBus {
    /// Index into `devices` plus one; zero for an unclaimed port.
    claims: Box<[u8]>,
    devices: Vec<Arc<dyn PortDevice>>,
}

impl Default for PortBus {
    fn default() -> Self {
        Self::new()
    }
}

impl PortBus {
    #[must_use]
    pub fn new() -> Self {
        Self {
            claims: vec![0; 0x1_0000].into_boxed_slice(),
            devices: Vec::new(),
        }
    }

    /// Gives all `ports` to `device`.
    ///
    /// # Errors
    /// [`BusError::PortClaimed`] when one of them already belongs to a device, and
    /// [`BusError::TooManyDevices`] beyond 255 devices.
    pub fn register(
        &mut self,
        ports: &[RangeInclusive<u16>],
        device: Arc<dyn PortDevice>,
    ) -> Result<(), BusError> {
        let claim = u8::try_from(self.devices.len() + 1).map_err(|_| BusError::TooManyDevices)?;
        let all = || ports.iter().cloned().flatten();
        if let Some(port) = all().find(|&port| self.claims[usize::from(port)] != 0) {
            return Err(BusError::PortClaimed { port });
        }
        for port in all() {
            self.claims[usize::from(port)] = claim;
        }
        self.devices.push(device);
        Ok(())
    }

    /// IN of `size` bytes (1, 2 or 4). Unclaimed bytes read as ones.
    #[must_use]
    pub fn read(&self, port: u16, size: u8) -> u32 {
        let mut value = 0u32;
        self.split(port, size, |device, port, at, part| {
            let read = device.map_or(u32::MAX, |device| device.read(port, part)) & mask(part);
            value |= read << (8 * u32::from(at));
        });
        value
    }

    /// OUT of the low `size` bytes (1, 2 or 4) of `value`. Unclaimed bytes vanish.
    pub fn write(&self, port: u16, size: u8, value: u32) {
        self.split(port, size, |device, port, at, part| {
            if let Some(device) = device {
                device.write(port, part, (value >> (8 * u32::from(at))) & mask(part));
            }
        });
    }

    /// Cuts an access into pieces that each lie in one device and within its width, lowest first.
    /// The port number wraps at 64 Ki as on the bus.
    fn split(
        &self,
        port: u16,
        size: u8,
        mut access: impl FnMut(Option<&dyn PortDevice>, u16, u8, u8),
    ) {
        let size = size.min(4);
        let mut at = 0;
        while at < size {
            let port = port.wrapping_add(u16::from(at));
            let claim = self.claims[usize::from(port)];
            let device = match claim {
                0 => None,
                claim => self.devices.get(usize::from(claim) - 1).map(Arc::as_ref),
            };
            let mut part = device.map_or(1, |device| device.width()).min(size - at);
            // Only the powers of two exist as accesses.
            part = 1 << part.max(1).ilog2();
            while part > 1
                && (1..part).any(|byte| {
                    self.claims[usize::from(port.wrapping_add(u16::from(byte)))] != claim
                })
            {
                part /= 2;
            }
            access(device, port, at, part);
            at += part;
        }
    }
}

fn mask(size: u8) -> u32 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        _ => u32::MAX,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Remembers writes; reads give the low byte of each port number.
    struct Probe {
        width: u8,
        writes: Mutex<Vec<(u16, u8, u32)>>,
    }

    impl Probe {
        fn new(width: u8) -> Arc<Self> {
            Arc::new(Self {
                width,
                writes: Mutex::default(),
            })
        }
    }

    impl PortDevice for Probe {
        fn width(&self) -> u8 {
            self.width
        }
        fn read(&self, port: u16, size: u8) -> u32 {
            (0..u16::from(size)).fold(0, |value, byte| {
                value | u32::from((port + byte) as u8) << (8 * byte)
            })
        }
        fn write(&self, port: u16, size: u8, value: u32) {
            self.writes.lock().unwrap().push((port, size, value));
        }
    }

    #[test]
    fn unclaimed_ports_read_as_ones_and_swallow_writes() {
        let bus = PortBus::new();
        assert_eq!(bus.read(0x1234, 1), 0xff);
        assert_eq!(bus.read(0x1234, 2), 0xffff);
        assert_eq!(bus.read(0xffff, 4), 0xffff_ffff);
        bus.write(0xffff, 4, 5);
    }

    #[test]
    fn accesses_are_cut_at_device_borders_and_at_the_width() {
        let mut bus = PortBus::new();
        let (bytes, words) = (Probe::new(1), Probe::new(4));
        bus.register(&[0x10..=0x11], bytes.clone()).unwrap();
        bus.register(&[0x12..=0x15], words.clone()).unwrap();
        assert_eq!(bus.read(0x10, 4), 0x1312_1110);
        assert_eq!(bus.read(0x14, 4), 0xffff_1514);
        bus.write(0x10, 4, 0x4433_2211);
        assert_eq!(
            *bytes.writes.lock().unwrap(),
            [(0x10, 1, 0x11), (0x11, 1, 0x22)]
        );
        assert_eq!(*words.writes.lock().unwrap(), [(0x12, 2, 0x4433)]);
        bus.write(0x12, 4, 0xdead_beef);
        assert_eq!(words.writes.lock().unwrap()[1], (0x12, 4, 0xdead_beef));
    }

    #[test]
    fn a_port_has_one_owner() {
        let mut bus = PortBus::new();
        bus.register(&[0x20..=0x21], Probe::new(1)).unwrap();
        assert!(matches!(
            bus.register(&[0x1f..=0x20], Probe::new(1)),
            Err(BusError::PortClaimed { port: 0x20 })
        ));
        assert_eq!(bus.read(0x1f, 1), 0xff, "a refused device claims nothing");
    }
}
