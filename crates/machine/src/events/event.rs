//! An event as it lies in a ring: a [`Record`] as words.

use trapline_trace::observer::{Place, Record, Span};
use trapline_trace::{Kind, Notice, Range, Semantics, Sense, VcpuId, VcpuSet};

use super::ring::WORDS;

/// What an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum What {
    Acted,
    Notified,
    Revoked,
    Stalled,
    Queued,
    Established,
    Removed,
    Invalidated,
    /// The machine starts anew.
    PowerUp,
}

impl What {
    const ALL: [Self; 9] = [
        Self::Acted,
        Self::Notified,
        Self::Revoked,
        Self::Stalled,
        Self::Queued,
        Self::Established,
        Self::Removed,
        Self::Invalidated,
        Self::PowerUp,
    ];
}

/// An event. Which fields mean something depends on `what`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    pub what: What,
    pub kind: Kind,
    pub semantics: Semantics,
    pub sense: Sense,
    pub actor: Place,
    pub span: Span,
    /// The trace's region.
    pub region: Range,
    /// The bytes accessed, or those that something was derived from.
    pub range: Range,
    pub sequence: u64,
    /// Consumers of the event or of the trace.
    pub consumers: VcpuSet,
    /// Those who had to be waited for.
    pub awaited: VcpuSet,
    /// Nanoseconds waited, or structures invalidated.
    pub amount: u64,
    /// What the trace's owner knows it by.
    pub cookie: u64,
}

/// Places that are no VCPU, as numbers above every VCPU's.
const PLACES: [Place; 3] = [Place::Device, Place::Debugger, Place::Machine];
const FIRST_PLACE: u8 = 64;

fn place_to_byte(place: Place) -> u8 {
    match place {
        Place::Vcpu(vcpu) => vcpu.index() as u8,
        Place::Device => FIRST_PLACE,
        Place::Debugger => FIRST_PLACE + 1,
        Place::Machine => FIRST_PLACE + 2,
    }
}

fn byte_to_place(byte: u8) -> Place {
    match byte.checked_sub(FIRST_PLACE) {
        None => Place::Vcpu(VcpuId::new(byte.into())),
        Some(n) => PLACES[usize::from(n) % PLACES.len()],
    }
}

const NOTHING: Range = Range::new(0, 0);

impl Event {
    /// An event of which only the time is known.
    pub fn plain(what: What, span: Span) -> Self {
        Self {
            what,
            kind: Kind::Code,
            semantics: Semantics::Bracketing,
            sense: Sense::default(),
            actor: Place::Machine,
            span,
            region: NOTHING,
            range: NOTHING,
            sequence: 0,
            consumers: VcpuSet::EMPTY,
            awaited: VcpuSet::EMPTY,
            amount: 0,
            cookie: 0,
        }
    }

    pub fn to_words(self) -> [u64; WORDS] {
        let bytes = [
            self.what as u8,
            self.kind as u8,
            self.semantics as u8,
            u8::from(self.sense.read) | u8::from(self.sense.write) << 1,
            place_to_byte(self.actor),
            0,
            0,
            0,
        ];
        [
            u64::from_le_bytes(bytes),
            self.span.start,
            self.span.end,
            self.region.lo,
            self.region.hi,
            self.range.lo,
            self.range.hi,
            self.sequence,
            self.consumers.bits(),
            self.awaited.bits(),
            self.amount,
            self.cookie,
        ]
    }

    /// The event that [`Self::to_words`] gave; `None` for words that it does not give.
    pub fn from_words(words: [u64; WORDS]) -> Option<Self> {
        let [what, kind, semantics, sense, actor, ..] = words[0].to_le_bytes();
        Some(Self {
            what: *What::ALL.get(usize::from(what))?,
            kind: *Kind::ALL.get(usize::from(kind))?,
            semantics: *Semantics::ALL.get(usize::from(semantics))?,
            sense: Sense {
                read: sense & 1 != 0,
                write: sense & 2 != 0,
            },
            actor: byte_to_place(actor),
            span: Span {
                start: words[1],
                end: words[2],
            },
            region: Range::new(words[3], words[4]),
            range: Range::new(words[5], words[6]),
            sequence: words[7],
            consumers: VcpuSet::from_bits(words[8]),
            awaited: VcpuSet::from_bits(words[9]),
            amount: words[10],
            cookie: words[11],
        })
    }
}

impl From<&Record> for Event {
    fn from(record: &Record) -> Self {
        match *record {
            Record::Acted {
                span,
                notification: ref n,
                sense,
                consumers,
                awaited,
                waited,
            } => Self {
                kind: n.kind,
                semantics: n.semantics,
                sense,
                actor: n.actor.into(),
                region: n.region,
                range: n.written,
                sequence: n.sequence,
                consumers,
                awaited,
                amount: waited,
                cookie: n.cookie,
                ..Self::plain(What::Acted, span)
            },
            Record::Applied {
                span,
                notice: Notice::Notification(ref n),
            } => Self {
                kind: n.kind,
                semantics: n.semantics,
                actor: n.actor.into(),
                region: n.region,
                range: n.written,
                sequence: n.sequence,
                cookie: n.cookie,
                ..Self::plain(What::Notified, span)
            },
            Record::Applied {
                span,
                notice: Notice::Revoke { page, sense },
            } => Self {
                sense,
                range: Range::new(page, page.saturating_add(4096)),
                ..Self::plain(What::Revoked, span)
            },
            Record::Stalled { span } => Self::plain(What::Stalled, span),
            Record::Queued { span } => Self::plain(What::Queued, span),
            Record::Established {
                span,
                range,
                kind,
                sense,
                consumers,
                held,
            } => Self {
                kind,
                sense,
                region: range,
                consumers,
                awaited: held,
                ..Self::plain(What::Established, span)
            },
            Record::Removed {
                at,
                range,
                kind,
                sense,
            } => Self {
                kind,
                sense,
                region: range,
                ..Self::plain(What::Removed, Span { start: at, end: at })
            },
            Record::Invalidated {
                span,
                range,
                kind,
                count,
            } => Self {
                kind,
                range,
                amount: count,
                ..Self::plain(What::Invalidated, span)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_every_field() {
        for what in What::ALL {
            for actor in [
                Place::Vcpu(VcpuId::new(63)),
                Place::Device,
                Place::Debugger,
                Place::Machine,
            ] {
                let event = Event {
                    kind: Kind::Watch,
                    semantics: Semantics::PreWriteValue,
                    sense: Sense::WRITE,
                    actor,
                    region: Range::new(1, 2),
                    range: Range::new(3, 4),
                    sequence: 5,
                    consumers: VcpuSet::from_bits(6),
                    awaited: VcpuSet::from_bits(7),
                    amount: 8,
                    cookie: 9,
                    ..Event::plain(what, Span { start: 10, end: 11 })
                };
                assert_eq!(Event::from_words(event.to_words()), Some(event));
            }
        }
        assert_eq!(Event::from_words([u64::MAX; WORDS]), None);
    }
}
