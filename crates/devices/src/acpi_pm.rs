//! ACPI's fixed hardware: the PM1a event and control registers and the power management timer
//! (ACPI specification, chapter 4).

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};

use crate::clock::{TimeSource, scale};
use crate::events::{SystemEvent, SystemEvents};
use crate::lines::{self, InterruptLines};
use crate::lock;
use crate::port::PortDevice;

/// PM1a status and enable, 4 bytes.
pub const EVENT_BLOCK: u16 = 0x600;
/// PM1a control, 2 bytes.
pub const CONTROL_BLOCK: u16 = 0x604;
/// The timer, 4 bytes.
pub const TIMER_BLOCK: u16 = 0x608;
/// The timer's rate in Hz.
pub const TIMER_FREQUENCY: u64 = 3_579_545;
/// The sleep type that the DSDT's \_S5 names.
pub const SOFT_OFF: u8 = 5;

/// The power button's bit in status and enable.
const POWER_BUTTON: u16 = 1 << 8;
/// The clock's bit. Its alarm comes by IRQ 8 only, as the FADT says, but systems switch the event
/// on before they look there, and complain if it stays off.
const CLOCK_ALARM: u16 = 1 << 10;
/// The events that can be enabled: timer, global lock, power button, clock.
const ENABLES: u16 = 1 | 1 << 5 | POWER_BUTTON | CLOCK_ALARM;
/// The system control interrupt is on: there is no other mode.
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;

#[derive(Default)]
struct State {
    status: u16,
    enable: u16,
    control: u16,
}

pub struct PowerManagement {
    state: Mutex<State>,
    time: Arc<dyn TimeSource>,
    lines: InterruptLines,
    events: Arc<dyn SystemEvents>,
}

impl PowerManagement {
    pub const PORTS: RangeInclusive<u16> = EVENT_BLOCK..=TIMER_BLOCK + 3;

    #[must_use]
    pub fn new(
        time: Arc<dyn TimeSource>,
        lines: InterruptLines,
        events: Arc<dyn SystemEvents>,
    ) -> Self {
        Self {
            state: Mutex::default(),
            time,
            lines,
            events,
        }
    }

    /// Presses the power button and tells whether the guest listens to it.
    pub fn press_power_button(&self) -> bool {
        let mut state = lock(&self.state);
        state.status |= POWER_BUTTON;
        self.settle(&state);
        state.enable & POWER_BUTTON != 0
    }

    /// The machine's reset.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        *state = State::default();
        self.settle(&state);
    }

    fn settle(&self, state: &State) {
        let active = state.status & state.enable != 0;
        self.lines.set(lines::SYSTEM_CONTROL, active);
    }

    /// The byte at a port, but for the timer.
    fn byte(state: &State, port: u16) -> u8 {
        let offset = port.wrapping_sub(EVENT_BLOCK);
        let word = match offset / 2 {
            0 => state.status,
            1 => state.enable,
            2 => state.control | SCI_ENABLED,
            _ => 0,
        };
        word.to_le_bytes()[usize::from(offset % 2)]
    }
}

impl PortDevice for PowerManagement {
    fn width(&self) -> u8 {
        4
    }

    fn read(&self, port: u16, size: u8) -> u32 {
        if let Some(skip) = port.checked_sub(TIMER_BLOCK) {
            let count = scale(self.time.now(), TIMER_FREQUENCY, 1_000_000_000) as u32;
            return count >> (8 * u32::from(skip & 3));
        }
        let state = lock(&self.state);
        (0..size.min(4)).rev().fold(0, |value, byte| {
            value << 8 | u32::from(Self::byte(&state, port.wrapping_add(u16::from(byte))))
        })
    }

    fn write(&self, port: u16, size: u8, value: u32) {
        let mut power_off = false;
        let mut state = lock(&self.state);
        for (at, value) in (0..u16::from(size.min(4))).zip(value.to_le_bytes()) {
            let offset = port.wrapping_add(at).wrapping_sub(EVENT_BLOCK);
            let high = offset % 2 != 0;
            let keep = if high { 0x00ff } else { 0xff00 };
            let written = u16::from(value) << if high { 8 } else { 0 };
            match offset / 2 {
                // Ones clear.
                0 => state.status &= !written,
                1 => state.enable = (state.enable & keep | written) & ENABLES,
                2 => {
                    state.control = (state.control & keep | written) & !SLEEP_ENABLE;
                    let kind = (state.control >> 10 & 7) as u8;
                    power_off |= high && written & SLEEP_ENABLE != 0 && kind == SOFT_OFF;
                }
                _ => {}
            }
        }
        self.settle(&state);
        drop(state);
        if power_off {
            self.events.raise(SystemEvent::PowerOff);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::Board;
    use crate::debug_exit::tests::Log;

    fn power(board: &Board) -> (PowerManagement, Arc<Log>) {
        let log = Arc::new(Log::default());
        let time = board.bench.clock.clone();
        (
            PowerManagement::new(time, board.lines.clone(), log.clone()),
            log,
        )
    }

    #[test]
    fn the_timer_counts_at_its_rate() {
        let board = Board::new();
        let (power, _) = power(&board);
        board.bench.clock.set(1_000_000_000);
        assert_eq!(power.read(0x608, 4), 3_579_545);
        assert_eq!(power.read(0x609, 1) & 0xff, 3_579_545 >> 8 & 0xff);
        // It wraps at 32 bits.
        board.bench.clock.set(1_200_000_000_000);
        let expected = (1_200u64 * TIMER_FREQUENCY) as u32;
        assert_eq!(power.read(0x608, 4), expected);
    }

    #[test]
    fn soft_off_powers_off_and_other_sleeps_do_not() {
        let board = Board::new();
        let (power, log) = power(&board);
        power.write(0x604, 2, 1 << 10 | 1 << 13);
        power.write(0x604, 2, 5 << 10);
        assert!(log.take().is_empty());
        power.write(0x604, 2, 5 << 10 | 1 << 13);
        assert_eq!(log.take(), [SystemEvent::PowerOff]);
        assert_eq!(power.read(0x604, 2), 5 << 10 | 1, "SLP_EN reads as zero");
        power.write(0x605, 1, 5 << 2 | 1 << 5);
        assert_eq!(log.take(), [SystemEvent::PowerOff]);
    }

    #[test]
    fn the_power_button_is_a_level_until_it_is_cleared() {
        let board = Board::new();
        let (power, _) = power(&board);
        assert!(!power.press_power_button());
        assert!(board.interrupts().is_empty());
        power.write(0x602, 2, 0x0100);
        assert_eq!(power.read(0x600, 4), 0x0100_0100);
        assert_eq!(board.interrupts(), [9]);
        assert_eq!(board.interrupts(), [9]);
        power.write(0x600, 2, 0x0100);
        assert!(board.interrupts().is_empty());
        assert!(power.press_power_button());
        assert_eq!(board.interrupts(), [9]);
        power.reset();
        assert!(board.interrupts().is_empty());
    }

    #[test]
    fn events_that_exist_can_be_enabled() {
        let (power, _) = power(&Board::new());
        power.write(0x602, 2, 0xffff);
        assert_eq!(power.read(0x602, 2), 0x0521, "timer, lock, button, clock");
        assert_eq!(power.read(0x600, 2), 0);
    }
}
