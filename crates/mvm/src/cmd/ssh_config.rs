//! `mvm ssh-config`.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use mvm_core::name::Selector;
use mvm_wire::view::SshView;

use crate::cli::Context;
use crate::cmd::ssh::options;
use crate::error::{Error, Result};

/// The file, beside a person's own configuration of SSH, that is written.
const FILE: &str = "mvm.conf";

/// Print what ssh, scp and rsync need to reach instances by name.
///
/// An instance is called TENANT-POOL-ID.mvm. The connection goes through the guest channel, as that
/// of `mvm ssh` does, so it needs no network. With --write it is put into ~/.ssh/mvm.conf, which
/// ~/.ssh/config is made to include.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm ssh-config demo >demo.conf && ssh -F demo.conf demo-web-i-3f2a0001.mvm
  mvm ssh-config --write
  rsync -a site/ demo-web-i-3f2a0001.mvm:/srv/   # after --write")]
pub(crate) struct SshConfig {
    /// TENANT/POOL/INSTANCE, a prefix of an id, TENANT/POOL or TENANT; all instances if absent.
    selector: Option<Selector>,
    /// Write it instead, and include it in ~/.ssh/config.
    #[arg(long)]
    write: bool,
}

impl SshConfig {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let selector = self.selector.unwrap_or(Selector::All);
        let instances = context.client.instances(selector).await?;
        let mut text = String::from("# Written by `mvm ssh-config`.\n");
        for instance in &instances {
            let _ = write!(text, "\nHost {}\n", SshView::host(&instance.path));
            for (name, value) in options(context.state_dir(), &instance.path)? {
                let _ = writeln!(text, "  {name} {value}");
            }
        }
        if !self.write {
            return context.ui.text(&text);
        }
        let Some(home) = std::env::var_os("HOME").map(PathBuf::from) else {
            return Err(Error::Usage {
                message: "HOME is not set, so there is no ~/.ssh".to_owned(),
                hint: "leave --write out and redirect the output".to_owned(),
            });
        };
        let dir = home.join(".ssh");
        install(&dir, &text).map_err(|source| Error::Read {
            what: format!("or write the configuration in {}", dir.display()),
            source,
        })?;
        let count = instances.len();
        context.ui.remark(&format!("wrote {} ({count} instances)", dir.join(FILE).display()));
        Ok(())
    }
}

/// Writes the file and includes it, once, before everything else.
fn install(dir: &Path, text: &str) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let write = |name: &str, text: &str| -> io::Result<()> {
        let target = dir.join(name);
        if fs::read(&target).is_ok_and(|before| before == text.as_bytes()) {
            return Ok(());
        }
        let draft = dir.join(format!("{name}.mvm-new"));
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        io::Write::write_all(&mut file, text.as_bytes())?;
        // A link to a file elsewhere stays one.
        fs::rename(draft, fs::canonicalize(&target).unwrap_or(target))
    };
    write(FILE, text)?;
    let own = match fs::read_to_string(dir.join("config")) {
        Ok(own) => own,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    let include = format!("Include {FILE}");
    if own.lines().any(|line| line.trim() == include) {
        return Ok(());
    }
    write("config", &format!("{include}\n{own}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_persons_own_configuration_is_kept_and_included_into_once() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join(".ssh");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("config"), "Host mine\n  User me\n").unwrap();
        for text in ["first", "second"] {
            install(&dir, text).unwrap();
        }
        assert_eq!(fs::read_to_string(dir.join("mvm.conf")).unwrap(), "second");
        let config = fs::read_to_string(dir.join("config")).unwrap();
        assert_eq!(config, "Include mvm.conf\nHost mine\n  User me\n");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
    }
}
