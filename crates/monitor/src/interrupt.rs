//! How interrupts reach a sub-VMM: the two directions between a VCPU and its local APIC.

/// What a sub-VMM asks of its VCPU's local interrupt controller. Called from the VCPU's thread,
/// while other threads post interrupts to the same controller.
pub trait LocalInterrupts: Send + Sync {
    /// Whether a maskable interrupt could be taken now if RFLAGS.IF allowed it: the highest
    /// request's priority class is above the processor priority, or an external (8259) interrupt
    /// waits.
    fn pending(&self) -> bool;
    /// Takes the interrupt that [`Self::pending`] speaks of: its vector, now in service.
    fn acknowledge(&self) -> Option<u8>;
    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register (0x800 to 0x8ff).
    /// `None`: #GP(0).
    fn read_msr(&self, index: u32) -> Option<u64>;
    /// WRMSR of the same registers. `tsc` is the guest's time-stamp counter now. `None`: #GP(0).
    fn write_msr(&self, index: u32, value: u64, tsc: u64) -> Option<()>;
    /// CR8, 0 to 15.
    fn task_priority_class(&self) -> u8;
    /// MOV to CR8.
    fn set_task_priority_class(&self, class: u8);
    /// The APIC ID as CPUID leaf 1 shows it, 32 bits wide for x2APIC.
    fn id(&self) -> u32;
    /// INIT reached the VCPU: registers go to their reset values, the ID and the base stay.
    fn init(&self);
}

/// What a local APIC, or the machine, signals to a VCPU from any thread. Every signal makes the
/// VCPU look at its next instruction boundary and wakes it if it is halted.
pub trait VcpuSignals: Send + Sync {
    /// [`LocalInterrupts::pending`] may have become true.
    fn interrupt(&self);
    fn nmi(&self);
    fn init(&self);
    /// A start-up IPI with its vector; ignored unless the VCPU waits for one.
    fn startup(&self, vector: u8);
}
