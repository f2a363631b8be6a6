//! The common path of every verb that changes something: submit, wait, and print what came of it.

use clap::Args;
use mvm_core::admit::Request;
use mvm_core::name::Selector;
use mvm_wire::view::{DiskView, InstanceView, PoolView};
use mvm_wire::{Accepted, InstanceTarget, Reply};
use serde::Serialize;

use crate::cli::Context;
use crate::client::unexpected;
use crate::error::{Error, Result};
use crate::units::Seconds;
use crate::wait::{self, Goal, Snapshot};

/// How long is waited unless told otherwise.
pub(crate) const DEFAULT_TIMEOUT: Seconds = Seconds(900);

/// Whether a verb waits until what it asks for is there.
#[derive(Debug, Clone, Args)]
pub(crate) struct WaitArgs {
    /// Wait until it is done (the default).
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Return as soon as the request is recorded.
    #[arg(long, overrides_with = "wait")]
    no_wait: bool,
    /// How long to wait; the request goes on after that.
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_TIMEOUT)]
    timeout: Seconds,
}

impl Default for WaitArgs {
    fn default() -> Self {
        Self { wait: true, no_wait: false, timeout: DEFAULT_TIMEOUT }
    }
}

impl WaitArgs {
    /// Those of a request that is done once it is recorded.
    pub(crate) fn none() -> Self {
        Self { no_wait: true, wait: false, timeout: DEFAULT_TIMEOUT }
    }

    fn waits(&self) -> bool {
        self.wait || !self.no_wait
    }
}

/// A request that the agent has accepted.
pub(crate) struct Submitted {
    accepted: Accepted,
    at_unix_ms: u64,
}

/// What came of a request: what `-o json|yaml` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    /// The store's revision with the wish in it.
    pub(crate) revision: u64,
    /// Whether it was waited for.
    pub(crate) waited: bool,
    /// What the agent had to say.
    pub(crate) notes: Vec<String>,
    /// The instances that the request concerns.
    pub(crate) concerns: Concerns,
    /// Those of them that exist now.
    pub(crate) instances: Vec<InstanceView>,
    /// The pools that the request concerns, as far as they exist now.
    pub(crate) pools: Vec<PoolView>,
    /// The data disks that the request concerns, as far as they exist now.
    pub(crate) disks: Vec<DiskView>,
}

/// The paths of what a request concerns.
#[derive(Debug, Serialize)]
pub(crate) struct Concerns {
    /// Instances.
    pub(crate) instances: Vec<String>,
    /// Pools.
    pub(crate) pools: Vec<String>,
    /// Data disks.
    pub(crate) disks: Vec<String>,
}

/// Submits a request and says what the agent has to say.
pub(crate) async fn submit(context: &Context, request: Request) -> Result<Submitted> {
    let at_unix_ms = wait::now_unix_ms();
    let accepted = context.client.submit(request).await?;
    for note in &accepted.notes {
        context.ui.remark(note);
    }
    Ok(Submitted { accepted, at_unix_ms })
}

/// Submits several requests as one. A single one that is refused is the error; of several, each
/// refusal is said at once, and the second value is what the command is to end with.
pub(crate) async fn submit_each(
    context: &Context,
    requests: Vec<Request>,
) -> Result<(Option<Submitted>, Option<Error>)> {
    let total = requests.len();
    let (mut all, mut refusals) = (None::<Submitted>, Vec::new());
    for request in requests {
        match submit(context, request).await {
            Ok(submitted) => match &mut all {
                None => all = Some(submitted),
                Some(all) => all.add(submitted),
            },
            Err(error @ Error::Api(_)) if total > 1 => {
                context.ui.error(&error);
                refusals.push(error.exit_code());
            }
            Err(error) => return Err(error),
        }
    }
    let count = refusals.len();
    let refused = refusals.first().map(|&code| Error::SomeRefused { count, total, code });
    Ok((all, refused))
}

impl Submitted {
    fn add(&mut self, other: Self) {
        let Accepted { revision, instances, pools, disks, notes } = other.accepted;
        let all = &mut self.accepted;
        all.revision = all.revision.max(revision);
        // What two selectors mean has the later wish.
        let renewed = |before: &InstanceTarget| instances.iter().any(|it| it.path == before.path);
        all.instances.retain(|before| !renewed(before));
        all.instances.extend(instances);
        all.pools.extend(pools);
        all.disks.extend(disks);
        all.notes.extend(notes);
    }
}

/// Waits for a request's goal, if asked to.
pub(crate) async fn finish(
    context: &Context,
    submitted: Submitted,
    goal: &Goal,
    args: &WaitArgs,
) -> Result<Outcome> {
    let Submitted { accepted, at_unix_ms } = submitted;
    let has_targets =
        !accepted.instances.is_empty() || !accepted.pools.is_empty() || !accepted.disks.is_empty();
    let snapshot = if !has_targets && goal.tenant().is_none() {
        Snapshot::default()
    } else if args.waits() {
        let request = wait::Request { accepted: &accepted, goal, submitted_unix_ms: at_unix_ms };
        let interrupt = async {
            // Without a handler, Ctrl-C ends the process as usual.
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let mut spinner = context.ui.spinner();
        wait::wait(&context.client, &request, args.timeout, interrupt, |line| spinner.show(line))
            .await?
    } else {
        look(context, &accepted).await?
    };
    let paths = |path: &dyn ToString| path.to_string();
    Ok(Outcome {
        revision: accepted.revision,
        waited: args.waits(),
        concerns: Concerns {
            instances: accepted.instances.iter().map(|target| paths(&target.path)).collect(),
            pools: accepted.pools.iter().map(|target| paths(&target.path)).collect(),
            disks: accepted.disks.iter().map(|target| paths(&target.path)).collect(),
        },
        notes: accepted.notes,
        instances: snapshot.instances.into_values().collect(),
        pools: snapshot.pools.into_values().collect(),
        disks: snapshot.disks.into_values().collect(),
    })
}

/// Submits a request and waits for it.
pub(crate) async fn carry_out(
    context: &Context,
    request: Request,
    goal: Goal,
    args: &WaitArgs,
) -> Result<Outcome> {
    let submitted = submit(context, request).await?;
    finish(context, submitted, &goal, args).await
}

/// Forks an instance, waits until the forks run as its arguments say, and returns what came of it.
pub(crate) async fn carry_out_fork(
    context: &Context,
    source: Selector,
    count: u32,
    args: &WaitArgs,
) -> Result<Outcome> {
    let at_unix_ms = wait::now_unix_ms();
    let accepted = context.client.fork(source, count).await?;
    finish(context, Submitted { accepted, at_unix_ms }, &Goal::Running, args).await
}

/// What is there right now.
async fn look(context: &Context, accepted: &Accepted) -> Result<Snapshot> {
    let mut connection = context.client.start(&wait::watch_call(accepted, None)).await?;
    match connection.read.message().await? {
        Reply::Snapshot { instances, pools, tenant_exists, disks } => {
            Ok(Snapshot::new(instances, pools, tenant_exists).with_disks(disks))
        }
        Reply::Error(error) => Err(error.into()),
        other => Err(unexpected(&other)),
    }
}

impl Outcome {
    /// Prints the paths of the instances that the request concerns.
    pub(crate) fn print_instances(&self, context: &Context) -> Result<()> {
        context.ui.data(self, || self.concerns.instances.join("\n"))
    }

    /// Prints the name of what the request concerns.
    pub(crate) fn print_name(&self, context: &Context, name: impl ToString) -> Result<()> {
        context.ui.data(self, || name.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_outcome_is_what_programs_get() {
        let text = include_str!("../../../docs/schema/outcome.json");
        let outcome = Outcome {
            revision: 12,
            waited: true,
            notes: vec!["pool demo/old is not in the document and stays as it is".to_owned()],
            concerns: Concerns {
                instances: vec!["demo/hello/i-0123abcd".to_owned()],
                pools: vec!["demo/hello".to_owned()],
                disks: vec!["demo/data".to_owned()],
            },
            instances: vec![],
            pools: vec![],
            disks: vec![],
        };
        let documented: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(&outcome).unwrap(), documented);
    }
}
