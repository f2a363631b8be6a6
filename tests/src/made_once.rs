//! What takes long to make and is always the same: kept below `target/`, for later runs too.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::binary::repository;

/// The directory in which `make` has made something by this recipe, now or in an earlier run. A
/// changed recipe makes it anew. `None` if it cannot be made here, and the reason is printed.
///
/// # Panics
/// `target/` is not writable.
pub fn made_once(
    name: &str,
    recipe: &str,
    make: impl FnOnce(&Path) -> Result<(), String>,
) -> Option<PathBuf> {
    let base = repository().join("target/e2e");
    fs::create_dir_all(&base).expect("target/ is writable");
    let lock = File::create(base.join(format!("{name}.lock"))).expect("target/ is writable");
    lock.lock().expect("a file can be locked");
    let dir = base.join(name);
    let done = dir.join("recipe");
    if fs::read_to_string(&done).is_ok_and(|made| made == recipe) {
        return Some(dir);
    }
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("target/ is writable");
    if let Err(reason) = make(&dir) {
        println!("skipped: {reason}");
        return None;
    }
    fs::write(done, recipe).expect("target/ is writable");
    Some(dir)
}

/// A service for SysV's scripts, which OpenRC runs as well: it says on the console when it begins and
/// ends.
const SERVICE: &str = r#"--customize-hook=
cat >"$1/etc/init.d/told" <<'END'
#!/bin/sh
### BEGIN INIT INFO
# Provides: told
# Required-Start: $local_fs
# Required-Stop: $local_fs
# Default-Start: 2 3 4 5
# Default-Stop: 0 1 6
### END INIT INFO
case "$1" in
start) echo service-has-begun >/dev/console;;
stop) echo service-has-ended >/dev/console;;
esac
END
chmod +x "$1/etc/init.d/told" && chroot "$1" update-rc.d told defaults"#;

/// A Debian system that is made once.
pub struct Debian {
    /// What it is called below `target/`.
    pub name: &'static str,
    /// Packages beside the essential ones.
    pub packages: &'static str,
    /// More options for `mmdebstrap`.
    pub options: &'static [&'static str],
}

impl Debian {
    /// One with a database and a SysV init, which several tests use.
    pub const WITH_SERVICES: Self = Self {
        name: "debian",
        packages: "postgresql-15,sysvinit-core,initscripts,sysv-rc",
        options: &[
            // An image makes its databases at its first start.
            "--essential-hook=install -d \"$1/etc/postgresql-common\" && \
             echo create_main_cluster=false >\"$1/etc/postgresql-common/createcluster.conf\"",
            SERVICE,
            // Compiled queries, which nobody asks for here: half of the image.
            "--dpkgopt=path-exclude=/usr/lib/x86_64-linux-gnu/libLLVM*",
            "--dpkgopt=path-exclude=/usr/lib/x86_64-linux-gnu/libz3*",
            "--dpkgopt=path-exclude=/usr/lib/llvm-*/*",
            "--dpkgopt=path-exclude=/usr/lib/postgresql/15/lib/llvmjit*",
            "--dpkgopt=path-exclude=/usr/lib/postgresql/15/lib/bitcode/*",
        ],
    };
    /// One with OpenRC.
    pub const OPENRC: Self =
        Self { name: "openrc", packages: "openrc,sysvinit-core", options: &[SERVICE] };

    /// What tells whether it is still the one that was made.
    pub fn recipe(&self) -> String {
        [&[self.packages], self.options].concat().join("\n")
    }

    /// Its archive, or `None`, and the reason is printed. To make it takes a minute or two.
    pub fn archive(&self) -> Option<PathBuf> {
        let dir = made_once(self.name, &self.recipe(), |dir| {
            let mut command = Command::new("mmdebstrap");
            command.args(["--variant=minbase", &format!("--include={}", self.packages)]);
            // What no test reads, and what takes long to unpack and pack.
            for part in ["doc", "locale", "man"] {
                command.arg(format!("--dpkgopt=path-exclude=/usr/share/{part}/*"));
            }
            command.args(self.options).arg("bookworm").arg(dir.join("layer.tar"));
            match command.stdout(Stdio::null()).stderr(Stdio::null()).status() {
                Ok(status) if status.success() => Ok(()),
                _ => Err(format!("a Debian with {} needs mmdebstrap and a mirror", self.packages)),
            }
        });
        Some(dir?.join("layer.tar"))
    }
}
