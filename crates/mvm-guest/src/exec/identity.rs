//! Who a program runs as, resolved from the guest's `/etc/passwd` and `/etc/group`.
//!
//! The files are parsed here because the static C library cannot load name service modules. They
//! belong to the guest's users, so nothing in them is trusted to be well-formed or small.

use std::fs::OpenOptions;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use mvm_core::guest::{ErrorKind, GuestError};

use crate::failure::{failure, invalid};

const LARGEST_FILE: u64 = 1024 * 1024;
/// The kernel's limit of supplementary groups (`NGROUPS_MAX`).
const MOST_GROUPS: usize = 65_536;

/// Credentials and what belongs to them in an environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) name: String,
    pub(crate) home: String,
    pub(crate) shell: String,
}

impl Identity {
    /// The user that a request names as `NAME|UID[:GROUP|GID]`; without one, `default_uid`.
    pub(crate) fn resolve(user: Option<&str>, default_uid: u32) -> Result<Self, GuestError> {
        Databases::read(Path::new("/etc")).resolve(user, default_uid)
    }
}

/// The contents of `/etc/passwd` and `/etc/group`.
#[derive(Debug, Default)]
struct Databases {
    passwd: String,
    group: String,
}

struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
    shell: &'a str,
}

impl Databases {
    fn read(etc: &Path) -> Self {
        Self { passwd: read_bounded(&etc.join("passwd")), group: read_bounded(&etc.join("group")) }
    }

    fn resolve(&self, user: Option<&str>, default_uid: u32) -> Result<Identity, GuestError> {
        let (user, group) = match user {
            None => (None, None),
            Some(text) => match text.split_once(':') {
                None => (Some(text), None),
                Some((user, group)) => (Some(user), Some(group)),
            },
        };
        if user == Some("") || group == Some("") {
            return Err(invalid("the user must be NAME or UID, optionally with :GROUP or :GID"));
        }
        let found = match user {
            None => self.users().find(|entry| entry.uid == default_uid),
            Some(name) => self.users().find(|entry| entry.name == name).or_else(|| {
                let uid = id(name)?;
                self.users().find(|entry| entry.uid == uid)
            }),
        };
        let mut identity = match (found, user) {
            (Some(entry), _) => Identity {
                uid: entry.uid,
                gid: entry.gid,
                groups: self.groups_of(entry.name, entry.gid),
                name: entry.name.to_owned(),
                home: entry.home.to_owned(),
                shell: entry.shell.to_owned(),
            },
            (None, None) => nameless(default_uid),
            (None, Some(name)) => nameless(id(name).ok_or_else(|| {
                failure(ErrorKind::NotFound, format!("user `{name}` is not in /etc/passwd"))
            })?),
        };
        if let Some(group) = group {
            let gid = self.gid(group).or_else(|| id(group)).ok_or_else(|| {
                failure(ErrorKind::NotFound, format!("group `{group}` is not in /etc/group"))
            })?;
            identity.gid = gid;
            identity.groups = vec![gid];
        }
        Ok(identity)
    }

    fn users(&self) -> impl Iterator<Item = User<'_>> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            let uid = id(fields.nth(1)?)?;
            let gid = id(fields.next()?)?;
            let home = fields.nth(1).unwrap_or_default();
            let shell = fields.next().unwrap_or_default();
            Some(User {
                name,
                uid,
                gid,
                home: if home.is_empty() { "/" } else { home },
                shell: if shell.is_empty() { "/bin/sh" } else { shell },
            })
        })
    }

    /// Name, id and members of each group.
    fn groups(&self) -> impl Iterator<Item = (&str, u32, &str)> {
        self.group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            let gid = id(fields.nth(1)?)?;
            Some((name, gid, fields.next().unwrap_or_default()))
        })
    }

    fn gid(&self, name: &str) -> Option<u32> {
        self.groups().find(|(group, _, _)| *group == name).map(|(_, gid, _)| gid)
    }

    fn groups_of(&self, user: &str, primary: u32) -> Vec<u32> {
        let mut groups = vec![primary];
        for (_, gid, members) in self.groups() {
            if members.split(',').any(|member| member.trim() == user)
                && !groups.contains(&gid)
                && groups.len() < MOST_GROUPS
            {
                groups.push(gid);
            }
        }
        groups
    }
}

/// A user id without an entry: as with container runtimes, its group is 0.
fn nameless(uid: u32) -> Identity {
    let (name, home) = if uid == 0 { ("root".into(), "/root") } else { (uid.to_string(), "/") };
    Identity { uid, gid: 0, groups: vec![0], name, home: home.into(), shell: "/bin/sh".into() }
}

/// A user or group id; the last number is the kernel's word for "none".
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|&id| id != u32::MAX)
}

/// A regular file's text, or nothing: a pipe in its place must not stop the agent.
fn read_bounded(path: &Path) -> String {
    let mut bytes = Vec::new();
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    if let Ok(file) = opened
        && file.metadata().is_ok_and(|metadata| metadata.is_file())
    {
        // What was read before an error is as good as a shorter file.
        let _ = file.take(LARGEST_FILE).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn databases() -> Databases {
        Databases {
            passwd: "root:x:0:0:root:/root:/bin/bash\n\nbroken\nnobody:x:65534:65534:::\n\
                     dev:x:1000:1000:Dev,,,:/home/dev:/bin/zsh\n77:x:5:5::/five:\n\
                     evil:x:4294967295:0::/:\n"
                .into(),
            group:
                "root:x:0:\ndev:x:1000:\ndocker:x:998:other,dev\nwheel:x:10:developer\n:x:3:dev\n"
                    .into(),
        }
    }

    fn kind(user: &str) -> ErrorKind {
        databases().resolve(Some(user), 0).unwrap_err().kind
    }

    #[test]
    fn a_name_brings_home_shell_and_supplementary_groups() {
        let dev = databases().resolve(Some("dev"), 0).unwrap();
        assert_eq!((dev.uid, dev.gid, dev.groups.as_slice()), (1000, 1000, &[1000, 998][..]));
        assert_eq!((dev.home.as_str(), dev.shell.as_str()), ("/home/dev", "/bin/zsh"));
    }

    #[test]
    fn a_number_is_a_name_first_and_a_user_id_second() {
        assert_eq!(databases().resolve(Some("77"), 0).unwrap().uid, 5);
        assert_eq!(databases().resolve(Some("1000"), 0).unwrap().name, "dev");
        let unknown = databases().resolve(Some("4711"), 0).unwrap();
        assert_eq!((unknown.uid, unknown.gid, unknown.home.as_str()), (4711, 0, "/"));
    }

    #[test]
    fn a_named_group_replaces_the_users_groups() {
        let dev = databases().resolve(Some("dev:docker"), 0).unwrap();
        assert_eq!((dev.gid, dev.groups.as_slice()), (998, &[998][..]));
        assert_eq!(databases().resolve(Some("0:42"), 0).unwrap().gid, 42);
    }

    #[test]
    fn no_user_means_the_default_even_without_any_database() {
        assert_eq!(databases().resolve(None, 0).unwrap().shell, "/bin/bash");
        assert_eq!(Databases::default().resolve(None, 0).unwrap().home, "/root");
    }

    #[test]
    fn what_does_not_exist_or_cannot_be_a_user_is_refused() {
        assert_eq!(kind("ghost"), ErrorKind::NotFound);
        assert_eq!(kind("dev:ghosts"), ErrorKind::NotFound);
        assert_eq!(kind("evil"), ErrorKind::NotFound);
        assert_eq!(kind("4294967295"), ErrorKind::NotFound);
        assert_eq!(kind(""), ErrorKind::Invalid);
        assert_eq!(kind("dev:"), ErrorKind::Invalid);
        assert_eq!(kind(":docker"), ErrorKind::Invalid);
    }

    #[test]
    fn a_directory_in_place_of_the_database_reads_as_empty() {
        assert_eq!(read_bounded(Path::new("/")), "");
    }
}
