//! A part of the store that one program alone writes, kept in memory as a value of its own: readers take
//! what is there and never wait, and changes that come together share one commit.
//!
//! ```text
//!  change ─┐ one at a time, each on        ┌─> commit: all that waits, as one transaction ─> value
//!  change ─┴> what those before it left ───┘   (the next ones gather meanwhile)              │
//!                                                                                            v
//!                                                                     readers and followers see it
//! ```
//!
//! A change is seen by readers, and its caller answered, once it is durable. What is decided between two
//! commits is decided on top of each other, so that no two of them can take the same thing.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, oneshot, watch};

use crate::{CommitError, Limits, Op, Revision, Store, StoreError, Transaction};

/// Revisions that the store's history keeps for watchers.
const HISTORY: u64 = 1_000;

/// How a value is made out of a store's entries, one change after the other.
#[derive(Debug)]
pub struct Fold<T> {
    /// Takes over one entry, or its removal.
    pub apply: fn(&mut T, &str, Option<&[u8]>),
    /// Notes the revision of the store that it is of.
    pub note_revision: fn(&mut T, Revision),
}

/// What a change may use of a filesystem that is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// Nothing.
    Ordinary,
    /// The space that was set aside for it: it says what is, or frees something.
    Reserved,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError<E> {
    /// The change itself was refused.
    #[error("the change was refused")]
    Refused(E),
    /// The store failed.
    #[error("cannot write the state")]
    Store(#[from] CommitError),
}

/// A change that cannot be refused.
pub type Infallible = std::convert::Infallible;

/// Gives up space that was set aside, and says whether there was any.
pub type GiveUpSpace = Box<dyn Fn() -> bool + Send + Sync>;

/// Some keys of a store, of which nobody else writes one, and the value that they make.
pub struct Mirrored<T> {
    shared: Arc<Shared<T>>,
    /// Held while a change is decided.
    deciding: AsyncMutex<()>,
}

struct Shared<T> {
    store: Arc<dyn Store>,
    scope: &'static [&'static str],
    fold: Fold<T>,
    value: watch::Sender<Arc<T>>,
    draft: Mutex<Draft<T>>,
    give_up_space: GiveUpSpace,
}

/// What has been decided and is not committed.
struct Draft<T> {
    /// The value with all that waits.
    value: Arc<T>,
    waiting: VecDeque<Waiting>,
    /// Whether a task commits what waits, until nothing does.
    is_committing: bool,
    /// How many of those that are not answered may not use the reserve.
    ordinary: usize,
}

struct Waiting {
    ops: Vec<Op>,
    room: Room,
    done: oneshot::Sender<Result<Revision, CommitError>>,
}

impl<T: Clone + Default + Send + Sync + 'static> Mirrored<T> {
    /// Reads everything below these prefixes. `give_up_space` is asked when the filesystem is full.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn load(
        store: Arc<dyn Store>,
        scope: &'static [&'static str],
        fold: Fold<T>,
        give_up_space: GiveUpSpace,
    ) -> Result<Self, CommitError> {
        let mut value = T::default();
        for prefix in scope {
            let listing = store.list(prefix).await?;
            (fold.note_revision)(&mut value, listing.revision);
            for entry in &listing.entries {
                (fold.apply)(&mut value, &entry.key, Some(&entry.value));
            }
        }
        let value = Arc::new(value);
        let draft = Draft {
            value: value.clone(),
            waiting: VecDeque::new(),
            is_committing: false,
            ordinary: 0,
        };
        let (value, draft) = (watch::Sender::new(value), Mutex::new(draft));
        let shared = Arc::new(Shared { store, scope, fold, value, draft, give_up_space });
        Ok(Self { shared, deciding: AsyncMutex::default() })
    }

    /// The present value.
    pub fn now(&self) -> Arc<T> {
        self.shared.value.borrow().clone()
    }

    /// The present value and each later one (the latest, when several came at once).
    pub fn follow(&self) -> watch::Receiver<Arc<T>> {
        self.shared.value.subscribe()
    }

    /// Changes what is in the value without being in the store.
    pub fn modify(&self, modify: impl Fn(&mut T)) {
        let mut draft = self.shared.draft();
        modify(Arc::make_mut(&mut draft.value));
        self.shared.value.send_modify(|value| modify(Arc::make_mut(value)));
    }

    /// Changes entries as one transaction: `change` sees the present value, with all that was decided
    /// before it, and says what to write.
    ///
    /// # Errors
    /// `change` refused, or the store failed: then nothing is changed.
    pub async fn change<A, E, F>(
        &self,
        room: Room,
        change: impl FnOnce(Arc<T>) -> F,
    ) -> Result<(Revision, A), ChangeError<E>>
    where
        F: Future<Output = Result<(Vec<Op>, A), E>>,
    {
        let deciding = self.deciding.lock().await;
        if room == Room::Reserved && self.shared.draft().ordinary > 0 {
            // What may not use the reserve must not keep this from being written.
            let before = self.enqueue(Vec::new(), Room::Reserved);
            drop(answered(before.map_err(ChangeError::Store)?).await);
        }
        let seen = self.shared.draft().value.clone();
        let (ops, answer) = change(seen).await.map_err(ChangeError::Refused)?;
        let done = self.enqueue(ops, room).map_err(ChangeError::Store)?;
        drop(deciding);
        Ok((answered(done).await?, answer))
    }

    /// Writes entries whatever the present value is, with the space that was set aside if need be.
    ///
    /// # Errors
    /// The store failed.
    pub async fn write(&self, ops: Vec<Op>) -> Result<(), CommitError> {
        answered(self.enqueue(ops, Room::Reserved)?).await.map(drop)
    }

    /// The entries whose keys begin with this, as stored.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn raw(&self, beginning: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let entries = self.shared.store.list("").await?.entries.into_iter();
        let matching = entries.filter(|entry| entry.key.starts_with(beginning));
        Ok(matching.map(|entry| (entry.key, entry.value)).collect())
    }

    /// Puts a change behind those that wait, which a task of its own commits: a caller that goes away takes
    /// nobody's change with it.
    fn enqueue(&self, ops: Vec<Op>, room: Room) -> Result<Done, CommitError> {
        // Too much for any transaction: nobody else is to fail for it.
        ops.iter()
            .cloned()
            .fold(Transaction::new(), Transaction::with)
            .validate(&self.shared.store.limits())?;
        let (done, receiver) = oneshot::channel();
        let mut draft = self.shared.draft();
        self.shared.fold.all(Arc::make_mut(&mut draft.value), &ops);
        draft.ordinary += usize::from(room == Room::Ordinary);
        draft.waiting.push_back(Waiting { ops, room, done });
        if !draft.is_committing {
            draft.is_committing = true;
            tokio::spawn(Shared::commit(self.shared.clone()));
        }
        Ok(receiver)
    }
}

type Done = oneshot::Receiver<Result<Revision, CommitError>>;

async fn answered(done: Done) -> Result<Revision, CommitError> {
    // Without an answer the runtime is ending.
    done.await.unwrap_or(Err(CommitError::Store(StoreError::Closed)))
}

impl<T: Clone + Default + Send + Sync + 'static> Shared<T> {
    /// Commits until nothing waits.
    async fn commit(self: Arc<Self>) {
        while let Some(some) = self.take_some() {
            self.commit_some(some).await;
        }
    }

    /// As much of what waits as a transaction takes.
    fn take_some(&self) -> Option<Vec<Waiting>> {
        let limits = self.store.limits();
        let mut draft = self.draft();
        let (mut some, mut count, mut bytes) = (Vec::new(), 0, 0);
        while let Some(next) = draft.waiting.front() {
            count += next.ops.len();
            bytes += Limits::bytes_of(&next.ops);
            let is_first = some.is_empty();
            if !is_first && (count > limits.items || bytes > limits.bytes) {
                break;
            }
            some.extend(draft.waiting.pop_front());
        }
        draft.is_committing = !some.is_empty();
        draft.is_committing.then_some(some)
    }

    async fn commit_some(&self, some: Vec<Waiting>) {
        let ops = merged(&some);
        if ops.is_empty() {
            // What was decided without a change rests on what is durable by now.
            let revision = self.store.revision().await.map_err(CommitError::Store);
            return self.answer(some.into_iter(), &revision);
        }
        let transaction = || ops.iter().cloned().fold(Transaction::new(), Transaction::with);
        let is_reserved = some.iter().all(|it| it.room == Room::Reserved);
        let committed = match self.store.commit(transaction()).await {
            Err(CommitError::Store(StoreError::DiskFull { .. }))
                if is_reserved && (self.give_up_space)() =>
            {
                tracing::warn!("the filesystem is full: the reserve of space is given up");
                self.store.commit(transaction()).await
            }
            committed => committed,
        };
        let revision = committed.map(|committed| committed.revision);
        let behind = match &revision {
            Ok(revision) => {
                self.value.send_modify(|value| {
                    // In place unless a reader holds the earlier value.
                    let value = Arc::make_mut(value);
                    (self.fold.note_revision)(value, *revision);
                    self.fold.all(value, &ops);
                });
                self.compact(*revision).await;
                VecDeque::new()
            }
            // What was decided on top of what failed has failed with it.
            Err(_) => {
                let mut draft = self.draft();
                draft.value = self.value.borrow().clone();
                std::mem::take(&mut draft.waiting)
            }
        };
        self.answer(some.into_iter().chain(behind), &revision);
    }

    fn answer(
        &self,
        answered: impl Iterator<Item = Waiting>,
        revision: &Result<Revision, CommitError>,
    ) {
        for waiting in answered {
            self.draft().ordinary -= usize::from(waiting.room == Room::Ordinary);
            // Its caller may have gone away.
            let _ = waiting.done.send(revision.clone());
        }
    }

    async fn compact(&self, revision: Revision) {
        if revision.get().is_multiple_of(HISTORY)
            && let Err(error) = self.store.compact(HISTORY).await
        {
            // It is only longer than it need be.
            tracing::warn!(%error, scope = ?self.scope, "cannot shorten the store's history");
        }
    }

    fn draft(&self) -> MutexGuard<'_, Draft<T>> {
        self.draft.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Fold<T> {
    fn all(&self, value: &mut T, ops: &[Op]) {
        for op in ops {
            match op {
                Op::Put { key, value: bytes, .. } => (self.apply)(value, key, Some(bytes)),
                Op::Delete { key } => (self.apply)(value, key, None),
            }
        }
    }
}

/// All operations, of each key the last one.
fn merged(some: &[Waiting]) -> Vec<Op> {
    let ops = some.iter().flat_map(|it| &it.ops);
    let by_key: BTreeMap<&str, &Op> = ops.map(|op| (op.key(), op)).collect();
    by_key.into_values().cloned().collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use async_trait::async_trait;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::{Committed, Entry, LeaseId, Listing, MemoryStore, Watch};

    /// All entries, as text.
    #[derive(Debug, Clone, Default, PartialEq, Eq)]
    struct Texts {
        revision: Revision,
        texts: BTreeMap<String, String>,
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

        fn note_revision(&mut self, revision: Revision) {
            self.revision = revision;
        }
    }

    /// A store whose commits need a permit each, and that has no room while it is full.
    #[derive(Default)]
    struct Odd {
        store: MemoryStore,
        permits: Option<Semaphore>,
        is_full: AtomicBool,
        commits: AtomicUsize,
    }

    #[async_trait]
    impl Store for Odd {
        async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
            self.store.get(key).await
        }
        async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
            self.store.list(prefix).await
        }
        async fn commit(&self, transaction: Transaction) -> Result<Committed, CommitError> {
            if let Some(permits) = &self.permits {
                permits.acquire().await.unwrap().forget();
            }
            if self.is_full.load(Ordering::SeqCst) {
                return Err(StoreError::DiskFull { path: "/".into() }.into());
            }
            self.commits.fetch_add(1, Ordering::SeqCst);
            self.store.commit(transaction).await
        }
        async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
            self.store.watch(prefix, after).await
        }
        async fn revision(&self) -> Result<Revision, StoreError> {
            self.store.revision().await
        }
        async fn grant(&self, ttl: std::time::Duration) -> Result<LeaseId, StoreError> {
            self.store.grant(ttl).await
        }
        async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
            self.store.keep_alive(lease).await
        }
        async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
            self.store.revoke(lease).await
        }
        fn limits(&self) -> Limits {
            self.store.limits()
        }
        async fn compact(&self, keep: u64) -> Result<Revision, StoreError> {
            self.store.compact(keep).await
        }
    }

    fn put(key: &str, text: &str) -> Op {
        Op::put(key, text)
    }

    async fn mirrored(store: &Arc<Odd>) -> Mirrored<Texts> {
        let freed = store.clone();
        let give_up = Box::new(move || freed.is_full.swap(false, Ordering::SeqCst));
        let fold = Fold { apply: Texts::apply, note_revision: Texts::note_revision };
        Mirrored::load(store.clone(), &["a/"], fold, give_up).await.unwrap()
    }

    #[tokio::test]
    async fn what_comes_together_is_decided_in_order_and_committed_at_once() {
        let store = Arc::new(Odd { permits: Some(Semaphore::new(0)), ..Odd::default() });
        let mirrored = mirrored(&store).await;
        let count = async || {
            let take = async |seen: Arc<Texts>| {
                let number = seen.texts.len();
                Ok::<_, Infallible>((vec![put(&format!("a/{number}"), "x")], number))
            };
            mirrored.change(Room::Ordinary, take).await.unwrap()
        };
        let all = futures(50, &count);
        let (taken, ()) = tokio::join!(all, async {
            // The first one is on its way, and the others wait behind it.
            while mirrored.shared.draft().value.texts.len() < 50 {
                tokio::task::yield_now().await;
            }
            assert_eq!(mirrored.now().texts.len(), 0, "nobody sees what is not durable");
            store.permits.as_ref().unwrap().add_permits(50);
        });
        let numbers: Vec<usize> = taken.iter().map(|(_, number)| *number).collect();
        let mut sorted = numbers.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>(), "each has its own");
        assert!(store.commits.load(Ordering::SeqCst) <= 2, "{:?}", store.commits);
        assert_eq!(mirrored.now().texts.len(), 50);
        assert_eq!(mirrored.now().revision, store.revision().await.unwrap());
    }

    /// So many at once, polled by one task.
    async fn futures<T, F: Future<Output = T>>(count: usize, make: impl Fn() -> F) -> Vec<T> {
        let mut pending: Vec<_> = (0..count).map(|_| Box::pin(make())).collect();
        let mut done = Vec::new();
        std::future::poll_fn(|context| {
            pending.retain_mut(|future| match future.as_mut().poll(context) {
                std::task::Poll::Ready(value) => {
                    done.push(value);
                    false
                }
                std::task::Poll::Pending => true,
            });
            match pending.is_empty() {
                true => std::task::Poll::Ready(()),
                false => std::task::Poll::Pending,
            }
        })
        .await;
        done
    }

    #[tokio::test]
    async fn what_fails_leaves_nothing_and_what_frees_space_is_written_with_the_reserve() {
        let store = Arc::new(Odd::default());
        let mirrored = mirrored(&store).await;
        mirrored.write(vec![put("a/1", "one")]).await.unwrap();
        store.is_full.store(true, Ordering::SeqCst);
        let change = async |room| {
            mirrored
                .change(room, async |_| Ok::<_, Infallible>((vec![put("a/2", "two")], ())))
                .await
        };
        let refused = change(Room::Ordinary).await;
        assert!(matches!(
            refused,
            Err(ChangeError::Store(CommitError::Store(StoreError::DiskFull { .. })))
        ));
        assert_eq!(mirrored.now().texts.len(), 1);
        assert_eq!(mirrored.shared.draft().value.texts.len(), 1, "the next one does not see it");
        change(Room::Reserved).await.unwrap();
        assert_eq!(mirrored.now().texts["a/2"], "two");
        let too_much = (0..5000).map(|number| put(&format!("a/{number}"), "x")).collect();
        let refused = mirrored.write(too_much).await;
        assert!(matches!(
            refused,
            Err(CommitError::Store(StoreError::TransactionTooLong { count: 5000, .. }))
        ));
        // The same key twice, in two changes that are committed at once.
        let (one, two) = tokio::join!(
            mirrored.write(vec![put("a/3", "x")]),
            mirrored.write(vec![put("a/3", "y")])
        );
        one.and(two).unwrap();
        assert_eq!(mirrored.now().texts["a/3"], "y");
        assert_eq!(mirrored.now().texts.len(), 3);
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_takes_nobodys_change_with_it() {
        let store = Arc::new(Odd { permits: Some(Semaphore::new(0)), ..Odd::default() });
        let mirrored = Arc::new(mirrored(&store).await);
        let spawn = |key: &'static str| {
            let mirrored = mirrored.clone();
            tokio::spawn(async move { mirrored.write(vec![put(key, "x")]).await })
        };
        let first = spawn("a/1");
        tokio::task::yield_now().await;
        let second = spawn("a/2");
        tokio::task::yield_now().await;
        // It is committing for both.
        first.abort();
        store.permits.as_ref().unwrap().add_permits(5);
        second.await.unwrap().unwrap();
        assert_eq!(mirrored.now().texts["a/2"], "x");
        mirrored.write(vec![put("a/4", "x")]).await.unwrap();
        let stored = store.list("a/").await.unwrap().entries.len();
        assert_eq!(mirrored.now().texts.len(), stored, "what is stored is what is seen");
    }
}
