//! Reading a file of `--events`. Every value is checked: the file may come from anywhere.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use trapline_trace::{Kind, MAX_VCPUS, Range, Semantics, VcpuSet};

use super::Fault;

/// What an event is, by its category.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Category {
    Actor,
    Notification,
    Invalidation,
    Acknowledgement,
    Stall,
    Queue,
    Revocation,
    Establish,
    Remove,
    Drop,
    Machine,
}

impl Category {
    pub const ALL: [(Self, &'static str); 11] = [
        (Self::Actor, "actor"),
        (Self::Notification, "notification"),
        (Self::Invalidation, "invalidation"),
        (Self::Acknowledgement, "acknowledgement"),
        (Self::Stall, "stall"),
        (Self::Queue, "queue"),
        (Self::Revocation, "revocation"),
        (Self::Establish, "establish"),
        (Self::Remove, "remove"),
        (Self::Drop, "drop"),
        (Self::Machine, "machine"),
    ];
}

/// Whose track an event is on: a VCPU by its number, or one of [`OTHERS`] behind the last VCPU.
pub type Track = u8;

/// The tracks behind those of the VCPUs, with their thread numbers in the file.
pub const OTHERS: [(&str, u32); 3] = [("devices", 101), ("debugger", 102), ("machine", 103)];

/// One event. Times are in nanoseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub category: Category,
    pub track: Track,
    pub start: u64,
    pub length: u64,
    pub kind: Option<Kind>,
    pub semantics: Option<Semantics>,
    /// Whether an access reads, not writes.
    pub read: bool,
    /// The trace's region.
    pub region: Option<Range>,
    /// The bytes accessed.
    pub range: Option<Range>,
    /// Connects a notification with what the actor did.
    pub sequence: Option<u64>,
    pub consumers: VcpuSet,
    pub awaited: VcpuSet,
    pub waited: u64,
    pub count: u64,
}

impl Event {
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }
}

/// A file's events, in order of their starts.
#[derive(Debug)]
pub struct Events {
    pub tool: String,
    pub vcpus: u8,
    pub memory_bytes: u64,
    pub dropped: u64,
    /// Why the file ended before the machine did.
    pub stopped: Option<String>,
    pub events: Vec<Event>,
}

impl Events {
    /// The names of the tracks.
    pub fn tracks(&self) -> Vec<String> {
        let vcpus = (0..self.vcpus).map(|n| format!("VCPU {n}"));
        vcpus
            .chain(OTHERS.iter().map(|(name, _)| (*name).to_owned()))
            .collect()
    }

    /// When the last event ended.
    pub fn end(&self) -> u64 {
        self.events.iter().map(Event::end).max().unwrap_or(0)
    }

    pub fn of(&self, category: Category) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(move |e| e.category == category)
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let file: RawFile<'_> = serde_json::from_slice(bytes)?;
        let facts = file.facts;
        if !facts.tool.starts_with("trapline ") {
            let tool: String = facts.tool.chars().take(40).collect();
            return Err(Fault::Malformed(format!("it was written by '{tool}'")));
        }
        if !(1..=MAX_VCPUS as u64).contains(&facts.vcpus) {
            let fault = format!("it names {} VCPUs", facts.vcpus);
            return Err(Fault::Malformed(fault));
        }
        let vcpus = facts.vcpus as u8;
        let mut events = Vec::with_capacity(file.events.0.len());
        for event in file.events.0 {
            let track = match event.tid {
                tid @ 1..=64 if tid <= u32::from(vcpus) => tid as u8 - 1,
                tid => OTHERS
                    .iter()
                    .position(|(_, other)| *other == tid)
                    .map(|n| vcpus + n as u8)
                    .ok_or_else(|| Fault::Malformed(format!("an event is on track {tid}")))?,
            };
            let mut event = event.event;
            event.track = track;
            events.push(event);
        }
        events.sort_by_key(|event| (event.start, std::cmp::Reverse(event.length)));
        Ok(Self {
            tool: facts.tool.into_owned(),
            vcpus,
            memory_bytes: facts.memory_bytes,
            dropped: facts.dropped,
            stopped: facts.stopped.map(|s| s.chars().take(200).collect()),
            events,
        })
    }
}

#[derive(Deserialize)]
struct RawFile<'a> {
    #[serde(rename = "traceEvents", borrow)]
    events: RawEvents<'a>,
    #[serde(rename = "otherData", borrow)]
    facts: Facts<'a>,
}

#[derive(Deserialize)]
struct Facts<'a> {
    #[serde(borrow)]
    tool: Cow<'a, str>,
    vcpus: u64,
    #[serde(default)]
    memory_bytes: u64,
    #[serde(default)]
    dropped: u64,
    #[serde(borrow)]
    stopped: Option<Cow<'a, str>>,
}

/// An event whose track is not known to exist yet.
struct Placed {
    tid: u32,
    event: Event,
}

/// The events, turned into small ones one by one: the file may be large.
struct RawEvents<'a>(Vec<Placed>, std::marker::PhantomData<&'a ()>);

impl<'de: 'a, 'a> Deserialize<'de> for RawEvents<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = Vec<Placed>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of events")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<Placed>, A::Error> {
                let mut events = Vec::new();
                while let Some(raw) = list.next_element::<Raw<'de>>()? {
                    events.extend(raw.checked().map_err(A::Error::custom)?);
                }
                Ok(events)
            }
        }
        deserializer
            .deserialize_seq(Each)
            .map(|events| Self(events, std::marker::PhantomData))
    }
}

#[derive(Deserialize)]
struct Raw<'a> {
    #[serde(borrow)]
    ph: Cow<'a, str>,
    #[serde(default)]
    tid: u32,
    #[serde(borrow)]
    cat: Option<Cow<'a, str>>,
    ts: Option<f64>,
    dur: Option<f64>,
    #[serde(borrow, default)]
    args: Arguments<'a>,
}

#[derive(Default, Deserialize)]
struct Arguments<'a> {
    #[serde(borrow)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow)]
    semantics: Option<Cow<'a, str>>,
    #[serde(borrow)]
    access: Option<Cow<'a, str>>,
    #[serde(borrow)]
    region: Option<Cow<'a, str>>,
    #[serde(borrow)]
    range: Option<Cow<'a, str>>,
    sequence: Option<u64>,
    #[serde(default)]
    consumers: Vec<u8>,
    #[serde(default)]
    awaited: Vec<u8>,
    waited_us: Option<f64>,
    #[serde(default)]
    count: u64,
}

/// Microseconds as nanoseconds.
fn nanoseconds(micros: f64) -> Result<u64, String> {
    // Beyond 2^53 nanoseconds, a hundred days, they would not be exact.
    let nanos = (micros * 1000.0).round();
    if (0.0..9_007_199_254_740_992.0).contains(&nanos) {
        Ok(nanos as u64)
    } else {
        Err(format!("{micros} is no time"))
    }
}

fn range(text: &str) -> Result<Range, String> {
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    text.split_once('-')
        .and_then(|(lo, hi)| Some(Range::new(number(lo)?, number(hi)?)))
        .filter(|range| !range.is_empty())
        .ok_or_else(|| {
            format!(
                "'{}' is no range",
                text.chars().take(40).collect::<String>()
            )
        })
}

fn set(vcpus: &[u8]) -> Result<VcpuSet, String> {
    vcpus.iter().try_fold(VcpuSet::EMPTY, |set, vcpu| {
        if usize::from(*vcpu) >= MAX_VCPUS {
            return Err(format!("there is no VCPU {vcpu}"));
        }
        Ok(VcpuSet::from_bits(set.bits() | 1 << vcpu))
    })
}

impl Raw<'_> {
    /// The event; `None` for what is there only to be shown: names and arrows.
    fn checked(self) -> Result<Option<Placed>, String> {
        let shown = matches!(&*self.ph, "X" | "i");
        let category = self.cat.as_deref().and_then(|category| {
            let mut all = Category::ALL.iter();
            all.find(|(_, name)| *name == category).map(|(c, _)| *c)
        });
        let (true, Some(category)) = (shown, category) else {
            return Ok(None);
        };
        let a = self.args;
        let event = Event {
            category,
            track: 0,
            start: nanoseconds(self.ts.ok_or("an event has no time")?)?,
            length: nanoseconds(self.dur.unwrap_or(0.0))?,
            kind: parsed(a.kind)?,
            semantics: parsed(a.semantics)?,
            read: a.access.as_deref() == Some("read"),
            region: a.region.as_deref().map(range).transpose()?,
            range: a.range.as_deref().map(range).transpose()?,
            sequence: a.sequence,
            consumers: set(&a.consumers)?,
            awaited: set(&a.awaited)?,
            waited: nanoseconds(a.waited_us.unwrap_or(0.0))?,
            count: a.count,
        };
        let complete = event.kind.is_some() && event.region.is_some() && event.range.is_some();
        if category == Category::Actor && !complete {
            return Err("an actor's event lacks its kind, region or range".into());
        }
        Ok(Some(Placed {
            tid: self.tid,
            event,
        }))
    }
}

fn parsed<T: std::str::FromStr>(word: Option<Cow<'_, str>>) -> Result<Option<T>, String>
where
    T::Err: fmt::Display,
{
    word.map(|word| word.parse().map_err(|e: T::Err| e.to_string()))
        .transpose()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A file with these events, on this many VCPUs.
    pub fn file(vcpus: u8, events: &str) -> Result<Events, Fault> {
        let text = format!(
            "{{\"traceEvents\":[{events}],\"otherData\":{{\"tool\":\"trapline 0\",\"vcpus\":{vcpus},\"memory_bytes\":65536,\"dropped\":0,\"stopped\":null}}}}"
        );
        Events::parse(text.as_bytes())
    }

    /// An actor's event as the file has it.
    pub fn acted(actor: u8, at: f64, region: (u64, u64), range: (u64, u64), to: &[u8]) -> String {
        format!(
            r#"{{"ph":"X","tid":{},"cat":"actor","name":"code write","ts":{at},"dur":2.5,"args":{{"access":"write","kind":"code","semantics":"bracketing","region":"{:#x}-{:#x}","range":"{:#x}-{:#x}","actor":"VCPU {actor}","sequence":3,"consumers":{to:?},"awaited":{to:?},"waited_us":1.25}}}}"#,
            actor + 1,
            region.0,
            region.1,
            range.0,
            range.1
        )
    }

    #[test]
    fn an_actors_event_is_read() {
        let file = file(
            2,
            &acted(0, 1.001, (0x1000, 0x1010), (0x1004, 0x1008), &[1]),
        )
        .unwrap();
        let expected = Event {
            category: Category::Actor,
            track: 0,
            start: 1001,
            length: 2500,
            kind: Some(Kind::Code),
            semantics: Some(Semantics::Bracketing),
            read: false,
            region: Some(Range::new(0x1000, 0x1010)),
            range: Some(Range::new(0x1004, 0x1008)),
            sequence: Some(3),
            consumers: VcpuSet::from_bits(0b10),
            awaited: VcpuSet::from_bits(0b10),
            waited: 1250,
            count: 0,
        };
        assert_eq!(file.events, [expected]);
        assert_eq!(file.end(), 3501);
    }

    #[test]
    fn what_is_only_shown_is_left_out() {
        let names = r#"{"ph":"M","pid":1,"tid":0,"name":"process_name","args":{"name":"x"}},
            {"ph":"s","pid":1,"tid":1,"cat":"notification","name":"notifies","ts":1,"id":5}"#;
        assert_eq!(file(1, names).unwrap().events, []);
    }

    #[test]
    fn impossible_values_are_refused() {
        let good = acted(0, 1.0, (0x1000, 0x1010), (0x1004, 0x1008), &[1]);
        assert!(file(2, &good).is_ok());
        for (from, to) in [
            ("0x1000-0x1010", "0x1010-0x1000"),
            ("0x1000-0x1010", "4096-4112"),
            ("0x1000-0x1010", "0x1-0xfffffffffffffffff"),
            ("\"ts\":1", "\"ts\":-1"),
            ("\"ts\":1", "\"ts\":1e300"),
            ("\"ts\":1", "\"when\":1"),
            ("\"tid\":1", "\"tid\":3"),
            ("\"tid\":1", "\"tid\":0"),
            ("[1]", "[64]"),
            ("[1]", "[1000]"),
            ("\"code\"", "\"<script>\""),
            ("bracketing", "perhaps"),
            ("\"kind\":\"code\",", ""),
        ] {
            let bad = good.replace(from, to);
            assert_ne!(bad, good, "{from}");
            assert!(file(2, &bad).is_err(), "{to}");
        }
    }
}
