//! SSH into guests: each tenant's key, and the host keys of its guests.
//!
//! A tenant has one key pair, made with the tenant and removed with it. The public half goes to a
//! guest when somebody wants to log in; the private one never leaves the state directory.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mvm_core::guest::{ExecRequest, ExitStatus};
use mvm_core::name::{InstancePath, Selector, TenantName};
use mvm_host::guest::{ExecOutput, Session, SessionError};
use mvm_host::state_dir::StateDir;
use mvm_wire::view::SshView;
use mvm_wire::{ApiError, ErrorCode};
use ssh_key::private::{Ed25519Keypair, KeypairData};
use ssh_key::{LineEnding, PrivateKey, PublicKey};

use crate::node::Node;
use crate::sessions::{guest_error, session};

/// How long a guest may take to make a host key.
const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// Most that a guest may say about its host keys, in bytes.
const KEYS_MAX: usize = 64 * 1024;
/// Host keys of a guest that are kept.
const MOST_HOST_KEYS: usize = 8;

/// Why a key could not be made, read or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SshError {
    /// A file or directory.
    #[error("cannot use {}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The system gave no random bytes.
    #[error("there are no random bytes for a key")]
    Random(#[source] io::Error),
    /// A file holds no key.
    #[error("{} holds no key", .path.display())]
    Key {
        /// Which.
        path: PathBuf,
        /// Why.
        source: ssh_key::Error,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> SshError {
    move |source| SshError::File { path: path.to_owned(), source }
}

/// Makes sure that a tenant has a key, and tells its public half.
pub(crate) fn ensure_key(state_dir: &StateDir, tenant: &TenantName) -> Result<String, SshError> {
    let path = state_dir.ssh_key(tenant);
    let bad = |source| SshError::Key { path: path.clone(), source };
    let key = match fs::read_to_string(&path) {
        Ok(text) => PrivateKey::from_openssh(&text).map_err(bad)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut seed = [0; 32];
            getrandom::fill(&mut seed)
                .map_err(|error| SshError::Random(io::Error::other(error.to_string())))?;
            let pair = KeypairData::Ed25519(Ed25519Keypair::from_seed(&seed));
            let key = PrivateKey::new(pair, format!("mvm tenant {tenant}")).map_err(bad)?;
            let text = key.to_openssh(LineEnding::LF).map_err(bad)?;
            write_private(&path, text.as_bytes())?;
            key
        }
        Err(source) => return Err(SshError::File { path, source }),
    };
    key.public_key().to_openssh().map_err(bad)
}

/// Writes a file, whole or not at all, that its owner alone may read.
fn write_private(path: &Path, content: &[u8]) -> Result<(), SshError> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
    let draft = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&draft, path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(at(path))
}

/// Removes a tenant's key.
pub(crate) fn remove_key(state_dir: &StateDir, tenant: &TenantName) -> Result<(), SshError> {
    let path = state_dir.ssh_key(tenant);
    let dir = path.parent().unwrap_or(&path);
    mvm_host::removal::remove_tree(dir).map_err(at(dir))
}

/// Makes a guest ready for an SSH client: the tenant's key may log in, and the guest's host keys,
/// asked over the channel, are in a file.
pub(crate) async fn prepare(node: &Arc<Node>, selector: &Selector) -> Result<SshView, ApiError> {
    let (instance, session) = session(node, selector).await?;
    let state_dir = &node.config.state_dir;
    let key =
        ensure_key(state_dir, &instance.pool.tenant).map_err(|error| ApiError::internal(&error))?;
    let output = ask(&session, key).await.map_err(|error| guest_error(&instance, &error))?;
    if output.status != (ExitStatus::Exited { code: 0 }) {
        let text = String::from_utf8_lossy(&output.stderr);
        let line: String = text.trim().chars().filter(|c| !c.is_control()).take(500).collect();
        return Err(ApiError::new(ErrorCode::Guest, format!("{instance}: {line}"))
            .hint(format!("for a shell without SSH: `mvm exec -it {} -- sh`", instance.id)));
    }
    let lines = known_hosts(&instance, &output.stdout);
    if lines.is_empty() {
        let message = format!("{instance}: its SSH server has no host key");
        return Err(ApiError::new(ErrorCode::Guest, message));
    }
    let known_hosts = state_dir.known_hosts(&instance);
    write_private(&known_hosts, lines.as_bytes()).map_err(|error| ApiError::internal(&error))?;
    let identity = state_dir.ssh_key(&instance.pool.tenant);
    Ok(SshView {
        instance,
        identity_file: identity.display().to_string(),
        known_hosts_file: known_hosts.display().to_string(),
    })
}

async fn ask(session: &Session, key: String) -> Result<ExecOutput, SessionError> {
    let request = ExecRequest {
        argv: vec!["ssh-prepare".to_owned(), key],
        cwd: Some("/".to_owned()),
        timeout_ms: Some(PREPARE_LIMIT.as_millis() as u64),
        builtin: true,
        ..ExecRequest::default()
    };
    session.exec(request, PREPARE_LIMIT).await?.output(KEYS_MAX).await
}

/// Lines for a file of known hosts. What a guest says is taken only as far as it is keys.
fn known_hosts(instance: &InstancePath, said: &[u8]) -> String {
    let host = SshView::host(instance);
    let said = String::from_utf8_lossy(said);
    let keys = said.lines().filter_map(|line| {
        let mut key = PublicKey::from_openssh(line).ok()?;
        key.set_comment("");
        key.to_openssh().ok()
    });
    keys.take(MOST_HOST_KEYS).map(|key| format!("{host} {}\n", key.trim())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_tenants_key_is_made_once_is_private_and_goes_with_the_tenant() {
        let dir = tempfile::tempdir().unwrap();
        let tenant: TenantName = "demo".parse().unwrap();
        let public = ensure_key(&dir.path().into(), &tenant).unwrap();
        assert!(public.starts_with("ssh-ed25519 ") && public.ends_with("mvm tenant demo"));
        assert_eq!(ensure_key(&dir.path().into(), &tenant).unwrap(), public);
        let file = dir.path().join("ssh/demo/id_ed25519");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let of_dir = fs::metadata(file.parent().unwrap()).unwrap().permissions().mode();
        assert_eq!(of_dir & 0o777, 0o700);
        for _ in 0..2 {
            remove_key(&dir.path().into(), &tenant).unwrap();
        }
        assert!(!file.exists());
        assert_ne!(ensure_key(&dir.path().into(), &tenant).unwrap(), public);
    }

    #[test]
    fn of_what_a_guest_says_only_keys_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let key = ensure_key(&dir.path().into(), &"demo".parse().unwrap()).unwrap();
        let instance = "demo/web/i-00000001".parse().unwrap();
        let said = format!("{key}\n* ssh-ed25519 AAAA\n@cert-authority * {key}\nnonsense\n\x1b[2J");
        let lines = known_hosts(&instance, said.as_bytes());
        let data = key.strip_suffix(" mvm tenant demo").unwrap();
        assert_eq!(lines, format!("demo-web-i-00000001.mvm {data}\n"));
    }
}
