//! `mvm ps`, `mvm instance list`.

use clap::Args;
use mvm_core::lifecycle::State;
use mvm_core::name::Selector;
use mvm_core::plan::Waiting;
use mvm_core::record::DesiredState;
use mvm_wire::view::InstanceView;

use crate::cli::Context;
use crate::error::Result;
use crate::output::instances;
use crate::wait::now_unix_ms;

/// List the instances that run or are to run.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm ps
  mvm ps -a
  mvm ps -q demo
  mvm ps demo -o json")]
pub(crate) struct Ps {
    /// Only these: TENANT, TENANT/POOL or a prefix of an id.
    selector: Option<Selector>,
    /// Those that are stopped, or have ended for good, too.
    #[arg(short, long)]
    all: bool,
    /// Print their paths alone, one a line.
    #[arg(short, long)]
    quiet: bool,
}

/// List instances, whatever their state.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm instance list
  mvm instance list demo/hello -o yaml")]
pub(crate) struct List {
    /// Only these: TENANT, TENANT/POOL or a prefix of an id.
    selector: Option<Selector>,
    /// Print their paths alone, one a line.
    #[arg(short, long)]
    quiet: bool,
}

impl List {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        Ps { selector: self.selector, all: true, quiet: self.quiet }.run(context).await
    }
}

impl Ps {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let selector = self.selector.unwrap_or(Selector::All);
        let mut views = context.client.instances(selector).await?;
        let existing = views.len();
        if !self.all {
            views.retain(is_active);
        }
        if self.quiet {
            let paths: Vec<_> = views.iter().map(|view| view.path.to_string()).collect();
            return context.ui.data(&paths, || paths.join("\n"));
        }
        context.ui.data(&views, || instances::list(&views, now_unix_ms()))?;
        match existing - views.len() {
            0 if existing == 0 => context.ui.remark(
                "there are no instances: `mvm run IMAGE` makes one, `mvm up FILE` a whole tenant",
            ),
            0 => {}
            1 => context.ui.remark("1 stopped instance is not shown: see `mvm ps -a`"),
            hidden => {
                context
                    .ui
                    .remark(&format!("{hidden} stopped instances are not shown: see `mvm ps -a`"));
            }
        }
        if let Some(hint) = instances::outdated_hint(&views) {
            context.ui.remark(&hint);
        }
        Ok(())
    }
}

/// Whether an instance runs, is about to, or is in the middle of something. One that has ended and
/// that its restart policy leaves so is none of these.
fn is_active(view: &InstanceView) -> bool {
    let is_left = matches!(view.waiting, Some(Waiting::RestartPolicy { .. }));
    matches!(view.state, State::Running | State::Warm | State::Sleeping)
        || view.activity.is_some()
        || (view.desired != DesiredState::Stopped && !is_left)
}

#[cfg(test)]
mod tests {
    use mvm_core::spec::RestartPolicy;

    use super::*;
    use crate::samples;

    #[test]
    fn what_is_at_rest_as_wished_is_not_active() {
        let view = |state, desired: DesiredState, activity: Option<&str>| InstanceView {
            state,
            desired: desired.into(),
            activity: activity.map(str::to_owned),
            ..samples::instance("demo/hello/i-00000001")
        };
        assert!(!is_active(&view(State::Stopped, DesiredState::Stopped, None)));
        assert!(!is_active(&view(State::Created, DesiredState::Stopped, None)));
        let ended = InstanceView {
            waiting: Some(Waiting::RestartPolicy { policy: RestartPolicy::Never.into() }),
            ..view(State::Stopped, DesiredState::Running, None)
        };
        assert!(!is_active(&ended));
        assert!(is_active(&view(State::Running, DesiredState::Stopped, Some("stopping"))));
        assert!(is_active(&view(State::Failed, DesiredState::Running, None)));
        assert!(is_active(&view(State::Stopped, DesiredState::Destroyed, Some("destroying"))));
    }
}
