//! A breadth-first explorer of finite state machines: visits every state that can be reached, checks every step on
//! the way, and gives the shortest way to the first violation.
//!
//! Own code and not `stateright`: that one (0.31) cannot be had without its HTTP server (`tiny_http` is no optional
//! dependency, and there are no features), for what is done here in a page.

use std::{
    collections::HashSet,
    fmt::Debug,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash},
};

/// More states than this are a mistake in the machine: something in it grows without end.
const MOST_STATES: usize = 1_000_000;

/// A state machine.
pub trait Machine {
    /// All that decides what may happen next.
    type State: Copy + Hash;
    /// What may happen.
    type Step: Copy + Debug;

    /// Where it begins.
    fn start(&self) -> Self::State;

    /// Every step there is, whether or not a state allows it.
    fn steps(&self) -> Vec<Self::Step>;

    /// The state after a step; `None` when the state does not allow it.
    fn after(&self, state: &Self::State, step: Self::Step) -> Option<Self::State>;

    /// One of all the states that differ from this one only in names, always the same.
    fn canonical(&self, state: &Self::State) -> Self::State;
}

/// Something that is so or not.
pub struct Statement<M: Machine> {
    /// For people.
    pub name: &'static str,
    /// When it is so.
    pub holds: Holds<M>,
}

/// What a statement is about.
pub enum Holds<M: Machine> {
    /// A state, however it was reached.
    In(fn(&M::State) -> bool),
    /// A step: what was before, the step, what is after.
    At(fn(&M, &M::State, M::Step, &M::State) -> bool),
}

/// What was found.
#[derive(Debug)]
pub struct Report<S> {
    /// States that differ by more than names.
    pub states: usize,
    /// Steps that were checked.
    pub steps: usize,
    /// Length of the longest of the shortest ways to a state.
    pub depth: usize,
    /// The first promise that was broken, and a shortest way there.
    pub broken: Option<(&'static str, Vec<S>)>,
    /// What never happened.
    pub unseen: Vec<&'static str>,
}

/// How a state was reached first; its own place in the list is its number.
struct Reached<M: Machine> {
    state: M::State,
    depth: usize,
    by: Option<(usize, M::Step)>,
}

/// Visits every state that can be reached, or stops at the first broken promise. A promise must hold in every state or
/// step; an event must happen once.
pub fn explore<M: Machine>(machine: &M, promises: &[&Statement<M>], events: &[Statement<M>]) -> Report<M::Step> {
    let steps = machine.steps();
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    // Of a visited state 64 bits are kept: that two of a million share them happens once in 30 million explorations.
    let mut visited = HashSet::new();
    let mut reached = vec![Reached::<M> { state: machine.start(), depth: 0, by: None }];
    visited.insert(hasher.hash_one(machine.canonical(&reached[0].state)));
    let mut unseen: Vec<&Statement<M>> = events.iter().collect();
    let (mut at, mut checked, mut broken) = (0, 0, None);
    'search: while at < reached.len() {
        let Reached { state: before, depth, .. } = reached[at];
        for &step in &steps {
            let Some(after) = machine.after(&before, step) else { continue };
            checked += 1;
            let new = visited.insert(hasher.hash_one(machine.canonical(&after)));
            let failed = promises.iter().find(|promise| match promise.holds {
                Holds::In(holds) => new && !holds(&after),
                Holds::At(holds) => !holds(machine, &before, step, &after),
            });
            unseen.retain(|event| match event.holds {
                Holds::In(holds) => !holds(&after),
                Holds::At(holds) => !holds(machine, &before, step, &after),
            });
            assert!(
                visited.len() <= MOST_STATES,
                "more than {MOST_STATES} states, the last after {:?}",
                way_to(&reached, at)
            );
            if new || failed.is_some() {
                reached.push(Reached { state: after, depth: depth + 1, by: Some((at, step)) });
            }
            if let Some(promise) = failed {
                broken = Some((promise.name, way_to(&reached, reached.len() - 1)));
                break 'search;
            }
        }
        at += 1;
    }
    Report {
        states: visited.len(),
        steps: checked,
        depth: reached.last().map_or(0, |last| last.depth),
        broken,
        unseen: unseen.iter().map(|event| event.name).collect(),
    }
}

fn way_to<M: Machine>(reached: &[Reached<M>], mut at: usize) -> Vec<M::Step> {
    let mut way = Vec::new();
    while let Some((from, step)) = reached[at].by {
        way.push(step);
        at = from;
    }
    way.reverse();
    way
}
