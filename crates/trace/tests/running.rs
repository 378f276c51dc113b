//! A model check of the real protocol code, under shuttle's scheduler: a consumer that never stops
//! by itself is found by every actor, however close they follow each other.
#![cfg(feature = "shuttle")]

use std::sync::Arc;

use shuttle::sync::atomic::{AtomicBool, Ordering::SeqCst};
use shuttle::thread;
use trapline_trace::{
    Actor, AlwaysSensed, Kind, Notice, Range, Sense, TraceSystem, VcpuId, VcpuSet,
};

const L: Range = Range::new(0x1000, 0x1008);
const CONSUMER: VcpuId = VcpuId::new(0);
const WRITES: u32 = 3;

/// The consumer leaves its loop only when the last write is done: a request that is lost leaves
/// both waiting for each other.
fn consumer_that_spins() {
    let trace = Arc::new(TraceSystem::new(2, Arc::new(AlwaysSensed)));
    let set = VcpuSet::one(CONSUMER);
    trace
        .establish(None, set, L, Kind::Code, Sense::WRITE, 0, &mut |_| {})
        .expect("nobody else is there yet");
    trace.leave_safe(CONSUMER);
    let done = Arc::new(AtomicBool::new(false));
    let consumer = {
        let (trace, done) = (Arc::clone(&trace), Arc::clone(&done));
        thread::spawn(move || {
            let mut told = 0;
            let mut boundary = |trace: &TraceSystem| {
                trace.boundary(CONSUMER, &mut |notice| {
                    told += u32::from(matches!(notice, Notice::Notification(_)));
                });
            };
            while !done.load(SeqCst) {
                if trace.attention(CONSUMER).pending() {
                    boundary(&trace);
                }
                thread::yield_now();
            }
            boundary(&trace);
            trace.enter_safe(CONSUMER);
            told
        })
    };
    for _ in 0..WRITES {
        trace
            .access(Actor::Device, &[L], Sense::WRITE, &mut |_| {}, &mut || {})
            .expect("a device never restarts");
    }
    done.store(true, SeqCst);
    assert_eq!(consumer.join().expect("the consumer ends"), WRITES);
}

#[test]
fn no_request_is_lost() {
    let mut config = shuttle::Config::new();
    // A consumer that spins takes many steps; one that waits for ever takes more.
    config.max_steps = shuttle::MaxSteps::FailAfter(20_000);
    let scheduler = shuttle::scheduler::RandomScheduler::new(10_000);
    shuttle::Runner::new(scheduler, config).run(consumer_that_spins);
}
