//! The calls of the verbs, and how a client asks them.

use std::net::Ipv4Addr;
use std::time::Duration;

use mvm_core::admit::{DEFAULT_GRACE_MS, Request};
use mvm_core::frame::{KIND_STDIN, KIND_STDOUT};
use mvm_core::guest::{ExecRequest, ForwardTarget};
use mvm_core::name::{InstancePath, RevisionId, Selector};
use mvm_core::record::DEFAULT_HOOKS_MS;
use mvm_core::settings::Settings;
use mvm_core::sleep_policy::SleepPolicy;
use mvm_core::spec::{Document, DocumentDisk, DocumentPool, PoolSpec, Quota};
use mvm_habits::{Kind, Verb};
use mvm_wire::{ApiError, Call, Item, LogKind, Reply};
use tokio::time::timeout;

use super::scene::{DISK, DISK_MIB, IDLE_S, Scene, Subject};

/// How long a question, or a request that only says what is desired, may take.
const AT_ONCE: Duration = Duration::from_secs(1);
/// How long what needs a guest may take, which may have to boot, or to be saved first.
const WITH_GUEST: Duration = Duration::from_secs(12);
/// How long a follower listens.
const LISTENING: Duration = Duration::from_millis(500);
/// How far into a call a client hangs up.
const MIDDLES_MS: [u64; 3] = [0, 20, 700];

/// What a client heard.
#[derive(Debug)]
pub(super) enum Heard {
    /// It works.
    Fine,
    /// It was refused.
    Refused(ApiError),
    /// Nobody knows: it hung up first.
    Nothing,
}

/// The document in which one instance of the pool runs.
fn document(spec: &PoolSpec) -> Document {
    let disk = |mount: &mvm_core::disk::DiskMount| {
        (mount.name.clone(), DocumentDisk { size_mib: DISK_MIB })
    };
    let pool = DocumentPool { running: 1, names_image: true, spec: spec.clone() };
    Document {
        tenant: "demo".parse().unwrap(),
        subnet: None,
        quota: None,
        disks: spec.disks.iter().map(disk).collect(),
        pools: [("app".parse().unwrap(), pool)].into(),
    }
}

/// The call of a verb on an instance whose pool is like this.
pub(super) fn call(verb: Verb, subject: &InstancePath, spec: &PoolSpec) -> Call {
    let selector = Selector::from(subject);
    let path = subject.pool.clone();
    let name = path.tenant.clone();
    let all = false;
    let disk = format!("demo/{DISK}").parse().unwrap();
    let logs = |kind, follow| Call::Logs {
        selector: Selector::from(subject),
        kind,
        follow,
        tail: None,
        since_unix_ms: None,
        timestamps: false,
    };
    let scale = |running| Request::PoolScale {
        path: subject.pool.clone(),
        running,
        warm: None,
        sleeping: None,
    };
    let create = |start| Request::InstanceCreate {
        pool: subject.pool.clone(),
        count: 1,
        start,
        disks: vec![],
        cold: false,
    };
    let request = match verb {
        Verb::Start => Request::InstanceStart { selector, all },
        Verb::Stop => Request::InstanceStop { selector, all, grace_ms: DEFAULT_GRACE_MS },
        Verb::Kill => Request::InstanceStop { selector, all, grace_ms: 0 },
        Verb::Restart => Request::InstanceRestart { selector, all, grace_ms: DEFAULT_GRACE_MS },
        Verb::Warm => Request::InstanceWarm { selector, all },
        Verb::Sleep => Request::InstanceSleep { selector, all, hooks_ms: DEFAULT_HOOKS_MS },
        Verb::SleepForce => Request::InstanceSleep { selector, all, hooks_ms: 0 },
        Verb::Pin => Request::InstancePin { selector, all, pinned: true },
        Verb::Unpin => Request::InstancePin { selector, all, pinned: false },
        Verb::Destroy => Request::InstanceDestroy { selector, all, force: false },
        Verb::DestroyForce => Request::InstanceDestroy { selector, all, force: true },
        Verb::Create => create(false),
        Verb::CreateStarted => create(true),
        Verb::PoolCreate => Request::PoolCreate { path, spec: spec.clone().into() },
        Verb::PoolBuild => Request::PoolBuild { path },
        Verb::PoolUpdate => {
            Request::PoolUpdate { path, image: None, settings: Settings::default() }
        }
        Verb::PoolRollback => Request::PoolRollback { path },
        Verb::ScaleToOne => scale(1),
        Verb::ScaleToNone => scale(0),
        Verb::PoolReady => Request::PoolReady { path, ready: 1 },
        Verb::PoolPolicy => {
            let policy = SleepPolicy { sleep_after_s: Some(IDLE_S), ..SleepPolicy::default() };
            Request::PoolPolicy { path, policy }
        }
        Verb::PoolDestroy => Request::PoolDestroy { path, force: false },
        Verb::PoolDestroyForce => Request::PoolDestroy { path, force: true },
        Verb::TenantCreate => Request::TenantCreate { name, quota: Quota::default(), subnet: None },
        Verb::TenantUpdate => {
            let quota = Quota { running: Some(1_000), ..Quota::default() };
            Request::TenantUpdate { name, quota, lift: vec![] }
        }
        Verb::TenantMove => Request::TenantMove { name, subnet: "10.99.0.0/24".parse().unwrap() },
        Verb::TenantDestroy => Request::TenantDestroy { name, force: false },
        Verb::TenantDestroyForce => Request::TenantDestroy { name, force: true },
        Verb::DiskCreate => {
            Request::DiskCreate { path: "demo/other".parse().unwrap(), size_mib: DISK_MIB }
        }
        Verb::DiskResize => Request::DiskResize { path: disk, size_mib: 2 * DISK_MIB },
        Verb::DiskRemove => Request::DiskRemove { path: disk },
        Verb::Up => Request::Apply { document: document(spec) },
        Verb::Down => Request::Remove { document: document(spec) },

        Verb::Fork => return Call::Fork { selector, count: 1 },
        Verb::Exec => {
            let argv = ["echo", "hi"].map(str::to_owned).into();
            return Call::Exec {
                selector,
                request: ExecRequest { argv, ..ExecRequest::default() },
            };
        }
        Verb::Locate => return Call::Locate { selector },
        Verb::Ssh => return Call::Ssh { selector },
        Verb::Forward => {
            let target = ForwardTarget::Tcp { address: Ipv4Addr::LOCALHOST.into(), port: 80 };
            return Call::Forward { selector, target };
        }
        Verb::Attach => return Call::Attach { selector, wait: false },
        Verb::AttachEarly => return Call::Attach { selector, wait: true },
        Verb::Logs => return logs(LogKind::Auto, false),
        Verb::LogsFollow => return logs(LogKind::Auto, true),
        Verb::LogsKernel => return logs(LogKind::Kernel, false),
        Verb::Stats => return Call::Stats { selector },
        Verb::Why => return Call::Why { selector },
        Verb::Instances => return Call::Instances { selector },
        Verb::Watch => {
            return Call::Watch {
                instances: vec![subject.clone()],
                pools: vec![path],
                tenant: Some(name),
                disks: vec![disk],
                changes: false,
            };
        }
        Verb::WarmUp => return Call::WarmUp { pool: path },
        Verb::Pools => return Call::Pools { tenant: None, path: Some(path) },
        Verb::Tenants => return Call::Tenants { name: Some(name) },
        Verb::Disks => return Call::Disks { tenant: Some(name), path: None },
        Verb::Images => return Call::Images,
        Verb::ImageRemove => {
            // Who asks puts the neighbour's there.
            return Call::ImageRemove { revision: RevisionId::from_digest([0; 8]) };
        }
        Verb::ImageCollect => return Call::ImageCollect { dry_run: false },
        Verb::Node => return Call::Node,
        Verb::NetVerify => return Call::NetVerify,
        Verb::Records => return Call::Records { prefix: String::new() },
        Verb::RecordMend => {
            let key = mvm_core::record::tenant_key(&name);
            return Call::RecordMend { key, text: None };
        }
        Verb::AgentStop => return Call::AgentStop,
        Verb::Unknown => return Call::Unknown,
    };
    Call::Submit(request)
}

/// Whether a reply is the last that a client of this verb needs.
fn is_last(verb: Verb, reply: &Reply) -> bool {
    match verb {
        Verb::Exec => matches!(reply, Reply::ExecExit(_)),
        Verb::Attach => matches!(reply, Reply::ExecStarted { .. }),
        Verb::Logs | Verb::LogsKernel => matches!(reply, Reply::Done),
        Verb::Instances => matches!(reply, Reply::Instances { more: false, .. }),
        _ => true,
    }
}

fn limit(verb: Verb) -> Duration {
    match verb {
        Verb::Fork | Verb::WarmUp => WITH_GUEST,
        _ if verb.kind() == Kind::Use => WITH_GUEST,
        _ => AT_ONCE,
    }
}

/// Asks for a verb and waits for the answer, no longer than it may take.
pub(super) async fn ask(scene: &Scene, verb: Verb, subject: &Subject) -> Result<Heard, String> {
    let call = scene.call(verb, subject);
    let asked = timeout(limit(verb), answer(scene, verb, call)).await;
    asked.unwrap_or_else(|_| Err(format!("not answered within {} s", limit(verb).as_secs())))
}

async fn answer(scene: &Scene, verb: Verb, call: Call) -> Result<Heard, String> {
    let mut connection = scene.agent().node.connect();
    let broken = |error: mvm_wire::ConnectionError| error.to_string();
    connection.write.message(&call).await.map_err(broken)?;
    let mut output = Vec::new();
    loop {
        let next = connection.read.next();
        let item = match verb {
            // It says nothing as long as there is nothing to say.
            Verb::LogsFollow => match timeout(LISTENING, next).await {
                Ok(item) => item,
                Err(_) => return Ok(Heard::Fine),
            },
            _ => next.await,
        };
        match item.map_err(broken)? {
            None => return Err(format!("hung up on after {output:?}")),
            Some(Item::Data { bytes, .. }) => output.extend(bytes),
            Some(message) => match message.parse::<Reply>().map_err(broken)? {
                Reply::Error(error) => return Ok(Heard::Refused(error)),
                reply if is_last(verb, &reply) => break,
                _ => {}
            },
        }
    }
    match verb {
        Verb::Exec if output != b"hi\n" => Err(format!("it printed {output:?}")),
        Verb::Forward => {
            connection.write.data(KIND_STDIN, b"ping").await.map_err(broken)?;
            match connection.read.next().await.map_err(broken)? {
                Some(Item::Data { kind: KIND_STDOUT, bytes }) if bytes == b"ping" => {
                    Ok(Heard::Fine)
                }
                other => Err(format!("the socket sent {other:?}")),
            }
        }
        _ => Ok(Heard::Fine),
    }
}

/// Asks for a verb and hangs up in the middle.
pub(super) async fn interrupt(scene: &Scene, verb: Verb, subject: &Subject) -> Heard {
    let mut call = scene.call(verb, subject);
    if let Call::Exec { request, .. } = &mut call {
        request.argv = ["sleep", "100000"].map(str::to_owned).into();
    }
    let at = MIDDLES_MS[(verb as usize + subject.situation as usize) % MIDDLES_MS.len()];
    let mut connection = scene.agent().node.connect();
    // A node that is ending hears nothing.
    drop(connection.write.message(&call).await);
    if at > 0 {
        tokio::time::sleep(Duration::from_millis(at)).await;
    }
    Heard::Nothing
}
