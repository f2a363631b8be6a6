//! Other software's firewall chains that drop what guests send: found, never changed.
//!
//! A packet that is forwarded passes the forward chain of every table, so mvm's own table cannot
//! let through what Docker's or a distribution's chain drops by policy. The same goes for what guests
//! may ask the host itself, which is names.

use serde_json::Value;

use crate::process::{Tool, find_program};

/// How the firewall's rules name the bridges of all tenants.
const BRIDGES: &str = "br-tenant-";
/// How long `nft` may take.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

/// How a rule that lets guests through is made, so that whoever owns the chain keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainOwner {
    /// Docker, which leaves the chain `DOCKER-USER` to its users.
    Docker,
    /// Anyone else, in nftables.
    Nftables,
    /// Anyone else, in the kernel's older firewall, which nftables does not show.
    LegacyIptables,
}

/// A chain that drops forwarded packets by policy and has no rule for mvm's bridges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardDrop {
    /// The address family of its table.
    pub family: String,
    /// Its table.
    pub table: String,
    /// Its name.
    pub chain: String,
    /// Who owns it.
    pub owner: ChainOwner,
}

/// What the firewall does to forwarded packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forwarding {
    /// No chain drops what guests send.
    Open,
    /// These chains do.
    Dropped(Vec<ForwardDrop>),
    /// The firewall cannot be listed.
    Unknown {
        /// Why.
        problem: String,
    },
}

/// A chain that drops by policy what comes in, and has no rule for mvm's bridges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputDrop {
    /// The address family of its table.
    pub family: String,
    /// Its table.
    pub table: String,
    /// Its name.
    pub chain: String,
}

impl InputDrop {
    /// The command that lets guests ask for names.
    pub fn fix(&self) -> String {
        format!(
            "sudo nft insert rule {} {} {} iifname '\"{BRIDGES}*\"' meta l4proto '{{ tcp, udp }}' th dport 53 accept",
            self.family, self.table, self.chain
        )
    }
}

/// The chains that keep guests from asking the host for names; none where that cannot be told.
pub(crate) async fn input_drops() -> Vec<InputDrop> {
    let list = async {
        let chains = objects(&nft(&["list", "chains"]).await?)?;
        let mut drops = Vec::new();
        for drop in dropping_input(&chains) {
            let listing = nft(&["list", "chain", &drop.family, &drop.table, &drop.chain]).await?;
            if !accepts(&objects(&listing)?, "iifname") {
                drops.push(drop);
            }
        }
        Ok::<_, String>(drops)
    };
    list.await.unwrap_or_default()
}

/// The chains that drop by policy what comes in over IPv4.
fn dropping_input(objects: &[Value]) -> Vec<InputDrop> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let chains = objects.iter().map(|object| &object["chain"]);
    chains
        .filter(|chain| chain["hook"] == "input" && chain["policy"] == "drop")
        .filter(|chain| chain["family"] == "ip" || chain["family"] == "inet")
        .map(|chain| InputDrop {
            family: text(&chain["family"]),
            table: text(&chain["table"]),
            chain: text(&chain["name"]),
        })
        .collect()
}

/// Lists the machine's firewall.
pub(super) async fn gather() -> Forwarding {
    match list().await {
        Ok(drops) if drops.is_empty() => Forwarding::Open,
        Ok(drops) => Forwarding::Dropped(drops),
        Err(problem) => Forwarding::Unknown { problem },
    }
}

async fn list() -> Result<Vec<ForwardDrop>, String> {
    let mut drops = list_nftables().await?;
    // Asking the tool would load the older firewall where nobody uses it.
    let legacy_tables = std::fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default();
    if legacy_tables.lines().any(|table| table == "filter") {
        let names = ["iptables-legacy", "iptables"];
        let program = names.into_iter().find_map(find_program);
        let program =
            program.ok_or("`iptables-legacy` is not installed, but its rules are in use")?;
        let rules = Tool::new(&program).arg("-S").within(LIMIT).run().await;
        drops.extend(legacy_drop(&rules.map_err(|error| error.to_string())?));
    }
    Ok(drops)
}

/// The chain that drops forwarded packets, in what `iptables -S` prints.
fn legacy_drop(rules: &str) -> Option<ForwardDrop> {
    let has = |wanted: &str| rules.lines().any(|line| line.trim() == wanted);
    let accepts = |direction: &str| {
        ["FORWARD", "DOCKER-USER"]
            .iter()
            .any(|chain| has(&format!("-A {chain} {direction} {BRIDGES}+ -j ACCEPT")))
    };
    if !has("-P FORWARD DROP") || (accepts("-i") && accepts("-o")) {
        return None;
    }
    let owner = match has("-N DOCKER-USER") {
        true => ChainOwner::Docker,
        false => ChainOwner::LegacyIptables,
    };
    let [family, table, chain] = ["ip", "filter", "FORWARD"].map(str::to_owned);
    Some(ForwardDrop { family, table, chain, owner })
}

async fn list_nftables() -> Result<Vec<ForwardDrop>, String> {
    let chains = objects(&nft(&["list", "chains"]).await?)?;
    let mut drops = Vec::new();
    for drop in dropping(&chains) {
        let user_chain = (drop.owner == ChainOwner::Docker).then_some("DOCKER-USER");
        let mut passes = false;
        for chain in [drop.chain.as_str()].into_iter().chain(user_chain) {
            let listing = nft(&["list", "chain", &drop.family, &drop.table, chain]).await?;
            passes |= lets_guests_through(&objects(&listing)?);
        }
        if !passes {
            drops.push(drop);
        }
    }
    Ok(drops)
}

async fn nft(args: &[&str]) -> Result<String, String> {
    let listing = Tool::new("nft").arg("-j").args(args).within(LIMIT).run().await;
    listing.map_err(|error| error.to_string())
}

fn objects(listing: &str) -> Result<Vec<Value>, String> {
    let document: Value = serde_json::from_str(listing)
        .map_err(|error| format!("`nft` printed something else than JSON: {error}"))?;
    match &document["nftables"] {
        Value::Array(objects) => Ok(objects.clone()),
        _ => Err("`nft` printed JSON without a list of objects".to_owned()),
    }
}

/// The chains that drop forwarded IPv4 packets by policy.
fn dropping(objects: &[Value]) -> Vec<ForwardDrop> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let chains = || objects.iter().map(|object| &object["chain"]).filter(|chain| chain.is_object());
    chains()
        .filter(|chain| chain["hook"] == "forward" && chain["policy"] == "drop")
        .filter(|chain| chain["family"] == "ip" || chain["family"] == "inet")
        .map(|chain| {
            let is_docker = chains().any(|other| {
                other["name"] == "DOCKER-USER"
                    && other["family"] == chain["family"]
                    && other["table"] == chain["table"]
            });
            ForwardDrop {
                family: text(&chain["family"]),
                table: text(&chain["table"]),
                chain: text(&chain["name"]),
                owner: if is_docker { ChainOwner::Docker } else { ChainOwner::Nftables },
            }
        })
        .collect()
}

/// Whether a rule accepts packets of the tenants' bridges in both directions.
fn lets_guests_through(objects: &[Value]) -> bool {
    accepts(objects, "iifname") && accepts(objects, "oifname")
}

/// Whether a rule accepts packets of the tenants' bridges in this direction.
fn accepts(objects: &[Value], direction: &str) -> bool {
    objects.iter().any(|object| {
        let expressions = object["rule"]["expr"].as_array();
        expressions.is_some_and(|list| {
            list.iter().any(|e| e.get("accept").is_some())
                && list.iter().any(|e| {
                    let matches = &e["match"];
                    let key = &matches["left"]["meta"]["key"];
                    let link = matches["right"].as_str().unwrap_or_default();
                    key == direction && matches["op"] == "==" && link.starts_with(BRIDGES)
                })
        })
    })
}

impl ForwardDrop {
    /// The command that lets guests through.
    pub fn fix(&self) -> String {
        let rule = |direction: &str, nft_direction: &str| match self.owner {
            ChainOwner::Docker => {
                format!("sudo iptables -I DOCKER-USER {direction} {BRIDGES}+ -j ACCEPT")
            }
            ChainOwner::LegacyIptables => {
                format!("sudo iptables-legacy -I FORWARD {direction} {BRIDGES}+ -j ACCEPT")
            }
            ChainOwner::Nftables => format!(
                "sudo nft insert rule {} {} {} {nft_direction} '\"{BRIDGES}*\"' accept",
                self.family, self.table, self.chain
            ),
        };
        format!("{} && {}", rule("-i", "iifname"), rule("-o", "oifname"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chain(family: &str, table: &str, name: &str, hook: Option<(&str, &str)>) -> Value {
        let mut chain = json!({ "family": family, "table": table, "name": name, "handle": 1 });
        if let Some((hook, policy)) = hook {
            chain["hook"] = json!(hook);
            chain["policy"] = json!(policy);
        }
        json!({ "chain": chain })
    }

    fn accept(direction: &str, link: &str) -> Value {
        json!({ "rule": { "expr": [
            { "match": { "op": "==", "left": { "meta": { "key": direction } }, "right": link } },
            { "counter": { "packets": 0, "bytes": 0 } },
            { "accept": null },
        ] } })
    }

    #[test]
    fn dockers_forward_policy_is_found_and_mended_in_the_chain_left_to_users() {
        let objects = [
            chain("ip", "filter", "FORWARD", Some(("forward", "drop"))),
            chain("ip", "filter", "DOCKER-USER", None),
        ];
        let drops = dropping(&objects);
        assert_eq!(drops.len(), 1);
        assert_eq!(drops[0].owner, ChainOwner::Docker);
        let expected = "sudo iptables -I DOCKER-USER -i br-tenant-+ -j ACCEPT && \
                        sudo iptables -I DOCKER-USER -o br-tenant-+ -j ACCEPT";
        assert_eq!(drops[0].fix(), expected);
    }

    #[test]
    fn another_firewalls_chain_is_mended_itself() {
        let objects = [chain("inet", "fw", "forwarding", Some(("forward", "drop")))];
        let fix = dropping(&objects)[0].fix();
        assert!(
            fix.starts_with("sudo nft insert rule inet fw forwarding iifname '\"br-tenant-*\"'")
        );
    }

    #[test]
    fn chains_that_do_not_drop_guests_packets_are_left_out() {
        let objects = [
            json!({ "metainfo": { "version": "1.0.6" } }),
            chain("inet", "mvm", "forward", Some(("forward", "accept"))),
            chain("inet", "fw", "input", Some(("input", "drop"))),
            chain("ip6", "filter", "FORWARD", Some(("forward", "drop"))),
            chain("ip", "filter", "other", None),
        ];
        assert_eq!(dropping(&objects), []);
    }

    #[test]
    fn guests_pass_only_with_a_rule_for_each_direction() {
        let there = accept("iifname", "br-tenant-*");
        let back = accept("oifname", "br-tenant-*");
        assert!(lets_guests_through(&[there.clone(), back.clone()]));
        assert!(!lets_guests_through(std::slice::from_ref(&there)));
        assert!(!lets_guests_through(&[there, accept("oifname", "docker0")]));
        let mut dropped = back.clone();
        dropped["rule"]["expr"][2] = json!({ "drop": null });
        assert!(!lets_guests_through(&[accept("iifname", "br-tenant-*"), dropped]));
    }

    #[test]
    fn a_policy_of_the_older_firewall_is_found_and_mended_there() {
        let drop = legacy_drop("-P INPUT ACCEPT\n-P FORWARD DROP\n").unwrap();
        assert_eq!(drop.owner, ChainOwner::LegacyIptables);
        assert!(drop.fix().starts_with("sudo iptables-legacy -I FORWARD -i br-tenant-+"));
        let docker = legacy_drop("-P FORWARD DROP\n-N DOCKER-USER\n").unwrap();
        assert_eq!(docker.owner, ChainOwner::Docker);
        assert_eq!(legacy_drop("-P INPUT DROP\n-P FORWARD ACCEPT\n"), None);
    }

    #[test]
    fn the_older_firewall_may_let_guests_through_too() {
        let half = "-P FORWARD DROP\n-A FORWARD -i br-tenant-+ -j ACCEPT\n";
        assert!(legacy_drop(half).is_some());
        let whole = format!("{half}-A DOCKER-USER -o br-tenant-+ -j ACCEPT\n");
        assert_eq!(legacy_drop(&whole), None);
    }

    /// Runs `work` on a thread with a network namespace of its own, if this process may have one.
    #[allow(unsafe_code)]
    #[expect(clippy::print_stderr, reason = "a skipped test says why")]
    fn in_own_namespace(work: impl AsyncFnOnce() + Send + 'static) {
        use rustix::thread::{UnshareFlags, unshare_unsafe};
        let thread = std::thread::spawn(|| {
            // SAFETY: the network namespace of this thread alone changes.
            if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
                eprintln!("skipped: no network namespace can be made: {error}");
                return;
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(work());
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_real_chain_that_drops_questions_is_found_and_its_fix_works_as_typed() {
        in_own_namespace(async || {
            assert_eq!(input_drops().await, []);
            let table = "table inet fw {\n chain incoming {\n \
                         type filter hook input priority 0; policy drop;\n }\n}\n";
            Tool::new("nft").arg(table).within(LIMIT).run().await.unwrap();
            let drops = input_drops().await;
            assert_eq!(drops.len(), 1);
            let typed = drops[0].fix().replace("sudo ", "");
            Tool::new("sh").args(["-c", &typed]).within(LIMIT).run().await.unwrap();
            assert_eq!(input_drops().await, []);
        });
    }

    #[test]
    fn a_real_chain_that_drops_is_found_and_its_fix_works_as_typed() {
        in_own_namespace(async || {
            assert_eq!(gather().await, Forwarding::Open);
            let table = "table inet fw {\n chain forwarding {\n \
                         type filter hook forward priority 0; policy drop;\n }\n}\n";
            Tool::new("nft").arg(table).within(LIMIT).run().await.unwrap();
            let Forwarding::Dropped(drops) = gather().await else { panic!("nothing was found") };
            let typed = drops[0].fix().replace("sudo ", "");
            Tool::new("sh").args(["-c", &typed]).within(LIMIT).run().await.unwrap();
            assert_eq!(gather().await, Forwarding::Open);
        });
    }
}
