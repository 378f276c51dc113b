//! One counter of the 8254. It does not count: what it would show follows from the time.

use crate::clock::{scale, scale_up};

/// The input clock in Hz.
pub const FREQUENCY: u64 = 1_193_182;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Low,
    High,
    Both,
}

pub struct Counter {
    mode: u8,
    bcd: bool,
    access: Access,
    /// The first byte of a count of two.
    written: Option<u8>,
    /// The next read of a count of two gives the high byte.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    /// 1 to 65536.
    reload: u32,
    /// When counting began, or `None` when no count was written, or its trigger did not come.
    start: Option<u64>,
    /// A count was written since the mode.
    loaded: bool,
    gate: bool,
    /// When the gate stopped counting.
    stopped: Option<u64>,
}

impl Counter {
    /// In mode 3, as firmware leaves it, but without a count: OUT is high.
    pub fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            bcd: false,
            access: Access::Both,
            written: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
            reload: 0x1_0000,
            start: None,
            loaded: false,
            gate,
            stopped: None,
        }
    }

    /// A control word for this counter, not a read-back.
    pub fn control(&mut self, word: u8, now: u64) {
        self.access = match word >> 4 & 3 {
            0 => {
                let count = self.shown(now);
                self.latched_count.get_or_insert(count);
                return;
            }
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        self.mode = match word >> 1 & 7 {
            mode @ 0..=5 => mode,
            // 6 and 7 are 2 and 3 with a bit that does not matter.
            mode => mode - 4,
        };
        self.bcd = word & 1 != 0;
        self.written = None;
        self.read_high = false;
        self.latched_count = None;
        self.latched_status = None;
        self.start = None;
        self.loaded = false;
        self.stopped = None;
    }

    /// A read-back command with its two active-low latch bits.
    pub fn read_back(&mut self, command: u8, now: u64) {
        if command & 0x20 == 0 {
            let count = self.shown(now);
            self.latched_count.get_or_insert(count);
        }
        if command & 0x10 == 0 {
            let access = match self.access {
                Access::Low => 1,
                Access::High => 2,
                Access::Both => 3,
            };
            let status = u8::from(self.output(now)) << 7
                | u8::from(!self.loaded) << 6
                | access << 4
                | self.mode << 1
                | u8::from(self.bcd);
            self.latched_status.get_or_insert(status);
        }
    }

    pub fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self
            .latched_count
            .unwrap_or_else(|| self.shown(now))
            .to_le_bytes();
        let is_high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::Both => {
                self.read_high = !self.read_high;
                !self.read_high
            }
        };
        if self.access != Access::Both || is_high {
            self.latched_count = None;
        }
        if is_high { high } else { low }
    }

    pub fn write(&mut self, value: u8, now: u64) {
        let count = match (self.access, self.written.take()) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, Some(low)) => u16::from_le_bytes([low, value]),
            (Access::Both, None) => {
                self.written = Some(value);
                if self.mode == 0 {
                    // The first byte stops the count and pulls the output low.
                    self.start = None;
                }
                return;
            }
        };
        self.reload = self.decode(count);
        self.loaded = true;
        self.stopped = None;
        match self.mode {
            // These wait for a rising gate.
            1 | 5 => {}
            _ => {
                self.start = Some(now);
                if !self.gate {
                    self.stopped = Some(now);
                }
            }
        }
    }

    pub fn set_gate(&mut self, gate: bool, now: u64) {
        let was = std::mem::replace(&mut self.gate, gate);
        if was == gate || !self.loaded {
            return;
        }
        match (self.mode, gate) {
            (1 | 5, true) => self.start = Some(now),
            (1 | 5, false) => {}
            (_, false) => self.stopped = Some(now),
            (2 | 3, true) => {
                self.start = Some(now);
                self.stopped = None;
            }
            (_, true) => {
                if let (Some(start), Some(stopped)) = (self.start, self.stopped.take()) {
                    self.start = Some(start.saturating_add(now.saturating_sub(stopped)));
                }
            }
        }
    }

    /// It counts down to its only rise of OUT, which is still to come.
    pub fn is_counting_once(&self, now: u64) -> bool {
        self.mode == 0 && self.start.is_some() && self.stopped.is_none() && !self.output(now)
    }

    /// Counting began so many nanoseconds later.
    pub fn begin_later(&mut self, nanoseconds: u64) {
        if let Some(start) = &mut self.start {
            *start = start.saturating_add(nanoseconds);
        }
    }

    pub fn gate(&self) -> bool {
        self.gate
    }

    /// Input clocks since counting began.
    fn ticks(&self, now: u64) -> Option<u64> {
        let until = self.stopped.unwrap_or(now);
        Some(scale(
            until.saturating_sub(self.start?),
            FREQUENCY,
            1_000_000_000,
        ))
    }

    /// OUT.
    pub fn output(&self, now: u64) -> bool {
        let Some(ticks) = self.ticks(now) else {
            return self.mode != 0;
        };
        let reload = u64::from(self.reload);
        match self.mode {
            0 | 1 => ticks >= reload,
            2 => self.stopped.is_some() || ticks % reload != reload - 1,
            3 => self.stopped.is_some() || ticks % reload < reload.div_ceil(2),
            _ => ticks != reload,
        }
    }

    /// The counting element.
    fn shown(&self, now: u64) -> u16 {
        let reload = u64::from(self.reload);
        let ticks = self.ticks(now).unwrap_or(0);
        let count = match self.mode {
            2 => reload - ticks % reload,
            3 => reload - ticks * 2 % reload,
            _ => reload.wrapping_sub(ticks),
        };
        self.encode(count)
    }

    /// When OUT rises next after `now`.
    pub fn next_rise(&self, now: u64) -> Option<u64> {
        if self.stopped.is_some() {
            return None;
        }
        let ticks = self.ticks(now)?;
        let reload = u64::from(self.reload);
        let rise = match self.mode {
            0 | 1 => Some(reload),
            2 | 3 => Some((ticks / reload + 1) * reload),
            _ => Some(reload + 1),
        };
        let rise = rise.filter(|&rise| rise > ticks)?;
        Some(
            self.start?
                .saturating_add(scale_up(rise, 1_000_000_000, FREQUENCY)),
        )
    }

    fn decode(&self, count: u16) -> u32 {
        if !self.bcd {
            return match count {
                0 => 0x1_0000,
                count => u32::from(count),
            };
        }
        let decimal = (0..4).rev().fold(0, |value, digit| {
            value * 10 + u32::from(count >> (4 * digit) & 0xf)
        });
        if decimal == 0 { 10_000 } else { decimal }
    }

    fn encode(&self, count: u64) -> u16 {
        if !self.bcd {
            return count as u16;
        }
        // Below zero the counter goes on at 9999.
        let mut rest = (count as i64).rem_euclid(10_000) as u16;
        let mut value = 0;
        for digit in 0..4 {
            value |= (rest % 10) << (4 * digit);
            rest /= 10;
        }
        value
    }
}
