//! What control asks of the node, and the byte streams that it opens: everything but documents and reports.

use std::sync::Arc;

use mvm_core::death::{CONSOLE_TAIL_LINES, OUTPUT_TAIL_LINES};
use mvm_core::lifecycle::Phase;
use mvm_core::name::{DiskPath, InstancePath, Selector};
use mvm_core::net::Traffic;
use mvm_host::main_log;
use mvm_host::net::Difference;
use mvm_store::Op;
use mvm_wire::door::{Answer, Channel, DiskFile, Machine, Occupied, Question, Traces};
use mvm_wire::view::{RecordView, StatsView, VerifyView};
use mvm_wire::{ApiError, Connection, ConnectionError, ErrorCode, HangUp, Reply, WriteHalf, chain};
use tokio::task::JoinSet;

use crate::node::{InstanceHandle, Node};
use crate::{attach, cut_off, exec, forward, images, logs, sessions, space, ssh};

/// Carries bytes between a connection and an instance.
pub(crate) async fn open(
    node: &Arc<Node>,
    selector: &Selector,
    channel: Channel,
    connection: Connection,
    hang_up: &dyn HangUp,
) -> Result<(), ConnectionError> {
    match channel {
        Channel::Exec { request } => exec::exec(node, selector, request, connection, hang_up).await,
        Channel::Forward { target } => {
            forward::forward(node, selector, target, connection, hang_up).await
        }
        Channel::Attach { wait } => attach::attach(node, selector, wait, connection, hang_up).await,
        Channel::Logs(query) => logs::logs(node, selector, query, connection).await,
    }
}

/// Sends the last reply of a stream.
pub(crate) async fn finish(
    write: &mut WriteHalf,
    reply: Result<Reply, ApiError>,
) -> Result<(), ConnectionError> {
    write.message(&reply.unwrap_or_else(Reply::Error)).await
}

/// The one instance that a selector means, in what the node was given.
pub(crate) fn one(node: &Node, selector: &Selector) -> Result<InstancePath, ApiError> {
    let mirror = node.state.now();
    let mut matches = mirror.desired.instances_meant(selector).map(|record| &record.path);
    match (matches.next(), matches.next()) {
        (Some(path), None) => Ok(path.clone()),
        (None, _) => {
            let message = format!("there is no instance {selector} any more");
            Err(ApiError::new(ErrorCode::NotFound, message).hint("see `mvm ps -a`"))
        }
        (Some(_), Some(_)) => {
            let message = format!("{selector} matches several instances");
            Err(ApiError::new(ErrorCode::Invalid, message).hint("name one of them"))
        }
    }
}

/// Answers a question.
pub(crate) async fn ask(node: &Arc<Node>, question: Question) -> Result<Answer, ApiError> {
    match question {
        Question::Machine => Ok(Answer::Machine(Box::new(machine(node)))),
        Question::Occupied => {
            let occupied = node.host.network.occupied().await;
            let occupied = occupied.map_err(|error| ApiError::internal(&error))?;
            let subnets = occupied.subnets.into_iter().collect();
            Ok(Answer::Occupied(Occupied { net_ids: occupied.net_ids, subnets }))
        }
        Question::Published => Ok(Answer::Published(node.published.view())),
        Question::DiskFiles { disks } => {
            let file = |path: DiskPath| {
                let file = node.host.disks.file(&path);
                let host_kib = mvm_host::disks::allocated_kib(&file);
                (path, DiskFile { file, host_kib })
            };
            Ok(Answer::DiskFiles(disks.into_iter().map(file).collect()))
        }
        Question::ImageConfig { revision } => {
            let files = node.host.images.files(&revision).await.ok();
            Ok(Answer::ImageConfig(files.map(|files| Box::new(files.config))))
        }
        Question::Images => images::list(node, &node.state.now()).await.map(Answer::Images),
        Question::ImageRemove { revision } => {
            images::remove(node, &revision).await.map(Answer::Collected)
        }
        Question::ImageCollect { dry_run } => {
            images::collect(node, dry_run).await.map(Answer::Collected)
        }
        Question::Stats { instances } => Ok(Answer::Stats(stats(node, instances).await)),
        Question::Traces { instance } => Ok(Answer::Traces(traces(node, &instance))),
        Question::Verify => verify(node).await.map(Answer::Verified),
        Question::Locate { selector } => {
            let (instance, _) = sessions::session(node, &selector).await?;
            Ok(Answer::Located(instance))
        }
        Question::Ssh { selector } => ssh::prepare(node, &selector).await.map(Answer::Ssh),
        Question::Records { prefix } => {
            let records = node.state.raw(&prefix).await;
            let records = records.map_err(|error| ApiError::internal(&error))?.into_iter();
            let view = |(key, value): (String, Vec<u8>)| RecordView {
                key,
                text: String::from_utf8_lossy(&value).into_owned(),
            };
            Ok(Answer::Records(records.map(view).collect()))
        }
        Question::RecordMend { key, text } => mend(node, key, text).await,
    }
}

fn machine(node: &Node) -> Machine {
    Machine {
        state_dir: node.config.state_dir.to_path_buf(),
        hostname: mvm_host::platform::hostname(),
        vmm: node.host.vmm.kind(),
        accel: node.config.accel,
        chosen_because: node.config.chosen_because.clone(),
        capacity: node.config.capacity,
        problems: node.problems(),
    }
}

async fn stats(node: &Arc<Node>, instances: Vec<InstancePath>) -> Vec<StatsView> {
    let mut tasks = JoinSet::new();
    for path in instances {
        if let Some(handle) = node.instance(&path) {
            let node = node.clone();
            tasks.spawn(async move { stats_of(&node, path, handle).await });
        }
    }
    let mut stats: Vec<StatsView> = tasks.join_all().await.into_iter().flatten().collect();
    stats.sort_by(|a, b| a.path.cmp(&b.path));
    stats
}

/// What one running instance uses; `None` if it does not run.
async fn stats_of(node: &Node, path: InstancePath, handle: InstanceHandle) -> Option<StatsView> {
    let vm = handle.vm.borrow().clone()?;
    let usage = vm.usage().await.ok()?;
    let session = handle.session.borrow().clone();
    let is_warm = matches!(node.state.now().status(&path).phase, Phase::Warm { .. });
    let health = async {
        match session {
            _ if is_warm => (None, Some("it is warm: its vCPUs stand still".to_owned())),
            None => (None, Some("there is no session with the guest".to_owned())),
            Some(session) => match session.health(sessions::GUEST_TIMEOUT).await {
                Ok(health) => (Some(health), None),
                Err(error) => (None, Some(chain(&error))),
            },
        }
    };
    // One that is being saved does not tell before it is.
    let counting = tokio::time::timeout(sessions::GUEST_TIMEOUT, vm.counters());
    let ((guest, guest_error), counted) = tokio::join!(health, counting);
    let counted = counted.ok().and_then(|counted| {
        counted.inspect_err(|error| tracing::debug!(%path, %error, "no counters")).ok()
    });
    let host_disk_kib = mvm_host::images::allocated_kib(&node.instance_dir(&path.id));
    let activity = node.activities.of(&path);
    let traffic = traffic_of(node, &path).await;
    Some(StatsView {
        path,
        cpu_ms: usage.cpu_ms,
        host_rss_kib: usage.rss_kib,
        host_disk_kib,
        disk_read_kib: usage.disk_read_kib,
        disk_written_kib: usage.disk_written_kib,
        disk_io: counted.as_ref().map(|counted| counted.disk_io),
        vmm_counters: counted.map(|counted| counted.own).unwrap_or_default(),
        traffic,
        activity,
        guest,
        guest_error,
    })
}

/// What an instance's interface has carried, if it has one that can be looked at.
async fn traffic_of(node: &Node, path: &InstancePath) -> Option<Traffic> {
    let now = node.state.now();
    let place = now.desired.instances.get(path).and_then(|it| now.desired.network_of(it))?;
    node.host.network.traffic(place).await.ok()?
}

fn traces(node: &Node, path: &InstancePath) -> Traces {
    let dir = node.instance_dir(&path.id);
    let console = dir.console_log();
    Traces {
        activity: node.activities.of(path),
        console_tail: mvm_host::console::tail(&console, CONSOLE_TAIL_LINES).unwrap_or_default(),
        output_tail: main_log::last_words(&dir, OUTPUT_TAIL_LINES).unwrap_or_default(),
        lacks_space: node.lacks_space(path).then(|| space::words(node)),
    }
}

async fn verify(node: &Node) -> Result<VerifyView, ApiError> {
    let mirror = node.state.now();
    if let Some((key, reason)) = mirror.bad.iter().next() {
        return Err(ApiError::bad_record(key, reason));
    }
    let expected = mirror.expected_network().map_err(|error| ApiError::internal(&error))?;
    let lost = cut_off::look(node).await.map_err(|error| ApiError::internal(&error))?;
    let lost = lost.iter().map(|instance| Difference::TapLost { tap: instance.tap() });
    let found = node.host.network.verify(&expected).await;
    let found = found.map_err(|error| ApiError::internal(&error))?;
    Ok(VerifyView {
        tenants: expected.tenants().count() as u64,
        instances: expected.instances().count() as u64,
        differences: found.into_iter().chain(lost).map(|it| it.to_string()).collect(),
    })
}

/// Replaces one of the node's own records that does not parse.
async fn mend(node: &Node, key: String, text: Option<String>) -> Result<Answer, ApiError> {
    let op = match text {
        None => Op::Delete { key: key.clone() },
        Some(text) => Op::put(key.clone(), text),
    };
    node.state.write(vec![op]).await.map_err(|error| ApiError::internal(&error))?;
    node.poke();
    match node.state.now().bad.get(&key) {
        Some(reason) => Err(ApiError::bad_record(&key, reason)),
        None => Ok(Answer::Done),
    }
}
