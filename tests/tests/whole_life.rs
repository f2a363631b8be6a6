//! An instance from the first command to the last, and nothing left of it.

use mvm_tests::Node;

#[test]
fn an_instance_answers_and_leaves_nothing() {
    let Some(node) = Node::new() else { return };
    node.small_pool("acme/web", &[]);
    let path = node.boot("acme/web");
    assert_eq!(node.guest(&path, "uname -s"), "Linux");
    assert_eq!(node.qemu_pids().len(), 1);
    node.ok(&["tenant", "destroy", "acme", "--force"]);
    assert_eq!(node.leftovers(), [""; 0]);
}
