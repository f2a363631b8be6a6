//! The memory of saved microVMs.
//!
//! ```text
//!  image    the whole memory at one moment; mapped privately by every microVM restored from it,
//!           so that equal pages exist once
//!  changes  the pages that one microVM wrote since; applied to its private mapping
//! ```
//!
//! A microVM that was booted has no image: saving it makes one. Saving one that was restored
//! writes only its changes, into its image if that is nobody else's. The VMM drivers use it; it never
//! decides what is saved or restored.

mod changes;
mod image;
mod process;
mod transfer;

pub(crate) use changes::PAGE;
use changes::{Run, runs_of};
pub use image::MemoryImage;
pub(crate) use image::{are_zero, data_of, make_sparse};
pub(super) use process::GuestMemory;
pub(super) use transfer::{restore_changes, save_changes};
