//! Calls to the agent under test, through the same contract as the command line.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use mvm_core::admit::Request;
use mvm_core::guest::{ExecRequest, ExitStatus};
use mvm_core::image::ImageSpec;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, PoolPath, Selector, TenantName};
use mvm_core::record::BuildState;
use mvm_core::settings::Settings;
use mvm_host::state_dir::StateDir;
use mvm_host::unix_socket;
use mvm_wire::view::{InstanceView, TenantView};
use mvm_wire::{Accepted, Call, Connection, Item, Reply};

/// The program that counts as the first one that a guest runs.
pub(super) fn first_program() -> ExecRequest {
    ExecRequest { argv: vec!["true".to_owned()], ..ExecRequest::default() }
}

/// The way to one agent.
#[derive(Debug, Clone)]
pub(super) struct Client {
    socket: PathBuf,
}

impl Client {
    /// For the agent of this state directory.
    pub(super) fn new(state_dir: &StateDir) -> Self {
        Self { socket: state_dir.socket() }
    }

    /// Opens a connection and makes a call; the replies are for the caller to read.
    pub(super) async fn start(&self, call: &Call) -> anyhow::Result<Connection> {
        let mut connection = Connection::new(unix_socket::connect(&self.socket).await?);
        connection.write.message(call).await?;
        Ok(connection)
    }

    /// Makes a call that has one reply.
    pub(super) async fn call(&self, call: &Call) -> anyhow::Result<Reply> {
        accepted(self.start(call).await?.read.reply().await?)
    }

    /// Changes what is desired.
    pub(super) async fn submit(&self, request: Request) -> anyhow::Result<Accepted> {
        match self.call(&Call::Submit(request)).await? {
            Reply::Accepted(accepted) => Ok(accepted),
            other => unexpected(&other),
        }
    }

    /// The instances that a selector means.
    pub(super) async fn instances(&self, selector: Selector) -> anyhow::Result<Vec<InstanceView>> {
        match self.call(&Call::Instances { selector }).await? {
            Reply::Instances { instances, .. } => Ok(instances),
            other => unexpected(&other),
        }
    }

    /// All tenants.
    pub(super) async fn tenants(&self) -> anyhow::Result<Vec<TenantView>> {
        match self.call(&Call::Tenants { name: None }).await? {
            Reply::Tenants(tenants) => Ok(tenants),
            other => unexpected(&other),
        }
    }

    /// How the machine's network differs from the expected one.
    pub(super) async fn network_differences(&self) -> anyhow::Result<Vec<String>> {
        match self.call(&Call::NetVerify).await? {
            Reply::Verify(verify) => Ok(verify.differences),
            other => unexpected(&other),
        }
    }

    /// Follows instances.
    pub(super) async fn watch(&self, instances: Vec<InstancePath>) -> anyhow::Result<Watch> {
        let call = Call::Watch {
            instances,
            pools: Vec::new(),
            tenant: None,
            disks: vec![],
            changes: false,
        };
        Ok(Watch(self.start(&call).await?))
    }

    /// Has a pool's image built, and waits for it.
    pub(super) async fn build(&self, path: &PoolPath) -> anyhow::Result<()> {
        let accepted = self.submit(Request::PoolBuild { path: path.clone() }).await?;
        self.built(path, accepted).await
    }

    /// Gives a pool another image, and waits for the build.
    pub(super) async fn update(&self, path: &PoolPath, image: ImageSpec) -> anyhow::Result<()> {
        let request = Request::PoolUpdate {
            path: path.clone(),
            image: Some(image),
            settings: Settings::default(),
        };
        let accepted = self.submit(request).await?;
        self.built(path, accepted).await
    }

    async fn built(&self, path: &PoolPath, accepted: Accepted) -> anyhow::Result<()> {
        let Some(target) = accepted.pools.first() else { bail!("no pool was to be built") };
        let pools = vec![path.clone()];
        let call = Call::Watch {
            instances: Vec::new(),
            pools,
            tenant: None,
            disks: vec![],
            changes: false,
        };
        let mut watch = Watch(self.start(&call).await?);
        loop {
            let Reply::Snapshot { pools, .. } = watch.next_reply().await? else { continue };
            let pool = pools.first().context("the pool is gone")?;
            match &pool.build {
                BuildState::Failed { error, .. } => bail!("cannot build {path}: {error}"),
                _ if pool.build_generation >= target.build_generation => return Ok(()),
                _ => {}
            }
        }
    }

    /// Makes instances, stopped.
    pub(super) async fn create(
        &self,
        pool: &PoolPath,
        count: u32,
    ) -> anyhow::Result<Vec<InstancePath>> {
        let request = Request::InstanceCreate {
            pool: pool.clone(),
            count,
            start: false,
            disks: vec![],
            cold: false,
        };
        let accepted = self.submit(request).await?;
        Ok(accepted.instances.into_iter().map(|target| target.path).collect())
    }

    /// Removes instances, running or not, and waits until they are gone.
    pub(super) async fn destroy(
        &self,
        selector: Selector,
        instances: &[InstancePath],
    ) -> anyhow::Result<()> {
        let request = Request::InstanceDestroy { selector, all: true, force: true };
        self.submit(request).await?;
        let mut watch = self.watch(instances.to_vec()).await?;
        while !watch.next().await?.is_empty() {}
        Ok(())
    }

    /// Removes a tenant with everything that it has, and waits until it is gone.
    pub(super) async fn destroy_tenant(&self, name: &TenantName) -> anyhow::Result<()> {
        self.submit(Request::TenantDestroy { name: name.clone(), force: true }).await?;
        let tenant = Some(name.clone());
        let call = Call::Watch {
            instances: Vec::new(),
            pools: Vec::new(),
            tenant,
            disks: vec![],
            changes: false,
        };
        let mut watch = Watch(self.start(&call).await?);
        while !matches!(watch.next_reply().await?, Reply::Snapshot { tenant_exists: false, .. }) {}
        Ok(())
    }

    /// Runs the first program in an instance that is ready, to its end; the moment at which it was
    /// known to have started.
    pub(super) async fn exec(&self, instance: &InstancePath) -> anyhow::Result<Instant> {
        self.run(instance, first_program()).await
    }

    /// The same with any program that succeeds.
    pub(super) async fn run(
        &self,
        instance: &InstancePath,
        request: ExecRequest,
    ) -> anyhow::Result<Instant> {
        let call = Call::Exec { selector: only(instance), request };
        let mut connection = self.start(&call).await?;
        let mut started = None;
        loop {
            let item = connection.read.next().await?.context("the agent hung up in an exec")?;
            let Item::Message(_) = item else { continue };
            match accepted(item.parse()?)? {
                Reply::ExecStarted { .. } => started = Some(Instant::now()),
                Reply::ExecExit(ExitStatus::Exited { code: 0 }) => {
                    return started.context("a program ended that had not started");
                }
                other => return unexpected(&other),
            }
        }
    }
}

/// What happens to instances.
pub(super) struct Watch(Connection);

impl Watch {
    async fn next_reply(&mut self) -> anyhow::Result<Reply> {
        accepted(self.0.read.message().await?)
    }

    /// The instances that exist: now at first, then after each change.
    pub(super) async fn next(&mut self) -> anyhow::Result<Vec<InstanceView>> {
        match self.next_reply().await? {
            Reply::Snapshot { instances, .. } => Ok(instances),
            other => unexpected(&other),
        }
    }
}

/// The selector of one instance.
pub(super) fn only(instance: &InstancePath) -> Selector {
    Selector::Id { pool: Some(instance.pool.clone()), prefix: instance.id.to_string() }
}

/// Refuses an instance that will not get to run.
pub(super) fn check(view: &InstanceView) -> anyhow::Result<()> {
    match (view.state, &view.last_death) {
        (State::Failed, death) => bail!("{} failed: {death:?}", view.path),
        (_, Some(death)) => bail!("{} died: {death:?}", view.path),
        _ => Ok(()),
    }
}

/// The reply of a call that did not fail.
pub(super) fn accepted(reply: Reply) -> anyhow::Result<Reply> {
    match reply {
        Reply::Error(error) => Err(error.into()),
        reply => Ok(reply),
    }
}

fn unexpected<T>(reply: &Reply) -> anyhow::Result<T> {
    bail!("the agent answered with {reply:?}")
}
