//! How much memory programs may still take on this machine.

use std::fs;
use std::sync::{Arc, Mutex, PoisonError};

use mvm_core::sleep_policy::HostMemory;

use super::node::meminfo_kib;

/// Where the state of a machine's memory is read.
#[derive(Debug, Clone)]
pub enum MemoryGauge {
    /// This machine's kernel.
    Machine {
        /// What is to stay available, in MiB.
        wanted_mib: u64,
    },
    /// What a test says; clones are the same machine.
    Simulated(Arc<Mutex<Option<HostMemory>>>),
}

impl MemoryGauge {
    /// The gauge of a simulated machine that has enough.
    pub fn simulated() -> Self {
        Self::Simulated(Arc::default())
    }

    /// What is there and what is wanted; nothing if that cannot be told.
    pub fn read(&self) -> Option<HostMemory> {
        match self {
            Self::Machine { wanted_mib } => {
                let text = fs::read_to_string("/proc/meminfo").ok()?;
                let available_mib = meminfo_kib(&text, "MemAvailable")? / 1024;
                Some(HostMemory { available_mib, wanted_mib: *wanted_mib })
            }
            Self::Simulated(memory) => *memory.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Sets what a simulated machine has; no other can be set.
    pub fn simulate(&self, now: Option<HostMemory>) {
        if let Self::Simulated(memory) = self {
            *memory.lock().unwrap_or_else(PoisonError::into_inner) = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_memory() {
        let memory = MemoryGauge::Machine { wanted_mib: 1 }.read().unwrap();
        assert!(memory.available_mib > 1 && !memory.is_short());
        assert!(MemoryGauge::Machine { wanted_mib: u64::MAX }.read().unwrap().is_short());
    }
}
