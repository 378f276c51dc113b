//! Machines without processors share pages; threads that play VCPUs write to them meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use trapline_trace::{Actor, Notice, Range, Sense, TraceSystem, VcpuId};

use super::{PAGE, PoolStatistics, Scanner, SharingPool};
use crate::GuestMemory;

const VCPU: VcpuId = VcpuId::new(0);

struct Machine {
    memory: Arc<GuestMemory>,
    trace: Arc<TraceSystem>,
}

impl Machine {
    fn new(pool: &Arc<SharingPool>, pages: usize) -> Self {
        let memory = Arc::new(GuestMemory::new((pages * PAGE) as u64).unwrap());
        let trace = Arc::new(TraceSystem::new(1, memory.clone()));
        assert!(pool.join(&memory, &trace, 1));
        Self { memory, trace }
    }

    fn write(&self, gpa: usize, data: &[u8]) {
        let gpa = gpa as u64;
        assert!(self.memory.write(&self.trace, Actor::Device, gpa, data));
    }

    /// Fills a page with words that are all its own.
    fn fill(&self, page: usize, content: u64) {
        let bytes: Vec<u8> = (0..PAGE as u64 / 8)
            .flat_map(|n| (content << 32 | n).to_le_bytes())
            .collect();
        self.write(page * PAGE, &bytes);
    }

    fn assert_filled(&self, page: usize, content: u64) {
        for n in 0..PAGE as u64 / 8 {
            let gpa = (page * PAGE) as u64 + n * 8;
            assert_eq!(
                self.memory.read_u64(gpa),
                Some(content << 32 | n),
                "{gpa:#x}"
            );
        }
    }

    /// Pages of host memory that its file takes.
    fn pages_in_file(&self) -> usize {
        let private = self.memory.sharing_statistics().unwrap().private_pages;
        self.memory.resident_bytes() as usize / PAGE - private as usize
    }

    fn unshared(&self) -> u64 {
        self.memory.sharing_statistics().unwrap().unshared_by_write
    }
}

fn passes(scanner: &mut Scanner, count: usize) {
    for _ in 0..count {
        while !scanner.step(64).pass_ended {}
    }
}

/// A pool, its scanner and two machines whose first 100 pages are the same.
fn twins(pages: usize) -> (Arc<SharingPool>, Scanner, Machine, Machine) {
    let pool = SharingPool::new().unwrap();
    let scanner = Scanner::new(Arc::clone(&pool));
    let (a, b) = (Machine::new(&pool, pages), Machine::new(&pool, pages));
    for page in 0..100 {
        a.fill(page, 7 + page as u64);
        b.fill(page, 7 + page as u64);
    }
    (pool, scanner, a, b)
}

#[test]
fn the_same_pages_of_two_machines_take_memory_once() {
    let (pool, mut scanner, a, b) = twins(200);
    a.fill(150, 1);
    b.fill(150, 2);
    passes(&mut scanner, 5);
    let expected = PoolStatistics {
        copies: 100,
        shared_pages: 200,
        zero_pages: 0,
        private_pages: 0,
        mappings: 2,
        passes: 5,
    };
    assert_eq!(pool.statistics(), expected);
    assert_eq!(expected.bytes_saved(), 100 * PAGE as u64);
    assert_eq!((a.pages_in_file(), b.pages_in_file()), (1, 1));
    for page in 0..100 {
        a.assert_filled(page, 7 + page as u64);
        b.assert_filled(page, 7 + page as u64);
    }
    a.assert_filled(150, 1);
    b.assert_filled(150, 2);
}

#[test]
fn a_write_makes_a_page_private() {
    let (pool, mut scanner, a, b) = twins(128);
    passes(&mut scanner, 5);
    // The same page in both, differently; across an edge; and an untouched neighbour.
    a.fill(10, 1000);
    b.fill(10, 2000);
    a.write(20 * PAGE - 4, &[0xaa; 8]);
    a.assert_filled(10, 1000);
    b.assert_filled(10, 2000);
    b.assert_filled(19, 26);
    b.assert_filled(20, 27);
    a.assert_filled(11, 18);
    assert_eq!(
        a.memory.read_u64((20 * PAGE) as u64),
        Some(27 << 32 | 0xaaaa_aaaa)
    );
    assert_eq!((a.unshared(), b.unshared()), (3, 1));
    let now = pool.statistics();
    assert_eq!((now.copies, now.shared_pages), (99, 196));
    // Their traces are gone, and a VCPU may write directly again.
    // The two runs of pages had one each.
    assert_eq!(a.trace.region_count(), 4);
    assert!(a.memory.hold(VCPU, 10 * PAGE as u64, Sense::WRITE));
    assert!(!a.memory.hold(VCPU, 11 * PAGE as u64, Sense::WRITE));
}

#[test]
fn private_pages_become_shared_again() {
    let (pool, mut scanner, a, b) = twins(128);
    passes(&mut scanner, 5);
    a.fill(10, 1000);
    passes(&mut scanner, 2);
    assert_eq!(pool.statistics().shared_pages, 198 + 1);
    a.fill(10, 17);
    assert_eq!(a.unshared(), 1);
    passes(&mut scanner, 3);
    assert_eq!(pool.statistics().copies, 100);
    assert_eq!(pool.statistics().shared_pages, 200);
    a.assert_filled(10, 17);
    b.assert_filled(10, 17);
}

#[test]
fn a_write_that_stores_nothing_leaves_no_page_behind() {
    let (pool, mut scanner, a, b) = twins(128);
    passes(&mut scanner, 5);
    let range = Range::new(0x5010, 0x5018);
    for machine in [&a, &b] {
        let (memory, trace) = (&machine.memory, &machine.trace);
        trace
            .access(
                Actor::Device,
                &[range],
                Sense::WRITE,
                &mut |_| {},
                &mut || {
                    memory.before_write(&[range]);
                },
            )
            .unwrap();
        memory.after_writes(trace);
    }
    // The copy is free now; another one takes its place.
    assert_eq!(pool.statistics().copies, 99);
    a.fill(110, 5555);
    b.fill(110, 5555);
    passes(&mut scanner, 5);
    a.assert_filled(5, 12);
    b.assert_filled(5, 12);
    a.assert_filled(110, 5555);
}

#[test]
fn zeros_take_no_memory() {
    let pool = SharingPool::new().unwrap();
    let mut scanner = Scanner::new(Arc::clone(&pool));
    let a = Machine::new(&pool, 300);
    // Never touched: not even looked at.
    passes(&mut scanner, 4);
    assert_eq!((pool.statistics().zero_pages, a.pages_in_file()), (0, 0));
    a.write(50 * PAGE, &[0; 200 * PAGE]);
    a.write(100 * PAGE + 8, &[1]);
    assert_eq!(a.pages_in_file(), 200);
    passes(&mut scanner, 5);
    assert_eq!((pool.statistics().zero_pages, a.pages_in_file()), (199, 1));
    assert_eq!(pool.statistics().mappings, 4);
    a.write(60 * PAGE + 100, &[9]);
    let mut seen = [1; 2 * PAGE];
    assert!(a.memory.read((60 * PAGE) as u64, &mut seen));
    assert_eq!(seen[100], 9);
    assert_eq!(seen.iter().filter(|byte| **byte != 0).count(), 1);
    assert_eq!(a.unshared(), 1);
    assert_eq!(pool.statistics().zero_pages, 198);
}

#[test]
fn the_same_bytes_within_one_machine() {
    let pool = SharingPool::new().unwrap();
    let mut scanner = Scanner::new(Arc::clone(&pool));
    let a = Machine::new(&pool, 64);
    for page in 0..40 {
        a.fill(page, 3 + page as u64 % 2);
    }
    passes(&mut scanner, 6);
    let now = pool.statistics();
    assert_eq!((now.copies, now.shared_pages), (2, 40));
    a.fill(7, 9);
    for page in 0..40 {
        let content = if page == 7 { 9 } else { 3 + page as u64 % 2 };
        a.assert_filled(page, content);
    }
}

#[test]
fn mappings_are_bounded_and_long_runs_come_first() {
    let pool = SharingPool::with_mappings(40).unwrap();
    let mut scanner = Scanner::new(Arc::clone(&pool));
    let (a, b) = (Machine::new(&pool, 600), Machine::new(&pool, 600));
    // Single pages, none beside another, then one long run.
    for page in (0..400).step_by(2).chain(500..600) {
        a.fill(page, 7 + page as u64);
        b.fill(page, 7 + page as u64);
    }
    for page in (1..400).step_by(2) {
        a.fill(page, 10_000 + page as u64);
        b.fill(page, 20_000 + page as u64);
    }
    passes(&mut scanner, 12);
    let now = pool.statistics();
    assert!(now.mappings <= 40, "{now:?}");
    assert!(now.copies >= 100, "{now:?}");
    assert!(now.copies <= 120, "{now:?}");
}

#[test]
fn a_machine_leaves_and_the_others_keep_their_bytes() {
    let (pool, mut scanner, a, b) = twins(128);
    passes(&mut scanner, 5);
    drop(a);
    let now = pool.statistics();
    assert_eq!((now.copies, now.shared_pages, now.mappings), (100, 100, 1));
    passes(&mut scanner, 2);
    for page in 0..100 {
        b.assert_filled(page, 7 + page as u64);
    }
    drop(b);
    let now = pool.statistics();
    assert_eq!((now.copies, now.shared_pages, now.mappings), (0, 0, 0));
    passes(&mut scanner, 1);
}

#[test]
fn a_machine_is_in_one_pool() {
    let pool = SharingPool::new().unwrap();
    let a = Machine::new(&pool, 4);
    assert!(!pool.join(&a.memory, &a.trace, 1));
    assert_eq!(pool.lock().members.len(), 1);
}

/// A thread that plays a VCPU: it writes words, directly where it may, and looks whether they are
/// there, until it has written to a shared page so many times; `random` decides.
fn play(machine: &Machine, pages: usize, times: u64, mut random: u64) {
    let Machine { memory, trace } = machine;
    let mut direct = vec![false; pages];
    let mut expected = vec![0; pages];
    let apply = |direct: &mut Vec<bool>, notice: Notice| {
        if let Notice::Revoke { page, sense } = notice {
            direct[page as usize / PAGE] = false;
            memory.release(VCPU, page, sense);
        }
    };
    trace.leave_safe(VCPU);
    let mut rounds = 0_u64;
    while machine.unshared() < times {
        rounds += 1;
        assert!(rounds < 500_000_000, "hardly anything is shared");
        if trace.attention(VCPU).pending() {
            trace.boundary(VCPU, &mut |notice| apply(&mut direct, notice));
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let page = random as usize % pages;
        let gpa = (page * PAGE) as u64;
        // Few values, so that pages become the same again and again.
        let value = random >> 40 & 1;
        let old = expected[page];
        assert_eq!(memory.read_u64(gpa), Some(old));
        if direct[page] || memory.hold(VCPU, gpa, Sense::WRITE) {
            direct[page] = true;
            assert_eq!(memory.compare_exchange_u64(gpa, old, value), Some(Ok(())));
            expected[page] = value;
            continue;
        }
        let range = Range::new(gpa, gpa + 8);
        let written = trace.access(
            Actor::Vcpu(VCPU),
            &[range],
            Sense::WRITE,
            &mut |notice| apply(&mut direct, notice),
            &mut || {
                memory.before_write(&[range]);
                assert_eq!(memory.compare_exchange_u64(gpa, old, value), Some(Ok(())));
            },
        );
        memory.after_writes(trace);
        if written.is_ok() {
            expected[page] = value;
        }
    }
    trace.enter_safe(VCPU);
    for (page, value) in expected.iter().enumerate() {
        assert_eq!(memory.read_u64((page * PAGE) as u64), Some(*value));
    }
}

#[test]
fn writes_while_pages_are_being_shared_are_neither_lost_nor_seen_elsewhere() {
    const PAGES: usize = 24;
    let pool = SharingPool::new().unwrap();
    let (a, b) = (Machine::new(&pool, PAGES), Machine::new(&pool, PAGES));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (done, scan_pool) = (&done, Arc::clone(&pool));
        let scanning = scope.spawn(move || {
            let mut scanner = Scanner::new(scan_pool);
            while !done.load(Ordering::Relaxed) {
                scanner.step(PAGES);
            }
        });
        let playing = [
            scope.spawn(|| play(&a, PAGES, 1_000, 0x1234_5678_9abc_def1)),
            scope.spawn(|| play(&b, PAGES, 1_000, 0xfedc_ba98_7654_3211)),
        ];
        let results = playing.map(|thread| thread.join());
        done.store(true, Ordering::Relaxed);
        scanning.join().unwrap();
        for result in results {
            result.unwrap();
        }
    });
}
