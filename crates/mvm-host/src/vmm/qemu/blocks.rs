//! What QEMU counts of its disks.

use std::time::Duration;

use mvm_core::vmm::DiskIo;
use serde::Deserialize;

use super::super::VmmError;
use super::{connect_qmp, qmp_failed};
use crate::state_dir::InstanceDir;

/// How long QEMU may take to answer: whoever asks only wants to know.
const LIMIT: Duration = Duration::from_secs(2);

/// A disk, as `query-blockstats` tells of it.
#[derive(Deserialize)]
struct Block {
    stats: Stats,
}

#[derive(Deserialize)]
struct Stats {
    rd_operations: u64,
    wr_operations: u64,
    flush_operations: u64,
    rd_bytes: u64,
    wr_bytes: u64,
    failed_rd_operations: u64,
    failed_wr_operations: u64,
    failed_flush_operations: u64,
}

/// What the guest has asked of all its disks.
pub(super) async fn disk_io(dir: &InstanceDir) -> Result<DiskIo, VmmError> {
    let qmp = connect_qmp(dir, LIMIT).await?;
    let blocks: Vec<Block> = qmp.query("query-blockstats", LIMIT).await.map_err(qmp_failed)?;
    Ok(blocks.iter().fold(DiskIo::default(), |sum, Block { stats }| DiskIo {
        reads: sum.reads + stats.rd_operations,
        writes: sum.writes + stats.wr_operations,
        flushes: sum.flushes + stats.flush_operations,
        read_bytes: sum.read_bytes + stats.rd_bytes,
        written_bytes: sum.written_bytes + stats.wr_bytes,
        failed: sum.failed
            + stats.failed_rd_operations
            + stats.failed_wr_operations
            + stats.failed_flush_operations,
        throttled: None,
    }))
}
