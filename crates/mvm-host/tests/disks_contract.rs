//! What every backend of data disks does, and what the real one makes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use mvm_core::name::DiskPath;
use mvm_host::disks::{Disks, LocalDisks, SimDisks, allocated_kib};

const MIB: u64 = 1024 * 1024;

fn disk(path: &str) -> DiskPath {
    path.parse().unwrap()
}

async fn on_each(test: impl AsyncFn(&dyn Disks)) {
    for real in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        match real {
            true => test(&LocalDisks::new(dir.path())).await,
            false => test(&SimDisks::new(dir.path())).await,
        }
    }
}

#[tokio::test]
async fn a_disk_is_made_once_and_keeps_what_is_on_it_when_it_grows() {
    on_each(async |disks| {
        let data = disk("demo/data");
        assert_eq!(disks.ensure(&data, 64).await.unwrap(), 64);
        let file = fs::OpenOptions::new().read(true).write(true).open(disks.file(&data)).unwrap();
        file.write_all_at(b"precious", 32 * MIB).unwrap();
        for (asked, has) in [(64, 64), (256, 256), (100, 256)] {
            assert_eq!(disks.ensure(&data, asked).await.unwrap(), has, "never smaller");
            assert_eq!(file.metadata().unwrap().len(), has * MIB);
        }
        let mut content = [0; 8];
        file.read_exact_at(&mut content, 32 * MIB).unwrap();
        assert_eq!(&content, b"precious");
        assert!(allocated_kib(&disks.file(&data)) < 32 * 1024, "it is sparse");
    })
    .await;
}

#[tokio::test]
async fn disks_of_one_name_in_two_tenants_are_two_and_go_one_by_one() {
    on_each(async |disks| {
        let (one, two) = (disk("demo/data"), disk("other/data"));
        disks.ensure(&one, 16).await.unwrap();
        disks.ensure(&two, 16).await.unwrap();
        disks.remove(&one).await.unwrap();
        disks.remove(&one).await.unwrap();
        assert!(!disks.file(&one).exists() && disks.file(&two).exists());
    })
    .await;
}

#[tokio::test]
async fn a_disk_is_readable_by_its_owner_alone_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let disks = LocalDisks::new(dir.path());
    let data = disk("demo/data");
    disks.ensure(&data, 16).await.unwrap();
    let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
    assert_eq!(mode(&disks.file(&data)), 0o600);
    assert_eq!(mode(&dir.path().join("disks/demo")), 0o700);
    disks.remove(&data).await.unwrap();
    assert_eq!(fs::read_dir(dir.path().join("disks")).unwrap().count(), 0);
}

#[tokio::test]
async fn what_an_interrupted_attempt_left_is_no_disk_and_goes_with_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let disks = LocalDisks::new(dir.path());
    let data = disk("demo/data");
    fs::create_dir_all(dir.path().join("disks/demo")).unwrap();
    fs::write(dir.path().join("disks/demo/.data.new"), "half").unwrap();
    disks.ensure(&data, 16).await.unwrap();
    let names: Vec<_> = fs::read_dir(dir.path().join("disks/demo")).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    let magic = {
        let mut magic = [0; 2];
        fs::File::open(disks.file(&data)).unwrap().read_exact_at(&mut magic, 1024 + 0x38).unwrap();
        u16::from_le_bytes(magic)
    };
    assert_eq!(magic, 0xef53, "an ext4 super block");
}
