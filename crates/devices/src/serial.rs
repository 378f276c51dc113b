//! The 16550 serial line, with vm-superio's registers.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use crate::lines::{self, InterruptLines};
use crate::lock;
use crate::port::PortDevice;

/// Input beyond so many bytes that the guest did not read is dropped.
const BACKLOG: usize = 1 << 16;

/// IIR: no interrupt is pending.
const NONE_PENDING: u8 = 1;

/// The line follows the interrupt identification register, so the pulses mean nothing.
struct NoPulse;

impl Trigger for NoPulse {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// A sink whose errors end the output and not the guest: a reader that left is not the guest's
/// affair.
struct Output {
    sink: Option<Box<dyn Write + Send>>,
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.attempt(|sink| sink.write_all(data));
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.attempt(|sink| sink.flush());
        Ok(())
    }
}

impl Output {
    fn attempt(&mut self, operation: impl Fn(&mut Box<dyn Write + Send>) -> io::Result<()>) {
        let Some(sink) = &mut self.sink else {
            return;
        };
        if let Err(error) = operation(sink) {
            match error.kind() {
                // A terminal that takes nothing now may take more later.
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                _ => {
                    tracing::warn!(%error, "serial output ends");
                    self.sink = None;
                }
            }
        }
    }
}

type Registers = Serial<NoPulse, NoEvents, Output>;

/// The first serial line of a PC.
pub struct SerialLine {
    registers: Mutex<Registers>,
    backlog: Mutex<VecDeque<u8>>,
    lines: InterruptLines,
}

/// Feeds a serial line from any thread.
#[derive(Clone)]
pub struct SerialInput(Arc<SerialLine>);

impl SerialInput {
    /// Queues bytes for the guest, in order, without waiting for it or for the output. Returns how
    /// many were taken: the rest did not fit.
    pub fn push(&self, data: &[u8]) -> usize {
        let line = &self.0;
        let taken = {
            let mut backlog = lock(&line.backlog);
            let taken = data.len().min(BACKLOG.saturating_sub(backlog.len()));
            backlog.extend(data.iter().take(taken));
            taken
        };
        line.feed();
        taken
    }
}

impl SerialLine {
    pub const PORTS: RangeInclusive<u16> = 0x3f8..=0x3ff;

    #[must_use]
    pub fn new(output: Box<dyn Write + Send>, lines: InterruptLines) -> Arc<Self> {
        let output = Output { sink: Some(output) };
        Arc::new(Self {
            registers: Mutex::new(Serial::new(NoPulse, output)),
            backlog: Mutex::default(),
            lines,
        })
    }

    #[must_use]
    pub fn input(self: &Arc<Self>) -> SerialInput {
        SerialInput(Arc::clone(self))
    }

    /// The machine's reset: registers as after power-up; output and backlog stay.
    pub fn reset(&self) {
        let mut registers = lock(&self.registers);
        let sink = registers.writer_mut().sink.take();
        *registers = Serial::new(NoPulse, Output { sink });
        self.settle(&registers);
    }

    /// Moves input from the backlog to the receiver as far as it goes. Whoever holds the registers
    /// does it after letting go of them, so it suffices to try: nobody waits behind a slow output.
    fn feed(&self) {
        loop {
            fence(Ordering::SeqCst);
            let mut registers = match self.registers.try_lock() {
                Ok(registers) => registers,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            if !self.receive(&mut registers) {
                return;
            }
        }
    }

    /// Tells whether anything was received.
    fn receive(&self, registers: &mut MutexGuard<'_, Registers>) -> bool {
        let mut backlog = lock(&self.backlog);
        let room = registers.fifo_capacity();
        let data: Vec<u8> = backlog.iter().take(room).copied().collect();
        if data.is_empty() {
            return false;
        }
        // In loop mode nothing comes in from outside.
        let taken = registers.enqueue_raw_bytes(&data).unwrap_or(0);
        backlog.drain(..taken.min(data.len()));
        drop(backlog);
        self.settle(registers);
        taken > 0
    }

    /// INTR is active as long as the identification register shows an interrupt.
    fn settle(&self, registers: &Registers) {
        let pending = registers.state().interrupt_identification & NONE_PENDING == 0;
        self.lines.set(lines::SERIAL, pending);
    }
}

impl PortDevice for SerialLine {
    fn read(&self, port: u16, _: u8) -> u32 {
        let offset = (port & 7) as u8;
        let value = {
            let mut registers = lock(&self.registers);
            let value = registers.read(offset);
            self.settle(&registers);
            value
        };
        self.feed();
        u32::from(value)
    }

    fn write(&self, port: u16, _: u8, value: u32) {
        let offset = (port & 7) as u8;
        {
            let mut registers = lock(&self.registers);
            // Neither the trigger nor the output fails.
            let _ = registers.write(offset, value as u8);
            self.settle(&registers);
        }
        self.feed();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::board::Board;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }

    #[test]
    fn output_arrives_with_its_interrupt() {
        let board = Board::new();
        let sink = Shared::default();
        let serial = SerialLine::new(Box::new(sink.clone()), board.lines.clone());
        for byte in b"hi" {
            serial.write(0x3f8, 1, u32::from(*byte));
        }
        assert_eq!(*sink.0.lock().unwrap(), b"hi");
        assert!(board.interrupts().is_empty());
        serial.write(0x3f9, 1, 2);
        assert_eq!(board.interrupts(), [4]);
        assert_eq!(serial.read(0x3fa, 1), 0xc2);
        assert_eq!(serial.read(0x3fa, 1), 0xc1);
        serial.write(0x3f8, 1, 0x41);
        assert_eq!(board.interrupts(), [4], "the line fell in between");
    }

    #[test]
    fn long_input_waits_its_turn() {
        let board = Board::new();
        let serial = SerialLine::new(Box::new(io::sink()), board.lines.clone());
        let data: Vec<u8> = (0..1_000u32).map(|byte| byte as u8).collect();
        let input = serial.input();
        assert_eq!(input.push(&data), 1_000);
        serial.write(0x3f9, 1, 1);
        assert_eq!(board.interrupts(), [4]);
        let mut read = Vec::new();
        while serial.read(0x3fd, 1) & 1 != 0 {
            read.push(serial.read(0x3f8, 1) as u8);
        }
        assert_eq!(read, data);
        while serial.read(0x3fa, 1) & 1 == 0 {}
        board.interrupts();
        input.push(b"x");
        assert_eq!(board.interrupts(), [4]);
        assert_eq!(input.push(&vec![0; BACKLOG * 2]), BACKLOG);
    }

    #[test]
    fn a_broken_sink_does_not_disturb_the_guest() {
        let board = Board::new();
        let serial = SerialLine::new(Box::new(Broken), board.lines.clone());
        serial.write(0x3f9, 1, 2);
        for _ in 0..3 {
            serial.read(0x3fa, 1);
            serial.write(0x3f8, 1, 0x41);
            assert_eq!(serial.read(0x3fd, 1) & 0x60, 0x60);
        }
    }

    #[test]
    fn input_does_not_wait_for_a_slow_sink() {
        struct Slow(mpsc::Receiver<()>);
        impl Write for Slow {
            fn write(&mut self, data: &[u8]) -> io::Result<usize> {
                let _ = self.0.recv_timeout(Duration::from_secs(20));
                Ok(data.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let board = Board::new();
        let (release, blocked) = mpsc::channel();
        let serial = SerialLine::new(Box::new(Slow(blocked)), board.lines.clone());
        let input = serial.input();
        thread::scope(|scope| {
            let writer = scope.spawn(|| serial.write(0x3f8, 1, 0x41));
            while serial.registers.try_lock().is_ok() {
                thread::yield_now();
            }
            input.push(b"z");
            assert!(!writer.is_finished());
            release.send(()).unwrap();
        });
        assert_eq!(serial.read(0x3f8, 1), u32::from(b'z'));
    }
}
