//! The jailer: enters the jail, drops its rights, and goes on as Firecracker.
//!
//! The real one copies Firecracker into the jail and executes it there. This one goes on in the
//! same process, because it is linked to libraries that a jail does not hold. It makes no cgroup.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::arguments::Arguments;
use crate::behaviour::Behaviour;

/// Options of the jailer, all with a value.
const OPTIONS: [&str; 6] =
    ["--id", "--exec-file", "--uid", "--gid", "--chroot-base-dir", "--resource-limit"];

/// Goes on as the Firecracker that the arguments name, in its jail.
pub(crate) fn run(words: &[String]) -> Result<(), String> {
    let end = words.iter().position(|word| word == "--").unwrap_or(words.len());
    let (own, rest) = words.split_at(end);
    let own = Arguments::parse(own, &OPTIONS)?;
    // Before the jail hides it.
    let behaviour = Behaviour::beside_this_program()?;
    let program = PathBuf::from(own.needed("--exec-file")?);
    let name = program.file_name().ok_or("Failed to extract filename from path")?;
    let id = own.needed("--id")?;
    let number = |name: &str| {
        let value = own.needed(name)?;
        value.parse::<u32>().map_err(|error| format!("Invalid {name} '{value}': {error}"))
    };
    let (uid, gid) = (number("--uid")?, number("--gid")?);
    let base = PathBuf::from(own.needed("--chroot-base-dir")?);
    let root = base.join(name).join(id).join("root");
    let enter = || -> io::Result<()> {
        fs::create_dir_all(&root)?;
        rustix::process::chroot(&root)?;
        rustix::process::chdir("/")?;
        become_user(uid, gid)
    };
    enter().map_err(|error| format!("{}: {error}", root.display()))?;
    let mut rest: Vec<String> = rest.iter().skip(1).cloned().collect();
    rest.extend(["--id".to_owned(), id.to_owned()]);
    crate::firecracker(&rest, behaviour)
}

#[allow(unsafe_code)]
fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    let check = |result: libc::c_int| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: system calls on numbers alone, and there is no other thread yet.
    unsafe {
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(gid, gid, gid))?;
        check(libc::setresuid(uid, uid, uid))?;
        // Executing a program would have made the process its user's in `/proc`.
        check(libc::prctl(libc::PR_SET_DUMPABLE, 1))
    }
}
