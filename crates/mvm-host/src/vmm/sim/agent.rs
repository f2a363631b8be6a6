//! Simulated microVMs with simulated guests in them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::guest::sim::{SimGuest, serve};

use super::{SimGuestControl, SimGuestService};

/// Guest memory that a simulated guest claims, in KiB.
const MEM_TOTAL_KIB: u64 = 256 * 1024;

/// Gives every simulated microVM a simulated guest agent: one guest for each boot, whatever the
/// number of connections to it. A guest that is told to shut down powers its microVM off.
pub fn guest_agents() -> SimGuestService {
    let guests: Mutex<BTreeMap<String, SimGuest>> = Mutex::default();
    Arc::new(move |stream, control: SimGuestControl| {
        let mut guests = guests.lock().unwrap_or_else(PoisonError::into_inner);
        let boot = format!("{} {}", control.id(), control.boot_id());
        let guest = guests.entry(boot).or_insert_with(|| {
            let guest = SimGuest::new(control.boot_id(), MEM_TOTAL_KIB);
            let (switch, control) = (guest.clone(), control.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = switch.shut_down() => control.power_off(),
                    () = control.ended() => {}
                }
            });
            guest
        });
        let guest = guest.clone();
        // The stream's end, or the microVM's, is the end of it.
        tokio::spawn(async move {
            tokio::select! {
                served = serve(stream, guest) => drop(served),
                () = control.ended() => {}
            }
        });
    })
}
