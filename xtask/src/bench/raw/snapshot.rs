//! The peer's own way to save and restore: QEMU's migration into a file and out of it.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use mvm_host::guest::{Session, SessionMode};
use mvm_host::unix_socket;
use mvm_host::vmm::qmp::QmpClient;
use serde::Deserialize;
use serde_json::json;

use super::{AGENT_SOCKET, GUEST_LIMIT, POLL, PROGRAM, RawMachine, first_exec};
use mvm_host::process::{Spawn, spawn};

/// How long QEMU has for one command, and for a migration.
const LIMIT: Duration = Duration::from_secs(120);
/// The file in a machine's directory that holds its state.
const STATE: &str = "state";
/// No limit, as far as a machine can tell, in bytes per second.
const UNBOUNDED: u64 = 1 << 40;

/// What a save took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawSave {
    /// From the order to stop to a state that is durable.
    pub(crate) whole: Duration,
    /// The state's size.
    pub(crate) bytes: u64,
}

/// When a restored machine had got where, since it was started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawWake {
    /// QEMU answered.
    pub(crate) process: Duration,
    /// Memory and devices were loaded.
    pub(crate) loaded: Duration,
    /// The guest agent said hello.
    pub(crate) hello: Duration,
    /// The first program had ended.
    pub(crate) exec: Duration,
}

impl RawMachine {
    /// Saves it into a file, durably, and ends it.
    pub(crate) async fn sleep(&mut self) -> anyhow::Result<RawSave> {
        let qmp = self.qmp().await?;
        let state = self.dir.path().join(STATE);
        // What is the same for a mvm snapshot is not in the measured time.
        let parameters = json!({ "max-bandwidth": UNBOUNDED });
        qmp.execute("migrate-set-parameters", parameters, LIMIT).await?;
        let began = Instant::now();
        qmp.execute("stop", json!({}), LIMIT).await?;
        let uri = format!("exec:cat > {}", state.display());
        qmp.execute("migrate", json!({ "uri": uri }), LIMIT).await?;
        loop {
            #[derive(Deserialize)]
            struct Migration {
                status: String,
            }
            let Migration { status } = qmp.query("query-migrate", LIMIT).await?;
            match status.as_str() {
                "completed" => break,
                "failed" | "cancelled" => bail!("the migration has {status}"),
                _ => ensure!(began.elapsed() < LIMIT, "the migration does not end"),
            }
            tokio::time::sleep(POLL).await;
        }
        File::open(&state)?.sync_all()?;
        let whole = began.elapsed();
        let bytes = std::fs::metadata(&state)?.len();
        drop(qmp);
        if let Some(qemu) = self.process.take() {
            qemu.kill().await?;
        }
        Ok(RawSave { whole, bytes })
    }

    /// Starts it again out of its file, and waits until its guest has run a program.
    pub(crate) async fn wake(&mut self) -> anyhow::Result<RawWake> {
        for socket in ["qmp.sock", AGENT_SOCKET] {
            // QEMU would remove them itself.
            drop(std::fs::remove_file(self.dir.path().join(socket)));
        }
        let incoming = format!("exec:cat {}", self.dir.path().join(STATE).display());
        let mut arguments = self.arguments.clone();
        arguments.extend(["-incoming".into(), OsString::from(incoming)]);
        let began = Instant::now();
        let qemu = spawn(&Spawn::new(Path::new(PROGRAM), &arguments))?;
        self.process = Some(qemu);
        let qmp = self.qmp().await?;
        let process = began.elapsed();
        loop {
            #[derive(Deserialize)]
            struct Status {
                status: String,
            }
            let Status { status } = qmp.query("query-status", LIMIT).await?;
            match status.as_str() {
                "paused" => break,
                "inmigrate" => tokio::time::sleep(POLL).await,
                other => bail!("the restored machine is {other}"),
            }
            ensure!(began.elapsed() < LIMIT, "the state is not loaded");
        }
        let loaded = began.elapsed();
        qmp.execute("cont", json!({}), LIMIT).await?;
        let stream = unix_socket::connect(&self.dir.path().join(AGENT_SOCKET)).await?;
        let session = Session::open(Box::new(stream), SessionMode::Existing, GUEST_LIMIT).await?;
        let hello = began.elapsed();
        first_exec(&session).await?;
        Ok(RawWake { process, loaded, hello, exec: began.elapsed() })
    }

    /// The same machine in a directory of its own, with a copy of the disk and the state.
    pub(crate) fn fork(&self) -> anyhow::Result<Self> {
        let from = self.dir.path();
        let parent = from.parent().context("the directory has no parent")?;
        let dir = tempfile::Builder::new().prefix("raw-").tempdir_in(parent)?;
        std::fs::copy(from.join("layer.ext4"), dir.path().join("layer.ext4"))?;
        std::fs::hard_link(from.join(STATE), dir.path().join(STATE))?;
        let (old, new) = (from.display().to_string(), dir.path().display().to_string());
        let moved = |argument: &OsString| argument.to_string_lossy().replace(&old, &new).into();
        let arguments = self.arguments.iter().map(moved).collect();
        Ok(Self { arguments, network: self.network.clone(), dir, process: None })
    }

    async fn qmp(&self) -> anyhow::Result<QmpClient> {
        let socket: PathBuf = self.dir.path().join("qmp.sock");
        let stream = self.connect(&socket).await?;
        Ok(QmpClient::connect(stream, LIMIT).await?)
    }
}
