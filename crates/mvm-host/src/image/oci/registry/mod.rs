//! Pulls images from registries: documents at once, layers when they are needed.
//!
//! Mirrors are asked first, the registry itself last. Layers are downloaded to
//! `layers/downloads/`, go on where an earlier download stopped, and are gone once they are
//! unpacked.

mod config;
mod download;
mod error;

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use mvm_core::image::Reference;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::{Client, Reference as RemoteReference};

use config::Endpoint;
pub use config::RegistryConfig;
pub(crate) use download::Downloads;
pub use error::RegistryError;

use super::document::{
    self, Config, DOCKER_INDEX, DOCKER_MANIFEST, Descriptor, Document, OCI_INDEX, OCI_MANIFEST,
    unusable,
};
use super::limits::{MAX_DOCUMENT, MAX_INDEXES};
use super::{LayerSource, OciError, OciImage};
use crate::image::digest::Digest;
use crate::tls;

/// How long it may take to connect.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a document may take from request to end.
const DOCUMENT_LIMIT: Duration = Duration::from_secs(60);
const ACCEPTED: [&str; 4] = [OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST];

/// One image at the places that may have it.
pub(crate) struct Remote {
    reference: Reference,
    places: Vec<Place>,
    /// Where credentials were looked for.
    credential_files: String,
    stall: Duration,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Remote({})", self.reference)
    }
}

struct Place {
    endpoint: Endpoint,
    client: Client,
    auth: oci_client::secrets::RegistryAuth,
}

impl Place {
    fn new(
        endpoint: Endpoint,
        auth: oci_client::secrets::RegistryAuth,
        stall: Duration,
    ) -> Result<Self, OciDistributionError> {
        tls::ensure_provider();
        let protocol =
            if endpoint.plain_http { ClientProtocol::Http } else { ClientProtocol::Https };
        let client = Client::try_from(ClientConfig {
            protocol,
            read_timeout: Some(stall),
            connect_timeout: Some(CONNECT),
            user_agent: concat!("mvm/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        })?;
        Ok(Self { endpoint, client, auth })
    }

    fn repository(&self, reference: &Reference) -> String {
        format!("{}{}", self.endpoint.prefix, reference.repository())
    }

    fn by_digest(&self, reference: &Reference, digest: &str) -> RemoteReference {
        let (host, repository) = (self.endpoint.host.clone(), self.repository(reference));
        RemoteReference::with_digest(host, repository, digest.to_owned())
    }

    /// The image that the reference means; a digest decides before a tag.
    fn top(&self, reference: &Reference) -> RemoteReference {
        match (reference.digest(), reference.tag()) {
            (Some(digest), _) => self.by_digest(reference, digest),
            (None, tag) => {
                let (host, repository) = (self.endpoint.host.clone(), self.repository(reference));
                RemoteReference::with_tag(host, repository, tag.unwrap_or("latest").to_owned())
            }
        }
    }
}

impl Remote {
    /// Finds out where to ask and as whom; nothing is asked yet.
    async fn new(reference: &Reference, config: &RegistryConfig) -> Result<Self, RegistryError> {
        let mut places = Vec::new();
        for endpoint in config.endpoints(reference.registry())? {
            let auth = config.credentials(&endpoint.host).await?;
            let host = endpoint.host.clone();
            let place = Place::new(endpoint, auth, config.stall)
                .map_err(|error| RegistryError::new(&reference.to_string(), &host, "", &error))?;
            places.push(place);
        }
        let credential_files = config.credential_files();
        Ok(Self { reference: reference.clone(), places, credential_files, stall: config.stall })
    }

    fn sorted(&self, place: &Place, error: &OciDistributionError) -> RegistryError {
        let image = self.reference.to_string();
        match error {
            OciDistributionError::RequestError(error)
                if error.is_timeout() && !error.is_connect() =>
            {
                self.stalled(place)
            }
            error => {
                RegistryError::new(&image, &place.endpoint.host, &self.credential_files, error)
            }
        }
    }

    fn broken(&self, place: &Place, problem: String) -> RegistryError {
        let registry = place.endpoint.host.clone();
        RegistryError::Broken { image: self.reference.to_string(), registry, problem }
    }

    fn stalled(&self, place: &Place) -> RegistryError {
        let registry = place.endpoint.host.clone();
        RegistryError::Stalled {
            image: self.reference.to_string(),
            registry,
            seconds: self.stall.as_secs(),
        }
    }

    /// The error of an image that no place was asked for.
    fn nowhere(&self) -> RegistryError {
        let registry = self.reference.registry().to_owned();
        RegistryError::NotFound { image: self.reference.to_string(), registry }
    }

    /// An index or manifest with its digest, checked if the digest was asked for. One place is
    /// asked after the other; the last one, the registry itself, has the last word.
    async fn manifest(&self, digest: Option<&str>) -> Result<(Vec<u8>, Digest), RegistryError> {
        let mut last = self.nowhere();
        for place in &self.places {
            match self.manifest_from(place, digest).await {
                Ok(found) => return Ok(found),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn manifest_from(
        &self,
        place: &Place,
        digest: Option<&str>,
    ) -> Result<(Vec<u8>, Digest), RegistryError> {
        let reference = match digest {
            Some(digest) => place.by_digest(&self.reference, digest),
            None => place.top(&self.reference),
        };
        let pulling = place.client.pull_manifest_raw(&reference, &place.auth, &ACCEPTED);
        let pulled = tokio::time::timeout(DOCUMENT_LIMIT, pulling).await;
        let pulled = pulled.map_err(|_| self.stalled(place))?;
        let (text, _) = pulled.map_err(|error| self.sorted(place, &error))?;
        let found = Digest::of(&text);
        let asked = digest.or(self.reference.digest());
        match asked.filter(|asked| **asked != *format!("sha256:{found}")) {
            None => Ok((text.to_vec(), found)),
            Some(asked) => {
                Err(self.broken(place, format!("sends sha256:{found} instead of {asked}")))
            }
        }
    }

    /// A small blob, checked.
    async fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, OciError> {
        let image = self.reference.to_string();
        let digest = descriptor.sha256(&image)?;
        if descriptor.size > MAX_DOCUMENT {
            let problem = "its configuration is larger than such a file can be";
            return Err(unusable(&image, problem));
        }
        let mut last = self.nowhere();
        for place in &self.places {
            let fetching = self.document_from(place, descriptor, digest);
            match tokio::time::timeout(DOCUMENT_LIMIT, fetching).await {
                Ok(Ok(text)) => return Ok(text),
                Ok(Err(error)) => last = error,
                Err(_) => last = self.stalled(place),
            }
        }
        Err(last.into())
    }

    async fn document_from(
        &self,
        place: &Place,
        descriptor: &Descriptor,
        digest: Digest,
    ) -> Result<Vec<u8>, RegistryError> {
        let reference = place.top(&self.reference);
        place.client.store_auth_if_needed(reference.resolve_registry(), &place.auth).await;
        let opened = place.client.pull_blob_stream(&reference, descriptor.digest.as_str());
        let mut stream = opened.await.map_err(|error| self.sorted(place, &error))?;
        let mut text = Vec::new();
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| self.broken(place, error::innermost(&error)))?;
            text.extend_from_slice(&chunk);
            if text.len() as u64 > descriptor.size {
                let promised = descriptor.size;
                let problem = format!("sends more than the {promised} bytes that it promised");
                return Err(self.broken(place, problem));
            }
        }
        match Digest::of(&text) {
            found if found == digest => Ok(text),
            found => {
                let problem = format!("sends sha256:{found} instead of sha256:{digest}");
                Err(self.broken(place, problem))
            }
        }
    }
}

/// Finds out what an image is at its registry now.
pub(crate) async fn resolve(
    reference: &Reference,
    config: &RegistryConfig,
) -> Result<OciImage, OciError> {
    let remote = Remote::new(reference, config).await?;
    let image = reference.to_string();
    let (mut text, top) = remote.manifest(None).await?;
    let mut found: Document = document::parse(&image, "manifest", &text)?;
    for _ in 0..MAX_INDEXES {
        let Some(manifests) = &found.manifests else { break };
        let chosen = document::choose_platform(&image, manifests)?;
        let pulled = remote.manifest(Some(&chosen.digest)).await;
        (text, _) = pulled?;
        found = document::parse(&image, "manifest", &text)?;
    }
    let manifest = found.into_manifest(&image)?;
    let config: Config =
        document::parse(&image, "configuration", &remote.document(&manifest.config).await?)?;
    config.check_platform(&image)?;
    let diff_ids = config.diff_ids(&image, manifest.layers.len())?;
    let remote = Arc::new(remote);
    let source = |layer: Descriptor| {
        let digest = layer.sha256(&image)?;
        Ok(LayerSource::Remote { remote: remote.clone(), digest, size: layer.size })
    };
    let sources: Result<Vec<_>, OciError> = manifest.layers.into_iter().map(source).collect();
    Ok(OciImage {
        description: format!("{image} (sha256:{top})"),
        config: config.into_image_config(),
        layers: diff_ids.into_iter().zip(sources?).collect(),
    })
}
