//! Guest memory by linear address, as a debugger sees it: without setting accessed bits.

use trapline_memory::GuestMemory;
use trapline_trace::{Actor, TraceSystem};
use trapline_x86::CpuState;
use trapline_x86::paging::{PhysicalMemory, Request, walk};

/// Page tables that are only read.
struct ReadOnly<'a>(&'a GuestMemory);

impl PhysicalMemory for ReadOnly<'_> {
    fn read_u64(&mut self, gpa: u64) -> Option<u64> {
        self.0.read_u64(gpa)
    }
    fn read_u32(&mut self, gpa: u64) -> Option<u32> {
        self.0.read_u32(gpa)
    }
    fn compare_exchange_u64(&mut self, _gpa: u64, old: u64, _new: u64) -> Result<(), u64> {
        Err(old)
    }
    fn compare_exchange_u32(&mut self, _gpa: u64, old: u32, _new: u32) -> Result<(), u32> {
        Err(old)
    }
}

/// The guest-physical address of a linear one; `None` if nothing is mapped there.
pub fn physical(cpu: &CpuState, memory: &GuestMemory, linear: u64) -> Option<u64> {
    let page = walk(cpu, &mut ReadOnly(memory), linear, Request::read(false)).ok()?;
    Some(page.gpa | (linear & 0xfff))
}

/// Splits a linear range at page boundaries.
fn pieces(linear: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let here = linear.wrapping_add(at as u64);
        let part = at..len.min(at + (4096 - (here & 0xfff) as usize));
        at = part.end;
        Some((here, part))
    })
}

/// Reads as many bytes as are mapped, from the start; how many.
pub fn read(cpu: &CpuState, memory: &GuestMemory, linear: u64, data: &mut [u8]) -> usize {
    let mut done = 0;
    for (here, part) in pieces(linear, data.len()) {
        match physical(cpu, memory, here) {
            Some(gpa) if memory.read(gpa, &mut data[part.clone()]) => done = part.end,
            _ => break,
        }
    }
    done
}

/// Writes bytes; whether all of them are mapped RAM.
pub fn write(
    cpu: &CpuState,
    memory: &GuestMemory,
    trace: &TraceSystem,
    linear: u64,
    data: &[u8],
) -> bool {
    pieces(linear, data.len()).all(|(here, part)| {
        physical(cpu, memory, here)
            .is_some_and(|gpa| memory.write(trace, Actor::Debugger, gpa, &data[part]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_stay_on_their_pages() {
        let all: Vec<_> = pieces(0xffe, 0x1004).collect();
        assert_eq!(
            all,
            [(0xffe, 0..2), (0x1000, 2..0x1002), (0x2000, 0x1002..0x1004)]
        );
    }
}
