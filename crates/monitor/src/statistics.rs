//! What a sub-VMM counts.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::code_cache::CodeStatistics;
use crate::shadow_descriptors::DescriptorStatistics;
use crate::shadow_pages::ShadowStatistics;

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

/// What lock-step execution did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LockstepStatistics {
    /// Pieces of translated code that were compared with the stepping engine.
    pub compared: u64,
    /// Instructions that were stepped for that.
    pub instructions: u64,
    /// Instructions that were executed once, by the stepping engine.
    pub alone: u64,
    /// Pieces of translated code that were not compared because stepping met a device or a sensed
    /// access.
    pub given_up: u64,
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
    pub shadow: ShadowStatistics,
    pub descriptors: DescriptorStatistics,
    pub exits: Exits,
    /// In lock-step execution.
    pub lockstep: Option<LockstepStatistics>,
    /// Host time executing, without halts, in nanoseconds.
    pub running_ns: u64,
    /// Host time halted, in nanoseconds.
    pub halted_ns: u64,
}

#[derive(Default)]
struct Given {
    /// How often someone asked, and up to which request it was answered.
    asked: u64,
    answered: u64,
    statistics: VcpuStatistics,
}

/// Where a VCPU leaves its statistics when it is asked to. The mutex is a leaf.
#[derive(Default)]
pub struct LiveReport {
    given: Mutex<Given>,
    changed: Condvar,
}

impl LiveReport {
    fn lock(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks; the request's number. The caller raises the VCPU's attention word afterwards.
    pub fn ask(&self) -> u64 {
        let mut given = self.lock();
        given.asked += 1;
        given.asked
    }

    /// VCPU's side, when asked and before it stands still: answers all requests so far.
    pub fn give(&self, statistics: VcpuStatistics) {
        let mut given = self.lock();
        given.answered = given.asked;
        given.statistics = statistics;
        self.changed.notify_all();
    }

    /// Waits for the answer to a request, or until `patience` ends or the VCPU stands `still`;
    /// what was answered last.
    pub fn wait(
        &self,
        request: u64,
        patience: Duration,
        still: &dyn Fn() -> bool,
    ) -> VcpuStatistics {
        const LOOK: Duration = Duration::from_millis(10);
        let until = Instant::now() + patience;
        let mut given = self.lock();
        while given.answered < request && Instant::now() < until && !still() {
            given = self
                .changed
                .wait_timeout(given, LOOK)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        given.statistics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_reaches_whoever_asked() {
        let report = LiveReport::default();
        let request = report.ask();
        let statistics = VcpuStatistics {
            blocks: 7,
            ..VcpuStatistics::default()
        };
        std::thread::scope(|scope| {
            let asker = scope.spawn(|| report.wait(request, Duration::from_secs(60), &|| false));
            report.give(statistics);
            assert_eq!(asker.join().unwrap(), statistics);
        });
        let unanswered = report.ask();
        assert_eq!(report.wait(unanswered, Duration::ZERO, &|| false).blocks, 7);
        let minute = Duration::from_secs(60);
        assert_eq!(report.wait(unanswered, minute, &|| true).blocks, 7);
    }
}
