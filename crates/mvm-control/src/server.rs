//! The API server: one connection, one call.

use std::sync::Arc;
use std::time::Duration;

use mvm_core::admit::Denial;
use mvm_core::death::Cause;
use mvm_core::mirror::Mirror;
use mvm_core::name::{InstancePath, Selector};
use mvm_core::record::{self, Desired, InstanceRecord};
use mvm_store::{ChangeError, Infallible, Op, Room};
use mvm_wire::door::{Answer, Channel, Question};
use mvm_wire::view::{RecordView, WhyView};
use mvm_wire::{
    ApiError, Call, Connection, ConnectionError, ErrorCode, HangUp, Hello, LogKind, LogQuery,
    Reply, Welcome, WriteHalf, chain,
};
use tokio::time::timeout;

use crate::admission::{self, denied};
use crate::suggest::{Kind, did_you_mean};
use crate::{Control, Principal, bases, configs, forks, lists, scope, views, watch};

/// Serves one connection.
pub(crate) async fn serve(
    control: &Arc<Control>,
    mut connection: Connection,
    principal: Principal,
    hang_up: &dyn HangUp,
) {
    let (call, hello) = match greet(control, &mut connection, principal).await {
        Ok(asked) => asked,
        Err(error) => {
            drop(connection.write.message(&Reply::Error(error)).await);
            return;
        }
    };
    let deadline = hello.and_then(|hello| hello.deadline_ms).map(Duration::from_millis);
    if let Err(error) = answer(control, call, connection, deadline, hang_up).await {
        tracing::debug!(error = chain(&error), %principal, "a caller hung up");
    }
}

/// The call, and what its caller said of itself before, if it did. One that confined itself has asked for nothing
/// else.
async fn greet(
    control: &Control,
    connection: &mut Connection,
    principal: Principal,
) -> Result<(Call, Option<Hello>), ApiError> {
    let first = connection.read.message::<Call>().await;
    let hello = match first.map_err(|error| not_understood(&error))? {
        Call::Hello(hello) => hello,
        call => return Ok((clear(call, &control.state.now().desired), None)),
    };
    let welcome = Welcome {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: hello.protocol()?,
        principal: principal.to_string(),
    };
    let welcomed = connection.write.message(&Reply::Welcome(welcome)).await;
    welcomed.map_err(|error| not_understood(&error))?;
    let call = connection.read.message::<Call>().await;
    let call = call.map_err(|error| not_understood(&error))?;
    let desired = &control.state.now().desired;
    let call = clear(call, desired);
    let call = match &hello.scope {
        Some(scope) => scope::confine(call, scope, desired)?,
        None => call,
    };
    Ok((call, Some(hello)))
}

/// The call with what its selector means here.
fn clear(mut call: Call, desired: &Desired) -> Call {
    if let Some(selector) = call.selector_mut() {
        *selector = desired.meant(selector.clone());
    }
    call
}

/// A call that does not parse: one of a newer caller may have what this agent does not know.
fn not_understood(error: &ConnectionError) -> ApiError {
    let unknown = match error {
        ConnectionError::Message(error) => Some(error.to_string()).filter(|text| {
            text.starts_with("unknown field") || text.starts_with("unknown variant")
        }),
        _ => None,
    };
    match unknown {
        Some(unknown) => {
            unsupported(format!("this agent does not know all of the call: {unknown}"))
        }
        None => ApiError::new(ErrorCode::Invalid, chain(error)),
    }
}

fn unsupported(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::Unsupported, message).hint(
        "the agent may be older than the command (`mvm node info` shows its version): `mvm agent stop`, \
         then try again",
    )
}

async fn answer(
    control: &Arc<Control>,
    call: Call,
    mut connection: Connection,
    deadline: Option<Duration>,
    hang_up: &dyn HangUp,
) -> Result<(), ConnectionError> {
    let reply = match call {
        Call::Watch { instances, pools, tenant, disks, changes } => {
            let instances = instances.into_iter().collect();
            let watched = watch::Watched { instances, pools, tenant, disks, changes };
            return watch::watch(control, &watched, connection).await;
        }
        Call::Exec { selector, request } => {
            let found = some(&control.state.now(), &selector).map(|()| selector);
            return open(control, found, Channel::Exec { request }, connection, hang_up).await;
        }
        Call::Forward { selector, target } => {
            let found = some(&control.state.now(), &selector).map(|()| selector);
            return open(control, found, Channel::Forward { target }, connection, hang_up).await;
        }
        Call::Logs { selector, kind, follow, tail, since_unix_ms, timestamps } => {
            let query = LogQuery { kind, follow, tail, since_unix_ms, timestamps };
            let mirror = control.state.now();
            // The kernel is asked: any instance that runs will do.
            let found = match kind == LogKind::Kernel && since_unix_ms.is_none() {
                true => some(&mirror, &selector).map(|()| selector),
                false => one(&mirror, &selector).map(|path| Selector::from(&path)),
            };
            return open(control, found, Channel::Logs(query), connection, hang_up).await;
        }
        Call::Attach { selector, wait } => {
            let found = one(&control.state.now(), &selector).map(|path| Selector::from(&path));
            return open(control, found, Channel::Attach { wait }, connection, hang_up).await;
        }
        Call::Locate { selector } => match some(&control.state.now(), &selector) {
            Ok(()) => tokio::select! {
                answer = control.link.ask(Question::Locate { selector }) => match answer {
                    Ok(Answer::Located(instance)) => Ok(Reply::Connected { instance }),
                    Ok(other) => Err(other.unexpected()),
                    Err(error) => Err(error),
                },
                () = hang_up.wait() => return Ok(()),
            },
            Err(error) => Err(error),
        },
        Call::Ssh { selector } => match some(&control.state.now(), &selector) {
            Ok(()) => tokio::select! {
                answer = control.link.ask(Question::Ssh { selector }) => match answer {
                    Ok(Answer::Ssh(view)) => Ok(Reply::Ssh(view)),
                    Ok(other) => Err(other.unexpected()),
                    Err(error) => Err(error),
                },
                () = hang_up.wait() => return Ok(()),
            },
            Err(error) => Err(error),
        },
        Call::Instances { selector } => {
            return lists::instances(control, &selector, &mut connection.write).await;
        }
        Call::Fork { .. } | Call::ForkOnce { .. } => {
            let (id, selector, count) = match call {
                Call::ForkOnce { id, selector, count } => (id, selector, count),
                Call::Fork { selector, count } => (control.request_id(), selector, count),
                _ => return Ok(()),
            };
            match forks::fork(control, &id, &selector, count, hang_up).await {
                Some(forked) => forked.map(Reply::Accepted),
                None => return Ok(()),
            }
        }
        Call::AgentStop => {
            finish(&mut connection.write, Ok(Reply::Done)).await?;
            control.stop.notify_waiters();
            return Ok(());
        }
        call => in_time(control, call, deadline).await,
    };
    finish(&mut connection.write, reply).await
}

/// Opens a stream to what was found, or says why nothing was.
async fn open(
    control: &Control,
    found: Result<Selector, ApiError>,
    channel: Channel,
    mut connection: Connection,
    hang_up: &dyn HangUp,
) -> Result<(), ConnectionError> {
    match found {
        Ok(selector) => control.link.open(&selector, channel, connection, hang_up).await,
        Err(error) => finish(&mut connection.write, Err(error)).await,
    }
}

/// Sends the last reply of a call.
pub(crate) async fn finish(
    write: &mut WriteHalf,
    reply: Result<Reply, ApiError>,
) -> Result<(), ConnectionError> {
    write.message(&reply.unwrap_or_else(Reply::Error)).await
}

/// Answers a question within the time that its caller waits. What was begun goes on: a change may be durable.
async fn in_time(
    control: &Arc<Control>,
    call: Call,
    deadline: Option<Duration>,
) -> Result<Reply, ApiError> {
    // A base takes as long as it takes.
    let Some(deadline) = deadline.filter(|_| !matches!(call, Call::WarmUp { .. })) else {
        return unary(control, call).await;
    };
    let control = control.clone();
    let answer = tokio::spawn(async move { unary(&control, call).await });
    match timeout(deadline, answer).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => Err(ApiError::internal(&error)),
        Err(_) => {
            let waits = deadline.as_millis();
            let message =
                format!("there was no answer within the {waits} ms that the caller waits");
            Err(ApiError::new(ErrorCode::Late, message)
                .hint("what was asked for may still be done: look, and ask again"))
        }
    }
}

async fn unary(control: &Arc<Control>, call: Call) -> Result<Reply, ApiError> {
    let mirror = control.state.now();
    match call {
        Call::Submit(request) => admission::submit(control, request).await.map(Reply::Accepted),
        Call::SubmitOnce { id, change } => {
            admission::submit_once(control, change, &id).await.map(Reply::Accepted)
        }
        Call::Node => Ok(Reply::Node(Box::new(views::node(control).await?))),
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
            let mut pools = views::pools(&mirror, |pool| {
                tenant.as_ref().is_none_or(|tenant| pool.tenant == *tenant)
                    && path.as_ref().is_none_or(|path| pool == path)
            });
            views::complete_pools(control, &mut pools).await;
            match path {
                Some(path) if pools.is_empty() => {
                    Err(missing(&mirror, Kind::Pool, &path.to_string()))
                }
                _ => Ok(Reply::Pools(pools)),
            }
        }
        Call::Disks { tenant, path } => {
            let mut disks = views::disks(&mirror, |disk| {
                tenant.as_ref().is_none_or(|tenant| disk.tenant == *tenant)
                    && path.as_ref().is_none_or(|path| disk == path)
            });
            views::complete_disks(control, &mut disks).await;
            match path {
                Some(path) if disks.is_empty() => {
                    Err(missing(&mirror, Kind::Disk, &path.to_string()))
                }
                _ => Ok(Reply::Disks(disks)),
            }
        }
        Call::Images => match control.link.ask(Question::Images).await? {
            Answer::Images(images) => Ok(Reply::Images(images)),
            other => Err(other.unexpected()),
        },
        Call::ImageRemove { revision } => {
            collected(control.link.ask(Question::ImageRemove { revision }).await?)
        }
        Call::ImageCollect { dry_run } => {
            collected(control.link.ask(Question::ImageCollect { dry_run }).await?)
        }
        Call::WarmUp { pool } => {
            bases::warm_up(control, &pool).await?;
            let mut pools = views::pools(&control.state.now(), |path| *path == pool);
            views::complete_pools(control, &mut pools).await;
            Ok(Reply::Pools(pools))
        }
        Call::Stats { selector } => stats(control, &selector).await,
        Call::Why { selector } => why(control, &selector).await,
        Call::NetVerify => match control.link.ask(Question::Verify).await? {
            Answer::Verified(view) => Ok(Reply::Verify(view)),
            other => Err(other.unexpected()),
        },
        Call::Records { prefix } => records(control, prefix).await,
        Call::RecordMend { key, text } => mend(control, key, text).await,
        Call::Hello(_)
        | Call::Signal { .. }
        | Call::Resize { .. }
        | Call::Detach
        | Call::Unknown => Err(unsupported("this agent does not know the call")),
        Call::Watch { .. }
        | Call::Exec { .. }
        | Call::Fork { .. }
        | Call::ForkOnce { .. }
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

fn collected(answer: Answer) -> Result<Reply, ApiError> {
    match answer {
        Answer::Collected(view) => Ok(Reply::Collected(view)),
        other => Err(other.unexpected()),
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
            Err(denied(mirror, &denial))
        }
        Selector::Pool(path) => Err(missing(mirror, Kind::Pool, &path.to_string())),
        Selector::Id { .. } => Err(missing(mirror, Kind::Instance, &selector.to_string())),
    }
}

/// The one instance that a selector means.
pub(crate) fn one(mirror: &Mirror, selector: &Selector) -> Result<InstancePath, ApiError> {
    let mut matches = mirror.desired.instances_meant(selector).map(|record| &record.path);
    match (matches.next(), matches.next()) {
        (Some(path), None) => Ok(path.clone()),
        (None, _) => {
            known(mirror, selector)?;
            let denial = Denial::NoInstances { of: selector.clone() };
            Err(denied(mirror, &denial))
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

/// Checks that a selector matches an instance.
fn some(mirror: &Mirror, selector: &Selector) -> Result<(), ApiError> {
    let is_named = matches!(selector, Selector::Id { .. });
    let is_meant = |record: &InstanceRecord| is_named || record.purpose.is_use();
    match mirror.desired.instances_meant(selector).any(is_meant) {
        true => Ok(()),
        // The error says why nothing matches.
        false => one(mirror, selector).map(drop),
    }
}

async fn stats(control: &Control, selector: &Selector) -> Result<Reply, ApiError> {
    let mirror = control.state.now();
    let records = mirror.desired.instances_meant(selector);
    let instances: Vec<InstancePath> = records.map(|record| record.path.clone()).collect();
    if instances.is_empty() {
        known(&mirror, selector)?;
    }
    match control.link.ask(Question::Stats { instances }).await? {
        Answer::Stats(stats) => Ok(Reply::Stats(stats)),
        other => Err(other.unexpected()),
    }
}

async fn why(control: &Control, selector: &Selector) -> Result<Reply, ApiError> {
    let mirror = control.state.now();
    let path = one(&mirror, selector)?;
    if let Some((key, reason)) = mirror.bad_record_of(&path.pool.tenant) {
        return Err(ApiError::bad_record(key, reason));
    }
    let mut views = views::instances(&mirror, [&path]);
    configs::add_ports_to_instances(control, &mut views).await;
    let Some(instance) = views.into_iter().next() else {
        return Err(missing(&mirror, Kind::Instance, &path.to_string()));
    };
    let traces = match control.link.ask(Question::Traces { instance: path }).await? {
        Answer::Traces(traces) => traces,
        other => return Err(other.unexpected()),
    };
    let summary = views::summary(&instance, &traces);
    let recorded = instance.last_death.as_ref().map(|death| death.console_tail.clone());
    let console_tail = match recorded {
        // The console of the run that died, not of the one that runs now.
        Some(tail) if instance.running_since_unix_ms.is_none() && !tail.is_empty() => tail,
        _ => traces.console_tail,
    };
    let has_run = match instance.last_death.as_ref().map(|death| &death.cause) {
        // What there is comes from a run before.
        Some(Cause::StartFailed { .. } | Cause::BootTimeout) => {
            instance.running_since_unix_ms.is_some()
        }
        _ => true,
    };
    let output_tail = if has_run { traces.output_tail } else { Vec::new() };
    let activity = traces.activity;
    Ok(Reply::Why(Box::new(WhyView { instance, summary, activity, output_tail, console_tail })))
}

/// All records, control's own and the node's.
async fn records(control: &Control, prefix: String) -> Result<Reply, ApiError> {
    let own = control.state.raw(&prefix).await.map_err(|error| ApiError::internal(&error))?;
    let mut records: Vec<RecordView> = own
        .into_iter()
        .map(|(key, value)| RecordView { key, text: String::from_utf8_lossy(&value).into_owned() })
        .collect();
    match control.link.ask(Question::Records { prefix }).await? {
        Answer::Records(of_node) => records.extend(of_node),
        other => return Err(other.unexpected()),
    }
    records.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(Reply::Records(records))
}

/// Only a record that does not parse may be replaced by hand: the others have their verbs.
async fn mend(control: &Control, key: String, text: Option<String>) -> Result<Reply, ApiError> {
    if !control.state.now().bad.contains_key(&key) {
        let message = format!("`{key}` is not a record that needs mending");
        return Err(ApiError::new(ErrorCode::Conflict, message)
            .hint("`mvm node info` lists the records that do not parse"));
    }
    if !key.starts_with(record::DESIRED) {
        return control.link.ask(Question::RecordMend { key, text }).await.map(|_| Reply::Done);
    }
    let op = match text {
        None => Op::Delete { key: key.clone() },
        Some(text) => Op::put(key.clone(), text),
    };
    let change = async |_| Ok::<_, Infallible>((vec![op.clone()], ()));
    match control.change(Room::Reserved, change).await {
        Ok(_) => {}
        Err(ChangeError::Store(error)) => return Err(ApiError::internal(&error)),
        Err(ChangeError::Refused(never)) => match never {},
    }
    match control.state.now().bad.get(&key) {
        Some(reason) => Err(ApiError::bad_record(&key, reason)),
        None => Ok(Reply::Done),
    }
}
