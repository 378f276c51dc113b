//! The MC146818 real-time clock and its memory at ports 0x70 and 0x71. The clock runs on the
//! host's wall clock in UTC; setting it moves the guest's by an offset. It has no interrupts.

mod calendar;

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};

use crate::clock::TimeSource;
use crate::lock;
use crate::port::PortDevice;
use calendar::DateTime;

/// Where the FADT says that the century is.
pub const CENTURY: u8 = 0x32;

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;

/// Status B: updates are held while the time is set.
const SET: u8 = 1 << 7;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;

/// For so many microseconds before each second the registers are said to be changing.
const UPDATE: u32 = 244;

struct State {
    index: u8,
    memory: [u8; 128],
    /// The guest's time less the host's, in seconds.
    offset: i64,
    /// The time that is being set, while updates are held.
    held: Option<DateTime>,
}

pub struct Cmos {
    time: Arc<dyn TimeSource>,
    state: Mutex<State>,
}

impl Cmos {
    pub const PORTS: RangeInclusive<u16> = 0x70..=0x71;

    /// `below_4g` and `above_4g` are the bytes of memory on each side of that border, for the
    /// places where firmware leaves them.
    #[must_use]
    pub fn new(time: Arc<dyn TimeSource>, below_4g: u64, above_4g: u64) -> Self {
        let mut memory = [0; 128];
        // 32768 Hz, and the periodic rate that firmware sets.
        memory[usize::from(STATUS_A)] = 0x26;
        memory[usize::from(STATUS_B)] = HOURS_24;
        let sizes = [
            (0x15, 640),
            (0x17, kilobytes(below_4g, 1 << 20, 1 << 10)),
            (0x30, kilobytes(below_4g, 1 << 20, 1 << 10)),
            (0x34, kilobytes(below_4g, 16 << 20, 64 << 10)),
        ];
        for (place, size) in sizes {
            let [low, high] = size.to_le_bytes();
            memory[place] = low;
            memory[place + 1] = high;
        }
        // In units of 64 KiB, three bytes.
        let above = above_4g >> 16;
        for (place, byte) in (0x5b..=0x5d).zip(above.to_le_bytes()) {
            memory[place] = byte;
        }
        Self {
            time,
            state: Mutex::new(State {
                index: 0,
                memory,
                offset: 0,
                held: None,
            }),
        }
    }

    fn read_register(&self, state: &State) -> u8 {
        let register = state.index;
        match register {
            0x00 | 0x02 | 0x04 | 0x06..=0x09 | CENTURY => self.clock_register(state, register),
            STATUS_A => {
                let microseconds = self.time.wall_clock().subsec_micros();
                let updating = state.held.is_none() && microseconds >= 1_000_000 - UPDATE;
                state.memory[usize::from(STATUS_A)] & 0x7f | u8::from(updating) << 7
            }
            // No interrupt ever happened; memory and time are valid.
            STATUS_C => 0,
            STATUS_D => 0x80,
            _ => state.memory[usize::from(register)],
        }
    }

    fn now(&self, state: &State) -> DateTime {
        state.held.unwrap_or_else(|| {
            let host = i64::try_from(self.time.wall_clock().as_secs()).unwrap_or(0);
            DateTime::from_seconds(host.saturating_add(state.offset))
        })
    }

    fn clock_register(&self, state: &State, register: u8) -> u8 {
        let now = self.now(state);
        let mode = state.memory[usize::from(STATUS_B)];
        let value = match register {
            0x00 => now.second,
            0x02 => now.minute,
            0x04 if mode & HOURS_24 == 0 => {
                let afternoon = if now.hour >= 12 { 0x80 } else { 0 };
                return encode(mode, (now.hour + 11) % 12 + 1) | afternoon;
            }
            0x04 => now.hour,
            0x06 => now.weekday(),
            0x07 => now.day,
            0x08 => now.month,
            0x09 => now.year % 100,
            _ => now.year / 100,
        };
        encode(mode, value)
    }

    fn write_register(&self, state: &mut State, value: u8) {
        let register = state.index;
        match register {
            0x00 | 0x02 | 0x04 | 0x07..=0x09 | CENTURY => {
                let mode = state.memory[usize::from(STATUS_B)];
                let date = self.changed(state, register, mode, value);
                if state.held.is_some() {
                    state.held = Some(date);
                } else {
                    self.start_from(state, date);
                }
            }
            // The weekday follows from the date.
            0x06 | STATUS_C | STATUS_D => {}
            STATUS_A => state.memory[usize::from(STATUS_A)] = value & 0x7f,
            STATUS_B => {
                state.memory[usize::from(STATUS_B)] = value;
                if value & SET != 0 {
                    state.held = Some(self.now(state));
                } else if let Some(date) = state.held.take() {
                    self.start_from(state, date);
                }
            }
            _ => state.memory[usize::from(register)] = value,
        }
    }

    /// The current time with one register changed, kept within what a date can be.
    fn changed(&self, state: &State, register: u8, mode: u8, value: u8) -> DateTime {
        let mut date = self.now(state);
        match register {
            0x00 => date.second = decode(mode, value).min(59),
            0x02 => date.minute = decode(mode, value).min(59),
            0x04 if mode & HOURS_24 == 0 => {
                let afternoon = if value & 0x80 != 0 { 12 } else { 0 };
                date.hour = decode(mode, value & 0x7f) % 12 + afternoon;
            }
            0x04 => date.hour = decode(mode, value).min(23),
            0x07 => date.day = decode(mode, value).clamp(1, 31),
            0x08 => date.month = decode(mode, value).clamp(1, 12),
            0x09 => date.year = date.year / 100 * 100 + decode(mode, value).min(99),
            _ => date.year = decode(mode, value).min(99) * 100 + date.year % 100,
        }
        date
    }

    fn start_from(&self, state: &mut State, date: DateTime) {
        let host = i64::try_from(self.time.wall_clock().as_secs()).unwrap_or(0);
        state.offset = date.to_seconds().saturating_sub(host);
    }
}

/// The bytes from `start` to `size` in `unit`s, as far as 16 bits go.
fn kilobytes(size: u64, start: u64, unit: u64) -> u16 {
    u16::try_from(size.saturating_sub(start) / unit).unwrap_or(u16::MAX)
}

fn encode(mode: u8, value: u32) -> u8 {
    if mode & BINARY != 0 {
        value as u8
    } else {
        (((value / 10 % 10) << 4) | (value % 10)) as u8
    }
}

fn decode(mode: u8, value: u8) -> u32 {
    if mode & BINARY != 0 {
        u32::from(value)
    } else {
        u32::from(value >> 4) * 10 + u32::from(value & 0xf)
    }
}

impl PortDevice for Cmos {
    fn read(&self, port: u16, _: u8) -> u32 {
        let state = lock(&self.state);
        if port == *Self::PORTS.start() {
            // The index is write-only.
            return 0xff;
        }
        u32::from(self.read_register(&state))
    }

    fn write(&self, port: u16, _: u8, value: u32) {
        let mut state = lock(&self.state);
        if port == *Self::PORTS.start() {
            // Bit 7 masks NMIs on a PC; there are none to mask.
            state.index = value as u8 & 0x7f;
        } else {
            self.write_register(&mut state, value as u8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timer::tests::Bench;

    fn get(cmos: &Cmos, register: u8) -> u32 {
        cmos.write(0x70, 1, u32::from(register));
        cmos.read(0x71, 1)
    }

    fn set(cmos: &Cmos, register: u8, value: u32) {
        cmos.write(0x70, 1, u32::from(register));
        cmos.write(0x71, 1, value);
    }

    fn clock(cmos: &Cmos) -> [u32; 7] {
        [CENTURY, 9, 8, 7, 4, 2, 0].map(|register| get(cmos, register))
    }

    #[test]
    fn the_time_is_the_hosts_in_bcd() {
        let bench = Bench::new();
        let cmos = Cmos::new(bench.clock.clone(), 1 << 30, 0);
        assert_eq!(clock(&cmos), [0x20, 0x24, 2, 0x29, 0x23, 0x59, 0x58]);
        assert_eq!(get(&cmos, 6), 5);
        bench.clock.set(3_000_000_000);
        assert_eq!(clock(&cmos), [0x20, 0x24, 3, 1, 0, 0, 1]);
        set(&cmos, STATUS_B, 4);
        assert_eq!(get(&cmos, 4), 12, "midnight on a 12-hour clock");
        bench.clock.set(13 * 3_600_000_000_000);
        assert_eq!(get(&cmos, 4), 0x8c, "twelve at noon");
    }

    #[test]
    fn updates_are_announced() {
        let bench = Bench::new();
        let cmos = Cmos::new(bench.clock.clone(), 1 << 30, 0);
        assert_eq!(get(&cmos, STATUS_A), 0x26);
        bench.clock.set(999_800_000);
        assert_eq!(get(&cmos, STATUS_A), 0xa6);
        bench.clock.set(1_000_000_000);
        assert_eq!(get(&cmos, STATUS_A), 0x26);
        assert_eq!(get(&cmos, STATUS_D), 0x80);
    }

    #[test]
    fn a_clock_that_was_set_goes_on_from_there() {
        let bench = Bench::new();
        let cmos = Cmos::new(bench.clock.clone(), 1 << 30, 0);
        set(&cmos, STATUS_B, 0x82);
        for (register, value) in [
            (0, 0x30),
            (2, 0x15),
            (4, 0x07),
            (7, 0x31),
            (8, 0x12),
            (9, 0x99),
            (CENTURY, 0x19),
        ] {
            set(&cmos, register, value);
        }
        bench.clock.set(5_000_000_000);
        assert_eq!(get(&cmos, 0), 0x30, "held");
        set(&cmos, STATUS_B, 2);
        bench.clock.set(7_000_000_000);
        assert_eq!(clock(&cmos), [0x19, 0x99, 0x12, 0x31, 7, 0x15, 0x32]);
    }

    #[test]
    fn memory_sizes() {
        let bench = Bench::new();
        let cmos = Cmos::new(bench.clock.clone(), 3 << 30, 5 << 30);
        let word = |register| get(&cmos, register) | get(&cmos, register + 1) << 8;
        assert_eq!(word(0x15), 640);
        assert_eq!(word(0x30), 0xffff);
        assert_eq!(word(0x34), ((3 << 30) - (16 << 20)) >> 16);
        assert_eq!(
            word(0x5b) | get(&cmos, 0x5d) << 16,
            (5u64 << 30 >> 16) as u32
        );
    }

    #[test]
    fn nothing_written_breaks_it() {
        let bench = Bench::new();
        let cmos = Cmos::new(bench.clock.clone(), 0, u64::MAX);
        for register in 0..=255 {
            for value in 0..=255 {
                set(&cmos, register, value);
                clock(&cmos);
            }
        }
    }
}
