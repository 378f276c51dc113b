//! What `--stats` writes: one JSON object at exit.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use trapline_memory::GuestMemory;
use trapline_memory::sharing::PoolStatistics;
use trapline_monitor::shadow_pages::ShadowStatistics;
use trapline_monitor::statistics::VcpuStatistics;
use trapline_trace::TraceSystem;
use trapline_trace::statistics::{RoleTotals, Totals};

use crate::outcome::MachineError;

/// Totals over a run, resets included.
pub struct Report {
    start: Instant,
    file: Option<(PathBuf, File)>,
    runs: Vec<Value>,
    events: Value,
}

impl Report {
    /// Starts counting, for an object that [`Self::write`] writes to `path`.
    ///
    /// # Errors
    /// The file cannot be created. That is done here because a confined process cannot.
    pub fn start(path: Option<&Path>) -> Result<Self, MachineError> {
        let file = path
            .map(|path| {
                let file = File::create(path).map_err(|source| unwritable(path, source))?;
                Ok::<_, MachineError>((path.to_owned(), file))
            })
            .transpose()?;
        Ok(Self {
            start: Instant::now(),
            file,
            runs: Vec::new(),
            events: Value::Null,
        })
    }

    /// Adds what the machine did between power-up or reset and its end.
    pub fn add(
        &mut self,
        vcpus: Vec<VcpuStatistics>,
        trace: &TraceSystem,
        memory: &GuestMemory,
        pool: Option<PoolStatistics>,
    ) {
        self.runs.push(boot(&vcpus, trace, memory, pool));
    }

    /// Adds what became of the file of events.
    pub fn events(&mut self, events: Value) {
        self.events = events;
    }

    /// Writes the object, if it was asked for.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(self) -> Result<(), MachineError> {
        let Some((path, mut file)) = self.file else {
            return Ok(());
        };
        let object = json!({
            "host_seconds": self.start.elapsed().as_secs_f64(),
            "boots": self.runs,
            "events": self.events,
        });
        file.write_all(format!("{object:#}\n").as_bytes())
            .map_err(|source| unwritable(&path, source))
    }
}

fn unwritable(path: &Path, source: io::Error) -> MachineError {
    MachineError::Host {
        what: format!("to write {} for --stats", path.display()),
        remedy: "give a path that can be written",
        source,
    }
}

/// What a machine did since power-up or reset.
pub fn boot(
    vcpus: &[VcpuStatistics],
    trace: &TraceSystem,
    memory: &GuestMemory,
    pool: Option<PoolStatistics>,
) -> Value {
    let totals = trace.totals();
    let roles = |n| totals.roles.get(n).copied().unwrap_or_default();
    let vcpus = vcpus.iter().enumerate();
    let vcpus: Vec<Value> = vcpus.map(|(n, s)| vcpu(n, s, roles(n))).collect();
    json!({
        "vcpus": vcpus,
        "traces": traces(&totals),
        "sharing": sharing(memory, pool),
        "resident_bytes": memory.resident_bytes(),
        "host_pss_bytes": proportional_set_size(),
    })
}

fn vcpu(index: usize, s: &VcpuStatistics, roles: RoleTotals) -> Value {
    let e = &s.exits;
    // What was derived from memory, by kind of its trace: blocks of code, copies of page-table
    // entries, items of descriptor tables. Kinds from which nothing is derived are not there.
    let invalidations = json!({
        "code": s.code.invalidated_blocks,
        "mmu": s.shadow.invalidated_entries,
        "descriptor": s.descriptors.invalidated,
    });
    let rederivations = json!({
        "code": s.code.rederived_blocks,
        "mmu": s.shadow.updated_entries,
        "descriptor": s.descriptors.rederived,
    });
    json!({
        "vcpu": index,
        "instructions": s.instructions,
        "blocks": s.blocks,
        "host_seconds": (s.running_ns + s.halted_ns) as f64 / 1e9,
        "running_seconds": s.running_ns as f64 / 1e9,
        "halted_seconds": s.halted_ns as f64 / 1e9,
        "tlb_fills": s.tlb_fills,
        "shadow_pages": shadow(&s.shadow),
        "decoded_blocks": s.code.decoded_blocks,
        "decoded_bytes": s.code.decoded_bytes,
        "translated_blocks": s.translated_blocks,
        "translated_bytes": s.translated_bytes,
        "code_cache_drops": s.code.drops,
        "run_time_immediates": s.code.run_time_immediates,
        "revived_blocks": s.code.revived_blocks,
        "paths": s.code.paths,
        "stepped_rewrites": s.code.stepped_rewrites,
        "roles": {
            "actor": roles.actor,
            "consumer": roles.consumer,
            "bystander": roles.bystander,
        },
        "invalidations": invalidations,
        "rederivations": rederivations,
        "shadow_descriptors": {
            "hits": s.descriptors.hits,
            "unshadowed": s.descriptors.unshadowed,
            "derived": s.descriptors.derived,
            "rests": s.descriptors.rests,
        },
        "lockstep": s.lockstep.map(|l| json!({
            "compared": l.compared,
            "instructions": l.instructions,
            "alone": l.alone,
            "given_up": l.given_up,
        })),
        "exits": {
            "port": e.port,
            "device": e.device,
            "msr": e.msr,
            "cpuid": e.cpuid,
            "sensed": e.sensed,
            "split_locks": e.split_locks,
            "halts": e.halts,
            "exceptions": e.exceptions,
            "interrupts": e.interrupts,
            "restarts": e.restarts,
            "assists": e.assists,
            "steps": e.steps,
            "host_faults": e.host_faults,
        },
    })
}

/// What the shadow page tables did.
fn shadow(s: &ShadowStatistics) -> Value {
    json!({
        "hits": s.hits,
        "walks": s.walks,
        "traced_pages": s.traced_pages,
        "writes": s.writes,
        "untraced_pages": s.untraced_pages,
        "evicted_tables": s.evicted_tables,
        "flushes": s.flushes,
    })
}

/// What page sharing did: for this machine, and for all in the process. Null without it.
fn sharing(memory: &GuestMemory, pool: Option<PoolStatistics>) -> Value {
    let (Some(own), Some(pool)) = (memory.sharing_statistics(), pool) else {
        return Value::Null;
    };
    json!({
        "shared_pages": own.shared_pages,
        "zero_pages": own.zero_pages,
        "merged": own.merged,
        "unshared_by_write": own.unshared_by_write,
        "abandoned": own.abandoned,
        "pool": {
            "copies": pool.copies,
            "shared_pages": pool.shared_pages,
            "zero_pages": pool.zero_pages,
            "mappings": pool.mappings,
            "bytes_saved": pool.bytes_saved(),
        },
    })
}

/// The host memory that this process takes, a page that is mapped several times counted once.
/// `None` where the host does not say.
fn proportional_set_size() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

/// What the trace subsystem counted, per kind and semantics.
pub fn traces(totals: &Totals) -> Value {
    let kinds: Vec<Value> = totals
        .kinds
        .iter()
        .map(|k| {
            json!({
                "kind": k.kind.to_string(),
                "semantics": k.semantics.to_string(),
                "events": k.events,
                "notifications": k.notifications,
                "acknowledgements": k.acknowledgements,
                "waits": {
                    "count": k.waits,
                    "p50_ns": k.wait_p50_ns,
                    "p99_ns": k.wait_p99_ns,
                    "max_ns": k.wait_max_ns,
                },
            })
        })
        .collect();
    json!({ "kinds": kinds, "beside": totals.beside })
}
