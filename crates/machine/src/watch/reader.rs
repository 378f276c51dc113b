//! Where the events of watches go: a bounded queue for whoever asks, and a thread that writes
//! lines.
//!
//! Whoever accesses watched memory only tries to put an event into a channel of fixed size; what
//! does not fit is counted. So neither a slow disk nor a client that never asks holds up a VCPU.
//! There are no locks on the actor's side.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use trapline_memory::watch::{WatchEvent, WatchSink};

use super::event;
use crate::outcome::MachineError;

/// Events that may wait for whoever reads them.
const WAITING: usize = 1 << 16;
/// Lines on standard error in one [`PERIOD`].
const LINES_PER_PERIOD: u64 = 500;
const PERIOD: Duration = Duration::from_secs(1);
/// Bytes of a `--watch-log` at most.
const LARGEST_LOG: u64 = 1 << 30;
/// How long the end of the run waits for what is still to be written.
const PATIENCE: Duration = Duration::from_secs(5);

struct Sender {
    channel: SyncSender<Arc<WatchEvent>>,
    dropped: Arc<AtomicU64>,
}

impl WatchSink for Sender {
    fn touched(&self, event: &Arc<WatchEvent>) {
        if let Err(TrySendError::Full(_)) = self.channel.try_send(Arc::clone(event)) {
            self.dropped.fetch_add(1, Relaxed);
        }
    }
}

fn channel() -> (
    Arc<dyn WatchSink>,
    Receiver<Arc<WatchEvent>>,
    Arc<AtomicU64>,
) {
    let (channel, events) = sync_channel(WAITING);
    let dropped = Arc::new(AtomicU64::new(0));
    let sender = Sender {
        channel,
        dropped: Arc::clone(&dropped),
    };
    (Arc::new(sender), events, dropped)
}

/// Events that wait for someone to take them.
pub struct WatchQueue {
    events: Mutex<Receiver<Arc<WatchEvent>>>,
    dropped: Arc<AtomicU64>,
}

impl WatchQueue {
    /// A queue, and the sink that fills it.
    pub fn new() -> (Self, Arc<dyn WatchSink>) {
        let (sink, events, dropped) = channel();
        let events = Mutex::new(events);
        (Self { events, dropped }, sink)
    }

    /// Takes up to `most` events, oldest first, with the number of those that found no room since
    /// this was last called.
    pub fn take(&self, most: usize) -> (Vec<Arc<WatchEvent>>, u64) {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = events.try_iter().take(most).collect();
        (taken, self.dropped.swap(0, Relaxed))
    }
}

/// Writes events as lines on a thread of its own.
pub struct WatchLog {
    writer: JoinHandle<()>,
}

impl WatchLog {
    /// Lines for a person on standard error, or one JSON object per line in the file `path`.
    ///
    /// # Errors
    /// The file cannot be created, or the host has no thread to give.
    pub fn start(path: Option<&Path>) -> Result<(Self, Arc<dyn WatchSink>), MachineError> {
        let file = path.map(|path| {
            File::create(path).map_err(|source| MachineError::Host {
                what: format!("to create {} for --watch-log", path.display()),
                remedy: "give a path that can be written",
                source,
            })
        });
        let file = file.transpose()?;
        let shown = path.map(|path| path.display().to_string());
        let (sink, events, dropped) = channel();
        let write = move || match file {
            Some(file) => to_file(file, &shown.unwrap_or_default(), &events, &dropped),
            None => to_standard_error(&events, &dropped),
        };
        let writer = thread::Builder::new().name("watch log".into()).spawn(write);
        let writer = writer.map_err(|source| MachineError::Host {
            what: "a thread for the watches".into(),
            remedy: "raise the limit of processes",
            source,
        })?;
        Ok((Self { writer }, sink))
    }

    /// Waits, not for ever, until everything is written. The sink has been let go before.
    pub fn finish(self) {
        let until = Instant::now() + PATIENCE;
        while !self.writer.is_finished() && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Says something. If nobody can read it, there is nobody to tell.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "trapline: {text}");
}

fn to_standard_error(events: &Receiver<Arc<WatchEvent>>, dropped: &AtomicU64) {
    let (mut shown, mut hidden, mut since) = (0, 0, Instant::now());
    loop {
        let next = events.recv_timeout(PERIOD);
        if since.elapsed() >= PERIOD || next == Err(RecvTimeoutError::Disconnected) {
            hidden += dropped.swap(0, Relaxed);
            if hidden > 0 {
                say(&format!(
                    "watch: {hidden} more accesses are not shown; give --watch-log PATH for them"
                ));
            }
            (shown, hidden, since) = (0, 0, Instant::now());
        }
        match next {
            Ok(event) if shown < LINES_PER_PERIOD => {
                shown += 1;
                say(&event::line(&event));
            }
            Ok(_) => hidden += 1,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn to_file(file: File, path: &str, events: &Receiver<Arc<WatchEvent>>, dropped: &AtomicU64) {
    let mut file = BufWriter::new(file);
    let (mut written, mut left_out) = (0, 0);
    let mut failed = false;
    let mut line = Vec::new();
    loop {
        let event = match events.try_recv() {
            Ok(event) => event,
            Err(_) => {
                // Nothing waits: what there is goes out before the next wait.
                failed |= flush(&mut file, failed, path);
                match events.recv() {
                    Ok(event) => event,
                    Err(_) => break,
                }
            }
        };
        line.clear();
        // Nothing in it can fail, and a Vec takes everything.
        let _ = serde_json::to_writer(&mut line, &event::Object::of(&event));
        line.push(b'\n');
        written += line.len() as u64;
        if failed || written > LARGEST_LOG {
            left_out += 1;
        } else if let Err(error) = file.write_all(&line) {
            complain(path, &error);
            failed = true;
            left_out += 1;
        }
    }
    failed |= flush(&mut file, failed, path);
    left_out += dropped.load(Relaxed);
    if left_out > 0 {
        say(&format!("watch: {left_out} accesses are not in {path}"));
    }
    if failed {
        // What the buffer still holds cannot be written either.
        let _ = file.into_parts();
    }
}

/// Whether it failed now.
fn flush(file: &mut BufWriter<File>, failed: bool, path: &str) -> bool {
    if failed {
        return false;
    }
    match file.flush() {
        Ok(()) => false,
        Err(error) => {
            complain(path, &error);
            true
        }
    }
}

fn complain(path: &str, error: &io::Error) {
    say(&format!(
        "the watch log {path} cannot be written any more: {error}; the guest goes on without it"
    ));
}
