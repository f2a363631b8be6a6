//! `up` and `down`: the document is a level, so the second time changes nothing.

use serde_json::json;

use super::*;

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
    assert_eq!(node.desired.tenants[&"demo".parse().unwrap()].quota.vcpus, Some(8));
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
