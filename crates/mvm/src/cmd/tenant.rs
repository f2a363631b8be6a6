//! `mvm tenant`.

use clap::{Args, Subcommand};
use ipnet::Ipv4Net;
use mvm_core::admit::Request;
use mvm_core::name::TenantName;
use mvm_core::spec::Quota;

use crate::cli::Context;
use crate::client::only;
use crate::error::Result;
use crate::output::tenants;
use crate::request::{WaitArgs, carry_out};
use crate::units::{self, Mib};
use crate::wait::Goal;

/// Work with tenants: each has its own network and limits.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm tenant create demo --vcpus 8 --mem 4G
  mvm tenant list")]
pub(crate) struct Tenant {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(Create),
    List(List),
    Info(Info),
    Update(Update),
    Destroy(Destroy),
}

/// Limits of a tenant.
#[derive(Debug, Args)]
struct QuotaArgs {
    /// Most virtual CPUs of instances that run.
    #[arg(long, value_name = "COUNT")]
    vcpus: Option<u64>,
    /// Most guest memory of instances that run, such as 4096 (MiB) or 4G.
    #[arg(long, value_name = "SIZE")]
    mem: Option<Mib>,
    /// Most disk of all instances, such as 20480 (MiB) or 20G.
    #[arg(long, value_name = "SIZE")]
    disk: Option<Mib>,
    /// Most instances that run.
    #[arg(long, value_name = "COUNT")]
    running: Option<u64>,
    /// Most pools.
    #[arg(long, value_name = "COUNT")]
    pools: Option<u64>,
    /// Most instances of any one pool.
    #[arg(long, value_name = "COUNT")]
    instances_per_pool: Option<u64>,
}

impl From<QuotaArgs> for Quota {
    fn from(args: QuotaArgs) -> Self {
        let QuotaArgs { vcpus, mem, disk, running, pools, instances_per_pool } = args;
        Self {
            vcpus,
            mem_mib: mem.map(|size| size.0),
            disk_mib: disk.map(|size| size.0),
            running,
            pools,
            instances_per_pool,
        }
    }
}

/// Make a tenant.
///
/// A limit that is not given means that only the node's capacity limits.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm tenant create demo
  mvm tenant create demo --vcpus 8 --mem 4G --disk 20G --running 10
  mvm tenant create demo --subnet 10.240.7.0/24")]
struct Create {
    /// The tenant's name: lower-case letters, digits and `-`.
    name: TenantName,
    #[command(flatten)]
    quota: QuotaArgs,
    /// The tenant's subnet; chosen if absent.
    #[arg(long, value_name = "CIDR", value_parser = units::subnet)]
    subnet: Option<Ipv4Net>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// List tenants with what they have reserved of their limits.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm tenant list
  mvm tenant list -o json")]
struct List {}

/// Show one tenant in full.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm tenant info demo")]
struct Info {
    /// The tenant's name.
    name: TenantName,
}

/// Change a tenant's limits or its subnet.
///
/// Limits that are not named stay. A limit below what is in use ends nothing: it only refuses
/// more. The subnet changes only while none of the tenant's instances runs; their addresses keep
/// their place in it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm tenant update demo --mem 8G
  mvm tenant update demo --lift running --lift disk
  mvm tenant update demo --subnet 10.77.0.0/24")]
struct Update {
    /// The tenant's name.
    name: TenantName,
    #[command(flatten)]
    quota: QuotaArgs,
    /// Lift a limit, by its option's name; may be repeated.
    #[arg(long, value_name = "NAME", value_parser = Quota::NAMES)]
    lift: Vec<String>,
    /// Another subnet.
    #[arg(long, value_name = "CIDR", value_parser = units::subnet)]
    subnet: Option<Ipv4Net>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Remove a tenant with its network.
///
/// A tenant that still has pools is refused, unless --force removes them first with all their
/// instances and disks.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm tenant destroy demo
  mvm tenant destroy demo --force")]
struct Destroy {
    /// The tenant's name.
    name: TenantName,
    /// Remove its pools and instances too, running ones included.
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Tenant {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        match self.verb {
            Verb::Create(Create { name, quota, subnet, wait }) => {
                let request =
                    Request::TenantCreate { name: name.clone(), quota: quota.into(), subnet };
                let outcome = carry_out(context, request, Goal::Settled, &wait).await?;
                outcome.print_name(context, name)
            }
            Verb::Update(Update { name, quota, lift, subnet, wait }) => {
                if let Some(subnet) = subnet {
                    let request = Request::TenantMove { name: name.clone(), subnet };
                    carry_out(context, request, Goal::Settled, &wait).await?;
                }
                let request =
                    Request::TenantUpdate { name: name.clone(), quota: quota.into(), lift };
                let outcome = carry_out(context, request, Goal::Settled, &wait).await?;
                outcome.print_name(context, name)
            }
            Verb::Destroy(Destroy { name, force, wait }) => {
                let request = Request::TenantDestroy { name: name.clone(), force };
                let goal = Goal::Gone { tenant: Some(name.clone()) };
                let outcome = carry_out(context, request, goal, &wait).await?;
                outcome.print_name(context, name)
            }
            Verb::List(List {}) => {
                let views = context.client.tenants(None).await?;
                context.ui.data(&views, || tenants::tenant_list(&views))?;
                if views.is_empty() {
                    context.ui.remark("there are no tenants: `mvm tenant create NAME` makes one");
                }
                Ok(())
            }
            Verb::Info(Info { name }) => {
                let view = only(context.client.tenants(Some(name)).await?)?;
                context.ui.data(&view, || tenants::tenant_info(&view))
            }
        }
    }
}
