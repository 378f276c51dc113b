//! The I/O APIC: 24 pins that become interrupt messages (82093AA datasheet; the EOI register as in
//! version 0x20).

use std::sync::{Arc, Mutex};

use crate::local_apic::{DeliveryMode, Destination, EoiBroadcast, LocalApics, Message};
use crate::lock;
use crate::mmio::{Initiator, MmioDevice};

/// The guest-physical address of the registers.
pub const BASE: u64 = 0xfec0_0000;
/// How many bytes they take.
pub const LENGTH: u64 = 0x1000;
/// How many pins there are.
pub const PINS: usize = 24;

/// 24 pins, and the version that has the EOI register.
const VERSION: u32 = (PINS as u32 - 1) << 16 | 0x20;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

/// A redirection table entry.
#[derive(Clone, Copy)]
struct Entry(u64);

impl Entry {
    const REMOTE_REQUEST: u64 = 1 << 14;
    const LEVEL: u64 = 1 << 15;
    const MASKED: u64 = 1 << 16;
    /// Vector, delivery mode, destination mode, polarity, trigger mode, mask and destination.
    const WRITABLE: u64 = 0xff00_0000_0001_afff;

    fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    fn message(self) -> Option<Message> {
        Some(Message {
            destination: Destination::narrow((self.0 >> 56) as u8, self.has(1 << 11)),
            mode: DeliveryMode::of(self.0 as u32)?,
            vector: self.0 as u8,
            level: self.is_level(),
        })
    }

    /// Level-triggered: only interrupts with a vector can be.
    fn is_level(self) -> bool {
        self.has(Self::LEVEL)
            && matches!(
                DeliveryMode::of(self.0 as u32),
                Some(DeliveryMode::Fixed | DeliveryMode::LowestPriority)
            )
    }
}

struct State {
    id: u32,
    select: u8,
    entries: [Entry; PINS],
    /// The pins that are active, whatever their polarity says.
    active: u32,
}

impl State {
    fn new() -> Self {
        Self {
            id: 0,
            select: 0,
            entries: [Entry(Entry::MASKED); PINS],
            active: 0,
        }
    }
}

pub struct IoApic {
    apics: Arc<LocalApics>,
    state: Mutex<State>,
}

impl IoApic {
    #[must_use]
    pub fn new(apics: Arc<LocalApics>) -> Self {
        Self {
            apics,
            state: Mutex::new(State::new()),
        }
    }

    /// Makes `pin` active or inactive. An edge at a masked pin is lost, as in the chip; a level
    /// waits behind the mask. Pins that do not exist are not connected.
    pub fn set_line(&self, pin: usize, active: bool) {
        let mut state = lock(&self.state);
        let Some(&entry) = state.entries.get(pin) else {
            return;
        };
        let bit = 1 << pin;
        let was = state.active & bit != 0;
        state.active = state.active & !bit | u32::from(active) << pin;
        if entry.is_level() {
            self.deliver_level(&mut state, pin);
        } else if active && !was && !entry.has(Entry::MASKED) {
            self.send(entry);
        }
    }

    /// The machine's reset. The devices hold their lines.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        let active = state.active;
        *state = State::new();
        state.active = active;
    }

    /// Sends the message of a level-triggered pin that is active, open and not under way.
    fn deliver_level(&self, state: &mut State, pin: usize) {
        let active = state.active & 1 << pin != 0;
        if let Some(entry) = state.entries.get_mut(pin)
            && active
            && entry.is_level()
            && !entry.has(Entry::MASKED | Entry::REMOTE_REQUEST)
        {
            entry.0 |= Entry::REMOTE_REQUEST;
            self.send(*entry);
        }
    }

    fn send(&self, entry: Entry) {
        if let Some(message) = entry.message() {
            self.apics.deliver(message);
        }
    }

    fn end(&self, state: &mut State, vector: u8) {
        for pin in 0..PINS {
            let entry = &mut state.entries[pin];
            if entry.is_level() && entry.0 as u8 == vector {
                entry.0 &= !Entry::REMOTE_REQUEST;
                self.deliver_level(state, pin);
            }
        }
    }

    fn read_window(state: &State) -> u32 {
        match state.select {
            0 | 2 => state.id,
            1 => VERSION,
            index => {
                let entry = usize::from(index)
                    .checked_sub(0x10)
                    .and_then(|half| state.entries.get(half / 2));
                match (entry, index & 1) {
                    (Some(entry), 0) => entry.0 as u32,
                    (Some(entry), _) => (entry.0 >> 32) as u32,
                    (None, _) => 0,
                }
            }
        }
    }

    fn write_window(&self, state: &mut State, value: u32) {
        if state.select == 0 {
            state.id = value & 0x0f00_0000;
        }
        let Some(half) = usize::from(state.select).checked_sub(0x10) else {
            return;
        };
        let pin = half / 2;
        let Some(entry) = state.entries.get_mut(pin) else {
            return;
        };
        let value = u64::from(value);
        let written = if half % 2 == 0 {
            entry.0 & !0xffff_ffff | value
        } else {
            entry.0 & 0xffff_ffff | value << 32
        };
        let read_only = entry.0 & Entry::REMOTE_REQUEST;
        *entry = Entry(written & Entry::WRITABLE | read_only);
        if !entry.is_level() {
            // Turning an entry to edge and back is how software ends a stuck level.
            entry.0 &= !Entry::REMOTE_REQUEST;
        }
        self.deliver_level(state, pin);
    }
}

impl EoiBroadcast for IoApic {
    fn eoi(&self, vector: u8) {
        self.end(&mut lock(&self.state), vector);
    }
}

impl MmioDevice for IoApic {
    fn read(&self, _: Initiator, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = lock(&self.state);
        let value = match offset {
            SELECT => u32::from(state.select),
            WINDOW => Self::read_window(&state),
            _ => return,
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn write(&self, _: Initiator, offset: u64, data: &[u8]) {
        let Some(&low) = data.first() else {
            return;
        };
        let mut state = lock(&self.state);
        match offset {
            SELECT => state.select = low,
            EOI => self.end(&mut state, low),
            WINDOW => {
                // The window has 32 bits; a narrower write is not defined.
                if let Some(&value) = data.first_chunk::<4>() {
                    self.write_window(&mut state, u32::from_le_bytes(value));
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use trapline_monitor::interrupt::{LocalInterrupts, VcpuSignals};

    use super::*;
    use crate::local_apic::LocalApic;
    use crate::timer::tests::Bench;

    struct Silent;

    impl VcpuSignals for Silent {
        fn interrupt(&self) {}
        fn nmi(&self) {}
        fn init(&self) {}
        fn startup(&self, _: u8) {}
    }

    struct Board {
        io_apic: Arc<IoApic>,
        apics: Arc<LocalApics>,
    }

    fn board() -> Board {
        let signals: Vec<Arc<dyn VcpuSignals>> = vec![Arc::new(Silent), Arc::new(Silent)];
        let apics = LocalApics::new(&signals, &Bench::new().timers, 1);
        let io_apic = Arc::new(IoApic::new(apics.clone()));
        let weak: Weak<IoApic> = Arc::downgrade(&io_apic);
        apics.connect_eoi(weak);
        for vcpu in 0..2u8 {
            let page = crate::local_apic::LocalApicPage::new(apics.clone());
            page.write(Initiator::Vcpu(vcpu), 0xf0, &0x1ffu32.to_le_bytes());
        }
        Board { io_apic, apics }
    }

    impl Board {
        fn set(&self, register: u8, value: u32) {
            self.io_apic.write(Initiator::Vcpu(0), SELECT, &[register]);
            self.io_apic
                .write(Initiator::Vcpu(0), WINDOW, &value.to_le_bytes());
        }
        fn get(&self, register: u8) -> u32 {
            let mut data = [0; 4];
            self.io_apic.write(Initiator::Vcpu(0), SELECT, &[register]);
            self.io_apic.read(Initiator::Vcpu(0), WINDOW, &mut data);
            u32::from_le_bytes(data)
        }
        fn local(&self, vcpu: usize) -> Arc<LocalApic> {
            self.apics.of(vcpu).unwrap()
        }
        fn end(&self, vcpu: u8) {
            let page = crate::local_apic::LocalApicPage::new(self.apics.clone());
            page.write(Initiator::Vcpu(vcpu), 0xb0, &[0; 4]);
        }
    }

    #[test]
    fn registers_keep_what_they_may() {
        let board = board();
        assert_eq!(board.get(1), 0x0017_0020);
        assert_eq!(board.get(0x10), 0x1_0000, "masked after reset");
        board.set(0, 0xffff_ffff);
        assert_eq!(board.get(0), 0x0f00_0000);
        board.set(0x3f, 0xffff_ffff);
        board.set(0x3e, 0xffff_ffff);
        assert_eq!((board.get(0x3e), board.get(0x3f)), (0x1_afff, 0xff00_0000));
        board.set(0x40, 1);
        board.set(0xff, 1);
        assert_eq!(board.get(0xff), 0);
    }

    #[test]
    fn edges_are_messages_and_masked_ones_are_lost() {
        let board = board();
        board.io_apic.set_line(4, true);
        board.io_apic.set_line(4, false);
        board.set(0x19, 1 << 24);
        board.set(0x18, 0x44);
        assert!(!board.local(1).pending());
        board.io_apic.set_line(4, true);
        board.io_apic.set_line(4, true);
        assert!(!board.local(0).pending());
        assert_eq!(board.local(1).acknowledge(), Some(0x44));
        board.end(1);
        assert!(!board.local(1).pending(), "one edge, one interrupt");
        board.io_apic.set_line(4, false);
        board.io_apic.set_line(4, true);
        assert!(board.local(1).pending());
        board.io_apic.set_line(99, true);
    }

    #[test]
    fn levels_repeat_until_they_end() {
        let board = board();
        board.io_apic.set_line(9, true);
        board.set(0x22, 0x8059);
        assert_eq!(board.get(0x22), 0xc059, "the level waited behind the mask");
        assert_eq!(board.local(0).acknowledge(), Some(0x59));
        assert!(!board.local(0).pending());
        board.end(0);
        assert_eq!(board.local(0).acknowledge(), Some(0x59));
        // Under way already: another assertion sends nothing that would outlive the EOI.
        board.io_apic.set_line(9, true);
        board.io_apic.set_line(9, false);
        board.end(0);
        assert!(!board.local(0).pending());
        assert_eq!(board.get(0x22), 0x8059);
    }

    #[test]
    fn the_eoi_register_and_the_edge_trick_end_a_level() {
        let board = board();
        board.set(0x22, 0x8059);
        board.io_apic.set_line(9, true);
        board.io_apic.set_line(9, false);
        assert_eq!(board.get(0x22), 0xc059);
        board
            .io_apic
            .write(Initiator::Vcpu(0), EOI, &[0x59, 0, 0, 0]);
        assert_eq!(board.get(0x22), 0x8059);
        board.io_apic.set_line(9, true);
        board.set(0x22, 0x1_0059);
        board.set(0x22, 0x1_8059);
        assert_eq!(board.get(0x22), 0x1_8059);
    }
}
