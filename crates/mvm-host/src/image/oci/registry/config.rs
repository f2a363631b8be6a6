//! Where images are pulled from: mirrors, registries without TLS, and credentials.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential_from_reader};
use oci_client::secrets::RegistryAuth;
use serde::Deserialize;

use super::RegistryError;
use crate::state_dir::StateDir;

/// The file in the state directory, unless the environment names another.
const CONFIG_VARIABLE: &str = "MVM_REGISTRY_CONFIG";
/// The key of Docker Hub in Docker's configuration.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// How long a registry may send nothing, unless told otherwise.
const STALL: Duration = Duration::from_secs(30);
/// How long a credential helper may take.
const HELPER_LIMIT: Duration = Duration::from_secs(30);

/// Where this machine's registry configuration is. It is read anew for each pull.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// Mirrors and registries without TLS.
    pub config: PathBuf,
    /// Docker's configuration files, in the order in which they are asked for credentials.
    pub credentials: Vec<PathBuf>,
    /// How long a registry may send nothing before it counts as gone.
    pub stall: Duration,
}

/// `registries.toml`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    #[serde(default)]
    registry: BTreeMap<String, RegistryEntry>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RegistryEntry {
    /// `HOST[:PORT][/PREFIX]` each, asked in order before the registry itself.
    mirrors: Vec<String>,
    /// Whether the registry speaks HTTP without TLS; on this machine itself it does.
    plain_http: Option<bool>,
}

/// One place that an image may be pulled from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) host: String,
    /// Stands before the image's path, with a slash at its end, or is empty.
    pub(super) prefix: String,
    pub(super) plain_http: bool,
}

impl RegistryConfig {
    /// As the environment of this process says: `MVM_REGISTRY_CONFIG`, or `registries.toml` in the
    /// state directory; `REGISTRY_AUTH_FILE`, or `config.json` in `DOCKER_CONFIG` or in `~/.docker`.
    pub fn from_environment(state: &StateDir) -> Self {
        let path =
            |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let docker = path("DOCKER_CONFIG").or(path("HOME").map(|home| home.join(".docker")));
        let credentials = [path("REGISTRY_AUTH_FILE"), docker.map(|dir| dir.join("config.json"))];
        Self {
            config: path(CONFIG_VARIABLE).unwrap_or_else(|| state.registries()),
            credentials: credentials.into_iter().flatten().collect(),
            stall: STALL,
        }
    }

    /// The places to ask for an image of a registry, mirrors first.
    pub(super) fn endpoints(&self, registry: &str) -> Result<Vec<Endpoint>, RegistryError> {
        let bad = |problem: String| RegistryError::Config { path: self.config.clone(), problem };
        let file: ConfigFile = match fs::read_to_string(&self.config) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => ConfigFile::default(),
            Err(error) => return Err(bad(format!("it cannot be read: {error}"))),
            Ok(text) => toml::from_str(&text).map_err(|error| bad(error.to_string()))?,
        };
        let entry = |host: &str| file.registry.get(host).cloned().unwrap_or_default();
        let mirrors = entry(registry).mirrors;
        let mut endpoints = Vec::new();
        for place in mirrors.iter().map(String::as_str).chain([registry]) {
            if place.contains("://") {
                let problem = format!("`{place}` has a scheme: expected HOST[:PORT][/PREFIX]");
                return Err(bad(problem));
            }
            let (host, prefix) = match place.split_once('/') {
                Some((host, prefix)) => (host, format!("{}/", prefix.trim_end_matches('/'))),
                None => (place, String::new()),
            };
            let plain_http = entry(host).plain_http.unwrap_or_else(|| is_loopback(host));
            endpoints.push(Endpoint { host: host.to_owned(), prefix, plain_http });
        }
        Ok(endpoints)
    }

    /// What a registry is told about who asks.
    pub(super) async fn credentials(&self, host: &str) -> Result<RegistryAuth, RegistryError> {
        let key = if host == "docker.io" { DOCKER_HUB_KEY } else { host }.to_owned();
        let files = self.credentials.clone();
        // A helper is a program that may hang, and the library waits for it.
        let asked = tokio::task::spawn_blocking(move || ask(&files, &key));
        let failed =
            |problem: String| RegistryError::Credentials { registry: host.to_owned(), problem };
        match tokio::time::timeout(HELPER_LIMIT, asked).await {
            Err(_) => Err(failed("the credential helper does not answer".to_owned())),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Ok(Ok(asked)) => asked.map_err(failed),
        }
    }

    /// The files that credentials are looked for in, for people.
    pub(super) fn credential_files(&self) -> String {
        let files = self.credentials.iter().map(|path| path.display().to_string());
        files.collect::<Vec<_>>().join(" and ")
    }
}

fn ask(files: &[PathBuf], key: &str) -> Result<RegistryAuth, String> {
    for path in files {
        let file = match fs::File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(format!("{} cannot be read: {error}", path.display())),
            Ok(file) => io::BufReader::new(file),
        };
        match get_credential_from_reader(file, key) {
            Ok(DockerCredential::UsernamePassword(user, password)) => {
                return Ok(RegistryAuth::Basic(user, password));
            }
            Ok(DockerCredential::IdentityToken(_)) => {
                return Err(format!(
                    "{} has an identity token, which mvm cannot use: log in with a user name and a password or access token",
                    path.display()
                ));
            }
            Err(CredentialRetrievalError::NoCredentialConfigured) => {}
            // What a helper prints on its standard output is meant to be a secret.
            Err(CredentialRetrievalError::HelperFailure { helper, stderr, .. }) => {
                return Err(format!("`{helper}` failed: {}", stderr.trim()));
            }
            Err(error) => return Err(format!("{}: {error}", path.display())),
        }
    }
    Ok(RegistryAuth::Anonymous)
}

/// Whether a host is this machine, where nobody listens on the way.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> (tempfile::TempDir, RegistryConfig) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("registries.toml");
        fs::write(&file, text).unwrap();
        let credentials = vec![dir.path().join("absent.json"), dir.path().join("config.json")];
        (dir, RegistryConfig { config: file, credentials, stall: STALL })
    }

    fn endpoint(host: &str, prefix: &str, plain_http: bool) -> Endpoint {
        Endpoint { host: host.to_owned(), prefix: prefix.to_owned(), plain_http }
    }

    #[test]
    fn mirrors_come_first_and_this_machine_needs_no_tls() {
        let (_dir, config) = config(
            "[registry.\"docker.io\"]\nmirrors = [\"localhost:5000\", \"m.example/hub/\"]\n\
             [registry.\"plain.example:80\"]\nplain_http = true\n\
             [registry.\"127.0.0.1\"]\nplain_http = false\n",
        );
        assert_eq!(
            config.endpoints("docker.io").unwrap(),
            [
                endpoint("localhost:5000", "", true),
                endpoint("m.example", "hub/", false),
                endpoint("docker.io", "", false),
            ]
        );
        for (host, plain_http) in [
            ("plain.example:80", true),
            ("127.0.0.1", false),
            ("127.9.9.9:1", true),
            ("[::1]:5000", true),
            ("ghcr.io", false),
        ] {
            assert_eq!(config.endpoints(host).unwrap(), [endpoint(host, "", plain_http)]);
        }
    }

    #[test]
    fn a_configuration_that_makes_no_sense_is_refused_with_its_place() {
        for (text, part) in [
            ("[registry.x]\nmirror = []\n", "mirror"),
            ("[registry.x]\nmirrors = [\"https://m\"]\n", "has a scheme"),
            ("registry = 3\n", "registries.toml"),
        ] {
            let (_dir, config) = config(text);
            let error = config.endpoints("x").unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("registries.toml"), "{error}");
        }
    }

    #[tokio::test]
    async fn credentials_come_from_dockers_configuration() {
        let (dir, config) = config("");
        assert_eq!(config.credentials("a.example").await.unwrap(), RegistryAuth::Anonymous);
        let auths = r#"{"auths":{
            "a.example":{"auth":"dXNlcjpwYXNz"},
            "https://index.docker.io/v1/":{"auth":"aHViOnB3"},
            "t.example":{"identitytoken":"x"}
        },"credHelpers":{"h.example":"mvm-no-such-helper"}}"#;
        fs::write(dir.path().join("config.json"), auths).unwrap();
        let basic = |user: &str, password: &str| RegistryAuth::Basic(user.into(), password.into());
        assert_eq!(config.credentials("a.example").await.unwrap(), basic("user", "pass"));
        assert_eq!(config.credentials("docker.io").await.unwrap(), basic("hub", "pw"));
        assert_eq!(config.credentials("b.example").await.unwrap(), RegistryAuth::Anonymous);
        for (host, part) in [("t.example", "identity token"), ("h.example", "helper")] {
            let error = config.credentials(host).await.unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(host), "{error}");
        }
    }
}
