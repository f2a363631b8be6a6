//! Debian's `docker-registry` on a port of its own.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mvm_host::process::find_program;

use crate::wait::until;

/// A registry without TLS on this machine's loopback. It ends, and its images go, when it is dropped.
pub struct Registry {
    process: Child,
    host: String,
    dir: tempfile::TempDir,
}

impl Registry {
    /// A running registry, or `None` if it or one of these tools is not installed, and the reason is
    /// printed.
    ///
    /// # Panics
    /// It does not start.
    pub fn start(tools: &[&str]) -> Option<Self> {
        for program in [&["docker-registry"][..], tools].concat() {
            if find_program(program).is_none() {
                println!("skipped: `{program}` is not installed");
                return None;
            }
        }
        let dir = tempfile::tempdir().expect("the temporary directory is writable");
        let free = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let host = free.expect("there is a free port").to_string();
        let data = dir.path().join("data");
        let config = format!(
            "version: 0.1\nstorage: {{ filesystem: {{ rootdirectory: {} }} }}\n\
             http: {{ addr: \"{host}\" }}\nlog: {{ level: error, accesslog: {{ disabled: true }} }}\n",
            data.display()
        );
        let file = dir.path().join("config.yml");
        fs::write(&file, config).expect("the directory is writable");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().expect("the registry starts");
        let registry = Self { process, host, dir };
        let address: SocketAddr = registry.host.parse().expect("it is one");
        until("the registry answers", Duration::from_secs(30), || TcpStream::connect(address).ok());
        Some(registry)
    }

    /// Its address, as images' names begin with it.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// A directory for what goes with the registry.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
