//! Model checks of the real protocol code, under shuttle's scheduler:
//! `cargo test -p trapline-trace --features shuttle --test models`.
//!
//! Each check comes with a mutation of the protocol that it must notice.
#![cfg(feature = "shuttle")]

mod beside;
mod crowd;
mod semantics;

use std::sync::Arc;

use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use shuttle::thread;
use trapline_trace::mutation::Mutation;
use trapline_trace::{
    Actor, AlwaysSensed, Kind, Notice, Range, Sense, Sensor, TraceSystem, VcpuId, VcpuSet,
};

/// Schedules of each kind.
const SCHEDULES: usize = 5_000;
/// How often a schedule by priorities changes them: the number of unlucky moments that a violation
/// needs.
const CHANGES: usize = 3;
const L: Range = Range::new(0x1000, 0x1008);
const T: Range = Range::new(0x2000, 0x2008);
const A: VcpuId = VcpuId::new(0);
const B: VcpuId = VcpuId::new(1);
const C: VcpuId = VcpuId::new(2);

fn establish(trace: &TraceSystem, vcpu: VcpuId, range: Range) {
    let set = VcpuSet::one(vcpu);
    trace
        .establish(None, set, range, Kind::Code, Sense::WRITE, 0, &mut |_| {})
        .expect("nobody else is there yet");
}

fn write(trace: &TraceSystem, actor: VcpuId, range: Range, mut perform: impl FnMut()) -> u32 {
    let mut notified = 0;
    while trace
        .access(
            Actor::Vcpu(actor),
            &[range],
            Sense::WRITE,
            &mut |notice| notified += u32::from(matches!(notice, Notice::Notification(_))),
            &mut perform,
        )
        .is_err()
    {}
    notified
}

fn boundary(trace: &TraceSystem, vcpu: VcpuId) -> u32 {
    let mut notified = 0;
    if trace.attention(vcpu).pending() {
        trace.boundary(vcpu, &mut |notice| {
            notified += u32::from(matches!(notice, Notice::Notification(_)));
        });
    }
    notified
}

/// Explores schedules where every step is anyone's, and such where one thread runs as long as it
/// can (Burckhardt et al., "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs").
fn check(model: impl Fn() + Send + Sync + 'static) {
    let model = Arc::new(model);
    let same = Arc::clone(&model);
    shuttle::check_random(move || same(), SCHEDULES);
    shuttle::check_pct(move || model(), SCHEDULES, CHANGES);
}

/// Whether some schedule violates the model, by a failed assertion or a deadlock.
fn fails(model: impl Fn() + Send + Sync + 'static) -> bool {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(model))).is_err()
}

/// One page: whether it is sensed, and who holds direct access.
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
    fn relax(&self, _gpa: u64, _sense: Sense) {}
}

/// Invariant 1: a VCPU that may write directly, against one that establishes and then reads.
fn protect_then_read(mutation: Option<Mutation>) {
    let page = Arc::new(Page::default());
    let trace = Arc::new(TraceSystem::mutated(2, page.clone(), mutation));
    let bytes = Arc::new(AtomicU64::new(0));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let writer = {
        let (trace, page, bytes) = (trace.clone(), page.clone(), bytes.clone());
        thread::spawn(move || {
            page.holders.fetch_or(VcpuSet::one(B).bits(), SeqCst);
            let direct = Arc::new(AtomicBool::new(!page.sensed.load(SeqCst)));
            for value in 1..=2 {
                if trace.attention(B).pending() {
                    let direct = direct.clone();
                    trace.boundary(B, &mut |notice| {
                        if matches!(notice, Notice::Revoke { .. }) {
                            direct.store(false, SeqCst);
                        }
                    });
                }
                if direct.load(SeqCst) {
                    bytes.store(value, SeqCst);
                } else {
                    write(&trace, B, L, || bytes.store(value, SeqCst));
                }
            }
            trace.enter_safe(B);
        })
    };
    while trace
        .establish(
            Some(A),
            VcpuSet::one(A),
            L,
            Kind::Code,
            Sense::WRITE,
            0,
            &mut |_| {},
        )
        .is_err()
    {}
    let derived = bytes.load(SeqCst);
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
fn invariant_1() {
    check(|| protect_then_read(None));
}

#[test]
fn invariant_1_needs_the_wait_for_holders() {
    let mutation = Some(Mutation::EstablishWithoutWaiting);
    assert!(fails(move || protect_then_read(mutation)));
}

/// Invariants 2 and 3: a consumer that executes against an actor that writes what it executes.
fn bracketing(mutation: Option<Mutation>) {
    let trace = Arc::new(TraceSystem::mutated(2, Arc::new(AlwaysSensed), mutation));
    establish(&trace, B, L);
    let writing = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicBool::new(false));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let consumer = {
        let (trace, writing, written) = (trace.clone(), writing.clone(), written.clone());
        thread::spawn(move || {
            let mut stale = true;
            for _ in 0..3 {
                if boundary(&trace, B) > 0 {
                    stale = false;
                }
                // One instruction of derived code.
                assert!(!writing.load(SeqCst), "executes during the bracketed write");
                let actor_went_on = written.load(SeqCst);
                assert!(
                    !(actor_went_on && stale),
                    "executes old code after the write"
                );
            }
            trace.enter_safe(B);
        })
    };
    write(&trace, A, L, || {
        writing.store(true, SeqCst);
        thread::yield_now();
        writing.store(false, SeqCst);
    });
    written.store(true, SeqCst);
    trace.enter_safe(A);
    consumer.join().expect("the consumer ends");
}

#[test]
fn invariants_2_and_3() {
    check(|| bracketing(None));
}

#[test]
fn invariants_2_and_3_need_the_acknowledgements() {
    let mutation = Some(Mutation::WriteWithoutWaiting);
    assert!(fails(move || bracketing(mutation)));
}

#[test]
fn invariant_2_needs_the_stall() {
    let mutation = Some(Mutation::ResumeEarly);
    assert!(fails(move || bracketing(mutation)));
}

/// Invariant 4, the chain of \[0087\]: X writes L, a bystander runs the new L and stores M, a
/// consumer that sees M must not run the old L.
fn chain(mutation: Option<Mutation>) {
    let trace = Arc::new(TraceSystem::mutated(3, Arc::new(AlwaysSensed), mutation));
    establish(&trace, B, L);
    let l = Arc::new(AtomicU64::new(0));
    let m = Arc::new(AtomicU64::new(0));
    for vcpu in [A, B, C] {
        trace.leave_safe(vcpu);
    }
    let bystander = {
        let (trace, l, m) = (trace.clone(), l.clone(), m.clone());
        thread::spawn(move || {
            for _ in 0..4 {
                if l.load(SeqCst) == 1 {
                    m.store(1, SeqCst);
                    break;
                }
                thread::yield_now();
            }
            assert!(!trace.attention(C).pending(), "a bystander is disturbed");
            trace.enter_safe(C);
        })
    };
    let consumer = {
        let (trace, m) = (trace.clone(), m.clone());
        thread::spawn(move || {
            let mut stale = true;
            for _ in 0..4 {
                if boundary(&trace, B) > 0 {
                    stale = false;
                }
                let seen = m.load(SeqCst) == 1;
                assert!(!(seen && stale), "old code sees what only new code does");
            }
            trace.enter_safe(B);
        })
    };
    write(&trace, A, L, || l.store(1, SeqCst));
    trace.enter_safe(A);
    bystander.join().expect("the bystander ends");
    consumer.join().expect("the consumer ends");
}

#[test]
fn invariant_4() {
    check(|| chain(None));
}

#[test]
fn invariant_4_needs_the_acknowledgements() {
    let mutation = Some(Mutation::WriteWithoutWaiting);
    assert!(fails(move || chain(mutation)));
}

/// Invariants 3 and 4 for an instruction that is itself an actor: while it waited for the lane the
/// code that it was decoded from changed, so it must start again.
fn waiting_actor(mutation: Option<Mutation>) {
    let trace = Arc::new(TraceSystem::mutated(3, Arc::new(AlwaysSensed), mutation));
    establish(&trace, B, L);
    establish(&trace, C, T);
    let written = Arc::new(AtomicBool::new(false));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let waiter = {
        let (trace, written) = (trace.clone(), written.clone());
        thread::spawn(move || {
            let mut stale = boundary(&trace, B) == 0;
            loop {
                let was_stale = stale;
                let mut told = false;
                let done = trace.access(
                    Actor::Vcpu(B),
                    &[T],
                    Sense::WRITE,
                    &mut |_| told = true,
                    &mut || {
                        let actor_went_on = written.load(SeqCst);
                        assert!(
                            !(actor_went_on && was_stale),
                            "an old instruction takes effect"
                        );
                    },
                );
                stale &= !told;
                if done.is_ok() {
                    break;
                }
            }
            trace.enter_safe(B);
        })
    };
    write(&trace, A, L, || {});
    written.store(true, SeqCst);
    trace.enter_safe(A);
    waiter.join().expect("the waiting actor ends");
}

#[test]
fn an_instruction_that_waited_starts_again() {
    check(|| waiting_actor(None));
}

#[test]
fn an_instruction_that_waited_needs_the_restart() {
    let mutation = Some(Mutation::NoRestart);
    assert!(fails(move || waiting_actor(mutation)));
}

/// Invariants 5 and 7: two actors on each other's ranges, and a sleeper (6).
fn crossing(mutation: Option<Mutation>) {
    let trace = Arc::new(TraceSystem::mutated(3, Arc::new(AlwaysSensed), mutation));
    establish(&trace, A, L);
    establish(&trace, B, T);
    establish(&trace, C, T);
    trace.leave_safe(A);
    trace.leave_safe(B);
    let writes = Arc::new(AtomicU64::new(0));
    let other = {
        let (trace, writes) = (trace.clone(), writes.clone());
        thread::spawn(move || {
            let mut told = write(&trace, B, L, || {
                writes.fetch_add(1, SeqCst);
            });
            told += boundary(&trace, B);
            trace.enter_safe(B);
            told
        })
    };
    let mut told = write(&trace, A, T, || {
        writes.fetch_add(1, SeqCst);
    });
    told += boundary(&trace, A);
    trace.enter_safe(A);
    let mut other_told = other.join().expect("the other actor ends");
    told += boundary(&trace, A);
    other_told += boundary(&trace, B);
    assert_eq!(writes.load(SeqCst), 2, "a write is lost");
    assert_eq!((told, other_told), (1, 1), "each consumer is told once");
    // C never ran: nobody waited for it, and its notice is there before it executes anything.
    trace.leave_safe(C);
    assert_eq!(boundary(&trace, C), 1, "a sleeper is told once");
}

#[test]
fn invariants_5_6_and_7() {
    check(|| crossing(None));
}

#[test]
fn invariant_5_needs_single_notices() {
    let mutation = Some(Mutation::NotifyTwice);
    assert!(fails(move || crossing(mutation)));
}

#[test]
fn invariant_7_needs_waiting_at_a_boundary() {
    let mutation = Some(Mutation::WaitRunning);
    assert!(fails(move || crossing(mutation)));
}
