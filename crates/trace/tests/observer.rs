//! What an observer sees of the protocol.
#![cfg(not(feature = "shuttle"))]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;

use trapline_trace::observer::{Observer, Observing, Place, Record, Span};
use trapline_trace::{
    Actor, AlwaysSensed, Kind, Notice, Range, Semantics, Sense, TraceId, TraceSystem, VcpuId,
    VcpuSet,
};

const A: VcpuId = VcpuId::new(0);
const B: VcpuId = VcpuId::new(1);
const REGION: Range = Range::new(0x1000, 0x1010);
const WRITTEN: Range = Range::new(0x100c, 0x1014);

/// Keeps everything; its clock counts how often it was read.
#[derive(Default)]
struct Log {
    clock: AtomicU64,
    records: Mutex<Vec<(Place, Record)>>,
}

impl Observer for Log {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst)
    }
    fn record(&self, place: Place, record: &Record) {
        self.records.lock().unwrap().push((place, record.clone()));
    }
}

impl Log {
    fn take(&self) -> Vec<(Place, Record)> {
        std::mem::take(&mut self.records.lock().unwrap())
    }
}

fn observed() -> (Arc<Log>, TraceSystem) {
    let log = Arc::new(Log::default());
    let observing = Observing::from(Arc::clone(&log) as Arc<dyn Observer>);
    let trace = TraceSystem::new(3, Arc::new(AlwaysSensed)).observed(observing);
    (log, trace)
}

fn trace_code(trace: &TraceSystem, by: VcpuId) -> TraceId {
    trace
        .establish(
            Some(by),
            VcpuSet::one(by),
            REGION,
            Kind::Code,
            Sense::WRITE,
            0,
            &mut |_| {},
        )
        .unwrap()
}

fn write(trace: &TraceSystem, actor: Actor) {
    trace
        .access(actor, &[WRITTEN], Sense::WRITE, &mut |_| {}, &mut || {})
        .unwrap();
}

fn within(inner: Span, outer: Span) -> bool {
    outer.start < inner.start && inner.start < inner.end && inner.end < outer.end
}

#[test]
fn a_sleeper_is_notified_and_not_awaited() {
    let (log, trace) = observed();
    let id = trace_code(&trace, A);
    write(&trace, Actor::Vcpu(B));
    trace.boundary(A, &mut |_| {});
    trace.remove(A, id);
    let records = log.take();
    let [
        (
            Place::Vcpu(A),
            Record::Established {
                range: REGION,
                kind: Kind::Code,
                held: VcpuSet::EMPTY,
                ..
            },
        ),
        (
            Place::Vcpu(B),
            Record::Acted {
                span,
                notification,
                sense: Sense::WRITE,
                consumers,
                awaited: VcpuSet::EMPTY,
                ..
            },
        ),
        (
            Place::Vcpu(A),
            Record::Applied {
                span: applied,
                notice: Notice::Notification(received),
            },
        ),
        (Place::Machine, Record::Removed { range: REGION, .. }),
    ] = records.as_slice()
    else {
        panic!("{records:#?}");
    };
    assert_eq!(*consumers, VcpuSet::one(A));
    assert_eq!(received, notification);
    assert_eq!(
        (notification.written, notification.semantics),
        (WRITTEN, Semantics::Bracketing)
    );
    assert!(span.end < applied.start);
}

#[test]
fn an_actor_that_consumes_applies_within_its_own_span() {
    let (log, trace) = observed();
    trace_code(&trace, A);
    log.take();
    write(&trace, Actor::Vcpu(A));
    let records = log.take();
    let [
        (Place::Vcpu(A), Record::Applied { span: applied, .. }),
        (Place::Vcpu(A), Record::Acted { span, .. }),
    ] = records.as_slice()
    else {
        panic!("{records:#?}");
    };
    assert!(within(*applied, *span));
}

#[test]
fn a_running_consumer_is_seen_to_stall() {
    let (log, trace) = observed();
    trace_code(&trace, A);
    log.take();
    trace.leave_safe(A);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(SeqCst) {
                trace.boundary(A, &mut |_| {});
                thread::yield_now();
            }
            trace.enter_safe(A);
        });
        write(&trace, Actor::Debugger);
        done.store(true, SeqCst);
    });
    trace.boundary(A, &mut |_| {});
    let records = log.take();
    let find = |wanted: &dyn Fn(&Record) -> bool| {
        let mut found = records.iter().filter(|(_, record)| wanted(record));
        match (found.next(), found.next()) {
            (Some(one), None) => one.clone(),
            _ => panic!("{records:#?}"),
        }
    };
    let acted = find(&|r| matches!(r, Record::Acted { .. }));
    let stalled = find(&|r| matches!(r, Record::Stalled { .. }));
    let applied = find(&|r| matches!(r, Record::Applied { .. }));
    let (
        (Place::Debugger, Record::Acted { span, awaited, .. }),
        (Place::Vcpu(A), Record::Stalled { span: stall }),
        (Place::Vcpu(A), Record::Applied { span: applied, .. }),
    ) = (acted, stalled, applied)
    else {
        panic!("{records:#?}");
    };
    assert_eq!(awaited, VcpuSet::one(A));
    assert!(span.start < stall.start && stall.end < applied.start);
}

#[test]
fn an_access_to_two_regions_has_two_events_at_one_time() {
    let (log, trace) = observed();
    trace_code(&trace, A);
    trace
        .establish(
            Some(B),
            VcpuSet::one(B),
            Range::new(0x1012, 0x1020),
            Kind::Code,
            Sense::WRITE,
            0,
            &mut |_| {},
        )
        .unwrap();
    log.take();
    write(&trace, Actor::Device);
    let records = log.take();
    let [
        (Place::Device, Record::Acted { span: one, .. }),
        (Place::Device, Record::Acted { span: two, .. }),
    ] = records.as_slice()
    else {
        panic!("{records:#?}");
    };
    assert_eq!(one, two);
}

#[test]
fn a_device_register_has_an_actor_and_no_consumers() {
    let (log, trace) = observed();
    trace
        .establish(
            None,
            VcpuSet::EMPTY,
            REGION,
            Kind::Device,
            Sense::BOTH,
            7,
            &mut |_| {},
        )
        .unwrap();
    log.take();
    assert_eq!(
        trace.device_at(Actor::Vcpu(B), WRITTEN, Sense::READ),
        Some((7, REGION))
    );
    let records = log.take();
    assert!(
        matches!(
            records.as_slice(),
            [(
                Place::Vcpu(B),
                Record::Acted {
                    sense: Sense::READ,
                    consumers: VcpuSet::EMPTY,
                    ..
                }
            )]
        ),
        "{records:#?}"
    );
}

#[test]
fn accesses_beside_traces_are_not_recorded() {
    let (log, trace) = observed();
    trace_code(&trace, A);
    log.take();
    trace
        .access(
            Actor::Vcpu(B),
            &[Range::new(0x1010, 0x1018)],
            Sense::WRITE,
            &mut |_| {},
            &mut || {},
        )
        .unwrap();
    assert_eq!(log.take(), []);
}
