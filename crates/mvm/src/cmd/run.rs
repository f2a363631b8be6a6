//! `mvm run`.

use std::time::Duration;

use clap::Args;
use mvm_core::admit::Request;
use mvm_core::image::ImageSpec;
use mvm_core::name::{DEFAULT_TENANT, InstancePath, PoolName, PoolPath, Selector, TenantName};
use mvm_core::spec::{PoolSpec, Quota, RestartPolicy};
use mvm_wire::ErrorCode;

use super::attach::{Followed, Ways};
use super::process_args::ProcessArgs;
use super::resource_args::ResourceArgs;
use super::{attach, bootstrap, exec, spec_check, up};
use crate::cli::Context;
use crate::detach_keys::DetachKeys;
use crate::error::{Error, Result, exit};
use crate::exec::{Outcome, SIGINT};
use crate::image_source;
use crate::request::{self, WaitArgs, carry_out};
use crate::wait::{self, Goal};
use tokio::time::Instant;

/// What an attached run of the builtin image, which names no program, runs.
const SHELL: &str = "sh";
/// How often it is looked whether an instance is gone.
const LOOK: Duration = Duration::from_millis(50);
/// Attempts at a name that nobody has.
const NAME_ATTEMPTS: u32 = 8;

/// Run one microVM with one main process.
///
/// It makes a pool with one instance, shows what the main process writes, and ends with its exit
/// code. The command replaces the image's own; without any, the image's is run, or a shell of the
/// builtin image. Ctrl-C goes to the process; a second one within two seconds leaves it running in the
/// background, as any other end of this command does. `mvm attach` comes back to it. Ctrl-C before
/// the process runs ends it all. With a restart policy this command stays over restarts. An agent that
/// ends in the meantime changes nothing: this command goes on with the next one.
#[derive(Debug, Args)]
#[command(override_usage = "mvm run [OPTIONS] <IMAGE> [--] [COMMAND]...")]
#[command(after_help = "\
Examples:
  mvm run --rm builtin -- sh -c 'echo hello from $(uname -sr)'
  echo hello | mvm run --rm -i builtin -- cat
  mvm run --rm -it builtin -- sh
  mvm run -d --name web -p 8080:80 builtin -- httpd -f -p 80
  mvm run --rm -v data:/data alpine:3.20 -- ls /data
  mvm run --rm -e NAME=value -u nobody -w /tmp builtin -- env

The exit code is the process's own, or 128 + the signal that ended it, 127 if the program does not
exist and 126 if it may not be run.")]
pub(crate) struct Run {
    /// Where the root filesystem comes from: builtin, an image of a registry such as nginx:1.27,
    /// or any other that `mvm pool create --image` takes.
    image: ImageSpec,
    /// The command and its arguments; `--` before it may be left out.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
    /// Remove the microVM, its pool and its logs when it has ended, also if nobody watches.
    #[arg(long)]
    rm: bool,
    /// Run it in the background, and print the instance's path.
    #[arg(short, long)]
    detach: bool,
    /// Pass standard input on to the process; with -d, keep it open for `mvm attach`.
    #[arg(short, long)]
    interactive: bool,
    /// Give the process a terminal: this one, unless -d is given.
    #[arg(short, long)]
    tty: bool,
    /// The keys that leave the process running, or `none`.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", requires = "tty")]
    detach_keys: DetachKeys,
    /// The pool's name; made up from the image's if absent.
    #[arg(long, value_name = "POOL")]
    name: Option<PoolName>,
    /// The tenant; made if it is missing.
    #[arg(long, default_value = DEFAULT_TENANT)]
    tenant: TenantName,
    #[command(flatten)]
    resources: ResourceArgs,
    /// What happens when it ends by itself: always, on-failure or never.
    #[arg(long, value_name = "POLICY", default_value_t = RestartPolicy::Never)]
    restart: RestartPolicy,
    /// Fetch what this machine lacks without asking.
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    process: ProcessArgs,
}

impl Run {
    /// Runs the verb; the result is the process's exit code.
    pub(crate) async fn run(self, context: &Context) -> Result<u8> {
        if !up::is_simulated(context).await? {
            bootstrap::ensure_ready(context, self.yes, [&self.image]).await?;
        }
        let Self { rm, detach, name, tenant, restart, .. } = &self;
        let (rm, is_detached, restart) = (*rm, *detach, *restart);
        let ways = Ways {
            has_stdin: self.interactive,
            has_terminal: self.tty,
            detach_keys: self.detach_keys.clone(),
        };
        if self.tty && !self.detach {
            exec::need_terminal()?;
        }
        let (name, tenant) = (name.clone(), tenant.clone());
        let spec = self.into_spec(context).await?;
        ensure_tenant(context, &tenant).await?;
        let pool = create_pool(context, tenant, name, spec).await?;
        let started = tokio::select! {
            started = start(context, &pool, is_detached) => started,
            Ok(()) = tokio::signal::ctrl_c() => Err(Error::GivenUp),
        };
        let (connection, path) = match started {
            Ok(started) => started,
            Err(error) => {
                // Nothing of it has run: it leaves nothing behind.
                drop(destroy(context, &pool).await);
                return Err(error.after_removal());
            }
        };
        let Some(connection) = connection else {
            context.ui.data(&path, || path.to_string())?;
            return Ok(exit::OK);
        };
        let flags = ways.flags();
        let Followed { outcome, has_started, hung_up_by } =
            attach::follow(context, connection, &path, ways, restart).await;
        exec::tell_memory(context, &outcome);
        match &outcome {
            Err(Error::HungUp) if !has_started && hung_up_by == Some(SIGINT) => {
                destroy(context, &pool).await?;
                return Err(Error::GivenUp);
            }
            // There is nothing to run: it was never of use to anybody.
            Err(Error::Api(error)) if !has_started && error.code == ErrorCode::Invalid => {
                destroy(context, &pool).await?;
            }
            Ok(Outcome::Exited(_)) | Err(Error::Api(_)) if rm => {
                removed(context, &path).await?;
                return outcome.map(attach::exit_code).map_err(Error::after_removal);
            }
            Ok(Outcome::Exited(_)) | Err(Error::Api(_)) => {}
            // The person left; the microVM goes on, and is removed at its end if that was asked.
            Ok(Outcome::Detached) | Err(_) => {
                let again = format!("mvm attach {flags}{}", path.id);
                context.ui.remark(&format!("detached: {path} goes on; come back with `{again}`"));
            }
        }
        outcome.map(attach::exit_code)
    }

    async fn into_spec(self, context: &Context) -> Result<PoolSpec> {
        let has_default = self.image == ImageSpec::Builtin && !self.detach;
        let command = match self.command {
            command if command.is_empty() && has_default => vec![SHELL.to_owned()],
            command => command,
        };
        let mut process = self.process.into_spec(command);
        process.stdin = self.interactive;
        process.tty = self.tty;
        if let Some(term) = std::env::var("TERM").ok().filter(|_| self.tty) {
            process.env.entry("TERM".to_owned()).or_insert(term);
        }
        let spec = PoolSpec {
            restart: self.restart,
            process,
            auto_remove: self.rm,
            ephemeral: true,
            ..self.resources.into_spec()
        };
        spec_check::check(&spec)?;
        Ok(PoolSpec { image: image_source::complete(self.image, context).await?, ..spec })
    }
}

async fn ensure_tenant(context: &Context, name: &TenantName) -> Result<()> {
    if !context.client.tenants(None).await?.iter().any(|tenant| tenant.name == *name) {
        let request =
            Request::TenantCreate { name: name.clone(), subnet: None, quota: Quota::default() };
        match context.client.submit(request).await {
            // Another command may have been quicker.
            Ok(_) => {}
            Err(Error::Api(error)) if error.code == ErrorCode::Conflict => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes the pool, under a name of its own unless one was given.
async fn create_pool(
    context: &Context,
    tenant: TenantName,
    name: Option<PoolName>,
    spec: PoolSpec,
) -> Result<PoolPath> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let pool = match &name {
            Some(name) => name.clone(),
            None => made_up_name(&spec.image)?,
        };
        let path = PoolPath { tenant: tenant.clone(), pool };
        let request = Request::PoolCreate { path: path.clone(), spec: spec.clone().into() };
        match context.client.submit(request).await {
            Ok(_) => return Ok(path),
            Err(Error::Api(error))
                if error.code == ErrorCode::Conflict
                    && name.is_none()
                    && attempts < NAME_ATTEMPTS => {}
            Err(error) => return Err(error),
        }
    }
}

/// The last word of the image's name and four random digits.
fn made_up_name(image: &ImageSpec) -> Result<PoolName> {
    let draw = getrandom::u32().map_err(|error| Error::Read {
        what: "the system's random numbers".to_owned(),
        source: std::io::Error::other(error),
    })?;
    let stem = stem_of(image);
    let name = format!("{stem}-{:04x}", draw & 0xffff);
    name.parse().map_err(|error: mvm_core::name::NameError| Error::Usage {
        message: error.to_string(),
        hint: "name the pool with --name".to_owned(),
    })
}

/// What a pool of this image is called: after a file or directory, without its endings.
fn stem_of(image: &ImageSpec) -> String {
    let Some(path) = image.path() else { return stem(&image.to_string()) };
    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or(path);
    stem(name.split('.').find(|word| !word.is_empty()).unwrap_or(name))
}

/// What of an image's name can be in a pool's: `docker.io/library/nginx:1.27` is `nginx`.
pub(crate) fn stem(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or(image);
    let last = last.split(['@', ':']).find(|word| !word.is_empty()).unwrap_or_default();
    let plain: String = last
        .chars()
        .map(|c| c.to_ascii_lowercase())
        .filter(|c| c.is_ascii_alphanumeric())
        .take(16)
        .collect();
    match plain.chars().next() {
        Some(first) if first.is_ascii_lowercase() => plain,
        _ => format!("run{plain}").chars().take(16).collect(),
    }
}

/// Builds the image, makes the instance, attaches to it unless it is to run in the background, and
/// starts it.
async fn start(
    context: &Context,
    pool: &PoolPath,
    is_detached: bool,
) -> Result<(Option<mvm_wire::Connection>, InstancePath)> {
    let wait = WaitArgs::default();
    let build = Request::PoolBuild { path: pool.clone() };
    carry_out(context, build, Goal::Built, &wait).await?;
    let create = Request::InstanceCreate {
        pool: pool.clone(),
        count: 1,
        start: false,
        disks: Vec::new(),
        cold: false,
    };
    let created = context.client.submit(create).await?;
    let Some(path) = created.instances.into_iter().next().map(|target| target.path) else {
        return Err(Error::UnexpectedReply("accepted without an instance"));
    };
    let selector = Selector::Id { pool: Some(pool.clone()), prefix: path.id.to_string() };
    let start = Request::InstanceStart { selector: selector.clone(), all: false };
    if is_detached {
        let submitted = request::submit(context, start).await?;
        request::finish(context, submitted, &Goal::Settled, &wait).await?;
        return Ok((None, path));
    }
    let (connection, path) = attach::open(context, selector, true).await?;
    context.client.submit(start).await?;
    Ok((Some(connection), path))
}

/// Removes the pool and what is in it; that it is gone already is as good.
async fn destroy(context: &Context, pool: &PoolPath) -> Result<()> {
    let submitted_unix_ms = wait::now_unix_ms();
    let request = Request::PoolDestroy { path: pool.clone(), force: true };
    let accepted = match context.client.submit(request).await {
        Ok(accepted) => accepted,
        Err(Error::Api(error)) if error.code == ErrorCode::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let goal = Goal::Gone { tenant: None };
    let request = wait::Request { accepted: &accepted, goal: &goal, submitted_unix_ms };
    let interrupt = async { drop(tokio::signal::ctrl_c().await) };
    // Nobody waits for words about it.
    wait::wait(&context.client, &request, request::DEFAULT_TIMEOUT, interrupt, |_| {}).await?;
    Ok(())
}

/// Waits until an instance that goes at its end is gone, and its pool with it unless others, such as
/// its forks, are left in it.
async fn removed(context: &Context, path: &InstancePath) -> Result<()> {
    let deadline = Instant::now() + request::DEFAULT_TIMEOUT.as_duration();
    while Instant::now() < deadline {
        match context.client.instances(Selector::Pool(path.pool.clone())).await {
            Ok(left) if left.iter().any(|view| view.path == *path) || left.is_empty() => {}
            Ok(_) => return Ok(()),
            Err(Error::Api(error)) if error.code == ErrorCode::NotFound => return Ok(()),
            Err(error) => return Err(error),
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            Ok(()) = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_up_name_is_readable_and_valid() {
        for (image, expected) in [
            ("builtin", "builtin"),
            ("docker.io/library/nginx:1.27", "nginx"),
            ("ghcr.io/Some_One/My.App@sha256:00", "myapp"),
            ("debian:bookworm", "debian"),
            ("./3d", "run3d"),
            ("/", "run"),
            ("averyveryverylongimagename", "averyveryverylon"),
        ] {
            assert_eq!(stem(image), expected, "{image}");
            assert!(format!("{expected}-0a1b").parse::<PoolName>().is_ok(), "{image}");
        }
        assert!(made_up_name(&ImageSpec::Builtin).unwrap().to_string().starts_with("builtin-"));
    }

    #[test]
    fn an_image_of_a_file_is_named_after_it() {
        for (image, expected) in [
            ("docker-archive:/srv/app.tar:team/web:v1", "app"),
            ("docker-archive:/s/cache/uploads/nginx.7tz6v3.tar", "nginx"),
            ("rootfs:/srv/rootfs.tar.xz", "rootfs"),
            ("oci:/srv/layout/:v1", "layout"),
            ("nginx:1.27", "nginx"),
        ] {
            assert_eq!(stem_of(&image.parse().unwrap()), expected, "{image}");
        }
    }
}
