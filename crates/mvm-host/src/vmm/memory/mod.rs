//! The memory of saved microVMs.
//!
//! ```text
//!  image    the whole memory at one moment; mapped privately by every microVM restored from it,
//!           so that equal pages exist once
//!  changes  the pages that one microVM wrote since; applied to its private mapping
//! ```
//!
//! A microVM that was booted has no image: saving it makes one. Saving one that was restored
//! writes only its changes. The VMM drivers use it; it never decides what is saved or restored.

mod changes;
mod image;
mod process;

pub(super) use changes::{PAGE, Run, apply, runs_of, write};
pub use image::MemoryImage;
pub(crate) use image::{data_of, make_sparse};
pub(super) use process::GuestMemory;
