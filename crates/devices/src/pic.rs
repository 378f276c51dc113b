//! The pair of 8259A interrupt controllers, with the edge/level registers of the PC.

use std::sync::{Arc, Mutex};

use crate::local_apic::{ExternalInterrupts, LocalApics};
use crate::lock;
use crate::port::PortDevice;

/// The input of the first chip that the second one drives.
const CASCADE: u8 = 2;

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Initialization {
    #[default]
    Done,
    /// Waits for ICW2, the vector base.
    Base,
    /// Waits for ICW3, the wiring.
    Wiring,
    /// Waits for ICW4, the mode.
    Mode,
}

#[derive(Clone, Default)]
struct Chip {
    lines: u8,
    request: u8,
    service: u8,
    mask: u8,
    /// ELCR: level-triggered inputs.
    level: u8,
    base: u8,
    /// The input with the lowest priority, plus one.
    first: u8,
    automatic_end: bool,
    rotate_on_automatic_end: bool,
    special_mask: bool,
    special_fully_nested: bool,
    read_service: bool,
    poll: bool,
    needs_mode: bool,
    single: bool,
    initialization: Initialization,
}

impl Chip {
    fn set_line(&mut self, input: u8, active: bool) {
        let bit = 1 << input;
        if active {
            if self.level & bit != 0 || self.lines & bit == 0 {
                self.request |= bit;
            }
            self.lines |= bit;
        } else {
            // The edge latch needs the line to stay active until it is acknowledged.
            self.request &= !bit;
            self.lines &= !bit;
        }
    }

    /// How far down the order of priority the best of `inputs` is; 8 for none.
    fn rank(&self, inputs: u8) -> u8 {
        (0..8)
            .find(|rank| inputs & 1 << ((rank + self.first) & 7) != 0)
            .unwrap_or(8)
    }

    /// The input to be served next: better than anything in service.
    fn next(&self, first_chip: bool) -> Option<u8> {
        let wanted = self.rank(self.request & !self.mask);
        let mut busy = self.service;
        if self.special_mask {
            busy &= !self.mask;
        }
        if first_chip && self.special_fully_nested {
            // More requests of the second chip may nest.
            busy &= !(1 << CASCADE);
        }
        (wanted < self.rank(busy)).then_some((wanted + self.first) & 7)
    }

    fn accept(&mut self, input: u8) {
        let bit = 1 << input;
        if self.automatic_end {
            if self.rotate_on_automatic_end {
                self.first = (input + 1) & 7;
            }
        } else {
            self.service |= bit;
        }
        if self.level & bit == 0 {
            self.request &= !bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            *self = Self {
                lines: self.lines,
                level: self.level,
                request: self.lines & self.level,
                needs_mode: value & 1 != 0,
                single: value & 2 != 0,
                initialization: Initialization::Base,
                ..Self::default()
            };
        } else if value & 8 != 0 {
            match value & 3 {
                2 => self.read_service = false,
                3 => self.read_service = true,
                _ => {}
            }
            self.poll = value & 4 != 0;
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.end(value);
        }
    }

    /// OCW2: ends of interrupts and rotations.
    fn end(&mut self, value: u8) {
        let chosen = value & 7;
        match value >> 5 {
            0 => self.rotate_on_automatic_end = false,
            4 => self.rotate_on_automatic_end = true,
            1 | 5 => {
                let rank = self.rank(self.service);
                if rank < 8 {
                    let input = (rank + self.first) & 7;
                    self.service &= !(1 << input);
                    if value >> 5 == 5 {
                        self.first = (input + 1) & 7;
                    }
                }
            }
            3 => self.service &= !(1 << chosen),
            6 => self.first = (chosen + 1) & 7,
            7 => {
                self.service &= !(1 << chosen);
                self.first = (chosen + 1) & 7;
            }
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        self.initialization = match self.initialization {
            Initialization::Done => {
                self.mask = value;
                Initialization::Done
            }
            Initialization::Base => {
                self.base = value & 0xf8;
                if self.single {
                    self.after_wiring()
                } else {
                    Initialization::Wiring
                }
            }
            // The wiring is fixed.
            Initialization::Wiring => self.after_wiring(),
            Initialization::Mode => {
                self.special_fully_nested = value & 0x10 != 0;
                self.automatic_end = value & 2 != 0;
                Initialization::Done
            }
        };
    }

    fn after_wiring(&self) -> Initialization {
        if self.needs_mode {
            Initialization::Mode
        } else {
            Initialization::Done
        }
    }
}

#[derive(Default)]
struct Pair([Chip; 2]);

impl Pair {
    /// Brings the cascade input up to date and tells whether INTR is active.
    fn settle(&mut self) -> bool {
        let [first, second] = &mut self.0;
        // The second chip's output behaves as a level whatever the first one's ELCR says.
        if second.next(false).is_some() {
            first.request |= 1 << CASCADE;
        } else {
            first.request &= !(1 << CASCADE);
        }
        first.next(true).is_some()
    }

    fn acknowledge(&mut self, chip: usize) -> Option<u8> {
        let input = self.0[chip].next(chip == 0)?;
        self.0[chip].accept(input);
        Some(input)
    }

    /// The INTA cycle. With nothing to serve it is the spurious interrupt 7.
    fn vector(&mut self) -> u8 {
        self.settle();
        let (chip, input) = match self.acknowledge(0) {
            Some(CASCADE) => (1, self.acknowledge(1).unwrap_or(7)),
            Some(input) => (0, input),
            None => (0, 7),
        };
        self.0[chip].base.wrapping_add(input)
    }
}

/// The pair. Its INTR output is the LINT0 pin of VCPU 0.
pub struct Pic {
    apics: Arc<LocalApics>,
    pair: Mutex<Pair>,
}

impl Pic {
    #[must_use]
    pub fn new(apics: Arc<LocalApics>) -> Self {
        Self {
            apics,
            pair: Mutex::default(),
        }
    }

    /// Drives interrupt request line 0 to 15; others are not connected.
    pub fn set_line(&self, irq: u8, active: bool) {
        if irq < 16 && irq != CASCADE {
            self.update(|pair| pair.0[usize::from(irq / 8)].set_line(irq % 8, active));
        }
    }

    /// The machine's reset. The devices hold their lines.
    pub fn reset(&self) {
        self.update(|pair| {
            for chip in &mut pair.0 {
                *chip = Chip {
                    lines: chip.lines,
                    ..Chip::default()
                };
            }
        });
    }

    /// Changes the pair and passes INTR on before another change can overtake it.
    fn update<R>(&self, change: impl FnOnce(&mut Pair) -> R) -> R {
        let mut pair = lock(&self.pair);
        let result = change(&mut pair);
        let active = pair.settle();
        self.apics.set_pin(0, 0, active);
        result
    }
}

impl ExternalInterrupts for Pic {
    fn acknowledge(&self) -> u8 {
        self.update(Pair::vector)
    }
}

impl Pic {
    /// The ports of the pair and of its edge/level registers.
    pub const PORTS: [std::ops::RangeInclusive<u16>; 3] = [0x20..=0x21, 0xa0..=0xa1, 0x4d0..=0x4d1];
}

impl PortDevice for Pic {
    fn read(&self, port: u16, _: u8) -> u32 {
        let index = usize::from(port & 0x80 != 0);
        let value = self.update(|pair| match port {
            0x4d0 | 0x4d1 => pair.0[usize::from(port & 1)].level,
            0x21 | 0xa1 => pair.0[index].mask,
            _ if std::mem::take(&mut pair.0[index].poll) => {
                pair.acknowledge(index).map_or(0, |input| 0x80 | input)
            }
            _ if pair.0[index].read_service => pair.0[index].service,
            _ => pair.0[index].request,
        });
        u32::from(value)
    }

    fn write(&self, port: u16, _: u8, value: u32) {
        let value = value as u8;
        let index = usize::from(port & 0x80 != 0);
        self.update(|pair| match port {
            // Timer, keyboard, cascade, clock and coprocessor are edges for ever.
            0x4d0 => pair.0[0].level = value & 0xf8,
            0x4d1 => pair.0[1].level = value & 0xde,
            0x21 | 0xa1 => pair.0[index].write_data(value),
            _ => pair.0[index].write_command(value),
        });
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

    fn board(mode: u8) -> (Arc<Pic>, Arc<LocalApic>) {
        let signals: Vec<Arc<dyn VcpuSignals>> = vec![Arc::new(Silent)];
        let apics = LocalApics::new(&signals, &Bench::new().timers, 1);
        apics.enter_virtual_wire_mode();
        let pic = Arc::new(Pic::new(apics.clone()));
        let weak: Weak<Pic> = Arc::downgrade(&pic);
        apics.connect_external(weak);
        for (port, base, wiring) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            pic.write(port, 1, 0x11);
            for value in [base, wiring, u32::from(mode)] {
                pic.write(port + 1, 1, value);
            }
        }
        (pic, apics.of(0).unwrap())
    }

    #[test]
    fn the_pair_nests_by_priority() {
        let (pic, local) = board(1);
        pic.set_line(4, true);
        assert_eq!(local.acknowledge(), Some(0x34));
        pic.set_line(5, true);
        assert!(!local.pending(), "4 is in service");
        pic.set_line(8, true);
        assert_eq!(local.acknowledge(), Some(0x38), "the cascade is input 2");
        pic.write(0xa0, 1, 0x20);
        pic.write(0x20, 1, 0x20);
        assert!(!local.pending());
        pic.write(0x20, 1, 0x64);
        assert_eq!(local.acknowledge(), Some(0x35));
    }

    #[test]
    fn masks_hold_requests() {
        let (pic, local) = board(1);
        pic.write(0x21, 1, 0xff);
        pic.set_line(1, true);
        assert!(!local.pending());
        assert_eq!(pic.read(0x20, 1), 0x02);
        pic.write(0x21, 1, 0xfd);
        assert_eq!(pic.read(0x21, 1), 0xfd);
        assert_eq!(local.acknowledge(), Some(0x31));
        pic.write(0x20, 1, 0x0b);
        assert_eq!(pic.read(0x20, 1), 0x02, "in service");
    }

    #[test]
    fn edges_come_once_and_levels_stay() {
        let (pic, local) = board(1);
        pic.write(0x4d1, 1, 0xff);
        assert_eq!(pic.read(0x4d1, 1), 0xde);
        pic.set_line(3, true);
        assert_eq!(local.acknowledge(), Some(0x33));
        pic.write(0x20, 1, 0x20);
        assert!(!local.pending());
        pic.set_line(9, true);
        for _ in 0..2 {
            assert_eq!(local.acknowledge(), Some(0x39));
            pic.write(0xa0, 1, 0x20);
            pic.write(0x20, 1, 0x20);
        }
        pic.set_line(9, false);
        assert!(!local.pending());
    }

    #[test]
    fn a_request_that_went_away_is_spurious() {
        let (pic, local) = board(1);
        pic.set_line(3, true);
        assert!(local.pending());
        pic.set_line(3, false);
        assert!(!local.pending());
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(0x20, 1, 0x0b);
        assert_eq!(pic.read(0x20, 1), 0, "nothing is in service");
    }

    #[test]
    fn automatic_end_and_rotation() {
        let (pic, local) = board(3);
        pic.set_line(1, true);
        assert_eq!(local.acknowledge(), Some(0x31));
        pic.set_line(3, true);
        assert_eq!(local.acknowledge(), Some(0x33), "no EOI needed");
        let (pic, local) = board(1);
        pic.set_line(1, true);
        assert_eq!(local.acknowledge(), Some(0x31));
        pic.write(0x20, 1, 0xa0);
        pic.set_line(0, true);
        pic.set_line(5, true);
        assert_eq!(local.acknowledge(), Some(0x35), "0 and 1 are last now");
    }

    #[test]
    fn the_cascade_nests_only_in_its_special_mode() {
        for (mode, nests) in [(1, false), (0x11, true)] {
            let (pic, local) = board(mode);
            pic.set_line(12, true);
            assert_eq!(local.acknowledge(), Some(0x3c));
            pic.set_line(8, true);
            assert_eq!(local.pending(), nests);
        }
    }

    #[test]
    fn polling_acknowledges() {
        let (pic, local) = board(1);
        pic.set_line(6, true);
        pic.write(0x20, 1, 0x0c);
        assert_eq!(pic.read(0x20, 1), 0x86);
        assert!(!local.pending());
        for port in [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1] {
            for value in 0..=255 {
                pic.write(port, 1, value);
                pic.read(port, 1);
                pic.acknowledge();
            }
        }
    }
}
