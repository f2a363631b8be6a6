//! A part of the store, kept in memory as a value of its own: readers take what is there and never
//! wait, and changes that come together share one commit.
//!
//! ```text
//!  change ─┐ one at a time, each on        ┌─> commit: what waits, as one transaction ──> store
//!  change ─┴> what those before it left ───┘   (the next ones gather meanwhile)             │
//!                                                                                         watch
//!                                readers and followers see it <── value, a fold of it <─────┘
//! ```
//!
//! The value is what the store's watch tells, of these writes and of everybody else's. A change is seen
//! by readers, and its caller answered, once it is durable. What is decided between two commits is
//! decided on top of each other, so that no two of them can take the same thing.
//!
//! Every commit bumps the part's scope, guarded by where the value has it: a transaction of somebody who
//! decided on something else does not take place, and what was decided here is decided again. The
//! scope's value names the commit, so that one whose outcome is unknown is found.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot, watch};

use crate::{
    Change, CommitError, Limits, Listing, Op, Store, StoreError, Transaction, Version, Watch,
    WatchEvent, scope_key,
};

/// Versions that the store's history keeps for watchers.
const HISTORY: u64 = 1_000;
/// How often a commit of unknown outcome is tried, as long as the store says that it did not happen.
const ATTEMPTS: usize = 3;
/// How long a change that is durable may take to come in by the watch before the store is listed.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause between two attempts to list a store that does not answer.
const RETRY: Duration = Duration::from_secs(1);

/// Which part of a store it is.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// The scope that everybody bumps who changes something of it.
    pub scope: &'static str,
    /// The prefixes of its keys.
    pub prefixes: &'static [&'static str],
}

/// How a value is made out of a store's entries, one change after the other.
#[derive(Debug)]
pub struct Fold<T> {
    /// Takes over one entry, or its removal.
    pub apply: fn(&mut T, &str, Option<&[u8]>),
    /// Notes the version of the store that it is of.
    pub note_version: fn(&mut T, Version),
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

/// A part of a store, and the value that it makes.
pub struct Mirrored<T> {
    shared: Arc<Shared<T>>,
    /// Held while a change is decided.
    deciding: AsyncMutex<()>,
    /// Rung when something waits. The keeper ends when it is gone and nothing waits.
    bell: mpsc::Sender<()>,
}

struct Shared<T> {
    store: Arc<dyn Store>,
    part: Part,
    fold: Fold<T>,
    value: watch::Sender<Arc<T>>,
    draft: Mutex<Draft<T>>,
    give_up_space: GiveUpSpace,
}

/// What has been decided and is not committed.
struct Draft<T> {
    /// The value with all that waits.
    value: Arc<T>,
    /// How often the draft began anew: what was decided on an earlier one is decided again.
    epoch: u64,
    waiting: VecDeque<Waiting>,
    /// How many of those that are not answered may not use the reserve.
    ordinary: usize,
}

struct Waiting {
    ops: Vec<Op>,
    room: Room,
    /// Whether it rests on the draft.
    is_decided: bool,
    done: oneshot::Sender<Result<Version, Failure>>,
}

/// Why something that waited did not happen.
#[derive(Debug, Clone)]
enum Failure {
    /// What it was decided on has changed.
    Stale,
    Store(CommitError),
}

type Done = oneshot::Receiver<Result<Version, Failure>>;

impl<T: Clone + Default + Send + Sync + 'static> Mirrored<T> {
    /// Reads the part, and follows the store from then on. `give_up_space` is asked when the filesystem
    /// is full.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn load(
        store: Arc<dyn Store>,
        part: Part,
        fold: Fold<T>,
        give_up_space: GiveUpSpace,
    ) -> Result<Self, CommitError> {
        let (listing, watch) = read(&*store).await?;
        let value = Arc::<T>::default();
        let draft = Draft { value: value.clone(), epoch: 0, waiting: VecDeque::new(), ordinary: 0 };
        let (value, draft) = (watch::Sender::new(value), Mutex::new(draft));
        let shared = Arc::new(Shared { store, part, fold, value, draft, give_up_space });
        let (bell, rung) = mpsc::channel(1);
        let mut keeper = Keeper::new(shared.clone(), watch, rung);
        keeper.adopt(&listing);
        tokio::spawn(keeper.run());
        Ok(Self { shared, deciding: AsyncMutex::default(), bell })
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
    /// before it, and says what to write. It is asked again if somebody else changed something
    /// meanwhile.
    ///
    /// # Errors
    /// `change` refused, or the store failed: then nothing is changed, unless the error says that it
    /// [may have happened](CommitError::may_have_happened).
    pub async fn change<A, E, F>(
        &self,
        room: Room,
        change: impl Fn(Arc<T>) -> F,
    ) -> Result<(Version, A), ChangeError<E>>
    where
        F: Future<Output = Result<(Vec<Op>, A), E>>,
    {
        loop {
            let deciding = self.deciding.lock().await;
            if room == Room::Reserved && self.shared.draft().ordinary > 0 {
                // What may not use the reserve must not keep this from being written.
                let before = self.enqueue(Vec::new(), Room::Reserved, None);
                drop(answered(before.map_err(ChangeError::Store)?).await);
            }
            let (seen, epoch) = {
                let draft = self.shared.draft();
                (draft.value.clone(), draft.epoch)
            };
            let (ops, answer) = change(seen).await.map_err(ChangeError::Refused)?;
            let done = self.enqueue(ops, room, Some(epoch)).map_err(ChangeError::Store)?;
            drop(deciding);
            match answered(done).await {
                Ok(version) => return Ok((version, answer)),
                Err(Failure::Stale) => {}
                Err(Failure::Store(error)) => return Err(ChangeError::Store(error)),
            }
        }
    }

    /// Writes entries whatever the present value is, with the space that was set aside if need be.
    ///
    /// # Errors
    /// The store failed.
    pub async fn write(&self, ops: Vec<Op>) -> Result<(), CommitError> {
        match answered(self.enqueue(ops, Room::Reserved, None)?).await {
            Ok(_) => Ok(()),
            Err(Failure::Store(error)) => Err(error),
            // It rests on nothing.
            Err(Failure::Stale) => Err(StoreError::Closed.into()),
        }
    }

    /// The entries of the store whose keys begin with this, as stored.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn raw(&self, beginning: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let entries = self.shared.store.list("").await?.entries.into_iter();
        let matching = entries.filter(|entry| entry.key.starts_with(beginning));
        Ok(matching.map(|entry| (entry.key, entry.value)).collect())
    }

    /// Puts a change behind those that wait, which the keeper commits: a caller that goes away takes
    /// nobody's change with it. `epoch` is that of the draft that it was decided on.
    fn enqueue(&self, ops: Vec<Op>, room: Room, epoch: Option<u64>) -> Result<Done, CommitError> {
        // Too much for any transaction: nobody else is to fail for it.
        let alone = ops.iter().cloned().fold(Transaction::new(), Transaction::with);
        alone.validate(&self.shared.room())?;
        let (done, receiver) = oneshot::channel();
        let waiting = Waiting { ops, room, is_decided: epoch.is_some(), done };
        let mut draft = self.shared.draft();
        if epoch.is_some_and(|epoch| epoch != draft.epoch) {
            let _ = waiting.done.send(Err(Failure::Stale));
            return Ok(receiver);
        }
        self.shared.fold.all(Arc::make_mut(&mut draft.value), &waiting.ops);
        draft.ordinary += usize::from(room == Room::Ordinary);
        draft.waiting.push_back(waiting);
        match self.bell.try_send(()) {
            Ok(()) | Err(TrySendError::Full(())) => Ok(receiver),
            Err(TrySendError::Closed(())) => Err(StoreError::Closed.into()),
        }
    }
}

async fn answered(done: Done) -> Result<Version, Failure> {
    // Without an answer the runtime is ending.
    done.await.unwrap_or(Err(Failure::Store(StoreError::Closed.into())))
}

/// Everything that is there, and what follows.
async fn read(store: &dyn Store) -> Result<(Listing, Watch), StoreError> {
    let listing = store.list("").await?;
    let watch = store.watch("", listing.version).await?;
    Ok((listing, watch))
}

/// The one that commits, and that has the value follow the store.
struct Keeper<T> {
    shared: Arc<Shared<T>>,
    watch: Watch,
    rung: mpsc::Receiver<()>,
    /// Whether the mirror is gone, and the store does not answer.
    is_over: bool,
    /// The version through which the value has everything.
    through: Version,
    /// The keys that the value has.
    keys: BTreeSet<String>,
    /// The version of the scope's latest bump.
    bumped: Option<Version>,
    /// Tells this keeper's commits from those of others; nothing else depends on it.
    name: u64,
    commits: u64,
    /// The value that the commit under way gives to the scope.
    mark: Option<Vec<u8>>,
    /// The version in which that was seen.
    landed: Option<Version>,
    /// Whether somebody else's change was seen since the commit began.
    is_overtaken: bool,
}

impl<T: Clone + Default + Send + Sync + 'static> Keeper<T> {
    fn new(shared: Arc<Shared<T>>, watch: Watch, rung: mpsc::Receiver<()>) -> Self {
        Self {
            shared,
            watch,
            rung,
            is_over: false,
            through: Version::ZERO,
            keys: BTreeSet::new(),
            bumped: None,
            name: RandomState::new().build_hasher().finish(),
            commits: 0,
            mark: None,
            landed: None,
            is_overtaken: false,
        }
    }

    async fn run(mut self) {
        while !self.is_over {
            while let Some(some) = self.shared.take_some() {
                self.commit_some(some).await;
            }
            tokio::select! {
                rung = self.rung.recv() => if rung.is_none() { return },
                event = self.watch.next() => match event {
                    Ok(event) => self.take(&event),
                    Err(error) => self.list_anew(&error).await,
                },
            }
        }
    }

    async fn commit_some(&mut self, some: Vec<Waiting>) {
        let ops = merged(&some);
        if ops.is_empty() {
            // What was decided without a change rests on what is durable by now.
            return self.shared.answer(some, &Ok(self.through));
        }
        let is_reserved = some.iter().all(|it| it.room == Room::Reserved);
        self.commits += 1;
        let mark = mark(self.name, self.commits);
        self.mark = Some(mark.clone());
        (self.landed, self.is_overtaken) = (None, false);
        let committed = self.commit(&ops, &mark, is_reserved).await;
        self.mark = None;
        match committed {
            Ok(version) => {
                if self.is_overtaken {
                    self.shared.begin_anew(Vec::new());
                }
                self.shared.answer(some, &Ok(version));
                self.shared.compact(version).await;
            }
            Err(Failure::Stale) => self.shared.begin_anew(some),
            // What was decided on top of what failed has failed with it.
            Err(failure) => self.shared.fail(some, &Err(failure)),
        }
    }

    /// Commits, and has the value follow.
    async fn commit(
        &mut self,
        ops: &[Op],
        mark: &[u8],
        is_reserved: bool,
    ) -> Result<Version, Failure> {
        let scope = self.shared.part.scope;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let guard = Transaction::new().require_scope(scope, self.bumped);
            let guarded = guard.bump(scope, mark);
            let transaction = ops.iter().cloned().fold(guarded, Transaction::with);
            let error = match self.shared.commit(transaction, is_reserved).await {
                Ok(version) => {
                    self.catch_up(version).await;
                    return Ok(version);
                }
                Err(error) => error,
            };
            let is_conflict = error.conflict().is_some();
            if !is_conflict && !error.may_have_happened() {
                return Err(Failure::Store(error));
            }
            // Where the scope is now says what happened.
            let Ok(entry) = self.shared.store.get(&scope_key(scope)).await else {
                return Err(Failure::Store(error));
            };
            let bumped = entry.map(|entry| entry.mod_version);
            let is_elsewhere = bumped != self.bumped;
            self.catch_up(bumped.unwrap_or_default()).await;
            if self.bumped != bumped || (is_conflict && !is_elsewhere) {
                self.list_anew(&error).await;
            }
            match self.landed {
                Some(version) => return Ok(version),
                None if is_elsewhere || is_conflict => return Err(Failure::Stale),
                // If it happens yet, the next attempt does not, as its guard no longer holds.
                None if attempts < ATTEMPTS => {}
                None => return Err(Failure::Store(error)),
            }
        }
    }

    /// Waits until the value has this version.
    async fn catch_up(&mut self, version: Version) {
        while self.through < version && !self.is_over {
            match tokio::time::timeout(PATIENCE, self.watch.next()).await {
                Ok(Ok(event)) => self.take(&event),
                Ok(Err(error)) => self.list_anew(&error).await,
                Err(late) => self.list_anew(&late).await,
            }
        }
    }

    /// Takes over what a version changed.
    fn take(&mut self, event: &WatchEvent) {
        if event.version <= self.through {
            return;
        }
        self.through = event.version;
        let scope = scope_key(self.shared.part.scope);
        let mut is_own = false;
        for change in event.changes.iter().filter(|change| change.key() == scope) {
            self.bumped = None;
            if let Change::Put(entry) = change {
                self.bumped = Some(entry.mod_version);
                is_own = self.mark.as_ref() == Some(&entry.value);
            }
        }
        if is_own {
            self.landed = Some(event.version);
        }
        let part = self.shared.part;
        let changes = || event.changes.iter().filter(|change| part.covers(change.key()));
        if changes().next().is_none() {
            return;
        }
        for change in changes() {
            match change {
                Change::Put(entry) => drop(self.keys.insert(entry.key.clone())),
                Change::Delete { key } => drop(self.keys.remove(key)),
            }
        }
        self.shared.fold_in(
            event.version,
            changes().map(|change| match change {
                Change::Put(entry) => (entry.key.as_str(), Some(entry.value.as_slice())),
                Change::Delete { key } => (key.as_str(), None),
            }),
        );
        if !is_own {
            self.is_overtaken = true;
            self.shared.begin_anew(Vec::new());
        }
    }

    /// The watch does not tell what happened: reads what is there. Until the store answers, nothing is
    /// decided.
    async fn list_anew(&mut self, reason: &(dyn std::error::Error + Sync)) {
        let scope = self.shared.part.scope;
        tracing::info!(scope, error = %reason, "the store is listed anew");
        loop {
            match read(&*self.shared.store).await {
                Ok((listing, watch)) => {
                    self.watch = watch;
                    return self.adopt(&listing);
                }
                Err(error) => {
                    tracing::warn!(scope, %error, "the store does not answer");
                    self.is_overtaken = true;
                    let failure = Failure::Store(error.into());
                    self.shared.fail(Vec::new(), &Err(failure));
                    if self.rung.is_closed() {
                        self.is_over = true;
                        return;
                    }
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Makes the value what is listed.
    fn adopt(&mut self, listing: &Listing) {
        let part = self.shared.part;
        let scope = scope_key(part.scope);
        self.bumped = None;
        if let Some(entry) = listing.entries.iter().find(|entry| entry.key == scope) {
            self.bumped = Some(entry.mod_version);
            if self.mark.as_ref() == Some(&entry.value) {
                self.landed = Some(entry.mod_version);
            }
        }
        let present = || listing.entries.iter().filter(|entry| part.covers(&entry.key));
        let keys: BTreeSet<String> = present().map(|entry| entry.key.clone()).collect();
        let gone = self.keys.difference(&keys).map(|key| (key.as_str(), None));
        let present = present().map(|entry| (entry.key.as_str(), Some(entry.value.as_slice())));
        self.shared.fold_in(listing.version, gone.chain(present));
        (self.keys, self.through, self.is_overtaken) = (keys, listing.version, true);
        self.shared.begin_anew(Vec::new());
    }
}

fn mark(name: u64, commit: u64) -> Vec<u8> {
    format!("{name:016x}-{commit:016x}").into_bytes()
}

impl Part {
    fn covers(&self, key: &str) -> bool {
        self.prefixes.iter().any(|prefix| key.starts_with(prefix))
    }
}

impl<T: Clone> Shared<T> {
    /// What a transaction may hold beside the guard of the scope.
    fn room(&self) -> Limits {
        let scope = self.part.scope;
        let guard = Transaction::new().require_scope(scope, None).bump(scope, mark(0, 0));
        self.store.limits().beside(&guard)
    }

    /// As much of what waits as a transaction takes.
    fn take_some(&self) -> Option<Vec<Waiting>> {
        let room = self.room();
        let mut draft = self.draft();
        let (mut some, mut count, mut bytes) = (Vec::new(), 0, 0);
        while let Some(next) = draft.waiting.front() {
            count += next.ops.len();
            bytes += Limits::bytes_of(&next.ops);
            let is_first = some.is_empty();
            if !is_first && (count > room.items || bytes > room.bytes) {
                break;
            }
            some.extend(draft.waiting.pop_front());
        }
        (!some.is_empty()).then_some(some)
    }

    async fn commit(
        &self,
        transaction: Transaction,
        is_reserved: bool,
    ) -> Result<Version, CommitError> {
        let committed = match self.store.commit(transaction.clone()).await {
            Err(CommitError::Store(StoreError::DiskFull { .. }))
                if is_reserved && (self.give_up_space)() =>
            {
                tracing::warn!("the filesystem is full: the reserve of space is given up");
                self.store.commit(transaction).await
            }
            committed => committed,
        };
        committed.map(|committed| committed.version)
    }

    /// The value has these changes too.
    fn fold_in<'a>(
        &self,
        version: Version,
        changes: impl Iterator<Item = (&'a str, Option<&'a [u8]>)>,
    ) {
        self.value.send_modify(|value| {
            // In place unless a reader holds the earlier value.
            let value = Arc::make_mut(value);
            (self.fold.note_version)(value, version);
            changes.for_each(|(key, bytes)| (self.fold.apply)(value, key, bytes));
        });
    }

    /// The draft is what the value is, with what waits and rests on nothing. The rest is decided again.
    fn begin_anew(&self, undone: Vec<Waiting>) {
        let mut draft = self.draft();
        draft.epoch += 1;
        draft.value = self.value.borrow().clone();
        let waiting = undone.into_iter().chain(std::mem::take(&mut draft.waiting));
        let (stale, kept): (Vec<_>, Vec<_>) = waiting.partition(|waiting| waiting.is_decided);
        for waiting in &kept {
            self.fold.all(Arc::make_mut(&mut draft.value), &waiting.ops);
        }
        draft.waiting = kept.into();
        drop(draft);
        self.answer(stale, &Err(Failure::Stale));
    }

    /// These fail, and all that waits with them.
    fn fail(&self, some: Vec<Waiting>, failure: &Result<Version, Failure>) {
        let behind = {
            let mut draft = self.draft();
            draft.epoch += 1;
            draft.value = self.value.borrow().clone();
            std::mem::take(&mut draft.waiting)
        };
        self.answer(some.into_iter().chain(behind), failure);
    }

    fn answer(
        &self,
        answered: impl IntoIterator<Item = Waiting>,
        answer: &Result<Version, Failure>,
    ) {
        for waiting in answered {
            self.draft().ordinary -= usize::from(waiting.room == Room::Ordinary);
            // Its caller may have gone away.
            let _ = waiting.done.send(answer.clone());
        }
    }

    async fn compact(&self, version: Version) {
        if version.get().is_multiple_of(HISTORY)
            && let Err(error) = self.store.compact(HISTORY).await
        {
            // It is only longer than it need be.
            let scope = self.part.scope;
            tracing::warn!(%error, scope, "cannot shorten the store's history");
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
