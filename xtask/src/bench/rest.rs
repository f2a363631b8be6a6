//! What the benchmarks of instances at rest share: one microVM that falls asleep and wakes.

use anyhow::{Context, ensure};
use mvm_core::admit::Request;
use mvm_core::lifecycle::State;
use mvm_core::name::InstancePath;
use mvm_core::record::DEFAULT_HOOKS_MS;
use mvm_wire::view::InstanceView;

use super::client::{Client, only};

/// Puts an instance to sleep, and waits until it sleeps.
pub(super) async fn fall_asleep(client: &Client, path: &InstancePath) -> anyhow::Result<()> {
    let request =
        Request::InstanceSleep { selector: only(path), all: false, hooks_ms: DEFAULT_HOOKS_MS };
    client.submit(request).await?;
    until(client, path, State::Sleeping).await.map(drop)
}

/// Starts or wakes an instance, and waits until it runs.
pub(super) async fn wake(client: &Client, path: &InstancePath) -> anyhow::Result<InstanceView> {
    client.submit(Request::InstanceStart { selector: only(path), all: false }).await?;
    let view = until(client, path, State::Running).await?;
    if let Some(cold) = &view.cold_boot {
        anyhow::bail!("{path} was booted instead of woken: {}", cold.reason);
    }
    Ok(view)
}

async fn until(client: &Client, path: &InstancePath, state: State) -> anyhow::Result<InstanceView> {
    let mut watch = client.watch(vec![path.clone()]).await?;
    loop {
        let view = watch.next().await?.pop().context("the instance is gone")?;
        ensure!(view.setback.is_none(), "{path}: {:?}", view.setback);
        if view.state == state && view.activity.is_none() {
            return Ok(view);
        }
    }
}
