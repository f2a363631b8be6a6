//! Our tables in the kernel: what is known of them, and how they become others.

use mvm_core::net::{NodeNetwork, TableName};
use mvm_core::nft::{render_delta, render_full};

use super::super::{NetworkError, nft};

/// What we know of our tables in the kernel.
#[derive(Debug)]
pub(super) enum Firewall {
    /// Nothing yet: a change could take away what an earlier agent has let through.
    Unknown,
    /// They are what this network renders to, for certain as of this transaction of the kernel's; of
    /// none if somebody else has changed something since they were looked at.
    Applied(NodeNetwork, Option<u32>),
    /// They should be what this network renders to, but a change failed.
    Broken(NodeNetwork),
}

impl Firewall {
    /// The network that the tables are, or should be, of.
    pub(super) fn network(&self) -> Option<&NodeNetwork> {
        match self {
            Self::Unknown => None,
            Self::Applied(network, _) | Self::Broken(network) => Some(network),
        }
    }

    /// Turns the tables that we know of into those of `wanted`.
    pub(super) async fn change(
        &mut self,
        table: &TableName,
        wanted: NodeNetwork,
    ) -> Result<(), NetworkError> {
        let full = render_full(table, &wanted);
        let (batch, builds_on) = match self {
            Self::Applied(applied, left_at) => {
                (render_delta(table, applied, &wanted), Some(*left_at))
            }
            Self::Unknown | Self::Broken(_) => (full.clone(), None),
        };
        if batch.is_empty() {
            if let Self::Applied(applied, _) = self {
                // Who sleeps is in no rule.
                *applied = wanted;
            }
            return Ok(());
        }
        // Stays so if the batch fails, or nobody waits for its end.
        *self = Self::Broken(wanted.clone());
        let left_at = match nft::apply(batch).await {
            // A change is of what is known only if nothing came before it.
            Ok(number) => number.filter(|number| {
                builds_on.is_none_or(|left_at| left_at == Some(number.wrapping_sub(1)))
            }),
            Err(error) => {
                tracing::warn!(%table, %error, "the firewall is not as it was left: replacing it");
                nft::apply(full).await?
            }
        };
        *self = Self::Applied(wanted, left_at);
        Ok(())
    }

    /// Reads the kernel's tables and replaces them if they are not those of `wanted`; tells whether they
    /// were not.
    pub(super) async fn ensure(
        &mut self,
        table: &TableName,
        wanted: NodeNetwork,
    ) -> Result<bool, NetworkError> {
        let expected = nft::expected(table.clone(), &wanted).await?;
        // Before the tables are read: what is changed meanwhile is looked at again.
        let mut left_at = nft::generation().await?;
        let differs = nft::current(table.clone()).await? != expected;
        if differs {
            *self = Self::Broken(wanted.clone());
            left_at = nft::apply(render_full(table, &wanted)).await?;
        }
        *self = Self::Applied(wanted, left_at);
        Ok(differs)
    }
}

/// Whether nobody has changed any firewall since this transaction.
pub(super) async fn is_as_left(left_at: Option<u32>) -> Result<bool, NetworkError> {
    Ok(left_at.is_some() && nft::generation().await? == left_at)
}
