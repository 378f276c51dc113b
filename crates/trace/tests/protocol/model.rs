//! The protocol as steps of three VCPUs on two regions.
//!
//! One step is one access to something shared: the lane, the word that says who is held, a run
//! state, an attention word, a queue, the bytes. VCPU 1 consumes both regions, VCPU 0 the first and
//! VCPU 2 the second. Bytes are versions: how often they were written. What a VCPU derived from
//! them is the version it derived from.

use crate::explore::Model;

pub const VCPUS: usize = 3;
pub const REGIONS: usize = 2;
pub const CONSUMERS: [[bool; VCPUS]; REGIONS] = [[true, true, false], [false, true, true]];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Semantics {
    Bracketing,
    Sync,
    Async,
    PreWrite,
}

pub const SEMANTICS: [Semantics; 4] = [
    Semantics::Bracketing,
    Semantics::Sync,
    Semantics::Async,
    Semantics::PreWrite,
];

/// What a VCPU executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// Something derived from each region that it consumes; it also reads what `Look` stored.
    Execute,
    /// Reads the bytes of a region and stores what only their new value makes it store.
    Look(usize),
    /// Writes these regions in one access.
    Write([bool; REGIONS]),
    Halt,
}

/// A step that is left out or done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    ResumeEarly,
    ForgetRequest,
    WriteWithoutWaiting,
    /// Bracket as if it were post-write-sync.
    WaitAfterWrite,
    GoOnWithoutWaiting,
    NoRestart,
    NotifyTwice,
    NotifyBystanders,
    LoseNotice,
    WaitForSleepers,
    WakeWithoutLooking,
    WaitRunning,
    NoLane,
    NotifyAfterWrite,
    NotifyBeforeWrite,
}

/// Where a VCPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    /// Running, before it looks at its attention word.
    Boundary,
    /// Has taken the attention bit.
    Attends,
    /// Stopped, held or about to go on.
    Stalled,
    /// Has said that it runs, and looks whether it is held.
    Starts,
    /// Has found that it is not held, and takes the attention bit.
    Takes,
    /// About to empty its queue.
    Drains,
    Executes,
    Looks,
    WantsLane,
    WaitsForLane,
    OwnsLane,
    /// Queues pre-write notices, next for this VCPU.
    Announces(u8),
    Holds,
    Asks,
    WaitsStopped,
    Reads,
    Writes,
    /// Queues the other notices, next for this VCPU.
    Notifies(u8),
    Releases,
    AppliesOwn,
    WaitsAcknowledged,
    LeavesLane,
    Halted,
    Done,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Vcpu {
    pub at: At,
    pub instruction: u8,
    pub running: bool,
    pub attention: bool,
    /// Region and version of each notice.
    pub queue: Vec<(u8, u8)>,
    pub posted: u8,
    pub taken: u8,
    pub derived: [u8; REGIONS],
    pub told: [u8; REGIONS],
    /// What it read before it writes.
    pub read: [u8; REGIONS],
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub vcpus: [Vcpu; VCPUS],
    pub lane: Option<u8>,
    pub held: [bool; VCPUS],
    pub bytes: [u8; REGIONS],
    /// What `Look` stored.
    pub seen: [u8; REGIONS],
    /// The version whose actor has gone on to its next instruction.
    pub completed: [u8; REGIONS],
    pub events: [u8; REGIONS],
    /// Whether its consumers have acknowledged a bracket and it is not complete; by whom.
    pub bracket: [Option<u8>; REGIONS],
}

pub struct Protocol {
    pub semantics: [Semantics; REGIONS],
    pub programs: [&'static [Instruction]; VCPUS],
    pub mutation: Option<Mutation>,
    /// Regions for which the chain of \[0087\] must hold whatever their semantics.
    pub demand_causality: bool,
}

type Step = (State, Result<(), String>);

impl Protocol {
    pub fn start(&self) -> State {
        let vcpu = Vcpu {
            at: At::Boundary,
            instruction: 0,
            running: true,
            attention: false,
            queue: Vec::new(),
            posted: 0,
            taken: 0,
            derived: [0; REGIONS],
            told: [0; REGIONS],
            read: [0; REGIONS],
        };
        State {
            vcpus: [vcpu.clone(), vcpu.clone(), vcpu],
            lane: None,
            held: [false; VCPUS],
            bytes: [0; REGIONS],
            seen: [0; REGIONS],
            completed: [0; REGIONS],
            events: [0; REGIONS],
            bracket: [None; REGIONS],
        }
    }

    fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    fn instruction(&self, state: &State, me: usize) -> Option<Instruction> {
        let program = self.programs[me];
        program
            .get(usize::from(state.vcpus[me].instruction))
            .copied()
    }

    /// The regions that the access of `me` hits.
    fn hit(&self, state: &State, me: usize) -> [bool; REGIONS] {
        match self.instruction(state, me) {
            Some(Instruction::Write(regions)) => regions,
            _ => [false; REGIONS],
        }
    }

    fn consumes(&self, region: usize, vcpu: usize) -> bool {
        CONSUMERS[region][vcpu] || self.is(Mutation::NotifyBystanders)
    }

    /// Whether `vcpu` is another VCPU's consumer under these semantics in the access of `me`.
    fn concerns(&self, state: &State, me: usize, vcpu: usize, semantics: Semantics) -> bool {
        let hit = self.hit(state, me);
        let asked = |r: usize| match self.semantics[r] {
            Semantics::Bracketing if self.is(Mutation::WaitAfterWrite) => Semantics::Sync,
            other => other,
        };
        vcpu != me
            && (0..REGIONS).any(|r| hit[r] && asked(r) == semantics && self.consumes(r, vcpu))
    }

    fn before_write(&self, region: usize) -> bool {
        match self.semantics[region] {
            Semantics::PreWrite => !self.is(Mutation::NotifyAfterWrite),
            _ => self.is(Mutation::NotifyBeforeWrite),
        }
    }

    /// Queues the notices for one VCPU.
    fn post(&self, state: &mut State, me: usize, to: usize, before_write: bool) {
        if to == me {
            return;
        }
        for (r, hit) in self.hit(state, me).into_iter().enumerate() {
            if !hit || !self.consumes(r, to) || self.before_write(r) != before_write {
                continue;
            }
            let version = state.vcpus[me].read[r] + 1;
            let times = match self.mutation {
                Some(Mutation::NotifyTwice) => 2,
                Some(Mutation::LoseNotice) => 0,
                _ => 1,
            };
            let vcpu = &mut state.vcpus[to];
            for _ in 0..times {
                vcpu.queue.push((r as u8, version));
                vcpu.posted += 1;
                vcpu.attention = true;
            }
        }
    }

    /// Derives anew from what a notice tells.
    fn apply(&self, state: &mut State, me: usize, region: usize, version: u8) {
        let vcpu = &mut state.vcpus[me];
        vcpu.told[region] += 1;
        vcpu.derived[region] = match self.semantics[region] {
            Semantics::PreWrite => version,
            _ => state.bytes[region],
        };
    }

    /// Empties the queue; the notices must come in the order of the writes.
    fn drain(&self, state: &mut State, me: usize) -> Result<(), String> {
        let queue = std::mem::take(&mut state.vcpus[me].queue);
        state.vcpus[me].taken = state.vcpus[me].posted;
        for (region, version) in queue {
            let region = usize::from(region);
            if version < state.vcpus[me].told[region] {
                return Err("7: notices are out of order".into());
            }
            self.apply(state, me, region, version);
        }
        Ok(())
    }

    /// What must hold when a VCPU executes something derived.
    fn check_execution(&self, state: &State, me: usize) -> Result<(), String> {
        for r in (0..REGIONS).filter(|r| CONSUMERS[*r][me]) {
            let derived = state.vcpus[me].derived[r];
            let semantics = self.semantics[r];
            let bracketing = semantics == Semantics::Bracketing;
            if bracketing && state.bracket[r].is_some_and(|actor| usize::from(actor) != me) {
                return Err("2: executes between acknowledgement and completion".into());
            }
            if (bracketing || semantics == Semantics::Sync) && derived < state.completed[r] {
                return Err("3: executes what is old after the actor went on".into());
            }
            if (bracketing || self.demand_causality) && derived < state.seen[r] {
                return Err("4: what is old meets what only the new could cause".into());
            }
        }
        Ok(())
    }

    /// Whether an actor has asked for an acknowledgement and the VCPU does not know.
    fn has_lost_request(&self, state: &State, me: usize) -> bool {
        let waits = |vcpu: &Vcpu| vcpu.at == At::WaitsStopped;
        let vcpu = &state.vcpus[me];
        let knows = vcpu.attention || !vcpu.running;
        state.held[me] && !knows && state.vcpus.iter().any(waits)
    }

    fn next(state: &mut State, me: usize) {
        state.vcpus[me].instruction += 1;
        state.vcpus[me].at = At::Boundary;
    }

    /// The step of one VCPU, if it can take any.
    fn step(&self, before: &State, me: usize) -> Option<Step> {
        let mut state = before.clone();
        let s = &mut state;
        let mut verdict = Ok(());
        let at = s.vcpus[me].at;
        let go = |s: &mut State, to: At| s.vcpus[me].at = to;
        match at {
            At::Boundary if s.vcpus[me].attention => {
                s.vcpus[me].attention = false;
                go(s, At::Attends);
            }
            At::Boundary if self.has_lost_request(s, me) => {
                return Some((state, Err("7: a request is lost".into())));
            }
            At::Boundary => match self.instruction(s, me) {
                Some(Instruction::Execute) => go(s, At::Executes),
                Some(Instruction::Look(_)) => go(s, At::Looks),
                Some(Instruction::Write(_)) => go(s, At::WantsLane),
                Some(Instruction::Halt) => {
                    s.vcpus[me].running = false;
                    go(s, At::Halted);
                }
                None => {
                    s.vcpus[me].running = false;
                    go(s, At::Done);
                }
            },
            At::Attends if s.held[me] => {
                s.vcpus[me].running = false;
                let early = self.is(Mutation::ResumeEarly);
                go(s, if early { At::Drains } else { At::Stalled });
            }
            At::Attends => go(s, At::Drains),
            At::Stalled if s.held[me] => return None,
            At::Stalled => {
                s.vcpus[me].running = true;
                go(s, At::Starts);
            }
            At::Starts if s.held[me] => {
                s.vcpus[me].running = false;
                go(s, At::Stalled);
            }
            // Whoever stalled or slept empties its queue before it goes on. The bit that it takes
            // may be the next actor's request, so it looks again whether it is held.
            At::Starts => go(s, At::Takes),
            At::Takes => {
                s.vcpus[me].attention = false;
                let forgets = self.is(Mutation::ForgetRequest);
                go(s, if forgets { At::Drains } else { At::Attends });
            }
            At::Drains => {
                verdict = self.drain(s, me);
                go(s, At::Boundary);
            }
            At::Executes => {
                verdict = self.check_execution(s, me);
                Self::next(s, me);
            }
            At::Looks => {
                if let Some(Instruction::Look(r)) = self.instruction(s, me) {
                    s.seen[r] = s.seen[r].max(s.bytes[r]);
                }
                Self::next(s, me);
            }
            At::Halted => {
                // Wakes for a reason of its own.
                s.vcpus[me].instruction += 1;
                s.vcpus[me].running = true;
                if self.is(Mutation::WakeWithoutLooking) {
                    s.vcpus[me].attention = false;
                    go(s, At::Boundary);
                } else {
                    go(s, At::Starts);
                }
            }
            At::Done => return None,
            _ => verdict = self.act(s, me, at)?,
        }
        Some((state, verdict))
    }

    /// The steps of an actor. `None` while it waits.
    fn act(&self, s: &mut State, me: usize, at: At) -> Option<Result<(), String>> {
        let mut verdict = Ok(());
        let hit = self.hit(s, me);
        let go = |s: &mut State, to: At| s.vcpus[me].at = to;
        match at {
            At::WantsLane if s.lane.is_none() || self.is(Mutation::NoLane) => {
                s.lane = Some(me as u8);
                go(s, At::OwnsLane);
            }
            At::WantsLane => {
                s.vcpus[me].running = self.is(Mutation::WaitRunning);
                go(s, At::WaitsForLane);
            }
            At::WaitsForLane if s.lane.is_some() => return None,
            At::WaitsForLane => {
                s.lane = Some(me as u8);
                s.vcpus[me].running = true;
                go(s, At::OwnsLane);
            }
            At::OwnsLane if !s.vcpus[me].queue.is_empty() && !self.is(Mutation::NoRestart) => {
                s.vcpus[me].attention = false;
                verdict = self.drain(s, me);
                s.lane = None;
                go(s, At::Boundary);
            }
            At::OwnsLane => go(s, At::Reads),
            At::Reads => {
                s.vcpus[me].read = s.bytes;
                go(s, At::Announces(0));
            }
            At::Announces(to) if usize::from(to) < VCPUS => {
                self.post(s, me, usize::from(to), true);
                go(s, At::Announces(to + 1));
            }
            At::Announces(_) => {
                for (r, _) in hit.iter().enumerate().filter(|(r, hit)| {
                    **hit && self.semantics[*r] == Semantics::PreWrite && CONSUMERS[*r][me]
                }) {
                    let version = s.vcpus[me].read[r] + 1;
                    self.apply(s, me, r, version);
                }
                go(s, At::Holds);
            }
            At::Holds => {
                for vcpu in 0..VCPUS {
                    s.held[vcpu] = self.concerns(s, me, vcpu, Semantics::Bracketing);
                }
                go(s, At::Asks);
            }
            At::Asks => {
                for vcpu in 0..VCPUS {
                    s.vcpus[vcpu].attention |= s.held[vcpu];
                }
                go(s, At::WaitsStopped);
            }
            At::WaitsStopped => {
                let mut waits = (0..VCPUS).any(|v| s.held[v] && s.vcpus[v].running);
                if self.is(Mutation::WaitForSleepers) {
                    waits |= (0..VCPUS).any(|v| s.held[v] && s.vcpus[v].attention);
                }
                if waits && !self.is(Mutation::WriteWithoutWaiting) {
                    return None;
                }
                let bracket = !self.is(Mutation::WaitAfterWrite);
                for (r, open) in s.bracket.iter_mut().enumerate() {
                    if bracket && hit[r] && self.semantics[r] == Semantics::Bracketing {
                        *open = Some(me as u8);
                    }
                }
                go(s, At::Writes);
            }
            At::Writes => {
                // The writing instruction takes effect: it must not be an old one.
                verdict = self.check_execution(s, me);
                for r in (0..REGIONS).filter(|r| hit[*r]) {
                    s.bytes[r] = s.vcpus[me].read[r] + 1;
                    s.events[r] += 1;
                    let unannounced = |(v, vcpu): (usize, &Vcpu)| {
                        let queued = vcpu.queue.iter().filter(|(of, _)| usize::from(*of) == r);
                        CONSUMERS[r][v]
                            && usize::from(vcpu.told[r]) + queued.count() < usize::from(s.bytes[r])
                    };
                    if self.semantics[r] == Semantics::PreWrite
                        && s.vcpus.iter().enumerate().any(unannounced)
                    {
                        verdict = Err("pre-write: written before it was announced".into());
                    }
                }
                go(s, At::Notifies(0));
            }
            At::Notifies(to) if usize::from(to) < VCPUS => {
                self.post(s, me, usize::from(to), false);
                go(s, At::Notifies(to + 1));
            }
            At::Notifies(_) => {
                for bracket in s.bracket.iter_mut().filter(|b| **b == Some(me as u8)) {
                    *bracket = None;
                }
                go(s, At::Releases);
            }
            At::Releases => {
                s.held = [false; VCPUS];
                go(s, At::AppliesOwn);
            }
            At::AppliesOwn => {
                for r in (0..REGIONS).filter(|r| hit[*r] && CONSUMERS[*r][me]) {
                    if self.semantics[r] != Semantics::PreWrite {
                        self.apply(s, me, r, 0);
                    }
                }
                go(s, At::WaitsAcknowledged);
            }
            At::WaitsAcknowledged => {
                let late = |v: usize| {
                    self.concerns(s, me, v, Semantics::Sync)
                        && s.vcpus[v].running
                        && s.vcpus[v].taken != s.vcpus[v].posted
                };
                if (0..VCPUS).any(late) && !self.is(Mutation::GoOnWithoutWaiting) {
                    return None;
                }
                go(s, At::LeavesLane);
            }
            At::LeavesLane => {
                s.lane = None;
                for r in (0..REGIONS).filter(|r| hit[*r]) {
                    s.completed[r] = s.bytes[r];
                }
                Self::next(s, me);
            }
            _ => return None,
        }
        Some(verdict)
    }
}

impl Model for Protocol {
    type State = State;

    fn steps(&self, state: &State) -> Vec<Step> {
        let step = |me| Some((me, self.step(state, me)?));
        let steps: Vec<(usize, Step)> = (0..VCPUS).filter_map(step).collect();
        // A sleeper need not wake: if others wait, they must be able to go on without it.
        let asleep = |me: usize| state.vcpus[me].at == At::Halted;
        let over = |vcpu: &Vcpu| matches!(vcpu.at, At::Halted | At::Done);
        if steps.iter().all(|(me, _)| asleep(*me)) && !state.vcpus.iter().all(over) {
            return Vec::new();
        }
        steps.into_iter().map(|(_, step)| step).collect()
    }

    fn end(&self, state: &State) -> Result<(), String> {
        if state.vcpus.iter().any(|vcpu| vcpu.at != At::Done) {
            return Err("6 and 7: nobody can go on".into());
        }
        if state.bytes != state.events {
            return Err("7: a write is lost".into());
        }
        for (v, vcpu) in state.vcpus.iter().enumerate() {
            for (r, consumers) in CONSUMERS.iter().enumerate() {
                let queued = vcpu.queue.iter().filter(|(of, _)| usize::from(*of) == r);
                let told = vcpu.told[r] + queued.clone().count() as u8;
                let expected = if consumers[v] { state.events[r] } else { 0 };
                if told != expected {
                    return Err(format!("5: VCPU {v} is told {told} of {expected} events"));
                }
                if consumers[v] && queued.count() == 0 && vcpu.derived[r] != state.bytes[r] {
                    return Err("3: what is derived stays old for ever".into());
                }
            }
        }
        Ok(())
    }
}
