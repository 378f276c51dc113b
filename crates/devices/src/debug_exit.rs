//! The debug-exit port and the ports that firmware writes its progress to.

use std::io::Write;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};

use crate::events::{SystemEvent, SystemEvents};
use crate::lock;
use crate::port::PortDevice;

/// A write of a value ends the run with it.
pub struct DebugExit(Arc<dyn SystemEvents>);

impl DebugExit {
    pub const PORTS: RangeInclusive<u16> = 0xf4..=0xf7;

    #[must_use]
    pub fn new(events: Arc<dyn SystemEvents>) -> Self {
        Self(events)
    }
}

impl PortDevice for DebugExit {
    fn width(&self) -> u8 {
        4
    }
    fn read(&self, _: u16, _: u8) -> u32 {
        0
    }
    fn write(&self, port: u16, _: u8, value: u32) {
        if port == *Self::PORTS.start() {
            self.0.raise(SystemEvent::DebugExit(value));
        }
    }
}

/// Bytes written to port 0xe9 or 0x402 go to a sink; errors of the sink are the host's affair.
pub struct DebugConsole(Mutex<Box<dyn Write + Send>>);

impl DebugConsole {
    pub const PORTS: [RangeInclusive<u16>; 2] = [0xe9..=0xe9, 0x402..=0x402];

    #[must_use]
    pub fn new(sink: Box<dyn Write + Send>) -> Self {
        Self(Mutex::new(sink))
    }
}

impl PortDevice for DebugConsole {
    /// Port 0xe9 reads as itself: that is how software finds the console.
    fn read(&self, _: u16, _: u8) -> u32 {
        0xe9
    }
    fn write(&self, _: u16, _: u8, value: u32) {
        let mut sink = lock(&self.0);
        let _ = sink.write_all(&[value as u8]).and_then(|()| sink.flush());
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Remembers the events.
    #[derive(Default)]
    pub(crate) struct Log(pub Mutex<Vec<SystemEvent>>);

    impl Log {
        pub fn take(&self) -> Vec<SystemEvent> {
            std::mem::take(&mut *lock(&self.0))
        }
    }

    impl SystemEvents for Log {
        fn raise(&self, event: SystemEvent) {
            lock(&self.0).push(event);
        }
    }

    #[test]
    fn the_value_arrives() {
        let log = Arc::new(Log::default());
        let exit = DebugExit::new(log.clone());
        exit.write(0xf4, 4, 0x1234_5678);
        exit.write(0xf5, 1, 1);
        assert_eq!(log.take(), [SystemEvent::DebugExit(0x1234_5678)]);
    }
}
