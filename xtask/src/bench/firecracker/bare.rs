//! The peer: the same microVM on a bare Firecracker, without a jail, as a person would drive it.

mod uffd;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use mvm_core::guest::{Configuration, ExecRequest, NetworkConfiguration, VSOCK_PORT};
use mvm_host::guest::{Session, SessionMode};
use mvm_host::image::disk::{LayerTemplates, create_layer};
use mvm_host::unix_socket;
use mvm_wire::view::InstanceView;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::super::client::first_program;
use super::super::lab::Lab;
use super::super::raw::run;

/// How long a guest has to answer.
const GUEST_LIMIT: Duration = Duration::from_secs(600);
/// How often what is not there yet is tried again.
const POLL: Duration = Duration::from_millis(1);
const API_SOCKET: &str = "api.sock";
const VSOCK: &str = "v.sock";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const FAULTS: &str = "faults.sock";
const LAYER: &str = "disk1";
/// A port on which nobody listens in the guest.
const UNUSED_PORT: u32 = u32::MAX - 1;
/// A tap that leads nowhere; one machine at a time has it.
const TAP: &str = "mvmbare0";
/// Files of a jail that every machine may share.
const SHARED: [&str; 3] = ["kernel", "initrd", "disk0"];

/// What it takes to make machines like one of mvm's.
pub(super) struct Parts {
    files: TempDir,
    template: PathBuf,
    parent: PathBuf,
    vcpus: u32,
    mem_mib: u32,
    kernel_arguments: String,
    network: NetworkConfiguration,
    _tap: Tap,
}

/// An interface that is removed with it.
struct Tap;

impl Tap {
    fn new() -> anyhow::Result<Self> {
        // What a run that was killed has left.
        let _ = ip(&["link", "delete", TAP]);
        ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
        let tap = Self;
        ip(&["link", "set", TAP, "up"])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", TAP]);
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let output = std::process::Command::new("ip").args(arguments).output()?;
    ensure!(output.status.success(), "`ip {}` failed", arguments.join(" "));
    Ok(())
}

impl Parts {
    /// Those of an instance that runs, taken out of its jail.
    pub(super) async fn of(lab: &Lab, view: &InstanceView) -> anyhow::Result<Self> {
        let parent = lab.state_dir().to_owned();
        let files = tempfile::Builder::new().prefix("bare-").tempdir_in(&parent)?;
        let id = view.path.id.as_str();
        let root = lab.instance_dir(&view.path).join("jail/firecracker").join(id).join("root");
        for name in SHARED {
            fs::hard_link(root.join(name), files.path().join(name))
                .with_context(|| format!("there is no {name} in {}", root.display()))?;
        }
        let line = Command::new(lab.program())
            .arg("--state-dir")
            .arg(lab.state_dir())
            .args(["exec", &view.path.to_string(), "--", "cat", "/proc/cmdline"])
            .output()
            .await?;
        ensure!(line.status.success(), "the guest's kernel arguments cannot be read");
        let line = String::from_utf8(line.stdout)?;
        let address = view.address.context("the instance has no address")?;
        let [a, b, c, _] = address.octets();
        // Firecracker itself adds its devices.
        let words = line.split_whitespace().filter(|word| !word.starts_with("virtio_mmio."));
        Ok(Self {
            files,
            template: LayerTemplates::new(lab.state_dir()).ensure(view.disk_mib.into()).await?,
            parent: parent.to_path_buf(),
            vcpus: view.vcpus,
            mem_mib: view.mem_mib,
            kernel_arguments: words.collect::<Vec<_>>().join(" "),
            network: NetworkConfiguration {
                address,
                prefix_len: 24,
                gateway: [a, b, c, 1].into(),
                nameservers: Vec::new(),
                search: Vec::new(),
                resolver_options: Vec::new(),
                mtu: None,
                mac: None,
            },
            _tap: Tap::new()?,
        })
    }

    /// Prepares one machine, its writable disk included.
    pub(super) fn machine(&self) -> anyhow::Result<Prepared<'_>> {
        let dir = tempfile::Builder::new().prefix("bare-").tempdir_in(&self.parent)?;
        for name in SHARED {
            fs::hard_link(self.files.path().join(name), dir.path().join(name))?;
        }
        let uid = rustix::process::geteuid().as_raw();
        create_layer(&self.template, &dir.path().join(LAYER), uid)?;
        Ok(Prepared { parts: self, dir })
    }

    fn requests(&self) -> Vec<(&'static str, Value)> {
        let drive = |id: &str, is_read_only: bool| {
            json!({ "drive_id": id, "path_on_host": id, "is_root_device": false,
                    "is_read_only": is_read_only, "cache_type": "Writeback" })
        };
        vec![
            ("/machine-config", json!({ "vcpu_count": self.vcpus, "mem_size_mib": self.mem_mib })),
            (
                "/boot-source",
                json!({ "kernel_image_path": "kernel", "initrd_path": "initrd",
                        "boot_args": self.kernel_arguments }),
            ),
            ("/drives/disk0", drive("disk0", true)),
            ("/drives/disk1", drive(LAYER, false)),
            ("/network-interfaces/eth0", json!({ "iface_id": "eth0", "host_dev_name": TAP })),
            ("/vsock", json!({ "guest_cid": 3, "uds_path": VSOCK })),
            ("/entropy", json!({})),
            ("/actions", json!({ "action_type": "InstanceStart" })),
        ]
    }
}

/// A machine that is ready to be started.
pub(super) struct Prepared<'a> {
    parts: &'a Parts,
    dir: TempDir,
}

impl Prepared<'_> {
    /// Starts it and waits until its guest has run the first program.
    pub(super) async fn boot(self) -> anyhow::Result<BareFirecracker> {
        let process = start(self.dir.path())?;
        let machine = BareFirecracker { dir: self.dir, process };
        for (path, body) in self.parts.requests() {
            machine.ask("PUT", path, &body).await?;
        }
        let session = machine.session().await?;
        let configuration = Configuration {
            hostname: "bare".to_owned(),
            network: Some(self.parts.network.clone()),
            ..Configuration::default()
        };
        session.configure(configuration, GUEST_LIMIT).await?;
        run(&session, first_program()).await?;
        Ok(machine)
    }
}

/// A Firecracker that runs. Dropping it ends it and removes its files.
pub(super) struct BareFirecracker {
    dir: TempDir,
    process: Child,
}

impl BareFirecracker {
    pub(super) fn pid(&self) -> anyhow::Result<u32> {
        self.process.id().context("Firecracker has ended")
    }

    /// Runs a program in its guest, over a session of its own.
    pub(super) async fn run(&self, program: ExecRequest) -> anyhow::Result<()> {
        run(&self.session().await?, program).await
    }

    /// Saves it into files, durably, and ends it.
    pub(super) async fn sleep(&mut self) -> anyhow::Result<()> {
        self.ask("PATCH", "/vm", &json!({ "state": "Paused" })).await?;
        let files = json!({ "snapshot_path": STATE, "mem_file_path": MEMORY });
        self.ask("PUT", "/snapshot/create", &files).await?;
        for name in [STATE, MEMORY] {
            fs::File::open(self.dir.path().join(name))?.sync_all()?;
        }
        self.process.kill().await.context("cannot end Firecracker")
    }

    /// Starts it again out of its files, and waits until its guest has run a program.
    pub(super) async fn wake(&mut self) -> anyhow::Result<()> {
        self.wake_from(json!({ "backend_type": "File", "backend_path": MEMORY })).await
    }

    /// The same with a handler of page faults instead of a mapped file.
    pub(super) async fn wake_by_faults(&mut self) -> anyhow::Result<()> {
        let socket = self.dir.path().join(FAULTS);
        if socket.exists() {
            fs::remove_file(&socket)?;
        }
        uffd::serve(&socket, &self.dir.path().join(MEMORY))?;
        self.wake_from(json!({ "backend_type": "Uffd", "backend_path": FAULTS })).await
    }

    async fn wake_from(&mut self, memory: Value) -> anyhow::Result<()> {
        for socket in [API_SOCKET, VSOCK] {
            fs::remove_file(self.dir.path().join(socket))?;
        }
        self.process = start(self.dir.path())?;
        let files = json!({
            "snapshot_path": STATE, "resume_vm": true, "mem_backend": memory,
        });
        self.ask("PUT", "/snapshot/load", &files).await?;
        // The guest drops the connections of before, and with them one that is made too soon: once
        // it has refused two, it has.
        for _ in 0..2 {
            drop(self.connect(UNUSED_PORT).await);
        }
        run(&self.session().await?, first_program()).await
    }

    /// Ends it and waits for its end.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        self.process.kill().await.context("cannot end Firecracker")
    }

    async fn session(&self) -> anyhow::Result<Session> {
        let stream = loop {
            match self.connect(VSOCK_PORT).await {
                Ok(stream) => break stream,
                // The guest boots.
                Err(_) => tokio::time::sleep(POLL).await,
            }
            self.pid()?;
        };
        Ok(Session::open(Box::new(stream), SessionMode::Fresh, GUEST_LIMIT).await?)
    }

    /// Connects to a port of the guest.
    async fn connect(&self, port: u32) -> anyhow::Result<UnixStream> {
        let mut stream = unix_socket::connect(&self.dir.path().join(VSOCK)).await?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            answer.push(stream.read_u8().await?);
        }
        ensure!(answer.starts_with(b"OK "), "it was refused");
        Ok(stream)
    }

    /// Makes a request of its API, as soon as that is served.
    async fn ask(&self, method: &str, path: &str, body: &Value) -> anyhow::Result<()> {
        let socket = self.dir.path().join(API_SOCKET);
        let mut stream = loop {
            match unix_socket::connect(&socket).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(POLL).await,
            }
            self.pid()?;
        };
        let body = body.to_string();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = vec![0; 4096];
        let length = stream.read(&mut answer).await?;
        let answer = String::from_utf8_lossy(&answer[..length]);
        match answer.starts_with("HTTP/1.1 204") {
            true => Ok(()),
            false => bail!("{method} {path}: {answer}"),
        }
    }
}

/// Starts a Firecracker in a directory.
fn start(dir: &Path) -> anyhow::Result<Child> {
    let program = std::env::var_os("MVM_FIRECRACKER").unwrap_or_else(|| "firecracker".into());
    Command::new(&program)
        .args(["--api-sock", API_SOCKET])
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))
}
