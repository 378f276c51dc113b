//! A watch's event as text and as JSON.

use std::fmt::Write as _;

use serde::Serialize;
use trapline_memory::watch::WatchEvent;
use trapline_trace::Actor;

fn hex(bytes: &[u8], gap: &str) -> String {
    const DIGITS: [char; 16] = [
        '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
    ];
    let mut text = String::with_capacity(bytes.len() * (2 + gap.len()));
    for (n, byte) in bytes.iter().enumerate() {
        if n > 0 {
            text.push_str(gap);
        }
        text.push(DIGITS[usize::from(byte >> 4)]);
        text.push(DIGITS[usize::from(byte & 0xf)]);
    }
    text
}

/// Whoever accessed, in words.
fn actor(actor: Actor) -> String {
    match actor {
        Actor::Vcpu(vcpu) => format!("VCPU {}", vcpu.index()),
        Actor::Device => "a device (DMA)".into(),
        Actor::Debugger => "the debugger".into(),
    }
}

/// One line for a person.
pub fn line(event: &WatchEvent) -> String {
    let mut text = format!("watch {}: {}", event.watch, actor(event.actor));
    // Writing to a String cannot fail.
    if let Some(rip) = event.rip {
        let _ = write!(text, " at {rip:#x}");
    }
    let (verb, range) = (if event.write { "wrote" } else { "read" }, &event.range);
    let _ = write!(text, " {verb} {:#x}-{:#x}: ", range.lo, range.hi);
    text.push_str(&hex(event.old.bytes(), " "));
    if event.write {
        let _ = write!(text, " -> {}", hex(event.new.bytes(), " "));
    }
    if (event.old.bytes().len() as u64) < range.hi - range.lo {
        text.push_str(" (the first bytes)");
    }
    text
}

/// One object for a program. Addresses are strings: not every reader keeps 64 bits of a number.
#[derive(Serialize)]
pub struct Object<'e> {
    watch: &'e str,
    sequence: u64,
    time_ns: u64,
    actor: &'static str,
    vcpu: Option<usize>,
    rip: Option<String>,
    gpa: String,
    bytes: u64,
    access: &'static str,
    old: String,
    new: String,
}

impl<'e> Object<'e> {
    pub fn of(event: &'e WatchEvent) -> Self {
        let (actor, vcpu) = match event.actor {
            Actor::Vcpu(vcpu) => ("vcpu", Some(vcpu.index())),
            Actor::Device => ("device", None),
            Actor::Debugger => ("debugger", None),
        };
        Self {
            watch: &event.watch,
            sequence: event.sequence,
            time_ns: u64::try_from(event.time.as_nanos()).unwrap_or(u64::MAX),
            actor,
            vcpu,
            rip: event.rip.map(|rip| format!("{rip:#x}")),
            gpa: format!("{:#x}", event.range.lo),
            bytes: event.range.hi - event.range.lo,
            access: if event.write { "w" } else { "r" },
            old: hex(event.old.bytes(), ""),
            new: hex(event.new.bytes(), ""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_in_the_order_of_their_addresses() {
        assert_eq!(hex(&[0x0a, 0xff, 0], " "), "0a ff 00");
        assert_eq!(hex(&[0x0a, 0xff], ""), "0aff");
        assert_eq!(hex(&[], " "), "");
    }
}
