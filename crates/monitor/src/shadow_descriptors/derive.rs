//! Deriving an entry of the shadow tables: translate, protect, read.

use trapline_engine::access::Fault;
use trapline_engine::env::{Backing, Environment};
use trapline_engine::system_item::{Decoded, SystemItem};
use trapline_engine::tlb::{Access, Privilege, Tlb};
use trapline_trace::{Kind, Range};
use trapline_x86::CpuState;

use super::Known;
use crate::surroundings::Surroundings;

const PAGE: u64 = 4096;

impl Surroundings {
    /// The item at `linear`, which the cache by linear address does not hold: from the shadow
    /// tables, derived if it is not there. `None`: it is to be read by the engine, because its page
    /// rests, it crosses a page, lies in no RAM, or its reads are sensed.
    ///
    /// # Errors
    /// Page faults; restart.
    #[cold]
    pub(crate) fn shadow_descriptor(
        &mut self,
        cpu: &CpuState,
        tlb: &mut Tlb,
        linear: u64,
        item: SystemItem,
    ) -> Result<Option<Decoded>, Fault> {
        if (linear & (PAGE - 1)) + item.bytes() as u64 > PAGE {
            return Ok(None);
        }
        // Direct access to the page makes this VCPU a holder: it learns when reads become sensed.
        let gpa = match tlb.lookup(linear, Privilege::Supervisor, Access::Read) {
            Some(hit) => hit.gpa,
            None => {
                let found =
                    self.translate(cpu, tlb, linear, Privilege::Supervisor, Access::Read)?;
                match found.backing {
                    Backing::Ram(_) => found.gpa,
                    Backing::Sensed(_) | Backing::Device => return Ok(None),
                }
            }
        };
        match self.descriptors.look_up(tlb, linear, gpa, item) {
            Known::Shadow(decoded) => return Ok(Some(decoded)),
            Known::Resting => return Ok(None),
            Known::Unknown => {}
        }
        if self.descriptors.is_full() {
            self.descriptors.clear();
        }
        // A trace that waits for its removal would be given out again.
        self.remove_descriptor_traces();
        let range = Range::new(gpa, gpa + item.bytes() as u64);
        let trace = self.trace_descriptor(tlb, range)?;
        let (Some(low), Some(high)) = (
            self.read_value(gpa, item.bytes().min(8)),
            self.read_value(gpa + 8, item.bytes().saturating_sub(8)),
        ) else {
            self.trace.remove(self.vcpu, trace);
            return Ok(None);
        };
        let decoded = item.decode(low, high);
        self.descriptors.insert(gpa, item, trace, decoded);
        self.descriptors.look_up(tlb, linear, gpa, item);
        Ok(Some(decoded))
    }

    fn trace_descriptor(
        &mut self,
        tlb: &mut Tlb,
        range: Range,
    ) -> Result<trapline_trace::TraceId, Fault> {
        Ok(self.trace_writes(tlb, range, Kind::Descriptor)?.id)
    }

    /// Reads up to eight bytes within a page, eight aligned ones at once.
    fn read_value(&self, gpa: u64, bytes: usize) -> Option<u64> {
        if bytes == 8 && gpa.is_multiple_of(8) {
            return self.memory.read_u64(gpa);
        }
        let mut value = [0; 8];
        (bytes == 0 || self.memory.read(gpa, &mut value[..bytes]))
            .then(|| u64::from_le_bytes(value))
    }
}
