//! Direct access beside traces: to bytes of a traced page that have none themselves, and to what is
//! left when a trace gives up a part of its range.

use std::sync::Arc;

use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use shuttle::thread;
use trapline_trace::mutation::Mutation;
use trapline_trace::{Kind, Notice, Range, Sense, Sensor, TraceSystem, VcpuId, VcpuSet};

use super::{A, B, L, boundary, check, fails, write};

/// Beside [`L`], on its page.
const M: Range = Range::new(0x1008, 0x1010);

/// One page: whether its writes are sensed, and who may write to all or a part of it directly.
#[derive(Default)]
struct Page {
    sensed: AtomicBool,
    holders: AtomicU64,
}

impl Sensor for Page {
    fn protect(&self, _gpa: u64, _sense: Sense) -> VcpuSet {
        self.sensed.store(true, SeqCst);
        VcpuSet::from_bits(self.holders.swap(0, SeqCst))
    }
    fn relax(&self, _gpa: u64, sense: Sense) {
        self.sensed.store(sense.write, SeqCst);
    }
}

impl Page {
    fn hold(&self, vcpu: VcpuId) {
        self.holders.fetch_or(VcpuSet::one(vcpu).bits(), SeqCst);
    }
}

fn trace_of(vcpu: VcpuId, trace: &TraceSystem, by: Option<VcpuId>, range: Range) {
    let set = VcpuSet::one(vcpu);
    let establish = || trace.establish(by, set, range, Kind::Code, Sense::WRITE, 0, &mut |_| {});
    while establish().is_err() {}
}

/// Whether a VCPU was told to give up direct access, at an instruction boundary.
fn is_revoked(trace: &TraceSystem, vcpu: VcpuId) -> bool {
    let mut revoked = false;
    if trace.attention(vcpu).pending() {
        trace.boundary(vcpu, &mut |notice| {
            revoked |= matches!(notice, Notice::Revoke { .. });
        });
    }
    revoked
}

/// Invariant 1: a VCPU takes direct access to L, of a page where M is traced, against one that
/// establishes a trace of L and then reads it.
fn gap(mutation: Option<Mutation>) {
    let page = Arc::new(Page::default());
    let trace = Arc::new(TraceSystem::mutated(2, page.clone(), mutation));
    trace_of(A, &trace, None, M);
    let bytes = Arc::new(AtomicU64::new(0));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let writer = {
        let (trace, page, bytes) = (trace.clone(), page.clone(), bytes.clone());
        thread::spawn(move || {
            let mut direct = trace.untraced(L, Sense::WRITE, &mut || {
                page.hold(B);
                true
            });
            for value in 1..=2 {
                direct &= !is_revoked(&trace, B);
                if direct {
                    bytes.store(value, SeqCst);
                } else {
                    write(&trace, B, L, || bytes.store(value, SeqCst));
                }
            }
            trace.enter_safe(B);
        })
    };
    trace_of(A, &trace, Some(A), L);
    let derived = bytes.load(SeqCst);
    let mut told = boundary(&trace, A);
    trace.enter_safe(A);
    writer.join().expect("the writer ends");
    told += boundary(&trace, A);
    assert!(
        told > 0 || derived == bytes.load(SeqCst),
        "derived from {derived}, and nobody told of the change"
    );
}

#[test]
fn invariant_1_beside_traces() {
    check(|| gap(None));
}

#[test]
fn invariant_1_beside_traces_needs_the_lock() {
    let mutation = Some(Mutation::TakeUnlocked);
    assert!(fails(move || gap(mutation)));
}

/// Invariant 1: a trace gives up M, or goes as a whole from M, while another VCPU writes to L, from
/// which the consumer has derived something.
fn giving_up(parts: bool, mutation: Option<Mutation>) {
    let page = Arc::new(Page::default());
    let trace = Arc::new(TraceSystem::mutated(2, page.clone(), mutation));
    let set = VcpuSet::one(A);
    let establish = |range| {
        trace
            .establish(None, set, range, Kind::Code, Sense::WRITE, 0, &mut |_| {})
            .expect("nobody else is there yet")
    };
    let second = if parts {
        establish(Range::new(L.lo, M.hi));
        None
    } else {
        establish(L);
        Some(establish(M))
    };
    let bytes = Arc::new(AtomicU64::new(0));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let writer = {
        let (trace, page, bytes) = (trace.clone(), page.clone(), bytes.clone());
        thread::spawn(move || {
            boundary(&trace, B);
            page.hold(B);
            if page.sensed.load(SeqCst) {
                write(&trace, B, L, || bytes.store(1, SeqCst));
            } else {
                bytes.store(1, SeqCst);
            }
            trace.enter_safe(B);
        })
    };
    match second {
        Some(id) => trace.remove(A, id),
        None => trace.exclude(M, Kind::Code, 0),
    }
    trace.enter_safe(A);
    writer.join().expect("the writer ends");
    assert!(boundary(&trace, A) > 0, "nobody told of the write");
}

#[test]
fn invariant_1_while_a_trace_gives_up_a_part() {
    check(|| giving_up(true, None));
}

#[test]
fn invariant_1_while_one_of_two_traces_goes() {
    check(|| giving_up(false, None));
}

#[test]
fn giving_up_a_part_needs_the_rest_to_stay_sensed() {
    for parts in [false, true] {
        let mutation = Some(Mutation::RelaxTooMuch);
        assert!(fails(move || giving_up(parts, mutation)));
    }
}
