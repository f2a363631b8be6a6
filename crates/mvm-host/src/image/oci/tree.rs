//! Merges layers: applies their entries, bottom layer first, to a tree in memory.
//!
//! This is the whole meaning of an image, and it is pure. Names are resolved as inside a `chroot`:
//! symbolic links are followed below the root only, and `..` never leads out of it. A whiteout
//! hides what the layers below have, never what its own layer brings, in whatever order they come.

use std::collections::BTreeMap;

use super::entry::{Bytes, Content, Entry, Meta};
use super::limits::{MAX_COMPONENT, MAX_LINKS, MAX_PATH};

/// Hides the name behind it.
const WHITEOUT: &[u8] = b".wh.";
/// Hides everything that the layers below have in the directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other marks of aufs, which say nothing about the tree.
const AUFS: &[u8] = b".wh..wh.";

/// Why an entry cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MergeError {
    /// The name leads out of the root, or is none.
    #[error("entry `{0}` climbs out of the image's root")]
    Climbs(Bytes),
    /// A part of the name is a file.
    #[error("entry `{path}` is below `{file}`, which is not a directory")]
    BelowFile { path: Bytes, file: Bytes },
    /// Symbolic links lead to one another without end.
    #[error("entry `{0}` is behind an endless chain of symbolic links")]
    EndlessLinks(Bytes),
    /// The name is longer than a file's can be.
    #[error("entry `{0}` has a longer name than a file can have")]
    TooLong(Bytes),
    /// A hard link to nothing.
    #[error("entry `{path}` is a hard link to `{target}`, which is not there")]
    NoTarget { path: Bytes, target: Bytes },
    /// A hard link to a directory.
    #[error("entry `{path}` is a hard link to the directory `{target}`")]
    DirectoryTarget { path: Bytes, target: Bytes },
    /// The root can only be a directory.
    #[error("an entry replaces the image's root by something that is not a directory")]
    Root,
    /// A whiteout that hides no name.
    #[error("entry `{0}` is a whiteout of nothing")]
    EmptyWhiteout(Bytes),
}

/// Something that is not a directory; one that has several names is there once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Inode {
    /// The layer that brought it, counted from the bottom.
    pub(crate) layer: usize,
    pub(crate) content: Content,
    pub(crate) meta: Meta,
}

/// A directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Dir {
    pub(crate) meta: Meta,
    pub(crate) children: BTreeMap<Vec<u8>, Node>,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item {
    Dir(Dir),
    /// A place in [`Tree::inodes`].
    Inode(usize),
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    /// The last layer that brought it, or something below it.
    layer: usize,
    pub(crate) item: Item,
}

/// The merged tree.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) root: Dir,
    /// What the names stand for; some that no name stands for any more are among them.
    pub(crate) inodes: Vec<Inode>,
    layers: usize,
}

impl Tree {
    pub(crate) fn new() -> Self {
        let root = Dir { meta: Meta::implied_dir(0o755), children: BTreeMap::new() };
        Self { root, inodes: Vec::new(), layers: 0 }
    }

    /// Applies the next layer.
    pub(crate) fn apply(&mut self, entries: Vec<Entry>) -> Result<(), MergeError> {
        let layer = self.layers;
        self.layers += 1;
        entries.into_iter().try_for_each(|entry| self.apply_entry(layer, entry))
    }

    fn apply_entry(&mut self, layer: usize, entry: Entry) -> Result<(), MergeError> {
        let Entry { path, content, meta } = entry;
        let mut names = components(&path)?;
        let Some(name) = names.pop() else {
            let Content::Directory = content else { return Err(MergeError::Root) };
            self.root.meta = meta;
            return Ok(());
        };
        if names.iter().chain([&name]).any(|name| name.starts_with(AUFS) && *name != OPAQUE) {
            return Ok(());
        }
        if names.iter().any(|name| name.starts_with(WHITEOUT)) {
            return Err(MergeError::EmptyWhiteout(path));
        }
        let parent = self.resolve(&names, &path)?;
        if name == OPAQUE {
            if let Some(dir) = self.find_dir(&parent) {
                hide_below(dir, layer);
            }
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(MergeError::EmptyWhiteout(path));
            }
            if let Some(dir) = self.find_dir(&parent) {
                hide(dir, hidden, layer);
            }
            return Ok(());
        }
        let whole = parent.iter().map(|name| name.len() + 1).sum::<usize>() + name.len();
        if whole > MAX_PATH || name.len() > MAX_COMPONENT {
            return Err(MergeError::TooLong(path));
        }
        let item = match content {
            Content::HardLink(target) => Item::Inode(self.link_target(&path, &target)?),
            Content::Directory => Item::Dir(Dir { meta, children: BTreeMap::new() }),
            content => {
                self.inodes.push(Inode { layer, content, meta });
                Item::Inode(self.inodes.len() - 1)
            }
        };
        let dir = self.ensure_dir(&parent, layer, &path)?;
        match (dir.children.get_mut(name), item) {
            (Some(Node { layer: last, item: Item::Dir(old) }), Item::Dir(new)) => {
                *last = layer;
                old.meta = new.meta;
            }
            (_, item) => {
                dir.children.insert(name.to_vec(), Node { layer, item });
            }
        }
        Ok(())
    }

    /// The inode that a hard link's target stands for; the last name is not followed.
    fn link_target(&self, path: &Bytes, target: &Bytes) -> Result<usize, MergeError> {
        let names = components(target)?;
        let no_target = || MergeError::NoTarget { path: path.clone(), target: target.clone() };
        let (name, parents) = names.split_last().ok_or_else(no_target)?;
        let parent = self.resolve(parents, path)?;
        let dir = parent.iter().try_fold(&self.root, |dir, name| match dir.children.get(name) {
            Some(Node { item: Item::Dir(dir), .. }) => Some(dir),
            _ => None,
        });
        match dir.and_then(|dir| dir.children.get(*name)) {
            Some(Node { item: Item::Inode(inode), .. }) => Ok(*inode),
            Some(_) => {
                Err(MergeError::DirectoryTarget { path: path.clone(), target: target.clone() })
            }
            None => Err(no_target()),
        }
    }

    /// The real names of a directory, behind all symbolic links; parts of it may not exist.
    fn resolve(&self, names: &[&[u8]], path: &Bytes) -> Result<Vec<Vec<u8>>, MergeError> {
        let mut rest: Vec<Vec<u8>> = names.iter().rev().map(|name| name.to_vec()).collect();
        let mut resolved: Vec<Vec<u8>> = Vec::new();
        let mut dirs = vec![Some(&self.root)];
        let mut links = 0;
        while let Some(name) = rest.pop() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    // Above the root is the root.
                    if resolved.pop().is_some() {
                        dirs.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let here = dirs.last().copied().flatten();
            let below = match here.and_then(|dir| dir.children.get(&name)).map(|node| &node.item) {
                None => None,
                Some(Item::Dir(dir)) => Some(dir),
                Some(Item::Inode(inode)) => match &self.inodes[*inode].content {
                    Content::Symlink(target) => {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err(MergeError::EndlessLinks(path.clone()));
                        }
                        if target.0.starts_with(b"/") {
                            resolved.clear();
                            dirs.truncate(1);
                        }
                        let names = target.0.split(|byte| *byte == b'/').rev();
                        rest.extend(names.map(<[u8]>::to_vec));
                        continue;
                    }
                    _ => {
                        resolved.push(name);
                        let file = Bytes(resolved.join(&b'/'));
                        return Err(MergeError::BelowFile { path: path.clone(), file });
                    }
                },
            };
            resolved.push(name);
            dirs.push(below);
        }
        Ok(resolved)
    }

    /// A directory by its real names, unless there is none.
    fn find_dir(&mut self, names: &[Vec<u8>]) -> Option<&mut Dir> {
        names.iter().try_fold(&mut self.root, |dir, name| match dir.children.get_mut(name) {
            Some(Node { item: Item::Dir(dir), .. }) => Some(dir),
            _ => None,
        })
    }

    /// A directory by its real names, made if it is not there.
    fn ensure_dir(
        &mut self,
        names: &[Vec<u8>],
        layer: usize,
        path: &Bytes,
    ) -> Result<&mut Dir, MergeError> {
        let mut dir = &mut self.root;
        for (depth, name) in names.iter().enumerate() {
            if name.len() > MAX_COMPONENT {
                return Err(MergeError::TooLong(path.clone()));
            }
            let implied = || {
                let new = Dir { meta: Meta::implied_dir(0o755), children: BTreeMap::new() };
                Node { layer, item: Item::Dir(new) }
            };
            let node = dir.children.entry(name.clone()).or_insert_with(implied);
            node.layer = layer;
            dir = match &mut node.item {
                Item::Dir(dir) => dir,
                Item::Inode(_) => {
                    let file = Bytes(names[..=depth].join(&b'/'));
                    return Err(MergeError::BelowFile { path: path.clone(), file });
                }
            };
        }
        Ok(dir)
    }

    /// Whether a path leads to a file, through symbolic links or not.
    pub(crate) fn has_file(&self, path: &str) -> bool {
        let names: Vec<&[u8]> = path.split('/').map(str::as_bytes).collect();
        // A file at the end of the way is told from a directory by the error that it gives.
        matches!(self.resolve(&names, &Bytes(path.into())), Err(MergeError::BelowFile { .. }))
    }

    /// Makes a directory that the image's configuration names, unless it is there. It is made where
    /// links on the way lead to.
    pub(crate) fn ensure_named_dir(&mut self, path: &str) -> Result<(), MergeError> {
        let path = Bytes(path.as_bytes().to_vec());
        if path.0.len() > MAX_PATH {
            return Err(MergeError::TooLong(path));
        }
        let resolved = self.resolve(&components(&path)?, &path)?;
        self.ensure_dir(&resolved, self.layers, &path).map(drop)
    }

    /// Makes a directory of the root, unless something of its name is there.
    pub(crate) fn ensure_mount_point(&mut self, name: &str, mode: u32) {
        let layer = self.layers;
        self.root.children.entry(name.as_bytes().to_vec()).or_insert_with(|| {
            let dir = Dir { meta: Meta::implied_dir(mode), children: BTreeMap::new() };
            Node { layer, item: Item::Dir(dir) }
        });
    }
}

/// The names of a path below the root.
fn components(path: &Bytes) -> Result<Vec<&[u8]>, MergeError> {
    let names = path.0.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
    let names: Vec<&[u8]> = names.collect();
    if names.contains(&&b".."[..]) || path.0.contains(&0) {
        return Err(MergeError::Climbs(path.clone()));
    }
    Ok(names)
}

/// Hides what the layers below have at a name.
fn hide(dir: &mut Dir, name: &[u8], layer: usize) {
    match dir.children.get_mut(name) {
        Some(Node { layer: last, item: Item::Dir(below) }) if *last == layer => {
            hide_below(below, layer);
        }
        Some(Node { layer: last, .. }) if *last == layer => {}
        _ => {
            dir.children.remove(name);
        }
    }
}

/// Hides everything in a directory that the layers below have there.
fn hide_below(dir: &mut Dir, layer: usize) {
    dir.children.retain(|_, node| node.layer == layer);
    for node in dir.children.values_mut() {
        if let Item::Dir(below) = &mut node.item {
            hide_below(below, layer);
        }
    }
}

#[cfg(test)]
mod tests;
