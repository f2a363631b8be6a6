//! The simulated backend, with a guest that obeys the contract's commands.

use std::path::PathBuf;
use std::sync::Arc;

use mvm_host::vmm::Vmm;
use mvm_host::vmm::sim::{SimGuestControl, SimTimes, SimVmm, SimWorld};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream};

use super::Backend;

pub(crate) struct Sim {
    world: SimWorld,
    files: tempfile::TempDir,
}

impl Sim {
    pub(crate) fn new() -> Self {
        let files = tempfile::tempdir().unwrap();
        for name in ["kernel", "initrd"] {
            std::fs::File::create(files.path().join(name)).unwrap();
        }
        let serve = |stream, control| {
            // Ends with its stream.
            tokio::spawn(obey(stream, control));
        };
        Self { world: SimWorld::new(SimTimes::default()).with_guests(Arc::new(serve)), files }
    }
}

impl Backend for Sim {
    fn vmm(&self) -> Arc<dyn Vmm> {
        Arc::new(SimVmm::new(self.world.clone()))
    }

    fn vmm_without_program(&self) -> Option<Arc<dyn Vmm>> {
        None
    }

    fn boot_files(&self) -> (PathBuf, PathBuf) {
        (self.files.path().join("kernel"), self.files.path().join("initrd"))
    }
}

async fn obey(stream: DuplexStream, control: SimGuestControl) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
        let answer = match line.trim_end().split_once(' ') {
            Some(("echo", words)) => format!("{words}\n"),
            Some(("note", words)) => {
                control.remember("note", words);
                format!("{words}\n")
            }
            _ => match line.trim_end() {
                "disks" => "vda 6144 1 vdb 10240 0\n".to_owned(),
                "notes" => format!("{}\n", control.recall("note").unwrap_or_default()),
                "rewrite" => {
                    control.write_to_disk(1 << 20);
                    "rewritten\n".to_owned()
                }
                "off" => return control.power_off(),
                "reset" => return control.reset(),
                "panic" => return control.panic("sysrq triggered crash"),
                _ => String::new(),
            },
        };
        if stream.get_mut().write_all(answer.as_bytes()).await.is_err() {
            return;
        }
        line.clear();
    }
}
