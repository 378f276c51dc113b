//! A test device that copies guest memory to guest memory by DMA: the simplest actor that is no
//! VCPU. Only present when asked for (`--device dma-probe`).
//!
//! Registers, little-endian, from [`BASE`]. Reads may have any size; writes have 4 or 8 bytes and
//! are aligned to 4, others are ignored.
//!
//! | offset | bytes | name | |
//! | --- | --- | --- | --- |
//! | 0x00 | 4 | IDENT | reads as [`IDENT`] ("TDMA") |
//! | 0x08 | 8 | SOURCE | guest-physical address of the first byte to read |
//! | 0x10 | 8 | DESTINATION | guest-physical address of the first byte to write |
//! | 0x18 | 4 | LENGTH | bytes to copy, at most [`MAX_LENGTH`] |
//! | 0x1c | 4 | COMMAND | write-only: bit 0 starts a copy, bit 1 asks for an interrupt at its end, bit 2 takes the interrupt back |
//! | 0x20 | 4 | STATUS | 0 idle, 1 busy, 2 done, 3 failed; bit 8: the interrupt is asserted |
//! | 0x24 | 4 | COPIED | bytes that the last command copied |
//! | 0x28 | 8 | COMMANDS | commands that have ended since power-up |
//!
//! A copy that is started while one is busy is ignored. A copy fails where its ranges wrap, are too
//! long, or leave RAM (device registers, the device's own among them, are no RAM): what lies before
//! has been copied. The copy goes upwards in pieces that cross no page on either side; each piece is
//! read whole, then written as one event for the traces that it hits. Words of eight bytes whose
//! destination is aligned are written whole, so an aligned eight-byte copy is atomic. When STATUS
//! reads "done", every VCPU sees the bytes, and whoever was to be notified has been.
//!
//! The interrupt is level-triggered, active on I/O APIC pin [`PIN`] until taken back.

mod registers;

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::dma::{Dma, DmaPort, DmaThread};
use crate::lines::InterruptLines;
use crate::lock;
use crate::mmio::{Initiator, MmioDevice};
use registers::{Outcome, Registers, Transfer};

/// Guest-physical address of the registers.
pub const BASE: u64 = 0xfeb0_0000;
/// Bytes of the register range.
pub const LENGTH: u64 = 0x1000;
pub const IDENT: u32 = u32::from_le_bytes(*b"TDMA");
/// The longest copy in bytes.
pub const MAX_LENGTH: u32 = 16 << 20;
/// The I/O APIC's pin.
pub const PIN: u8 = 16;

const PAGE: u64 = 4096;

/// The device.
pub struct DmaProbe {
    /// Never held during a transfer: see [`crate::dma`].
    registers: Mutex<Registers>,
    started: Condvar,
    lines: InterruptLines,
}

impl DmaProbe {
    #[must_use]
    pub fn new(lines: InterruptLines) -> Arc<Self> {
        Arc::new(Self {
            registers: Mutex::default(),
            started: Condvar::new(),
            lines,
        })
    }

    /// Starts the thread that performs the transfers. It ends when the handle drops.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn spawn(self: &Arc<Self>, port: DmaPort) -> io::Result<DmaThread> {
        let (device, woken) = (Arc::clone(self), Arc::clone(self));
        DmaThread::spawn(
            "dma-probe",
            port,
            move || {
                // The thread looks at the flag and waits under the lock.
                drop(lock(&woken.registers));
                woken.started.notify_one();
            },
            move |dma| device.run(&dma),
        )
    }

    /// Back to the state after power-up; a transfer under way has no effect on the registers.
    pub fn reset(&self) {
        let mut registers = lock(&self.registers);
        *registers = registers.powered_up();
        self.lines.set(PIN, false);
    }

    fn run(&self, dma: &Dma) {
        while let Some(transfer) = self.next(dma) {
            let outcome = copy(dma, &transfer);
            let mut registers = lock(&self.registers);
            registers.finish(&transfer, outcome);
            self.lines.set(PIN, registers.interrupts());
        }
    }

    /// Waits for a transfer; `None` when the machine ends.
    fn next(&self, dma: &Dma) -> Option<Transfer> {
        let mut registers = lock(&self.registers);
        loop {
            if dma.stopping() {
                return None;
            }
            if let Some(transfer) = registers.take() {
                return Some(transfer);
            }
            registers = self
                .started
                .wait(registers)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Performs a transfer, holding no lock.
fn copy(dma: &Dma, transfer: &Transfer) -> Outcome {
    let total = u64::from(transfer.length);
    let fits = |start: u64| start.checked_add(total).is_some();
    if transfer.length > MAX_LENGTH || !fits(transfer.source) || !fits(transfer.destination) {
        return Outcome::failed(0);
    }
    let mut piece = [0; PAGE as usize];
    let mut done = 0;
    while done < total {
        let (from, to) = (transfer.source + done, transfer.destination + done);
        let room = |at: u64| PAGE - at % PAGE;
        let step = (total - done).min(room(from)).min(room(to));
        let bytes = &mut piece[..step as usize];
        if dma.stopping() || !dma.read(from, bytes) || !dma.write(to, bytes) {
            return Outcome::failed(done as u32);
        }
        done += step;
    }
    Outcome::done(total as u32)
}

impl MmioDevice for DmaProbe {
    fn read(&self, _: Initiator, offset: u64, data: &mut [u8]) {
        let image = lock(&self.registers).image();
        for (n, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset.wrapping_add(n as u64)).ok();
            let known = at.and_then(|at| image.get(at));
            *byte = known.copied().unwrap_or(0);
        }
    }

    fn write(&self, _: Initiator, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(4) {
            return;
        }
        let mut registers = lock(&self.registers);
        for (n, word) in data.chunks_exact(4).enumerate() {
            let value = word.iter().rev().fold(0, |sum, &b| sum << 8 | u32::from(b));
            registers.write(offset.wrapping_add(4 * n as u64), value);
        }
        self.lines.set(PIN, registers.interrupts());
        let waiting = registers.is_waiting();
        drop(registers);
        if waiting {
            self.started.notify_one();
        }
    }
}

#[cfg(test)]
mod tests;
