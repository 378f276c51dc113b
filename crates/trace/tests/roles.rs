//! Who is told what: the seed's figures 3 and 4, and the roles of everyone else.
#![cfg(not(feature = "shuttle"))]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use trapline_trace::statistics::RoleTotals;
use trapline_trace::{
    Actor, AlwaysSensed, Kind, Notice, Notification, Phase, Range, Semantics, Sense, TRACE,
    TraceId, TraceSystem, VcpuId, VcpuSet,
};

const A: VcpuId = VcpuId::new(0);
const B: VcpuId = VcpuId::new(1);
const C: VcpuId = VcpuId::new(2);
/// The actor of the figures; it traces nothing.
const E: VcpuId = VcpuId::new(4);
const VCPUS: usize = 6;

fn machine() -> TraceSystem {
    TraceSystem::new(VCPUS, Arc::new(AlwaysSensed))
}

fn establish(
    trace: &TraceSystem,
    range: (u64, u64),
    kind: Kind,
    sense: Sense,
    consumers: &[VcpuId],
) -> TraceId {
    let consumers: VcpuSet = consumers.iter().copied().collect();
    let range = Range::new(range.0, range.1);
    trace
        .establish(None, consumers, range, kind, sense, 0, &mut |_| {})
        .unwrap()
}

/// An access by `actor`, and what it is told itself.
fn access(trace: &TraceSystem, actor: Actor, spans: &[Range], sense: Sense) -> Vec<Notification> {
    let (mut told, mut performed) = (Vec::new(), 0);
    let handler = &mut |notice| {
        if let Notice::Notification(n) = notice {
            told.push(n);
        }
    };
    trace
        .access(actor, spans, sense, handler, &mut || performed += 1)
        .unwrap();
    assert_eq!(performed, 1);
    told
}

/// One byte is written.
fn write(trace: &TraceSystem, actor: VcpuId, at: u64) -> Vec<Notification> {
    access(
        trace,
        Actor::Vcpu(actor),
        &[Range::new(at, at + 1)],
        Sense::WRITE,
    )
}

/// What a VCPU finds at its next instruction boundary.
fn told(trace: &TraceSystem, vcpu: VcpuId) -> Vec<Notification> {
    let mut told = Vec::new();
    trace.boundary(vcpu, &mut |notice| {
        if let Notice::Notification(n) = notice {
            told.push(n);
        }
    });
    told
}

/// How often each VCPU finds itself told.
fn counts(trace: &TraceSystem) -> [usize; VCPUS] {
    std::array::from_fn(|n| told(trace, VcpuId::new(n)).len())
}

fn roles(trace: &TraceSystem) -> Vec<(u64, u64, u64)> {
    let roles = trace.totals().roles;
    let plain = |r: &RoleTotals| (r.actor, r.consumer, r.bystander);
    roles.iter().map(plain).collect()
}

/// \[0070\], \[0071\]: [m1, m2) is traced for VCPUa and VCPUc, [m3, m4) for VCPUb.
#[test]
fn figure_3() {
    let trace = machine();
    let (m1, m2, m3, m4) = (0x1000, 0x1800, 0x9000, 0xb010);
    establish(&trace, (m1, m2), Kind::Descriptor, Sense::WRITE, &[A, C]);
    establish(&trace, (m3, m4), Kind::Code, Sense::WRITE, &[B]);
    for at in [m1, m1 + 0x123, m2 - 1] {
        assert!(write(&trace, E, at).is_empty());
        assert_eq!(counts(&trace), [1, 0, 1, 0, 0, 0], "a write at {at:#x}");
    }
    assert_eq!(
        roles(&trace),
        [
            (0, 3, 0),
            (0, 0, 3),
            (0, 3, 0),
            (0, 0, 3),
            (3, 0, 3),
            (0, 0, 3)
        ]
    );
    // VCPUa as the actor is a consumer too, and is told at once.
    assert_eq!(write(&trace, A, m1).len(), 1);
    assert_eq!(counts(&trace), [0, 0, 1, 0, 0, 0]);
    for at in [m1 - 1, m2, m3 - 1, m4] {
        write(&trace, E, at);
        assert_eq!(counts(&trace), [0; VCPUS], "nothing is traced at {at:#x}");
    }
    write(&trace, E, m4 - 1);
    assert_eq!(counts(&trace), [0, 1, 0, 0, 0, 0]);
    assert_eq!(trace.totals().beside, 4);
}

/// \[0072\], by its table: [m1, m3) is traced for VCPUa, [m2, m4) for VCPUb, [m5, m6) for VCPUc.
#[test]
fn figure_4() {
    let trace = machine();
    let m = [0, 0x1100, 0x1200, 0x1300, 0x1400, 0x1500, 0x1600];
    establish(&trace, (m[1], m[3]), Kind::Descriptor, Sense::WRITE, &[A]);
    establish(&trace, (m[2], m[4]), Kind::Code, Sense::WRITE, &[B]);
    establish(&trace, (m[5], m[6]), Kind::Code, Sense::WRITE, &[C]);
    let table = [
        (m[1], m[2], [1, 0, 0, 0, 0, 0]),
        (m[2], m[3], [1, 1, 0, 0, 0, 0]),
        (m[3], m[4], [0, 1, 0, 0, 0, 0]),
        (m[4], m[5], [0, 0, 0, 0, 0, 0]),
        (m[5], m[6], [0, 0, 1, 0, 0, 0]),
    ];
    for (lo, hi, expected) in table {
        for at in [lo, hi - 1] {
            write(&trace, E, at);
            assert_eq!(counts(&trace), expected, "a write at {at:#x}");
        }
    }
    assert_eq!(
        roles(&trace),
        [
            (0, 4, 6),
            (0, 4, 6),
            (0, 2, 8),
            (0, 0, 10),
            (8, 0, 10),
            (0, 0, 10)
        ]
    );
    // Each region of an overlap has the semantics of its own kind.
    write(&trace, E, m[2]);
    assert_eq!(told(&trace, A)[0].semantics, Semantics::PostWriteSync);
    assert_eq!(told(&trace, B)[0].semantics, Semantics::Bracketing);
}

/// \[0074\]: one VCPU traces reads where another traces writes.
#[test]
fn reads_and_writes_of_the_same_bytes() {
    let trace = machine();
    establish(&trace, (0x1000, 0x1008), Kind::Watch, Sense::READ, &[A]);
    establish(&trace, (0x1000, 0x1008), Kind::Code, Sense::WRITE, &[B]);
    establish(&trace, (0x1000, 0x1008), Kind::Watch, Sense::BOTH, &[C]);
    let range = [Range::new(0x1004, 0x1006)];
    access(&trace, Actor::Vcpu(E), &range, Sense::READ);
    let (a, b, c) = (told(&trace, A), told(&trace, B), told(&trace, C));
    assert_eq!((a.len(), b.len(), c.len()), (1, 0, 1));
    assert_eq!((a[0].sense, a[0].written), (Sense::READ, range[0]));
    access(&trace, Actor::Vcpu(E), &range, Sense::WRITE);
    assert_eq!(counts(&trace), [0, 1, 1, 0, 0, 0]);
    // A read-modify-write is one event for each.
    access(&trace, Actor::Vcpu(E), &range, Sense::BOTH);
    assert_eq!(counts(&trace), [1, 1, 1, 0, 0, 0]);
}

#[test]
fn devices_and_debuggers_are_actors() {
    let trace = machine();
    establish(&trace, (0x1000, 0x1008), Kind::Code, Sense::WRITE, &[A, B]);
    for actor in [Actor::Device, Actor::Debugger] {
        access(&trace, actor, &[Range::new(0xfff, 0x1001)], Sense::WRITE);
        assert_eq!(told(&trace, A)[0].actor, actor);
        assert_eq!(counts(&trace), [0, 1, 0, 0, 0, 0]);
    }
    assert!(roles(&trace).iter().all(|(actor, _, _)| *actor == 0));
}

/// \[0075\].
#[test]
fn everyone_is_a_consumer_if_asked_for() {
    let trace = machine();
    establish(&trace, (0x1000, 0x1008), Kind::Code, Sense::WRITE, &[A]);
    trace.set_notify_all(true);
    assert_eq!(write(&trace, E, 0x1000).len(), 1);
    assert_eq!(counts(&trace), [1, 1, 1, 1, 0, 1]);
    write(&trace, E, 0x1008);
    assert_eq!(counts(&trace), [0; VCPUS]);
}

/// An access to two pages is one event for each region and contiguous piece.
#[test]
fn two_pages() {
    let trace = machine();
    let region = (0x1ff8, 0x5000);
    establish(&trace, region, Kind::Code, Sense::WRITE, &[A]);
    let (first, next, apart) = (
        Range::new(0x1ffc, 0x2000),
        Range::new(0x2000, 0x2004),
        Range::new(0x4000, 0x4004),
    );
    access(&trace, Actor::Vcpu(E), &[first, next], Sense::WRITE);
    let written: Vec<Range> = told(&trace, A).iter().map(|n| n.written).collect();
    assert_eq!(written, [Range::new(0x1ffc, 0x2004)]);
    access(&trace, Actor::Vcpu(E), &[first, apart], Sense::WRITE);
    let written: Vec<Range> = told(&trace, A).iter().map(|n| n.written).collect();
    assert_eq!(written, [first, apart]);
}

/// \[0081\]: the notice has the bytes, each piece its own, and comes before they are there.
#[test]
fn pre_write_value_has_the_bytes() {
    let trace = machine();
    trace.set_semantics(Kind::Watch, Semantics::PreWriteValue);
    establish(&trace, (0x1000, 0x5000), Kind::Watch, Sense::WRITE, &[A, E]);
    establish(&trace, (0x4000, 0x5000), Kind::Mmu, Sense::WRITE, &[A]);
    let spans = [Range::new(0x1ffe, 0x2000), Range::new(0x4000, 0x4003)];
    let written = AtomicBool::new(false);
    let mut own = Vec::new();
    let handler = &mut |notice| {
        if let Notice::Notification(n) = notice {
            own.push((n.value.map(|v| v.to_vec()), written.load(SeqCst)));
        }
    };
    let perform = &mut |phase: Phase<'_>| match phase {
        Phase::Foresee(value) => value.extend([1, 2, 3, 4, 5]),
        Phase::Perform => written.store(true, SeqCst),
    };
    trace
        .access_foreseen(Actor::Vcpu(E), &spans, Sense::WRITE, handler, perform)
        .unwrap();
    assert_eq!(
        own,
        [(Some(vec![1, 2]), false), (Some(vec![3, 4, 5]), false)]
    );
    let told = told(&trace, A);
    let values: Vec<_> = told.iter().map(|n| (n.kind, n.value.as_deref())).collect();
    assert_eq!(
        values,
        [
            (Kind::Watch, Some([1, 2].as_slice())),
            (Kind::Watch, Some([3, 4, 5].as_slice())),
            (Kind::Mmu, None)
        ]
    );
    // An actor that cannot tell.
    access(&trace, Actor::Vcpu(B), &spans[..1], Sense::WRITE);
    assert_eq!(self::told(&trace, A)[0].value, None);
}

#[test]
fn a_sleeper_with_many_notices_wakes() {
    let trace = Arc::new(machine());
    establish(&trace, (0x1000, 0x1008), Kind::Code, Sense::WRITE, &[A]);
    let sleeper = {
        let trace = Arc::clone(&trace);
        std::thread::spawn(move || {
            let mut found = 0;
            while found < 10_000 {
                trace.sleep(A, None);
                found += told(&trace, A).len();
                if trace.attention(A).take(2) != 0 {
                    found += told(&trace, A).len();
                    break;
                }
            }
            trace.enter_safe(A);
            found
        })
    };
    for _ in 0..10_000 {
        write(&trace, E, 0x1000);
    }
    trace.raise(A, 2);
    assert_eq!(sleeper.join().unwrap(), 10_000);
}

#[test]
fn a_hundred_thousand_traces_come_and_go() {
    let trace = machine();
    // Many on each page, overlapping, and a wide one over all of them.
    let range = |n: u64| (0x10_0000 + n * 40, 0x10_0000 + n * 40 + 60);
    let wide = establish(&trace, (0, 1 << 30), Kind::Watch, Sense::READ, &[C]);
    let ids: Vec<TraceId> = (0..100_000)
        .map(|n| establish(&trace, range(n), Kind::Code, Sense::WRITE, &[A]))
        .collect();
    assert_eq!(trace.region_count(), 100_001);
    write(&trace, E, range(50_000).0 + 5);
    assert_eq!(counts(&trace), [2, 0, 0, 0, 0, 0]);
    for id in &ids {
        trace.remove(A, *id);
        // Once more changes nothing.
        trace.remove(A, *id);
    }
    assert_eq!(trace.region_count(), 1);
    trace.remove(C, wide);
    write(&trace, E, range(50_000).0);
    assert_eq!(trace.region_count(), 0);
    assert_eq!(trace.attention(A).take(TRACE), 0);
}

#[test]
fn waits_are_counted_for_who_asked() {
    let trace = Arc::new(machine());
    establish(&trace, (0x1000, 0x1008), Kind::Code, Sense::WRITE, &[A, B]);
    establish(&trace, (0x2000, 0x2008), Kind::Mmu, Sense::WRITE, &[A]);
    // Sleepers acknowledge without a wait.
    write(&trace, E, 0x1000);
    trace.leave_safe(A);
    let stop = Arc::new(AtomicBool::new(false));
    let consumer = {
        let (trace, stop) = (Arc::clone(&trace), Arc::clone(&stop));
        std::thread::spawn(move || {
            while !stop.load(SeqCst) {
                told(&trace, A);
                std::thread::yield_now();
            }
            trace.enter_safe(A);
        })
    };
    write(&trace, E, 0x1000);
    write(&trace, E, 0x2000);
    stop.store(true, SeqCst);
    consumer.join().unwrap();
    let totals = trace.totals().kinds;
    let plain: Vec<_> = totals
        .iter()
        .map(|k| (k.kind, k.events, k.notifications, k.acknowledgements))
        .collect();
    assert_eq!(plain, [(Kind::Code, 2, 4, 4), (Kind::Mmu, 1, 1, 0)]);
    assert_eq!((totals[0].waits, totals[1].waits), (1, 0));
    assert!(totals[0].wait_p50_ns <= totals[0].wait_max_ns && totals[0].wait_max_ns > 0);
}
