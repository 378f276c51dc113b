//! What a store costs, untraced and traced: `cargo xtask bench-traces`.
//!
//! Stores go the way of the stepping engine's: look-up in the TLB, on a miss the page walk, and to
//! traced pages through the trace subsystem. Consumers are threads that do what a sub-VMM does at
//! its instruction boundaries. Beside them in the table is what the host offers: write-protected
//! pages with a signal handler, and userfaultfd.

mod host;
mod machine;
mod report;

use std::time::{Duration, Instant};

use trapline_trace::{Kind, Semantics};

use machine::{ActingVcpu, Consumers, Guest, Way};
use report::{Report, Times};

/// A scenario ends after this many samples or this time.
const SAMPLES: usize = 20_000;
const TIME: Duration = Duration::from_secs(2);
/// Stores of one sample where one alone is shorter than the clock's tick.
const BATCH: u32 = 256;
/// Stores beside the trace after the actor's thread gave its processor up.
const WARMING: u32 = 16;
/// Traces elsewhere.
const MANY: u64 = 100_000;

/// Runs `sample` until there are enough samples. Each is of `batch` operations.
fn measure(batch: u32, mut sample: impl FnMut()) -> Times {
    let (start, mut times) = (Instant::now(), Vec::with_capacity(SAMPLES));
    while times.len() < SAMPLES && (start.elapsed() < TIME || times.len() < 20) {
        let begin = Instant::now();
        sample();
        times.push(begin.elapsed().as_nanos() as f64 / f64::from(batch));
    }
    Times::of(times)
}

/// As [`measure`], for one operation on `what` that `prepare` makes possible again, untimed.
fn measure_prepared<T>(
    mut what: T,
    mut prepare: impl FnMut(&mut T),
    mut sample: impl FnMut(&mut T),
) -> Times {
    let (start, mut times) = (Instant::now(), Vec::with_capacity(SAMPLES));
    while times.len() < SAMPLES && (start.elapsed() < TIME || times.len() < 20) {
        prepare(&mut what);
        let begin = Instant::now();
        sample(&mut what);
        times.push(begin.elapsed().as_nanos() as f64);
    }
    Times::of(times)
}

fn main() {
    // `cargo test --benches` asks for no measurement.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{processors} processors; a store of 8 bytes; times in microseconds\n");
    let mut report = Report::default();
    untraced(&mut report);
    for semantics in Semantics::ALL {
        for consumers in [1, 3, 7] {
            for way in [Way::Halted, Way::Running] {
                notified(&mut report, semantics, consumers, way, processors);
            }
        }
    }
    host_mechanisms(&mut report);
    report.print();
}

/// Stores that concern no consumer, with and without traces elsewhere.
fn untraced(report: &mut Report) {
    for elsewhere in [0, MANY] {
        let mut guest = Guest::new(1);
        let start = Instant::now();
        guest.trace_elsewhere(elsewhere);
        let establishing = start.elapsed();
        let mut actor = guest.actor();
        actor.store(machine::UNTRACED);
        let times = measure(BATCH, || {
            (0..BATCH).for_each(|_| actor.store(machine::UNTRACED))
        });
        report.add(
            format!("untraced page, {elsewhere} traces elsewhere"),
            times,
        );
        if elsewhere == 0 {
            shadowed(report, &mut actor);
        }
        guest.trace(machine::TRACED, Kind::Mmu, 0);
        let times = measure(BATCH, || {
            (0..BATCH).for_each(|_| actor.store(machine::BESIDE))
        });
        report.add(
            format!("bytes beside a trace, {elsewhere} traces elsewhere"),
            times,
        );
        let times = measure(BATCH, || {
            (0..BATCH).for_each(|_| actor.store(machine::TRACED))
        });
        report.add(
            format!("traced, without consumers, {elsewhere} traces elsewhere"),
            times,
        );
        if elsewhere > 0 {
            println!(
                "establishing {elsewhere} traces: {:.2} us each",
                establishing.as_secs_f64() * 1e6 / elsewhere as f64
            );
            let start = Instant::now();
            guest.remove_elsewhere();
            println!(
                "removing them: {:.2} us each\n",
                start.elapsed().as_secs_f64() * 1e6 / elsewhere as f64
            );
        }
    }
    let mut guest = Guest::new(1);
    guest.trace(machine::TRACED, Kind::Mmu, 1);
    let mut actor = guest.actor();
    let times = measure(BATCH, || {
        (0..BATCH).for_each(|_| actor.store(machine::TRACED))
    });
    report.add("traced, the actor is the consumer".to_owned(), times);
}

/// Forgetting a page, as INVLPG does, and a miss of the TLB, which the copies of the page tables
/// answer.
fn shadowed(report: &mut Report, actor: &mut ActingVcpu) {
    // Until the tables are traced.
    (0..1000).for_each(|_| actor.store_forgotten(machine::UNTRACED));
    let before = actor.misses();
    let times = measure(BATCH, || {
        (0..BATCH).for_each(|_| actor.store_forgotten(machine::UNTRACED));
    });
    let after = actor.misses();
    println!(
        "TLB misses: {} from the shadow page tables, {} walks\n",
        after.0 - before.0,
        after.1 - before.1
    );
    report.add(
        "untraced page, forgotten by the TLB each time".to_owned(),
        times,
    );
}

/// Stores that notify others.
fn notified(
    report: &mut Report,
    semantics: Semantics,
    consumers: usize,
    way: Way,
    processors: usize,
) {
    let mut guest = Guest::new(consumers + 1);
    guest.set_semantics(Kind::Mmu, semantics);
    guest.trace(machine::TRACED, Kind::Mmu, (1 << (consumers + 1)) - 2);
    let mut actor = guest.actor();
    let threads = Consumers::start(&guest, consumers, way);
    let prepare = |actor: &mut ActingVcpu| {
        if threads.go_on() {
            // Others had the processor meanwhile. A VCPU that executes has what a store needs in its
            // caches: what is measured is the store, not the host's switch of threads.
            (0..WARMING).for_each(|_| actor.store(machine::BESIDE));
        }
    };
    let times = measure_prepared(&mut actor, |a| prepare(a), |a| a.store(machine::TRACED));
    drop(threads);
    let crowd = if way == Way::Running && consumers >= processors {
        ", more than processors"
    } else {
        ""
    };
    report.add(format!("{semantics}, {consumers} {way}{crowd}"), times);
}

/// The same with what the host offers: one store, until it is done.
fn host_mechanisms(report: &mut Report) {
    match host::ProtectedPage::new() {
        Ok(page) => {
            let times = measure_prepared(&page, |page| page.protect(), |page| page.store());
            report.add("mprotect and SIGSEGV".to_owned(), times);
            let times = measure(1, || {
                page.protect();
                page.store();
            });
            report.add("mprotect and SIGSEGV, protected again".to_owned(), times);
        }
        Err(error) => println!("SKIPPED: mprotect and SIGSEGV: {error}\n"),
    }
    match host::UserfaultPage::new() {
        Ok(page) => {
            let times = measure_prepared(&page, |page| page.protect(), |page| page.store());
            report.add("userfaultfd write-protect".to_owned(), times);
        }
        Err(error) => println!("SKIPPED: userfaultfd write-protect: {error}\n"),
    }
}
