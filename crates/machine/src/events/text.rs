//! Events as text: objects of the Chrome trace-event format. All text in them is of this file's
//! making, so nothing needs escaping.

use std::fmt::Write as _;

use trapline_trace::observer::Place;
use trapline_trace::{Range, Sense, VcpuSet};

use super::event::{Event, What};

/// The process that all tracks belong to.
const PID: u32 = 1;
/// Events of a track that wait for the notice that tells what they were for.
const MOST_PENDING: usize = 8;

/// The thread that a place's track is shown as.
fn tid(place: Place) -> usize {
    match place {
        Place::Vcpu(vcpu) => vcpu.index() + 1,
        Place::Device => 101,
        Place::Debugger => 102,
        Place::Machine => 103,
    }
}

fn name(place: Place) -> String {
    match place {
        Place::Vcpu(vcpu) => format!("VCPU {}", vcpu.index()),
        Place::Device => "devices".into(),
        Place::Debugger => "debugger".into(),
        Place::Machine => "machine".into(),
    }
}

/// Microseconds with the nanoseconds as fraction.
struct Micros(u64);

impl std::fmt::Display for Micros {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

struct Bytes(Range);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "\"{:#x}-{:#x}\"", self.0.lo, self.0.hi)
    }
}

struct Set(VcpuSet);

impl std::fmt::Display for Set {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[")?;
        for (n, vcpu) in self.0.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            write!(f, "{comma}{}", vcpu.index())?;
        }
        f.write_str("]")
    }
}

fn access(sense: Sense) -> &'static str {
    match (sense.read, sense.write) {
        (true, false) => "read",
        (false, true) => "write",
        _ => "access",
    }
}

/// What every file starts with: the names of the tracks.
pub fn head(places: &[Place]) -> String {
    let mut out = String::from("{\"traceEvents\":[\n");
    let _ = write!(
        out,
        r#"{{"ph":"M","pid":{PID},"tid":0,"name":"process_name","args":{{"name":"trapline"}}}}"#
    );
    for (n, place) in places.iter().enumerate() {
        let (tid, name) = (tid(*place), name(*place));
        let _ = write!(
            out,
            ",\n{{\"ph\":\"M\",\"pid\":{PID},\"tid\":{tid},\"name\":\"thread_name\",\"args\":{{\"name\":\"{name}\"}}}}\
             ,\n{{\"ph\":\"M\",\"pid\":{PID},\"tid\":{tid},\"name\":\"thread_sort_index\",\"args\":{{\"sort_index\":{n}}}}}"
        );
    }
    out
}

/// One track's state between two events.
struct Track {
    place: Place,
    /// What is known only in part until a notice is applied.
    pending: Vec<Event>,
    /// Drops shown so far.
    dropped: u64,
}

/// Turns events into text.
pub struct Writer {
    tracks: Vec<Track>,
    out: String,
    /// Power-ups so far.
    boot: u64,
    /// Events turned into text, without arrows.
    pub events: u64,
}

impl Writer {
    pub fn new(places: &[Place]) -> Self {
        let track = |place: &Place| Track {
            place: *place,
            pending: Vec::new(),
            dropped: 0,
        };
        Self {
            tracks: places.iter().map(track).collect(),
            out: String::new(),
            boot: 0,
            events: 0,
        }
    }

    /// The text since it was last taken, to stand behind [`head`].
    pub fn take(&mut self) -> String {
        std::mem::take(&mut self.out)
    }

    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// Adds an event of the track with this index.
    pub fn add(&mut self, track: usize, event: Event) {
        let Some(state) = self.tracks.get_mut(track) else {
            return;
        };
        match event.what {
            What::Stalled | What::Invalidated if state.pending.len() < MOST_PENDING => {
                return state.pending.push(event);
            }
            What::Notified | What::Revoked => {
                let place = state.place;
                for waiting in std::mem::take(&mut state.pending) {
                    self.write(place, &waiting, Some(&event));
                }
            }
            What::PowerUp => self.boot += 1,
            _ => {}
        }
        let place = self.tracks[track].place;
        self.write(place, &event, None);
    }

    /// Adds what still waits to be known better.
    pub fn finish(&mut self) {
        for track in 0..self.tracks.len() {
            let place = self.tracks[track].place;
            for waiting in std::mem::take(&mut self.tracks[track].pending) {
                self.write(place, &waiting, None);
            }
        }
    }

    /// Shows that, of a track's records, this many have been dropped by `at`.
    pub fn dropped(&mut self, track: usize, total: u64, at: u64) {
        let Some(state) = self.tracks.get_mut(track) else {
            return;
        };
        let more = total - state.dropped.min(total);
        if more == 0 {
            return;
        }
        state.dropped = total;
        let place = state.place;
        self.instant(place, "drop", "events dropped", at);
        let _ = write!(self.out, r#","args":{{"count":{more}}}}}"#);
    }

    fn begin(&mut self, place: Place, phase: char, category: &str, name: &str, at: u64) {
        let _ = write!(
            self.out,
            ",\n{{\"ph\":\"{phase}\",\"pid\":{PID},\"tid\":{},\"cat\":\"{category}\",\"name\":\"{name}\",\"ts\":{}",
            tid(place),
            Micros(at)
        );
    }

    /// An instant; the caller adds arguments and the closing brace.
    fn instant(&mut self, place: Place, category: &str, name: &str, at: u64) {
        self.begin(place, 'i', category, name, at);
        self.out.push_str(",\"s\":\"t\"");
    }

    /// A span; the caller adds arguments and the closing brace.
    fn span(&mut self, place: Place, category: &str, name: &str, event: &Event) {
        self.begin(place, 'X', category, name, event.span.start);
        let length = event.span.end.saturating_sub(event.span.start);
        let _ = write!(self.out, ",\"dur\":{}", Micros(length));
    }

    /// One end of an arrow from an actor to a consumer; the same number on both ends.
    fn arrow(&mut self, place: Place, phase: char, at: u64, sequence: u64, consumer: usize) {
        // JavaScript holds integers of 53 bits.
        let id = (self.boot << 44 | sequence << 6 | consumer as u64) & ((1 << 53) - 1);
        self.begin(place, phase, "notification", "notifies", at);
        let _ = write!(self.out, ",\"id\":{id}");
        self.out
            .push_str(if phase == 'f' { ",\"bp\":\"e\"}" } else { "}" });
    }

    /// Kind, semantics, region, bytes and actor of a trace event.
    fn notification(&mut self, event: &Event) {
        let _ = write!(
            self.out,
            r#""kind":"{}","semantics":"{}","region":{},"range":{},"actor":"{}","sequence":{}"#,
            event.kind,
            event.semantics,
            Bytes(event.region),
            Bytes(event.range),
            name(event.actor),
            event.sequence
        );
    }

    /// Writes an event; `cause` is the notice that came with it.
    fn write(&mut self, place: Place, event: &Event, cause: Option<&Event>) {
        self.events += 1;
        let kind = event.kind;
        match event.what {
            What::Acted => self.acted(place, event),
            What::Notified => {
                self.span(
                    place,
                    "notification",
                    &format!("{kind} notification"),
                    event,
                );
                self.out.push_str(",\"args\":{");
                self.notification(event);
                let _ = write!(self.out, r#","cookie":{}}}}}"#, event.cookie);
                if let Place::Vcpu(consumer) = place
                    && event.actor != place
                {
                    self.arrow(
                        place,
                        'f',
                        event.span.start,
                        event.sequence,
                        consumer.index(),
                    );
                }
            }
            What::Revoked => {
                self.span(place, "revocation", "revoke direct access", event);
                let _ = write!(
                    self.out,
                    r#","args":{{"access":"{}","range":{}}}}}"#,
                    access(event.sense),
                    Bytes(event.range)
                );
            }
            What::Stalled => {
                self.instant(place, "acknowledgement", "acknowledge", event.span.start);
                self.cause(cause);
                self.span(place, "stall", "stall", event);
                self.cause(cause);
            }
            What::Queued => {
                self.span(place, "queue", "wait for another actor", event);
                self.out.push('}');
            }
            What::Established => {
                self.span(place, "establish", &format!("trace {kind}"), event);
                let _ = write!(
                    self.out,
                    r#","args":{{"kind":"{kind}","access":"{}","region":{},"consumers":{},"awaited":{}}}}}"#,
                    access(event.sense),
                    Bytes(event.region),
                    Set(event.consumers),
                    Set(event.awaited)
                );
            }
            What::Removed => {
                self.instant(
                    place,
                    "remove",
                    &format!("untrace {kind}"),
                    event.span.start,
                );
                let _ = write!(
                    self.out,
                    r#","args":{{"kind":"{kind}","access":"{}","region":{}}}}}"#,
                    access(event.sense),
                    Bytes(event.region)
                );
            }
            What::Invalidated => {
                self.span(place, "invalidation", &format!("invalidate {kind}"), event);
                let _ = write!(
                    self.out,
                    r#","args":{{"kind":"{kind}","range":{},"count":{}"#,
                    Bytes(event.range),
                    event.amount
                );
                if let Some(cause) = cause.filter(|c| c.what == What::Notified) {
                    let _ = write!(
                        self.out,
                        r#","semantics":"{}","sequence":{}"#,
                        cause.semantics, cause.sequence
                    );
                }
                self.out.push_str("}}");
            }
            What::PowerUp => {
                self.begin(place, 'i', "machine", "power-up", event.span.start);
                let _ = write!(self.out, r#","s":"g","args":{{"boot":{}}}}}"#, self.boot);
            }
        }
    }

    fn acted(&mut self, place: Place, event: &Event) {
        let access = access(event.sense);
        self.span(place, "actor", &format!("{} {access}", event.kind), event);
        let _ = write!(self.out, r#","args":{{"access":"{access}","#);
        self.notification(event);
        let _ = write!(
            self.out,
            r#","consumers":{},"awaited":{},"waited_us":{},"cookie":{}}}}}"#,
            Set(event.consumers),
            Set(event.awaited),
            Micros(event.amount),
            event.cookie
        );
        for consumer in event.consumers.iter().filter(|c| Place::Vcpu(*c) != place) {
            self.arrow(
                place,
                's',
                event.span.start,
                event.sequence,
                consumer.index(),
            );
        }
    }

    /// The arguments of something that a notice tells the reason of.
    fn cause(&mut self, cause: Option<&Event>) {
        self.out.push_str(",\"args\":{");
        match cause {
            Some(event) if event.what == What::Notified => self.notification(event),
            Some(event) => {
                let _ = write!(
                    self.out,
                    r#""for":"a new trace","range":{}"#,
                    Bytes(event.range)
                );
            }
            None => {}
        }
        self.out.push_str("}}");
    }
}

/// What every file ends with. `facts` are further members of the object, as JSON.
pub fn tail(facts: &str) -> String {
    format!("\n],\"displayTimeUnit\":\"ns\",\"otherData\":{{{facts}}}}}\n")
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use trapline_trace::observer::Span;
    use trapline_trace::{Kind, Semantics, VcpuId};

    use super::*;

    const A: Place = Place::Vcpu(VcpuId::new(0));
    const B: Place = Place::Vcpu(VcpuId::new(1));

    fn event(what: What, start: u64, end: u64) -> Event {
        Event {
            kind: Kind::Code,
            semantics: Semantics::Bracketing,
            sense: Sense::WRITE,
            actor: A,
            region: Range::new(0x1000, 0x1010),
            range: Range::new(0x1004, 0x1008),
            sequence: 7,
            consumers: VcpuSet::from_bits(0b10),
            awaited: VcpuSet::from_bits(0b10),
            amount: 1,
            ..Event::plain(what, Span { start, end })
        }
    }

    /// The events of a file with these, without the names of tracks.
    fn parsed(add: impl FnOnce(&mut Writer)) -> Vec<Value> {
        let places = [A, B, Place::Machine];
        let mut writer = Writer::new(&places);
        add(&mut writer);
        writer.finish();
        let text = head(&places) + &writer.take() + &tail("\"vcpus\":2");
        let file: Value = serde_json::from_str(&text).expect(&text);
        assert_eq!(file["otherData"]["vcpus"], 2);
        let events = file["traceEvents"].as_array().unwrap();
        let names = events.iter().filter(|e| e["ph"] == "M").count();
        assert_eq!(names, 1 + 2 * places.len());
        events[names..].to_vec()
    }

    #[test]
    fn every_event_is_json() {
        let all = [
            What::Acted,
            What::Stalled,
            What::Invalidated,
            What::Notified,
            What::Revoked,
            What::Queued,
            What::Established,
            What::Removed,
            What::PowerUp,
        ];
        let events = parsed(|w| {
            all.iter().for_each(|what| w.add(1, event(*what, 5, 9)));
            w.dropped(1, 3, 10);
        });
        for category in [
            "actor",
            "acknowledgement",
            "stall",
            "invalidation",
            "notification",
            "revocation",
            "queue",
            "establish",
            "remove",
            "machine",
            "drop",
        ] {
            assert!(events.iter().any(|e| e["cat"] == category), "{category}");
        }
    }

    #[test]
    fn an_actor_says_who_is_told() {
        let events = parsed(|w| w.add(0, event(What::Acted, 1_234_567, 1_240_000)));
        assert_eq!(
            events[0],
            serde_json::json!({
                "ph": "X", "pid": 1, "tid": 1, "cat": "actor", "name": "code write",
                "ts": 1234.567, "dur": 5.433,
                "args": {
                    "access": "write", "kind": "code", "semantics": "bracketing",
                    "region": "0x1000-0x1010", "range": "0x1004-0x1008", "actor": "VCPU 0",
                    "sequence": 7, "consumers": [1], "awaited": [1], "waited_us": 0.001,
                    "cookie": 0,
                },
            })
        );
        assert_eq!(
            (&events[1]["ph"], &events[1]["id"]),
            (&"s".into(), &(7 << 6 | 1).into())
        );
    }

    #[test]
    fn a_stall_gets_its_reason_from_the_next_notice() {
        let events = parsed(|w| {
            w.add(1, event(What::Stalled, 1, 2));
            w.add(1, event(What::Invalidated, 3, 4));
            w.add(1, event(What::Notified, 3, 5));
            w.add(1, event(What::Stalled, 6, 7));
            w.add(1, event(What::Revoked, 8, 9));
        });
        let categories: Vec<_> = events.iter().map(|e| e["cat"].as_str().unwrap()).collect();
        assert_eq!(
            categories,
            [
                "acknowledgement",
                "stall",
                "invalidation",
                "notification",
                "notification",
                "acknowledgement",
                "stall",
                "revocation"
            ]
        );
        for event in &events[..3] {
            assert_eq!(event["args"]["semantics"], "bracketing", "{event}");
            assert_eq!(event["args"]["range"], "0x1004-0x1008", "{event}");
        }
        // Both ends of the arrow have the same number.
        assert_eq!(
            (&events[4]["ph"], &events[4]["id"]),
            (&"f".into(), &(7 << 6 | 1).into())
        );
        assert_eq!(events[6]["args"]["for"], "a new trace");
    }

    #[test]
    fn drops_are_shown_where_they_were_found() {
        let events = parsed(|w| {
            w.dropped(0, 2, 1);
            w.dropped(0, 2, 2);
            w.dropped(0, 5, 3);
        });
        let counts: Vec<_> = events.iter().map(|e| &e["args"]["count"]).collect();
        assert_eq!(counts, [2, 3]);
    }
}
