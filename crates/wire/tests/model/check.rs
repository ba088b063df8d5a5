//! Runs the checker over a model and says what it has seen.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Debug;
use std::hash::Hash;

use stateright::{Checker, Expectation, HasDiscoveries, Model};

/// A model that the checker can run.
pub(crate) trait Checkable:
    Model<State: Clone + Debug + Hash + Eq + Send + Sync, Action: Clone + Debug + PartialEq + Send + Sync>
    + Send
    + Sync
    + 'static
{
}

impl<M> Checkable for M where
    M: Model<State: Clone + Debug + Hash + Eq + Send + Sync, Action: Clone + Debug + PartialEq + Send + Sync>
        + Send
        + Sync
        + 'static
{
}

/// Threads of a check: as many as the smallest machines that run it have.
const THREADS: usize = 2;

/// Visits every state: what must always hold does, and what must be possible is.
pub(crate) fn holds<M: Checkable>(name: &str, model: M) {
    verdict(name, model, None);
}

/// The same, but for one property, which need not hold.
pub(crate) fn holds_but<M: Checkable>(name: &str, model: M, property: &'static str) {
    verdict(name, model, Some(property));
}

fn verdict<M: Checkable>(name: &str, model: M, but: Option<&'static str>) {
    let checker = model.checker().threads(THREADS).spawn_bfs().join();
    let properties = checker.model().properties();
    println!(
        "{name}: {} states, {} transitions, depth {}, {} properties",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        properties.len()
    );
    let mut wrong = Vec::new();
    for property in properties {
        match (&property.expectation, checker.discovery(property.name)) {
            (Expectation::Sometimes, Some(_)) | (Expectation::Always, None) => {
                println!("    {:?}: {}", property.expectation, property.name);
            }
            _ if but == Some(property.name) => {}
            (Expectation::Sometimes, None) => wrong.push(format!("never: {}", property.name)),
            (_, path) => {
                let path = path.expect("the other cases are above");
                let last = path.last_state().clone();
                wrong.push(format!(
                    "violated: {}\n  by {:?}\n  which ends in {last:?}",
                    property.name,
                    path.into_actions()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{name}:\n{}", wrong.join("\n"));
}

/// Searches until it finds that this property is violated, which it must be.
pub(crate) fn is_caught<M: Checkable>(name: &str, model: M, property: &'static str) {
    let until = HasDiscoveries::AnyOf(BTreeSet::from([property]));
    let checker = model.checker().threads(THREADS).finish_when(until).spawn_bfs().join();
    let known = checker.model().properties();
    let expectation =
        &known.iter().find(|known| known.name == property).expect("there is such a property").expectation;
    assert_eq!(*expectation, Expectation::Always, "{property}: nothing that can be violated");
    let path = checker.discovery(property);
    let Some(path) = path else { panic!("{name}: nobody noticed that it violates {property:?}") };
    let actions = path.into_actions();
    println!(
        "{name} violates {property:?}, after {} states, in {} steps:",
        checker.unique_state_count(),
        actions.len()
    );
    println!("    {actions:?}");
}

/// Every run comes to an end, and each end is as it should be: no state comes twice in a run, and where nothing more happens, `is_well` holds.
pub(crate) fn every_run_ends<M: Checkable>(name: &str, model: &M, is_well: impl Fn(&M::State) -> bool) {
    /// Whether a state is on the path that is being followed.
    #[derive(PartialEq)]
    enum Mark {
        OnPath,
        Done,
    }
    let successors = |state: &M::State| {
        let next = model.next_states(state);
        assert!(!next.is_empty() || is_well(state), "{name}: nothing more happens in {state:#?}");
        next
    };
    let mut marks = HashMap::new();
    let mut ends = 0_usize;
    for start in model.init_states() {
        marks.insert(start.clone(), Mark::OnPath);
        let mut path = vec![(start.clone(), successors(&start))];
        while let Some((state, next)) = path.last_mut() {
            match next.pop() {
                Some(next) => match marks.get(&next) {
                    Some(Mark::OnPath) => panic!("{name}: a run goes round in circles through {next:#?}"),
                    Some(Mark::Done) => {}
                    None => {
                        marks.insert(next.clone(), Mark::OnPath);
                        let after = successors(&next);
                        ends += usize::from(after.is_empty());
                        path.push((next, after));
                    }
                },
                None => {
                    marks.insert(state.clone(), Mark::Done);
                    path.pop();
                }
            }
        }
    }
    println!("{name}: {} states, {ends} of them ends", marks.len());
    assert!(ends > 0);
}
