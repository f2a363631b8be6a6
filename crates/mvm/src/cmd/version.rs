//! `mvm version`.

use clap::Args;
use serde::Serialize;

use crate::error::{Result, exit};
use crate::output::Ui;

/// Print the version.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm version
  mvm version -o json")]
pub(crate) struct Version {}

#[derive(Serialize)]
struct VersionView {
    version: &'static str,
}

impl Version {
    /// Runs the verb.
    pub(crate) fn run(&self, ui: &Ui) -> Result<u8> {
        let view = VersionView { version: env!("CARGO_PKG_VERSION") };
        ui.data(&view, || format!("mvm {}", view.version))?;
        Ok(exit::OK)
    }
}
