//! The sub-VMM of one VCPU: run loop, fault analysis, TLB fills, decoded code and its traces.

pub mod interrupt;
