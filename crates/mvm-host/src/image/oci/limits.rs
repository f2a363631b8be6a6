//! What no sound image exceeds: layers and registries are not trusted.

/// Longest name of an entry or target of a link, in bytes: what a path of Linux can have, less
/// the directory that the tree is built in.
pub(crate) const MAX_PATH: usize = 3_800;
/// Longest part of a name, in bytes.
pub(crate) const MAX_COMPONENT: usize = 255;
/// Largest header that describes one entry, in bytes; extended attributes are in it.
pub(crate) const MAX_HEADER: u64 = 1024 * 1024;
/// Most parts of one sparse file.
pub(crate) const MAX_SPARSE_PARTS: usize = 64 * 1024;
/// Most symbolic links on the way to one entry, as the kernel has it.
pub(crate) const MAX_LINKS: usize = 40;
/// Most entries of one layer.
pub(crate) const MAX_ENTRIES: u32 = 1_000_000;
/// Largest layer as a tar archive, in bytes.
pub(crate) const MAX_LAYER_SIZE: u64 = 64 * 1024 * 1024 * 1024;
/// A layer that is larger than this, in bytes, …
pub(crate) const BOMB_SIZE: u64 = 1024 * 1024 * 1024;
/// … and this many times as large as it was compressed, is made to fill the disk.
pub(crate) const BOMB_RATIO: u64 = 200;
/// Largest file of a sparse entry, in bytes.
pub(crate) const MAX_FILE_SIZE: u64 = 1024 * 1024 * 1024 * 1024;
/// Most layers of one image.
pub(crate) const MAX_LAYERS: usize = 1_000;
/// Largest index, manifest or configuration, in bytes.
pub(crate) const MAX_DOCUMENT: u64 = 8 * 1024 * 1024;
/// Indexes may point at indexes, but not for ever.
pub(crate) const MAX_INDEXES: usize = 4;
