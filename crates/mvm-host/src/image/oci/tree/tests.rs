//! The merge against a model of a few lines, and what it refuses.

use proptest::prelude::*;

use super::*;

fn entry(path: &str, content: Content) -> Entry {
    Entry { path: Bytes(path.into()), content, meta: Meta::implied_dir(0o755) }
}

fn dir(path: &str) -> Entry {
    entry(path, Content::Directory)
}

fn file(path: &str, data: u32) -> Entry {
    entry(path, Content::File { data, size: 1 })
}

fn symlink(path: &str, target: &str) -> Entry {
    entry(path, Content::Symlink(Bytes(target.into())))
}

fn hard_link(path: &str, target: &str) -> Entry {
    entry(path, Content::HardLink(Bytes(target.into())))
}

fn merged(layers: Vec<Vec<Entry>>) -> Result<Tree, MergeError> {
    let mut tree = Tree::new();
    layers.into_iter().try_for_each(|layer| tree.apply(layer))?;
    Ok(tree)
}

/// Every name with the layer and number of its file; directories have none.
type Flat = BTreeMap<String, Option<(usize, u32)>>;

fn flat(tree: &Tree) -> Flat {
    fn add(tree: &Tree, dir: &Dir, prefix: &str, flat: &mut Flat) {
        for (name, node) in &dir.children {
            let name = format!("{prefix}{}", String::from_utf8_lossy(name));
            match &node.item {
                Item::Inode(inode) => {
                    let Inode { layer, content, .. } = &tree.inodes[*inode];
                    let data = match content {
                        Content::File { data, .. } => *data,
                        _ => u32::MAX,
                    };
                    flat.insert(name, Some((*layer, data)));
                }
                Item::Dir(dir) => {
                    add(tree, dir, &format!("{name}/"), flat);
                    flat.insert(name, None);
                }
            }
        }
    }
    let mut flat_tree = Flat::new();
    add(tree, &tree.root, "", &mut flat_tree);
    flat_tree
}

fn names(layers: Vec<Vec<Entry>>) -> Vec<String> {
    flat(&merged(layers).unwrap()).into_keys().collect()
}

/// What the entries of one layer say, in words.
#[derive(Debug, Clone)]
enum Op {
    File(String, u32),
    Dir(String),
    Hide(String, String),
    Opaque(String),
    Link(String, String),
}

impl Op {
    fn is_whiteout(&self) -> bool {
        matches!(self, Self::Hide(..) | Self::Opaque(_))
    }

    fn entry(&self) -> Entry {
        let below = |dir: &str, name: &str| match dir {
            "" => name.to_owned(),
            dir => format!("{dir}/{name}"),
        };
        match self {
            Self::File(path, data) => file(path, *data),
            Self::Dir(path) => dir(path),
            Self::Hide(dir, name) => file(&below(dir, &format!(".wh.{name}")), 0),
            Self::Opaque(dir) => file(&below(dir, ".wh..wh..opq"), 0),
            Self::Link(path, target) => hard_link(path, target),
        }
    }
}

/// The specification, word by word: a layer first hides, then brings. `None` if a link has no
/// target.
fn model(layers: &[Vec<Op>]) -> Option<Flat> {
    let mut tree = Flat::new();
    for (layer, ops) in layers.iter().enumerate() {
        for op in ops {
            match op {
                Op::Hide(dir, name) => {
                    let path = if dir.is_empty() { name.clone() } else { format!("{dir}/{name}") };
                    let below = format!("{path}/");
                    tree.retain(|name, _| *name != path && !name.starts_with(&below));
                }
                Op::Opaque(dir) => {
                    let below = if dir.is_empty() { String::new() } else { format!("{dir}/") };
                    tree.retain(|name, _| !name.starts_with(&below));
                }
                _ => {}
            }
        }
        for op in ops {
            let (path, item) = match op {
                Op::File(path, data) => (path, Some((layer, *data))),
                Op::Dir(path) => (path, None),
                Op::Link(path, target) => {
                    let target = tree.get(target).copied().flatten()?;
                    (path, Some(target))
                }
                Op::Hide(..) | Op::Opaque(_) => continue,
            };
            for (slash, _) in path.match_indices('/') {
                tree.insert(path[..slash].to_owned(), None);
            }
            tree.insert(path.clone(), item);
        }
    }
    Some(tree)
}

/// Directories and files have different names, so that no entry has to replace another kind.
fn op(links: bool) -> impl Strategy<Value = Op> {
    let dir = prop::sample::select(vec!["", "d", "e", "d/d", "d/e", "e/d/d"]);
    let file = prop::sample::select(vec!["f", "g"]);
    let kinds = if links { 6 } else { 5 };
    (0..kinds, dir.clone(), dir, file.clone(), file, 0..1000_u32).prop_map(
        |(kind, dir, other, file, target, data)| {
            let below = |dir: &str, name: &str| match dir {
                "" => name.to_owned(),
                dir => format!("{dir}/{name}"),
            };
            match kind {
                0 | 1 => Op::File(below(dir, file), data),
                2 => Op::Dir(below(dir, "d")),
                3 => Op::Hide(dir.to_owned(), if data % 2 == 0 { file } else { "d" }.to_owned()),
                4 => Op::Opaque(dir.to_owned()),
                _ => Op::Link(below(dir, file), below(other, target)),
            }
        },
    )
}

fn layers(links: bool) -> impl Strategy<Value = Vec<Vec<Op>>> {
    prop::collection::vec(prop::collection::vec(op(links), 0..8), 0..6)
}

fn entries(layers: &[Vec<Op>]) -> Vec<Vec<Entry>> {
    layers.iter().map(|ops| ops.iter().map(Op::entry).collect()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whiteouts_hide_what_is_below_in_whatever_order_they_come(layers in layers(false)) {
        prop_assert_eq!(flat(&merged(entries(&layers)).unwrap()), model(&layers).unwrap());
    }

    #[test]
    fn hard_links_are_names_of_what_was_there(mut layers in layers(true)) {
        for ops in &mut layers {
            ops.sort_by_key(|op| !op.is_whiteout());
        }
        match (merged(entries(&layers)), model(&layers)) {
            (Ok(tree), Some(expected)) => prop_assert_eq!(flat(&tree), expected),
            (Err(MergeError::NoTarget { .. }), None) => {}
            (ours, expected) => prop_assert!(false, "{:?} {:?}", ours.map(|t| flat(&t)), expected),
        }
    }

    #[test]
    fn no_name_leads_out_of_the_root(
        links in prop::collection::vec(("[ab]", "(/|\\.\\./|[ab]/){0,4}[ab.]{1,2}"), 0..6),
        path in "([ab]/){0,4}c",
    ) {
        let mut tree = Tree::new();
        let links = links.iter().map(|(name, target)| symlink(name, target)).collect();
        if tree.apply(links).is_ok() && tree.apply(vec![file(&path, 7)]).is_ok() {
            let found = flat(&tree);
            let ours: Vec<_> = found.iter().filter(|(_, item)| **item == Some((1, 7))).collect();
            prop_assert_eq!(ours.len(), 1);
            prop_assert!(!found.keys().any(|name| name.split('/').any(|part| part == "..")));
        }
    }
}

#[test]
fn a_later_kind_replaces_an_earlier_one() {
    let base = || vec![dir("d"), file("d/x", 0), file("f", 1), symlink("l", "d")];
    assert_eq!(names(vec![base(), vec![file("d", 2)]]), ["d", "f", "l"]);
    assert_eq!(names(vec![base(), vec![dir("f"), file("f/y", 2)]]), ["d", "d/x", "f", "f/y", "l"]);
    assert_eq!(names(vec![base(), vec![dir("l"), file("l/y", 2)]]), ["d", "d/x", "f", "l", "l/y"]);
    assert_eq!(names(vec![base(), vec![file("l/y", 2)]]), ["d", "d/x", "d/y", "f", "l"]);
}

#[test]
fn a_directory_in_the_layer_that_hides_it_is_emptied() {
    let base = || vec![dir("d"), file("d/old", 0), dir("d/sub"), file("d/sub/old", 0)];
    let order = |mut entries: Vec<Entry>| {
        let forth = names(vec![base(), entries.clone()]);
        entries.reverse();
        assert_eq!(names(vec![base(), entries]), forth);
        forth
    };
    assert_eq!(order(vec![file(".wh.d", 0), file("d/new", 1)]), ["d", "d/new"]);
    let inner = vec![file("d/.wh..wh..opq", 0), file("d/sub/new", 1)];
    assert_eq!(order(inner), ["d", "d/sub", "d/sub/new"]);
}

#[test]
fn marks_of_aufs_are_not_files() {
    let marks = vec![dir(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", 0), file(".wh..wh.aufs", 0)];
    assert!(names(vec![marks]).is_empty());
}

#[test]
fn entries_that_make_no_sense_are_refused_by_name() {
    let long = "x".repeat(MAX_COMPONENT + 1);
    let deep = "x/".repeat(MAX_PATH / 2 + 1) + "y";
    for (layer, part) in [
        (vec![file("../etc/passwd", 0)], "`../etc/passwd` climbs out"),
        (vec![file("a/../../b", 0)], "climbs out"),
        (vec![hard_link("a", "../../etc/shadow")], "`../../etc/shadow` climbs out"),
        (vec![file("a\0b", 0)], "climbs out"),
        (vec![file("a", 0), file("a/b", 0)], "`a/b` is below `a`, which is not a directory"),
        (vec![symlink("a", "b"), symlink("b", "a"), file("a/c", 0)], "endless chain"),
        (vec![symlink("a", "a/a"), file("a/c", 0)], "endless chain"),
        (vec![hard_link("a", "b")], "`a` is a hard link to `b`, which is not there"),
        (vec![dir("b"), hard_link("a", "b")], "to the directory `b`"),
        (vec![file("./", 0)], "replaces the image's root"),
        (vec![file("a/.wh.", 0)], "whiteout of nothing"),
        (vec![file("a/.wh...", 0)], "whiteout of nothing"),
        (vec![file(".wh.a/b", 0)], "whiteout of nothing"),
        (vec![file(&long, 0)], "longer name"),
        (vec![file(&format!("{long}/a"), 0)], "longer name"),
        (vec![file(&deep, 0)], "longer name"),
    ] {
        let error = merged(vec![layer]).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn names_that_grow_through_links_are_bounded() {
    let deep = "d/".repeat(MAX_PATH / 2 - 2);
    let layer = vec![symlink("a", &deep), file("a/b", 0), symlink("c", "a/e/f/g"), file("c/b", 0)];
    assert!(matches!(merged(vec![layer]), Err(MergeError::TooLong(_))));
}

#[test]
fn absolute_names_are_names_below_the_root() {
    assert_eq!(names(vec![vec![file("/etc/passwd", 0)]]), ["etc", "etc/passwd"]);
    let through = vec![symlink("up", "/../../.."), dir("etc"), file("up/etc/x", 1)];
    assert_eq!(names(vec![through]), ["etc", "etc/x", "up"]);
}

#[test]
fn a_mount_point_is_made_only_where_there_is_nothing() {
    let mut tree = merged(vec![vec![symlink("run", "var/run"), dir("tmp")]]).unwrap();
    for name in ["dev", "run", "tmp"] {
        tree.ensure_mount_point(name, 0o1777);
    }
    assert_eq!(flat(&tree).into_keys().collect::<Vec<_>>(), ["dev", "run", "tmp"]);
    let Item::Dir(tmp) = &tree.root.children[&b"tmp"[..]].item else { panic!("a directory") };
    assert_eq!(tmp.meta.mode, 0o755, "the image's own stays as it is");
}

#[test]
fn a_volume_is_made_where_its_name_leads_and_nothing_is_replaced() {
    let base = vec![symlink("run", "var/run"), dir("var"), dir("data"), file("f", 0)];
    let mut tree = merged(vec![base]).unwrap();
    for path in ["/data", "/run/db", "srv/deep/store", "/"] {
        tree.ensure_named_dir(path).unwrap();
    }
    for path in ["/../etc", "/f/x", "/f"] {
        assert!(tree.ensure_named_dir(path).is_err(), "{path}");
    }
    let found: Vec<String> = flat(&tree).into_keys().collect();
    let expected =
        ["data", "f", "run", "srv", "srv/deep", "srv/deep/store", "var", "var/run", "var/run/db"];
    assert_eq!(found, expected);
}
