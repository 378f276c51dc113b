//! Hand-offs among sleeping threads: a token goes round and every thread changes it.
//!
//! The final token depends on the order of all changes, so a hand-off that is lost, doubled or
//! seen too early gives another token or no end.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};

use crate::Load;
use crate::bracket::{Line, Outcome, Verdict, mix};
use crate::os;

/// The token after all rounds, computed by one thread.
fn expected(load: Load) -> u64 {
    let mut token = 1;
    for _ in 0..load.rounds {
        for thread in 0..load.threads {
            token = mix(token ^ u64::from(thread));
        }
    }
    token
}

/// The token goes round by futexes used directly.
pub fn ring(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let turns: Vec<Line<AtomicU32>> = (0..load.threads).map(|_| Line::default()).collect();
    let token = AtomicU64::new(1);
    turns[0].0.store(1, Ordering::Release);
    std::thread::scope(|scope| {
        for thread in 0..load.threads {
            let (turns, token) = (&turns, &token);
            scope.spawn(move || {
                let mine = &turns[thread as usize].0;
                let next = &turns[((thread + 1) % load.threads) as usize].0;
                for _ in 0..load.rounds {
                    while mine.load(Ordering::Acquire) == 0 {
                        os::futex_wait(mine, 0);
                    }
                    mine.store(0, Ordering::Relaxed);
                    let value = token.load(Ordering::Relaxed);
                    token.store(mix(value ^ u64::from(thread)), Ordering::Relaxed);
                    next.store(1, Ordering::Release);
                    os::futex_wake(next);
                }
            });
        }
    });
    let token = token.into_inner();
    verdict.equal("the token", token, expected(load));
    verdict.finish(token)
}

/// The token goes round by a mutex and one condition variable per thread.
pub fn condvar_ring(load: Load) -> Result<Outcome, String> {
    let verdict = Verdict::default();
    let state = Mutex::new((0_u32, 1_u64));
    let conditions: Vec<Condvar> = (0..load.threads).map(|_| Condvar::new()).collect();
    std::thread::scope(|scope| {
        for thread in 0..load.threads {
            let (state, conditions) = (&state, &conditions);
            scope.spawn(move || {
                let next = (thread + 1) % load.threads;
                for _ in 0..load.rounds {
                    let state = state.lock().expect("no thread panics here");
                    let mut state = conditions[thread as usize]
                        .wait_while(state, |(turn, _)| *turn != thread)
                        .expect("no thread panics here");
                    *state = (next, mix(state.1 ^ u64::from(thread)));
                    conditions[next as usize].notify_one();
                }
            });
        }
    });
    let (_, token) = state.into_inner().expect("no thread panics here");
    verdict.equal("the token", token, expected(load));
    verdict.finish(token)
}
