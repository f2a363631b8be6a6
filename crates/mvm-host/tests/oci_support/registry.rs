//! Registries for tests: the real one of Debian, and one that misbehaves as told.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mvm_host::image::RegistryConfig;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

/// The user of a registry with [`RealRegistry::with_password`].
pub(crate) const USER: &str = "someone";
/// The password of that user.
pub(crate) const PASSWORD: &str = "secret";
const HTPASSWD: &str = "someone:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a";

/// Debian's `docker-registry`, on a port of its own.
pub(crate) struct RealRegistry {
    process: Child,
    pub(crate) host: String,
    _dir: tempfile::TempDir,
}

impl RealRegistry {
    pub(crate) fn start() -> Self {
        Self::start_with("")
    }

    /// Only [`USER`] with [`PASSWORD`] may pull.
    pub(crate) fn with_password() -> Self {
        Self::start_with("auth: { htpasswd: { realm: test, path: DIR/htpasswd } }")
    }

    #[allow(clippy::disallowed_methods)] // the tests run a real registry
    fn start_with(auth: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        let config = format!(
            "version: 0.1\nlog: {{ level: error, accesslog: {{ disabled: true }} }}\n\
             storage: {{ filesystem: {{ rootdirectory: DIR/data }} }}\n\
             http: {{ addr: \"{host}\" }}\n{auth}\n"
        );
        let config = config.replace("DIR", dir.path().to_str().unwrap());
        let file = dir.path().join("config.yml");
        fs::write(&file, config).unwrap();
        fs::write(dir.path().join("htpasswd"), format!("{HTPASSWD}\n")).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let process = Command::new("docker-registry")
            .args(["serve", file.to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        let address: SocketAddr = host.parse().unwrap();
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "the registry does not answer");
            std::thread::yield_now();
        }
        Self { process, host, _dir: dir }
    }

    /// Copies an image from an OCI layout to the registry, and returns its name there.
    pub(crate) fn push(&self, layout: &Path, name: &str) -> String {
        let image = format!("{}/{name}", self.host);
        let (from, to) = (format!("oci:{}:t", layout.display()), format!("docker://{image}"));
        let credentials = format!("{USER}:{PASSWORD}");
        super::run(
            "skopeo",
            &[
                "--insecure-policy",
                "copy",
                "-q",
                "--dest-tls-verify=false",
                "--dest-creds",
                &credentials,
                &from,
                &to,
            ],
        );
        image
    }
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A configuration without anything in it, below a directory.
pub(crate) fn no_config(dir: &Path) -> RegistryConfig {
    RegistryConfig {
        config: dir.join("registries.toml"),
        credentials: vec![dir.join("config.json")],
        stall: Duration::from_secs(30),
    }
}

/// What a registry does wrong with one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection ends after this many bytes of the body, the first time.
    CutOnce(usize),
    /// The connection ends after this many bytes of the body, each time.
    Cut(usize),
    /// Nothing more comes after this many bytes of the body.
    Stall(usize),
    /// Another status.
    Status(u16),
    /// Another length than the body has.
    Length(usize),
    /// Another body.
    Body(Vec<u8>),
    /// The whole body, whatever part was asked for.
    NoRanges,
}

/// A registry that serves an OCI layout as the image `x:t`, with faults.
pub(crate) struct FaultyRegistry {
    pub(crate) host: String,
    pub(crate) faults: Arc<Mutex<BTreeMap<String, Fault>>>,
    /// The requests so far, each with its range.
    pub(crate) requests: Arc<Mutex<Vec<String>>>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for FaultyRegistry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FaultyRegistry {
    pub(crate) async fn start(layout: &Path, manifest: &str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let faults = Arc::default();
        let requests = Arc::default();
        let shared = Served {
            layout: layout.to_owned(),
            manifest: manifest.to_owned(),
            faults: Arc::clone(&faults),
            requests: Arc::clone(&requests),
        };
        let server = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let shared = shared.clone();
                tokio::spawn(async move { drop(shared.serve(stream).await) });
            }
        });
        Self { host, faults, requests, server }
    }

    /// Makes the registry misbehave for a digest, or for `t`.
    pub(crate) fn fault(&self, name: &str, fault: Fault) {
        self.faults.lock().unwrap().insert(name.to_owned(), fault);
    }

    /// Makes it behave again.
    pub(crate) fn mend(&self) {
        self.faults.lock().unwrap().clear();
    }
}

#[derive(Clone)]
struct Served {
    layout: PathBuf,
    manifest: String,
    faults: Arc<Mutex<BTreeMap<String, Fault>>>,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Served {
    async fn serve(self, stream: tokio::net::TcpStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut range = None;
        loop {
            line.clear();
            stream.read_line(&mut line).await?;
            if line.trim().is_empty() {
                break;
            }
            let lower = line.to_lowercase();
            if let Some(from) = lower.trim().strip_prefix("range: bytes=") {
                range = from.trim_end_matches('-').parse::<usize>().ok();
            }
        }
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        self.requests.lock().unwrap().push(format!("{path} {}", range.unwrap_or(0)));
        let digest = if name == "t" { &self.manifest } else { &name };
        let blob = self.layout.join("blobs").join(digest.replace(':', "/"));
        let mut body =
            if path == "/v2/" { b"{}".to_vec() } else { fs::read(blob).unwrap_or_default() };
        let mut status = if body.is_empty() { 404 } else { 200 };
        let fault = self.faults.lock().unwrap().get(&name).cloned();
        let mut length = None;
        let mut cut = usize::MAX;
        let mut stalls = false;
        match &fault {
            Some(Fault::Status(other)) => status = *other,
            Some(Fault::Body(other)) => body = other.clone(),
            Some(Fault::Length(other)) => length = Some(*other),
            Some(Fault::Cut(at)) => cut = *at,
            Some(Fault::CutOnce(at)) => {
                cut = *at;
                self.faults.lock().unwrap().remove(&name);
            }
            Some(Fault::Stall(at)) => (cut, stalls) = (*at, true),
            Some(Fault::NoRanges) | None => {}
        }
        let part = match range {
            Some(from) if fault != Some(Fault::NoRanges) && status == 200 => {
                status = 206;
                body.split_off(from.min(body.len()))
            }
            _ => body,
        };
        let length = length.unwrap_or(part.len());
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let head = format!(
            "HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(&part[..cut.min(part.len())]).await?;
        stream.flush().await?;
        if stalls {
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}
