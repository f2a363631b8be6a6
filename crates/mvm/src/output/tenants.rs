//! Tenants and pools for people.

use std::collections::BTreeSet;

use mvm_core::admit::Usage;
use mvm_core::rates::Rates;
use mvm_core::record::BuildState;
use mvm_core::settings::Settings;
use mvm_core::spec::Quota;
use mvm_wire::view::{BaseView, PoolView, TenantView};

use super::images::{NO_HEALTHCHECK, volumes};
use super::table::{fields, or_dash, table};
use super::{node, policy};
use crate::units::{mib_text, utc_text};

/// A list of tenants: what is reserved, of what is allowed.
pub(crate) fn tenant_list(views: &[TenantView]) -> String {
    let header = ["TENANT", "SUBNET", "RUNNING", "VCPUS", "MEM", "DISK", "POOLS", "INSTANCES"];
    let row = |view: &TenantView| {
        let TenantView { quota, reserved, .. } = view;
        [
            format!("{}{}", view.name, removing(view.removing)),
            view.subnet.clone(),
            count(reserved.running, quota.running),
            count(reserved.vcpus, quota.vcpus),
            size(reserved.mem_mib, quota.mem_mib),
            size(reserved.disk_mib, quota.disk_mib),
            count(reserved.pools, quota.pools),
            reserved.instances.to_string(),
        ]
    };
    table(header, views.iter().map(row))
}

fn removing(is_removing: bool) -> &'static str {
    if is_removing { " (being removed)" } else { "" }
}

fn count(used: u64, allowed: Option<u64>) -> String {
    allowed.map_or_else(|| used.to_string(), |allowed| format!("{used}/{allowed}"))
}

fn size(used: u64, allowed: Option<u64>) -> String {
    let used = mib_text(used);
    allowed.map_or_else(|| used.clone(), |allowed| format!("{used} / {}", mib_text(allowed)))
}

/// One tenant in full.
pub(crate) fn tenant_info(view: &TenantView) -> String {
    let TenantView { quota, reserved, .. } = view;
    let mut rows = vec![
        ("tenant", format!("{}{}", view.name, removing(view.removing))),
        ("subnet", view.subnet.clone()),
        ("gateway", view.gateway.to_string()),
        ("bridge", view.bridge.clone()),
    ];
    rows.extend(reservations(reserved, quota));
    rows.push(("created", utc_text(view.created_unix_ms)));
    fields(rows)
}

fn reservations(used: &Usage, quota: &Quota) -> Vec<(&'static str, String)> {
    vec![
        ("running", count(used.running, quota.running)),
        ("vcpus", count(used.vcpus, quota.vcpus)),
        ("memory", size(used.mem_mib, quota.mem_mib)),
        ("disk", size(used.disk_mib, quota.disk_mib)),
        ("pools", count(used.pools, quota.pools)),
        ("instances", used.instances.to_string()),
        ("instances per pool", or_dash(quota.instances_per_pool.map(|n| format!("at most {n}")))),
    ]
}

/// A list of pools.
pub(crate) fn pool_list(views: &[PoolView]) -> String {
    let header = ["POOL", "IMAGE", "RUNNING", "INSTANCES", "VCPUS", "MEM", "REVISION", "BUILD"];
    let row = |view: &PoolView| {
        [
            format!("{}{}", view.path, removing(view.removing)),
            view.spec.image.to_string(),
            format!("{}/{}", view.running, view.desired_running),
            view.instances.to_string(),
            view.spec.vcpus.to_string(),
            mib_text(view.spec.mem_mib.into()),
            or_dash(view.revision.as_ref()),
            build(&view.build).to_owned(),
        ]
    };
    table(header, views.iter().map(row))
}

fn build(state: &BuildState) -> &'static str {
    match state {
        BuildState::Idle => "-",
        BuildState::Building { .. } => "building",
        BuildState::Built { .. } => "built",
        BuildState::Failed { .. } => "failed",
        BuildState::Unknown => "unknown",
    }
}

fn base(base: &BaseView) -> String {
    let made = utc_text(base.made_unix_ms);
    let unused = match (base.in_use, &base.given_up) {
        (true, _) => return format!("{}, made at {made}", base.id),
        (false, Some(reason)) => reason,
        (false, None) => "the image or the spec has changed since",
    };
    format!("{}, made at {made} (not in use: {unused}; `mvm pool warm-up` makes it anew)", base.id)
}

/// How many instances are older than the spec, and how one is renewed. A disk has one writer, which has to
/// go before another comes.
fn outdated(view: &PoolView) -> String {
    let PoolView { path, spec, outdated, instances, .. } = view;
    let (make, remove) = (format!("`mvm instance create {path} --start`"), "`mvm rm -f INSTANCE`");
    let writes = spec.disks.iter().any(|mount| !mount.read_only);
    let renew =
        if writes { format!("{remove}, then {make}") } else { format!("{make}, then {remove}") };
    format!(
        "{outdated} of {instances} (`mvm ps -a {path}` shows which and why); a restart changes nothing, renew each with {renew}"
    )
}

/// Ports in one line.
pub(super) fn ports(ports: &BTreeSet<String>) -> String {
    let words: Vec<&str> = ports.iter().map(String::as_str).collect();
    or_dash((!words.is_empty()).then(|| words.join(" ")))
}

/// One pool in full.
pub(crate) fn pool_info(view: &PoolView) -> String {
    let PoolView { spec, .. } = view;
    let shown = |field, text: String| match spec.unknown().any(|unknown| unknown == field) {
        true => "unknown".to_owned(),
        false => text,
    };
    let build = match &view.build {
        BuildState::Building { step } => format!("building: {step}"),
        BuildState::Failed { error, at_unix_ms, .. } => {
            format!("failed at {}: {error}", utc_text(*at_unix_ms))
        }
        state @ (BuildState::Idle | BuildState::Built { .. } | BuildState::Unknown) => {
            build(state).to_owned()
        }
    };
    let rolled_back = if view.rolled_back { " (rolled back)" } else { "" };
    let revision = format!("{}{rolled_back}", or_dash(view.revision.as_ref()));
    let earlier: Vec<String> =
        view.history.iter().rev().map(|past| past.revision.to_string()).collect();
    let mut rows = vec![
        ("pool", format!("{}{}", view.path, removing(view.removing))),
        ("image", shown("image", spec.image.to_string())),
        ("revision", revision),
        ("earlier", or_dash((!earlier.is_empty()).then(|| earlier.join(", ")))),
        ("build", build),
        ("base", or_dash(view.base.as_ref().map(base))),
        ("standing by", format!("{} of {} desired", view.standing_by, spec.ready)),
        ("exposed ports", ports(&view.exposed_ports)),
        ("running", format!("{} of {} desired", view.running, view.desired_running)),
        ("instances", view.instances.to_string()),
    ];
    rows.extend(view.base_failure.iter().map(|error| ("last warm-up", format!("failed: {error}"))));
    if view.outdated > 0 {
        rows.push(("outdated", outdated(view)));
    }
    rows.extend([
        ("vcpus", spec.vcpus.to_string()),
        ("memory", mib_text(spec.mem_mib.into())),
        ("disk", mib_text(spec.disk_mib.into())),
        ("network", shown("net", spec.net.to_string())),
        ("restart", shown("restart", spec.restart.to_string())),
        ("boot timeout", format!("{}s", spec.boot_timeout_s)),
        (
            "vmm",
            shown("vmm", spec.vmm.map_or_else(|| "the node's".to_owned(), |vmm| vmm.to_string())),
        ),
        ("rates", shown("rates", rates(&spec.rates))),
        ("sleep policy", shown("sleep_policy", policy::line(&spec.sleep_policy))),
        ("created", utc_text(view.created_unix_ms)),
    ]);
    rows.extend(spec.disks.iter().map(|mount| ("data disk", mount.to_string())));
    if !spec.publish.is_empty() {
        rows.extend(spec.publish.iter().map(|publish| ("published", publish.to_string())));
        rows.push(("connections", view.connections.to_string()));
        if view.refused_connections > 0 {
            rows.push(("refused", node::refused(view.refused_connections)));
        }
    }
    rows.extend(spec.process.init.map(|mode| ("init", mode.to_string())));
    let Settings { sysctl, ulimit, shm_mib } = &spec.settings;
    rows.extend(sysctl.iter().map(|(name, value)| ("sysctl", format!("{name}={value}"))));
    rows.extend(ulimit.iter().map(|(name, value)| ("ulimit", format!("{name}={value}"))));
    rows.extend(shm_mib.map(|mib| ("/dev/shm", mib_text(mib.into()))));
    rows.extend(volumes(&view.volumes).map(|volumes| ("volumes", volumes)));
    rows.extend(view.has_healthcheck.then(|| ("health check", NO_HEALTHCHECK.to_owned())));
    rows.extend(view.publish_problems.iter().map(|problem| ("problem", problem.clone())));
    fields(rows)
}

/// What is limited, in the units of the options that say it.
fn rates(rates: &Rates) -> String {
    let limits = [
        rates.net_mbit_s.map(|mbit| format!("network {mbit} Mbit/s")),
        rates.disk_mib_s.map(|mib| format!("disks {}/s", mib_text(mib.into()))),
        rates.disk_ops_s.map(|count| format!("disks {count} requests/s")),
    ];
    let limits: Vec<String> = limits.into_iter().flatten().collect();
    or_dash((!limits.is_empty()).then(|| limits.join(", ")))
}

#[cfg(test)]
mod tests {
    use mvm_core::spec::PoolSpec;

    use super::*;
    use crate::samples;

    #[test]
    fn a_quota_is_shown_beside_what_is_reserved() {
        let view = TenantView {
            name: "demo".parse().unwrap(),
            subnet: "10.240.0.0/24".into(),
            gateway: [10, 240, 0, 1].into(),
            bridge: "br-tenant-0".into(),
            quota: Quota { vcpus: Some(8), mem_mib: Some(4096), ..Quota::default() },
            reserved: Usage { vcpus: 2, mem_mib: 512, running: 2, ..Usage::default() },
            created_unix_ms: 0,
            removing: true,
        };
        let text = tenant_list(std::slice::from_ref(&view));
        let row = text.lines().nth(1).unwrap();
        assert!(row.starts_with("demo (being removed)   10.240.0.0/24   2 "), "{row}");
        assert!(row.contains("2/8") && row.contains("512 MiB / 4 GiB"), "{row}");
        assert!(tenant_info(&view).contains("gateway:              10.240.0.1"));
    }

    #[test]
    fn a_pool_with_outdated_instances_says_how_to_renew_them() {
        let mut view = samples::pool("demo/hello");
        assert!(!pool_info(&view).contains("outdated"), "nothing is said if there are none");
        (view.instances, view.outdated) = (3, 2);
        let text = pool_info(&view);
        let order = "`mvm instance create demo/hello --start`, then `mvm rm -f INSTANCE`";
        assert!(text.contains("2 of 3 (`mvm ps -a demo/hello`") && text.contains(order), "{text}");
        let disks = vec!["data:/srv".parse().unwrap()];
        view.spec = PoolSpec { disks, ..PoolSpec::default() }.into();
        let order = "`mvm rm -f INSTANCE`, then `mvm instance create demo/hello --start`";
        assert!(pool_info(&view).contains(order), "a disk has one writer");
    }

    #[test]
    fn a_failed_build_tells_why() {
        let state = BuildState::Failed { error: "no network".into(), at_unix_ms: 0, failures: 1 };
        let view = PoolView { build: state, ..samples::pool("demo/hello") };
        assert!(pool_info(&view).contains("failed at 1970-01-01 00:00:00 UTC: no network"));
        let text = pool_list(&[view]);
        assert!(text.lines().nth(1).unwrap().ends_with("-          failed"), "{text}");
    }
}
