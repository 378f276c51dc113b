//! Memory-mapped device registers. There is no address look-up here: a register range is a trace
//! of kind `device`, whose cookie names the device, so the trace subsystem finds it.

use std::ops::Range;
use std::sync::Arc;

use crate::BusError;

/// Who performs an access to device registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initiator {
    /// The VCPU with this index.
    Vcpu(u8),
    /// Another device, or a debugger.
    Other,
}

/// A device behind memory-mapped registers. Accesses come from any thread at once: a device locks
/// itself.
pub trait MmioDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the device's range. Fills all of
    /// `data`, whatever the guest asks for.
    fn read(&self, initiator: Initiator, offset: u64, data: &mut [u8]);
    fn write(&self, initiator: Initiator, offset: u64, data: &[u8]);
}

/// One device's register range in guest-physical memory.
pub struct MmioRegion {
    pub name: &'static str,
    /// Guest-physical addresses, half open.
    pub range: Range<u64>,
    device: Arc<dyn MmioDevice>,
}

/// Dispatches by cookie. Filled while the machine is built, only read afterwards.
#[derive(Default)]
pub struct MmioBus {
    regions: Vec<MmioRegion>,
}

impl MmioBus {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a device and gives the cookie of its range.
    ///
    /// # Errors
    /// [`BusError::RangeClaimed`] when the range is empty or overlaps another device's.
    pub fn register(
        &mut self,
        name: &'static str,
        range: Range<u64>,
        device: Arc<dyn MmioDevice>,
    ) -> Result<u64, BusError> {
        let taken = self
            .regions
            .iter()
            .any(|other| range.start < other.range.end && other.range.start < range.end);
        if taken || range.is_empty() {
            return Err(BusError::RangeClaimed {
                name,
                start: range.start,
                end: range.end,
            });
        }
        self.regions.push(MmioRegion {
            name,
            range,
            device,
        });
        Ok(self.regions.len() as u64 - 1)
    }

    /// Every range with its cookie, for establishing the `device` traces.
    pub fn regions(&self) -> impl Iterator<Item = (u64, &MmioRegion)> {
        (0u64..).zip(&self.regions)
    }

    /// Reads at `offset` in the range of `cookie`; an unknown cookie reads as ones.
    pub fn read(&self, cookie: u64, initiator: Initiator, offset: u64, data: &mut [u8]) {
        match self.device(cookie) {
            Some(device) => device.read(initiator, offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes at `offset` in the range of `cookie`; nothing for an unknown cookie.
    pub fn write(&self, cookie: u64, initiator: Initiator, offset: u64, data: &[u8]) {
        if let Some(device) = self.device(cookie) {
            device.write(initiator, offset, data);
        }
    }

    fn device(&self, cookie: u64) -> Option<&dyn MmioDevice> {
        let region = self.regions.get(usize::try_from(cookie).ok()?)?;
        Some(region.device.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Constant(u8);

    impl MmioDevice for Constant {
        fn read(&self, _: Initiator, offset: u64, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(offset as u8));
        }
        fn write(&self, _: Initiator, _: u64, _: &[u8]) {}
    }

    #[test]
    fn cookies_name_devices() {
        let mut bus = MmioBus::new();
        let a = bus.register("a", 0x1000..0x1010, Arc::new(Constant(1)));
        let b = bus.register("b", 0x1010..0x1020, Arc::new(Constant(7)));
        let (a, b) = (a.unwrap(), b.unwrap());
        let mut data = [0; 2];
        bus.read(b, Initiator::Vcpu(0), 3, &mut data);
        assert_eq!(data, [10, 10]);
        bus.read(a, Initiator::Other, 0, &mut data);
        assert_eq!(data, [1, 1]);
        bus.read(9, Initiator::Other, 0, &mut data);
        assert_eq!(data, [0xff, 0xff]);
        bus.write(u64::MAX, Initiator::Other, 0, &data);
        let found: Vec<_> = bus
            .regions()
            .map(|(cookie, region)| (cookie, region.range.clone()))
            .collect();
        assert_eq!(found, [(a, 0x1000..0x1010), (b, 0x1010..0x1020)]);
    }

    #[test]
    fn ranges_do_not_overlap() {
        let mut bus = MmioBus::new();
        bus.register("a", 0x1000..0x1010, Arc::new(Constant(1)))
            .unwrap();
        assert!(
            bus.register("b", 0x100f..0x1020, Arc::new(Constant(1)))
                .is_err()
        );
        assert!(
            bus.register("c", 0x10..0x10, Arc::new(Constant(1)))
                .is_err()
        );
    }
}
