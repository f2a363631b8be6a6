//! How much one transaction may hold.

use crate::{Op, StoreError, Transaction};

/// What every compare and every operation takes of a request besides its key and value, in bytes.
const ITEM_BYTES: usize = 64;

/// Upper limits of one transaction. Keys have one of their own, which is the same everywhere:
/// [`MAX_KEY_BYTES`](crate::MAX_KEY_BYTES).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most compares, and the most operations.
    pub items: usize,
    /// The most bytes of keys and values, with 64 more for each compare and operation. A watcher
    /// holds one whole transaction in memory at a time, so this bounds its memory too.
    pub bytes: usize,
    /// The largest value, in bytes.
    pub value_bytes: usize,
}

impl Limits {
    /// The embedded stores': 4096 items, 16 MiB, 1 MiB. The largest admissions write about a thousand
    /// instances, each with a few records, in one transaction; SQLite takes 4096 small puts in a
    /// fraction of a second, during which other callers wait.
    pub const EMBEDDED: Self = Self { items: 4096, bytes: 16 << 20, value_bytes: 1 << 20 };

    /// What etcd accepts with its defaults, `--max-txn-ops` and `--max-request-bytes`: 128 items,
    /// 1.5 MiB, and values of 1 MiB. Code that keeps to them works on every store.
    pub const ETCD: Self = Self { items: 128, bytes: 3 << 19, value_bytes: 1 << 20 };

    /// What these operations take of [`bytes`](Self::bytes).
    pub(crate) fn bytes_of(ops: &[Op]) -> usize {
        let bytes_of = |op: &Op| match op {
            Op::Put { key, value, .. } => key.len() + value.len() + ITEM_BYTES,
            Op::Delete { key } => key.len() + ITEM_BYTES,
        };
        ops.iter().map(bytes_of).sum()
    }

    /// What is left beside this.
    pub(crate) fn beside(self, taken: &Transaction) -> Self {
        let Transaction { compares, ops } = taken;
        let items = self.items.saturating_sub(compares.len().max(ops.len()));
        let bytes = self.bytes.saturating_sub(Self::bytes(taken));
        Self { items, bytes, ..self }
    }

    fn bytes(transaction: &Transaction) -> usize {
        let compares = transaction.compares.iter();
        let compared = compares.map(|compare| compare.key().len() + ITEM_BYTES).sum::<usize>();
        Self::bytes_of(&transaction.ops) + compared
    }

    /// Refuses a transaction that is too much.
    pub(crate) fn check(&self, transaction: &Transaction) -> Result<(), StoreError> {
        let Transaction { compares, ops } = transaction;
        for (what, count) in [("compares", compares.len()), ("operations", ops.len())] {
            if count > self.items {
                return Err(StoreError::TransactionTooLong { what, count, most: self.items });
            }
        }
        for op in ops {
            if let Op::Put { key, value, .. } = op
                && value.len() > self.value_bytes
            {
                let (bytes, most) = (value.len(), self.value_bytes);
                return Err(StoreError::ValueTooLarge { key: key.clone(), bytes, most });
            }
        }
        let bytes = Self::bytes(transaction);
        if bytes > self.bytes {
            return Err(StoreError::TransactionTooLarge { bytes, most: self.bytes });
        }
        Ok(())
    }
}
