//! Simulated microVMs with simulated guests in them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::guest::sim::{SimGuest, serve};

use super::{SimGuestControl, SimGuestService};

/// What a guest's kernel does from its agent's end to the power-off takes.
const WAY_DOWN: Duration = Duration::from_millis(200);
/// Guest memory that a simulated guest claims, in KiB.
const MEM_TOTAL_KIB: u64 = 256 * 1024;

/// Gives every simulated microVM a simulated guest agent: one guest for each boot, whatever the
/// number of connections to it. A guest that is told to shut down powers its microVM off.
pub fn guest_agents() -> SimGuestService {
    let guests: Mutex<BTreeMap<String, (SimGuest, SimGuestControl)>> = Mutex::default();
    Arc::new(move |stream, control: SimGuestControl| {
        let mut guests = guests.lock().unwrap_or_else(PoisonError::into_inner);
        let boot = format!("{} {}", control.id(), control.boot_id());
        let guest = match guests.get(&boot) {
            Some((guest, known)) if known.is_same(&control) => guest.clone(),
            // A guest that was restored goes on as it was, in another microVM.
            before => {
                let guest = before.map_or_else(
                    || SimGuest::new(control.boot_id(), MEM_TOTAL_KIB),
                    |(guest, _)| guest.clone(),
                );
                guest.use_files(control.files());
                tokio::spawn(obey_switch(guest.clone(), control.clone()));
                guests.insert(boot, (guest.clone(), control.clone()));
                guest
            }
        };
        // The stream's end, or the microVM's, is the end of it.
        tokio::spawn(async move {
            tokio::select! {
                served = serve(stream, guest) => drop(served),
                () = control.ended() => {}
            }
        });
    })
}

/// Powers the microVM off when its guest is told to shut down.
async fn obey_switch(guest: SimGuest, control: SimGuestControl) {
    let way_down = async {
        guest.shut_down().await;
        tokio::time::sleep(WAY_DOWN).await;
    };
    tokio::select! {
        () = way_down => control.power_off(),
        () = control.ended() => {}
    }
}
