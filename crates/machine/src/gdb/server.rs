//! Listens for gdb and serves one client after the other.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use gdbstub::common::Signal;
use gdbstub::conn::{Connection, ConnectionExt};
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{GdbStub, MultiThreadStopReason};
use trapline_monitor::debug::StopCause;

use super::target::{Debugger, Ended, Stopped};
use crate::outcome::MachineError;

/// How often a running target is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// Where gdb connects: an address of this host with a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GdbAddress(String);

/// An address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no address for gdb; give ADDRESS:PORT or PORT, for example 127.0.0.1:1234")]
pub struct GdbAddressError(String);

impl FromStr for GdbAddress {
    type Err = GdbAddressError;
    fn from_str(text: &str) -> Result<Self, GdbAddressError> {
        let full = if text.parse::<u16>().is_ok() {
            format!("127.0.0.1:{text}")
        } else {
            text.into()
        };
        match full.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(Self(full)),
            _ => Err(GdbAddressError(text.into())),
        }
    }
}

impl fmt::Display for GdbAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A listening gdb stub. It serves the machine that runs now; a reset lets the client go.
pub struct GdbServer {
    listener: Arc<TcpListener>,
}

impl GdbServer {
    /// Listens.
    ///
    /// # Errors
    /// The host refuses the address.
    pub fn listen(address: &GdbAddress) -> Result<Self, MachineError> {
        let listener = TcpListener::bind(&address.0).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        let listener = listener.map_err(|source| MachineError::Host {
            what: format!("to listen at {address} for --gdb"),
            remedy: "give another ADDRESS:PORT",
            source,
        })?;
        Ok(Self {
            listener: Arc::new(listener),
        })
    }

    /// Serves clients on a thread of its own until the machine ends.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub fn serve(&self, mut debugger: Debugger) -> io::Result<thread::JoinHandle<()>> {
        let listener = Arc::clone(&self.listener);
        thread::Builder::new().name("gdb".into()).spawn(move || {
            while !debugger.has_ended() {
                match listener.accept() {
                    Ok((stream, peer)) => {
                        tracing::info!(target: "gdb", %peer, "connected");
                        session(&mut debugger, stream);
                        debugger.detach();
                    }
                    Err(_) => thread::sleep(Duration::from_millis(20)),
                }
            }
        })
    }
}

fn session(debugger: &mut Debugger, stream: TcpStream) {
    if stream
        .set_nodelay(true)
        .and_then(|()| stream.set_nonblocking(false))
        .is_err()
    {
        return;
    }
    if debugger.stop_all().is_err() {
        return;
    }
    match GdbStub::new(Client { stream, next: None }).run_blocking::<EventLoop>(debugger) {
        Ok(reason) => tracing::info!(target: "gdb", ?reason, "disconnected"),
        Err(error) => tracing::info!(target: "gdb", %error, "connection lost"),
    }
}

/// A connection that can be looked at without waiting.
struct Client {
    stream: TcpStream,
    next: Option<u8>,
}

impl Connection for Client {
    type Error = io::Error;
    fn write(&mut self, byte: u8) -> io::Result<()> {
        Write::write_all(&mut self.stream, &[byte])
    }
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        Write::write_all(&mut self.stream, bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Write::flush(&mut self.stream)
    }
}

impl ConnectionExt for Client {
    fn read(&mut self) -> io::Result<u8> {
        if let Some(byte) = self.next.take() {
            return Ok(byte);
        }
        let mut byte = [0];
        self.stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        if self.next.is_none() {
            let mut byte = [0];
            self.stream.set_nonblocking(true)?;
            let result = Read::read(&mut self.stream, &mut byte);
            self.stream.set_nonblocking(false)?;
            match result {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => self.next = Some(byte[0]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok(self.next)
    }
}

struct EventLoop;

impl BlockingEventLoop for EventLoop {
    type Target = Debugger;
    type Connection = Client;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut Debugger,
        client: &mut Client,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<Ended, io::Error>> {
        loop {
            if client
                .peek()
                .map_err(WaitForStopReasonError::Connection)?
                .is_some()
            {
                let byte = client.read().map_err(WaitForStopReasonError::Connection)?;
                return Ok(Event::IncomingData(byte));
            }
            if target.has_ended() {
                return Ok(Event::TargetStopped(MultiThreadStopReason::Exited(0)));
            }
            if let Some(stopped) = target.stopped() {
                target.stop_all().map_err(WaitForStopReasonError::Target)?;
                return Ok(Event::TargetStopped(reason(target, stopped)));
            }
            thread::sleep(LOOK);
        }
    }

    fn on_interrupt(target: &mut Debugger) -> Result<Option<Self::StopReason>, Ended> {
        target.stop_all()?;
        Ok(Some(MultiThreadStopReason::SignalWithThread {
            tid: Debugger::tid(0),
            signal: Signal::SIGINT,
        }))
    }
}

fn reason(target: &Debugger, stopped: Stopped) -> MultiThreadStopReason<u64> {
    let tid = Debugger::tid(stopped.vcpu);
    match stopped.cause {
        StopCause::Breakpoint => MultiThreadStopReason::SwBreak(tid),
        StopCause::Watchpoint(number) => match target.watchpoint(number) {
            Some((addr, kind)) => MultiThreadStopReason::Watch { tid, kind, addr },
            None => MultiThreadStopReason::SignalWithThread {
                tid,
                signal: Signal::SIGTRAP,
            },
        },
        StopCause::Stepped | StopCause::Asked | StopCause::Held => {
            MultiThreadStopReason::SignalWithThread {
                tid,
                signal: Signal::SIGTRAP,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(
            "1234".parse::<GdbAddress>().unwrap().to_string(),
            "127.0.0.1:1234"
        );
        assert!("[::1]:99".parse::<GdbAddress>().is_ok());
        for bad in ["", "host", "host:", ":1", "1:70000", "127.0.0.1:x"] {
            assert!(bad.parse::<GdbAddress>().is_err(), "{bad}");
        }
    }
}
