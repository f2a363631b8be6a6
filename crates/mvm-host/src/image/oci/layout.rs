//! Images on this machine: OCI layouts in directories and archives, and what `docker save` writes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mvm_core::image::Reference;
use serde::Deserialize;

use super::blob::{Blob, Bounded, Decompressed};
use super::document::{self, Config, Descriptor, Document, Manifest, unusable};
use super::error::OciError;
use super::layer::write_sparsely;
use super::limits::{MAX_DOCUMENT, MAX_ENTRIES, MAX_INDEXES};
use super::tar::{Kind, TarReader};
use super::{LayerSource, OciImage};
use crate::image::ImageError;
use crate::image::digest::Digest;
use crate::image::durable::{Named, ensure_dir};

/// The name of an image in an OCI layout.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The full name that Docker and containerd give it.
const FULL_NAME: &str = "io.containerd.image.name";
const COPY_BUFFER: usize = 128 * 1024;

/// Where the files of an image are.
pub(crate) enum Files {
    Dir(PathBuf),
    Archive(Archive),
}

/// The files of a tar archive, found without unpacking it.
pub(crate) struct Archive {
    path: PathBuf,
    file: Arc<File>,
    members: BTreeMap<Vec<u8>, Member>,
}

enum Member {
    File {
        offset: u64,
        length: u64,
    },
    /// Another name of this member; old versions of `docker save` wrote them.
    Link(Vec<u8>),
}

impl Archive {
    /// Reads an archive's headers. One that is compressed as a whole is expanded to a file without
    /// a name in `scratch` first. Blocks its thread.
    pub(crate) fn open(path: &Path, scratch: &Path) -> Result<Self, ImageError> {
        let whole = Blob::open(path, None).named("open", path)?;
        let image = path.display().to_string();
        let not_tar = |error: &dyn std::fmt::Display| {
            let problem = format!("it cannot be read as a tar archive: {error}");
            ImageError::from(unusable(&image, problem))
        };
        let plain = Decompressed::new(whole.reader()).named("read", path)?;
        let whole = match plain {
            Decompressed::Plain(_) => whole,
            plain => {
                ensure_dir(scratch)?;
                let mut file = tempfile::tempfile_in(scratch).named("create a file in", scratch)?;
                let mut plain = Bounded::new(plain, whole.length);
                let length = copy_sparsely(&mut plain, &mut file).named("unpack", path)?;
                Blob { file: Arc::new(file), length, ..whole }
            }
        };
        let mut members = BTreeMap::new();
        let mut tar = TarReader::new(Positioned::new(whole.reader()));
        while let Some(header) = tar.next().map_err(|error| not_tar(&error))? {
            if members.len() >= MAX_ENTRIES as usize {
                return Err(not_tar(&format!("it has more than {MAX_ENTRIES} entries")));
            }
            let member = match header.kind {
                Kind::File if header.parts.is_none() => {
                    Member::File { offset: tar.position(), length: header.size }
                }
                Kind::Symlink => Member::Link(beside(&header.path, &header.link)),
                Kind::HardLink => Member::Link(clean(&header.link)),
                _ => continue,
            };
            members.insert(clean(&header.path), member);
        }
        Ok(Self { path: path.to_owned(), file: whole.file, members })
    }

    fn blob(&self, name: &str) -> Option<Blob> {
        let mut name = clean(name.as_bytes());
        for _ in 0..MAX_INDEXES {
            match self.members.get(&name)? {
                Member::Link(target) => name = target.clone(),
                Member::File { offset, length } => {
                    return Some(Blob {
                        path: self.path.clone(),
                        file: self.file.clone(),
                        offset: *offset,
                        length: *length,
                        digest: None,
                    });
                }
            }
        }
        None
    }
}

/// Copies everything, with holes for long runs of zeroes, and returns the length.
fn copy_sparsely(from: &mut impl Read, to: &mut File) -> io::Result<u64> {
    let mut buffer = vec![0; COPY_BUFFER];
    let mut length = 0;
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match from.read(&mut buffer[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        if filled == 0 {
            to.set_len(length)?;
            return Ok(length);
        }
        write_sparsely(to, &buffer[..filled])?;
        length += filled as u64;
    }
}

/// A reader that knows where it is.
pub(crate) struct Positioned<R> {
    inner: R,
    at: u64,
}

impl<R> Positioned<R> {
    fn new(inner: R) -> Self {
        Self { inner, at: 0 }
    }
}

impl<R: Read> Read for Positioned<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl<R: Read> TarReader<Positioned<R>> {
    fn position(&self) -> u64 {
        self.get_ref().at
    }
}

/// A member's name without `.`, `..` and doubled slashes.
fn clean(name: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

/// A symbolic link's target, seen from the archive's top.
fn beside(name: &[u8], target: &[u8]) -> Vec<u8> {
    let slash = name.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    clean(&[&name[..slash], target].concat())
}

impl Files {
    fn describe(&self) -> String {
        match self {
            Self::Dir(dir) => dir.display().to_string(),
            Self::Archive(archive) => archive.path.display().to_string(),
        }
    }

    fn open(&self, name: &str) -> Result<Option<Blob>, ImageError> {
        match self {
            Self::Archive(archive) => Ok(archive.blob(name)),
            Self::Dir(dir) => {
                let path = dir.join(name);
                match Blob::open(&path, None) {
                    Ok(blob) => Ok(Some(blob)),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(error).named("open", &path).map_err(ImageError::from),
                }
            }
        }
    }

    /// A small file, whole.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(blob) = self.open(name)? else { return Ok(None) };
        if blob.length > MAX_DOCUMENT {
            let problem = format!("`{name}` is larger than such a file can be");
            return Err(unusable(&self.describe(), problem).into());
        }
        let mut text = Vec::new();
        blob.reader().read_to_end(&mut text).named("read", &blob.path)?;
        Ok(Some(text))
    }

    fn required(&self, name: &str, expected: &str) -> Result<Vec<u8>, ImageError> {
        self.read(name)?.ok_or_else(|| {
            let problem = format!("it has no `{name}`: expected {expected}");
            unusable(&self.describe(), problem).into()
        })
    }

    /// A blob of an OCI layout.
    fn blob(&self, descriptor: &Descriptor) -> Result<Blob, ImageError> {
        let image = self.describe();
        let digest = descriptor.sha256(&image)?;
        let name = format!("blobs/sha256/{digest}");
        let blob = self
            .open(&name)?
            .ok_or_else(|| unusable(&image, format!("its blob sha256:{digest} is missing")))?;
        if blob.length != descriptor.size {
            let problem = format!(
                "its blob sha256:{digest} has {} bytes instead of {}",
                blob.length, descriptor.size
            );
            return Err(unusable(&image, problem).into());
        }
        Ok(Blob { digest: Some(digest), ..blob })
    }

    /// A small blob of an OCI layout, checked.
    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let blob = self.blob(descriptor)?;
        let text =
            self.required(&format!("blobs/{}", descriptor.digest.replace(':', "/")), "it")?;
        if blob.digest != Some(Digest::of(&text)) {
            let problem = format!(
                "its blob {} does not have that digest but sha256:{}",
                descriptor.digest,
                Digest::of(&text)
            );
            return Err(unusable(&self.describe(), problem).into());
        }
        Ok(text)
    }
}

/// Opens an image in an OCI layout. Blocks its thread.
pub(crate) fn open_oci(files: &Files, tag: Option<&str>) -> Result<OciImage, ImageError> {
    let image = files.describe();
    let expected = "a directory or archive in the OCI image layout";
    files.required("oci-layout", expected)?;
    let index: Document =
        document::parse(&image, "index.json", &files.required("index.json", expected)?)?;
    let manifests = index.manifests.unwrap_or_default();
    let mut chosen = choose(&image, &manifests, tag)?;
    for _ in 0..MAX_INDEXES {
        let text = files.document(&chosen)?;
        let found: Document = document::parse(&image, "manifest", &text)?;
        match &found.manifests {
            Some(manifests) => chosen = document::choose_platform(&image, manifests)?,
            None => return from_manifest(files, found.into_manifest(&image)?, &chosen.digest),
        }
    }
    Err(unusable(&image, "its index leads to other indexes without end").into())
}

fn from_manifest(files: &Files, manifest: Manifest, digest: &str) -> Result<OciImage, ImageError> {
    let image = files.describe();
    let config: Config =
        document::parse(&image, "configuration", &files.document(&manifest.config)?)?;
    config.check_platform(&image)?;
    let diff_ids = config.diff_ids(&image, manifest.layers.len())?;
    let blobs = manifest.layers.iter().map(|layer| files.blob(layer));
    let blobs = blobs.collect::<Result<Vec<_>, _>>()?;
    let layers = diff_ids.into_iter().zip(blobs.into_iter().map(LayerSource::Here)).collect();
    let description = format!("{image} ({digest})");
    Ok(OciImage { description, config: config.into_image_config(), layers })
}

/// The image that is meant: the one of this name, or the only one.
fn choose(
    image: &str,
    manifests: &[Descriptor],
    tag: Option<&str>,
) -> Result<Descriptor, OciError> {
    let named = |entry: &Descriptor, tag: &str| {
        [REF_NAME, FULL_NAME]
            .iter()
            .any(|key| entry.annotations.get(*key).is_some_and(|n| n == tag))
            || entry.digest == tag
    };
    let names = || {
        let name =
            |entry: &Descriptor| entry.annotations.get(REF_NAME).unwrap_or(&entry.digest).clone();
        manifests.iter().map(name).collect::<Vec<_>>().join(", ")
    };
    let found: Vec<&Descriptor> =
        manifests.iter().filter(|entry| tag.is_none_or(|tag| named(entry, tag))).collect();
    match (found.as_slice(), tag) {
        ([only], _) => Ok((*only).clone()),
        ([], Some(tag)) => Err(OciError::Choose {
            image: image.to_owned(),
            problem: format!("has no image named `{tag}`, but these"),
            names: names(),
        }),
        ([], None) => Err(unusable(image, "there is no image in it")),
        // One image for several platforms, without an index of its own.
        (several, _) if several.iter().all(|entry| entry.platform.is_some()) => {
            let several: Vec<Descriptor> = several.iter().map(|entry| (*entry).clone()).collect();
            document::choose_platform(image, &several)
        }
        _ => Err(OciError::Choose {
            image: image.to_owned(),
            problem: "has several images; append a colon and one of these names".to_owned(),
            names: names(),
        }),
    }
}

/// One image of a `manifest.json`, as `docker save` writes it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The full name of the only image in an archive, of `docker save` or of an OCI layout, if it has one. One
/// that is compressed as a whole is expanded to a file without a name in `scratch`. Blocks its thread.
pub fn name_in_archive(archive: &Path, scratch: &Path) -> Option<String> {
    let files = Files::Archive(Archive::open(archive, scratch).ok()?);
    let document = |name: &str| files.read(name).ok().flatten();
    if let Some(text) = document("manifest.json") {
        let saved: Vec<SavedImage> = serde_json::from_slice(&text).ok()?;
        let [only] = saved.as_slice() else { return None };
        return only.repo_tags.as_ref()?.first().cloned();
    }
    let index: Document = serde_json::from_slice(&document("index.json")?).ok()?;
    let manifests = index.manifests?;
    let [only] = manifests.as_slice() else { return None };
    let full = only.annotations.get(FULL_NAME);
    // Alone, a tag such as `latest` names nothing.
    let short = only.annotations.get(REF_NAME).filter(|name| name.contains([':', '/']));
    full.or(short).cloned()
}

/// Opens what `docker save` wrote. Blocks its thread.
pub(crate) fn open_docker(files: &Files, name: Option<&str>) -> Result<OciImage, ImageError> {
    let image = files.describe();
    let expected = "what `docker save` writes";
    let text = files.required("manifest.json", expected)?;
    let saved: Vec<SavedImage> = document::parse(&image, "manifest.json", &text)?;
    let tags = |saved: &SavedImage| saved.repo_tags.clone().unwrap_or_default();
    let is_named = |saved: &&SavedImage| {
        name.is_none_or(|name| {
            // `busybox` stands for `docker.io/library/busybox:latest`, as for Docker.
            let meant = name.parse::<Reference>();
            tags(saved).iter().any(|tag| tag == name || (meant.is_ok() && tag.parse() == meant))
        })
    };
    let found: Vec<&SavedImage> = saved.iter().filter(is_named).collect();
    let [chosen] = found.as_slice() else {
        let problem = match (found.len(), name) {
            (0, Some(name)) => format!("has no image named `{name}`, but these"),
            (0, None) => return Err(unusable(&image, "there is no image in it").into()),
            _ => "has several images; append a colon and one of these names".to_owned(),
        };
        let names = saved.iter().flat_map(tags).collect::<Vec<_>>().join(", ");
        return Err(OciError::Choose { image, problem, names }.into());
    };
    let text = files.required(&chosen.config, expected)?;
    let digest = Digest::of(&text);
    let config: Config = document::parse(&image, "configuration", &text)?;
    config.check_platform(&image)?;
    let diff_ids = config.diff_ids(&image, chosen.layers.len())?;
    let blob = |name: &String| {
        let blob = files.open(name)?;
        let missing = || ImageError::from(unusable(&image, format!("its layer {name} is missing")));
        blob.map(LayerSource::Here).ok_or_else(missing)
    };
    let blobs = chosen.layers.iter().map(blob).collect::<Result<Vec<_>, _>>()?;
    let layers = diff_ids.into_iter().zip(blobs).collect();
    let name = tags(chosen).first().map_or_else(String::new, |tag| format!(" {tag}"));
    let description = format!("{image}{name} (sha256:{digest})");
    Ok(OciImage { description, config: config.into_image_config(), layers })
}
