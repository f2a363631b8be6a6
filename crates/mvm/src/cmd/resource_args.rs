//! The options that say what each instance is given, of every verb that makes a pool.

use clap::Args;
use mvm_core::disk::DiskMount;
use mvm_core::publish::Publish;
use mvm_core::rates::Rates;
use mvm_core::spec::{NetMode, PoolSpec};
use mvm_core::vmm::VmmKind;

use super::settings_args::SettingsArgs;
use crate::units::{Mbits, Mib, Seconds};

/// What each instance of a pool is given of the machine.
#[derive(Debug, Args)]
pub(crate) struct ResourceArgs {
    /// Virtual CPUs of each instance.
    #[arg(long, alias = "cpus", value_name = "COUNT")]
    #[arg(default_value_t = PoolSpec::default().vcpus)]
    vcpus: u32,
    /// Guest memory of each instance, such as 256 (MiB) or 2G.
    #[arg(short, long, alias = "memory", value_name = "SIZE")]
    #[arg(default_value_t = Mib(PoolSpec::default().mem_mib.into()))]
    mem: Mib,
    /// Writable layer of each instance; it costs what is written.
    #[arg(long, value_name = "SIZE", default_value_t = Mib(PoolSpec::default().disk_mib.into()))]
    disk: Mib,
    /// Whether instances have a network: tenant or none.
    #[arg(long, value_name = "NET", default_value_t = PoolSpec::default().net)]
    net: NetMode,
    /// How long a guest has from launch until it answers.
    #[arg(long, value_name = "SECONDS")]
    #[arg(default_value_t = Seconds(PoolSpec::default().boot_timeout_s.into()))]
    boot_timeout: Seconds,
    /// Give each instance a data disk of the tenant, mounted on PATH; with :ro it is only read.
    #[arg(short = 'v', long, alias = "volume", value_name = "NAME:/PATH[:ro]")]
    disk_attach: Vec<DiskMount>,
    /// Listen on a port of this machine and carry its connections to a port of the guests, such as
    /// 8080:80 (for this machine alone) or 0.0.0.0:8080:80. An instance that sleeps is woken. The
    /// program may listen on any address of the guest, and sees connections from the guest's own one.
    #[arg(short, long, value_name = "[ADDRESS:]PORT:GUEST-PORT")]
    publish: Vec<Publish>,
    /// What each instance may send, and what it may receive, in Mbit/s each, such as 100 or 1G.
    #[arg(long, value_name = "MBIT")]
    net_rate: Option<Mbits>,
    /// What each instance may read and write per second on each of its disks, such as 50M.
    #[arg(long, value_name = "SIZE")]
    disk_rate: Option<Mib>,
    /// How many requests per second each instance may make to each of its disks.
    #[arg(long, value_name = "COUNT")]
    disk_ops: Option<u32>,
    /// The VMM that instances run on, firecracker or qemu, whatever the node's is.
    #[arg(long, value_name = "VMM")]
    on: Option<VmmKind>,
    #[command(flatten)]
    settings: SettingsArgs,
}

impl ResourceArgs {
    /// A pool's spec with these resources, and all else as it is by default.
    pub(crate) fn into_spec(self) -> PoolSpec {
        let Self { vcpus, mem, disk, net, boot_timeout, disk_attach, publish, .. } = self;
        let rates = Rates {
            net_mbit_s: self.net_rate.map(|Mbits(mbit)| mbit),
            disk_mib_s: self.disk_rate.map(Mib::saturating_u32),
            disk_ops_s: self.disk_ops,
        };
        PoolSpec {
            vcpus,
            mem_mib: mem.saturating_u32(),
            disk_mib: disk.saturating_u32(),
            net,
            boot_timeout_s: boot_timeout.saturating_u32(),
            vmm: self.on,
            rates,
            disks: disk_attach,
            publish,
            settings: self.settings.into_settings(),
            ..PoolSpec::default()
        }
    }
}
