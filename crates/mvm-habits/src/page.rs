//! The page of the documentation that shows the table.

use mvm_wire::ErrorCode;

use crate::combination::Situation;
use crate::table::{Cell, End, row};
use crate::verb::Verb;

/// Stands before the table.
const HEAD: &str = "\
# What each verb does in each state

Written from the table in `crates/mvm-habits`, which the tests walk on the simulated host: all of it, also with an agent that was just
replaced and with clients that hang up in the middle, and within eight days all of that with everything that can be beside (a data disk, a
published port, a base, an instance that stands by, a sleep policy, an attached client, each restart policy, automatic removal). A part of it
that changes from day to day is tried on real microVMs. An agent that was just replaced is to make no difference.

A cell says where the instance is in the end. `ok`: the verb works, and the instance stays, or goes on becoming, what it was. `(5)` and `(3)`:
the verb is refused with this [exit code](exit-codes.md), and nothing changes.

";

/// Stands behind the table.
const TAIL: &str = "
- What a program in the guest has written is there afterwards, synced or not, unless the instance is gone or was ended with `kill`: a
  session with the guest is waited for, and the guest is asked to shut down, also while it starts or falls asleep.
- A failed instance is one that could not be started, or ended although it should run, and waits for its next attempt, if its restart policy
  allows one.
- `instance create` and `fork` add an instance to those that are there. `fork` waits until an instance that starts has started, and until one
  that falls asleep sleeps.
- With a data disk that the instance writes to, `fork` and `pool warm-up` are refused (5), and so are `instance create --start` and
  `disk resize` as long as the instance is to run; `disk rm` is refused (5) as long as a pool or an instance has the disk.
- With automatic removal (`mvm run --rm`), an instance that stops is gone, with its pool, and `pool warm-up` is refused (5).
- A client that hangs up in the middle leaves the request carried out or never heard; a program that it ran in the guest ends.
";

/// The whole page.
pub fn page() -> String {
    let mut page = HEAD.to_owned();
    page += "| verb |";
    for situation in Situation::ALL {
        page += &format!(" {situation} |");
    }
    page += "\n|---|";
    page += &"---|".repeat(Situation::ALL.len());
    page += "\n";
    for &verb in Verb::ALL {
        page += &format!("| {verb} |");
        for cell in row(verb) {
            page += &format!(" {} |", text(cell));
        }
        page += "\n";
    }
    page + TAIL
}

fn text(cell: Cell) -> String {
    match cell {
        Cell::Stays => "ok".to_owned(),
        Cell::To(end) => match end {
            End::Created => "created",
            End::Running => "running",
            End::Warm => "warm",
            End::Sleeping => "sleeping",
            End::Stopped => "stopped",
            End::Failed => "failed",
            End::Gone => "gone",
        }
        .to_owned(),
        Cell::No(ErrorCode::NotFound) => "(3)".to_owned(),
        Cell::No(ErrorCode::Conflict) => "(5)".to_owned(),
        Cell::No(_) => "(1)".to_owned(),
    }
}
