//! The API socket: HTTP/1.1 with JSON on a Unix socket, in the manner of Cloud Hypervisor.
//!
//! One thread for each client, of whom there may be [`MOST_CLIENTS`]. A client that sends nonsense,
//! nothing, or goes away costs a thread for a while and nothing else.

mod http;
mod routes;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, fchmod};
use rustix::net::socket_with;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen};
use trapline_machine::console::remove_abandoned;
use trapline_machine::{Control, MachineError};

use http::{Answer, Connection};

/// Clients at the same time; others are told to come back later.
const MOST_CLIENTS: usize = 32;
/// How long a client may say nothing between two requests.
const IDLE: Duration = Duration::from_secs(60);
const WAITING_CLIENTS: i32 = 16;

/// A listening API socket. Its file is removed when this is dropped.
pub struct ApiSocket {
    path: PathBuf,
    inode: Option<u64>,
}

impl ApiSocket {
    /// Listens at `path`, for the user alone, and serves clients from now on.
    ///
    /// # Errors
    /// The host refuses the socket or a thread.
    pub fn open(path: &Path, control: &Arc<Control>) -> Result<Self, MachineError> {
        let refused = |source: io::Error| MachineError::Host {
            what: format!("to listen at {} for --api-socket", path.display()),
            remedy: "give a path of at most 107 bytes that can be written and that no other \
                     machine uses",
            source,
        };
        remove_abandoned(path);
        let listener = listen_at(path).map_err(refused)?;
        let socket = Self {
            path: path.to_owned(),
            inode: path.symlink_metadata().map(|m| m.ino()).ok(),
        };
        let control = Arc::clone(control);
        thread::Builder::new()
            .name("api socket".into())
            .spawn(move || accept(&listener, &control))
            .map_err(refused)?;
        Ok(socket)
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        // Someone else may have put their own socket there meanwhile.
        let inode = self.path.symlink_metadata().map(|m| m.ino()).ok();
        if inode.is_some() && inode == self.inode {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A socket file that never had other permissions than its user's: Linux takes them from the
/// socket when it is bound.
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let socket: OwnedFd = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &address)?;
    listen(&socket, WAITING_CLIENTS)?;
    Ok(socket.into())
}

fn accept(listener: &UnixListener, control: &Arc<Control>) {
    let clients = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // For example out of descriptors: do not spin.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        let counted = Arc::clone(&clients);
        if clients.fetch_add(1, Relaxed) >= MOST_CLIENTS {
            clients.fetch_sub(1, Relaxed);
            let busy = Answer::error(503, "there are too many clients; try again later");
            Connection::new(stream, IDLE).answer(&busy, false);
            continue;
        }
        let control = Arc::clone(control);
        let serve = move || {
            let leave = Leave(counted);
            converse(stream, &control);
            drop(leave);
        };
        // Without a thread the client is let go; the closure, dropped, does not count it.
        let started = thread::Builder::new()
            .name("api client".into())
            .spawn(serve);
        if started.is_err() {
            clients.fetch_sub(1, Relaxed);
        }
    }
}

/// Counts a client out, also when its thread panics.
struct Leave(Arc<AtomicUsize>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Answers a client's requests until it goes or says what cannot be understood.
fn converse(stream: UnixStream, control: &Control) {
    let mut connection = Connection::new(stream, IDLE);
    loop {
        match connection.request() {
            Ok(Some(request)) => {
                let answer = routes::answer(&request, control);
                if !connection.answer(&answer, request.keep_alive) || !request.keep_alive {
                    return;
                }
            }
            Ok(None) => return,
            Err(answer) => {
                connection.answer(&answer, false);
                return;
            }
        }
    }
}
