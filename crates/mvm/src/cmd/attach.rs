//! `mvm attach`, `mvm instance attach`.

use std::time::Duration;

use clap::Args;
use mvm_core::death::Cause;
use mvm_core::guest::ExitStatus;
use mvm_core::lifecycle::State;
use mvm_core::name::{InstancePath, Selector};
use mvm_core::plan::Waiting;
use mvm_core::record::DesiredState;
use mvm_core::spec::RestartPolicy;
use mvm_wire::view::InstanceView;
use mvm_wire::{ApiError, Call, Connection, ConnectionError, ErrorCode, Reply};

use super::exec::{self, Attached};
use crate::cli::Context;
use crate::client::unexpected;
use crate::detach_keys::DetachKeys;
use crate::error::{Error, Result, exit};
use crate::exec::{Outcome, Signals};

/// How often it is looked what becomes of an instance whose program has ended.
const LOOK: Duration = Duration::from_millis(50);

/// Attach to an instance's main process.
///
/// What it writes from now on is shown, Ctrl-C goes to it, and its exit code is passed on. A second
/// Ctrl-C within two seconds leaves it running, and so does any other signal that ends this command.
/// An instance at rest is woken, also later, by what is typed. An agent that ends in the meantime is
/// waited for, and one that died is replaced. What it wrote before is in `mvm logs`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm attach default/builtin-3f2a
  echo hello | mvm attach i-3f2a -i
  mvm attach -it i-3f2a                  # for `mvm run -it`; Ctrl-P Ctrl-Q leaves it again

Standard input reaches a process that was started with it, such as by `mvm run -i`.")]
pub(crate) struct Attach {
    /// TENANT/POOL/INSTANCE, a prefix of an id, or TENANT/POOL of a pool with one instance.
    selector: Selector,
    /// Pass standard input on to the process.
    #[arg(short, long)]
    interactive: bool,
    /// Treat this terminal as the process's own: for one that was started with -t.
    #[arg(short, long)]
    tty: bool,
    /// The keys that leave the process running, or `none`.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", requires = "tty")]
    detach_keys: DetachKeys,
}

impl Attach {
    /// Runs the verb; the result is the process's exit code.
    pub(crate) async fn run(self, context: &Context) -> Result<u8> {
        if self.tty {
            exec::need_terminal()?;
        }
        let (connection, path) = open(context, self.selector, false).await?;
        let (has_stdin, has_terminal) = (self.interactive, self.tty);
        let ways = Ways { has_stdin, has_terminal, detach_keys: self.detach_keys };
        let outcome = follow(context, connection, &path, ways, RestartPolicy::Never).await.outcome;
        if matches!(outcome, Err(Error::HungUp) | Ok(Outcome::Detached)) {
            context.ui.remark(&format!("detached: {path} goes on"));
        }
        exec::tell_memory(context, &outcome);
        outcome.map(exit_code)
    }
}

/// Opens the connection on which everything that the main process does from now on will come.
pub(crate) async fn open(
    context: &Context,
    selector: Selector,
    wait: bool,
) -> Result<(Connection, InstancePath)> {
    let mut connection = context.client.start(&Call::Attach { selector, wait }).await?;
    match connection.read.message().await? {
        Reply::Attached { instance } => Ok((connection, instance)),
        Reply::Error(error) => Err(error.into()),
        other => Err(unexpected(&other)),
    }
}

/// How this command is connected to a main process.
#[derive(Debug, Clone)]
pub(crate) struct Ways {
    /// Whether standard input is passed on.
    pub(crate) has_stdin: bool,
    /// Whether the process has this command's terminal.
    pub(crate) has_terminal: bool,
    /// The keys that leave it running.
    pub(crate) detach_keys: DetachKeys,
}

impl Ways {
    /// What `mvm attach` needs for the same ways, with a blank behind it.
    pub(crate) fn flags(&self) -> &'static str {
        match (self.has_stdin, self.has_terminal) {
            (true, true) => "-it ",
            (true, false) => "-i ",
            (false, true) => "-t ",
            (false, false) => "",
        }
    }
}

/// What came of following a main process.
pub(crate) struct Followed {
    /// How it ended, or why it is no longer followed.
    pub(crate) outcome: Result<Outcome>,
    /// Whether the process is known to have run.
    pub(crate) has_started: bool,
    /// The signal at which this command stopped following, if one did that.
    pub(crate) hung_up_by: Option<i32>,
}

/// Follows the main process to its end, or until the detach keys are typed; over the ends of agents,
/// and over its own end if the policy has it started again.
///
/// It fails if the process could not be started, the agent is lost for good, or the person hung up,
/// which leaves it running.
pub(crate) async fn follow(
    context: &Context,
    connection: Connection,
    path: &InstancePath,
    ways: Ways,
    restart: RestartPolicy,
) -> Followed {
    let Ways { has_stdin, has_terminal, detach_keys } = ways;
    let keys = (has_stdin && has_terminal).then_some(detach_keys);
    let signals = if has_terminal { Signals::None } else { Signals::Keys };
    let mut attached = match Attached::new(has_stdin, has_terminal, keys, signals) {
        Ok(attached) => attached,
        Err(error) => {
            return Followed { outcome: Err(error), has_started: false, hung_up_by: None };
        }
    };
    let outcome = carry_on(context, connection, path, &mut attached, restart).await;
    let (has_started, hung_up_by) = (attached.has_started(), attached.hung_up_by());
    Followed { outcome, has_started, hung_up_by }
}

async fn carry_on(
    context: &Context,
    mut connection: Connection,
    path: &InstancePath,
    attached: &mut Attached,
    restart: RestartPolicy,
) -> Result<Outcome> {
    loop {
        let outcome = attached.carry(connection).await;
        let next = match &outcome {
            Err(Error::Connection(ConnectionError::HungUp | ConnectionError::Io(_))) => {
                attached.remark(
                    context,
                    &format!(
                        "the agent went away: {path} goes on, and so does this command once an agent runs again"
                    ),
                );
                attached.meanwhile(reopen(context, path)).await?
            }
            Ok(Outcome::Exited(_)) | Err(Error::Api(_)) if restart != RestartPolicy::Never => {
                let next = attached.meanwhile(started_again(context, path)).await?;
                if let Next::Open(_) = next {
                    let how = match &outcome {
                        Ok(Outcome::Exited(status)) => format!("{path} {}", Cause::from(*status)),
                        Ok(Outcome::Detached) => String::new(),
                        Err(error) => error.to_string(),
                    };
                    let text = format!(
                        "{how}; its restart policy `{restart}` starts it again (`mvm stop {}` ends it)",
                        path.id
                    );
                    attached.remark(context, &text);
                }
                next
            }
            _ => return outcome,
        };
        match next {
            Next::Open(again) => connection = again,
            Next::Ended(status) => {
                return match (outcome, status) {
                    (Err(Error::Connection(_)), Ok(status)) => Ok(Outcome::Exited(status)),
                    (Err(Error::Connection(_)), Err(error)) => Err(error),
                    (outcome, _) => outcome,
                };
            }
        }
    }
}

/// How following goes on.
enum Next {
    /// Over this connection.
    Open(Connection),
    /// Not at all: the instance has ended for good, like this as far as is known.
    Ended(Result<ExitStatus>),
}

/// Attaches again once an agent is there.
async fn reopen(context: &Context, path: &InstancePath) -> Result<Next> {
    let call = Call::Attach { selector: path.into(), wait: true };
    loop {
        let mut connection = context.client.start_again(&call).await?;
        match connection.read.message().await {
            Ok(Reply::Attached { .. }) => {}
            Ok(Reply::Error(error)) => return Ok(Next::Ended(Err(error.into()))),
            Ok(other) => return Err(unexpected(&other)),
            // That agent ended, too.
            Err(ConnectionError::HungUp | ConnectionError::Io(_)) => continue,
            Err(error) => return Err(error.into()),
        }
        // Of what has ended meanwhile nothing more is heard.
        loop {
            match fate(context, path).await? {
                // What it still does is heard from here on.
                Fate::Runs { .. } | Fate::IsToRun | Fate::Ends => {
                    return Ok(Next::Open(connection));
                }
                Fate::Ended(view) => return Ok(Next::Ended(end_of(&view))),
                Fate::Gone => return Ok(Next::Ended(Err(gone(path)))),
                Fate::Undecided => tokio::time::sleep(LOOK).await,
            }
        }
    }
}

/// Waits until it is clear whether an instance whose program has ended is started again, and attaches
/// to it then.
async fn started_again(context: &Context, path: &InstancePath) -> Result<Next> {
    let mut before = None;
    loop {
        match fate(context, path).await? {
            Fate::IsToRun => break,
            // It has not been noticed yet that this run has ended.
            Fate::Runs { boots } if boots == *before.get_or_insert(boots) => {}
            Fate::Runs { .. } => break,
            Fate::Ended(view) => return Ok(Next::Ended(end_of(&view))),
            Fate::Gone => return Ok(Next::Ended(Err(gone(path)))),
            Fate::Ends | Fate::Undecided => {}
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(Next::Open(open(context, path.into(), true).await?.0))
}

/// What is to become of an instance.
enum Fate {
    /// It runs.
    Runs { boots: u64 },
    /// It does not run, and will again.
    IsToRun,
    /// It has ended for good.
    Ended(Box<InstanceView>),
    /// It was removed.
    Gone,
    /// Its run is being brought to an end.
    Ends,
    /// Its run has ended, and what follows is not known yet.
    Undecided,
}

async fn fate(context: &Context, path: &InstancePath) -> Result<Fate> {
    let view = match context.client.instances(path.into()).await {
        Ok(mut views) => views.pop(),
        Err(Error::Api(error)) if error.code == ErrorCode::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok(view.map_or(Fate::Gone, judge))
}

fn judge(view: InstanceView) -> Fate {
    let has_ended = matches!(view.state, State::Stopped | State::Failed) && view.activity.is_none();
    let is_wanted =
        view.desired != DesiredState::Stopped && view.desired != DesiredState::Destroyed;
    match (&view.waiting, view.activity.as_deref()) {
        (Some(Waiting::RestartPolicy { .. }), _) => Fate::Ended(Box::new(view)),
        _ if has_ended && !is_wanted => Fate::Ended(Box::new(view)),
        (Some(Waiting::Step) | None, None) if has_ended => Fate::Undecided,
        (Some(Waiting::Step) | None, None) => Fate::Runs { boots: view.boots },
        (_, Some("starting" | "waking" | "resuming")) => Fate::IsToRun,
        (Some(Waiting::Step) | None, Some(_)) => Fate::Ends,
        (Some(_), _) => Fate::IsToRun,
    }
}

fn end_of(view: &InstanceView) -> Result<ExitStatus> {
    if let Some(code) = view.exit_code {
        return Ok(ExitStatus::Exited { code });
    }
    let cause = view.last_death.as_ref().map_or_else(String::new, |death| death.cause.to_string());
    let message = format!("{}: {cause}", view.path);
    let hint = format!("see `mvm why {id}` and `mvm logs {id}`", id = view.path.id);
    Err(ApiError::new(ErrorCode::Guest, message).hint(hint).into())
}

fn gone(path: &InstancePath) -> Error {
    let message = format!("{path} has ended, and was removed");
    ApiError::new(ErrorCode::Conflict, message).into()
}

/// What a command that has followed a main process ends with.
pub(crate) fn exit_code(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Exited(status) => exec::exit_code(status),
        Outcome::Detached => exit::OK,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn what_becomes_of_an_instance_is_told_from_its_state_and_what_it_waits_for() {
        let view = |state, activity: Option<&str>, desired: DesiredState, waiting| InstanceView {
            state,
            activity: activity.map(str::to_owned),
            desired: desired.into(),
            waiting,
            ..samples::instance("demo/hello/i-00000001")
        };
        use DesiredState::{Running, Stopped};
        let backoff = Waiting::Backoff { failures: 0, short_runs: 1, until_unix_ms: 1 };
        let policy = Waiting::RestartPolicy { policy: RestartPolicy::OnFailure.into() };
        let name = |fate| match fate {
            Fate::Runs { .. } => "runs",
            Fate::IsToRun => "is to run",
            Fate::Ended(_) => "ended",
            Fate::Gone => "gone",
            Fate::Ends => "ends",
            Fate::Undecided => "undecided",
        };
        for (view, expected) in [
            (view(State::Running, None, Running, None), "runs"),
            (view(State::Running, Some("stopping"), Running, Some(Waiting::Step)), "ends"),
            (view(State::Stopped, None, Running, Some(backoff)), "is to run"),
            (view(State::Failed, None, Running, None), "undecided"),
            (view(State::Failed, Some("starting"), Running, Some(Waiting::Step)), "is to run"),
            (view(State::Stopped, None, Running, Some(policy)), "ended"),
            (view(State::Stopped, None, Stopped, None), "ended"),
        ] {
            let text = format!("{view:?}");
            assert_eq!(name(judge(view)), expected, "{text}");
        }
    }
}
