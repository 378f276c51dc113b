//! Interrupt messages: from I/O APIC, local vector table and interrupt commands to the APICs that
//! they are for.

use std::sync::Weak;
use std::sync::atomic::Ordering;

use super::base::Mode;
use super::register::{Error, Lvt, MASKED};
use super::{Apic, LocalApics};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    Fixed,
    LowestPriority,
    Smi,
    Nmi,
    Init,
    Startup,
    ExtInt,
}

impl DeliveryMode {
    /// From bits 8 to 10 of a table entry or command; `None` for the reserved encoding.
    #[must_use]
    pub fn of(bits: u32) -> Option<Self> {
        Some(match bits >> 8 & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            7 => Self::ExtInt,
            _ => return None,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// An APIC ID.
    Physical(u32),
    /// A message destination address, compared with the logical destination registers.
    Logical(u32),
    Broadcast,
}

impl Destination {
    /// An 8-bit destination of an I/O APIC or of an xAPIC command.
    #[must_use]
    pub fn narrow(destination: u8, logical: bool) -> Self {
        match (destination, logical) {
            (0xff, _) => Self::Broadcast,
            (mda, true) => Self::Logical(u32::from(mda)),
            (id, false) => Self::Physical(u32::from(id)),
        }
    }

    /// A 32-bit destination of an x2APIC command.
    #[must_use]
    pub fn wide(destination: u32, logical: bool) -> Self {
        match (destination, logical) {
            (u32::MAX, _) => Self::Broadcast,
            (mda, true) => Self::Logical(mda),
            (id, false) => Self::Physical(id),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub destination: Destination,
    pub mode: DeliveryMode,
    pub vector: u8,
    /// Level-triggered: the EOI is broadcast.
    pub level: bool,
}

impl LocalApics {
    /// Delivers a message of the I/O APIC. Nobody may be the right answer.
    pub fn deliver(&self, message: Message) {
        if let Destination::Physical(id) = message.destination {
            // IDs are indices: the common case needs no search.
            let target = usize::try_from(id).ok().and_then(|index| self.apic(index));
            if let Some(apic) = target.filter(|apic| apic.mode() != Mode::Disabled) {
                apic.accept(message.mode, message.vector, message.level);
            }
            return;
        }
        self.deliver_where(message, |apic| apic.addressed(message.destination));
    }

    fn deliver_where(&self, message: Message, addressed: impl Fn(&Apic) -> bool) {
        let targets = |apic: &&Apic| apic.mode() != Mode::Disabled && addressed(apic);
        if message.mode != DeliveryMode::LowestPriority {
            for apic in self.apics.iter().filter(targets) {
                apic.accept(message.mode, message.vector, message.level);
            }
            return;
        }
        let turn = self.arbitration.fetch_add(1, Ordering::Relaxed) % self.apics.len().max(1);
        let (before, after) = self.apics.split_at(turn);
        let winner = after
            .iter()
            .chain(before)
            .filter(targets)
            .filter(|apic| apic.software_enabled())
            .min_by_key(|apic| apic.processor_priority() >> 4);
        if let Some(apic) = winner {
            apic.accept(DeliveryMode::Fixed, message.vector, message.level);
        }
    }

    /// A write of the interrupt command register of `vcpu` with its low half `command`.
    pub(super) fn command(&self, vcpu: usize, command: u32, destination: Destination) {
        let Some(sender) = self.apic(vcpu) else {
            return;
        };
        let Some(mode) = DeliveryMode::of(command) else {
            return;
        };
        let vector = command as u8;
        let fixed = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if fixed && vector < 16 {
            sender.error(Error::SendIllegalVector);
            return;
        }
        // The INIT level de-assert only set arbitration IDs, long ago.
        if mode == DeliveryMode::Init && command & 0xc000 == 0x8000 {
            return;
        }
        let message = Message {
            destination,
            mode,
            vector,
            level: false,
        };
        match command >> 18 & 3 {
            0 => self.deliver(message),
            1 => {
                // Only fixed interrupts may be sent to oneself by shorthand.
                if mode == DeliveryMode::Fixed {
                    sender.accept(mode, vector, false);
                }
            }
            2 => self.deliver_where(message, |_| true),
            _ => self.deliver_where(message, |apic| apic.id != sender.id),
        }
    }

    /// The end of the highest interrupt in service on `vcpu`.
    pub(super) fn end_of_interrupt(&self, vcpu: usize) {
        let Some(apic) = self.apic(vcpu) else {
            return;
        };
        let Some(vector) = apic.in_service.highest() else {
            return;
        };
        apic.in_service.remove(vector);
        if apic.level_triggered.contains(vector) {
            apic.end_of_level(vector);
            if let Some(listener) = self.eoi.get().and_then(Weak::upgrade) {
                listener.eoi(vector);
            }
        }
        apic.announce();
    }

    /// Drives the LINT0 pin (0: where the 8259 is) or the LINT1 pin (1) of `vcpu`.
    pub fn set_pin(&self, vcpu: usize, pin: usize, level: bool) {
        let Some(apic) = self.apic(vcpu) else {
            return;
        };
        let Some(wire) = apic.pins.get(pin) else {
            return;
        };
        if wire.swap(level, Ordering::SeqCst) == level || !level {
            return;
        }
        if apic.mode() == Mode::Disabled {
            // The pins are INTR and NMI then.
            match pin {
                0 => apic.signals.interrupt(),
                _ => apic.signals.nmi(),
            }
            return;
        }
        apic.pin_rose(if pin == 0 { Lvt::Lint0 } else { Lvt::Lint1 });
    }
}

impl Apic {
    /// Whether a message with this destination is for this APIC.
    fn addressed(&self, destination: Destination) -> bool {
        match destination {
            Destination::Broadcast => true,
            Destination::Physical(id) => id == u32::from(self.id),
            Destination::Logical(mda) if self.mode() == Mode::X2Apic => {
                let own = self.extended_logical_destination();
                own >> 16 == mda >> 16 && own & mda & 0xffff != 0
            }
            Destination::Logical(mda) => {
                let Ok(mda) = u8::try_from(mda) else {
                    return false;
                };
                let own = (self.logical_destination.load(Ordering::SeqCst) >> 24) as u8;
                if self.destination_format.load(Ordering::SeqCst) >> 28 == 0xf {
                    own & mda != 0
                } else {
                    own >> 4 == mda >> 4 && own & mda & 0xf != 0
                }
            }
        }
    }

    /// LDR in x2APIC mode: the cluster, and this APIC's bit in it.
    pub(super) fn extended_logical_destination(&self) -> u32 {
        u32::from(self.id >> 4) << 16 | 1 << (self.id & 0xf)
    }

    /// Takes a message that is for this APIC.
    fn accept(&self, mode: DeliveryMode, vector: u8, level: bool) {
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if self.software_enabled() {
                    self.request(vector, level);
                }
            }
            DeliveryMode::Nmi => self.signals.nmi(),
            DeliveryMode::Init => self.signals.init(),
            DeliveryMode::Startup => self.signals.startup(vector),
            // There is no system management mode, and the 8259 is wired to LINT0.
            DeliveryMode::Smi | DeliveryMode::ExtInt => {}
        }
    }

    /// Sets the request bit of `vector` and tells the VCPU.
    fn request(&self, vector: u8, level: bool) {
        if vector < 16 {
            self.error(Error::ReceiveIllegalVector);
            return;
        }
        // The trigger mode first: an EOI looks at it.
        if level {
            self.level_triggered.insert(vector);
        } else {
            self.level_triggered.remove(vector);
        }
        if self.requested.insert(vector) {
            self.signals.interrupt();
        }
    }

    /// An event of the local vector table.
    pub(super) fn local_event(&self, entry: Lvt) {
        let lvt = self.lvt(entry);
        if lvt & MASKED != 0 {
            return;
        }
        let mode = match entry {
            Lvt::Timer | Lvt::Error => Some(DeliveryMode::Fixed),
            _ => DeliveryMode::of(lvt),
        };
        match mode {
            Some(DeliveryMode::Fixed) => self.request(lvt as u8, false),
            Some(DeliveryMode::Nmi) => self.signals.nmi(),
            Some(DeliveryMode::Init) => self.signals.init(),
            Some(DeliveryMode::ExtInt) => self.signals.interrupt(),
            _ => {}
        }
    }

    /// LINT0 or LINT1 became active. Only LINT0 knows level-triggered interrupts.
    pub(super) fn pin_rose(&self, entry: Lvt) {
        let lvt = self.lvt(entry);
        if lvt & MASKED == 0 && self.is_level(entry, lvt) {
            self.set_lvt(entry, lvt | Lvt::REMOTE_REQUEST);
            self.request(lvt as u8, true);
        } else {
            self.local_event(entry);
        }
    }

    fn is_level(&self, entry: Lvt, lvt: u32) -> bool {
        matches!(entry, Lvt::Lint0)
            && lvt & Lvt::LEVEL != 0
            && DeliveryMode::of(lvt) == Some(DeliveryMode::Fixed)
    }

    /// The EOI of a level-triggered vector: LINT0 asks again if it is still active.
    fn end_of_level(&self, vector: u8) {
        let lvt = self.lvt(Lvt::Lint0);
        if lvt as u8 == vector && self.is_level(Lvt::Lint0, lvt) {
            self.set_lvt(Lvt::Lint0, lvt & !Lvt::REMOTE_REQUEST);
            if self.pins[0].load(Ordering::SeqCst) {
                self.pin_rose(Lvt::Lint0);
            }
        }
    }

    /// Notes an error and raises the error interrupt.
    pub(super) fn error(&self, error: Error) {
        self.errors.fetch_or(error as u32, Ordering::SeqCst);
        // An illegal vector in the error entry must not call itself.
        if self.lvt(Lvt::Error) as u8 >= 16 {
            self.local_event(Lvt::Error);
        }
    }
}
