//! What a sub-VMM counts.

use crate::code_cache::CodeStatistics;

/// Times that guest execution left the engine, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exits {
    /// IN and OUT.
    pub port: u64,
    /// Device registers in memory.
    pub device: u64,
    pub msr: u64,
    pub cpuid: u64,
    /// Accesses to pages with traces.
    pub sensed: u64,
    /// Locked accesses that cross a page.
    pub split_locks: u64,
    pub halts: u64,
    /// Exceptions delivered.
    pub exceptions: u64,
    /// External interrupts delivered.
    pub interrupts: u64,
    /// Instructions that a helper executed for translated code and that left it.
    pub assists: u64,
    /// Instructions stepped between pieces of translated code.
    pub steps: u64,
    /// Host exceptions in translated code.
    pub host_faults: u64,
    /// Instructions started again because something changed while they waited.
    pub restarts: u64,
}

/// Totals of one VCPU, taken when it stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuStatistics {
    /// Guest instructions stepped to their end; translated code does not count.
    pub instructions: u64,
    /// Blocks entered from outside translated code.
    pub blocks: u64,
    pub translated_blocks: u64,
    /// Bytes of host code that they became.
    pub translated_bytes: u64,
    pub tlb_fills: u64,
    pub code: CodeStatistics,
    pub exits: Exits,
    /// Host time executing, without halts, in nanoseconds.
    pub running_ns: u64,
    /// Host time halted, in nanoseconds.
    pub halted_ns: u64,
}
