//! Many at once: actors on each other's ranges, sleepers, traces that come and go, and accesses
//! that everyone stops for.

use std::sync::Arc;

use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use shuttle::thread;
use trapline_trace::mutation::Mutation;
use trapline_trace::{
    AlwaysSensed, Kind, Notice, Range, Semantics, Sense, Sensor, TraceSystem, VcpuId, VcpuSet,
};

use super::{A, B, C, L, boundary, check, fails, write};

/// Ranges of three VCPUs.
const RANGES: [Range; 3] = [
    Range::new(0x1000, 0x1008),
    Range::new(0x1008, 0x1010),
    Range::new(0x2000, 0x2008),
];
/// An attention bit of the layers above.
const SIGNAL: u32 = 2;

fn trace_for(trace: &TraceSystem, range: Range, kind: Kind, consumers: &[VcpuId]) {
    let consumers: VcpuSet = consumers.iter().copied().collect();
    trace
        .establish(None, consumers, range, kind, Sense::WRITE, 0, &mut |_| {})
        .expect("nobody else is there yet");
}

/// Invariants 5 and 7: three actors, each on a range that the two others consume, one of them
/// itself too, under three semantics.
fn three_actors(mutation: Option<Mutation>) {
    let trace = Arc::new(TraceSystem::mutated(3, Arc::new(AlwaysSensed), mutation));
    trace_for(&trace, RANGES[0], Kind::Code, &[B, C]);
    trace_for(&trace, RANGES[1], Kind::Descriptor, &[A, B, C]);
    trace_for(&trace, RANGES[2], Kind::Mmu, &[A, B]);
    let writes = Arc::new(AtomicU64::new(0));
    for vcpu in [A, B, C] {
        trace.leave_safe(vcpu);
    }
    let actors: Vec<_> = [A, B, C]
        .into_iter()
        .zip(RANGES)
        .map(|(vcpu, range)| {
            let (trace, writes) = (trace.clone(), writes.clone());
            thread::spawn(move || {
                let mut told = write(&trace, vcpu, range, || {
                    writes.fetch_add(1, SeqCst);
                });
                told += boundary(&trace, vcpu);
                trace.enter_safe(vcpu);
                told
            })
        })
        .collect();
    let mut told: Vec<u32> = actors
        .into_iter()
        .map(|actor| actor.join().expect("the actor ends"))
        .collect();
    for (told, vcpu) in told.iter_mut().zip([A, B, C]) {
        *told += boundary(&trace, vcpu);
    }
    assert_eq!(writes.load(SeqCst), 3, "a write is lost");
    assert_eq!(told, [2, 3, 2], "each event reaches each consumer once");
}

#[test]
fn three_actors_make_progress() {
    check(|| three_actors(None));
}

#[test]
fn three_actors_need_to_wait_at_a_boundary() {
    let mutation = Some(Mutation::WaitRunning);
    assert!(fails(move || three_actors(mutation)));
}

/// Freedom from deadlock: an actor that acts again at once gets its acknowledgement from a consumer
/// that does nothing but execute.
fn in_a_row(mutation: Option<Mutation>) {
    let trace = Arc::new(TraceSystem::mutated(2, Arc::new(AlwaysSensed), mutation));
    trace_for(&trace, L, Kind::Code, &[B]);
    trace.leave_safe(A);
    trace.leave_safe(B);
    let consumer = {
        let trace = trace.clone();
        thread::spawn(move || {
            let mut told = 0;
            while told < 2 {
                told += boundary(&trace, B);
                thread::yield_now();
            }
            trace.enter_safe(B);
        })
    };
    write(&trace, A, L, || {});
    write(&trace, A, L, || {});
    trace.enter_safe(A);
    consumer.join().expect("the consumer ends");
}

#[test]
fn every_request_is_acknowledged() {
    check(|| in_a_row(None));
}

#[test]
fn every_request_is_acknowledged_needs_the_second_look() {
    let mutation = Some(Mutation::ForgetRequest);
    assert!(fails(move || in_a_row(mutation)));
}

/// Invariant 7: writes to one location have one order, so none is lost.
fn counted(mutation: Option<Mutation>) {
    let trace = Arc::new(TraceSystem::mutated(3, Arc::new(AlwaysSensed), mutation));
    trace_for(&trace, L, Kind::Code, &[A, B]);
    let count = Arc::new(AtomicU64::new(0));
    let actors: Vec<_> = [A, B]
        .into_iter()
        .map(|vcpu| {
            let (trace, count) = (trace.clone(), count.clone());
            trace.leave_safe(vcpu);
            thread::spawn(move || {
                write(&trace, vcpu, L, || {
                    let seen = count.load(SeqCst);
                    thread::yield_now();
                    count.store(seen + 1, SeqCst);
                });
                trace.enter_safe(vcpu);
            })
        })
        .collect();
    for actor in actors {
        actor.join().expect("the actor ends");
    }
    assert_eq!(count.load(SeqCst), 2, "a write is lost");
}

#[test]
fn no_write_is_lost() {
    check(|| counted(None));
}

#[test]
fn no_write_is_lost_needs_the_lane() {
    let mutation = Some(Mutation::WriteOutsideLane);
    assert!(fails(move || counted(mutation)));
}

/// Invariant 6: nobody waits for a sleeper, no notice wakes it, and it finds all of them before its
/// next instruction.
fn sleeper(mutation: Option<Mutation>, semantics: Semantics) {
    let trace = Arc::new(TraceSystem::mutated(2, Arc::new(AlwaysSensed), mutation));
    trace.set_semantics(Kind::Code, semantics);
    trace_for(&trace, L, Kind::Code, &[B]);
    trace.leave_safe(A);
    trace.leave_safe(B);
    let signalled = Arc::new(AtomicBool::new(false));
    let sleeper = {
        let (trace, signalled) = (trace.clone(), signalled.clone());
        thread::spawn(move || {
            trace.sleep(B, None);
            assert!(signalled.load(SeqCst), "a notice wakes a sleeper");
            assert_eq!(trace.attention(B).take(SIGNAL), SIGNAL);
            let told = boundary(&trace, B);
            trace.enter_safe(B);
            told
        })
    };
    write(&trace, A, L, || {});
    write(&trace, A, L, || {});
    signalled.store(true, SeqCst);
    trace.raise(B, SIGNAL);
    trace.enter_safe(A);
    assert_eq!(sleeper.join().expect("the sleeper wakes"), 2);
}

#[test]
fn nobody_waits_for_a_sleeper() {
    for semantics in Semantics::ALL {
        check(move || sleeper(None, semantics));
    }
}

#[test]
fn nobody_waits_for_a_sleeper_needs_the_run_state() {
    let mutation = Some(Mutation::WaitForSleepers);
    assert!(fails(move || sleeper(mutation, Semantics::Bracketing)));
}

/// One page whose attribute comes and goes.
#[derive(Default)]
struct Page {
    sensed: AtomicBool,
    holders: AtomicU64,
}

impl Sensor for Page {
    fn protect(&self, _gpa: u64, _sense: Sense) -> VcpuSet {
        if self.sensed.swap(true, SeqCst) {
            return VcpuSet::EMPTY;
        }
        VcpuSet::from_bits(self.holders.load(SeqCst))
    }
    fn relax(&self, _gpa: u64, sense: Sense) {
        self.sensed.store(sense.write, SeqCst);
    }
}

impl Page {
    /// Takes direct access for a VCPU; whether it may have it.
    fn hold(&self, vcpu: VcpuId) -> bool {
        let bit = VcpuSet::one(vcpu).bits();
        let had = self.holders.fetch_or(bit, SeqCst) & bit != 0;
        if !self.sensed.load(SeqCst) {
            return true;
        }
        if !had {
            self.holders.fetch_and(!bit, SeqCst);
        }
        false
    }
}

/// Invariant 1 while traces come and go: a VCPU derives, drops what it derived with its trace, and
/// derives again, against one that writes directly whenever it may.
fn coming_and_going(mutation: Option<Mutation>) {
    let page = Arc::new(Page::default());
    let trace = Arc::new(TraceSystem::mutated(2, page.clone(), mutation));
    let bytes = Arc::new(AtomicU64::new(0));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let writer = {
        let (trace, page, bytes) = (trace.clone(), page.clone(), bytes.clone());
        thread::spawn(move || {
            let mut direct = false;
            for value in 1..=3 {
                if trace.attention(B).pending() {
                    trace.boundary(B, &mut |notice| {
                        if matches!(notice, Notice::Revoke { .. }) {
                            direct = false;
                            page.holders.fetch_and(!VcpuSet::one(B).bits(), SeqCst);
                        }
                    });
                }
                direct = direct || page.hold(B);
                if direct {
                    bytes.store(value, SeqCst);
                } else {
                    write(&trace, B, L, || bytes.store(value, SeqCst));
                }
            }
            trace.enter_safe(B);
        })
    };
    let derive = || {
        let mut told = 0;
        loop {
            let established = trace.establish(
                Some(A),
                VcpuSet::one(A),
                L,
                Kind::Code,
                Sense::WRITE,
                0,
                &mut |notice| told += u32::from(matches!(notice, Notice::Notification(_))),
            );
            if let Ok(id) = established {
                return (id, bytes.load(SeqCst));
            }
        }
    };
    let (id, _) = derive();
    trace.remove(A, id);
    boundary(&trace, A);
    let (_, derived) = derive();
    let mut notified = boundary(&trace, A);
    trace.enter_safe(A);
    writer.join().expect("the writer ends");
    notified += boundary(&trace, A);
    assert!(
        notified > 0 || derived == bytes.load(SeqCst),
        "derived from {derived}, and nobody told of the change"
    );
}

#[test]
fn invariant_1_while_traces_come_and_go() {
    check(|| coming_and_going(None));
}

#[test]
fn invariant_1_while_traces_come_and_go_needs_the_wait_for_holders() {
    let mutation = Some(Mutation::EstablishWithoutWaiting);
    assert!(fails(move || coming_and_going(mutation)));
}

/// While one VCPU accesses exclusively no other executes, not even one that starts meanwhile.
fn alone() {
    let trace = Arc::new(TraceSystem::new(3, Arc::new(AlwaysSensed)));
    trace_for(&trace, L, Kind::Code, &[B, C]);
    let executing = Arc::new(AtomicU64::new(0));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let others: Vec<_> = [B, C]
        .into_iter()
        .map(|vcpu| {
            let (trace, executing) = (trace.clone(), executing.clone());
            thread::spawn(move || {
                if vcpu == C {
                    trace.leave_safe(vcpu);
                }
                let mut told = 0;
                for _ in 0..2 {
                    told += boundary(&trace, vcpu);
                    executing.fetch_add(1, SeqCst);
                    thread::yield_now();
                    executing.fetch_sub(1, SeqCst);
                }
                trace.enter_safe(vcpu);
                told
            })
        })
        .collect();
    while trace
        .exclusive(A, &[L], &mut |_| {}, &mut || {
            assert_eq!(executing.load(SeqCst), 0, "somebody executes");
            thread::yield_now();
            assert_eq!(executing.load(SeqCst), 0, "somebody goes on");
        })
        .is_err()
    {}
    trace.enter_safe(A);
    let mut told: u32 = others
        .into_iter()
        .map(|other| other.join().expect("the other ends"))
        .sum();
    told += boundary(&trace, B) + boundary(&trace, C);
    assert_eq!(told, 2, "each consumer is told once");
}

#[test]
fn an_exclusive_access_is_alone() {
    check(alone);
}
