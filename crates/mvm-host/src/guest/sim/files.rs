//! The files of a simulated guest: what its programs write is held back in its memory until it is
//! synced, and then on a disk, as in a guest with a kernel.
//!
//! A path below a data disk's mount point is on that disk, any other on the writable layer. Each
//! disk's file begins with its files as JSON; a data disk's is sparse behind that.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_core::guest::DiskConfiguration;

/// Most that a simulated disk holds, in bytes.
const DISK_BYTES: u64 = 64 * 1024;
/// Begins the names in the guest's memory of what is held back.
const HELD_BACK: &str = "file ";

/// What a simulated guest has in memory, by name: saved and restored with its microVM.
pub type SimMemory = Arc<Mutex<BTreeMap<String, String>>>;

/// The disks of a microVM, and what its guest holds back of what is to be on them.
#[derive(Debug, Clone, Default)]
pub struct SimFiles {
    memory: SimMemory,
    layer: Option<PathBuf>,
    data: Vec<PathBuf>,
}

impl SimFiles {
    /// Files on this writable layer and these data disks, in their order.
    pub fn new(memory: SimMemory, layer: Option<PathBuf>, data: Vec<PathBuf>) -> Self {
        Self { memory, layer, data }
    }

    /// Writes a file, which is held back.
    pub(super) fn write(&self, path: &str, text: &str) {
        self.memory().insert(format!("{HELD_BACK}{path}"), text.to_owned());
    }

    /// What a file holds, wherever that is.
    pub(super) fn read(&self, path: &str, disks: &[DiskConfiguration]) -> Option<String> {
        if let Some(text) = self.memory().get(&format!("{HELD_BACK}{path}")) {
            return Some(text.clone());
        }
        self.load(self.place(path, disks)?).ok()?.remove(path)
    }

    /// Puts what is held back on its disks.
    pub(super) fn sync(&self, disks: &[DiskConfiguration]) -> io::Result<()> {
        let held: Vec<_> =
            self.memory().extract_if(.., |name, _| name.starts_with(HELD_BACK)).collect();
        for (name, text) in held {
            let path = &name[HELD_BACK.len()..];
            let Some(place) = self.place(path, disks) else { continue };
            let mut files = self.load(place)?;
            files.insert(path.to_owned(), text);
            let mut content = serde_json::to_vec(&files)?;
            content.push(0);
            File::options().write(true).open(place)?.write_all(&content)?;
        }
        Ok(())
    }

    /// The disk that a path is on.
    fn place(&self, path: &str, disks: &[DiskConfiguration]) -> Option<&PathBuf> {
        let is_below = |disk: &DiskConfiguration| {
            path.strip_prefix(&disk.path).is_some_and(|rest| rest.starts_with('/'))
        };
        match disks.iter().position(is_below) {
            Some(at) => self.data.get(at),
            None => self.layer.as_ref(),
        }
    }

    fn load(&self, place: &PathBuf) -> io::Result<BTreeMap<String, String>> {
        let mut content = Vec::new();
        let mut file = File::open(place)?;
        file.rewind()?;
        file.take(DISK_BYTES).read_to_end(&mut content)?;
        let end = content.iter().position(|byte| *byte == 0).unwrap_or(content.len());
        match end {
            0 => Ok(BTreeMap::new()),
            _ => Ok(serde_json::from_slice(&content[..end])?),
        }
    }

    fn memory(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_synced_is_in_memory_alone_and_each_disk_has_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let [layer, data] = ["layer", "data"].map(|name| dir.path().join(name));
        File::create(&layer).unwrap();
        File::create(&data).unwrap().set_len(1 << 20).unwrap();
        let (name, device, path) = ("d".to_owned(), "vdc".to_owned(), "/data".to_owned());
        let disks = [DiskConfiguration { name, device, path, read_only: false }];
        let files = |memory| SimFiles::new(memory, Some(layer.clone()), vec![data.clone()]);
        let guest = files(SimMemory::default());
        guest.write("/root/a", "1");
        guest.write("/data/a", "2");
        assert_eq!(guest.read("/root/a", &disks).unwrap(), "1");
        let after_a_power_cut = files(SimMemory::default());
        assert_eq!(after_a_power_cut.read("/root/a", &disks), None);
        guest.sync(&disks).unwrap();
        assert_eq!(after_a_power_cut.read("/root/a", &disks).unwrap(), "1");
        assert_eq!(after_a_power_cut.read("/data/a", &disks).unwrap(), "2");
        assert_eq!(after_a_power_cut.load(&layer).unwrap().len(), 1);
    }
}
