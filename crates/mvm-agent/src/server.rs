//! The API server: one connection, one call.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use mvm_core::admit::Denial;
use mvm_core::death::{CONSOLE_TAIL_LINES, Cause, OUTPUT_TAIL_LINES};
use mvm_core::lifecycle::Phase;
use mvm_core::name::{InstancePath, Selector};
use mvm_core::net::Traffic;
use mvm_host::main_log;
use mvm_host::net::Difference;
use mvm_host::unix_socket::HangUp;
use mvm_host::vmm::CONSOLE_LOG;
use mvm_store::Op;
use mvm_wire::view::{RecordView, StatsView, VerifyView, WhyView};
use mvm_wire::{ApiError, Call, Connection, ConnectionError, ErrorCode, Reply, WriteHalf};
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use crate::cut_off;
use crate::logs::LogQuery;
use crate::node::{InstanceHandle, Node, chain};
use crate::reconcile::expected_network;
use crate::state::Mirror;
use crate::submit::internal;
use crate::suggest::{Kind, did_you_mean};
use crate::{
    attach, configs, exec, fork, forward, images, lists, logs, ssh, streams, submit, views, warm_up,
};

/// Connections that are served at once; more wait in the socket's queue.
const MAX_CONNECTIONS: u64 = 1_024;
/// The part of the agent's descriptors that they may come to, with two each.
const PART_OF_DESCRIPTORS: u64 = 8;
/// How long a caller that was answered may still send what nobody wants, before it is cut off.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Serves a socket for as long as the agent runs.
pub(crate) async fn run(node: Arc<Node>, listener: UnixListener) -> Infallible {
    let mut connections = JoinSet::new();
    let max = MAX_CONNECTIONS.min(node.config.open_files / PART_OF_DESCRIPTORS) as usize;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept(), if connections.len() < max => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                let node = node.clone();
                let hang_up = HangUp::of(&stream).unwrap_or_else(|_| HangUp::never());
                let connection = Connection::new(stream);
                connections.spawn(async move {
                    serve(&node, connection, &hang_up).await;
                    hang_up.drain(LAST_WORDS).await;
                });
            }
            Err(error) => {
                // Out of descriptors, usually: wait for a connection to end.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Serves one connection.
pub(crate) async fn serve(node: &Arc<Node>, mut connection: Connection, hang_up: &HangUp) {
    let call = match connection.read.message::<Call>().await {
        Ok(call) => call,
        Err(error) => {
            let error = ApiError::new(ErrorCode::Invalid, chain(&error));
            drop(connection.write.message(&Reply::Error(error)).await);
            return;
        }
    };
    if let Err(error) = answer(node, call, connection, hang_up).await {
        tracing::debug!(error = chain(&error), "a caller hung up");
    }
}

async fn answer(
    node: &Arc<Node>,
    mut call: Call,
    mut connection: Connection,
    hang_up: &HangUp,
) -> Result<(), ConnectionError> {
    if let Some(selector) = call.selector_mut() {
        *selector = node.state.now().desired.meant(selector.clone());
    }
    let reply = match call {
        Call::Watch { instances, pools, tenant, disks } => {
            let watched = streams::Watched { instances, pools, tenant, disks };
            return streams::watch(node, &watched, connection).await;
        }
        Call::Exec { selector, request } => {
            return exec::exec(node, &selector, request, connection, hang_up).await;
        }
        Call::Forward { selector, target } => {
            return forward::forward(node, &selector, target, connection, hang_up).await;
        }
        Call::Locate { selector } => {
            let found = tokio::select! {
                found = streams::session(node, &selector) => found,
                () = hang_up.wait() => return Ok(()),
            };
            found.map(|(instance, _)| Reply::Connected { instance })
        }
        Call::Ssh { selector } => tokio::select! {
            prepared = ssh::prepare(node, &selector) => prepared.map(Reply::Ssh),
            () = hang_up.wait() => return Ok(()),
        },
        Call::Logs { selector, kind, follow, tail, since_unix_ms, timestamps } => {
            let query = LogQuery { kind, follow, tail, since_unix_ms, timestamps };
            return logs::logs(node, &selector, query, connection).await;
        }
        Call::Instances { selector } => {
            return lists::instances(node, &selector, &mut connection.write).await;
        }
        Call::Attach { selector, wait } => {
            return attach::attach(node, &selector, wait, connection, hang_up).await;
        }
        Call::Fork { selector, count } => {
            let settled = tokio::select! {
                settled = fork::settled(node, &selector) => settled,
                () = hang_up.wait() => return Ok(()),
            };
            match settled {
                Ok(()) => fork::fork(node, &selector, count).await.map(Reply::Accepted),
                Err(error) => Err(error),
            }
        }
        Call::AgentStop => {
            finish(&mut connection.write, Ok(Reply::Done)).await?;
            node.stop.notify_waiters();
            return Ok(());
        }
        call => unary(node, call).await,
    };
    finish(&mut connection.write, reply).await
}

/// Sends the last reply of a call.
pub(crate) async fn finish(
    write: &mut WriteHalf,
    reply: Result<Reply, ApiError>,
) -> Result<(), ConnectionError> {
    write.message(&reply.unwrap_or_else(Reply::Error)).await
}

async fn unary(node: &Arc<Node>, call: Call) -> Result<Reply, ApiError> {
    let mirror = node.state.now();
    match call {
        Call::Submit(request) => submit::submit(node, request).await.map(Reply::Accepted),
        Call::Node => Ok(Reply::Node(Box::new(views::node(node)))),
        Call::Tenants { name } => {
            let tenants = views::tenants(&mirror, name.as_ref());
            match name {
                Some(name) if tenants.is_empty() => {
                    Err(missing(&mirror, Kind::Tenant, name.as_str()))
                }
                _ => Ok(Reply::Tenants(tenants)),
            }
        }
        Call::Pools { tenant, path } => {
            let mut pools = views::pools(node, &mirror, |pool| {
                tenant.as_ref().is_none_or(|tenant| pool.tenant == *tenant)
                    && path.as_ref().is_none_or(|path| pool == path)
            });
            configs::add_to_pools(node, &mut pools).await;
            match path {
                Some(path) if pools.is_empty() => {
                    Err(missing(&mirror, Kind::Pool, &path.to_string()))
                }
                _ => Ok(Reply::Pools(pools)),
            }
        }
        Call::Disks { tenant, path } => {
            let disks = views::disks(node, &mirror, |disk| {
                tenant.as_ref().is_none_or(|tenant| disk.tenant == *tenant)
                    && path.as_ref().is_none_or(|path| disk == path)
            });
            match path {
                Some(path) if disks.is_empty() => {
                    Err(missing(&mirror, Kind::Disk, &path.to_string()))
                }
                _ => Ok(Reply::Disks(disks)),
            }
        }
        Call::Images => images::list(node, &mirror).await.map(Reply::Images),
        Call::ImageRemove { revision } => {
            images::remove(node, &revision).await.map(Reply::Collected)
        }
        Call::ImageCollect { dry_run } => {
            images::collect(node, dry_run).await.map(Reply::Collected)
        }
        Call::WarmUp { pool } => {
            warm_up::warm_up(node, &pool).await?;
            let pools = views::pools(node, &node.state.now(), |path| *path == pool);
            Ok(Reply::Pools(pools))
        }
        Call::Stats { selector } => stats(node, &mirror, &selector).await,
        Call::Why { selector } => why(node, &mirror, &selector).await,
        Call::NetVerify => verify(node, &mirror).await,
        Call::Records { prefix } => match node.state.raw(&prefix).await {
            Ok(records) => Ok(Reply::Records(
                records
                    .into_iter()
                    .map(|(key, value)| RecordView {
                        key,
                        text: String::from_utf8_lossy(&value).into_owned(),
                    })
                    .collect(),
            )),
            Err(error) => Err(internal(&error)),
        },
        Call::RecordMend { key, text } => mend(node, &mirror, key, text).await,
        Call::Signal { .. } | Call::Resize { .. } | Call::Detach | Call::Unknown => {
            Err(ApiError::new(ErrorCode::Unsupported, "this agent does not know the call")
                .hint("the agent may be older than the command: `mvm agent stop`, then try again"))
        }
        Call::Watch { .. }
        | Call::Exec { .. }
        | Call::Fork { .. }
        | Call::Attach { .. }
        | Call::Instances { .. }
        | Call::Forward { .. }
        | Call::Locate { .. }
        | Call::Ssh { .. }
        | Call::Logs { .. }
        | Call::AgentStop => {
            Err(ApiError::new(ErrorCode::Internal, "a stream was called as a question"))
        }
    }
}

fn missing(mirror: &Mirror, kind: Kind, name: &str) -> ApiError {
    let (what, list) = match kind {
        Kind::Tenant => ("tenant", "tenant list"),
        Kind::Pool => ("pool", "pool list"),
        Kind::Disk => ("disk", "disk list"),
        Kind::Instance => ("instance", "ps -a"),
    };
    let hint = did_you_mean(mirror, kind, name).unwrap_or_else(|| format!("see `mvm {list}`"));
    ApiError::new(ErrorCode::NotFound, format!("there is no {what} {name}")).hint(hint)
}

/// Nothing matches: an error if the selector names something that does not exist.
pub(crate) fn known(mirror: &Mirror, selector: &Selector) -> Result<(), ApiError> {
    let desired = &mirror.desired;
    match selector {
        Selector::All => Ok(()),
        Selector::Tenant(name) if desired.tenants.contains_key(name) => Ok(()),
        Selector::Pool(path) if desired.pools.contains_key(path) => Ok(()),
        Selector::Tenant(name) => {
            let denial = Denial::NoSuchName { name: name.clone() };
            Err(submit::denied(mirror, &denial))
        }
        Selector::Pool(path) => Err(missing(mirror, Kind::Pool, &path.to_string())),
        Selector::Id { .. } => Err(missing(mirror, Kind::Instance, &selector.to_string())),
    }
}

/// The one instance that a selector means.
pub(crate) fn one(mirror: &Mirror, selector: &Selector) -> Result<InstancePath, ApiError> {
    let mut matches = mirror.desired.instances.keys().filter(|path| selector.matches(path));
    match (matches.next(), matches.next()) {
        (Some(path), None) => Ok(path.clone()),
        (None, _) => {
            known(mirror, selector)?;
            let denial = Denial::NoInstances { of: selector.clone() };
            Err(submit::denied(mirror, &denial))
        }
        (Some(first), Some(second)) => {
            let more = matches.count();
            let count = more + 2;
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let message = format!("{selector} matches {count} instances: {first}, {second}{more}");
            Err(ApiError::new(ErrorCode::Invalid, message).hint("name one of them"))
        }
    }
}

async fn stats(node: &Arc<Node>, mirror: &Mirror, selector: &Selector) -> Result<Reply, ApiError> {
    let paths: Vec<InstancePath> =
        mirror.desired.instances.keys().filter(|path| selector.matches(path)).cloned().collect();
    if paths.is_empty() {
        known(mirror, selector)?;
    }
    let mut tasks = JoinSet::new();
    for path in paths {
        if let Some(handle) = node.instance(&path) {
            let node = node.clone();
            tasks.spawn(async move { stats_of(&node, path, handle).await });
        }
    }
    let mut stats: Vec<StatsView> = tasks.join_all().await.into_iter().flatten().collect();
    stats.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(Reply::Stats(stats))
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
            Some(session) => match session.health(streams::GUEST_TIMEOUT).await {
                Ok(health) => (Some(health), None),
                Err(error) => (None, Some(chain(&error))),
            },
        }
    };
    // One that is being saved does not tell before it is.
    let counting = tokio::time::timeout(streams::GUEST_TIMEOUT, vm.counters());
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

async fn why(node: &Node, mirror: &Mirror, selector: &Selector) -> Result<Reply, ApiError> {
    let path = one(mirror, selector)?;
    if let Some((key, reason)) = mirror.bad_record_of(&path.pool.tenant) {
        return Err(submit::bad_record_error(key, reason));
    }
    let mut views = views::instances(node, mirror, |other| *other == path);
    configs::add_ports_to_instances(node, &mut views).await;
    let Some(instance) = views.into_iter().next() else {
        return Err(missing(mirror, Kind::Instance, &path.to_string()));
    };
    let summary = views::summary(node, &instance);
    let activity = node.activities.of(&path);
    let dir = node.instance_dir(&path.id);
    let file = dir.join(CONSOLE_LOG);
    let recorded = instance.last_death.as_ref().map(|death| death.console_tail.clone());
    let console_tail = match recorded {
        // The console of the run that died, not of the one that runs now.
        Some(tail) if instance.running_since_unix_ms.is_none() && !tail.is_empty() => tail,
        _ => mvm_host::console::tail(&file, CONSOLE_TAIL_LINES).unwrap_or_default(),
    };
    let has_run = match instance.last_death.as_ref().map(|death| &death.cause) {
        // What there is comes from a run before.
        Some(Cause::StartFailed { .. } | Cause::BootTimeout) => {
            instance.running_since_unix_ms.is_some()
        }
        _ => true,
    };
    let output_tail = match has_run {
        true => main_log::last_words(&dir, OUTPUT_TAIL_LINES).unwrap_or_default(),
        false => Vec::new(),
    };
    Ok(Reply::Why(Box::new(WhyView { instance, summary, activity, output_tail, console_tail })))
}

async fn verify(node: &Node, mirror: &Mirror) -> Result<Reply, ApiError> {
    if let Some((key, reason)) = mirror.bad.iter().next() {
        return Err(submit::bad_record_error(key, reason));
    }
    let expected = expected_network(mirror).map_err(|error| internal(&error))?;
    let lost = cut_off::look(node).await.map_err(|error| internal(&error))?;
    let lost = lost.iter().map(|instance| Difference::TapLost { tap: instance.tap() });
    let found = node.host.network.verify(&expected).await.map_err(|error| internal(&error))?;
    Ok(Reply::Verify(VerifyView {
        tenants: expected.tenants().count() as u64,
        instances: expected.instances().count() as u64,
        differences: found.into_iter().chain(lost).map(|it| it.to_string()).collect(),
    }))
}

/// Only a record that does not parse may be replaced by hand: the others have their verbs.
async fn mend(
    node: &Node,
    mirror: &Mirror,
    key: String,
    text: Option<String>,
) -> Result<Reply, ApiError> {
    if !mirror.bad.contains_key(&key) {
        let message = format!("`{key}` is not a record that needs mending");
        return Err(ApiError::new(ErrorCode::Conflict, message)
            .hint("`mvm node info` lists the records that do not parse"));
    }
    let op = match text {
        None => Op::Delete { key: key.clone() },
        Some(text) => Op::Put { key: key.clone(), value: text.into_bytes() },
    };
    if let Err(error) = node.state.write(vec![op]).await {
        return Err(internal(&error));
    }
    node.poke();
    match node.state.now().bad.get(&key) {
        Some(reason) => Err(submit::bad_record_error(&key, reason)),
        None => Ok(Reply::Done),
    }
}
