//! The 8254 interval timer with the port 0x61 bits that gate its speaker counter.

mod counter;
mod poll;

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, Weak};

use crate::lines::{self, InterruptLines};
use crate::lock;
use crate::port::PortDevice;
use crate::timer::{Timer, TimerTarget, Timers};
use counter::Counter;
pub use counter::FREQUENCY;
use poll::{Finding, Poll};

/// Counter 0 interrupts no oftener than this many nanoseconds.
const SHORTEST_PERIOD: u64 = 50_000;

/// Port 0x61 bit 4 changes with every refresh of the memory, every 15 µs.
const REFRESH: u64 = 15_085;

struct State {
    counters: [Counter; 3],
    /// What the guest has seen of counter 2's OUT.
    poll: Poll,
    speaker: bool,
    /// When counter 0 raises its line next.
    next: Option<u64>,
}

impl State {
    fn new() -> Self {
        Self {
            counters: [Counter::new(true), Counter::new(true), Counter::new(false)],
            poll: Poll::default(),
            speaker: false,
            next: None,
        }
    }
}

pub struct Pit {
    state: Mutex<State>,
    lines: InterruptLines,
    timer: Timer,
}

impl Pit {
    pub const PORTS: [RangeInclusive<u16>; 2] = [0x40..=0x43, 0x61..=0x61];

    #[must_use]
    pub fn new(timers: &Arc<Timers>, lines: InterruptLines) -> Arc<Self> {
        lines.set(lines::TIMER, true);
        Arc::new_cyclic(|pit: &Weak<Self>| Self {
            state: Mutex::new(State::new()),
            lines,
            timer: timers.timer(pit.clone()),
        })
    }

    /// The machine's reset.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        *state = State::new();
        self.timer.cancel();
        self.lines.set(lines::TIMER, true);
    }

    /// Counter 0 starts afresh.
    fn restart(&self, state: &mut State, now: u64) {
        let counter = &state.counters[0];
        self.lines.set(lines::TIMER, counter.output(now));
        state.next = counter.next_rise(now);
        self.arm(state, now);
    }

    fn arm(&self, state: &State, now: u64) {
        match state.next {
            Some(next) => self
                .timer
                .arm(next.max(now.saturating_add(SHORTEST_PERIOD))),
            None => self.timer.cancel(),
        }
    }

    /// Counter 2 may have begun to count.
    fn restart_poll(&self, state: &mut State, now: u64) {
        if state.counters[2].is_counting_once(now) {
            state.poll.begin(now, self.timer.thread_time());
        } else {
            state.poll.end();
        }
    }

    /// Counter 2's OUT at port 0x61.
    fn poll(&self, state: &mut State, now: u64) -> bool {
        let finding = state.poll.look(now, || self.timer.thread_time());
        let counter = &mut state.counters[2];
        if let Finding::BeginLater(nanoseconds) = finding {
            counter.begin_later(nanoseconds);
        }
        if !counter.output(now) || finding == Finding::AsBefore {
            return false;
        }
        state.poll.end();
        true
    }

    fn control(&self, state: &mut State, word: u8, now: u64) {
        match word >> 6 {
            3 => {
                for (index, counter) in state.counters.iter_mut().enumerate() {
                    if word & 2 << index != 0 {
                        counter.read_back(word, now);
                        if index == 2 {
                            state.poll.end();
                        }
                    }
                }
            }
            index => {
                state.counters[usize::from(index)].control(word, now);
                if index == 0 && word & 0x30 != 0 {
                    self.restart(state, now);
                }
                if index == 2 {
                    state.poll.end();
                }
            }
        }
    }
}

impl TimerTarget for Pit {
    fn expired(&self, now: u64) {
        let mut state = lock(&self.state);
        if state.next.is_none_or(|next| next > now) {
            return;
        }
        // An edge for each period; those that were missed are gone.
        self.lines.set(lines::TIMER, false);
        self.lines.set(lines::TIMER, true);
        state.next = state.counters[0].next_rise(now);
        self.arm(&state, now);
    }
}

impl PortDevice for Pit {
    fn read(&self, port: u16, _: u8) -> u32 {
        let mut state = lock(&self.state);
        let now = self.timer.now();
        let value = match port {
            0x40..=0x42 => {
                if port == 0x42 {
                    state.poll.end();
                }
                state.counters[usize::from(port & 3)].read(now)
            }
            0x61 => {
                let out = self.poll(&mut state, now);
                u8::from(state.counters[2].gate())
                    | u8::from(state.speaker) << 1
                    | ((now / REFRESH) as u8 & 1) << 4
                    | u8::from(out) << 5
            }
            _ => 0xff,
        };
        u32::from(value)
    }

    fn write(&self, port: u16, _: u8, value: u32) {
        let mut state = lock(&self.state);
        let now = self.timer.now();
        let value = value as u8;
        match port {
            0x40..=0x42 => {
                let index = usize::from(port & 3);
                state.counters[index].write(value, now);
                if index == 0 {
                    self.restart(&mut state, now);
                } else if index == 2 {
                    self.restart_poll(&mut state, now);
                }
            }
            0x61 => {
                let gate = value & 1 != 0;
                if state.counters[2].gate() != gate {
                    state.counters[2].set_gate(gate, now);
                    self.restart_poll(&mut state, now);
                }
                state.speaker = value & 2 != 0;
            }
            _ => self.control(&mut state, value, now),
        }
    }
}

#[cfg(test)]
mod tests;
