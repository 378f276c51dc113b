//! Every state that a model can reach, breadth first.

use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::Hash;

/// Something that takes steps.
pub trait Model {
    type State: Clone + Eq + Hash + Debug;
    /// Every state that one step leads to, with what is wrong with the step, if anything.
    fn steps(&self, state: &Self::State) -> Vec<(Self::State, Result<(), String>)>;
    /// What is wrong with a state that no step leads out of.
    fn end(&self, state: &Self::State) -> Result<(), String>;
}

/// How many states there are, or what is wrong and the states that lead there.
pub fn explore<M: Model>(model: &M, start: M::State) -> Result<usize, String> {
    let mut known = HashSet::from([start.clone()]);
    // Every state with the index of the one before it.
    let mut states = vec![(start, 0)];
    let mut at = 0;
    while at < states.len() {
        let state = states[at].0.clone();
        let steps = model.steps(&state);
        if steps.is_empty()
            && let Err(wrong) = model.end(&state)
        {
            return Err(told(wrong, &states, at));
        }
        for (next, verdict) in steps {
            if let Err(wrong) = verdict {
                states.push((next, at));
                return Err(told(wrong, &states, states.len() - 1));
            }
            if known.insert(next.clone()) {
                states.push((next, at));
            }
        }
        at += 1;
    }
    Ok(states.len())
}

/// The verdict and the states that lead to it.
fn told<S: Debug>(wrong: String, states: &[(S, usize)], mut at: usize) -> String {
    let mut path = vec![format!("{:?}", states[at].0)];
    while at != 0 {
        at = states[at].1;
        path.push(format!("{:?}", states[at].0));
    }
    path.reverse();
    format!("{wrong}, after\n{}", path.join("\n"))
}
