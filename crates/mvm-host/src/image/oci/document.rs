//! The JSON documents of an image: index, manifest and configuration, of Docker and of OCI.

use std::collections::{BTreeMap, BTreeSet};

use mvm_core::image::ImageConfig;
use mvm_core::init::InitMode;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::cpu_level::Level;
use super::error::OciError;
use super::limits::MAX_LAYERS;
use crate::image::digest::Digest;

pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
const OCTETS: &str = "application/octet-stream";
const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// What a blob is.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: String,
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) platform: Option<Platform>,
    #[serde(default)]
    pub(crate) annotations: BTreeMap<String, String>,
    #[serde(default)]
    urls: Vec<String>,
}

/// A machine that an image is for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) variant: Option<String>,
}

impl Platform {
    /// What microVMs of this machine run.
    pub(crate) fn host() -> Self {
        let architecture = architecture(std::env::consts::ARCH);
        Self { os: "linux".to_owned(), architecture, variant: None }
    }

    fn runs_on(&self, host: &Self) -> bool {
        self.os.eq_ignore_ascii_case(&host.os)
            && architecture(&self.architecture) == host.architecture
    }

    /// How well an image for this platform suits a machine of this level, if it runs there.
    fn rank(&self, host: &Self, level: Level) -> Option<u8> {
        if !self.runs_on(host) {
            return None;
        }
        let variant = self.variant.as_deref().filter(|variant| !variant.is_empty());
        if host.architecture != AMD64 {
            // arm64 has one variant in practice, and an index says `v8` or nothing.
            return Some(u8::from(matches!(variant, None | Some("v8"))));
        }
        let needed = variant.map_or(Some(1), |variant| variant.strip_prefix('v')?.parse().ok())?;
        // One that only some processors of a guest can run is better than none.
        (needed <= level.host).then_some(if needed <= level.guests { needed } else { 0 })
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

const AMD64: &str = "amd64";

/// An architecture as images spell it; some tools spell it as kernels do.
fn architecture(name: &str) -> String {
    match name.to_ascii_lowercase().as_str() {
        "x86_64" | "x86-64" => AMD64.to_owned(),
        "aarch64" => "arm64".to_owned(),
        other => other.to_owned(),
    }
}

/// An index or a manifest, told by what is in it: some tools leave the media type out.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Document {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    pub(crate) manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default)]
    artifact_type: Option<String>,
}

/// The manifest of one image.
#[derive(Debug, Clone)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// The configuration of one image.
#[derive(Debug, Deserialize)]
pub(crate) struct Config {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
    #[serde(default)]
    config: Option<RunConfig>,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// How an image is run; `null` stands for nothing.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfig {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    healthcheck: Option<Healthcheck>,
}

/// How a container's health is checked.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Healthcheck {
    test: Option<Vec<String>>,
}

impl Healthcheck {
    /// Whether it is a check, not the wish for none or for that of the image below.
    fn is_check(&self) -> bool {
        self.test.as_ref().and_then(|test| test.first()).is_some_and(|word| word != "NONE")
    }
}

/// Names the image that a problem is about.
pub(crate) fn unusable(image: &str, problem: impl Into<String>) -> OciError {
    OciError::Image { image: image.to_owned(), problem: problem.into() }
}

/// Reads a JSON document of an image.
pub(crate) fn parse<T: DeserializeOwned>(
    image: &str,
    what: &str,
    text: &[u8],
) -> Result<T, OciError> {
    serde_json::from_slice(text)
        .map_err(|error| unusable(image, format!("its {what} does not parse: {error}")))
}

impl Descriptor {
    /// The digest, which can only be SHA-256.
    pub(crate) fn sha256(&self, image: &str) -> Result<Digest, OciError> {
        sha256(image, &self.digest)
    }
}

/// A digest such as `sha256:…`.
pub(crate) fn sha256(image: &str, digest: &str) -> Result<Digest, OciError> {
    digest.strip_prefix("sha256:").and_then(|hex| hex.parse().ok()).ok_or_else(|| {
        unusable(image, format!("`{digest}` is not a digest that mvm knows: expected sha256:…"))
    })
}

impl Document {
    /// The manifest in it; indexes are resolved before.
    pub(crate) fn into_manifest(self, image: &str) -> Result<Manifest, OciError> {
        let media_type = self.media_type.as_deref().unwrap_or(OCI_MANIFEST);
        if ![OCI_MANIFEST, DOCKER_MANIFEST].contains(&media_type) || self.schema_version != 2 {
            let version = self.schema_version;
            let problem = format!(
                "its manifest is of the type {media_type}, version {version}: expected an OCI or Docker manifest of version 2"
            );
            return Err(unusable(image, problem));
        }
        let (Some(config), Some(layers)) = (self.config, self.layers) else {
            return Err(unusable(image, "its manifest has no configuration or no layers"));
        };
        let kind = config.media_type.as_str();
        // Docker's manifests of long ago say no more than that.
        let is_unspecific = media_type == DOCKER_MANIFEST && kind == OCTETS;
        if !CONFIGS.contains(&kind) && !is_unspecific {
            let kind =
                self.artifact_type.as_deref().filter(|kind| !kind.is_empty()).unwrap_or(kind);
            let problem = format!("it is not a container image but an artifact of the type {kind}");
            return Err(unusable(image, problem));
        }
        if layers.len() > MAX_LAYERS {
            return Err(unusable(image, format!("it has more than {MAX_LAYERS} layers")));
        }
        for layer in &layers {
            check_layer(image, layer)?;
        }
        Ok(Manifest { config, layers })
    }
}

fn check_layer(image: &str, layer: &Descriptor) -> Result<(), OciError> {
    let kind = layer.media_type.as_str();
    if LAYERS.contains(&kind) {
        return Ok(());
    }
    let what = if kind.contains("foreign") || kind.contains("nondistributable") {
        let from = layer.urls.first().map_or("another place", String::as_str);
        format!(
            "layer {} is foreign: it may only be fetched from {from}, and mvm fetches from the image's registry alone",
            layer.digest
        )
    } else if kind.ends_with("+encrypted") {
        format!("layer {} is encrypted", layer.digest)
    } else {
        format!(
            "layer {} is of the type {kind}: expected a tar archive, plain or with gzip or zstd",
            layer.digest
        )
    };
    Err(unusable(image, what))
}

/// The image of an index that runs on this machine.
pub(crate) fn choose_platform(
    image: &str,
    manifests: &[Descriptor],
) -> Result<Descriptor, OciError> {
    best_of(image, manifests, &Platform::host(), Level::of_this_machine())
}

fn best_of(
    image: &str,
    manifests: &[Descriptor],
    host: &Platform,
    level: Level,
) -> Result<Descriptor, OciError> {
    let ranked = manifests.iter().filter_map(|entry| {
        let rank = entry.platform.as_ref()?.rank(host, level)?;
        Some((rank, entry))
    });
    // Of equals the first.
    let best = ranked.reduce(|best, next| if next.0 > best.0 { next } else { best });
    if let Some((_, entry)) = best {
        return Ok(entry.clone());
    }
    if let [only] = manifests
        && only.platform.is_none()
    {
        return Ok(only.clone());
    }
    let platforms = manifests.iter().filter_map(|entry| entry.platform.as_ref());
    let mut wanted = host.clone();
    if platforms.clone().any(|platform| platform.runs_on(host)) {
        wanted.variant = Some(format!("v{}", level.host));
    }
    let platforms = platforms.filter(|platform| platform.os != "unknown");
    let found: BTreeSet<String> = platforms.map(ToString::to_string).collect();
    let found = found.into_iter().collect::<Vec<_>>().join(", ");
    let found = if found.is_empty() { "no platform at all".to_owned() } else { found };
    Err(OciError::Platform { image: image.to_owned(), wanted: wanted.to_string(), found })
}

impl Config {
    /// Checks that the image is for this machine.
    pub(crate) fn check_platform(&self, image: &str) -> Result<(), OciError> {
        let found = Platform {
            os: self.os.clone(),
            architecture: self.architecture.clone(),
            variant: self.variant.clone(),
        };
        let host = Platform::host();
        if found.runs_on(&host) || (found.os.is_empty() && found.architecture.is_empty()) {
            return Ok(());
        }
        let (wanted, found) = (host.to_string(), found.to_string());
        Err(OciError::Platform { image: image.to_owned(), wanted, found })
    }

    /// The digests of the layers' tar archives, from the bottom.
    pub(crate) fn diff_ids(&self, image: &str, layers: usize) -> Result<Vec<Digest>, OciError> {
        let found = self.rootfs.diff_ids.len();
        if found != layers {
            let problem = format!("it has {layers} layers, and its configuration names {found}");
            return Err(unusable(image, problem));
        }
        self.rootfs.diff_ids.iter().map(|digest| sha256(image, digest)).collect()
    }

    /// The part that a microVM honours.
    pub(crate) fn into_image_config(self) -> ImageConfig {
        let config = self.config.unwrap_or_default();
        let entrypoint = config.entrypoint.unwrap_or_default();
        let cmd = config.cmd.unwrap_or_default();
        let command: Vec<&String> = entrypoint.iter().chain(&cmd).collect();
        let init = match InitMode::of(&command) {
            InitMode::System => command.first().map(|program| (*program).clone()),
            InitMode::None | InitMode::Program => None,
        };
        ImageConfig {
            entrypoint,
            cmd,
            env: config.env.unwrap_or_default(),
            user: config.user.unwrap_or_default(),
            working_dir: config.working_dir.unwrap_or_default(),
            stop_signal: config.stop_signal.filter(|signal| !signal.is_empty()),
            exposed_ports: config.exposed_ports.unwrap_or_default().into_keys().collect(),
            volumes: config.volumes.unwrap_or_default().into_keys().collect(),
            has_healthcheck: config.healthcheck.is_some_and(|check| check.is_check()),
            init,
            // Found once there is a tree.
            init_links: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
mod tests;
