//! Requests that come together are decided on top of each other, and share a commit.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use mvm_core::admit::Request;
use mvm_store::{
    CommitError, Committed, Entry, LeaseId, Limits, Listing, MemoryStore, Op, Store, StoreError,
    Transaction, Version, Watch,
};
use mvm_wire::{Accepted, Call, Connection, Reply};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::node::Machine;

/// A store that takes in instances only when it is let to, and knows how many each commit had.
struct Gate {
    store: MemoryStore,
    open: Semaphore,
    counts: Mutex<Vec<usize>>,
}

#[async_trait]
impl Store for Gate {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.store.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.store.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Committed, CommitError> {
        let is_instance = |op: &&Op| op.key().starts_with("desired/instance/");
        let count = transaction.ops.iter().filter(is_instance).count();
        if count > 0 {
            self.counts.lock().unwrap().push(count);
            drop(self.open.acquire().await);
        }
        self.store.commit(transaction).await
    }

    async fn watch(&self, prefix: &str, after: Version) -> Result<Watch, StoreError> {
        self.store.watch(prefix, after).await
    }

    async fn version(&self) -> Result<Version, StoreError> {
        self.store.version().await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
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

    async fn compact(&self, keep: u64) -> Result<Version, StoreError> {
        self.store.compact(keep).await
    }
}

async fn ask(mut connection: Connection, request: Request) -> Accepted {
    connection.write.message(&Call::Submit(request)).await.unwrap();
    match connection.read.reply().await.unwrap() {
        Reply::Accepted(accepted) => accepted,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn twenty_requests_at_once_get_different_addresses() {
    let gate = Arc::new(Gate {
        store: MemoryStore::new(),
        open: Semaphore::new(0),
        counts: Mutex::default(),
    });
    let machine = Machine { store: gate.clone(), ..Machine::new() };
    let agent = machine.agent().await;
    let document = r#"{"tenant":"demo","pools":{"hello":{"running":0}}}"#;
    let document = serde_json::from_str(document).unwrap();
    agent.submit(Request::Apply { document }).await.unwrap();

    let create = Request::InstanceCreate {
        pool: "demo/hello".parse().unwrap(),
        count: 1,
        start: true,
        disks: vec![],
        cold: false,
    };
    let mut asking = JoinSet::new();
    for _ in 0..20 {
        asking.spawn(ask(agent.node.connect(), create.clone()));
    }
    // Virtual time passes once nobody can go on.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!gate.counts.lock().unwrap().is_empty(), "a commit is on its way");
    assert!(asking.try_join_next().is_none(), "nobody is answered before that");
    gate.open.add_permits(1);
    let accepted = asking.join_all().await;
    let made: BTreeSet<_> =
        accepted.iter().flat_map(|it| &it.instances).map(|it| &it.path).collect();
    assert_eq!(made.len(), 20);
    let counts = gate.counts.lock().unwrap().clone();
    let is_shared = counts.len() <= 2 && counts.iter().sum::<usize>() == 20;
    assert!(is_shared, "what is decided before and while a commit waits goes together: {counts:?}");

    let instances = agent.until_running(20).await;
    let addresses: BTreeSet<_> = instances.iter().map(|instance| instance.address).collect();
    assert_eq!(addresses.len(), 20);
}
