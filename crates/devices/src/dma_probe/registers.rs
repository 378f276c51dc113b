//! The registers of the DMA test device, without memory, threads or interrupts.

use super::IDENT;

/// Bytes of registers.
const IMAGE: usize = 0x30;

const START: u32 = 1;
const WITH_INTERRUPT: u32 = 2;
const TAKE_BACK: u32 = 4;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Status {
    #[default]
    Idle = 0,
    Busy = 1,
    Done = 2,
    Failed = 3,
}

/// One command, with the registers as they were when it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    pub source: u64,
    pub destination: u64,
    pub length: u32,
    interrupt: bool,
    /// Commands of an earlier era, before a reset, are not reported.
    era: u64,
}

/// How a transfer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    status: Status,
    copied: u32,
}

impl Outcome {
    pub fn done(copied: u32) -> Self {
        let status = Status::Done;
        Self { status, copied }
    }
    /// Failed behind the first `copied` bytes.
    pub fn failed(copied: u32) -> Self {
        let status = Status::Failed;
        Self { status, copied }
    }
}

#[derive(Debug, Default)]
pub struct Registers {
    source: u64,
    destination: u64,
    length: u32,
    status: Status,
    copied: u32,
    commands: u64,
    interrupt: bool,
    era: u64,
    /// Given and not yet taken by the device's thread.
    waiting: Option<Transfer>,
}

fn replace(value: &mut u64, shift: u32, word: u32) {
    *value = *value & !(0xffff_ffff << shift) | u64::from(word) << shift;
}

impl Registers {
    /// The state after power-up, in the next era.
    pub fn powered_up(&self) -> Self {
        Self {
            era: self.era + 1,
            ..Self::default()
        }
    }

    pub fn write(&mut self, offset: u64, word: u32) {
        match offset {
            0x08 => replace(&mut self.source, 0, word),
            0x0c => replace(&mut self.source, 32, word),
            0x10 => replace(&mut self.destination, 0, word),
            0x14 => replace(&mut self.destination, 32, word),
            0x18 => self.length = word,
            0x1c => self.command(word),
            _ => {}
        }
    }

    fn command(&mut self, word: u32) {
        if word & TAKE_BACK != 0 {
            self.interrupt = false;
        }
        if word & START == 0 || self.status == Status::Busy {
            return;
        }
        self.status = Status::Busy;
        self.copied = 0;
        self.waiting = Some(Transfer {
            source: self.source,
            destination: self.destination,
            length: self.length,
            interrupt: word & WITH_INTERRUPT != 0,
            era: self.era,
        });
    }

    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    pub fn take(&mut self) -> Option<Transfer> {
        self.waiting.take()
    }

    pub fn finish(&mut self, transfer: &Transfer, outcome: Outcome) {
        if transfer.era != self.era {
            return;
        }
        self.status = outcome.status;
        self.copied = outcome.copied;
        self.commands += 1;
        self.interrupt |= transfer.interrupt;
    }

    /// Whether the interrupt line is active.
    pub fn interrupts(&self) -> bool {
        self.interrupt
    }

    /// All registers as they are read.
    pub fn image(&self) -> [u8; IMAGE] {
        let mut image = [0; IMAGE];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &IDENT.to_le_bytes());
        put(0x08, &self.source.to_le_bytes());
        put(0x10, &self.destination.to_le_bytes());
        put(0x18, &self.length.to_le_bytes());
        let status = self.status as u32 | u32::from(self.interrupt) << 8;
        put(0x20, &status.to_le_bytes());
        put(0x24, &self.copied.to_le_bytes());
        put(0x28, &self.commands.to_le_bytes());
        image
    }
}
