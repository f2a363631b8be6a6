//! `mvm ssh`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::Args;
use mvm_core::guest::ExecRequest;
use mvm_core::name::{InstancePath, NameError, Selector};
use mvm_host::process::{become_program, find_program};
use mvm_host::state_dir::StateDir;
use mvm_wire::view::SshView;

use crate::cli::Context;
use crate::cmd::exec;
use crate::error::{Error, Result};

/// Log in to an instance with SSH, without a network.
///
/// Runs this machine's `ssh`. The connection goes through the guest channel to the image's own SSH
/// server (sshd), which need not be running; the tenant's key logs in, and the guest's host key is
/// known beforehand. For plain ssh, scp and rsync see `mvm ssh-config`.
#[derive(Debug, Args)]
#[command(override_usage = "mvm ssh [OPTIONS] <INSTANCE> [SSH-OPTIONS] [-- COMMAND]")]
#[command(after_help = "\
Examples:
  mvm ssh demo/web
  mvm ssh i-3f2a -l mvm -o ForwardAgent=yes
  mvm ssh i-3f2a -- uptime
  mvm ssh i-3f2a -L 8080:localhost:80 -N

What follows the instance is passed on to `ssh`: its options, and behind -- a command. Options of
mvm itself stand before the instance.")]
pub(crate) struct Ssh {
    /// Be the transport of one connection, for the ProxyCommand of an SSH client.
    #[arg(long, hide = true)]
    stdio: bool,
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL for any running one of the pool; behind
    /// it options of `ssh`, such as -l USER, and behind -- a command to run instead of a shell.
    // One list: behind a first argument of its own, options that `ssh` has too would be mvm's.
    #[arg(trailing_var_arg = true, required = true, value_name = "INSTANCE")]
    words: Vec<Word>,
}

/// The instance, or a word for `ssh`.
#[derive(Debug, Clone)]
pub(crate) struct Word(OsString);

impl From<OsString> for Word {
    fn from(word: OsString) -> Self {
        Self(word)
    }
}

impl Ssh {
    /// Runs the verb; the result is the exit code of `ssh`.
    pub(crate) async fn run(self, context: &Context) -> Result<u8> {
        let mut words = self.words.into_iter().map(|Word(word)| word);
        let selector = selector(&words.next().unwrap_or_default())?;
        let rest: Vec<OsString> = words.collect();
        let view = context.client.prepare_ssh(selector).await?;
        if self.stdio {
            let request = ExecRequest {
                argv: vec!["sshd".to_owned()],
                cwd: Some("/".to_owned()),
                stdin: true,
                builtin: true,
                ..ExecRequest::default()
            };
            return exec::run(context, (&view.instance).into(), request, None).await;
        }
        let Some(program) = find_program("ssh") else {
            return Err(Error::Usage {
                message: "there is no `ssh` on this machine".to_owned(),
                hint: "install an OpenSSH client, or use `mvm exec -it`".to_owned(),
            });
        };
        // To `ssh` the first word on something counts: options that were given go before ours. The
        // host stands between them and the command.
        let (own, command) = split(&rest);
        let mut arguments = own.to_vec();
        for (name, value) in options(context.state_dir(), &view.instance)? {
            arguments.extend(["-o".into(), format!("{name}={value}").into()]);
        }
        arguments.push("--".into());
        arguments.push(SshView::host(&view.instance).into());
        arguments.extend_from_slice(command);
        let source = become_program(&program, &arguments);
        Err(Error::Read { what: program.display().to_string(), source })
    }
}

fn selector(word: &OsStr) -> Result<Selector> {
    let word = word.to_string_lossy();
    word.parse().map_err(|error: NameError| Error::Usage {
        message: format!("`{word}` names no instance: {error}"),
        hint: "name one as `mvm ps` shows it: mvm ssh TENANT/POOL/INSTANCE".to_owned(),
    })
}

/// The options of `ssh` and the command: without options, all is the command.
fn split(words: &[OsString]) -> (&[OsString], &[OsString]) {
    let begins_with_option =
        words.first().is_some_and(|word| word.as_encoded_bytes().starts_with(b"-"));
    match words.iter().position(|word| word == "--") {
        _ if !begins_with_option => (&[], words),
        Some(at) => (&words[..at], &words[at + 1..]),
        None => (words, &[]),
    }
}

/// What an SSH client must know of an instance, as names and values of its configuration.
pub(crate) fn options(
    state_dir: &StateDir,
    instance: &InstancePath,
) -> Result<Vec<(&'static str, String)>> {
    let program = std::env::current_exe()
        .map_err(|source| Error::Read { what: "the path of this program".to_owned(), source })?;
    let file = |path: PathBuf| quoted(&path.display().to_string());
    let command = format!(
        "{} --state-dir {} ssh --stdio {instance}",
        for_shell(&program.display().to_string()),
        for_shell(&state_dir.display().to_string()),
    );
    Ok(vec![
        ("ProxyCommand", command),
        ("IdentityFile", file(state_dir.ssh_key(&instance.pool.tenant))),
        ("IdentitiesOnly", "yes".to_owned()),
        ("User", "root".to_owned()),
        ("HostKeyAlias", SshView::host(instance)),
        ("UserKnownHostsFile", file(state_dir.known_hosts(instance))),
        ("GlobalKnownHostsFile", "/dev/null".to_owned()),
        ("StrictHostKeyChecking", "yes".to_owned()),
        ("CheckHostIP", "no".to_owned()),
        ("UpdateHostKeys", "no".to_owned()),
    ])
}

/// A value of a configuration, in which a percent sign begins a token.
fn quoted(value: &str) -> String {
    format!("\"{}\"", value.replace('%', "%%"))
}

/// One word for the shell that runs a ProxyCommand.
fn for_shell(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''").replace('%', "%%"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_told_from_the_options_before_it() {
        use clap::Parser as _;
        #[derive(clap::Parser)]
        struct Line {
            #[arg(short, long, global = true)]
            output: Option<String>,
            #[command(flatten)]
            ssh: Ssh,
        }
        for (line, own, command) in [
            ("ssh web", "", ""),
            ("ssh web -- id -un", "", "id -un"),
            ("ssh web id -un", "", "id -un"),
            ("ssh web -l mvm", "-l mvm", ""),
            ("ssh web -l mvm -- id -un", "-l mvm", "id -un"),
            ("ssh web -v -- echo -- x", "-v", "echo -- x"),
            // Options that mvm has too, some of them with other values.
            ("ssh web -o Foo=bar -o json -h -- -o", "-o Foo=bar -o json -h", "-o"),
            ("ssh -o json web -4", "-4", ""),
        ] {
            let parsed = Line::parse_from(line.split(' ')).ssh.words;
            let words: Vec<OsString> = parsed.into_iter().map(|Word(word)| word).collect();
            assert_eq!(selector(&words[0]).unwrap().to_string(), "web");
            let (first, second) = split(&words[1..]);
            let text = |words: &[OsString]| words.join(" ".as_ref()).into_string().unwrap();
            assert_eq!((text(first), text(second)), (own.to_owned(), command.to_owned()), "{line}");
        }
    }

    #[test]
    fn paths_with_spaces_quotes_and_percent_signs_stay_one_word() {
        let instance = "demo/web/i-00000001".parse().unwrap();
        let options = options(&"/a b/it's %h".into(), &instance).unwrap();
        let value = |name| &options.iter().find(|(key, _)| *key == name).unwrap().1;
        assert!(
            value("ProxyCommand")
                .contains(" --state-dir '/a b/it'\\''s %%h' ssh --stdio demo/web/i-00000001")
        );
        assert_eq!(value("IdentityFile"), "\"/a b/it's %%h/ssh/demo/id_ed25519\"");
        assert_eq!(value("HostKeyAlias"), "demo-web-i-00000001.mvm");
    }
}
