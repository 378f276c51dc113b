//! The ways to reset the machine: port 0xcf9, the keyboard controller and port 0x92.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use crate::events::{SystemEvent, SystemEvents};
use crate::lock;
use crate::port::PortDevice;

/// The port of the reset control register, which the FADT names.
pub const RESET_PORT: u16 = 0xcf9;
/// What a full reset writes there.
pub const RESET_VALUE: u8 = 0x06;

/// The reset control register. It shares its address with the PCI configuration address, which
/// takes 32-bit accesses alone.
pub struct ResetControl {
    value: AtomicU8,
    events: Arc<dyn SystemEvents>,
}

impl ResetControl {
    pub const PORTS: RangeInclusive<u16> = 0xcf8..=0xcfb;

    #[must_use]
    pub fn new(events: Arc<dyn SystemEvents>) -> Self {
        Self {
            value: AtomicU8::new(0),
            events,
        }
    }

    /// The machine's reset.
    pub fn reset(&self) {
        self.value.store(0, Ordering::Relaxed);
    }
}

impl PortDevice for ResetControl {
    fn width(&self) -> u8 {
        4
    }

    fn read(&self, port: u16, size: u8) -> u32 {
        if port == RESET_PORT && size == 1 {
            u32::from(self.value.load(Ordering::Relaxed))
        } else {
            u32::MAX
        }
    }

    /// A rising reset bit resets.
    fn write(&self, port: u16, size: u8, value: u32) {
        if port == RESET_PORT && size == 1 {
            let old = self.value.swap(value as u8 & 0x0e, Ordering::Relaxed);
            if old & 4 == 0 && value & 4 != 0 {
                self.events.raise(SystemEvent::Reset);
            }
        }
    }
}

/// A keyboard controller without a keyboard: it answers its commands, so that a probe is quick,
/// and pulses the reset line.
pub struct KeyboardController {
    state: Mutex<Keyboard>,
    events: Arc<dyn SystemEvents>,
}

#[derive(Default)]
struct Keyboard {
    output: Option<u8>,
    configuration: u8,
    /// The command whose parameter comes next on the data port.
    command: Option<u8>,
}

impl KeyboardController {
    pub const PORTS: [RangeInclusive<u16>; 3] = [0x60..=0x60, 0x64..=0x64, 0x92..=0x92];

    #[must_use]
    pub fn new(events: Arc<dyn SystemEvents>) -> Self {
        Self {
            state: Mutex::default(),
            events,
        }
    }

    /// The machine's reset.
    pub fn reset(&self) {
        *lock(&self.state) = Keyboard::default();
    }

    /// Does a write and tells whether it pulses the reset line.
    fn perform(&self, port: u16, value: u8) -> bool {
        let mut state = lock(&self.state);
        match port {
            0x92 => return value & 1 != 0,
            0x60 => match state.command.take() {
                Some(0x60) => state.configuration = value,
                // Bit 0 of the output port is the reset line, active low.
                Some(0xd1) => return value & 1 == 0,
                // Nothing answers behind the controller.
                _ => {}
            },
            _ => match value {
                0x20 => state.output = Some(state.configuration),
                0x60 | 0xd1 | 0xd4 => state.command = Some(value),
                0xaa => state.output = Some(0x55),
                // No keyboard and no mouse: their tests fail with a clock line stuck low.
                0xa9 | 0xab => state.output = Some(1),
                0xd0 => state.output = Some(0x03),
                // Pulses of the output lines whose bits are clear.
                0xf0..=0xff => return value & 1 == 0,
                _ => {}
            },
        }
        false
    }
}

impl PortDevice for KeyboardController {
    fn read(&self, port: u16, _: u8) -> u32 {
        let mut state = lock(&self.state);
        u32::from(match port {
            0x60 => state.output.take().unwrap_or(0),
            // System flag, not locked, and whether there is output.
            0x64 => 0x14 | u8::from(state.output.is_some()),
            // A20 is open.
            _ => 2,
        })
    }

    fn write(&self, port: u16, _: u8, value: u32) {
        if self.perform(port, value as u8) {
            self.events.raise(SystemEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::debug_exit::tests::Log;
    use crate::port::PortBus;

    #[test]
    fn only_a_byte_access_with_a_rising_bit_resets() {
        let log = Arc::new(Log::default());
        let mut bus = PortBus::new();
        let control = Arc::new(ResetControl::new(log.clone()));
        bus.register(&[ResetControl::PORTS], control).unwrap();
        bus.write(0xcf8, 4, 0x8000_0600);
        bus.write(0xcf8, 2, 0x0600);
        bus.write(0xcf9, 1, 0x02);
        assert!(log.take().is_empty());
        assert_eq!(bus.read(0xcf9, 1), 2);
        assert_eq!(bus.read(0xcf8, 4), u32::MAX, "there is no PCI");
        bus.write(0xcf9, 1, 0x06);
        bus.write(0xcf9, 1, 0x06);
        assert_eq!(log.take(), [SystemEvent::Reset]);
    }

    #[test]
    fn the_keyboard_controller_answers_and_resets() {
        let log = Arc::new(Log::default());
        let keyboard = KeyboardController::new(log.clone());
        assert_eq!(keyboard.read(0x64, 1) & 3, 0);
        keyboard.write(0x64, 1, 0xaa);
        assert_eq!(keyboard.read(0x64, 1) & 1, 1);
        assert_eq!(keyboard.read(0x60, 1), 0x55);
        assert_eq!(keyboard.read(0x64, 1) & 1, 0);
        keyboard.write(0x64, 1, 0x60);
        keyboard.write(0x60, 1, 0x47);
        keyboard.write(0x64, 1, 0x20);
        assert_eq!(keyboard.read(0x60, 1), 0x47);
        keyboard.write(0x64, 1, 0xff);
        keyboard.write(0x92, 1, 2);
        assert!(log.take().is_empty());
        keyboard.write(0x64, 1, 0xfe);
        keyboard.write(0x64, 1, 0xd1);
        keyboard.write(0x60, 1, 0xfe);
        keyboard.write(0x92, 1, 1);
        assert_eq!(log.take(), [SystemEvent::Reset; 3]);
    }
}
