//! Images of other people: pulled from a registry, updated, rolled back and collected.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::path::Path;

use mvm_host::process::find_program;
use mvm_tests::run::tool;
use mvm_tests::slow_proxy::SlowProxy;
use mvm_tests::{LIMIT, Node, Registry, buildah, until};
use rustix::process::Signal;

/// What makes the images.
const TOOLS: [&str; 3] = ["skopeo", "umoci", "busybox"];

/// Pushes a busybox system in which `/greeting` says this, in two layers.
fn push(registry: &Registry, name: &str, greeting: &str) -> String {
    let layout = registry.dir().join("layout");
    let bundle = registry.dir().join("bundle");
    for dir in [&layout, &bundle] {
        let _ = fs::remove_dir_all(dir);
    }
    let image = format!("{}:t", layout.display());
    let bundle = bundle.to_str().unwrap();
    tool("umoci", &["init", "--layout", layout.to_str().unwrap()]).ok();
    tool("umoci", &["new", "--image", &image]).ok();
    tool("umoci", &["unpack", "--image", &image, bundle]).ok();
    let root = Path::new(bundle).join("rootfs");
    fs::create_dir(root.join("bin")).unwrap();
    fs::copy(find_program("busybox").unwrap(), root.join("bin/busybox")).unwrap();
    for applet in ["sh", "cat", "sleep", "stat"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    tool("umoci", &["repack", "--refresh-bundle", "--image", &image, bundle]).ok();
    fs::write(root.join("greeting"), greeting).unwrap();
    std::os::unix::fs::chown(root.join("greeting"), Some(4321), Some(8765)).unwrap();
    tool("umoci", &["repack", "--image", &image, bundle]).ok();
    tool("umoci", &["config", "--image", &image, "--config.user", "4321"]).ok();
    let pushed = format!("{}/{name}", registry.host());
    let to = format!("docker://{pushed}");
    let from = format!("oci:{image}");
    let copy = ["--insecure-policy", "copy", "-q", "--dest-tls-verify=false", &from, &to];
    tool("skopeo", &copy).ok();
    pushed
}

#[test]
fn an_image_of_a_registry_boots_and_a_moved_tag_is_followed_and_left_again() {
    let Some(node) = Node::new() else { return };
    // What earlier tests have left in the cache is none of this test's.
    node.ok(&["image", "gc"]);
    let Some(registry) = Registry::start(&TOOLS) else { return };
    let image = push(&registry, "app:v1", "hello from layer two\n");
    let pool = node.json(&["tenant", "create", "demo"]);
    assert!(pool["notes"].is_array());
    node.ok(&["pool", "create", "demo/app", "--image", &image]);
    let instance = node.boot("demo/app");
    let said = node.ok(&["exec", &instance, "--", "cat", "/greeting"]);
    assert_eq!(said, "hello from layer two\n");
    let owner = node.ok(&["exec", &instance, "--", "stat", "-c", "%u:%g", "/greeting"]);
    assert_eq!(owner, "4321:8765\n");

    let revision = |what: &str| node.json(&["pool", "info", "demo/app"])[what].clone();
    let first = revision("revision");
    push(&registry, "app:v1", "hello again\n");
    node.ok(&["pool", "update", "demo/app"]);
    let second = revision("revision");
    assert_ne!(first, second, "the tag was looked up again");
    assert_eq!(node.instance(&instance)["revision"], first, "what exists stays as it is");
    node.ok(&["pool", "rollback", "demo/app"]);
    assert_eq!((revision("revision"), revision("rolled_back")), (first.clone(), true.into()));
    let nowhere = node.mvm(&["pool", "rollback", "demo/app"]);
    assert_eq!(nowhere.code, 5, "{}", nowhere.stderr);
    assert!(nowhere.stderr.contains("no earlier revision"), "{}", nowhere.stderr);

    let first = first.as_str().unwrap();
    let refused = node.mvm(&["image", "rm", first]);
    assert_eq!(refused.code, 5, "{}", refused.stderr);
    for user in ["pool demo/app", &instance] {
        assert!(refused.stderr.contains(user), "{}", refused.stderr);
    }
    let kinds = |collected: &serde_json::Value| -> Vec<String> {
        let items = collected["items"].as_array().unwrap();
        items.iter().map(|item| item["kind"].as_str().unwrap().to_owned()).collect()
    };
    let would = node.json(&["image", "gc", "--dry-run"]);
    assert_eq!(kinds(&would), ["revision", "layer", "layer"], "the second image");
    let did = node.json(&["image", "gc"]);
    assert_eq!((&did["items"], did["bytes"].as_u64() > Some(0)), (&would["items"], true));
    let images = node.json(&["image", "list"]);
    assert_eq!(images.as_array().unwrap().len(), 1);
    assert_eq!(images[0]["config"]["user"], "4321");
    assert_eq!(kinds(&node.json(&["image", "gc"])), [""; 0], "what is in use stays");
}

#[test]
fn an_image_that_cannot_be_had_is_explained_and_asked_for_again() {
    let Some(node) = Node::new() else { return };
    // What earlier tests have left in the cache is none of this test's.
    node.ok(&["image", "gc"]);
    node.ok(&["tenant", "create", "demo"]);
    let wrong = node.mvm(&["pool", "create", "demo/x", "--image", "Not An Image"]);
    assert_eq!(wrong.code, 2, "{}", wrong.stderr);
    assert!(wrong.stderr.contains("expected builtin"), "{}", wrong.stderr);
    node.ok(&["pool", "create", "demo/x", "--image", "oci:no/such/layout"]);
    let failed = node.mvm(&["pool", "build", "demo/x"]);
    assert_eq!(failed.code, 1, "{}", failed.stderr);
    assert!(failed.stderr.contains("no/such/layout"), "{}", failed.stderr);
    let gone = node.mvm(&["pool", "update", "demo/x", "--image", "127.0.0.1:1/app:v1"]);
    assert!(gone.stderr.contains("registry 127.0.0.1:1 cannot be reached"), "{}", gone.stderr);
    node.ok(&["pool", "update", "demo/x", "--image", "builtin"]);
}

#[test]
fn a_pull_goes_on_where_an_agent_that_was_killed_stopped() {
    let Some(node) = Node::new() else { return };
    let Some(registry) = Registry::start(&["buildah"]) else { return };
    let context = registry.dir().join("context");
    fs::create_dir(&context).unwrap();
    buildah::context(&context, "FROM scratch\nCOPY large /\n", &[]);
    // Nothing that gzip makes smaller.
    let mut state = 1_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(8 << 20)
    .collect();
    fs::write(context.join("large"), &bytes).unwrap();
    buildah::build(&context, &format!("docker://{}/large:v1", registry.host()));
    let proxy = SlowProxy::start(registry.host(), 3 << 20);
    node.ok(&["tenant", "create", "demo"]);
    node.ok(&["pool", "create", "demo/p", "--image", &format!("{}/large:v1", proxy.host())]);
    let downloads = node.dir().join("layers/downloads");
    let have = || {
        let files = fs::read_dir(&downloads).into_iter().flatten().flatten();
        files.map(|file| file.metadata().unwrap().len()).sum::<u64>()
    };
    let mut build = node.spawn(&["pool", "build", "demo/p"]);
    until("the download has stopped", LIMIT, || {
        (proxy.has_stopped() && have() > 2 << 20).then_some(())
    });
    // A command that waits would have the next agent started, which goes on.
    build.signal(Signal::KILL);
    drop(build.wait(LIMIT));
    node.kill_agent();
    let kept = have();
    assert!(kept > 2 << 20, "{kept}");
    assert!(!proxy.requests().to_ascii_lowercase().contains("\nrange:"));

    proxy.be_fast();
    node.ok(&["pool", "build", "demo/p"]);
    let requests = proxy.requests().to_ascii_lowercase();
    assert!(requests.contains(&format!("\nrange: bytes={kept}-")), "{kept}: {requests}");
    assert_eq!(have(), 0, "what is unpacked is no download any more");
    assert_eq!(node.json(&["pool", "info", "demo/p"])["build"]["state"], "built");
}

#[test]
fn an_archive_may_come_over_standard_input() {
    let Some(node) = Node::new() else { return };
    // What earlier tests have left in the cache is none of this test's.
    node.ok(&["image", "gc"]);
    let Some(registry) = Registry::start(&TOOLS) else { return };
    push(&registry, "app:v1", "from a pipe\n");
    let archive = registry.dir().join("app.tar");
    let from = format!("oci:{}:t", registry.dir().join("layout").display());
    let to = format!("docker-archive:{}:app:v1", archive.display());
    tool("skopeo", &["--insecure-policy", "copy", "-q", &from, &to]).ok();
    node.ok(&["tenant", "create", "demo"]);
    let args = ["pool", "create", "demo/piped", "--image", "docker-archive:-"];
    node.mvm_with_input(&args, &fs::read(&archive).unwrap()).ok();
    node.ok(&["pool", "build", "demo/piped"]);
    let images = node.json(&["image", "list"]);
    assert_eq!(images[0]["used_by"][0], "pool demo/piped");
    assert_eq!(images[0]["layers"].as_array().unwrap().len(), 2);
}
