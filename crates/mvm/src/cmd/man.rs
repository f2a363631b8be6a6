//! `mvm man`.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_mangen::Man as Page;

use crate::cli::Cli;
use crate::error::{Error, Result, exit};
use crate::output::Ui;

/// Write manual pages.
///
/// Without a directory, the page of `mvm` itself is printed. With one, a page for each verb is
/// written into it, such as mvm-disk-create.1.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm man > mvm.1
  mvm man /usr/local/share/man/man1")]
pub(crate) struct Man {
    /// Where to write a page for each verb; the directory is made if it is not there.
    dir: Option<PathBuf>,
}

impl Man {
    /// Runs the verb.
    pub(crate) fn run(&self, ui: &Ui) -> Result<u8> {
        let Some(dir) = &self.dir else {
            let mut page = Vec::new();
            Page::new(Cli::command()).render(&mut page).map_err(Error::output)?;
            ui.text(&String::from_utf8_lossy(&page))?;
            return Ok(exit::OK);
        };
        let mut command = Cli::command().disable_help_subcommand(true);
        command.build();
        let written =
            std::fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(command, dir));
        written.map_err(|source| Error::Write { path: dir.clone(), source })?;
        Ok(exit::OK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::capture;

    #[test]
    fn each_verb_has_a_page_with_its_examples() {
        let dir = tempfile::tempdir().unwrap();
        let (ui, _) = capture::ui();
        let man = Man { dir: Some(dir.path().join("man1")) };
        man.run(&ui).unwrap();
        for (page, says) in [
            ("mvm.1", "fleets of microVMs"),
            ("mvm-disk-create.1", "mvm disk create demo/data"),
            ("mvm-instance-start.1", "mvm start"),
        ] {
            let text = std::fs::read_to_string(dir.path().join("man1").join(page)).unwrap();
            let text = text.replace("\\-", "-");
            assert!(text.contains(says), "{page}: {text}");
        }
    }

    #[test]
    fn the_main_page_is_printed() {
        let (ui, captured) = capture::ui();
        Man { dir: None }.run(&ui).unwrap();
        assert!(captured.data().contains(".TH mvm 1"), "{}", captured.data());
    }
}
