//! State directories of earlier releases, in `tests/fixtures`: today's program reads every record of them,
//! adopts what runs and wakes what sleeps.
//!
//! `0.1` is what this release writes; `before-versions` is what the last version before it wrote, whose records
//! had no version, no `intent` and no `local_number`, and whose sleep policies had `keep_vmm`. A directory
//! that is checked in stays as it is: a release that changes what is stored adds one of its own, with
//! `MVM_FIXTURE=NAME cargo test -p mvm-agent --test fleet fixtures::write -- --ignored`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::local::LocalIntent;
use mvm_core::mirror::Mirror;
use mvm_core::name::{InstancePath, PoolPath, Selector};
use mvm_core::record::{self, DesiredState};
use mvm_core::snapshot::Manifest;
use mvm_core::stored::versioned;
use mvm_core::vmm::VmHandle;
use mvm_host::images::Images;
use mvm_host::state_dir::MEMORY_IMAGE;
use mvm_host::vmm::sim::{SimFault, SimVmm};
use mvm_host::vmm::{VmSpec, Vmm};
use mvm_store::{MemoryStore, SqliteStore, Store, Transaction};
use mvm_wire::view::InstanceView;
use mvm_wire::{Call, ErrorCode, Reply};
use serde_json::{Value, json};

use crate::node::{Agent, Machine, is_running};

/// What a store holds, by key.
type Records = BTreeMap<String, Value>;

/// Files of a state directory that are checked in; the others are empty, or nothing but zeroes.
const KEPT: [&str; 2] = ["manifest.json", "device.state"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn records_of(name: &str) -> Records {
    serde_json::from_slice(&fs::read(fixture(name).join("records.json")).unwrap()).unwrap()
}

async fn contents(store: &dyn Store) -> Records {
    let entries = store.list("").await.unwrap().entries.into_iter();
    let records = entries.filter(|entry| !entry.key.starts_with("scope/"));
    records.map(|entry| (entry.key, serde_json::from_slice(&entry.value).unwrap())).collect()
}

async fn fill(store: &dyn Store, records: &Records) {
    for (key, record) in records {
        let put = Transaction::new().put(key, serde_json::to_vec(record).unwrap());
        store.commit(put).await.unwrap();
    }
}

fn mirror(records: &Records) -> Mirror {
    let mut mirror = Mirror::default();
    for (key, record) in records {
        mirror.apply(key, Some(record.to_string().as_bytes()));
    }
    mirror
}

/// The kinds of records that there are, as in their keys.
fn kinds(records: &Records) -> BTreeSet<&str> {
    records.keys().map(|key| &key[..key.match_indices('/').nth(1).unwrap().0]).collect()
}

const KINDS: [&str; 8] = [
    "desired/disk",
    "desired/instance",
    "desired/pool",
    "desired/tenant",
    "local/instance",
    "observed/disk",
    "observed/instance",
    "observed/pool",
];

/// A machine with the files of a fixture's state directory, and its records.
async fn machine_of(name: &str, records: &Records) -> Machine {
    let machine = Machine::new();
    let store = MemoryStore::new();
    fill(&store, records).await;
    let machine = Machine { store: Arc::new(store), ..machine };
    let state = fixture(name).join("state");
    for (dir, manifest) in snapshots(&state) {
        let to = machine.dir.path().join(dir.strip_prefix(&state).unwrap());
        fs::create_dir_all(&to).unwrap();
        for file in KEPT {
            fs::copy(dir.join(file), to.join(file)).unwrap();
        }
        let image = manifest.files.iter().find(|file| file.name == MEMORY_IMAGE).unwrap();
        fs::File::create(to.join(MEMORY_IMAGE)).unwrap().set_len(image.bytes).unwrap();
        let of_instance = to.parent().unwrap().join("layer.ext4");
        let layer = if dir.starts_with(state.join("instances")) {
            of_instance
        } else {
            to.join("layer.ext4")
        };
        fs::File::create(layer).unwrap();
    }
    machine
}

/// The snapshots below a state directory.
fn snapshots(state: &Path) -> Vec<(PathBuf, Manifest)> {
    let mut found = Vec::new();
    let mut dirs = vec![state.to_owned()];
    while let Some(dir) = dirs.pop() {
        let manifest = fs::read(dir.join("manifest.json")).ok();
        if let Some(Ok(manifest)) = manifest.map(|text| serde_json::from_slice(&text)) {
            found.push((dir, manifest));
            continue;
        }
        let entries = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
        dirs.extend(entries.filter(|path| path.is_dir()));
    }
    found
}

/// Has the microVM that a record says runs.
async fn launch(machine: &Machine, id: &InstancePath, handle: &VmHandle) {
    let revision = mvm_core::name::RevisionId::from_digest([1; 8]);
    let files = machine.images.files(&revision).await.unwrap();
    let dir = machine.dir.path().join("instances").join(id.id.as_str());
    fs::create_dir_all(&dir).unwrap();
    fs::File::create(dir.join("layer.ext4")).unwrap();
    let vmm = SimVmm::new(machine.world.clone());
    let spec = VmSpec {
        id: id.id.clone(),
        dir: dir.into(),
        vcpus: 1,
        mem_mib: 256,
        kernel: files.kernel,
        initrd: files.initrd,
        kernel_args: String::new(),
        disks: Vec::new(),
        nic: None,
        uid: 1,
        vmm: None,
        rates: Default::default(),
    };
    // Process ids are counted.
    loop {
        let vm = vmm.launch(&spec).await.unwrap();
        if vm.handle() == handle {
            tokio::time::sleep(std::time::Duration::from_secs(10)).await;
            return;
        }
        assert!(vm.handle().pid < handle.pid, "{handle:?}");
        vm.kill().await.unwrap();
    }
}

async fn bad_records(agent: &Agent) -> usize {
    match agent.call(Call::Node).await.unwrap() {
        Reply::Node(node) => node.bad_records.len(),
        other => panic!("{other:?}"),
    }
}

fn find<'a>(all: &'a [InstanceView], path: &InstancePath) -> &'a InstanceView {
    all.iter().find(|view| view.path == *path).unwrap()
}

/// What today's program makes of a state directory.
async fn is_gone_on_from(name: &str, records: &Records) {
    let mirror = mirror(records);
    assert!(mirror.bad.is_empty(), "{:#?}", mirror.bad);
    let machine = machine_of(name, records).await;
    let of = |state: State| {
        let instances = mirror.desired.instances.keys();
        let found = instances.filter(|path| mirror.status(path).state() == state);
        found.cloned().collect::<Vec<_>>()
    };
    let [running] = &of(State::Running)[..] else { panic!("{mirror:#?}") };
    let (stopped, failed) = (of(State::Stopped), of(State::Failed));
    let handle = mirror.status(running).vm.clone().unwrap();
    launch(&machine, running, &handle).await;

    let agent = machine.agent().await;
    assert_eq!(bad_records(&agent).await, 0);
    for path in of(State::Sleeping) {
        let is_needed = mirror.local.contains_key(&path);
        if !is_needed {
            assert_eq!(find(&agent.instances().await, &path).state, State::Sleeping);
            let (output, _) = agent.exec(path.id.as_str(), &["echo", "x"]).await.unwrap();
            assert_eq!(output, "x\n");
        }
        let all = agent.until("awake", |all| is_running(find(all, &path))).await;
        let view = find(&all, &path);
        assert_eq!((view.boots, view.wakes, &view.cold_boot), (1, 1, &None), "{view:#?}");
    }
    let all = agent.instances().await;
    let view = find(&all, running);
    assert_eq!((view.pid, view.boots, view.state), (Some(handle.pid), 1, State::Running));
    for path in &stopped {
        assert_eq!(find(&all, path).state, State::Stopped);
    }
    for path in &failed {
        assert_eq!(find(&all, path).state, State::Failed);
    }
    assert!(!stopped.is_empty() && !failed.is_empty());

    // A new one begins with the base.
    let create = Request::InstanceCreate {
        pool: running.pool.clone(),
        count: 1,
        start: true,
        disks: Vec::new(),
        cold: false,
    };
    let accepted = agent.submit(create).await.unwrap();
    let path = accepted.instances[0].path.clone();
    let all = agent
        .until("the new one runs", |all| all.iter().any(|v| v.path == path && is_running(v)))
        .await;
    let view = find(&all, &path);
    assert_eq!((view.boots, view.wakes), (0, 1), "{view:#?}");

    // Whatever is written now is of this version.
    for (key, record) in contents(&*machine.store).await {
        let is_touched = records.get(&key) != Some(&record);
        assert!(!is_touched || record["v"] == 1, "{key}: {record}");
    }
    let name = "demo".parse().unwrap();
    agent.submit(Request::TenantDestroy { name, force: true }).await.unwrap();
    agent.until("gone", |all| all.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_state_directory_of_this_release_is_gone_on_from() {
    let records = records_of("0.1");
    assert_eq!(kinds(&records), KINDS.into(), "one of each kind");
    assert!(records.values().all(|record| record["v"] == 1));
    is_gone_on_from("0.1", &records).await;
}

#[tokio::test(start_paused = true)]
async fn a_state_directory_from_before_records_had_versions_is_gone_on_from() {
    let records = records_of("before-versions");
    let text = serde_json::to_string(&records).unwrap();
    assert!(text.contains("keep_vmm") && !text.contains("local_number") && !text.contains("\"v\""));
    is_gone_on_from("before-versions", &records).await;
}

#[tokio::test]
async fn the_database_of_this_release_is_opened_and_holds_those_records() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mvm.db");
    fs::copy(fixture("0.1").join("mvm.db"), &path).unwrap();
    let store = SqliteStore::open(&path).await.unwrap();
    assert_eq!(contents(&store).await, records_of("0.1"));
}

#[tokio::test(start_paused = true)]
async fn a_record_of_a_newer_format_is_left_alone_and_says_which_versions() {
    let mut records = records_of("0.1");
    let key = records.keys().find(|key| key.starts_with("desired/instance/")).unwrap().clone();
    records.get_mut(&key).unwrap()["v"] = 9.into();
    let machine = machine_of("0.1", &records).await;
    let agent = machine.agent().await;
    let Reply::Node(node) = agent.call(Call::Node).await.unwrap() else { panic!() };
    let bad: Vec<_> = node.bad_records.iter().filter(|bad| bad.key == key).collect();
    let [bad] = bad[..] else { panic!("{:?}", node.bad_records) };
    let expected = "it has format version 9, and this mvm knows versions up to 1";
    assert!(bad.reason.starts_with(expected), "{}", bad.reason);
    agent.node.end().await;
    assert_eq!(contents(&*machine.store).await[&key]["v"], 9, "it is as it was");
}

#[test]
fn a_record_with_more_in_it_is_read_wherever_that_is() {
    // Their fields are names that people gave.
    let maps = ["env", "sysctl", "ulimit"];
    fn objects(value: &Value, pointer: &str, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                found.push(pointer.to_owned());
                fields
                    .iter()
                    .for_each(|(name, it)| objects(it, &format!("{pointer}/{name}"), found));
            }
            Value::Array(items) => {
                let items = items.iter().enumerate();
                items.for_each(|(at, it)| objects(it, &format!("{pointer}/{at}"), found));
            }
            _ => {}
        }
    }
    for (key, record) in records_of("0.1") {
        let mut pointers = Vec::new();
        objects(&record, "", &mut pointers);
        for pointer in pointers.iter().filter(|it| !maps.iter().any(|map| it.ends_with(map))) {
            let mut newer = record.clone();
            newer.pointer_mut(pointer).unwrap()["from_the_future"] = json!({"a": [1]});
            let (newer, as_ever) =
                ([(key.clone(), newer)].into(), [(key.clone(), record.clone())].into());
            assert_eq!(mirror(&newer), mirror(&as_ever), "{key}{pointer}");
            assert!(mirror(&newer).bad.is_empty(), "{key}{pointer}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_says_what_it_does_not_know_of_a_newer_command() {
    let machine = Machine::new();
    let agent = machine.agent().await;
    let newer = [
        (json!({"call": "teleport", "to": {"planet": 4}}), "does not know the call"),
        (
            json!({"call": "submit", "request": "pool_hibernate"}),
            "unknown variant `pool_hibernate`",
        ),
        (
            json!({"call": "submit", "request": "pool_create", "path": "demo/web",
                "spec": {"numa_node": 1}}),
            "unknown field `numa_node`",
        ),
        (
            json!({"call": "submit", "request": "apply", "document": {"tenant": "demo",
                "pools": {"web": {"rates": {"packets_s": 1}}}}}),
            "unknown field `packets_s`",
        ),
        (
            json!({"call": "logs", "selector": "all", "kind": "sonar", "follow": false, "tail": null}),
            "unknown variant `sonar`",
        ),
    ];
    for (call, words) in newer {
        let mut connection = agent.node.connect();
        connection.write.message(&call).await.unwrap();
        let Reply::Error(error) = connection.read.reply().await.unwrap() else { panic!("{call}") };
        assert_eq!(error.code, ErrorCode::Unsupported, "{error:?}");
        assert!(error.message.contains(words), "{error:?}");
        assert!(error.hint.unwrap().contains("the agent may be older than the command"));
    }
    let mut connection = agent.node.connect();
    connection.write.message(&json!({"call": "node", "verbose": true})).await.unwrap();
    let reply = connection.read.reply().await.unwrap();
    assert!(matches!(reply, Reply::Node(_)), "more in a question is no matter: {reply:?}");
}

fn every_field() -> Value {
    json!({
        "running": 0, "image": "oci:/srv/layout:v1", "vcpus": 2, "mem_mib": 512, "disk_mib": 4096,
        "net": "none", "restart": "always", "boot_timeout_s": 30, "vmm": "qemu",
        "rates": {"net_mbit_s": 100, "disk_mib_s": 50, "disk_ops_s": 1000},
        "disks": [{"name": "data", "path": "/data", "read_only": true}],
        "publish": ["127.0.0.1:47113:80"],
        "sleep_policy": {"warm_after_s": 60, "sleep_after_s": 300, "min_running_s": 0,
            "critical": true, "compress": true, "ignore_neighbours": true},
        "ready": 1, "entrypoint": ["/bin/sh"], "command": ["-c", "true"], "env": {"A": "b"},
        "user": "www", "workdir": "/srv", "stop_signal": "SIGINT", "init": "program", "stdin": true,
        "tty": true, "sysctl": {"net.core.somaxconn": "1024"}, "ulimit": {"nofile": "1024:2048"},
        "shm_mib": 64,
    })
}

#[tokio::test(start_paused = true)]
#[ignore = "writes a fixture"]
async fn write() {
    let to = fixture(&std::env::var("MVM_FIXTURE").unwrap());
    fs::create_dir_all(&to).unwrap();
    let machine = Machine::new();
    let agent = machine.agent().await;
    let document = json!({
        "tenant": "demo", "subnet": "10.240.7.0/24",
        "quota": {"vcpus": 64, "mem_mib": 65536, "disk_mib": 1_048_576, "running": 32, "pools": 8,
            "instances_per_pool": 16},
        "disks": {"data": {"size_mib": 64}},
        "pools": {"web": {"running": 1}, "all": every_field()},
    });
    let apply = Request::Apply { document: serde_json::from_value(document).unwrap() };
    agent.submit(apply).await.unwrap();
    let running = agent.until_running(1).await.remove(0).path;
    let web: PoolPath = "demo/web".parse().unwrap();
    agent.call(Call::WarmUp { pool: web.clone() }).await.unwrap();
    agent.until("no template", |all| all.len() == 1).await;

    let create = |pool: &PoolPath, count, start| Request::InstanceCreate {
        pool: pool.clone(),
        count,
        start,
        disks: Vec::new(),
        cold: true,
    };
    agent.submit(create(&web, 3, true)).await.unwrap();
    let all = agent.until_running(4).await;
    let others: Vec<_> =
        all.iter().map(|view| &view.path).filter(|path| **path != running).collect();
    for path in &others[..2] {
        let selector = Selector::from(*path);
        agent
            .submit(Request::InstanceSleep { selector, all: false, hooks_ms: 1_000 })
            .await
            .unwrap();
    }
    let selector = others[2].into();
    agent.submit(Request::InstanceStop { selector, all: false, grace_ms: 1_000 }).await.unwrap();
    agent.submit(create(&"demo/all".parse().unwrap(), 1, false)).await.unwrap();

    // One that cannot be started.
    let fails: PoolPath = "demo/fails".parse().unwrap();
    let spec = serde_json::from_value(json!({"restart": "never"})).unwrap();
    agent.submit(Request::PoolCreate { path: fails.clone(), spec: Box::new(spec) }).await.unwrap();
    let accepted = agent.submit(create(&fails, 1, false)).await.unwrap();
    let failing = accepted.instances[0].path.clone();
    machine.world.inject(&failing.id, SimFault::LaunchFails("no luck".to_owned()));
    let selector = (&failing).into();
    agent.submit(Request::InstanceStart { selector, all: false }).await.unwrap();
    let settled = |all: &[InstanceView]| {
        let count = |state| {
            all.iter().filter(|view| view.state == state && view.activity.is_none()).count()
        };
        count(State::Sleeping) == 2 && count(State::Stopped) == 1 && count(State::Failed) == 1
    };
    agent.until("all are where they are to be", settled).await;
    agent.node.end().await;

    // Somebody needed one of the sleeping ones just before the end.
    let mut records = contents(&*machine.store).await;
    let needed = mirror(&records).desired.instances[others[0]].clone();
    let local = LocalIntent {
        number: needed.local_number + 1,
        intent: needed.intent,
        desired: DesiredState::Running,
        sleep_request: needed.sleep_request,
        hooks_ms: needed.hooks_ms,
        rested: None,
    };
    records.insert(record::local_key(others[0]), serde_json::to_value(versioned(&local)).unwrap());
    assert_eq!(kinds(&records), KINDS.into());
    fs::write(to.join("records.json"), serde_json::to_vec_pretty(&records).unwrap()).unwrap();
    let store = SqliteStore::open(to.join("mvm.db")).await.unwrap();
    fill(&store, &records).await;
    drop(store);

    for (dir, mut manifest) in snapshots(machine.dir.path()) {
        let to = to.join("state").join(dir.strip_prefix(machine.dir.path()).unwrap());
        fs::create_dir_all(&to).unwrap();
        for file in KEPT {
            fs::copy(dir.join(file), to.join(file)).unwrap();
        }
        // The files of the disks are made anew where the fixture is used.
        manifest.disks = manifest.disks.into_iter().map(|stamp| stamp.of_copy()).collect();
        manifest.read_disks = None;
        fs::write(to.join("manifest.json"), serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
    }
}
