//! `mvm pool policy`, `mvm instance pin` and `unpin`: when instances that nobody uses rest.

use std::str::FromStr;

use clap::Args;
use clap::builder::BoolishValueParser;
use mvm_core::admit::Request;
use mvm_core::name::PoolPath;
use mvm_core::sleep_policy::SleepPolicy;
use mvm_core::spec::PoolSpec;

use super::{Selection, spec_check};
use crate::cli::Context;
use crate::client::only;
use crate::error::Result;
use crate::output::policy;
use crate::request::WaitArgs;
use crate::units::{Seconds, UnitError};
use crate::wait::Goal;

/// After how long something happens: a time, or `never`.
#[derive(Debug, Clone, Copy)]
struct After(Option<Seconds>);

impl FromStr for After {
    type Err = UnitError;
    fn from_str(text: &str) -> std::result::Result<Self, UnitError> {
        match text {
            "never" => Ok(Self(None)),
            time => time.parse().map(|seconds| Self(Some(seconds))),
        }
    }
}

impl After {
    fn seconds(self) -> Option<u32> {
        self.0.map(Seconds::saturating_u32)
    }
}

/// When instances that nobody uses are put to rest.
#[derive(Debug, Args)]
pub(crate) struct PolicyArgs {
    /// Stop the vCPUs of an instance that nobody has used for this long, such as 5m, or never.
    #[arg(long, value_name = "TIME")]
    warm_after: Option<After>,
    /// Put an instance to sleep that nobody has used for this long, such as 30m, or never.
    #[arg(long, value_name = "TIME")]
    sleep_after: Option<After>,
    /// How long an instance runs at least after each start and wake [default: 30s].
    #[arg(long, value_name = "TIME")]
    min_running: Option<Seconds>,
    /// Leave the instances alone, also when the machine runs short of memory.
    #[arg(long, value_name = "yes|no", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "yes", value_parser = BoolishValueParser::new())]
    critical: Option<bool>,
    /// Compress what a sleeping instance has changed of its memory: less space, a longer wake.
    #[arg(long, value_name = "yes|no", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "yes", value_parser = BoolishValueParser::new())]
    compress: Option<bool>,
    /// Let an instance rest on when another instance of its tenant sends it a packet, which wakes it otherwise.
    #[arg(long, value_name = "yes|no", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "yes", value_parser = BoolishValueParser::new())]
    ignore_neighbours: Option<bool>,
}

impl PolicyArgs {
    /// Whether nothing was said.
    fn is_empty(&self) -> bool {
        let Self { warm_after, sleep_after, min_running, .. } = self;
        let times = [warm_after.is_some(), sleep_after.is_some(), min_running.is_some()];
        let switches = [self.critical, self.compress, self.ignore_neighbours];
        !times.contains(&true) && switches.iter().all(Option::is_none)
    }

    /// A policy in which what was not said is as it was.
    pub(crate) fn change(self, before: SleepPolicy) -> SleepPolicy {
        let Self { warm_after, sleep_after, min_running, .. } = self;
        SleepPolicy {
            warm_after_s: warm_after.map_or(before.warm_after_s, After::seconds),
            sleep_after_s: sleep_after.map_or(before.sleep_after_s, After::seconds),
            min_running_s: min_running.map_or(before.min_running_s, Seconds::saturating_u32),
            critical: self.critical.unwrap_or(before.critical),
            compress: self.compress.unwrap_or(before.compress),
            ignore_neighbours: self.ignore_neighbours.unwrap_or(before.ignore_neighbours),
        }
    }
}

/// Show or change when a pool's instances are put to rest by themselves.
///
/// An instance is in use while it computes, talks to others, runs an exec or has a connection open
/// (also to a published port), or while a program in the guest says so with the file /run/mvm/busy.
/// What rests goes on as soon as it is needed: `mvm exec`, `ssh`, `cp`, a connection to a published
/// port, a packet of another instance of its tenant (unless --ignore-neighbours). When the machine
/// runs short of memory, the instance of a pool with a time that was unused the longest goes to
/// sleep before its time. What is not said stays as it is; without options the policy is shown. `mvm instance pin` exempts one instance; `mvm stats` and `mvm why` tell what is
/// measured and was done.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm pool policy demo/web
  mvm pool policy demo/web --warm-after 5m --sleep-after 30m
  mvm pool policy demo/web --sleep-after never
  mvm pool policy demo/db --critical")]
pub(crate) struct Policy {
    /// The pool, as TENANT/POOL, or POOL of the tenant `default`.
    #[arg(value_parser = PoolPath::typed)]
    path: PoolPath,
    #[command(flatten)]
    policy: PolicyArgs,
}

impl Policy {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let Self { path, policy } = self;
        let pool = || async { only(context.client.pools(None, Some(path.clone())).await?) };
        if !policy.is_empty() {
            let spec = pool().await?.spec.into_known();
            let policy = policy.change(spec.sleep_policy.clone());
            spec_check::check(&PoolSpec { sleep_policy: policy.clone(), ..spec })?;
            let request = Request::PoolPolicy { path: path.clone(), policy };
            context.client.submit(request).await?;
        }
        let policy = pool().await?.spec.sleep_policy.clone();
        context.ui.data(&policy, || policy::line(&policy))
    }
}

/// Let instances run on, whatever their pools' sleep policies say.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm instance pin i-3f2a
  mvm instance pin demo/web --all")]
pub(crate) struct Pin {
    #[command(flatten)]
    selection: Selection,
}

/// Let pools' sleep policies put instances to rest again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm instance unpin i-3f2a")]
pub(crate) struct Unpin {
    #[command(flatten)]
    selection: Selection,
}

impl Pin {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        pin(context, self.selection, true).await
    }
}

impl Unpin {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        pin(context, self.selection, false).await
    }
}

async fn pin(context: &Context, selection: Selection, pinned: bool) -> Result<()> {
    let request = |selector, all| Request::InstancePin { selector, all, pinned };
    selection.carry_out(context, Goal::Settled, &WaitArgs::none(), request).await
}
