//! Lists that are sent in pieces.

use mvm_core::name::Selector;
use mvm_wire::{ConnectionError, INSTANCES_AT_ONCE, Reply, WriteHalf};

use crate::server::{finish, known};
use crate::{Control, configs, views};

/// Sends the instances that a selector means, as they are at one revision of the store. The caller
/// takes a piece apart while the next one is made.
pub(crate) async fn instances(
    control: &Control,
    selector: &Selector,
    write: &mut WriteHalf,
) -> Result<(), ConnectionError> {
    let mirror = control.state.now();
    let records: Vec<_> = mirror.desired.instances_meant(selector).collect();
    if records.is_empty()
        && let Err(error) = known(&mirror, selector)
    {
        return finish(write, Err(error)).await;
    }
    let mut rest = records.as_slice();
    loop {
        let (piece, others) = rest.split_at(rest.len().min(INSTANCES_AT_ONCE));
        let mut instances = views::instances_of(&mirror, piece.iter().copied());
        configs::add_ports_to_instances(control, &mut instances).await;
        let more = !others.is_empty();
        write.message(&Reply::Instances { instances, more }).await?;
        if !more {
            return Ok(());
        }
        rest = others;
    }
}
