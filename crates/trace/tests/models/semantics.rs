//! What each semantics promises, alone, mixed, and changed while events are in flight.

use std::sync::Arc;

use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use shuttle::thread;
use trapline_trace::mutation::Mutation;
use trapline_trace::{
    Actor, AlwaysSensed, Kind, Notice, Notification, Phase, Semantics, Sense, TraceSystem, VcpuId,
    VcpuSet,
};

use super::{A, B, C, L, check, fails, write};

/// A machine of three VCPUs, with a region of each of these kinds on [`L`].
fn machine(
    mutation: Option<Mutation>,
    regions: &[(Kind, Semantics, &[VcpuId])],
) -> Arc<TraceSystem> {
    let trace = Arc::new(TraceSystem::mutated(3, Arc::new(AlwaysSensed), mutation));
    for (kind, semantics, consumers) in regions {
        trace.set_semantics(*kind, *semantics);
        let consumers: VcpuSet = consumers.iter().copied().collect();
        trace
            .establish(None, consumers, L, *kind, Sense::WRITE, 0, &mut |_| {})
            .expect("nobody else is there yet");
    }
    trace
}

/// What a VCPU finds at an instruction boundary.
fn told(trace: &TraceSystem, vcpu: VcpuId) -> Vec<Notification> {
    let mut told = Vec::new();
    if trace.attention(vcpu).pending() {
        trace.boundary(vcpu, &mut |notice| {
            if let Notice::Notification(n) = notice {
                told.push(n);
            }
        });
    }
    told
}

/// Invariant 3: once the actor has gone on, the consumer executes nothing old.
fn nothing_old(mutation: Option<Mutation>, semantics: Semantics) {
    let trace = machine(mutation, &[(Kind::Descriptor, semantics, &[B])]);
    let written = Arc::new(AtomicBool::new(false));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let consumer = {
        let (trace, written) = (trace.clone(), written.clone());
        thread::spawn(move || {
            let mut notices = 0;
            for _ in 0..3 {
                notices += told(&trace, B).len();
                let actor_went_on = written.load(SeqCst);
                assert!(
                    !actor_went_on || notices == 1,
                    "executes what is old after the actor went on"
                );
            }
            trace.enter_safe(B);
        })
    };
    write(&trace, A, L, || {});
    written.store(true, SeqCst);
    trace.enter_safe(A);
    consumer.join().expect("the consumer ends");
}

#[test]
fn invariant_3_under_post_write_sync() {
    check(|| nothing_old(None, Semantics::PostWriteSync));
}

#[test]
fn invariant_3_under_post_write_sync_needs_the_wait() {
    let mutation = Some(Mutation::GoOnWithoutWaiting);
    assert!(fails(move || nothing_old(
        mutation,
        Semantics::PostWriteSync
    )));
}

/// Post-write-async does not promise it: the check can tell the semantics apart.
#[test]
fn invariant_3_does_not_hold_under_post_write_async() {
    assert!(fails(|| nothing_old(None, Semantics::PostWriteAsync)));
}

/// Under post-write-sync a consumer that has acknowledged goes on, though another has not.
fn acknowledging_is_not_stalling() {
    let trace = machine(
        None,
        &[(Kind::Descriptor, Semantics::PostWriteSync, &[B, C])],
    );
    for vcpu in [A, B, C] {
        trace.leave_safe(vcpu);
    }
    let went_on = Arc::new(AtomicBool::new(false));
    let quick = {
        let (trace, went_on) = (trace.clone(), went_on.clone());
        thread::spawn(move || {
            while told(&trace, B).is_empty() {
                thread::yield_now();
            }
            went_on.store(true, SeqCst);
            trace.enter_safe(B);
        })
    };
    let slow = {
        let (trace, went_on) = (trace.clone(), went_on.clone());
        thread::spawn(move || {
            // A long instruction: it reaches its boundary after the other has gone on.
            while !went_on.load(SeqCst) {
                thread::yield_now();
            }
            trace.enter_safe(C);
        })
    };
    write(&trace, A, L, || {});
    trace.enter_safe(A);
    quick.join().expect("the quick consumer ends");
    slow.join().expect("the slow consumer ends");
    assert_eq!(told(&trace, C).len(), 1);
}

#[test]
fn acknowledging_under_post_write_sync_is_not_stalling() {
    check(acknowledging_is_not_stalling);
}

/// Under post-write-async (\[0085\]): a boundary after the actor went on, such as the one of a
/// TLB flush, finds the notice.
fn queued_when_the_actor_goes_on(mutation: Option<Mutation>) {
    let trace = machine(mutation, &[(Kind::Mmu, Semantics::PostWriteAsync, &[B])]);
    let written = Arc::new(AtomicBool::new(false));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let consumer = {
        let (trace, written) = (trace.clone(), written.clone());
        thread::spawn(move || {
            let mut notices = 0;
            for _ in 0..3 {
                let flushes = written.load(SeqCst);
                notices += told(&trace, B).len();
                assert!(!flushes || notices == 1, "a flush does not find the notice");
            }
            trace.enter_safe(B);
        })
    };
    write(&trace, A, L, || {});
    written.store(true, SeqCst);
    trace.enter_safe(A);
    consumer.join().expect("the consumer ends");
}

#[test]
fn post_write_async_queues_before_the_actor_goes_on() {
    check(|| queued_when_the_actor_goes_on(None));
}

#[test]
fn post_write_async_needs_the_attention_word() {
    let mutation = Some(Mutation::PostSilently);
    assert!(fails(move || queued_when_the_actor_goes_on(mutation)));
}

/// What a consumer derives anew when it is told is derived from the new bytes.
fn derived_anew(mutation: Option<Mutation>, semantics: Semantics) {
    let trace = machine(mutation, &[(Kind::Code, semantics, &[B])]);
    let bytes = Arc::new(AtomicU64::new(0));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let consumer = {
        let (trace, bytes) = (trace.clone(), bytes.clone());
        thread::spawn(move || {
            let mut derived = 0;
            for _ in 0..12 {
                if !told(&trace, B).is_empty() {
                    derived = bytes.load(SeqCst);
                }
            }
            trace.enter_safe(B);
            derived
        })
    };
    write(&trace, A, L, || bytes.store(1, SeqCst));
    trace.enter_safe(A);
    let derived = consumer.join().expect("the consumer ends");
    let left = told(&trace, B).len();
    assert!(left == 1 || derived == 1, "derived from the old bytes");
}

#[test]
fn what_is_derived_anew_is_new() {
    for semantics in [
        Semantics::Bracketing,
        Semantics::PostWriteSync,
        Semantics::PostWriteAsync,
    ] {
        check(move || derived_anew(None, semantics));
    }
}

#[test]
fn what_is_derived_anew_needs_the_notice_after_the_write() {
    for semantics in [Semantics::PostWriteSync, Semantics::PostWriteAsync] {
        let mutation = Some(Mutation::NotifyBeforeWrite);
        assert!(fails(move || derived_anew(mutation, semantics)));
    }
}

/// Pre-write-value (\[0081\]): who sees the new bytes finds the notice, with these bytes.
fn value_before_write(mutation: Option<Mutation>) {
    let trace = machine(mutation, &[(Kind::Watch, Semantics::PreWriteValue, &[B])]);
    let bytes = Arc::new(AtomicU64::new(0));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let consumer = {
        let (trace, bytes) = (trace.clone(), bytes.clone());
        thread::spawn(move || {
            let mut notices = 0;
            for _ in 0..3 {
                let seen = bytes.load(SeqCst);
                for notice in told(&trace, B) {
                    notices += 1;
                    assert_eq!(notice.value.as_deref(), Some(7u64.to_le_bytes().as_slice()));
                }
                assert!(seen == 0 || notices == 1, "written before it was announced");
            }
            trace.enter_safe(B);
        })
    };
    let mut perform = |phase: Phase<'_>| match phase {
        Phase::Foresee(value) => value.extend(7u64.to_le_bytes()),
        Phase::Perform => bytes.store(7, SeqCst),
    };
    while trace
        .access_foreseen(
            Actor::Vcpu(A),
            &[L],
            Sense::WRITE,
            &mut |_| {},
            &mut perform,
        )
        .is_err()
    {}
    trace.enter_safe(A);
    consumer.join().expect("the consumer ends");
}

#[test]
fn pre_write_value_announces_what_is_written() {
    check(|| value_before_write(None));
}

#[test]
fn pre_write_value_needs_the_notice_before_the_write() {
    let mutation = Some(Mutation::NotifyAfterWrite);
    assert!(fails(move || value_before_write(mutation)));
}

/// One write that hits regions of every semantics: each consumer gets what its regions promise.
fn mixed(mutation: Option<Mutation>) {
    let regions: &[(Kind, Semantics, &[VcpuId])] = &[
        (Kind::Code, Semantics::Bracketing, &[A, B]),
        (Kind::Descriptor, Semantics::PostWriteSync, &[C]),
        (Kind::Mmu, Semantics::PostWriteAsync, &[B, C]),
        (Kind::Watch, Semantics::PreWriteValue, &[C]),
    ];
    let trace = machine(mutation, regions);
    let bytes = Arc::new(AtomicU64::new(0));
    let writing = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicBool::new(false));
    for vcpu in [A, B, C] {
        trace.leave_safe(vcpu);
    }
    let bracketed = {
        let (trace, writing, written) = (trace.clone(), writing.clone(), written.clone());
        thread::spawn(move || {
            let mut notices = 0;
            for _ in 0..6 {
                notices += told(&trace, B).len();
                assert!(!writing.load(SeqCst), "executes during the bracketed write");
                let actor_went_on = written.load(SeqCst);
                assert!(!actor_went_on || notices == 2, "executes what is old");
            }
            trace.enter_safe(B);
            notices
        })
    };
    let synchronous = {
        let (trace, bytes, written) = (trace.clone(), bytes.clone(), written.clone());
        thread::spawn(move || {
            let mut notices = Vec::new();
            for _ in 0..6 {
                let seen = bytes.load(SeqCst);
                notices.extend(told(&trace, C));
                let announced = notices.iter().any(|n| n.kind == Kind::Watch);
                assert!(seen == 0 || announced, "written before it was announced");
                let actor_went_on = written.load(SeqCst);
                assert!(!actor_went_on || notices.len() == 3, "executes what is old");
            }
            trace.enter_safe(C);
            notices.len()
        })
    };
    let own = write(&trace, A, L, || {
        writing.store(true, SeqCst);
        bytes.store(1, SeqCst);
        thread::yield_now();
        writing.store(false, SeqCst);
    });
    written.store(true, SeqCst);
    trace.enter_safe(A);
    let b = bracketed.join().expect("the bracketed consumer ends") + told(&trace, B).len();
    let c = synchronous.join().expect("the synchronous consumer ends") + told(&trace, C).len();
    assert_eq!(
        (own, b, c),
        (1, 2, 3),
        "each region tells its consumers once"
    );
}

#[test]
fn every_region_gets_its_own_semantics() {
    check(|| mixed(None));
}

#[test]
fn every_region_needs_its_own_semantics() {
    for mutation in [
        Mutation::WriteWithoutWaiting,
        Mutation::GoOnWithoutWaiting,
        Mutation::NotifyAfterWrite,
        Mutation::NotifyTwice,
        Mutation::NotifyBystanders,
        Mutation::PostSilently,
    ] {
        assert!(
            fails(move || mixed(Some(mutation))),
            "{mutation:?} goes unnoticed"
        );
    }
}

/// Semantics that change while events are in flight: what both the old and the new ones promise
/// holds throughout.
fn changing() {
    let trace = machine(None, &[(Kind::Code, Semantics::Bracketing, &[B])]);
    let written = Arc::new(AtomicU64::new(0));
    trace.leave_safe(A);
    trace.leave_safe(B);
    let changer = {
        let trace = trace.clone();
        thread::spawn(move || {
            trace.set_semantics(Kind::Code, Semantics::PostWriteSync);
            trace.set_semantics(Kind::Code, Semantics::Bracketing);
        })
    };
    let consumer = {
        let (trace, written) = (trace.clone(), written.clone());
        thread::spawn(move || {
            let mut notices = 0;
            for _ in 0..4 {
                notices += told(&trace, B).len() as u64;
                let done = written.load(SeqCst);
                assert!(notices >= done, "executes what is old");
            }
            trace.enter_safe(B);
            notices
        })
    };
    for n in 1..=2 {
        write(&trace, A, L, || {});
        written.store(n, SeqCst);
    }
    trace.enter_safe(A);
    changer.join().expect("the change ends");
    let notices = consumer.join().expect("the consumer ends") + told(&trace, B).len() as u64;
    assert_eq!(notices, 2, "each event is told once");
}

#[test]
fn semantics_may_change_while_events_are_in_flight() {
    check(changing);
}
