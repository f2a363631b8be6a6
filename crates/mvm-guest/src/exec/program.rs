//! What to execute: a request checked and turned into what `execve` takes.

use std::ffi::{CStr, CString};

use mvm_core::guest::{ErrorKind, ExecRequest, GuestError};

use super::absent::{self, Uninterpreted};
use super::identity::Identity;
use crate::failure::{failure, invalid};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The agent's own file, wherever it is by now: that of a booted guest has no path.
const OWN_FILE: &CStr = c"/proc/self/exe";
/// What its processes are called.
const AGENT_NAME: &str = "mvm-guest";

/// A program ready to be executed: a forked child may not allocate.
#[derive(Debug)]
pub(crate) struct Program {
    /// What the request called it.
    pub(super) name: String,
    /// The `PATH` that it is looked up in, if it is.
    path: Option<String>,
    /// The files to try in order.
    pub(crate) candidates: Vec<CString>,
    pub(crate) argv: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: CString,
    /// Whether the request named the directory; a missing home is replaced by `/`.
    pub(super) is_cwd_required: bool,
    pub(super) identity: Identity,
}

impl Program {
    pub(crate) fn new(request: &ExecRequest, identity: Identity) -> Result<Self, GuestError> {
        let name = match request.argv.first() {
            Some(name) if !name.is_empty() => name.clone(),
            _ => return Err(invalid("the command is empty")),
        };
        let env = environment(request, &identity)?;
        let own = [AGENT_NAME, crate::BUILTIN].map(str::to_owned);
        let before = if request.builtin { &own[..] } else { &[] };
        let path = (!request.builtin && !name.contains('/')).then(|| {
            let path = env.iter().find_map(|(key, value)| (*key == "PATH").then_some(*value));
            path.unwrap_or(DEFAULT_PATH).to_owned()
        });
        let candidates = match &path {
            None if request.builtin => vec![OWN_FILE.into()],
            None => vec![c_string(name.clone())?],
            Some(path) => path
                .split(':')
                .map(|dir| c_string(format!("{}/{name}", if dir.is_empty() { "." } else { dir })))
                .collect::<Result<_, _>>()?,
        };
        Ok(Self {
            path,
            candidates,
            argv: before
                .iter()
                .chain(&request.argv)
                .cloned()
                .map(c_string)
                .collect::<Result<_, _>>()?,
            env: env
                .iter()
                .map(|(key, value)| c_string(format!("{key}={value}")))
                .collect::<Result<_, _>>()?,
            cwd: c_string(request.cwd.clone().unwrap_or_else(|| identity.home.clone()))?,
            is_cwd_required: request.cwd.is_some() && !request.is_cwd_default,
            name,
            identity,
        })
    }

    /// What an error of the child means to the host.
    pub(super) fn explain(&self, step: ChildStep, errno: i32) -> GuestError {
        let kind = match errno {
            libc::ENOENT | libc::ENOTDIR => ErrorKind::NotFound,
            libc::EACCES | libc::EPERM | libc::ENOEXEC | libc::EISDIR | libc::E2BIG => {
                ErrorKind::Denied
            }
            _ => ErrorKind::System,
        };
        let error = std::io::Error::from_raw_os_error(errno);
        let name = &self.name;
        let message = match (step, kind) {
            (ChildStep::Execute, ErrorKind::NotFound) => self.absent(),
            (ChildStep::Execute, _) if errno == libc::E2BIG => {
                let words = self.argv.iter().chain(&self.env);
                let len: usize = words.map(|word| word.as_bytes_with_nul().len()).sum();
                format!(
                    "the arguments and variables of `{name}` have {len} bytes: the guest's kernel \
                     takes 128 KiB each, and in all a quarter of the stack's limit (2 MiB)"
                )
            }
            (ChildStep::Execute, ErrorKind::Denied) => {
                format!("`{name}` cannot be executed: {error}")
            }
            (ChildStep::Execute, _) => format!("cannot start `{name}`: {error}"),
            (ChildStep::EnterDirectory, _) => {
                format!("working directory `{}`: {error}", self.cwd.to_string_lossy())
            }
            (ChildStep::EnterNamespace, _) => {
                format!("cannot make `{name}` a process of its own namespace: {error}")
            }
            (ChildStep::SetLimits, _) => format!("cannot set the ulimits of `{name}`: {error}"),
            (ChildStep::BecomeUser, _) => {
                format!("cannot become user `{}`: {error}", self.identity.name)
            }
        };
        failure(kind, message)
    }

    /// What is not there, in words.
    fn absent(&self) -> String {
        let name = &self.name;
        if let Some(found) = absent::uninterpreted(&self.candidates, &self.cwd) {
            let Uninterpreted { file, interpreter } = found;
            return format!("`{file}` is there, but its interpreter `{interpreter}` is not");
        }
        let what = match &self.path {
            Some(path) => format!("`{name}` was not found in PATH ({path})"),
            None => format!("`{name}` does not exist"),
        };
        match absent::instead_of_shell(name) {
            Some(instead) => format!("{what}; {instead}"),
            None => what,
        }
    }
}

/// What a child was doing when it failed before the program ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum ChildStep {
    BecomeUser = 1,
    EnterDirectory = 2,
    Execute = 3,
    EnterNamespace = 4,
    SetLimits = 5,
}

impl ChildStep {
    pub(super) fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::BecomeUser,
            2 => Self::EnterDirectory,
            4 => Self::EnterNamespace,
            5 => Self::SetLimits,
            _ => Self::Execute,
        }
    }
}

fn environment<'a>(
    request: &'a ExecRequest,
    identity: &'a Identity,
) -> Result<Vec<(&'a str, &'a str)>, GuestError> {
    let mut env = vec![
        ("PATH", DEFAULT_PATH),
        ("HOME", identity.home.as_str()),
        ("USER", identity.name.as_str()),
        ("LOGNAME", identity.name.as_str()),
        ("SHELL", identity.shell.as_str()),
        ("TERM", "linux"),
    ];
    for (key, value) in &request.env {
        if key.is_empty() || key.contains('=') {
            return Err(invalid(format!("`{key}` cannot name an environment variable")));
        }
        match env.iter_mut().find(|(name, _)| name == key) {
            Some(entry) => entry.1 = value,
            None => env.push((key, value)),
        }
    }
    Ok(env)
}

fn c_string(text: String) -> Result<CString, GuestError> {
    CString::new(text).map_err(|_| invalid("the request contains a NUL character"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(request: &ExecRequest) -> Result<Program, GuestError> {
        let identity = Identity {
            uid: 1,
            gid: 1,
            groups: vec![1],
            name: "u".into(),
            home: "/home/u".into(),
            shell: "/bin/sh".into(),
        };
        Program::new(request, identity)
    }

    fn request(argv: &[&str]) -> ExecRequest {
        ExecRequest { argv: argv.iter().map(|&arg| arg.into()).collect(), ..Default::default() }
    }

    #[test]
    fn a_plain_name_is_tried_in_each_directory_of_the_requested_path() {
        let mut wanted = request(&["tool", "-x"]);
        wanted.env = vec![("PATH".into(), "/a::/b".into()), ("A".into(), "b=c".into())];
        let program = program(&wanted).unwrap();
        assert_eq!(program.candidates, [c"/a/tool", c"./tool", c"/b/tool"].map(CString::from));
        assert!(program.env.contains(&c"A=b=c".into()));
        assert_eq!(program.env.iter().filter(|e| e.to_bytes().starts_with(b"PATH=")).count(), 1);
        assert_eq!(program.cwd, c"/home/u".to_owned());
        let error = program.explain(ChildStep::Execute, libc::ENOENT);
        assert_eq!(error.message, "`tool` was not found in PATH (/a::/b)");
    }

    #[test]
    fn a_directory_that_nobody_asked_for_may_be_missing() {
        for (cwd, is_cwd_default, is_required) in
            [(None, false, false), (Some("/srv"), true, false), (Some("/srv"), false, true)]
        {
            let cwd = cwd.map(str::to_owned);
            let wanted = ExecRequest { cwd, is_cwd_default, ..request(&["pwd"]) };
            assert_eq!(program(&wanted).unwrap().is_cwd_required, is_required, "{wanted:?}");
        }
    }

    #[test]
    fn too_much_for_the_kernel_is_said_with_its_size() {
        let error = program(&request(&["a", &"x".repeat(200_000)])).unwrap();
        let error = error.explain(ChildStep::Execute, libc::E2BIG);
        assert_eq!(error.kind, ErrorKind::Denied);
        assert!(
            error.message.starts_with("the arguments and variables of `a` have 200"),
            "{error}"
        );
    }

    #[test]
    fn a_name_with_a_slash_is_a_file() {
        assert_eq!(program(&request(&["./tool"])).unwrap().candidates, [c"./tool".to_owned()]);
    }

    #[test]
    fn what_the_kernel_could_not_take_is_refused_before_a_process_exists() {
        assert!(program(&request(&[])).is_err());
        assert!(program(&request(&[""])).is_err());
        assert!(program(&request(&["a\0b"])).is_err());
        assert!(program(&request(&["a", "\0"])).is_err());
        for key in ["", "A=B"] {
            let env = vec![(key.into(), "x".into())];
            assert!(program(&ExecRequest { env, ..request(&["a"]) }).is_err());
        }
    }
}
