//! What is left on a machine of state directories that are gone, or were moved.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod net_support;

use std::collections::BTreeSet;

use mvm_core::net::StateDirId;
use mvm_host::net::{LinuxNetwork, Network, OrphanKind, Owner, Registry};
use mvm_host::net::{orphans_of, prune_orphans_of};
use mvm_host::state_dir;
use net_support::{Machine, differences, in_namespace, ip, nft, node};

async fn left(machine: &Machine) -> Vec<(OrphanKind, String)> {
    let found = orphans_of(&machine.claims_dir()).await.unwrap();
    found.into_iter().map(|orphan| (orphan.kind, orphan.name)).collect()
}

fn links() -> BTreeSet<String> {
    let listed = ip("-br link show");
    let names = listed.lines().filter_map(|line| line.split([' ', '@']).next());
    names
        .filter(|name| name.contains("tenant") || name.starts_with("tn"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn what_a_deleted_state_directory_has_left_is_found_and_removed_and_nothing_else() {
    in_namespace(|| async {
        let machine = Machine::new();
        let (gone, stays) = (machine.agent("gone"), machine.agent("stays"));
        gone.ensure(&node(&[(1, 3)])).await.unwrap();
        stays.ensure(&node(&[(2, 3)])).await.unwrap();
        // Somebody else's, with names like ours.
        ip("link add br-tenant-9 type bridge");
        nft("add table inet mvm_0badcafe\n");
        assert_eq!(left(&machine).await, []);

        let table = machine.owner("gone").table().to_string();
        mvm_host::removal::remove_tree(&machine.state_dir("gone")).unwrap();
        drop(gone);
        let named = |kind, name: &str| (kind, name.to_owned());
        assert_eq!(
            left(&machine).await,
            [
                named(OrphanKind::Tap, "tn1i3"),
                named(OrphanKind::Bridge, "br-tenant-1"),
                named(OrphanKind::Firewall, &table),
                named(OrphanKind::Claim, "1"),
            ]
        );
        assert_eq!(prune_orphans_of(&machine.claims_dir()).await.unwrap().len(), 4);
        assert_eq!(left(&machine).await, []);
        let expected = ["br-tenant-2", "br-tenant-9", "tn2i3"].map(str::to_owned);
        assert_eq!(links(), BTreeSet::from(expected));
        let tables = nft("list tables\n");
        assert!(!tables.contains(&table) && tables.contains("mvm_0badcafe"), "{tables}");
        assert_eq!(differences(&stays, &node(&[(2, 3)])).await, [""; 0]);
    });
}

#[test]
fn a_directory_in_the_place_of_a_deleted_one_is_not_taken_for_it() {
    in_namespace(|| async {
        let machine = Machine::new();
        let registry = Registry::at(machine.claims_dir());
        let dir = machine.state_dir("a");
        let settled = state_dir::settle(&dir, &registry).unwrap();
        // Not the mark that goes with the path, as after a move.
        let mark = StateDirId::from_digest([1, 2, 3, 4]);
        let first = Owner::settled(&state_dir::Settled { mark, ..settled });
        let first = LinuxNetwork::new(first, machine.claims_dir()).unwrap();
        first.ensure(&node(&[(1, 3)])).await.unwrap();
        let kinds: Vec<_> = left(&machine).await.into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [OrphanKind::Tap, OrphanKind::Bridge, OrphanKind::Firewall]);
    });
}

#[test]
fn a_moved_state_directory_keeps_its_links_its_rules_and_its_net_ids() {
    in_namespace(|| async {
        let machine = Machine::new();
        let registry = Registry::at(machine.claims_dir());
        let expected = node(&[(1, 3)]);
        let agent = |name: &str| {
            let settled = state_dir::settle(&machine.state_dir(name), &registry).unwrap();
            LinuxNetwork::new(Owner::settled(&settled), machine.claims_dir()).unwrap()
        };
        agent("a").ensure(&expected).await.unwrap();
        let tap = ip("-o link show tn1i3");
        let dir = machine.state_dir("a");
        std::fs::rename(&dir, dir.with_file_name("b")).unwrap();
        let moved = agent("b");
        moved.ensure(&expected).await.unwrap();
        assert_eq!(differences(&moved, &expected).await, [""; 0]);
        assert_eq!(ip("-o link show tn1i3"), tap, "it was made anew");
        assert_eq!(left(&machine).await, []);
        // A new directory in its place gets another net id and another mark.
        let new = agent("a");
        assert!(new.claim(mvm_core::net::NetId(1)).await.is_err());
        new.ensure(&node(&[(2, 3)])).await.unwrap();
        assert_eq!(differences(&moved, &expected).await, [""; 0]);
    });
}
