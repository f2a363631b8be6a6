//! Data disks in the guest: what a fresh one holds, where it is found, and what it gives back.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown, symlink};
use std::path::Path;

use mvm_tests::archive::docker_archive;
use mvm_tests::run::tool;
use mvm_tests::{LIMIT, Node, until};

/// An image with a directory of its user's, a link to a directory, and one to nowhere.
fn image(node: &Node, dir: &Path) -> String {
    let root = dir.join("root");
    for name in ["bin", "etc", "dev", "proc", "sys", "run", "tmp", "root", "var", "data/sub"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    let packages = fs::read_dir(node.dir().join("cache/packages")).unwrap();
    let package = packages
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("busybox-static"))
        .unwrap();
    let unpacked = dir.join("busybox");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    tool("dpkg-deb", &["-x", &text(&package), &text(&unpacked)]).ok();
    fs::copy(unpacked.join("bin/busybox"), root.join("bin/busybox")).unwrap();
    for name in ["sh", "cat", "ls", "stat", "grep", "sleep", "touch", "head", "rm", "sync", "df"] {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    symlink("../run", root.join("var/run")).unwrap();
    symlink("nowhere", root.join("var/lost")).unwrap();
    fs::write(root.join("data/sub/seed"), "seed").unwrap();
    for name in ["data", "data/sub", "data/sub/seed"] {
        chown(root.join(name), Some(1000), Some(1000)).unwrap();
    }
    tool("chmod", &["0750", &text(&root.join("data"))]).ok();
    let parts = dir.join("parts");
    fs::create_dir(&parts).unwrap();
    let layer = parts.join("layer.tar");
    tool("tar", &["-C", &text(&root), "--numeric-owner", "-cf", &text(&layer), "."]).ok();
    format!(
        "docker-archive:{}",
        docker_archive(&parts, "layer.tar", &["sleep", "100000"]).display()
    )
}

fn with<'a>(image: &'a str, options: &[&'a str]) -> Vec<&'a str> {
    [&["--image", image, "--restart", "never"], options].concat()
}

fn allocated(file: &Path) -> u64 {
    fs::metadata(file).unwrap().blocks() * 512
}

#[test]
fn a_disk_begins_as_the_image_s_directory_is_found_through_links_and_gives_back_what_is_deleted() {
    let Some(node) = Node::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = image(&node, dir.path());
    node.ok(&["tenant", "create", "acme", "--disk", "10G"]);
    for disk in ["acme/data", "acme/db"] {
        node.ok(&["disk", "create", disk, "--size", "256M"]);
    }
    let on = ["--disk-attach", "data:/data", "--disk-attach", "db:/var/run/db"];
    node.small_pool("acme/web", &with(&image, &on));
    let path = node.boot("acme/web");

    // The image's user finds what the image has prepared for it, and nothing else.
    assert_eq!(node.guest(&path, "ls -A /data"), "sub");
    assert_eq!(node.guest(&path, "stat -c '%u:%g %a' /data"), "1000:1000 750");
    assert_eq!(node.guest(&path, "ls -A /var/run/db"), "");
    let as_user = "cat /data/sub/seed && touch /data/own";
    node.ok(&["exec", "-u", "1000", &path, "--", "sh", "-c", as_user]);

    // Mounted once, whatever leads there, and found again by a wake and by the next agent.
    let mounts = || node.guest(&path, "grep -c '^/dev/vdd /run/db ext4 rw' /proc/mounts");
    node.guest(&path, "echo kept > /run/db/file; echo memory > /tmp/memory");
    assert_eq!(mounts(), "1");
    node.ok(&["sleep", &path]);
    assert_eq!(node.guest(&path, "cat /tmp/memory /var/run/db/file"), "memory\nkept");
    node.ok(&["agent", "stop"]);
    assert_eq!(mounts(), "1");
    assert_eq!(node.instance(&path)["boots"], 1);

    // Files of either kernel are copied as what reading them gives.
    let mtu = "/sys/class/net/lo/mtu";
    node.ok(&["cp", mtu, &format!("{path}:/tmp/mtu")]);
    assert_eq!(node.guest(&path, "cat /tmp/mtu"), fs::read_to_string(mtu).unwrap().trim());
    let copy = dir.path().join("version");
    node.ok(&["cp", &format!("{path}:/proc/version"), copy.to_str().unwrap()]);
    let read = node.guest(&path, "cat /proc/version");
    assert_eq!(fs::read_to_string(&copy).unwrap().trim(), read);

    // What is deleted takes no space on the host, of the layer and of a disk alike.
    let layer = node.dir().join("instances").join(path.rsplit('/').next().unwrap());
    let files =
        [("/root", layer.join("layer.ext4")), ("/data", node.dir().join("disks/acme/data.ext4"))];
    for (place, file) in files {
        let before = allocated(&file);
        let bytes = 60_000_000;
        node.guest(&path, &format!("head -c {bytes} /dev/urandom > {place}/big; sync"));
        assert!(allocated(&file) >= before + bytes, "{place} is written to");
        node.guest(&path, &format!("rm {place}/big; sync"));
        until(&format!("{place} gives back what was deleted"), LIMIT, || {
            (allocated(&file) <= before + bytes / 20).then_some(())
        });
    }

    // A writer that is never woken leaves a disk that a reader can mount.
    node.guest(&path, "echo late > /run/db/late");
    node.ok(&["sleep", &path]);
    assert!(node.ok(&["disk", "list"]).contains(&path), "a sleeper holds its disks");
    node.ok(&["stop", &path]);
    node.small_pool("acme/read", &with(&image, &["--disk-attach", "db:/var/run/db:ro"]));
    let reader = node.boot("acme/read");
    assert_eq!(node.guest(&reader, "cat /run/db/file /run/db/late"), "kept\nlate");
    node.ok(&["pool", "destroy", "acme/read", "--force"]);

    // It is filled once.
    node.ok(&["start", &path]);
    node.guest(&path, "rm -r /data/sub /data/own");
    node.ok(&["restart", &path]);
    assert_eq!(node.guest(&path, "ls -A /data"), "");
    node.ok(&["stop", &path]);

    node.small_pool("acme/lost", &with(&image, &["--disk-attach", "db:/var/lost/db"]));
    node.mvm(&["instance", "create", "acme/lost", "--start"])
        .fails_with(1)
        .says(&["/var/lost is a link to nowhere, which leads nowhere"]);
}
