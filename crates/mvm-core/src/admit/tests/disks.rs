//! Data disks: who may have one when, and the words of each denial.

use super::*;
use crate::disk::DiskMount;

fn disk(path: &str, size_mib: u64) -> Request {
    Request::DiskCreate { path: path.parse().unwrap(), size_mib }
}

fn resize(path: &str, size_mib: u64) -> Request {
    Request::DiskResize { path: path.parse().unwrap(), size_mib }
}

fn remove(path: &str) -> Request {
    Request::DiskRemove { path: path.parse().unwrap() }
}

fn pool_with(path: &str, mounts: &[&str]) -> Request {
    let disks = mounts.iter().map(|mount| mount.parse().unwrap()).collect();
    Request::PoolCreate {
        path: path.parse().unwrap(),
        spec: PoolSpec { disk_mib: 16, disks, ..PoolSpec::default() }.into(),
    }
}

fn node_with_disk() -> Node {
    let mut node = Node::new();
    node.accept(tenant("demo"));
    node.accept(disk("demo/data", 64));
    node
}

fn said(denial: &Denial) -> String {
    format!("{denial}; {}", denial.hint().unwrap_or_default())
}

#[test]
fn a_second_writer_is_refused_and_the_first_is_named() {
    let mut node = node_with_disk();
    node.accept(pool_with("demo/web", &["data:/data"]));
    node.accept(scale("demo/web", 1));
    let holder = node.instances("demo/web")[0].path.clone();
    for more in [scale("demo/web", 2), create("demo/web", 1, true)] {
        let text = said(&node.deny(more));
        assert!(text.contains(&format!("while {holder} writes it")), "{text}");
        assert!(text.contains(&format!("mvm stop {holder}")), "{text}");
    }
    node.accept(create("demo/web", 1, false));
    node.accept(stop(holder.id.as_str(), false));
    let other = node.instances("demo/web")[1].path.id.clone();
    node.accept(start(other.as_str(), false));
    assert!(matches!(node.deny(start(holder.id.as_str(), false)), Denial::DiskConflict(_)));
}

#[test]
fn two_writers_of_one_request_name_each_other() {
    let mut node = node_with_disk();
    node.accept(pool_with("demo/web", &["data:/data"]));
    let text = said(&node.deny(scale("demo/web", 2)));
    assert!(text.contains("is to write it; start one of them"), "{text}");
}

#[test]
fn many_read_and_a_writer_waits_for_all_of_them() {
    let mut node = node_with_disk();
    node.accept(pool_with("demo/read", &["data:/data:ro"]));
    node.accept(pool_with("demo/write", &["data:/data"]));
    node.accept(scale("demo/read", 3));
    let text = said(&node.deny(scale("demo/write", 1)));
    assert!(text.contains("cannot write disk demo/data while demo/read/"), "{text}");
    assert!(text.contains(" reads it"), "{text}");
    node.accept(scale("demo/read", 0));
    node.accept(scale("demo/write", 1));
    let text = said(&node.deny(scale("demo/read", 1)));
    assert!(text.contains("cannot read disk demo/data while demo/write/"), "{text}");
}

#[test]
fn a_fork_of_a_writer_is_refused_by_the_names_of_its_source_and_disk() {
    let mut node = node_with_disk();
    node.accept(pool_with("demo/web", &["data:/data"]));
    node.accept(scale("demo/web", 1));
    let source = node.instances("demo/web")[0].path.clone();
    let text = said(&node.try_fork(&source).unwrap_err());
    assert!(node.desired.forks.is_empty(), "nothing is saved for nothing");
    assert!(
        text.starts_with(&format!("{source} cannot be forked: it writes disk demo/data")),
        "{text}"
    );
    node.accept(scale("demo/web", 0));
    node.accept(pool_with("demo/read", &["data:/data:ro"]));
    node.accept(scale("demo/read", 1));
    let source = node.instances("demo/read")[0].path.clone();
    node.try_fork(&source).unwrap();
}

#[test]
fn a_fork_needs_the_disks_of_its_source_although_that_goes() {
    let mut node = node_with_disk();
    node.accept(pool("demo/web"));
    let disks = vec!["data:/data:ro".parse().unwrap()];
    let pool = "demo/web".parse().unwrap();
    let create = Request::InstanceCreate { pool, count: 1, start: true, disks, cold: false };
    let source = node.accept(create).instances.remove(0);
    node.accept(destroy(source.id.as_str(), false, true));
    node.accept(remove("demo/data"));
    let denial = node.try_fork(&source).unwrap_err();
    assert_eq!(denial.to_string(), "disk demo/data is being removed");
}

#[test]
fn an_instance_may_bring_a_disk_of_its_own() {
    let mut node = node_with_disk();
    node.accept(pool("demo/web"));
    let bring = |mount: &str| Request::InstanceCreate {
        pool: "demo/web".parse().unwrap(),
        count: 1,
        start: true,
        disks: vec![mount.parse().unwrap()],
        cold: false,
    };
    node.accept(bring("data:/srv/data"));
    let mounts: Vec<DiskMount> = node.instances("demo/web")[0].spec.disks.clone();
    assert_eq!(mounts, ["data:/srv/data".parse().unwrap()]);
    assert!(node.desired.pools.values().all(|pool| pool.spec.disks.is_empty()));
    assert!(matches!(node.deny(bring("other:/data")), Denial::NoSuchDisk { .. }));
    assert!(matches!(node.deny(bring("data:/again")), Denial::DiskConflict(_)));
}

#[test]
fn a_disk_named_twice_or_a_path_taken_is_refused_with_the_pool() {
    let mut node = node_with_disk();
    node.accept(disk("demo/more", 16));
    for mounts in [["data:/a", "data:/b"], ["data:/a", "more:/a"]] {
        let denial = node.deny(pool_with("demo/web", &mounts));
        assert!(denial.to_string().starts_with("pool demo/web: disk"), "{denial}");
    }
}

#[test]
fn a_disk_that_something_has_is_not_removed_and_all_of_it_is_named() {
    let mut node = node_with_disk();
    node.accept(pool_with("demo/web", &["data:/data"]));
    node.accept(create("demo/web", 1, false));
    let instance = node.instances("demo/web")[0].path.clone();
    let text = node.deny(remove("demo/data")).to_string();
    assert!(text.contains(&format!("pool demo/web, instance {instance}")), "{text}");
    node.accept(Request::PoolDestroy { path: "demo/web".parse().unwrap(), force: true });
    node.accept(remove("demo/data"));
    assert!(matches!(node.deny(disk("demo/data", 16)), Denial::BeingRemoved { .. }));
    node.accept(remove("demo/data"));
    node.forget_the_gone();
    assert!(matches!(node.deny(remove("demo/data")), Denial::NoSuchDisk { .. }));
    node.accept(disk("demo/data", 16));
}

#[test]
fn a_disk_grows_while_nothing_runs_with_it_and_never_shrinks() {
    let mut node = node_with_disk();
    node.accept(pool_with("demo/web", &["data:/data:ro"]));
    node.accept(scale("demo/web", 1));
    let text = said(&node.deny(resize("demo/data", 65)));
    assert!(text.contains("grows only while") && text.contains("`mvm stop demo/web/i-"), "{text}");
    node.accept(resize("demo/data", 64));
    node.accept(scale("demo/web", 0));
    node.accept(resize("demo/data", 100));
    let text = node.deny(resize("demo/data", 99)).to_string();
    assert!(text.contains("has 100 MiB and cannot shrink to 99 MiB: "), "{text}");
    for size_mib in [0, 15, 1 << 40] {
        assert!(matches!(node.deny(disk("demo/x", size_mib)), Denial::Number { .. }));
    }
}

#[test]
fn disks_count_against_the_quota_of_the_tenant_and_the_capacity_of_the_node() {
    let mut node = Node::new();
    let quota = Quota { disk_mib: Some(100), ..Quota::default() };
    node.accept(tenant_with("demo", quota, None));
    node.accept(disk("demo/a", 60));
    let text = said(&node.deny(disk("demo/b", 41)));
    assert!(text.contains("allows 100 MiB of disk: 60 in use, 41 more requested"), "{text}");
    node.accept(disk("demo/b", 40));
    assert!(matches!(node.deny(resize("demo/a", 61)), Denial::OverLimit(_)));
    assert_eq!(tenant_usage(&node.desired, &|_| false, &"demo".parse().unwrap()).disk_mib, 100);
    assert_eq!(node_usage(&node.desired, &|_| false).disk_mib, 100);
    node.facts.capacity.disk_mib = 100;
    node.accept(tenant("other"));
    assert!(matches!(node.deny(disk("other/a", 16)), Denial::OverLimit(_)));
}

#[test]
fn a_tenant_with_disks_goes_only_by_force_and_stays_after_a_down() {
    let mut node = node_with_disk();
    let name: crate::name::TenantName = "demo".parse().unwrap();
    let destroy = |force| Request::TenantDestroy { name: name.clone(), force };
    let text = said(&node.deny(destroy(false)));
    assert!(text.contains("still has data disks: demo/data; "), "{text}");
    assert!(text.contains("`mvm disk rm demo/data`"), "{text}");
    let document = document(serde_json::json!({
        "tenant": "demo",
        "disks": { "data": { "size_mib": 128 }, "logs": { "size_mib": 16 } },
        "pools": { "web": { "disks": [{ "name": "logs", "path": "/var/log" }] } },
    }));
    node.accept(Request::Apply { document: document.clone() });
    assert_eq!(node.desired.disks.values().map(|disk| disk.size_mib).sum::<u64>(), 144);
    let edit = node.accept(Request::Remove { document });
    assert!(edit.notes.iter().any(|note| note.contains("demo/data, demo/logs")), "{edit:?}");
    node.forget_the_gone();
    assert!(node.desired.tenants.contains_key(&name) && node.desired.pools.is_empty());
    assert_eq!(node.desired.disks.len(), 2);
    node.accept(destroy(true));
    node.forget_the_gone();
    assert_eq!(node.desired, Desired::default());
}
