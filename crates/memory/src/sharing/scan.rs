//! Finding pages to share.
//!
//! A pass reads every page that a machine has of its own and hashes it. A page whose hash is the
//! same as in the pass before is a candidate: pages that change often are left alone. A candidate is
//! looked for among the copies, then among the candidates of this pass. All of this is read without
//! protection and only a hint; [`super::merge`] compares again.
//!
//! Pages that take no host memory (never touched) are not read, for reading would make them take
//! some.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::Arc;

use super::member::{OWN, ZEROS};
use super::merge::{Machine, Target};
use super::pool::SharingPool;
use super::{Bytes, RUN};

/// The shortest run that is worth its mappings, by how often the machine has been scanned: long
/// runs first. The first pass only takes hashes.
const SHORTEST: [usize; 3] = [usize::MAX, 16, 4];
/// The shortest run once half of the mappings are taken.
const SHORTEST_WHEN_SCARCE: usize = 16;
/// Mappings that sharing one run may take: two edges in each of two machines.
const EDGES: usize = 4;

/// What a candidate could be mapped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Match {
    Zeros,
    Copy(u32),
    /// A page of a machine, not shared yet, seems to have the same bytes.
    Page(u64, usize),
}

impl Match {
    /// Whether a page with match `next` right behind one with `self` continues its run.
    fn continues(self, next: Self) -> bool {
        match (self, next) {
            (Self::Zeros, Self::Zeros) => true,
            (Self::Copy(a), Self::Copy(b)) => b == a + 1,
            (Self::Page(m, a), Self::Page(n, b)) => m == n && b == a + 1,
            _ => false,
        }
    }
}

/// Neighbouring candidates with neighbouring matches.
struct Candidates {
    first: usize,
    start: Match,
    last: Match,
    hashes: Vec<u64>,
}

/// What is remembered of a machine from pass to pass.
#[derive(Default)]
struct Seen {
    /// By page: 31 bits of the hash, and bit 0 set; 0 if not seen.
    hashes: Vec<u32>,
    passes: usize,
}

/// What one step of the scanner did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Pages that were read.
    pub scanned: usize,
    /// Pages that became shared.
    pub shared: usize,
    /// A pass over all machines has ended.
    pub pass_ended: bool,
}

/// Finds pages to share in a pool's machines. One thread owns it.
pub struct Scanner {
    pool: Arc<SharingPool>,
    hasher: RandomState,
    seen: HashMap<u64, Seen>,
    /// Machines still to be scanned in this pass, the next one last.
    machines: Vec<u64>,
    /// Pages of the current machine still to be scanned, the next ones last.
    work: Vec<Range<usize>>,
    /// Candidates of this pass without a partner, by hash.
    alone: HashMap<u64, (u64, usize)>,
    run: Option<Candidates>,
}

impl Scanner {
    pub fn new(pool: Arc<SharingPool>) -> Self {
        Self {
            pool,
            // With a key of its own, so that no guest can prepare pages that collide.
            hasher: RandomState::new(),
            seen: HashMap::new(),
            machines: Vec::new(),
            work: Vec::new(),
            alone: HashMap::new(),
            run: None,
        }
    }

    /// Scans up to `pages` pages, or to the end of the pass, and shares what it finds. Called on a
    /// thread that is no VCPU's: it may wait for all VCPUs.
    pub fn step(&mut self, pages: usize) -> Step {
        let mut step = Step::default();
        if self.machines.is_empty() {
            self.begin_pass();
        }
        while let Some(&id) = self.machines.last() {
            let Some(machine) = self.machine(id) else {
                self.seen.remove(&id);
                self.leave_machine();
                continue;
            };
            while let Some(page) = self.next_page() {
                self.look_at(id, &machine, page, &mut step);
                step.scanned += 1;
                if step.scanned >= pages {
                    return step;
                }
            }
            step.shared += self.finish_run(id, &machine);
            if let Some(seen) = self.seen.get_mut(&id) {
                seen.passes += 1;
            }
            self.leave_machine();
        }
        self.pool.lock().passes += 1;
        // Its memory goes back: there was an entry for every page without a partner.
        self.alone = HashMap::new();
        step.pass_ended = true;
        step
    }

    fn begin_pass(&mut self) {
        self.alone.clear();
        self.machines = self.pool.lock().members.keys().rev().copied().collect();
        self.enter_machine();
    }

    /// The machine, if it still exists.
    fn machine(&self, id: u64) -> Option<Machine> {
        let (memory, trace) = {
            let inner = self.pool.lock();
            let records = inner.members.get(&id)?;
            (records.memory.clone(), records.trace.clone())
        };
        // Not under the lock: the last owner's drop takes it.
        Some(Machine {
            memory: memory.upgrade()?,
            trace: trace.upgrade()?,
        })
    }

    fn leave_machine(&mut self) {
        self.machines.pop();
        self.run = None;
        self.enter_machine();
    }

    /// Lists the pages of the next machine.
    fn enter_machine(&mut self) {
        self.work.clear();
        let Some(&id) = self.machines.last() else {
            return;
        };
        let Some(machine) = self.machine(id) else {
            return;
        };
        let mut pages = machine.memory.pages_in_file();
        if let Some(records) = self.pool.lock().members.get(&id) {
            pages.extend(records.private.iter().map(|page| *page..page + 1));
        }
        pages.sort_unstable_by_key(|run| std::cmp::Reverse(run.start));
        self.work = pages;
        let seen = self.seen.entry(id).or_default();
        seen.hashes.resize(machine.memory.page_count(), 0);
    }

    fn next_page(&mut self) -> Option<usize> {
        let run = self.work.last_mut()?;
        let page = run.start;
        run.start += 1;
        if run.start >= run.end {
            self.work.pop();
        }
        Some(page)
    }

    fn hash(&self, bytes: &Bytes) -> u64 {
        self.hasher.hash_one(bytes)
    }

    /// Reads a page; if it is a candidate it goes on the run, else the run ends.
    fn look_at(&mut self, id: u64, machine: &Machine, page: usize, step: &mut Step) {
        let found = self.find(id, machine, page);
        if let (Some(run), Some((next, hash))) = (&mut self.run, found)
            && run.first + run.hashes.len() == page
            && run.last.continues(next)
            && run.hashes.len() < RUN
            // The partners must not reach into the run itself.
            && next != Match::Page(id, run.first)
            && machine.memory.host_of_pages(run.first, run.hashes.len() + 1).is_some()
        {
            run.last = next;
            run.hashes.push(hash);
            return;
        }
        step.shared += self.finish_run(id, machine);
        self.run = found.map(|(next, hash)| Candidates {
            first: page,
            start: next,
            last: next,
            hashes: vec![hash],
        });
    }

    /// What the page could be mapped to, and its hash.
    fn find(&mut self, id: u64, machine: &Machine, page: usize) -> Option<(Match, u64)> {
        if machine.member()?.state(page) != OWN {
            return None;
        }
        let bytes = machine.memory.read_page(page)?;
        let hash = self.hash(&bytes);
        let mark = hash as u32 | 1;
        let known = self.seen.get_mut(&id)?.hashes.get_mut(page)?;
        if std::mem::replace(known, mark) != mark {
            return None;
        }
        if bytes.iter().all(|word| *word == 0) {
            return Some((Match::Zeros, hash));
        }
        if let Some(slot) = self.pool.lock().slots.find(hash) {
            return Some((Match::Copy(slot), hash));
        }
        match self.alone.get(&hash) {
            Some(&(other, partner)) => Some((Match::Page(other, partner), hash)),
            None => {
                self.alone.insert(hash, (id, page));
                None
            }
        }
    }

    /// Whether a run is worth its mappings.
    fn is_worth_it(&self, id: u64, run: &Candidates) -> bool {
        let passes = self.seen.get(&id).map_or(0, |seen| seen.passes);
        let count = run.hashes.len();
        let (room, bound) = self.pool.mappings();
        let backing = match run.start {
            Match::Zeros => Some(ZEROS),
            Match::Copy(slot) => Some(slot),
            Match::Page(..) => None,
        };
        let joins = backing.is_some_and(|backing| {
            let inner = self.pool.lock();
            let records = inner.members.get(&id);
            records.is_some_and(|r| r.joins(run.first, count, backing))
        });
        let shortest = SHORTEST.get(passes).copied().unwrap_or(1);
        let scarce = room < bound / 2 && count < SHORTEST_WHEN_SCARCE;
        (joins || (count >= shortest && !scarce)) && room >= EDGES
    }

    /// Shares the run that was being collected. Returns how many pages became shared.
    fn finish_run(&mut self, id: u64, machine: &Machine) -> usize {
        let Some(run) = self.run.take() else { return 0 };
        if !self.is_worth_it(id, &run) {
            return 0;
        }
        let (first, count) = (run.first, run.hashes.len());
        let pool = Arc::clone(&self.pool);
        let hash = |bytes: &Bytes| self.hasher.hash_one(bytes);
        match run.start {
            Match::Zeros => pool.share(machine, first, count, Target::Zeros, hash),
            Match::Copy(slot) => pool.share(machine, first, count, Target::Copies(slot), hash),
            Match::Page(other, partner) => {
                let Some(other) = self.machine(other) else {
                    return 0;
                };
                let Ok(slot) = pool.lock().slots.take(count as u32) else {
                    return 0;
                };
                // The partners first: they give the copies their bytes.
                let made = Target::Made(slot, &run.hashes);
                match pool.share(&other, partner, count, made, hash) {
                    0 => 0,
                    done => done + pool.share(machine, first, count, Target::Copies(slot), hash),
                }
            }
        }
    }
}
