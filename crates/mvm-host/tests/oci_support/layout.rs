//! Images in the OCI layout, made by the tests themselves down to the bytes of each layer.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The media type of a layer that is a gzip file.
pub(crate) const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// The media type of a layer that is not compressed.
pub(crate) const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
/// The media type of a layer that is a zstd file.
pub(crate) const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// The architecture of this machine, as images spell it.
pub(crate) const ARCH: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

/// `sha256:…` of some bytes.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Compresses with gzip.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// One tar archive.
pub(crate) struct LayerTar(tar::Builder<Vec<u8>>);

/// Attributes of an entry.
#[derive(Clone)]
pub(crate) struct Attributes {
    pub(crate) mode: u32,
    pub(crate) owner: (u64, u64),
    pub(crate) mtime: u64,
}

impl Default for Attributes {
    fn default() -> Self {
        Self { mode: 0o644, owner: (0, 0), mtime: 1_700_000_000 }
    }
}

impl LayerTar {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// An entry with everything said about it.
    pub(crate) fn entry(
        mut self,
        kind: tar::EntryType,
        path: &str,
        link: &str,
        attributes: &Attributes,
        content: &[u8],
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(attributes.mode);
        header.set_uid(attributes.owner.0);
        header.set_gid(attributes.owner.1);
        header.set_mtime(attributes.mtime);
        header.set_size(content.len() as u64);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        if !link.is_empty() {
            header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        }
        // Not `set_path`, which refuses what hostile layers say.
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub(crate) fn dir(self, path: &str) -> Self {
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        self.entry(tar::EntryType::Directory, path, "", &attributes, b"")
    }

    pub(crate) fn file(self, path: &str, content: &str) -> Self {
        let attributes = Attributes::default();
        self.entry(tar::EntryType::Regular, path, "", &attributes, content.as_bytes())
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        let attributes = Attributes { mode: 0o777, ..Attributes::default() };
        self.entry(tar::EntryType::Symlink, path, target, &attributes, b"")
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(tar::EntryType::Link, path, target, &Attributes::default(), b"")
    }

    /// Records for the entry that comes next.
    pub(crate) fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// A directory in the OCI layout.
pub(crate) struct Layout {
    pub(crate) dir: PathBuf,
    layers: Vec<Value>,
    diff_ids: Vec<String>,
    pub(crate) config: Value,
    pub(crate) architecture: String,
}

impl Layout {
    pub(crate) fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self {
            dir: dir.to_owned(),
            layers: Vec::new(),
            diff_ids: Vec::new(),
            config: json!({}),
            architecture: ARCH.to_owned(),
        }
    }

    /// Stores a blob and returns its descriptor.
    pub(crate) fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = sha256(bytes);
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    pub(crate) fn blob_path(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs").join(digest.replace(':', "/"))
    }

    /// Adds a layer that is a gzip file.
    pub(crate) fn layer(mut self, tar: LayerTar) -> Self {
        let tar = tar.finish();
        let descriptor = self.blob(GZIP, &gzip(&tar));
        self.add(descriptor, sha256(&tar));
        self
    }

    /// Adds a layer as told.
    pub(crate) fn add(&mut self, descriptor: Value, diff_id: String) {
        self.layers.push(descriptor);
        self.diff_ids.push(diff_id);
    }

    /// Writes the image under a tag; layers that were added before stay for the next.
    pub(crate) fn tag(&self, tag: &str) -> PathBuf {
        let manifest = self.manifest();
        let index = json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": manifest["mediaType"], "digest": manifest["digest"],
            "size": manifest["size"],
            "annotations": { "org.opencontainers.image.ref.name": tag },
        }]});
        fs::write(self.dir.join("index.json"), index.to_string()).unwrap();
        self.dir.clone()
    }

    /// Stores the manifest and returns its descriptor.
    pub(crate) fn manifest(&self) -> Value {
        let config = json!({
            "os": "linux", "architecture": self.architecture, "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": self.diff_ids },
        });
        let config =
            self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": kind, "config": config, "layers": self.layers,
        });
        self.blob(kind, manifest.to_string().as_bytes())
    }
}
