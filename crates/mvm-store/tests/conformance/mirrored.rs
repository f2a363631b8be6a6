//! What is mirrored is what the store has, whoever wrote it and whatever goes wrong.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures_util::future::join_all;
use mvm_store::{
    Change, ChangeError, CommitError, Fault, FaultyStore, Fold, Infallible, Limits, Mirrored, Op,
    Part, Room, Store, StoreError, Transaction, Version,
};
use proptest::prelude::*;

crate::on_every_backend!(
    what_comes_together_is_decided_in_order_and_committed_at_once,
    what_fails_leaves_nothing_and_what_frees_space_is_written_with_the_reserve,
    a_change_that_is_too_much_is_refused_and_many_are_committed_in_parts,
    a_caller_that_goes_away_takes_nobodys_change_with_it,
    what_others_write_is_seen,
    two_that_change_the_same_part_decide_on_top_of_each_other,
    what_waits_is_decided_again_when_somebody_else_was_faster,
    what_is_being_decided_is_decided_again_when_somebody_else_is_faster,
    what_is_decided_next_rests_on_what_was_committed_among_others_writes,
    a_commit_without_an_answer_happens_once,
    a_commit_that_comes_late_does_not_undo_what_came_between,
    a_commit_whose_outcome_stays_unknown_is_an_error_until_the_store_answers,
    history_that_is_gone_is_read_anew,
    a_watch_that_breaks_loses_nothing,
    a_mirror_that_is_dropped_lets_go_of_its_store,
    what_is_in_the_value_alone_stays_when_the_store_is_read_anew,
);

const PART: Part = Part { scope: "texts", prefixes: &["a/", "b/"] };

/// All entries, as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Texts {
    version: Version,
    texts: BTreeMap<String, String>,
    /// Not from the store.
    note: String,
}

impl Texts {
    fn apply(&mut self, key: &str, value: Option<&[u8]>) {
        match value {
            None => drop(self.texts.remove(key)),
            Some(bytes) => {
                let text = String::from_utf8(bytes.to_vec()).unwrap();
                self.texts.insert(key.to_owned(), text);
            }
        }
    }

    fn note_version(&mut self, version: Version) {
        self.version = version;
    }
}

fn faulty(store: Arc<dyn Store>) -> Arc<FaultyStore> {
    Arc::new(FaultyStore::new(store))
}

async fn mirrored(store: &Arc<FaultyStore>) -> Mirrored<Texts> {
    mirrored_with(store, || false).await
}

async fn mirrored_with(
    store: &Arc<FaultyStore>,
    give_up_space: impl Fn() -> bool + Send + Sync + 'static,
) -> Mirrored<Texts> {
    let fold = Fold { apply: Texts::apply, note_version: Texts::note_version };
    Mirrored::load(store.clone(), PART, fold, Box::new(give_up_space)).await.unwrap()
}

/// What the store has of the part.
async fn stored(store: &dyn Store) -> BTreeMap<String, String> {
    let entries = store.list("").await.unwrap().entries.into_iter();
    let of_part = entries.filter(|entry| PART.prefixes.iter().any(|it| entry.key.starts_with(it)));
    of_part.map(|entry| (entry.key, String::from_utf8(entry.value).unwrap())).collect()
}

async fn until(mirrored: &Mirrored<Texts>, is_so: impl Fn(&Texts) -> bool) {
    mirrored.follow().wait_for(|texts| is_so(texts)).await.unwrap();
}

/// Takes the next free number.
async fn take_number(mirrored: &Mirrored<Texts>) -> Result<usize, ChangeError<Infallible>> {
    let take = async |seen: Arc<Texts>| {
        let number = seen.texts.len();
        Ok((vec![Op::put(format!("a/{number:04}"), "x")], number))
    };
    mirrored.change(Room::Ordinary, take).await.map(|(_, number)| number)
}

async fn write(mirrored: &Mirrored<Texts>, key: &str, text: &str) -> Result<(), CommitError> {
    mirrored.write(vec![Op::put(key, text)]).await
}

async fn put(store: &dyn Store, key: &str, text: &str) -> Version {
    store.commit(Transaction::new().put(key, text)).await.unwrap().version
}

/// Has something begin that has to wait.
async fn begin<F: Future>(mut waiting: Pin<&mut F>) {
    let begun = std::future::poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context)));
    assert!(begun.await.is_pending());
    // The keeper takes what there is by now.
    tokio::task::yield_now().await;
}

async fn what_comes_together_is_decided_in_order_and_committed_at_once(store: Arc<dyn Store>) {
    let store = faulty(store);
    let mirrored = mirrored(&store).await;
    store.hold(true);
    let mut all = std::pin::pin!(join_all((0..50).map(|_| take_number(&mirrored))));
    begin(all.as_mut()).await;
    assert_eq!(mirrored.now().texts.len(), 0, "nobody sees what is not durable");
    store.hold(false);
    let mut numbers: Vec<_> = all.await.into_iter().map(Result::unwrap).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..50).collect::<Vec<_>>(), "each has its own");
    let version = store.version().await.unwrap();
    assert!(version <= Version::new(2), "{version}");
    assert_eq!(mirrored.now().texts.len(), 50);
    assert_eq!(mirrored.now().version, version);
}

async fn what_fails_leaves_nothing_and_what_frees_space_is_written_with_the_reserve(
    store: Arc<dyn Store>,
) {
    let store = faulty(store);
    let is_full = Arc::new(AtomicBool::new(true));
    let freed = is_full.clone();
    let mirrored = mirrored_with(&store, move || freed.swap(false, Ordering::SeqCst)).await;
    write(&mirrored, "a/1", "one").await.unwrap();
    let full = || store.inject(Fault::Refused(StoreError::DiskFull { path: "/".into() }));
    let change = async |room| {
        let put = async |_| Ok::<_, Infallible>((vec![Op::put("a/2", "two")], ()));
        mirrored.change(room, put).await
    };
    full();
    let refused = change(Room::Ordinary).await;
    assert!(matches!(
        refused,
        Err(ChangeError::Store(CommitError::Store(StoreError::DiskFull { .. })))
    ));
    assert_eq!(mirrored.now().texts.len(), 1);
    assert_eq!(take_number(&mirrored).await.unwrap(), 1, "the next one does not see it");
    full();
    change(Room::Reserved).await.unwrap();
    assert!(!is_full.load(Ordering::SeqCst));
    assert_eq!(mirrored.now().texts["a/2"], "two");
    // The same key twice, in two changes that are committed at once.
    let (one, two) = tokio::join!(write(&mirrored, "a/3", "x"), write(&mirrored, "a/3", "y"));
    one.and(two).unwrap();
    assert_eq!(mirrored.now().texts["a/3"], "y");
    assert_eq!(mirrored.now().texts, stored(&*store).await);
}

async fn a_change_that_is_too_much_is_refused_and_many_are_committed_in_parts(
    store: Arc<dyn Store>,
) {
    let store = faulty(store);
    let mirrored = mirrored(&store).await;
    let Limits { items, bytes, value_bytes } = store.limits();
    let too_many = (0..items).map(|number| Op::put(format!("a/{number}"), "x")).collect();
    let refused = mirrored.write(too_many).await;
    assert!(
        matches!(refused, Err(CommitError::Store(StoreError::TransactionTooLong { .. }))),
        "{refused:?}"
    );
    let too_large = (0..=bytes / value_bytes)
        .map(|number| Op::put(format!("a/{number}"), "x".repeat(value_bytes)))
        .collect();
    let refused = mirrored.write(too_large).await;
    assert!(
        matches!(refused, Err(CommitError::Store(StoreError::TransactionTooLarge { .. }))),
        "{refused:?}"
    );
    assert_eq!(store.version().await.unwrap(), Version::ZERO);

    // Each is half of what a transaction takes, with the guard more than half.
    let half = |round: usize| {
        let put = move |number| Op::put(format!("a/{round}-{number}"), "x");
        mirrored.write((0..items / 2).map(put).collect())
    };
    for written in join_all((0..10).map(half)).await {
        written.unwrap();
    }
    assert_eq!(mirrored.now().texts.len(), 10 * (items / 2));
    let large = |number| {
        let key = format!("b/{number}");
        let (mirrored, text) = (&mirrored, "x".repeat(bytes * 2 / 5));
        async move { write(mirrored, &key, &text).await }
    };
    for written in join_all((0..5).map(large)).await {
        written.unwrap();
    }
    assert_eq!(mirrored.now().texts, stored(&*store).await);
}

async fn a_caller_that_goes_away_takes_nobodys_change_with_it(store: Arc<dyn Store>) {
    let store = faulty(store);
    let mirrored = Arc::new(mirrored(&store).await);
    store.hold(true);
    let spawn = |key: &'static str| {
        let mirrored = mirrored.clone();
        tokio::spawn(async move { write(&mirrored, key, "x").await })
    };
    let (first, second) = (spawn("a/1"), spawn("a/2"));
    tokio::task::yield_now().await;
    first.abort();
    store.hold(false);
    second.await.unwrap().unwrap();
    assert_eq!(mirrored.now().texts["a/2"], "x");
    write(&mirrored, "a/4", "x").await.unwrap();
    assert_eq!(mirrored.now().texts, stored(&*store).await, "what is stored is what is seen");
}

async fn what_others_write_is_seen(store: Arc<dyn Store>) {
    let store = faulty(store);
    put(&*store, "a/1", "before").await;
    put(&*store, "elsewhere", "x").await;
    let (one, two) = (mirrored(&store).await, mirrored(&store).await);
    assert_eq!(one.now().texts["a/1"], "before");
    write(&one, "b/1", "one").await.unwrap();
    until(&two, |texts| texts.texts.contains_key("b/1")).await;
    let last = put(&*store, "a/1", "after").await;
    let elsewhere = put(&*store, "elsewhere", "y").await;
    until(&one, |texts| texts.texts["a/1"] == "after").await;
    assert_eq!(one.now().version, last, "what is elsewhere does not concern it");
    let gone = Transaction::new().delete("a/1").delete("b/1");
    store.commit(gone).await.unwrap();
    until(&one, |texts| texts.texts.is_empty()).await;
    until(&two, |texts| texts.texts.is_empty()).await;
    assert!(two.now().version > elsewhere);
}

async fn two_that_change_the_same_part_decide_on_top_of_each_other(store: Arc<dyn Store>) {
    const EACH: usize = 30;
    let store = faulty(store);
    let (one, two) = (mirrored(&store).await, mirrored(&store).await);
    let numbers = async |mirrored: &Mirrored<Texts>| {
        let mut taken = Vec::new();
        for _ in 0..EACH {
            taken.push(take_number(mirrored).await.unwrap());
        }
        taken
    };
    let (mut taken, more) = tokio::join!(numbers(&one), numbers(&two));
    taken.extend(more);
    taken.sort_unstable();
    assert_eq!(taken, (0..2 * EACH).collect::<Vec<_>>());
    assert_eq!(stored(&*store).await.len(), 2 * EACH);
}

async fn what_waits_is_decided_again_when_somebody_else_was_faster(store: Arc<dyn Store>) {
    let direct = store.clone();
    let store = faulty(store);
    let mirrored = mirrored(&store).await;
    store.hold(true);
    let all = join_all((0..5).map(|_| take_number(&mirrored)));
    let blind = write(&mirrored, "b/1", "blind");
    let both = futures_util::future::join(all, blind);
    let mut both = std::pin::pin!(both);
    begin(both.as_mut()).await;
    let faster = Transaction::new().put("a/0000", "faster").bump(PART.scope, "somebody");
    direct.commit(faster).await.unwrap();
    store.hold(false);
    let (taken, blind) = both.await;
    blind.unwrap();
    let mut taken: Vec<_> = taken.into_iter().map(Result::unwrap).collect();
    taken.sort_unstable();
    assert!(!taken.contains(&0), "{taken:?}");
    assert_eq!(mirrored.now().texts["a/0000"], "faster");
    assert_eq!(mirrored.now().texts["b/1"], "blind");
    assert_eq!(mirrored.now().texts, stored(&*store).await);
}

async fn what_is_being_decided_is_decided_again_when_somebody_else_is_faster(
    store: Arc<dyn Store>,
) {
    let store = faulty(store);
    let mirrored = mirrored(&store).await;
    let decisions = AtomicUsize::new(0);
    let take = async |seen: Arc<Texts>| {
        if decisions.fetch_add(1, Ordering::SeqCst) == 0 {
            let faster = Transaction::new().put("a/0000", "faster").bump(PART.scope, "somebody");
            store.commit(faster).await.unwrap();
            until(&mirrored, |texts| texts.texts.len() == 1).await;
        }
        let number = seen.texts.len();
        Ok::<_, Infallible>((vec![Op::put(format!("a/{number:04}"), "x")], number))
    };
    assert_eq!(mirrored.change(Room::Ordinary, take).await.unwrap().1, 1);
    assert_eq!(decisions.into_inner(), 2);
    assert_eq!(mirrored.now().texts["a/0000"], "faster");
}

async fn what_is_decided_next_rests_on_what_was_committed_among_others_writes(
    store: Arc<dyn Store>,
) {
    let direct = store.clone();
    let store = faulty(store);
    let mirrored = mirrored(&store).await;
    store.hold(true);
    let mut first = std::pin::pin!(take_number(&mirrored));
    begin(first.as_mut()).await;
    // By somebody who does not bump the scope.
    put(&*direct, "b/1", "x").await;
    store.hold(false);
    assert_eq!(first.await.unwrap(), 0);
    assert_eq!(take_number(&mirrored).await.unwrap(), 2);
    assert_eq!(mirrored.now().texts, stored(&*store).await);
}

async fn a_commit_without_an_answer_happens_once(store: Arc<dyn Store>) {
    let store = faulty(store);
    let mirrored = mirrored(&store).await;
    for (number, fault) in [Fault::Lost, Fault::Unacknowledged, Fault::Late].into_iter().enumerate()
    {
        store.inject(fault);
        assert_eq!(take_number(&mirrored).await.unwrap(), number);
        assert_eq!(mirrored.now().texts, stored(&*store).await);
    }
    assert_eq!(store.version().await.unwrap(), Version::new(3));
    let late = store.deliver_late().await;
    assert!(matches!(late.as_slice(), [Err(CommitError::Conflict(_))]), "{late:?}");
    // One that had an effect, and was followed by somebody else's before anybody asked.
    store.inject(Fault::Unacknowledged);
    store.break_watches();
    assert_eq!(take_number(&mirrored).await.unwrap(), 3);
    assert_eq!(stored(&*store).await.len(), 4);
}

async fn a_commit_that_comes_late_does_not_undo_what_came_between(store: Arc<dyn Store>) {
    let store = faulty(store);
    let mirrored = mirrored(&store).await;
    for _ in 0..3 {
        store.inject(Fault::Late);
    }
    let error = write(&mirrored, "a/1", "late").await.unwrap_err();
    assert!(error.may_have_happened(), "{error}");
    assert_eq!(mirrored.now().texts.len(), 0);

    // It happens once, and whoever decided without it decides again.
    let outcomes = store.deliver_late().await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "{outcomes:?}");
    assert_eq!(take_number(&mirrored).await.unwrap(), 1);
    assert_eq!(mirrored.now().texts["a/1"], "late");

    store.inject(Fault::Late);
    write(&mirrored, "a/1", "first").await.unwrap();
    write(&mirrored, "a/1", "second").await.unwrap();
    assert!(store.deliver_late().await[0].is_err());
    assert_eq!(stored(&*store).await["a/1"], "second");
}

async fn a_commit_whose_outcome_stays_unknown_is_an_error_until_the_store_answers(
    store: Arc<dyn Store>,
) {
    let store = faulty(store);
    let mirrored = mirrored(&store).await;
    // A request with an id is answered with what it was answered before.
    let request = async || {
        let once = async |seen: Arc<Texts>| match seen.texts.get("b/request") {
            Some(_) => Ok::<_, Infallible>((vec![], false)),
            None => {
                let key = format!("a/{}", seen.texts.len());
                Ok((vec![Op::put(key, "x"), Op::put("b/request", "x")], true))
            }
        };
        mirrored.change(Room::Ordinary, once).await.map(|(_, is_new)| is_new)
    };
    store.inject(Fault::Unacknowledged);
    store.cut_off(true);
    let Err(ChangeError::Store(error)) = request().await else { panic!("it was answered") };
    assert!(error.may_have_happened(), "{error}");
    store.cut_off(false);
    assert!(!request().await.unwrap(), "it is the same request");
    assert_eq!(mirrored.now().texts.keys().collect::<Vec<_>>(), ["a/0", "b/request"]);
    assert_eq!(mirrored.now().texts, stored(&*store).await);
}

async fn history_that_is_gone_is_read_anew(store: Arc<dyn Store>) {
    let store = faulty(store);
    let mirrored = mirrored(&store).await;
    write(&mirrored, "a/gone", "x").await.unwrap();
    write(&mirrored, "a/kept", "x").await.unwrap();
    // Nobody runs between these, so that the watch has not seen what is forgotten.
    let change = Transaction::new().delete("a/gone").put("a/new", "x");
    let changed = store.commit(change).await.unwrap().version;
    put(&*store, "elsewhere", "x").await;
    store.compact(0).await.unwrap();
    until(&mirrored, |texts| texts.version >= changed).await;
    assert_eq!(mirrored.now().texts.keys().collect::<Vec<_>>(), ["a/kept", "a/new"]);
    assert_eq!(take_number(&mirrored).await.unwrap(), 2);
}

async fn a_watch_that_breaks_loses_nothing(store: Arc<dyn Store>) {
    let direct = store.clone();
    let store = faulty(store);
    let mirrored = mirrored(&store).await;
    for number in 0..5 {
        store.break_watches();
        put(&*direct, "b/1", &number.to_string()).await;
        until(&mirrored, |texts| texts.texts.get("b/1") == Some(&number.to_string())).await;
        store.break_watches();
        write(&mirrored, "a/1", &number.to_string()).await.unwrap();
        assert_eq!(mirrored.now().texts, stored(&*store).await);
    }
}

async fn a_mirror_that_is_dropped_lets_go_of_its_store(store: Arc<dyn Store>) {
    let store = faulty(store);
    for is_cut_off in [false, true] {
        let mirrored = mirrored(&store).await;
        write(&mirrored, "a/1", "x").await.unwrap();
        store.cut_off(is_cut_off);
        store.break_watches();
        tokio::task::yield_now().await;
        drop(mirrored);
        while Arc::strong_count(&store) > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn what_is_in_the_value_alone_stays_when_the_store_is_read_anew(store: Arc<dyn Store>) {
    let store = faulty(store);
    let mirrored = mirrored(&store).await;
    mirrored.modify(|texts| texts.note = "here".to_owned());
    store.break_watches();
    put(&*store, "a/1", "x").await;
    until(&mirrored, |texts| !texts.texts.is_empty()).await;
    assert_eq!(mirrored.now().note, "here");
    let noted = async |seen: Arc<Texts>| Ok::<_, Infallible>((vec![], seen.note.clone()));
    assert_eq!(mirrored.change(Room::Ordinary, noted).await.unwrap().1, "here");
}

#[derive(Debug, Clone)]
enum Step {
    /// Of one of two mirrors.
    Change(bool, String),
    Write(bool, String, Option<u8>),
    Foreign(String, Option<u8>, bool),
    Fault(u8),
    DeliverLate,
    BreakWatches,
    Compact,
    Yield,
}

fn steps() -> impl Strategy<Value = Step> {
    let keys = || prop::sample::select(vec!["a/1", "a/2", "b/1", "c/1"]).prop_map(str::to_owned);
    let values = || prop::option::weighted(0.7, any::<u8>());
    prop_oneof![
        4 => (any::<bool>(), keys()).prop_map(|(which, key)| Step::Change(which, key)),
        3 => (any::<bool>(), keys(), values()).prop_map(|(w, k, v)| Step::Write(w, k, v)),
        3 => (keys(), values(), any::<bool>()).prop_map(|(k, v, b)| Step::Foreign(k, v, b)),
        3 => (0..3u8).prop_map(Step::Fault),
        1 => Just(Step::DeliverLate),
        1 => Just(Step::BreakWatches),
        1 => Just(Step::Compact),
        3 => Just(Step::Yield),
    ]
}

fn op(key: &str, value: Option<u8>) -> Op {
    match value {
        Some(value) => Op::put(key, value.to_string()),
        None => Op::Delete { key: key.to_owned() },
    }
}

/// Every value that the mirrors ever show is what the store had at its version, and a caller that was
/// answered sees its change.
async fn follow(store: Arc<dyn Store>, steps: Vec<Step>) {
    // A history of its own, which nobody compacts.
    let mut history = BTreeMap::from([(Version::ZERO, BTreeMap::new())]);
    let mut all = store.watch("", Version::ZERO).await.unwrap();
    let store = faulty(store);
    let mirrors = [mirrored(&store).await, mirrored(&store).await];
    let mut shown = Vec::new();
    for step in steps {
        match step {
            Step::Change(which, key) => {
                let mirrored = &mirrors[usize::from(which)];
                let append = async |seen: Arc<Texts>| {
                    let text = seen.texts.get(&key).map(String::as_str).unwrap_or_default();
                    Ok::<_, Infallible>((vec![Op::put(key.clone(), format!("{text}+"))], ()))
                };
                if let Ok((version, ())) = mirrored.change(Room::Ordinary, append).await {
                    assert!(mirrored.now().version >= version || key.starts_with("c/"));
                }
            }
            Step::Write(which, key, value) => {
                let mirrored = &mirrors[usize::from(which)];
                let _ = mirrored.write(vec![op(&key, value)]).await;
            }
            Step::Foreign(key, value, is_bumped) => {
                let mut transaction = Transaction::new().with(op(&key, value));
                if is_bumped {
                    transaction = transaction.bump(PART.scope, "");
                }
                let _ = store.commit(transaction).await;
            }
            Step::Fault(0) => store.inject(Fault::Lost),
            Step::Fault(1) => store.inject(Fault::Unacknowledged),
            Step::Fault(_) => store.inject(Fault::Late),
            Step::DeliverLate => drop(store.deliver_late().await),
            Step::BreakWatches => store.break_watches(),
            Step::Compact => {
                let current = store.version().await.unwrap();
                record(&mut all, &mut history, current).await;
                store.compact(0).await.unwrap();
            }
            Step::Yield => tokio::task::yield_now().await,
        }
        shown.extend(mirrors.iter().map(Mirrored::now));
    }
    let current = store.version().await.unwrap();
    record(&mut all, &mut history, current).await;
    let last = history.values().next_back().unwrap().clone();
    for mirrored in &mirrors {
        until(mirrored, |texts| texts.texts == last).await;
    }
    assert_eq!(last, stored(&*store).await);
    for texts in shown {
        let (_, then) = history.range(..=texts.version).next_back().unwrap();
        assert_eq!(texts.texts, *then, "at {}", texts.version);
    }
}

/// Writes down what the store had at each version.
async fn record(
    all: &mut mvm_store::Watch,
    history: &mut BTreeMap<Version, BTreeMap<String, String>>,
    through: Version,
) {
    while all.seen_through() < through {
        let event = all.next().await.unwrap();
        let mut texts = history.values().next_back().unwrap().clone();
        let is_of_part = |key: &str| PART.prefixes.iter().any(|prefix| key.starts_with(prefix));
        for change in event.changes.iter().filter(|change| is_of_part(change.key())) {
            match change {
                Change::Delete { key } => drop(texts.remove(key)),
                Change::Put(entry) => {
                    let text = String::from_utf8(entry.value.clone()).unwrap();
                    texts.insert(entry.key.clone(), text);
                }
            }
        }
        history.insert(event.version, texts);
    }
}

fn run(steps: Vec<Step>, fixture: impl Future<Output = crate::Fixture>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let crate::Fixture { given, _directory } = fixture.await;
        crate::in_time(follow(given.store, steps)).await;
    });
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_mirror_of_the_store_in_memory_is_a_fold_of_its_history(
        steps in prop::collection::vec(steps(), 1..40)
    ) {
        run(steps, crate::memory());
    }
}

proptest! {
    // Each case makes files and flushes them.
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_mirror_of_the_store_in_sqlite_is_a_fold_of_its_history(
        steps in prop::collection::vec(steps(), 1..40)
    ) {
        run(steps, crate::sqlite());
    }
}
