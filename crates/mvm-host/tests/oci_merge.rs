//! Layers merged into a tree, compared with what `umoci` makes of the same image.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::disallowed_methods, reason = "the test removes what it made itself")]

mod oci_support;

use std::fs;
use std::path::Path;

use mvm_host::image::{ImageError, ImageSource, LayerCache, OciSource};
use oci_support::layout::{Attributes, GZIP, LayerTar, Layout, PLAIN, ZSTD, gzip, sha256};
use oci_support::tree::{Snapshot, assert_same, snapshot};
use oci_support::{can_run, quiet, run, umoci_tree};
use tar::EntryType;

/// Directories that a guest needs and that these images do not have.
const MOUNT_POINTS: [&str; 6] = ["dev", "etc", "proc", "run", "sys", "tmp"];

async fn merge(layout: &Path, state: &Path, dest: &Path) -> Result<Snapshot, ImageError> {
    let source = OciSource::layout(layout, None, &LayerCache::new(state)).await?;
    fs::create_dir_all(dest).unwrap();
    source.write_root(dest, &quiet).await?;
    Ok(snapshot(dest))
}

/// Merges an image, compares the tree with `umoci`'s, and returns it.
async fn same_as_umoci(layout: &Path) -> Snapshot {
    let work = tempfile::tempdir().unwrap();
    let mut ours =
        merge(layout, &work.path().join("state"), &work.path().join("ours")).await.unwrap();
    let theirs = umoci_tree(layout, "t", &work.path().join("theirs"));
    for name in MOUNT_POINTS.map(Path::new) {
        assert!(ours.contains_key(name), "a guest mounts on {}", name.display());
        if !theirs.contains_key(name) {
            ours.remove(name);
        }
    }
    assert_same(&ours, &theirs);
    ours
}

/// Every kind of entry, and layers that hide, replace and link what is below them.
fn rich_image(dir: &Path) -> Layout {
    let odd = Attributes { mode: 0o4750, owner: (1234, 70_000), mtime: 1_234_567_890 };
    let capability: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let acl: &[u8] =
        b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let long = "x/".repeat(70) + "deep";
    let base = LayerTar::new()
        .entry(EntryType::Directory, "./", "", &Attributes { mode: 0o751, ..odd.clone() }, b"")
        .dir("usr/")
        .dir("usr/bin/")
        .symlink("bin", "usr/bin")
        .file("bin/through-a-link", "lands in usr/bin")
        .entry(EntryType::Regular, "usr/bin/setuid", "", &odd, b"odd")
        .hard_link("usr/bin/setuid-too", "usr/bin/setuid")
        .pax(&[("SCHILY.xattr.security.capability", capability)])
        .file("usr/bin/capable", "cap")
        .pax(&[("SCHILY.xattr.user.note", b"a\nnote"), ("mtime", b"1500000000.123456789")])
        .file("usr/noted", "note")
        .pax(&[("SCHILY.xattr.system.posix_acl_access", acl)])
        .file("usr/acl", "acl")
        .pax(&[("path", long.as_bytes())])
        .file("shortened", "deep down")
        .entry(EntryType::Char, "null", "", &Attributes { mode: 0o666, ..odd.clone() }, b"")
        .entry(EntryType::Block, "disk", "", &odd, b"")
        .entry(EntryType::Fifo, "pipe", "", &odd, b"")
        .symlink("dangling", "/no/where")
        .symlink("escape", "../../../../usr")
        .file("empty", "")
        .dir("opaque/")
        .file("opaque/old", "hidden")
        .dir("opaque/deep/")
        .file("opaque/deep/old", "hidden")
        .dir("gone/")
        .file("gone/file", "hidden")
        .file("becomes-dir", "a file")
        .dir("becomes-file/")
        .file("becomes-file/x", "x")
        .file("shared", "first")
        .file("kept", "kept");
    let second = LayerTar::new()
        .file(".wh.gone", "")
        .dir("opaque/")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "seen")
        .file("opaque/.wh.new2", "")
        .dir("becomes-dir/")
        .file("becomes-dir/now", "in a directory")
        .file("becomes-file", "now a file")
        .hard_link("usr/shared-across-layers", "shared")
        .hard_link("linked-device", "null")
        .hard_link("linked-symlink", "dangling")
        .file("escape/from-a-link", "stays inside")
        .entry(EntryType::Directory, "usr/bin/", "", &Attributes { mode: 0o700, ..odd }, b"");
    // The link keeps the old file, the name gets a new one.
    let third = LayerTar::new().file("shared", "second").file("usr/.wh.noted", "");
    Layout::new(dir).layer(base).layer(second).layer(third)
}

#[tokio::test]
async fn every_kind_of_entry_comes_out_as_with_umoci() {
    if !can_run(&["umoci"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = same_as_umoci(&rich_image(&dir.path().join("layout")).tag("t")).await;
    let node = |name: &str| &tree[Path::new(name)];
    assert_eq!(node("usr/bin/setuid").mode, 0o4750, "a new owner does not take the bit away");
    assert_eq!(node("usr/bin/setuid-too").same_as, Path::new("usr/bin/setuid"));
    assert!(!node("usr/bin/capable").xattrs.is_empty() && !node("usr/acl").xattrs.is_empty());
    assert_eq!(node("linked-symlink").same_as, Path::new("dangling"));
    assert_eq!(node("usr/shared-across-layers").same_as, Path::new("usr/shared-across-layers"));
    assert!(tree.contains_key(Path::new("usr/from-a-link")), "links stay inside the root");
    assert!(tree.contains_key(Path::new("opaque/new")), "its own layer's file is not hidden");
    for hidden in ["gone", "opaque/old", "opaque/deep", "usr/noted", "becomes-file/x"] {
        assert!(!tree.contains_key(Path::new(hidden)), "{hidden}");
    }
}

#[tokio::test]
async fn twenty_layers_of_a_real_tool_come_out_as_with_umoci() {
    if !can_run(&["umoci", "busybox"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    let image = format!("{}:t", layout.display());
    run("umoci", &["init", "--layout", layout.to_str().unwrap()]);
    run("umoci", &["new", "--image", &image]);
    let bundle = dir.path().join("bundle");
    run("umoci", &["unpack", "--image", &image, bundle.to_str().unwrap()]);
    let root = bundle.join("rootfs");
    fs::create_dir(root.join("bin")).unwrap();
    let busybox = mvm_host::process::find_program("busybox").unwrap();
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    for layer in 0..20 {
        let dir = root.join(format!("dir{}", layer % 7));
        fs::create_dir_all(dir.join("sub")).unwrap();
        for file in 0..5 {
            let path = dir.join(format!("file{file}"));
            let _ = fs::remove_file(&path);
            fs::write(&path, format!("{layer} {file}").repeat(layer * 50)).unwrap();
            let link = dir.join(format!("sub/link{layer}-{file}"));
            fs::hard_link(&path, link).unwrap();
        }
        match layer % 4 {
            1 => drop(fs::remove_dir_all(root.join(format!("dir{}", (layer + 3) % 7)))),
            2 => drop(fs::remove_file(dir.join("file0"))),
            3 => drop(fs::rename(&dir, root.join(format!("moved{layer}")))),
            _ => {}
        }
        run("umoci", &["repack", "--refresh-bundle", "--image", &image, bundle.to_str().unwrap()]);
        if layer % 5 == 4 {
            let content = dir.with_file_name(format!("opaque{layer}"));
            fs::create_dir(&content).unwrap();
            fs::write(content.join("only"), "this").unwrap();
            let (content, target) = (content.to_str().unwrap().to_owned(), "/dir0");
            run("umoci", &["insert", "--opaque", "--image", &image, &content, target]);
            fs::remove_dir_all(&bundle).unwrap();
            run("umoci", &["unpack", "--image", &image, bundle.to_str().unwrap()]);
        }
    }
    let tree = same_as_umoci(&layout).await;
    assert!(tree.len() > 100, "{} names", tree.len());
}

#[tokio::test]
async fn layers_may_be_plain_gzip_or_zstd() {
    if !can_run(&["zstd"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tar = LayerTar::new().file("a", &"content ".repeat(10_000)).finish();
    let plain = dir.path().join("layer.tar");
    fs::write(&plain, &tar).unwrap();
    run("zstd", &["-q", plain.to_str().unwrap()]);
    let frame = fs::read(dir.path().join("layer.tar.zst")).unwrap();
    // As zstd:chunked does: what a reader must skip, and frames one after the other.
    let skipped = [&b"\x50\x2a\x4d\x18\x04\0\0\0skip"[..], &frame, b"\x51\x2a\x4d\x18\0\0\0\0"];
    // A gzip file may have several members.
    let half = tar.len() / 2;
    let members = [gzip(&tar[..half]), gzip(&tar[half..])].concat();
    let mut trees = Vec::new();
    let blobs = [(PLAIN, tar.clone()), (GZIP, gzip(&tar)), (GZIP, members), (ZSTD, frame.clone())];
    for (kind, bytes) in blobs.into_iter().chain([(ZSTD, skipped.concat())]) {
        let work = tempfile::tempdir().unwrap();
        let mut layout = Layout::new(&work.path().join("layout"));
        let descriptor = layout.blob(kind, &bytes);
        layout.add(descriptor, sha256(&tar));
        let layout = layout.tag("t");
        let (state, dest) = (work.path().join("state"), work.path().join("tree"));
        let mut tree = merge(&layout, &state, &dest).await.unwrap();
        tree.remove(Path::new(""));
        trees.push(tree);
    }
    let first = trees.pop().unwrap();
    let content = |tree: &Snapshot| tree[Path::new("a")].clone();
    for tree in &trees {
        assert_eq!(content(tree), content(&first));
    }
}

#[tokio::test]
async fn one_layer_twice_gives_two_files_and_leaves_the_cache_alone() {
    if !can_run(&["umoci"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let first = || LayerTar::new().file("a", "same");
    let link = LayerTar::new().hard_link("b", "a");
    let layout = Layout::new(&dir.path().join("layout")).layer(first()).layer(link).layer(first());
    let tree = same_as_umoci(&layout.tag("t")).await;
    assert_eq!(tree[Path::new("b")].same_as, Path::new("b"), "the image keeps them apart");

    let state = dir.path().join("state");
    let merged = dir.path().join("tree");
    merge(&layout.dir, &state, &merged).await.unwrap();
    let cached = snapshot(&state.join("layers"));
    let again = dir.path().join("again");
    merge(&layout.dir, &state, &again).await.unwrap();
    let unchanged = snapshot(&state.join("layers"));
    assert_same(&cached, &unchanged);
    fs::remove_dir_all(merged).unwrap();
    fs::remove_dir_all(again).unwrap();
    assert_same(&cached, &snapshot(&state.join("layers")));
}

/// A tar archive of one file of zeroes with a few bytes at its end, as a gzip file of many members, and
/// the archive's digest.
fn lastlog(size: u64) -> (Vec<u8>, String) {
    use std::io::Write;
    let packed = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let mut header = tar::Header::new_gnu();
    header.set_path("lastlog").unwrap();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let zeroes = vec![0; 1 << 20];
    let end = [&zeroes[..(1 << 20) - 4], b"last", &[0; 1024]].concat();
    let count = usize::try_from(size >> 20).unwrap() - 1;
    let mut hasher = <sha2::Sha256 as sha2::Digest>::new();
    let pieces = std::iter::repeat_n(zeroes.as_slice(), count);
    for piece in std::iter::once(&header.as_bytes()[..]).chain(pieces).chain([end.as_slice()]) {
        sha2::Digest::update(&mut hasher, piece);
    }
    let digest = sha2::Digest::finalize(hasher);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let members = [packed(header.as_bytes()), packed(&zeroes).repeat(count), packed(&end)];
    (members.concat(), format!("sha256:{hex}"))
}

#[tokio::test]
async fn a_file_of_gigabytes_without_content_takes_no_space() {
    if !can_run(&[]) {
        return;
    }
    let size = 1_500 << 20;
    let (packed, diff_id) = lastlog(size);
    assert!((packed.len() as u64) < size / 200, "{} bytes", packed.len());
    let dir = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(&dir.path().join("layout"));
    let descriptor = layout.blob(GZIP, &packed);
    layout.add(descriptor, diff_id);
    let layout = layout.tag("t");
    let cache = LayerCache::new(dir.path().join("state"));
    let source = OciSource::layout(&layout, None, &cache).await.unwrap();
    let dest = dir.path().join("tree");
    fs::create_dir(&dest).unwrap();
    source.write_root(&dest, &quiet).await.unwrap();
    use std::os::unix::fs::{FileExt, MetadataExt};
    let file = fs::File::open(dest.join("lastlog")).unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!(meta.len(), size);
    assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
    let mut end = [0; 4];
    file.read_exact_at(&mut end, size - 4).unwrap();
    assert_eq!(&end, b"last");
}

#[tokio::test]
async fn sparse_files_keep_their_size_and_content() {
    if !can_run(&["tar"]) {
        return;
    }
    for format in ["gnu", "pax"] {
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("sparse")).unwrap();
        file.set_len(3_000_000).unwrap();
        use std::os::unix::fs::FileExt;
        for at in (0..3_000_000).step_by(100_000) {
            file.write_all_at(b"island", at).unwrap();
        }
        let tar = dir.path().join("layer.tar");
        let (format, file, cwd) =
            (format!("--format={format}"), tar.to_str().unwrap(), dir.path().to_str().unwrap());
        run("tar", &["--sparse", &format, "-cf", file, "-C", cwd, "sparse"]);
        let bytes = fs::read(&tar).unwrap();
        assert!(bytes.len() < 1_000_000, "tar left the holes out");
        let mut layout = Layout::new(&dir.path().join("layout"));
        let descriptor = layout.blob(PLAIN, &bytes);
        layout.add(descriptor, sha256(&bytes));
        let layout = layout.tag("t");
        let (state, dest) = (dir.path().join("state"), dir.path().join("tree"));
        let tree = merge(&layout, &state, &dest).await.unwrap();
        let ours = &tree[Path::new("sparse")];
        let theirs = &snapshot(dir.path())[Path::new("sparse")];
        assert_eq!((&ours.content, ours.mode), (&theirs.content, theirs.mode), "{format}");
        use std::os::unix::fs::MetadataExt;
        let blocks = dest.join("sparse").metadata().unwrap().blocks();
        assert!(blocks * 512 < 1_000_000, "the holes are holes: {blocks} blocks");
    }
}
