//! The options that say what is set in a guest's kernel, of every verb that makes a pool.

use clap::Args;
use mvm_core::settings::{Settings, Ulimit};

use crate::units::Mib;

/// What is set in each guest's kernel before its main process starts.
#[derive(Debug, Default, Args)]
pub(crate) struct SettingsArgs {
    /// Set a parameter of the guest's kernel, such as net.core.somaxconn=4096; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = sysctl)]
    #[arg(help_heading = "Guest settings")]
    sysctl: Vec<(String, String)>,
    /// Limit each program that is started in the guest, such as nofile=1024:2048 or core=0; may be
    /// repeated. Open files are limited to 65536:1048576 unless this says otherwise.
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = ulimit)]
    #[arg(help_heading = "Guest settings")]
    ulimit: Vec<(String, Ulimit)>,
    /// The size of the guest's /dev/shm, such as 64M; half of its memory if absent.
    #[arg(long, value_name = "SIZE", help_heading = "Guest settings")]
    shm_size: Option<Mib>,
}

impl SettingsArgs {
    /// What is set.
    pub(crate) fn into_settings(self) -> Settings {
        Settings {
            sysctl: self.sysctl.into_iter().collect(),
            ulimit: self.ulimit.into_iter().collect(),
            shm_mib: self.shm_size.map(Mib::saturating_u32),
        }
    }
}

/// Parses `NAME=VALUE`.
fn sysctl(text: &str) -> Result<(String, String), &'static str> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Parses `NAME=SOFT[:HARD]`.
fn ulimit(text: &str) -> Result<(String, Ulimit), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=SOFT[:HARD]")?;
    Ok((name.to_owned(), value.parse()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_a_name_is_set_and_a_limit_needs_a_value() {
        let settings = [("vm.x", "1"), ("vm.x", "2")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        let args = SettingsArgs { sysctl: settings.to_vec(), ..SettingsArgs::default() };
        assert_eq!(args.into_settings().sysctl["vm.x"], "2");
        assert_eq!(ulimit("nofile=1:2").unwrap().1, "1:2".parse().unwrap());
        assert!(ulimit("nofile").is_err() && sysctl("vm.x").is_err());
        assert!(ulimit("nofile=many").unwrap_err().contains("`many` is not a limit"));
    }
}
