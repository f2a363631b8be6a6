//! `mvm pool`.

use clap::{Args, Subcommand};
use mvm_core::admit::Request;
use mvm_core::name::{PoolPath, TenantName};
use mvm_core::sleep_policy::SleepPolicy;
use mvm_core::spec::{PoolSpec, RestartPolicy};

use super::policy::{Policy, PolicyArgs};
use super::process_args::ProcessArgs;
use super::resource_args::ResourceArgs;
use super::settings_args::SettingsArgs;
use super::spec_check;
use crate::cli::Context;
use crate::client::only;
use crate::error::Result;
use crate::image_source::ImageArgs;
use crate::output::tenants;
use crate::request::{WaitArgs, carry_out};
use crate::wait::Goal;

/// Work with pools: groups of like instances.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm pool create demo/hello --mem 256M
  mvm pool scale demo/hello --running 3")]
pub(crate) struct Pool {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(Box<Create>),
    List(List),
    Info(Info),
    Build(Build),
    Update(Update),
    Rollback(Rollback),
    WarmUp(WarmUp),
    Policy(Policy),
    Scale(Scale),
    Destroy(Destroy),
}

/// Make a pool, without instances.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm pool create demo/hello
  mvm pool create demo/web --image nginx:1.27
  mvm pool create demo/box --debian bookworm --packages curl,openssh-server
  docker save app | mvm pool create demo/app --image docker-archive:-
  mvm pool create demo/worker --vcpus 2 --mem 1G --disk 10G --net none --restart always
  mvm pool create demo/web -e PORT=8080 -u nobody -- httpd -f -p 8080
  mvm pool create demo/www --publish 8080:80 --sleep-after 10m --image nginx:1.27
  mvm pool create demo/guest --net-rate 100 --disk-rate 50M --on firecracker
  mvm pool create demo/db --disk-attach data:/var/lib/db --disk-attach shared:/mnt:ro")]
struct Create {
    /// The pool, as TENANT/POOL, or POOL of the tenant `default`.
    #[arg(value_parser = PoolPath::typed)]
    path: PoolPath,
    #[command(flatten)]
    spec: SpecArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    process: ProcessArgs,
    #[command(flatten)]
    wait: WaitArgs,
    /// The main process's command and arguments, instead of the image's.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// What every instance of the pool is like.
#[derive(Debug, Args)]
struct SpecArgs {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    resources: ResourceArgs,
    /// What happens when an instance ends by itself: always, on-failure or never.
    #[arg(long, value_name = "POLICY", default_value_t = PoolSpec::default().restart)]
    restart: RestartPolicy,
}

impl SpecArgs {
    async fn into_spec(self, context: &Context) -> Result<PoolSpec> {
        let SpecArgs { image, resources, restart } = self;
        let image = image.into_image(context).await?.unwrap_or_default();
        Ok(PoolSpec { image, restart, ..resources.into_spec() })
    }
}

/// List pools.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm pool list
  mvm pool list demo -o json")]
struct List {
    /// Only this tenant's.
    tenant: Option<TenantName>,
}

/// Show one pool in full.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm pool info demo/hello")]
struct Info {
    /// The pool, as TENANT/POOL, or POOL of the tenant `default`.
    #[arg(value_parser = PoolPath::typed)]
    path: PoolPath,
}

/// Build a pool's image, or find it built.
///
/// An image is built by itself before the first instance starts. Instances that exist keep the
/// image that they were first started with; new ones get the new one.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm pool build demo/hello")]
struct Build {
    /// The pool, as TENANT/POOL, or POOL of the tenant `default`.
    #[arg(value_parser = PoolPath::typed)]
    path: PoolPath,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Give new instances of a pool what its image is now, or another image.
///
/// A tag of a registry is looked up again. Settings of the guest's kernel are added to those that the
/// pool has. Instances that exist keep the image that they were first started with, and their
/// settings: `mvm pool info` counts them and says how to renew them. `mvm pool rollback` goes back to
/// an earlier image.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm pool update demo/web
  mvm pool update demo/web --image nginx:1.28
  mvm pool update demo/web --sysctl net.core.somaxconn=4096")]
struct Update {
    /// The pool, as TENANT/POOL, or POOL of the tenant `default`.
    #[arg(value_parser = PoolPath::typed)]
    path: PoolPath,
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Give new instances of a pool the image that it had before the present one.
///
/// Done again, it goes back one more, up to five. Instances that exist stay as they are. The next
/// update or build goes forward.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm pool rollback demo/web")]
struct Rollback {
    /// The pool, as TENANT/POOL, or POOL of the tenant `default`.
    #[arg(value_parser = PoolPath::typed)]
    path: PoolPath,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Make the base snapshot that new instances of a pool begin with, or make it anew.
///
/// An instance is booted for it, saved and destroyed. From then on new instances go on from there
/// instead of booting, with an identity of their own, and share its memory until they write to it.
/// The first one after a minute without any takes longer, as it reads the memory in. They boot again once the pool's image or spec changes, until the next
/// warm-up; `mvm pool info` tells. `mvm instance create --cold` boots.
///
/// With --ready, some new instances are made ahead of time and stand by with their vCPUs stopped: a request
/// for a new instance takes one of them at once, and another takes its place. They take memory and
/// processors of the tenant's quota like warm ones. When the machine runs short of memory, none
/// stand by.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm pool warm-up demo/hello
  mvm pool warm-up demo/hello --ready 3
  mvm pool warm-up demo/hello --ready 0")]
struct WarmUp {
    /// The pool, as TENANT/POOL, or POOL of the tenant `default`.
    #[arg(value_parser = PoolPath::typed)]
    path: PoolPath,
    /// How many new instances stand by from now on; as many as before if absent. A base that still
    /// fits is kept then, and 0 needs none.
    #[arg(long, value_name = "COUNT")]
    ready: Option<u32>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Set how many instances of a pool run.
///
/// Stopped instances are started before new ones are made, and the newest are stopped first.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm pool scale demo/hello --running 3
  mvm pool scale demo/hello --running 0")]
struct Scale {
    /// The pool, as TENANT/POOL, or POOL of the tenant `default`.
    #[arg(value_parser = PoolPath::typed)]
    path: PoolPath,
    /// How many.
    #[arg(long, value_name = "COUNT")]
    running: u32,
    /// How many stand by with their vCPUs stopped; those that do stay so if absent.
    #[arg(long, value_name = "N")]
    warm: Option<u32>,
    /// How many sleep; those that do, and are not needed to run, stay so if absent.
    #[arg(long, value_name = "N")]
    sleeping: Option<u32>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Remove a pool and its instances.
///
/// A pool with running instances is refused, unless --force stops them first. What was on the
/// instances' disks is lost.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm pool destroy demo/hello
  mvm pool destroy demo/hello --force")]
struct Destroy {
    /// The pool, as TENANT/POOL, or POOL of the tenant `default`.
    #[arg(value_parser = PoolPath::typed)]
    path: PoolPath,
    /// Stop running instances first.
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Pool {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let (request, goal, path, wait) = match self.verb {
            Verb::List(List { tenant }) => {
                let views = context.client.pools(tenant, None).await?;
                context.ui.data(&views, || tenants::pool_list(&views))?;
                if views.is_empty() {
                    context
                        .ui
                        .remark("there are no pools: `mvm pool create TENANT/POOL` makes one");
                }
                return Ok(());
            }
            Verb::Info(Info { path }) => {
                let view = only(context.client.pools(None, Some(path)).await?)?;
                return context.ui.data(&view, || tenants::pool_info(&view));
            }
            Verb::WarmUp(WarmUp { path, ready, wait }) => {
                if let Some(ready) = ready {
                    let request = Request::PoolReady { path: path.clone(), ready };
                    context.client.submit(request).await?;
                    let view = only(context.client.pools(None, Some(path.clone())).await?)?;
                    let has_base = view.base.as_ref().is_some_and(|base| base.in_use);
                    if has_base || ready == 0 {
                        if has_base {
                            context.ui.remark(&format!(
                                "its base still fits and is kept: `mvm pool warm-up {path}` makes another"
                            ));
                        }
                        return context.ui.data(&view, || view.path.to_string());
                    }
                }
                let request = Request::PoolWarmUp { path: path.clone() };
                carry_out(context, request, Goal::WarmedUp, &wait).await?;
                let view = only(context.client.pools(None, Some(path)).await?)?;
                return context.ui.data(&view, || view.path.to_string());
            }
            Verb::Policy(policy) => return policy.run(context).await,
            Verb::Scale(Scale { path, running, warm, sleeping, wait }) => {
                let request = Request::PoolScale { path, running, warm, sleeping };
                let outcome = carry_out(context, request, Goal::Settled, &wait).await?;
                return outcome.print_instances(context);
            }
            Verb::Create(create) => {
                let Create { path, spec, policy, process, wait, command } = *create;
                let sleep_policy = policy.change(SleepPolicy::default());
                let process = process.into_spec(command);
                let spec = PoolSpec { process, sleep_policy, ..spec.into_spec(context).await? };
                spec_check::check(&spec)?;
                let request = Request::PoolCreate { path: path.clone(), spec: spec.into() };
                (request, Goal::Settled, path, wait)
            }
            Verb::Build(Build { path, wait }) => {
                (Request::PoolBuild { path: path.clone() }, Goal::Built, path, wait)
            }
            Verb::Update(Update { path, image, settings, wait }) => {
                let image = image.into_image(context).await?;
                let settings = settings.into_settings();
                let request = Request::PoolUpdate { path: path.clone(), image, settings };
                (request, Goal::Built, path, wait)
            }
            Verb::Rollback(Rollback { path, wait }) => {
                (Request::PoolRollback { path: path.clone() }, Goal::Built, path, wait)
            }
            Verb::Destroy(Destroy { path, force, wait }) => {
                let request = Request::PoolDestroy { path: path.clone(), force };
                (request, Goal::Gone { tenant: None }, path, wait)
            }
        };
        carry_out(context, request, goal, &wait).await?.print_name(context, path)
    }
}
