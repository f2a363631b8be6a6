//! Checks of what tenants' networks are made of.

use super::{AS_ROOT, Check, device_fix};
use crate::platform::facts::{Facts, IpForward, Privilege};
use crate::platform::firewall::Forwarding;
use crate::platform::kvm::Device;
use crate::platform::system::KernelFeature;

pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    vec![
        tun(facts),
        kernel_feature("bridge", "bridge", facts.bridge),
        kernel_feature("nf_tables", "nf_tables", facts.nf_tables),
        ip_forward(facts),
        firewall(facts),
        names(facts),
        subnets(facts),
        orphans(facts),
    ]
}

fn tun(facts: &Facts) -> Check {
    match &facts.tun {
        Device::Opens => Check::ok("tun", "/dev/net/tun opens"),
        Device::Absent => Check::fail("tun", "there is no /dev/net/tun", "sudo modprobe tun"),
        Device::NotOpenable { problem } => Check::fail(
            "tun",
            format!("/dev/net/tun cannot be opened: {problem}"),
            device_fix(facts, "/dev/net/tun"),
        ),
    }
}

fn kernel_feature(name: &'static str, module: &str, feature: KernelFeature) -> Check {
    let load = format!("sudo modprobe {module}");
    match feature {
        KernelFeature::Present => Check::ok(name, "in the kernel"),
        KernelFeature::Loadable => Check::ok(name, "a module that the kernel loads when needed"),
        KernelFeature::Absent => {
            Check::fail(name, format!("this kernel has no `{module}`, or its module is gone"), load)
        }
        KernelFeature::Unknown => Check::warn(name, "the kernel does not tell", load),
    }
}

fn ip_forward(facts: &Facts) -> Check {
    const FIX: &str = "sudo sysctl -w net.ipv4.ip_forward=1";
    match (facts.ip_forward, facts.privilege) {
        (IpForward::On, _) => Check::ok("ip-forward", "on"),
        (IpForward::Off, _) | (IpForward::Locked, Privilege::User) => {
            Check::ok("ip-forward", "off; the agent switches it on")
        }
        (IpForward::Locked, Privilege::Root) => {
            Check::fail("ip-forward", "off, and /proc/sys cannot be written", FIX)
        }
        (IpForward::Unknown, _) => Check::warn("ip-forward", "the kernel does not tell", FIX),
    }
}

fn firewall(facts: &Facts) -> Check {
    match &facts.forwarding {
        Forwarding::Open => Check::ok("firewall", "no other firewall drops what guests send"),
        Forwarding::Dropped(drops) => {
            let chains: Vec<_> = drops
                .iter()
                .map(|drop| format!("{} {} {}", drop.family, drop.table, drop.chain))
                .collect();
            let fixes: Vec<_> = drops.iter().map(|drop| drop.fix()).collect();
            Check::warn(
                "firewall",
                format!("guests reach no network: dropped by the policy of {}", chains.join(", ")),
                fixes.join(" && "),
            )
        }
        Forwarding::Unknown { problem } => {
            let fix = match facts.privilege {
                Privilege::User => AS_ROOT,
                Privilege::Root => "nft list ruleset",
            };
            Check::warn("firewall", format!("it cannot be listed: {problem}"), fix)
        }
    }
}

fn names(facts: &Facts) -> Check {
    let servers: Vec<String> =
        facts.resolver.servers.iter().map(|server| server.ip().to_string()).collect();
    if servers.is_empty() {
        return Check::warn(
            "names",
            "this machine has no name server, so neither it nor a guest finds names",
            "echo nameserver ADDRESS | sudo tee -a /etc/resolv.conf",
        );
    }
    if facts.input_drops.is_empty() {
        return Check::ok("names", format!("guests' names are asked of {}", servers.join(", ")));
    }
    let chains = facts.input_drops.iter();
    let chains: Vec<_> =
        chains.map(|drop| format!("{} {} {}", drop.family, drop.table, drop.chain)).collect();
    let fixes: Vec<_> = facts.input_drops.iter().map(|drop| drop.fix()).collect();
    Check::warn(
        "names",
        format!("guests cannot ask their gateway: dropped by the policy of {}", chains.join(", ")),
        fixes.join(" && "),
    )
}

fn subnets(facts: &Facts) -> Check {
    let overlaps: Vec<String> = facts
        .route_conflicts
        .iter()
        .take(NAMED)
        .map(|(subnet, route)| format!("{subnet} overlaps {route}"))
        .collect();
    match overlaps.is_empty() {
        true => Check::ok("subnets", "no tenant's subnet is routed elsewhere"),
        false => Check::warn(
            "subnets",
            format!("tenants' subnets that this machine routes elsewhere: {}", overlaps.join(", ")),
            "mvm tenant update TENANT --subnet CIDR",
        ),
    }
}

/// Things that a message has room for.
const NAMED: usize = 4;

fn orphans(facts: &Facts) -> Check {
    let mut named: Vec<String> = facts
        .orphans
        .iter()
        .take(NAMED)
        .map(|orphan| format!("{} of {}", orphan.name, orphan.state_dir.display()))
        .collect();
    match facts.orphans.len() {
        0 => Check::ok("leftovers", "nothing is left of state directories that are gone"),
        count => {
            named.extend((count > NAMED).then(|| format!("{} more", count - NAMED)));
            Check::warn(
                "leftovers",
                format!("left by state directories that are gone: {}", named.join(", ")),
                "mvm node orphans --prune",
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{Orphan, OrphanKind};
    use crate::platform::doctor::Verdict;
    use crate::platform::facts::tests::facts;
    use crate::platform::firewall::{ChainOwner, ForwardDrop};

    #[test]
    fn a_missing_tun_device_is_a_module_away() {
        let check = tun(&Facts { tun: Device::Absent, ..facts() });
        assert_eq!(check.verdict, Verdict::Fail);
        assert_eq!(check.fix.as_deref(), Some("sudo modprobe tun"));
    }

    #[test]
    fn only_a_feature_that_cannot_come_is_a_failure() {
        let verdict = |feature| kernel_feature("bridge", "bridge", feature).verdict;
        assert_eq!(verdict(KernelFeature::Loadable), Verdict::Ok);
        assert_eq!(verdict(KernelFeature::Unknown), Verdict::Warn);
        assert_eq!(verdict(KernelFeature::Absent), Verdict::Fail);
    }

    #[test]
    fn forwarding_that_root_cannot_switch_on_is_a_failure() {
        let with =
            |ip_forward, privilege| ip_forward_verdict(Facts { ip_forward, privilege, ..facts() });
        assert_eq!(with(IpForward::Off, Privilege::Root), Verdict::Ok);
        assert_eq!(with(IpForward::Locked, Privilege::User), Verdict::Ok);
        assert_eq!(with(IpForward::Locked, Privilege::Root), Verdict::Fail);
        assert_eq!(with(IpForward::Unknown, Privilege::Root), Verdict::Warn);
    }

    fn ip_forward_verdict(facts: Facts) -> Verdict {
        ip_forward(&facts).verdict
    }

    #[test]
    fn every_chain_that_drops_guests_packets_is_named_and_mended() {
        let drop = |table: &str, owner| ForwardDrop {
            family: "ip".into(),
            table: table.into(),
            chain: "FORWARD".into(),
            owner,
        };
        let drops = vec![drop("filter", ChainOwner::Docker), drop("other", ChainOwner::Nftables)];
        let check = firewall(&Facts { forwarding: Forwarding::Dropped(drops), ..facts() });
        assert_eq!(check.verdict, Verdict::Warn);
        assert!(check.detail.ends_with("ip filter FORWARD, ip other FORWARD"), "{check:?}");
        let fix = check.fix.unwrap();
        assert!(fix.contains("DOCKER-USER") && fix.contains("ip other FORWARD"), "{fix}");
    }

    #[test]
    fn a_machine_without_name_server_is_told_so() {
        assert_eq!(names(&facts()).verdict, Verdict::Ok);
        let resolver = crate::net::ResolvConf::default();
        assert_eq!(names(&Facts { resolver, ..facts() }).verdict, Verdict::Warn);
    }

    #[test]
    fn a_subnet_that_is_routed_elsewhere_is_named() {
        let conflict = ("10.240.1.0/24".parse().unwrap(), "10.240.0.0/16".parse().unwrap());
        let check = subnets(&Facts { route_conflicts: vec![conflict], ..facts() });
        assert_eq!(check.verdict, Verdict::Warn);
        assert!(check.detail.ends_with("10.240.1.0/24 overlaps 10.240.0.0/16"), "{check:?}");
    }

    #[test]
    fn leftovers_are_named_with_the_verb_that_removes_them() {
        assert_eq!(orphans(&facts()).verdict, Verdict::Ok);
        let left = |number| Orphan {
            kind: OrphanKind::Bridge,
            name: format!("br-tenant-{number}"),
            state_dir: "/srv/gone".into(),
        };
        let check = orphans(&Facts { orphans: (1..=6).map(left).collect(), ..facts() });
        assert_eq!(check.verdict, Verdict::Warn);
        assert!(check.detail.contains("br-tenant-1 of /srv/gone"), "{check:?}");
        assert!(check.detail.ends_with("2 more"), "{check:?}");
    }

    #[test]
    fn a_firewall_that_a_user_may_not_list_is_listed_by_root() {
        let forwarding = Forwarding::Unknown { problem: "not permitted".into() };
        let facts = Facts { forwarding, privilege: Privilege::User, ..facts() };
        assert_eq!(firewall(&facts).fix.as_deref(), Some("sudo mvm doctor"));
    }
}
