//! The outer end of a serial line: where its output goes and its input comes from.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::outcome::MachineError;

/// How many pieces of input may wait for the guest; then whoever sends them waits.
const INPUT_PIECES: usize = 256;
/// The most bytes in one piece of input.
const PIECE_BYTES: usize = 4096;
/// A client that takes no output for this long is let go, so that it cannot hold up the guest.
const CLIENT_PATIENCE: Duration = Duration::from_secs(2);

/// What a serial device writes to and reads from. The machine owns it while it runs.
pub struct Console {
    /// Takes the guest's output; an error is not the guest's business and must not stop it.
    pub output: Box<dyn Write + Send>,
    /// Pieces of input in order, none empty; disconnected when there will be no more.
    pub input: Receiver<Vec<u8>>,
}

/// The sending side of a console's input.
#[derive(Clone, Debug)]
pub struct ConsoleInput(SyncSender<Vec<u8>>);

impl ConsoleInput {
    /// Hands bytes to the guest, waiting while it is behind. Returns whether the console still
    /// exists.
    pub fn send(&self, bytes: &[u8]) -> bool {
        bytes
            .chunks(PIECE_BYTES)
            .all(|piece| self.0.send(piece.to_vec()).is_ok())
    }

    /// As [`Self::send`], but drops what the guest is too far behind for.
    pub fn try_send(&self, bytes: &[u8]) -> bool {
        bytes.chunks(PIECE_BYTES).all(|piece| {
            let sent = self.0.try_send(piece.to_vec());
            !matches!(sent, Err(TrySendError::Disconnected(_)))
        })
    }
}

impl Console {
    /// A console with the given output and the sender of its input.
    pub fn new(output: impl Write + Send + 'static) -> (Self, ConsoleInput) {
        let (sender, input) = sync_channel(INPUT_PIECES);
        (
            Self {
                output: Box::new(output),
                input,
            },
            ConsoleInput(sender),
        )
    }

    /// Drops output, has no input.
    pub fn null() -> Self {
        Self::new(io::sink()).0
    }

    /// Output replaces the content of the file at `path`; no input.
    pub fn file(path: &Path) -> Result<Self, MachineError> {
        let file = File::create(path).map_err(|source| MachineError::Host {
            what: format!("to create {} for --serial", path.display()),
            remedy: "give a path that can be written",
            source,
        })?;
        Ok(Self::new(file).0)
    }

    /// Listens at `path` and serves one client after the other. Output without a client is lost.
    pub fn socket(path: &Path) -> Result<Self, MachineError> {
        let refused = |source| MachineError::Host {
            what: format!("to listen at {} for --serial", path.display()),
            remedy: "give a path that can be written and that no other machine uses",
            source,
        };
        remove_abandoned(path);
        let listener = UnixListener::bind(path).map_err(refused)?;
        let client: Arc<Mutex<Option<UnixStream>>> = Arc::default();
        let output = SocketOutput {
            client: client.clone(),
            path: path.to_owned(),
        };
        let (console, input) = Self::new(output);
        thread::Builder::new()
            .name("serial socket".into())
            .spawn(move || serve(&listener, &client, &input))
            .map_err(refused)?;
        Ok(console)
    }
}

/// Removes a socket at `path` that nobody listens on any more.
pub fn remove_abandoned(path: &Path) {
    let is_socket = path
        .symlink_metadata()
        .is_ok_and(|m| m.file_type().is_socket());
    let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    if is_socket && UnixStream::connect(path).is_err_and(refused) {
        // If it cannot be removed, bind says so.
        let _ = std::fs::remove_file(path);
    }
}

/// Accepts clients until the console is gone.
fn serve(listener: &UnixListener, client: &Mutex<Option<UnixStream>>, input: &ConsoleInput) {
    let set = |stream| *client.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    let mut buffer = [0; PIECE_BYTES];
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else {
            // For example out of descriptors: do not spin.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        let _ = stream.set_write_timeout(Some(CLIENT_PATIENCE));
        set(stream.try_clone().ok());
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    if !input.send(&buffer[..n]) {
                        return;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        set(None);
    }
}

/// Writes to whichever client is connected.
struct SocketOutput {
    client: Arc<Mutex<Option<UnixStream>>>,
    path: PathBuf,
}

impl Write for SocketOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = client.as_mut()
            && stream.write_all(bytes).is_err()
        {
            // Ends the read in `serve` too.
            let _ = stream.shutdown(Shutdown::Both);
            *client = None;
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for SocketOutput {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("trapline-console-{}-{name}", std::process::id()))
    }

    #[test]
    fn a_file_takes_the_output_and_gives_no_input() {
        let path = scratch("file");
        let mut console = Console::file(&path).unwrap();
        console.output.write_all(b"hello").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
        assert!(console.input.recv().is_err());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_socket_goes_both_ways_and_takes_a_second_client() {
        let path = scratch("socket");
        let mut console = Console::socket(&path).unwrap();
        console.output.write_all(b"lost").unwrap();
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"in").unwrap();
            // Input arrives after the client has been taken on.
            assert_eq!(console.input.recv().unwrap(), b"in");
            console.output.write_all(b"out").unwrap();
            let mut got = [0; 3];
            client.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"out");
        }
        drop(console);
        assert!(!path.exists());
    }

    #[test]
    fn an_abandoned_socket_is_replaced_but_one_in_use_is_not() {
        let path = scratch("abandoned");
        drop(UnixListener::bind(&path).unwrap());
        let console = Console::socket(&path).unwrap();
        assert!(matches!(
            Console::socket(&path),
            Err(MachineError::Host { .. })
        ));
        drop(console);
    }

    #[test]
    fn unwritable_places_are_the_hosts_refusal() {
        assert!(Console::file(Path::new("/nonexistent/x")).is_err());
        assert!(Console::socket(Path::new("/nonexistent/x")).is_err());
    }
}
