//! Every verb in every state, at every moment, with everything beside: the whole table of
//! [`mvm_habits`] on the simulated host.
//!
//! ```text
//!  Combination ──> Scene: a tenant's pool, an instance brought into its state, a new agent perhaps
//!              ──> asking: the call, answered in time, or hung up on in the middle
//!              ──> checks: the answer, the state in the end, the guest's files, the neighbour, and
//!                  nothing left behind
//! ```
//!
//! A run walks all that have nothing special beside, and an eighth of the others, so that eight days
//! see all of them; `MVM_HABITS_SEED` has the run of another day, `MVM_HABITS_ALL` walks everything.
//! `MVM_HABITS_ONLY` walks only those whose names contain all of its words, which are separated by
//! commas.

mod asking;
mod checks;
mod scene;

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use mvm_habits::{Beside, Combination, Situation, Verb, verb_of};
use tokio::runtime::{Builder, Runtime};

use scene::Scene;

/// Failures that are told in full.
const TOLD: usize = 40;

/// Combinations that are walked with one instance: of questions, which change nothing, as many as
/// there are.
type Walk = Vec<Combination>;
/// Everything of one pair of a state and what is beside; it shares a machine.
type Group = ((Beside, Situation), Vec<Walk>);

fn today() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since_epoch.as_secs() / 86_400
}

fn groups(seed: u64) -> Vec<Group> {
    let only = std::env::var("MVM_HABITS_ONLY").unwrap_or_default();
    let is_all = std::env::var_os("MVM_HABITS_ALL").is_some();
    let is_wanted = |combination: &Combination| {
        let name = combination.to_string();
        (is_all || combination.is_in_turn(seed))
            && only.split(',').all(|word| name.contains(word.trim()))
    };
    let mut groups: Vec<Group> = Vec::new();
    for combination in Combination::all().filter(is_wanted) {
        let key = (combination.beside, combination.situation);
        let walks = match groups.last_mut() {
            Some((last, walks)) if *last == key => walks,
            _ => {
                groups.push((key, Vec::new()));
                &mut groups.last_mut().unwrap().1
            }
        };
        let is_question = |it: &Combination| it.verb.is_question();
        let together = walks.iter_mut().find(|walk| {
            is_question(&combination)
                && is_question(&walk[0])
                && walk[0].moment == combination.moment
        });
        match together {
            Some(walk) => walk.push(combination),
            None => walks.push(vec![combination]),
        }
    }
    groups
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

/// Walks a group and returns what fails.
fn walk(walks: &[Walk]) -> Vec<String> {
    let mut failures = Vec::new();
    let mut place: Option<(Runtime, Scene)> = None;
    for walk in walks {
        let walked = catch_unwind(AssertUnwindSafe(|| {
            let (runtime, scene) = place.get_or_insert_with(|| {
                let runtime = runtime();
                let scene = runtime.block_on(Scene::new());
                (runtime, scene)
            });
            runtime.block_on(scene.walk(walk))
        }));
        let failure = match walked {
            Ok(Ok(())) => continue,
            Ok(Err(failure)) => failure,
            Err(_) => "it panicked".to_owned(),
        };
        failures.push(format!("{}: {failure}", walk[0]));
        // Whatever is left of it is no concern of the next.
        place = None;
    }
    failures
}

#[test]
fn every_verb_does_in_every_state_what_the_table_says() {
    let began = Instant::now();
    let seed = std::env::var("MVM_HABITS_SEED").map_or_else(|_| today(), |it| it.parse().unwrap());
    let groups = groups(seed);
    let count: usize = groups.iter().flat_map(|(_, walks)| walks).map(Vec::len).sum();
    let waiting = Mutex::new(groups);
    let failures = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let Some((_, walks)) = waiting.lock().unwrap().pop() else { return };
                    let failed = walk(&walks);
                    failures.lock().unwrap().extend(failed);
                }
            });
        }
    });
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    let seconds = began.elapsed().as_secs();
    let failing = failures.len();
    // Not captured, as what is printed by a test that passes is.
    let line = format!(
        "habits on the simulated host: MVM_HABITS_SEED={seed}, {count} combinations, {failing} failing, {seconds} s\n"
    );
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    let told = &failures[..failures.len().min(TOLD)];
    assert!(failures.is_empty(), "{failing} of {count} fail, such as\n{}", told.join("\n"));
}

#[test]
fn each_verb_is_asked_with_a_call_of_its_own_row() {
    let subject = "demo/app/i-00000001".parse().unwrap();
    for &verb in Verb::ALL {
        let call = asking::call(verb, &subject, &mvm_core::spec::PoolSpec::default());
        assert_eq!(verb_of(&call), Some(verb), "{call:?}");
    }
}
