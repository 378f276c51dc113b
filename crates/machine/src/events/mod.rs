//! What `--events` writes: what the trace subsystem does, event by event, in the Chrome trace-event
//! format, which Perfetto and `trapline report` open.
//!
//! Every VCPU puts its events into a ring of its own, without waiting for anything; a writer
//! thread empties the rings, makes text of it and keeps the file a whole JSON object at every
//! moment. A ring that is full drops and counts. A file that cannot grow any more ends there, with
//! one warning; the machine goes on.
//!
//! No locks: see [`ring`] for the orderings. The writer is asked to finish through an atomic flag
//! and unparking.

mod event;
mod file;
mod ring;
mod text;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use trapline_trace::VcpuId;
use trapline_trace::observer::{Observer, Observing, Place, Record, Span};

use crate::outcome::MachineError;
use event::{Event, What};
use file::WholeFile;
use ring::Ring;
use text::Writer;

/// Records in a ring: what a VCPU can do between two looks of the writer, which gets no processor
/// for some milliseconds now and then.
const RING_RECORDS: usize = 1 << 14;
/// How long the writer rests when there is much to do, and when there is nothing.
const REST: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(16)];
/// Text is written in pieces of about this many bytes.
const PIECE: usize = 1 << 18;

/// Where events go, from any thread.
struct Recorder {
    epoch: Instant,
    vcpus: usize,
    /// One per VCPU, then one per other place.
    rings: Vec<Ring>,
    /// The file has ended: nothing is kept any more.
    stopped: AtomicBool,
    /// The machine has ended: the writer takes what there is and ends the file.
    finish: AtomicBool,
}

impl Recorder {
    fn ring(&self, place: Place) -> &Ring {
        let index = match place {
            Place::Vcpu(vcpu) => vcpu.index() % self.vcpus,
            Place::Device => self.vcpus,
            Place::Debugger => self.vcpus + 1,
            Place::Machine => self.vcpus + 2,
        };
        &self.rings[index]
    }

    fn push(&self, place: Place, event: Event) {
        let ring = self.ring(place);
        if self.stopped.load(Relaxed) {
            ring.drop_one();
        } else {
            ring.push(&event.to_words());
        }
    }

    fn dropped(&self) -> Vec<u64> {
        self.rings.iter().map(Ring::dropped).collect()
    }
}

impl Observer for Recorder {
    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn record(&self, place: Place, record: &Record) {
        self.push(place, Event::from(record));
    }
}

/// Records the events of a machine into a file, until it is dropped or finished.
pub struct EventLog {
    recorder: Arc<Recorder>,
    writer: Option<JoinHandle<Written>>,
}

/// What became of a log.
struct Written {
    events: u64,
    /// Why the file ended before the machine did.
    stopped: Option<String>,
}

impl EventLog {
    /// Makes the file and starts its writer.
    ///
    /// # Errors
    /// The file cannot be made, or the host has no thread to give.
    pub fn create(path: &Path, vcpus: u8, memory_bytes: u64) -> Result<Self, MachineError> {
        let vcpus = usize::from(vcpus.max(1));
        let others = [Place::Device, Place::Debugger, Place::Machine];
        let places: Vec<Place> = (0..vcpus)
            .map(|n| Place::Vcpu(VcpuId::new(n)))
            .chain(others)
            .collect();
        let recorder = Arc::new(Recorder {
            epoch: Instant::now(),
            vcpus,
            rings: places.iter().map(|_| Ring::new(RING_RECORDS)).collect(),
            stopped: AtomicBool::new(false),
            finish: AtomicBool::new(false),
        });
        let ending = Ending {
            vcpus,
            memory_bytes,
        };
        let file = WholeFile::create(path, ending.room()).map_err(|source| MachineError::Host {
            what: format!("to write {} for --events", path.display()),
            remedy: "give a path that can be written",
            source,
        })?;
        let mut scribe = Scribe {
            recorder: Arc::clone(&recorder),
            text: Writer::new(&places),
            file,
            ending,
            path: path.display().to_string(),
            written: 0,
            unwritten: vec![0; places.len()],
            stopped: None,
        };
        let head = text::head(&places);
        let writer = thread::Builder::new()
            .name("events".into())
            .spawn(move || scribe.run(&head))
            .map_err(|source| MachineError::Host {
                what: "a thread to write --events".into(),
                remedy: "raise the limit of processes",
                source,
            })?;
        Ok(Self {
            recorder,
            writer: Some(writer),
        })
    }

    /// To be given to a trace subsystem.
    pub fn observing(&self) -> Observing {
        Observing::from(Arc::clone(&self.recorder) as Arc<dyn Observer>)
    }

    /// Notes that a machine starts.
    pub fn power_up(&self) {
        let now = self.recorder.now();
        let span = Span {
            start: now,
            end: now,
        };
        self.recorder
            .push(Place::Machine, Event::plain(What::PowerUp, span));
    }

    fn end(&mut self) -> Option<Written> {
        let writer = self.writer.take()?;
        self.recorder.finish.store(true, Release);
        writer.thread().unpark();
        writer.join().ok()
    }

    /// Ends the file. What became of it, for the statistics.
    pub fn finish(mut self) -> Value {
        let written = self.end().unwrap_or(Written {
            events: 0,
            stopped: Some("internal error".into()),
        });
        let dropped = self.recorder.dropped();
        json!({
            "written": written.events,
            "dropped": dropped.iter().sum::<u64>(),
            "dropped_by_vcpu": dropped[..self.recorder.vcpus],
            "stopped": written.stopped,
        })
    }
}

impl Drop for EventLog {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the file says of itself at its end.
struct Ending {
    vcpus: usize,
    memory_bytes: u64,
}

impl Ending {
    /// Bytes that every [`Self::text`] finds room in.
    fn room(&self) -> usize {
        512 + 24 * self.vcpus
    }

    fn text(&self, events: u64, dropped: &[u64], stopped: Option<&io::Error>) -> String {
        let facts = json!({
            "tool": concat!("trapline ", env!("CARGO_PKG_VERSION")),
            "vcpus": self.vcpus,
            "memory_bytes": self.memory_bytes,
            "events": events,
            "dropped": dropped.iter().sum::<u64>(),
            "dropped_by_vcpu": dropped[..self.vcpus],
            "stopped": stopped.map(short),
        })
        .to_string();
        text::tail(facts.trim_start_matches('{').trim_end_matches('}'))
    }
}

/// An error in few words.
fn short(error: &io::Error) -> String {
    error.to_string().chars().take(80).collect()
}

/// The writer thread.
struct Scribe {
    recorder: Arc<Recorder>,
    text: Writer,
    file: WholeFile,
    ending: Ending,
    path: String,
    /// Events in the file.
    written: u64,
    /// Records of each track that are on their way into the file.
    unwritten: Vec<u64>,
    stopped: Option<io::Error>,
}

impl Scribe {
    fn run(&mut self, head: &str) -> Written {
        self.write(head);
        while self.stopped.is_none() {
            let finish = self.recorder.finish.load(Acquire);
            let busy = self.collect();
            if finish {
                self.text.finish();
                self.flush();
                break;
            }
            thread::park_timeout(REST[usize::from(!busy)]);
        }
        while !self.recorder.finish.load(Acquire) {
            thread::park();
        }
        if self.stopped.is_some() {
            // What came before it was known that there is no more room.
            self.drop_unwritten();
            for ring in &self.recorder.rings {
                ring.read(|_| ring.drop_one());
            }
        }
        let end = self.end_text();
        // On a device that failed nothing more can be done; it has been reported.
        let closed = self.file.close(&end);
        if let (Err(error), None) = (closed, &self.stopped) {
            self.stop(error);
        }
        Written {
            events: self.written,
            stopped: self.stopped.as_ref().map(short),
        }
    }

    /// Takes what is in the rings; whether that was much.
    fn collect(&mut self) -> bool {
        let recorder = Arc::clone(&self.recorder);
        let before = self.text.events;
        for (track, ring) in recorder.rings.iter().enumerate() {
            let dropped = ring.dropped();
            ring.read(|words| {
                if let Some(event) = Event::from_words(words) {
                    self.text.add(track, event);
                    self.unwritten[track] += 1;
                }
                if self.text.len() >= PIECE {
                    self.flush();
                }
            });
            self.text.dropped(track, dropped, recorder.now());
        }
        let much = self.text.events > before;
        if much {
            self.flush();
        }
        much
    }

    fn flush(&mut self) {
        let text = self.text.take();
        self.write(&text);
    }

    fn end_text(&self) -> String {
        let dropped = self.recorder.dropped();
        self.ending
            .text(self.written, &dropped, self.stopped.as_ref())
    }

    fn write(&mut self, text: &str) {
        if self.stopped.is_some() {
            return;
        }
        let before = std::mem::replace(&mut self.written, self.text.events);
        let end = self.end_text();
        if let Err(error) = self.file.append(text, &end) {
            self.written = before;
            self.drop_unwritten();
            self.stop(error);
            let end = self.end_text();
            // What is there already is made whole; if not even that is possible, it stays.
            let _ = self.file.close(&end);
        }
        self.unwritten.fill(0);
    }

    /// Counts what is on its way into the file as dropped.
    fn drop_unwritten(&mut self) {
        for (ring, lost) in self.recorder.rings.iter().zip(&mut self.unwritten) {
            ring.drop_some(std::mem::take(lost));
        }
    }

    /// Gives up the file, and says so once.
    fn stop(&mut self, error: io::Error) {
        tracing::warn!(
            target: "events",
            "{} takes no more events: {error}; the guest goes on without them",
            self.path
        );
        self.recorder.stopped.store(true, Relaxed);
        self.stopped = Some(error);
    }
}

#[cfg(test)]
mod tests {
    use trapline_trace::{Actor, AlwaysSensed, Kind, Range, Sense, TraceSystem, VcpuSet};

    use super::*;

    fn machine(log: &EventLog) -> TraceSystem {
        log.power_up();
        TraceSystem::new(2, Arc::new(AlwaysSensed)).observed(log.observing())
    }

    fn some_events(trace: &TraceSystem) {
        let range = Range::new(0x1000, 0x1010);
        let (a, b) = (VcpuId::new(0), VcpuId::new(1));
        let id = trace
            .establish(
                Some(b),
                VcpuSet::one(b),
                range,
                Kind::Code,
                Sense::WRITE,
                0,
                &mut |_| {},
            )
            .unwrap();
        let actor = Actor::Vcpu(a);
        trace
            .access(actor, &[range], Sense::WRITE, &mut |_| {}, &mut || {})
            .unwrap();
        trace.boundary(b, &mut |_| {});
        trace.remove(b, id);
    }

    fn read(path: &Path) -> Value {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn path(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("trapline-events-{}-{name}", std::process::id()))
    }

    #[test]
    fn a_run_is_in_the_file() {
        let path = path("run");
        let log = EventLog::create(&path, 2, 1 << 20).unwrap();
        some_events(&machine(&log));
        let facts = log.finish();
        // Power-up, establish, act, apply, remove.
        assert_eq!(facts["written"], 5);
        assert_eq!(facts["stopped"], Value::Null);
        let file = read(&path);
        assert_eq!(file["otherData"]["events"], 5);
        assert_eq!(file["otherData"]["memory_bytes"], 1 << 20);
        let events = file["traceEvents"].as_array().unwrap();
        let told: Vec<_> = events
            .iter()
            .filter(|e| e["name"] == "code notification")
            .map(|e| e["tid"].as_u64().unwrap())
            .collect();
        assert_eq!(told, [2]);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_log_that_is_dropped_leaves_a_whole_file() {
        let path = path("dropped");
        let log = EventLog::create(&path, 2, 1 << 20).unwrap();
        some_events(&machine(&log));
        drop(log);
        assert_eq!(read(&path)["otherData"]["events"], 5);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_full_device_ends_the_log_alone() {
        let log = EventLog::create(Path::new("/dev/full"), 2, 1 << 20).unwrap();
        let trace = machine(&log);
        while !log.recorder.stopped.load(Relaxed) {
            thread::yield_now();
        }
        some_events(&trace);
        let facts = log.finish();
        assert_eq!(facts["written"].as_u64(), Some(0));
        // Power-up among them, whether it came before the failure or after.
        assert_eq!(facts["dropped"].as_u64(), Some(5));
        let stopped = facts["stopped"].as_str().unwrap();
        assert!(stopped.contains("No space"), "{stopped}");
    }

    #[test]
    fn a_path_that_cannot_be_written_is_an_error() {
        let error = EventLog::create(Path::new("/nonexistent/e.json"), 1, 0).map(|_| ());
        let message = error.unwrap_err().to_string();
        assert!(
            message.contains("/nonexistent/e.json for --events"),
            "{message}"
        );
    }

    #[test]
    fn the_end_always_has_room() {
        let ending = Ending {
            vcpus: 64,
            memory_bytes: u64::MAX,
        };
        let error = io::Error::other("\"".repeat(200));
        let text = ending.text(u64::MAX, &[u64::MAX / 64; 64], Some(&error));
        assert!(text.len() <= ending.room(), "{}", text.len());
    }
}
