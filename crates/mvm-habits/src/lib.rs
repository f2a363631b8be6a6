//! What each verb does in each state of an instance, as users expect it.
//!
//! ```text
//!  Verb x Situation ──────────> table::row ──> Cell   the documented table
//!         x Beside, x Moment ─> expected ────> Expected: the answer, the state after it, what may be lost
//! ```
//!
//! The tests walk all combinations on the simulated host, and some of them on real microVMs;
//! `docs/verbs-and-states.md` is written from the same table. Nothing here runs anything, and no
//! program depends on it. A new call or request does not compile before [`verb_of`] says which row
//! it has.

mod combination;
mod expected;
mod page;
mod table;
mod verb;

pub use combination::{Agent, Beside, Client, Combination, Moment, Numbers, Situation};
pub use expected::{Expected, Loss, expected, heading};
pub use page::page;
pub use table::{Cell, End, row};
pub use verb::{Kind, Verb, verb_of, verb_of_request};
