//! The node, its records and its network for people.

use mvm_wire::view::{NodeView, VerifyView};

use super::table::fields;
use crate::units::{duration_text, mib_text};

/// The node in full.
pub(crate) fn info(view: &NodeView, now: u64) -> String {
    let NodeView { capacity, reserved, .. } = view;
    let of = |used: u64, all: u64| format!("{used} of {all} reserved");
    let mib_of = |used, all| format!("{} of {} reserved", mib_text(used), mib_text(all));
    let mut rows = agent_rows(view, now);
    rows.extend([
        ("chosen because", view.chosen_because.clone()),
        ("host", view.hostname.clone()),
        ("vcpus", of(reserved.vcpus, capacity.vcpus)),
        ("memory", mib_of(reserved.mem_mib, capacity.mem_mib)),
        ("disk", mib_of(reserved.disk_mib, capacity.disk_mib)),
        ("tenants", view.tenants.to_string()),
        ("pools", reserved.pools.to_string()),
        ("instances", format!("{}, {} to run", reserved.instances, reserved.running)),
        (
            "connections",
            format!("{} of {} to published ports", view.connections, view.connections_max),
        ),
    ]);
    if view.refused_connections > 0 {
        rows.push(("refused", refused(view.refused_connections)));
    }
    let mut text = fields(rows);
    if !view.bad_records.is_empty() {
        text.push_str("\n\nRecords that do not parse; their objects are not touched:");
        for record in &view.bad_records {
            text.push_str(&format!("\n  {}: {}", record.key, record.reason));
        }
        text.push_str("\nSee one with `mvm node record show KEY`, and mend it with `mvm node record set KEY FILE`.");
    }
    if !view.problems.is_empty() {
        text.push_str("\n\nProblems that are being retried:");
        for problem in &view.problems {
            text.push_str(&format!("\n  {problem}"));
        }
    }
    text
}

/// Connections to published ports that came to nothing.
pub(crate) fn refused(count: u64) -> String {
    let noun = if count == 1 { "connection" } else { "connections" };
    format!("{count} {noun} since the agent's start")
}

/// The agent.
pub(crate) fn agent(view: &NodeView, now: u64) -> String {
    fields(agent_rows(view, now))
}

fn agent_rows(view: &NodeView, now: u64) -> Vec<(&'static str, String)> {
    vec![
        ("agent", format!("running, pid {}", view.pid)),
        ("version", view.version.clone()),
        ("uptime", duration_text(now.saturating_sub(view.started_unix_ms))),
        ("state directory", view.state_dir.display().to_string()),
        ("vmm", view.vmm.to_string()),
        ("accelerator", view.accel.to_string()),
    ]
}

/// The comparison of the network.
pub(crate) fn verify(view: &VerifyView) -> String {
    let VerifyView { tenants, instances, differences } = view;
    let compared = format!("compared {tenants} tenant networks and {instances} interfaces");
    if differences.is_empty() {
        return format!("{compared}: all as expected");
    }
    format!("{compared}\n{}", differences.join("\n"))
}

#[cfg(test)]
mod tests {
    use mvm_core::admit::{Capacity, Usage};
    use mvm_core::vmm::{Accel, VmmKind};
    use mvm_wire::view::BadRecordView;

    use super::*;

    #[test]
    fn bad_records_come_with_the_way_to_mend_them() {
        let view = NodeView {
            version: "0.1.0".into(),
            pid: 7,
            started_unix_ms: 0,
            state_dir: "/var/lib/mvm".into(),
            hostname: "host".into(),
            vmm: VmmKind::Qemu.into(),
            accel: Accel::Tcg.into(),
            chosen_because: "there is no KVM".into(),
            capacity: Capacity { vcpus: 8, mem_mib: 4096, disk_mib: 10240 },
            reserved: Usage { mem_mib: 512, ..Usage::default() },
            tenants: 1,
            bad_records: vec![BadRecordView { key: "desired/pool/a/b".into(), reason: "x".into() }],
            problems: vec!["nft is missing".into()],
            connections: 3,
            connections_max: 8192,
            refused_connections: 0,
        };
        let text = info(&view, 61_000);
        for part in [
            "uptime:            1m 1s",
            "memory:            512 MiB of 4 GiB reserved",
            "desired/pool/a/b: x",
            "mvm node record set",
            "nft is missing",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    }
}
