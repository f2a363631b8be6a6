//! `mvm ssh`.

use std::ffi::OsString;
use std::path::Path;

use clap::Args;
use mvm_core::guest::ExecRequest;
use mvm_core::name::{InstancePath, Selector};
use mvm_host::process::{become_program, find_program};
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
#[command(after_help = "\
Examples:
  mvm ssh demo/web
  mvm ssh i-3f2a -l mvm
  mvm ssh i-3f2a -- uptime
  mvm ssh i-3f2a -L 8080:localhost:80 -N

What follows the instance is passed on to `ssh`: its options, and behind -- a command.")]
pub(crate) struct Ssh {
    /// Be the transport of one connection, for the ProxyCommand of an SSH client.
    #[arg(long, hide = true)]
    stdio: bool,
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL for any running one of the pool.
    selector: Selector,
    /// Options of `ssh`, such as -l USER; or a command, if the first is none.
    #[arg(allow_hyphen_values = true, value_name = "OPTIONS")]
    options: Vec<OsString>,
    /// A command to run instead of a shell.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl Ssh {
    /// Runs the verb; the result is the exit code of `ssh`.
    pub(crate) async fn run(self, context: &Context) -> Result<u8> {
        let view = context.client.prepare_ssh(self.selector).await?;
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
        let mut arguments: Vec<OsString> = options(context.state_dir(), &view.instance)?
            .into_iter()
            .flat_map(|(name, value)| ["-o".into(), format!("{name}={value}").into()])
            .collect();
        let is_option = |word: &OsString| word.as_encoded_bytes().starts_with(b"-");
        let (own, command) = match self.options.first().is_some_and(is_option) {
            true => (self.options, self.command),
            false => (Vec::new(), [self.options, self.command].concat()),
        };
        // The host stands between the options of `ssh` and the command.
        arguments.extend(own);
        arguments.push("--".into());
        arguments.push(SshView::host(&view.instance).into());
        arguments.extend(command);
        let source = become_program(&program, &arguments);
        Err(Error::Read { what: program.display().to_string(), source })
    }
}

/// What an SSH client must know of an instance, as names and values of its configuration.
pub(crate) fn options(
    state_dir: &Path,
    instance: &InstancePath,
) -> Result<Vec<(&'static str, String)>> {
    let program = std::env::current_exe()
        .map_err(|source| Error::Read { what: "the path of this program".to_owned(), source })?;
    let file = |name: String| quoted(&state_dir.join(name).display().to_string());
    let command = format!(
        "{} --state-dir {} ssh --stdio {instance}",
        for_shell(&program.display().to_string()),
        for_shell(&state_dir.display().to_string()),
    );
    Ok(vec![
        ("ProxyCommand", command),
        ("IdentityFile", file(SshView::identity_file(&instance.pool.tenant))),
        ("IdentitiesOnly", "yes".to_owned()),
        ("User", "root".to_owned()),
        ("HostKeyAlias", SshView::host(instance)),
        ("UserKnownHostsFile", file(SshView::known_hosts_file(instance))),
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
    fn paths_with_spaces_quotes_and_percent_signs_stay_one_word() {
        let instance = "demo/web/i-00000001".parse().unwrap();
        let options = options(Path::new("/a b/it's %h"), &instance).unwrap();
        let value = |name| &options.iter().find(|(key, _)| *key == name).unwrap().1;
        assert!(
            value("ProxyCommand")
                .contains(" --state-dir '/a b/it'\\''s %%h' ssh --stdio demo/web/i-00000001")
        );
        assert_eq!(value("IdentityFile"), "\"/a b/it's %%h/ssh/demo/id_ed25519\"");
        assert_eq!(value("HostKeyAlias"), "demo-web-i-00000001.mvm");
    }
}
