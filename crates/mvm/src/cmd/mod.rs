//! One file per verb or noun; the doc comment of its arguments is its manual.

pub(crate) mod agent;
pub(crate) mod attach;
pub(crate) mod bootstrap;
pub(crate) mod completions;
pub(crate) mod cp;
pub(crate) mod create;
pub(crate) mod destroy;
pub(crate) mod disk;
pub(crate) mod doctor;
pub(crate) mod down;
pub(crate) mod exec;
pub(crate) mod fork;
pub(crate) mod forward;
pub(crate) mod image;
pub(crate) mod info;
pub(crate) mod instance;
pub(crate) mod kill;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod man;
pub(crate) mod net;
pub(crate) mod node;
pub(crate) mod policy;
pub(crate) mod pool;
pub(crate) mod process_args;
pub(crate) mod record;
pub(crate) mod resource_args;
pub(crate) mod rest;
pub(crate) mod restart;
pub(crate) mod run;
mod settings_args;
pub(crate) mod spec_check;
pub(crate) mod ssh;
pub(crate) mod ssh_config;
pub(crate) mod start;
pub(crate) mod stats;
pub(crate) mod stop;
pub(crate) mod tenant;
pub(crate) mod up;
pub(crate) mod version;
pub(crate) mod why;

use clap::Args;
use mvm_core::admit::{DEFAULT_GRACE_MS, Request};
use mvm_core::name::Selector;

use crate::cli::Context;
use crate::error::Result;
use crate::request::{self, WaitArgs};
use crate::units::Seconds;
use crate::wait::Goal;

/// Which instances a verb means.
#[derive(Debug, Args)]
pub(crate) struct Selection {
    /// TENANT/POOL/INSTANCE, a prefix of an id, TENANT/POOL, TENANT, or POOL of the tenant
    /// `default`; several may be named.
    #[arg(required_unless_present = "all", value_name = "SELECTOR")]
    selectors: Vec<Selector>,
    /// Allow each SELECTOR to mean several instances; without one, every instance of the node.
    #[arg(long)]
    all: bool,
}

impl Selection {
    /// Asks `request` of each selector, waits until all that were accepted are where they are to
    /// be, and prints their paths. One that is refused does not keep the others from being done.
    async fn carry_out(
        self,
        context: &Context,
        goal: Goal,
        wait: &WaitArgs,
        request: impl Fn(Selector, bool) -> Request,
    ) -> Result<()> {
        let Self { mut selectors, all } = self;
        if selectors.is_empty() {
            selectors.push(Selector::All);
        }
        let mut requests: Vec<Request> = Vec::new();
        for request in selectors.into_iter().map(|selector| request(selector, all)) {
            if !requests.contains(&request) {
                requests.push(request);
            }
        }
        let (submitted, refused) = request::submit_each(context, requests).await?;
        if let Some(submitted) = submitted {
            request::finish(context, submitted, &goal, wait).await?.print_instances(context)?;
        }
        refused.map_or(Ok(()), Err)
    }
}

/// How long a guest has to shut down.
#[derive(Debug, Args)]
pub(crate) struct GraceArgs {
    /// How long the guest has to shut down before it is ended by force.
    #[arg(short = 't', long, alias = "time", value_name = "SECONDS")]
    #[arg(default_value_t = Seconds(DEFAULT_GRACE_MS / 1000))]
    grace: Seconds,
    /// End it at once, like --grace 0.
    #[arg(long, conflicts_with = "grace")]
    force: bool,
}

impl GraceArgs {
    fn as_millis(&self) -> u64 {
        if self.force { 0 } else { self.grace.as_millis() }
    }
}
