//! Reading a file of `--stats`: of it, what concerns traces.

use std::collections::BTreeMap;

use serde::Deserialize;

/// The file. What it lacks counts as zero, so that files of older versions can be read.
#[derive(Debug, Deserialize)]
pub struct Stats {
    #[serde(default)]
    pub host_seconds: f64,
    /// What happened between each power-up or reset and its end.
    pub boots: Vec<Boot>,
}

#[derive(Debug, Deserialize)]
pub struct Boot {
    #[serde(default)]
    pub vcpus: Vec<Vcpu>,
    #[serde(default)]
    pub traces: Traces,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Vcpu {
    pub instructions: u64,
    pub running_seconds: f64,
    pub halted_seconds: f64,
    pub tlb_fills: u64,
    /// By kind.
    pub invalidations: BTreeMap<String, u64>,
    /// By kind.
    pub rederivations: BTreeMap<String, u64>,
    pub roles: Roles,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Roles {
    pub actor: u64,
    pub consumer: u64,
    pub bystander: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Traces {
    pub kinds: Vec<Kind>,
    pub beside: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Kind {
    pub kind: String,
    pub semantics: String,
    pub events: u64,
    pub notifications: u64,
    pub acknowledgements: u64,
    pub waits: Waits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Waits {
    pub count: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
}
