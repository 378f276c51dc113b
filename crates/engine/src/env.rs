//! What the engine asks of the layer above: everything that leaves the processor.

use trapline_x86::CpuState;

use crate::access::Fault;
use crate::system_item::{Decoded, SystemItem};
use crate::tlb::{Access, Privilege, Tlb};

/// A guest-physical byte range that does not cross a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub gpa: u64,
    /// Bytes; 1 to 4096.
    pub len: u32,
}

/// Where a translated page lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// RAM at this host address (of the byte asked for), accessible directly. The translation has
    /// been entered into the TLB.
    Ram(*mut u8),
    /// RAM at this host address, but the access must go through [`Environment::sensed`]: some
    /// trace lies on the page.
    Sensed(*mut u8),
    /// No RAM: a device's registers, or a hole.
    Device,
}

/// The result of translating one linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address of the byte asked for.
    pub gpa: u64,
    pub backing: Backing,
}

/// The instruction has had no effect and must be started again from its first byte: while its
/// VCPU waited, something that it was derived from changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart;

/// A model-specific register that is not there, or a value that it does not take: #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrFault;

/// What lies around the processor of one VCPU.
///
/// Called on the VCPU's own thread while it executes an instruction. No method panics on anything
/// a guest does.
pub trait Environment {
    /// Translates the page of `linear` for an access, setting accessed and dirty bits, and enters
    /// it into the TLB where the access may be direct. Call only after a TLB miss. Setting those
    /// bits is a write that traces may cover, so it too may have to restart.
    fn translate(
        &mut self,
        cpu: &CpuState,
        tlb: &mut Tlb,
        linear: u64,
        privilege: Privilege,
        access: Access,
    ) -> Result<Translation, Fault>;

    /// Right before [`Self::sensed`] for a write whose bytes are known: those that will be written
    /// to the next of its spans. Traces may want to tell them before they are there (\[0081\]).
    fn announce(&mut self, bytes: &[u8]) {
        let _ = bytes;
    }

    /// Whether the VCPU may write these bytes of a traced page directly, since no trace covers
    /// them; then until a revocation of the page.
    fn may_write_beside(&mut self, _span: Span) -> bool {
        false
    }

    /// Performs an access to RAM that traces may cover. `perform` is called exactly once unless
    /// `Err(Restart)` is returned, then not at all. After a write the caller ends its block: the
    /// code that it executes may have changed. `rip` is the accessing instruction's address, for
    /// reports.
    fn sensed(
        &mut self,
        tlb: &mut Tlb,
        rip: u64,
        spans: &[Span],
        access: Access,
        perform: &mut dyn FnMut(),
    ) -> Result<(), Restart>;

    /// Runs `perform` while no other VCPU executes an instruction: a locked access that crosses a
    /// page.
    fn exclusive(
        &mut self,
        tlb: &mut Tlb,
        rip: u64,
        spans: &[Span],
        perform: &mut dyn FnMut(),
    ) -> Result<(), Restart>;

    /// Reads device registers; a hole reads as ones.
    fn device_read(&mut self, gpa: u64, data: &mut [u8]);
    /// Writes device registers; a write to a hole has no effect.
    fn device_write(&mut self, gpa: u64, data: &[u8]);

    /// IN: `size` is 1, 2 or 4 bytes.
    fn port_read(&mut self, port: u16, size: u8) -> u32;
    /// OUT: `size` is 1, 2 or 4 bytes.
    fn port_write(&mut self, port: u16, size: u8, value: u32);

    /// The value that RDTSC reads.
    fn tsc(&mut self, cpu: &CpuState) -> u64;
    /// CPUID: eax, ebx, ecx, edx.
    fn cpuid(&mut self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4];
    /// RDMSR.
    fn msr_read(&mut self, cpu: &CpuState, index: u32) -> Result<u64, MsrFault>;
    /// WRMSR.
    fn msr_write(
        &mut self,
        cpu: &mut CpuState,
        tlb: &mut Tlb,
        index: u32,
        value: u64,
    ) -> Result<(), MsrFault>;
    /// The task priority in CR8's form, 0 to 15.
    fn cr8_read(&mut self) -> u64;
    /// MOV to CR8, `value` 0 to 15.
    fn cr8_write(&mut self, value: u64);

    /// The item at `linear`, if the environment keeps it decoded or wants to from now on; `None`
    /// tells the engine to read and decode it itself. What is returned is what a read with
    /// [`Privilege::Supervisor`] at this moment gives, or gave at an earlier moment that the guest
    /// cannot tell from this one. No translation obtained before the call may be used after it: a
    /// trace may have come to lie on its page.
    ///
    /// # Errors
    /// Page faults, restart.
    fn shadowed(
        &mut self,
        _cpu: &CpuState,
        _tlb: &mut Tlb,
        _linear: u64,
        _item: SystemItem,
    ) -> Result<Option<Decoded>, Fault> {
        Ok(None)
    }

    /// Translations are about to be invalidated by the guest (MOV to CR3, INVLPG, INVPCID, a
    /// change of CR0 or CR4): everything queued for this VCPU that affects them is applied first
    /// (\[0085\] of the seed).
    fn before_flush(&mut self, tlb: &mut Tlb);

    /// Whether whoever runs the processor must have a look before its next instruction, though
    /// nothing has raised its attention word: an interrupt may have become deliverable.
    fn is_wanted(&self, _cpu: &CpuState) -> bool {
        false
    }

    /// Whether there may be an interrupt to take as soon as RFLAGS.IF allows.
    fn is_interrupt_due(&self) -> bool {
        false
    }

    /// The guest has executed many PAUSE instructions, so it spins. With more VCPUs than processors
    /// the thread may give up its turn.
    fn pause(&mut self);
}
