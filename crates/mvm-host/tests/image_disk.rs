//! Writable layers as the kernel and `e2fsck` see them.

// A skipped test says why, and numbers are shown; a test ends at its first surprise.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod image_support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use image_support::{can_run, names, run, with_own_mounts};
use mvm_host::image::ImageError;
use mvm_host::image::disk::{LayerTemplates, create_layer};

const UID: u32 = 54_321;

fn allocated_kib(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() / 2
}

#[tokio::test]
async fn a_layer_is_sound_private_and_small_whatever_its_size() {
    if !can_run(&["mke2fs", "e2fsck"]) {
        return;
    }
    let state = tempfile::tempdir().unwrap();
    let templates = LayerTemplates::new(state.path());
    for size_mib in [16, 64, 1024, 10 * 1024] {
        let template = templates.ensure(size_mib).await.unwrap();
        let layer = state.path().join(format!("layer-{size_mib}"));
        create_layer(&template, &layer, UID).unwrap();
        let meta = layer.metadata().unwrap();
        assert_eq!(meta.len(), size_mib * 1024 * 1024);
        assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o600, UID, UID));
        let allocated = allocated_kib(&layer);
        println!("{size_mib} MiB: {allocated} KiB allocated");
        assert!(allocated <= 256, "{size_mib} MiB: {allocated} KiB allocated");
        let (sound, output) = run("e2fsck", &["-fn", layer.to_str().unwrap()]);
        assert!(sound, "{output}");
    }
    let made = names(&state.path().join("templates"));
    assert_eq!(made.len(), 4, "no temporary file stays: {made:?}");
}

#[tokio::test]
async fn a_template_is_made_once() {
    if !can_run(&["mke2fs"]) {
        return;
    }
    let state = tempfile::tempdir().unwrap();
    let templates = LayerTemplates::new(state.path());
    let (first, second, third) =
        tokio::join!(templates.ensure(64), templates.ensure(64), templates.ensure(64));
    let first = first.unwrap();
    assert_eq!([&second.unwrap(), &third.unwrap()], [&first, &first]);
    let inode = first.metadata().unwrap().ino();
    assert_eq!(templates.ensure(64).await.unwrap().metadata().unwrap().ino(), inode);
    let error = templates.ensure(1).await.unwrap_err();
    assert!(matches!(error, ImageError::LayerSize { .. }), "{error}");
}

/// What a microVM's kill looks like to its disk: the blocks that were written, without an unmount.
#[tokio::test]
async fn files_survive_a_kill_without_a_filesystem_check() {
    if !can_run(&["mke2fs", "e2fsck", "dumpe2fs", "mount"]) {
        return;
    }
    let state = tempfile::tempdir().unwrap();
    let template = LayerTemplates::new(state.path()).ensure(64).await.unwrap();
    let layer = state.path().join("layer");
    create_layer(&template, &layer, UID).unwrap();
    let dir = state.path().to_owned();
    with_own_mounts(move || {
        let mount_point = dir.join("mnt");
        fs::create_dir(&mount_point).unwrap();
        let mount = |image: &Path| {
            let args = ["-o", "loop", image.to_str().unwrap(), mount_point.to_str().unwrap()];
            run("mount", &args)
        };
        let (mounted, output) = mount(&layer);
        if !mounted {
            println!("skipped: this machine mounts no loop devices: {output}");
            return;
        }
        fs::create_dir_all(mount_point.join("a/b")).unwrap();
        fs::write(mount_point.join("a/b/file"), "content").unwrap();
        fs::File::open(mount_point.join("a/b/file")).unwrap().sync_all().unwrap();
        let killed = dir.join("killed");
        fs::copy(&layer, &killed).unwrap();
        assert!(run("umount", &[mount_point.to_str().unwrap()]).0);

        let (_, state) = run("dumpe2fs", &["-h", killed.to_str().unwrap()]);
        assert!(state.contains("needs_recovery"), "the copy was taken while in use: {state}");
        let (mounted, output) = mount(&killed);
        assert!(mounted, "{output}");
        assert_eq!(fs::read(mount_point.join("a/b/file")).unwrap(), b"content");
        assert!(run("umount", &[mount_point.to_str().unwrap()]).0);
        let (sound, output) = run("e2fsck", &["-fn", killed.to_str().unwrap()]);
        assert!(sound, "the journal did not mend it: {output}");
    });
}
