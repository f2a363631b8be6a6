//! `mvm disk`.

use clap::{Args, Subcommand};
use mvm_core::admit::Request;
use mvm_core::name::{DiskPath, TenantName};

use crate::cli::Context;
use crate::client::only;
use crate::error::Result;
use crate::output::disks;
use crate::request::{WaitArgs, carry_out};
use crate::units::Mib;
use crate::wait::Goal;

/// Work with data disks: they outlive the instances that have them.
///
/// A disk belongs to a tenant. A pool or an instance gets it by name (`--disk-attach NAME:/PATH`,
/// or `disks` in a document), and the guest has it mounted before it is ready. One running instance
/// may write a disk, or any number may read it (`NAME:/PATH:ro`).
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm disk create demo/data --size 10G
  mvm instance create demo/hello --start --disk-attach data:/srv/data
  mvm disk list")]
pub(crate) struct Disk {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(Create),
    List(List),
    Info(Info),
    Resize(Resize),
    Rm(Rm),
}

/// Make a data disk with an empty ext4 file system.
///
/// It is sparse: it takes on this machine what is written to it. The tenant's disk quota counts its
/// full size.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm disk create demo/data --size 10G")]
struct Create {
    /// The disk, as TENANT/NAME, or NAME of the tenant `default`.
    #[arg(value_parser = DiskPath::typed)]
    path: DiskPath,
    /// Its size, such as 512M or 10G.
    #[arg(long, value_name = "SIZE")]
    size: Mib,
    #[command(flatten)]
    wait: WaitArgs,
}

/// List data disks.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm disk list
  mvm disk list demo -o json")]
struct List {
    /// Only this tenant's.
    tenant: Option<TenantName>,
}

/// Show one data disk in full, with everything that has it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm disk info demo/data")]
struct Info {
    /// The disk, as TENANT/NAME, or NAME of the tenant `default`.
    #[arg(value_parser = DiskPath::typed)]
    path: DiskPath,
}

/// Grow a data disk while no instance runs with it.
///
/// The guest that mounts it for writing next grows the file system. A disk does not shrink.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm disk resize demo/data --size 20G")]
struct Resize {
    /// The disk, as TENANT/NAME, or NAME of the tenant `default`.
    #[arg(value_parser = DiskPath::typed)]
    path: DiskPath,
    /// Its new size, such as 20G.
    #[arg(long, value_name = "SIZE")]
    size: Mib,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Remove a data disk and what is on it.
///
/// A disk that a pool or an instance has, running or not, is refused.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm disk rm demo/data")]
struct Rm {
    /// The disk, as TENANT/NAME, or NAME of the tenant `default`.
    #[arg(value_parser = DiskPath::typed)]
    path: DiskPath,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Disk {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let (request, goal, path, wait) = match self.verb {
            Verb::List(List { tenant }) => {
                let views = context.client.disks(tenant, None).await?;
                context.ui.data(&views, || disks::list(&views))?;
                if views.is_empty() {
                    let hint = "there are no data disks: `mvm disk create TENANT/NAME --size 1G` makes one";
                    context.ui.remark(hint);
                }
                return Ok(());
            }
            Verb::Info(Info { path }) => {
                let view = only(context.client.disks(None, Some(path)).await?)?;
                return context.ui.data(&view, || disks::info(&view));
            }
            Verb::Create(Create { path, size, wait }) => {
                let request = Request::DiskCreate { path: path.clone(), size_mib: size.0 };
                (request, Goal::Settled, path, wait)
            }
            Verb::Resize(Resize { path, size, wait }) => {
                let request = Request::DiskResize { path: path.clone(), size_mib: size.0 };
                (request, Goal::Settled, path, wait)
            }
            Verb::Rm(Rm { path, wait }) => {
                let request = Request::DiskRemove { path: path.clone() };
                (request, Goal::Gone { tenant: None }, path, wait)
            }
        };
        carry_out(context, request, goal, &wait).await?.print_name(context, path)
    }
}
