//! Published ports: one pool's each, on the whole node.

use super::*;

fn pool_with(path: &str, published: &[&str]) -> Request {
    let publish = published.iter().map(|publish| publish.parse().unwrap()).collect();
    Request::PoolCreate {
        path: path.parse().unwrap(),
        spec: PoolSpec { publish, ..PoolSpec::default() }.into(),
    }
}

fn node_with_web() -> Node {
    let mut node = Node::new();
    node.accept(tenant("demo"));
    node.accept(tenant("other"));
    node.accept(pool_with("demo/web", &["8080:80", "0.0.0.0:8443:443"]));
    node
}

#[test]
fn a_port_that_another_pool_has_is_refused() {
    let mut node = node_with_web();
    for (pool, publish, holder) in [
        ("demo/api", "8080:8000", "pool demo/web"),
        ("demo/api", "127.0.0.1:8443:1", "pool demo/web"),
        ("other/api", "[::]:8080:80", "another tenant's pool"),
    ] {
        let denial = node.deny(pool_with(pool, &["9000:9000", publish]));
        let text = format!("{denial}; {}", denial.hint().unwrap_or_default());
        assert!(text.contains(&format!("for pool {pool}: {holder} listens there")), "{text}");
        assert!(text.contains(publish) && text.contains("publish another port"), "{text}");
    }
    node.accept(pool_with("demo/api", &["8081:80", "127.0.0.2:8080:80"]));
}

#[test]
fn two_ports_of_one_pool_do_not_listen_in_one_place() {
    let mut node = node_with_web();
    let denial = node.deny(pool_with("demo/api", &["9000:80", "0.0.0.0:9000:81"]));
    assert!(matches!(denial, Denial::Spec { .. }), "{denial}");
}

#[test]
fn a_document_takes_over_a_port_within_itself_and_from_nobody_else() {
    let mut node = node_with_web();
    let document = |text: &str| Request::Apply { document: serde_json::from_str(text).unwrap() };
    node.accept(document(
        r#"{"tenant":"demo","pools":{"web":{"publish":["9090:80"]},"api":{"publish":["8080:80"]}}}"#,
    ));
    let stolen = document(r#"{"tenant":"other","pools":{"a":{"publish":["9090:80"]}}}"#);
    let denial = node.deny(stolen);
    assert!(denial.to_string().contains("for pool other/a: another tenant's pool"), "{denial}");
}

#[test]
fn other_ports_concern_the_instances_that_are_there() {
    let mut node = node_with_web();
    let document = |publish: &str, vcpus: u32| {
        let text = format!(
            r#"{{"tenant":"demo","pools":{{"web":{{"publish":["{publish}"],"vcpus":{vcpus}}}}}}}"#
        );
        Request::Apply { document: serde_json::from_str(&text).unwrap() }
    };
    let follows = |edit: &Edit| edit.notes.iter().any(|note| note.contains("stay as they are"));
    node.accept(document("8080:80", 1));
    assert!(!follows(&node.accept(document("9090:80", 1))));
    assert!(follows(&node.accept(document("9090:80", 2))));
}

#[test]
fn a_pool_that_is_being_removed_has_given_its_ports_up() {
    let mut node = node_with_web();
    node.accept(Request::PoolDestroy { path: "demo/web".parse().unwrap(), force: true });
    node.accept(pool_with("demo/api", &["8080:80"]));
}
