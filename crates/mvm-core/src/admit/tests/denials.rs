//! What people read when a request is refused: what, why, and what to type next.

use super::*;

/// The message and the hint, as the command line shows them.
#[track_caller]
fn shown(node: &mut Node, request: Request) -> String {
    let denial = node.deny(request);
    match denial.hint() {
        Some(hint) => format!("{denial}\n{hint}"),
        None => denial.to_string(),
    }
}

#[test]
fn what_does_not_exist_can_be_created_or_looked_up() {
    let mut node = Node::with_pool();
    assert_eq!(
        shown(&mut node, pool("ghost/web")),
        "there is no tenant ghost\n\
         create it with `mvm tenant create ghost`, or see `mvm tenant list`"
    );
    assert_eq!(
        shown(&mut node, scale("demo/ghost", 1)),
        "there is no pool demo/ghost\n\
         create it with `mvm pool create demo/ghost`, or see `mvm pool list`"
    );
    assert_eq!(
        shown(&mut node, start("i-0123", false)),
        "no instance matches i-0123\nsee `mvm ps -a`"
    );
}

#[test]
fn a_missing_tenant_or_pool_is_named_before_a_missing_instance() {
    let mut node = Node::with_pool();
    assert!(matches!(node.deny(start("ghost", true)), Denial::NoSuchName { .. }));
    assert!(matches!(node.deny(start("demo/ghost", true)), Denial::NoSuchPool { .. }));
    assert!(matches!(node.deny(start("demo/web", true)), Denial::NoInstances { .. }));
}

#[test]
fn a_selector_that_means_several_lists_them() {
    let mut node = Node::with_pool();
    node.accept(create("demo/web", 2, false));
    assert_eq!(
        shown(&mut node, start("demo/web", false)),
        "demo/web matches 2 instances: demo/web/i-00000001, demo/web/i-00000002\n\
         name one of them, or pass --all"
    );
    node.accept(create("demo/web", 8, false));
    let text = shown(&mut node, start("demo/web", false));
    assert!(text.contains("i-00000008 and 2 more\n"), "{text}");
}

#[test]
fn what_still_runs_is_named_with_the_command_that_goes_on() {
    let mut node = Node::with_pool();
    node.accept(create("demo/web", 1, true));
    let running = "has running instances: demo/web/i-00000001";
    let hint = "stop them first, or stop and remove them with";
    assert_eq!(
        shown(&mut node, destroy("demo/web", true, false)),
        format!("demo/web {running}\n{hint} `mvm rm -f demo/web --all`")
    );
    assert_eq!(
        shown(&mut node, destroy("i-00000001", false, false)),
        format!("i-00000001 {running}\n{hint} `mvm rm -f i-00000001`")
    );
    let everything = Request::InstanceDestroy { selector: Selector::All, all: true, force: false };
    assert_eq!(
        shown(&mut node, everything),
        format!("this node {running}\n{hint} `mvm rm -f --all`")
    );
    let path = "demo/web".parse().unwrap();
    assert_eq!(
        shown(&mut node, Request::PoolDestroy { path, force: false }),
        format!("pool demo/web {running}\n{hint} `mvm pool destroy demo/web --force`")
    );
    assert_eq!(
        shown(&mut node, Request::TenantDestroy { name: "demo".parse().unwrap(), force: false }),
        "tenant demo still has pools: demo/web\n\
         remove them first, or everything with `mvm tenant destroy demo --force`"
    );
}

#[test]
fn a_quota_says_what_it_allows_what_is_in_use_and_how_to_raise_it() {
    let mut node = Node::new();
    let quota = Quota { mem_mib: Some(600), running: Some(2), ..Quota::default() };
    node.accept(tenant_with("demo", quota, None));
    node.accept(pool("demo/web"));
    node.accept(scale("demo/web", 1));
    assert_eq!(
        shown(&mut node, scale("demo/web", 3)),
        "the quota of tenant demo allows 600 MiB of memory: 256 in use, 512 more requested\n\
         raise it with `mvm tenant update demo --mem 768`"
    );
    let quota = Quota { instances_per_pool: Some(2), ..Quota::default() };
    node.accept(Request::TenantUpdate { name: "demo".parse().unwrap(), quota, lift: vec![] });
    assert_eq!(
        shown(&mut node, create("demo/web", 2, false)),
        "the quota of tenant demo (pool demo/web) allows 2 instances per pool: 1 in use, 2 more \
         requested\nraise it with `mvm tenant update demo --instances-per-pool 3`"
    );
}

#[test]
fn a_full_node_and_a_full_subnet_say_so() {
    let mut node = Node::new();
    node.facts.capacity.vcpus = 2;
    node.accept(tenant_with("demo", Quota::default(), Some("10.9.0.0/29")));
    node.accept(pool("demo/web"));
    assert_eq!(
        shown(&mut node, scale("demo/web", 3)),
        "this node allows 2 vCPUs: 0 in use, 3 more requested\n\
         stop or destroy something first: `mvm ps -a`"
    );
    node.accept(create("demo/web", 3, false));
    assert_eq!(
        shown(&mut node, create("demo/web", 2, false)),
        "subnet 10.9.0.0/29 of tenant demo allows 4 instances: 3 in use, 2 more requested\n\
         destroy what is not needed: `mvm ps -a`"
    );
}

#[test]
fn subnets_are_refused_with_the_reason() {
    let mut node = Node::with_pool();
    node.facts.foreign_subnets.push("192.168.1.0/24".parse().unwrap());
    let other = "pass another --subnet, or none to have one chosen";
    for (subnet, expected) in [
        (
            "10.240.1.0/28",
            format!("subnet 10.240.1.0/28 overlaps 10.240.1.0/24 of tenant demo\n{other}"),
        ),
        (
            "192.168.0.0/16",
            format!(
                "subnet 192.168.0.0/16 overlaps 192.168.1.0/24, which this machine uses itself\n\
                 {other}"
            ),
        ),
        (
            "10.1.2.3/24",
            "subnet 10.1.2.3/24 has host bits set; did you mean 10.1.2.0/24?".to_owned(),
        ),
    ] {
        let request = tenant_with("other", Quota::default(), Some(subnet));
        assert_eq!(shown(&mut node, request), expected);
    }
    let moved = document(serde_json::json!({"tenant": "demo", "subnet": "10.5.0.0/24"}));
    assert_eq!(
        shown(&mut node, Request::Apply { document: moved }),
        "tenant demo has subnet 10.240.1.0/24, and a subnet cannot be changed to 10.5.0.0/24\n\
         leave the subnet out of the document, or `mvm tenant destroy demo` first"
    );
}

#[test]
fn numbers_and_names_that_make_no_sense_are_refused() {
    let mut node = Node::with_pool();
    for (request, expected) in [
        (create("demo/web", 0, false), "the number of instances is 0, but must be 1 to 1000"),
        (scale("demo/web", 1_001), "the number of instances is 1001, but must be at most 1000"),
        (tenant("demo"), "tenant demo exists already"),
        (pool("demo/web"), "pool demo/web exists already"),
    ] {
        assert_eq!(shown(&mut node, request), expected);
    }
    let spec = PoolSpec { vcpus: 0, ..PoolSpec::default() };
    let tiny = Request::PoolCreate { path: "demo/tiny".parse().unwrap(), spec: spec.into() };
    assert_eq!(shown(&mut node, tiny), "pool demo/tiny: vcpus is 0, but must be 1 to 32");
    let name = "demo".parse().unwrap();
    let lift = Request::TenantUpdate { name, quota: Quota::default(), lift: vec!["ram".into()] };
    assert_eq!(
        shown(&mut node, lift),
        "`ram` is not a limit: expected one of vcpus, mem, disk, running, pools, \
         instances-per-pool"
    );
}

#[test]
fn what_is_being_removed_is_to_be_waited_for() {
    let mut node = Node::with_pool();
    node.accept(create("demo/web", 1, false));
    node.accept(Request::PoolDestroy { path: "demo/web".parse().unwrap(), force: false });
    assert_eq!(
        shown(&mut node, pool("demo/web")),
        "pool demo/web is being removed\nwait until it is gone (`mvm ps -a`), then try again"
    );
}
