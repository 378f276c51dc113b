//! What a VCPU derived from guest memory: notices applied to it, traces established for it and
//! removed again.

use trapline_engine::env::Restart;
use trapline_engine::tlb::{Access, Tlb};
use trapline_memory::GuestMemory;
use trapline_trace::{Actor, Kind, Notice, Range, Sense, TraceId, TraceSystem, VcpuId, VcpuSet};

use super::Surroundings;
use crate::code_cache::CodeCache;
use crate::shadow_descriptors::ShadowDescriptors;
use crate::shadow_pages::ShadowPages;

/// A VCPU's derived structures, borrowed apart from the trace subsystem, which has notices for them.
pub(super) struct Derived<'a> {
    code: &'a mut CodeCache,
    shadow: &'a mut ShadowPages,
    descriptors: &'a mut ShadowDescriptors,
    tlb: &'a mut Tlb,
    pub memory: &'a GuestMemory,
    vcpu: VcpuId,
}

/// A new trace.
pub(crate) struct Established {
    pub id: TraceId,
    /// Notices were applied meanwhile: translations made before may be gone.
    pub noticed: bool,
}

impl Derived<'_> {
    /// Applies a notice: nothing else takes anything out of these structures because memory changed.
    pub fn apply(&mut self, notice: &Notice) {
        match notice {
            Notice::Notification(n) => match n.kind {
                Kind::Code if self.code.invalidate(n.written) => {
                    self.tlb.bump_epoch();
                    for rip in self.code.take_removed() {
                        self.tlb.remove_jump(rip);
                    }
                }
                // The TLB stays as it is until the guest flushes.
                Kind::Mmu => self.shadow.apply(n, |gpa, bytes| match bytes {
                    4 => self.memory.read_u32(gpa).map(u64::from),
                    _ => self.memory.read_u64(gpa),
                }),
                Kind::Descriptor => {
                    self.descriptors
                        .invalidate(n.written, n.actor != Actor::Vcpu(self.vcpu));
                }
                _ => {}
            },
            Notice::Revoke { page, sense } => {
                self.tlb.revoke(*page, Access::Write);
                if sense.read {
                    self.tlb.revoke(*page, Access::Read);
                    self.descriptors.reads_are_sensed(*page);
                }
                self.memory.release(self.vcpu, *page, *sense);
            }
        }
    }
}

impl Surroundings {
    pub(super) fn derived<'a>(&'a mut self, tlb: &'a mut Tlb) -> (&'a TraceSystem, Derived<'a>) {
        let derived = Derived {
            code: &mut self.code,
            shadow: &mut self.shadow,
            descriptors: &mut self.descriptors,
            tlb,
            memory: &self.memory,
            vcpu: self.vcpu,
        };
        (&self.trace, derived)
    }

    /// Establishes a trace of this VCPU alone on writes to what it is about to derive from.
    ///
    /// # Errors
    /// The instruction must start again.
    pub(crate) fn trace_writes(
        &mut self,
        tlb: &mut Tlb,
        range: Range,
        kind: Kind,
    ) -> Result<Established, Restart> {
        let vcpu = self.vcpu;
        let (trace, mut derived) = self.derived(tlb);
        let mut noticed = false;
        let established = trace.establish(
            Some(vcpu),
            VcpuSet::one(vcpu),
            range,
            kind,
            Sense::WRITE,
            0,
            &mut |notice| {
                noticed = true;
                derived.apply(&notice);
            },
        );
        match established {
            Ok(id) => Ok(Established { id, noticed }),
            Err(_) => Err(Restart),
        }
    }

    /// Removes the traces of derived structures that are gone.
    pub fn remove_released(&mut self) {
        for id in self.code.take_released() {
            self.trace.remove(self.vcpu, id);
        }
        self.remove_released_tables();
        self.remove_descriptor_traces();
    }

    /// Removes the traces of shadow descriptors that are gone.
    pub(crate) fn remove_descriptor_traces(&mut self) {
        for id in self.descriptors.take_released() {
            self.trace.remove(self.vcpu, id);
        }
    }

    /// Removes the traces of shadow page tables that are gone.
    pub(super) fn remove_released_tables(&mut self) {
        for id in self.shadow.take_released() {
            self.trace.remove(self.vcpu, id);
        }
    }

    /// Acknowledges and applies what the trace subsystem has for this VCPU, at an instruction
    /// boundary.
    pub fn boundary(&mut self, tlb: &mut Tlb) {
        let vcpu = self.vcpu;
        let (trace, mut derived) = self.derived(tlb);
        trace.boundary(vcpu, &mut |notice| derived.apply(&notice));
    }
}
