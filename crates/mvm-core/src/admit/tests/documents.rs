//! `up` and `down`: the document is a level, so the second time changes nothing.

use serde_json::json;

use super::*;
use crate::record::{BuildState, PoolStatus};
use crate::settings::Settings;

fn two_pools() -> Document {
    document(json!({
        "tenant": "demo",
        "quota": {"vcpus": 8},
        "pools": {"web": {"running": 2}, "work": {"running": 1, "vcpus": 2}},
    }))
}

#[test]
fn a_document_makes_what_it_names() {
    let mut node = Node::new();
    let edit = node.accept(Request::Apply { document: two_pools() });
    assert_eq!((edit.instances.len(), edit.pools.len()), (3, 2));
    assert_eq!(node.ids("demo/web", DesiredState::Running).len(), 2);
    assert_eq!(node.instances("demo/work")[0].spec.vcpus, 2);
    assert_eq!(node.desired.tenants[&"demo".parse::<TenantName>().unwrap()].quota.vcpus, Some(8));
}

#[test]
fn a_document_is_made_as_a_whole_or_not_at_all() {
    let mut node = Node::new();
    let mut too_large = two_pools();
    too_large.quota = Some(Quota { vcpus: Some(3), ..Quota::default() });
    assert!(matches!(node.deny(Request::Apply { document: too_large }), Denial::OverLimit(_)));
    assert_eq!(node.desired, Desired::default());
}

#[test]
fn pools_that_the_document_does_not_name_stay() {
    let mut node = Node::with_pool();
    node.accept(scale("demo/web", 1));
    let other = document(json!({"tenant": "demo", "pools": {"work": {}}}));
    let edit = node.accept(Request::Apply { document: other.clone() });
    assert_eq!(edit.notes, ["pool demo/web is not in the document and stays as it is"]);
    let edit = node.accept(Request::Remove { document: other });
    assert_eq!(edit.notes, ["tenant demo stays, as the document does not name demo/web"]);
    assert_eq!(node.ids("demo/web", DesiredState::Running).len(), 1);
}

#[test]
fn a_document_that_is_down_stays_down_and_can_come_up_again() {
    let mut node = Node::new();
    let (up, down) =
        (Request::Apply { document: two_pools() }, Request::Remove { document: two_pools() });
    node.accept(up.clone());
    node.accept(down.clone());
    let gone = node.desired.clone();
    node.accept(down.clone());
    assert_eq!(node.desired, gone);
    assert!(matches!(node.deny(up.clone()), Denial::BeingRemoved { .. }));
    node.forget_the_gone();
    assert_eq!(node.accept(down).notes, ["tenant demo does not exist: nothing to do"]);
    node.accept(up);
}

#[test]
fn a_document_with_a_spec_out_of_range_is_refused_for_old_and_new_pools() {
    let tiny = document(json!({"tenant": "demo", "pools": {"web": {"mem_mib": 1}}}));
    for mut node in [Node::new(), Node::with_pool()] {
        let denial = node.deny(Request::Apply { document: tiny.clone() });
        assert_eq!(denial.to_string(), "pool demo/web: mem_mib is 1, but must be at least 96");
    }
}

#[test]
fn another_image_in_the_document_is_built() {
    let mut node = Node::new();
    let with = |image: &str| {
        let pools = serde_json::json!({ "web": { "image": image } });
        document(serde_json::json!({ "tenant": "demo", "pools": pools }))
    };
    let path: PoolPath = "demo/web".parse().unwrap();
    node.accept(Request::Apply { document: with("app:1") });
    let before = node.desired.pools[&path].build_generation;
    node.accept(Request::Apply { document: with("app:1") });
    assert_eq!(node.desired.pools[&path].build_generation, before, "the same is no news");
    node.accept(Request::Apply { document: with("app:2") });
    assert_eq!(node.desired.pools[&path].build_generation, before + 1);
}

#[test]
fn a_second_up_after_a_failed_build_builds_at_once() {
    let mut node = Node::new();
    let pools = serde_json::json!({ "web": {} });
    let document = document(serde_json::json!({ "tenant": "demo", "pools": pools }));
    let path: PoolPath = "demo/web".parse().unwrap();
    node.accept(Request::Apply { document: document.clone() });
    let before = node.desired.pools[&path].build_generation;
    let build = BuildState::Failed { error: "no mirror".into(), at_unix_ms: 1, failures: 9 };
    let status = PoolStatus { build_generation: before, build, ..PoolStatus::default() };
    node.facts.observed.pools.insert(path.clone(), status);
    node.accept(Request::Apply { document });
    assert_eq!(node.desired.pools[&path].build_generation, before + 1);
    let observed = crate::record::Observed {
        pools: node.facts.observed.pools.clone(),
        ..crate::record::Observed::default()
    };
    let limits = crate::plan::PlanLimits { starting: 1 };
    let plan = crate::plan::plan(&node.desired, &observed, limits, 2);
    let build = crate::plan::Action::Build { pool: path, generation: before + 1 };
    assert!(plan.actions.contains(&build), "{plan:?}");
}

#[test]
fn an_update_builds_and_a_rollback_goes_back_one_revision_at_a_time() {
    let mut node = Node::with_pool();
    let path: PoolPath = "demo/web".parse().unwrap();
    let image = |text: &str| Some(text.parse().unwrap());
    let denial = node.deny(Request::PoolRollback { path: path.clone() });
    assert!(denial.hint().unwrap().contains("mvm pool update demo/web"), "{denial}");
    let update =
        |image| Request::PoolUpdate { path: path.clone(), image, settings: Settings::default() };
    assert!(matches!(node.deny(update(image("oci:relative"))), Denial::Spec { .. }));
    let [one, two] = [1, 2].map(|number| crate::name::RevisionId::from_digest([number; 8]));
    let status = PoolStatus::default()
        .built(one.clone(), &image("app:1").unwrap())
        .built(two, &image("app:2").unwrap());
    node.accept(update(image("app:2")));
    node.facts.observed.pools.insert(path.clone(), status);
    node.accept(Request::PoolRollback { path: path.clone() });
    let pool = &node.desired.pools[&path];
    assert_eq!((pool.rolled_back_to.as_ref(), pool.build_generation), (Some(&one), 2));
    assert_eq!(pool.spec.image.to_string(), "docker.io/library/app:1");
    node.accept(update(None));
    let pool = &node.desired.pools[&path];
    assert_eq!((pool.rolled_back_to.as_ref(), pool.build_generation), (None, 3));
    let set = |name: &str, value: &str| {
        let sysctl = [(name.to_owned(), value.to_owned())].into();
        let settings = Settings { sysctl, ..Settings::default() };
        Request::PoolUpdate { path: path.clone(), image: None, settings }
    };
    node.accept(set("vm.a", "1"));
    node.accept(set("vm.b", "2"));
    assert!(matches!(node.deny(set("../vm", "2")), Denial::Spec { .. }));
    assert_eq!(node.desired.pools[&path].spec.settings.sysctl.len(), 2);
}

#[test]
fn a_document_without_an_image_leaves_a_pool_its_own() {
    let mut node = Node::new();
    let with = |pool: serde_json::Value| {
        document(serde_json::json!({ "tenant": "demo", "pools": { "web": pool } }))
    };
    let path: PoolPath = "demo/web".parse().unwrap();
    node.accept(Request::Apply { document: with(json!({ "image": "nginx:1.27" })) });
    let before = node.desired.pools[&path].clone();
    let silent = with(json!({ "mem_mib": 512 }));
    let again: Document = serde_json::from_value(serde_json::to_value(&silent).unwrap()).unwrap();
    assert_eq!(again, silent, "a command sends it as it was written");
    node.accept(Request::Apply { document: silent });
    let pool = &node.desired.pools[&path];
    assert_eq!((&pool.spec.image, pool.spec.mem_mib), (&before.spec.image, 512));
    assert_eq!(pool.build_generation, before.build_generation);
    node.accept(Request::Apply { document: with(json!({ "image": "builtin" })) });
    assert_eq!(node.desired.pools[&path].spec.image, crate::image::ImageSpec::Builtin);
}

#[test]
fn a_document_that_changes_how_many_run_says_so() {
    let mut node = Node::new();
    node.accept(Request::Apply { document: two_pools() });
    node.accept(scale("demo/web", 4));
    let notes = node.accept(Request::Apply { document: two_pools() }).notes;
    assert_eq!(notes, ["pool demo/web: 2 of it run, as the document says, and no longer 4"]);
    assert_eq!(node.accept(Request::Apply { document: two_pools() }).notes, [""; 0]);
}

#[test]
fn a_document_says_what_keeps_instances_from_standing_by() {
    let mut node = Node::new();
    let ready = document(json!({"tenant": "demo", "pools": {"web": {"ready": 2}}}));
    for _ in 0..2 {
        let notes = node.accept(Request::Apply { document: ready.clone() }).notes;
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains("`mvm pool warm-up demo/web`"), "{notes:?}");
    }
}

#[test]
fn instances_that_a_changed_pool_leaves_behind_are_told_from_new_ones() {
    use crate::outdated::{SpecPart, outdated};
    let mut node = Node::new();
    let with = |pool: serde_json::Value| {
        let disks = json!({"a": {"size_mib": 64}, "b": {"size_mib": 64}});
        document(json!({"tenant": "demo", "disks": disks, "pools": {"web": pool}}))
    };
    let ro = |name: &str| json!({"name": name, "path": format!("/{name}"), "read_only": true});
    node.accept(Request::Apply { document: with(json!({"disks": [ro("a")]})) });
    let own = vec!["b:/b:ro".parse().unwrap()];
    let pool: PoolPath = "demo/web".parse().unwrap();
    let create = Request::InstanceCreate {
        pool: pool.clone(),
        count: 1,
        start: true,
        disks: own,
        cold: false,
    };
    node.accept(create);
    let [one, two] = [1, 2].map(|number| crate::name::RevisionId::from_digest([number; 8]));
    let all = |node: &Node, builds| -> Vec<Vec<SpecPart>> {
        let record = &node.desired.pools[&pool];
        let instances = node.instances("demo/web");
        instances.iter().map(|i| outdated(i, Some(&one), record, builds)).collect()
    };
    let nothing: Vec<SpecPart> = vec![];
    assert_eq!(
        all(&node, Some(&one)),
        [nothing.clone(), nothing.clone()],
        "its own disk is no difference"
    );
    assert_eq!(all(&node, None), [nothing.clone(), nothing.clone()]);
    assert_eq!(all(&node, Some(&two)), [[SpecPart::Image], [SpecPart::Image]]);

    let changed = json!({"running": 3, "mem_mib": 300, "disks": [], "ready": 2,
        "publish": ["8080:80"], "env": {"A": "b"}});
    node.accept(Request::Apply { document: with(changed) });
    let behind = vec![SpecPart::MemMib, SpecPart::Disks, SpecPart::Process];
    assert_eq!(all(&node, Some(&one)), [behind.clone(), behind.clone(), nothing]);
    let selector = crate::name::Selector::Pool(pool.clone());
    node.accept(Request::InstanceRestart { selector, all: true, grace_ms: 0 });
    assert_eq!(all(&node, Some(&one))[..2], [behind.clone(), behind], "a restart keeps the spec");
}

#[test]
fn a_request_with_an_unknown_field_is_refused_by_its_name_at_any_depth() {
    for text in [
        r#"{"request":"pool_build","path":"demo/web","when":"now"}"#,
        r#"{"request":"pool_create","path":"demo/web","spec":{"when":1}}"#,
        r#"{"request":"pool_create","path":"demo/web","spec":{"rates":{"when":1}}}"#,
        r#"{"request":"pool_policy","path":"demo/web","policy":{"when":1}}"#,
        r#"{"request":"pool_update","path":"demo/web","settings":{"when":{}}}"#,
        r#"{"request":"tenant_create","name":"demo","quota":{"when":1}}"#,
        r#"{"request":"instance_create","pool":"demo/web","count":1,"start":true,
            "disks":[{"name":"a","path":"/a","when":1}]}"#,
        r#"{"request":"apply","document":{"tenant":"demo","pools":{"a":{"when":1}}}}"#,
    ] {
        let error = serde_json::from_str::<Request>(text).unwrap_err().to_string();
        assert!(error.starts_with("unknown field `when`"), "{text}: {error}");
    }
}

#[test]
fn a_spec_is_asked_for_without_what_it_does_not_use() {
    let spec = PoolSpec { ready: 2, ..PoolSpec::default() };
    let request =
        Request::PoolCreate { path: "demo/web".parse().unwrap(), spec: Box::new(spec.clone()) };
    let json = serde_json::to_value(&request).unwrap();
    assert_eq!((&json["spec"]["ready"], &json["spec"]["mem_mib"]), (&2.into(), &256.into()));
    assert_eq!(json["spec"].get("vmm"), None);
    assert_eq!(serde_json::from_value::<Request>(json).unwrap(), request);
}
