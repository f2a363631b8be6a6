//! `mvm ps`, `mvm instance list`.

use clap::Args;
use mvm_core::lifecycle::State;
use mvm_core::name::Selector;
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
  mvm ps demo -o json")]
pub(crate) struct Ps {
    /// Only these: TENANT, TENANT/POOL or a prefix of an id.
    selector: Option<Selector>,
    /// Those that are stopped too.
    #[arg(short, long)]
    all: bool,
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
}

impl List {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        Ps { selector: self.selector, all: true }.run(context).await
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
        context.ui.data(&views, || instances::list(&views, now_unix_ms()))?;
        match existing - views.len() {
            0 if existing == 0 => context.ui.remark(
                "there are no instances: `mvm instance create TENANT/POOL --start` makes one, `mvm up FILE` a whole tenant",
            ),
            0 => {}
            1 => context.ui.remark("1 stopped instance is not shown: see `mvm ps -a`"),
            hidden => {
                context
                    .ui
                    .remark(&format!("{hidden} stopped instances are not shown: see `mvm ps -a`"));
            }
        }
        Ok(())
    }
}

/// Whether an instance runs, is to run, or is in the middle of something.
fn is_active(view: &InstanceView) -> bool {
    matches!(view.state, State::Running | State::Warm | State::Sleeping)
        || view.activity.is_some()
        || view.desired != DesiredState::Stopped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn what_is_at_rest_as_wished_is_not_active() {
        let view = |state, desired, activity: Option<&str>| InstanceView {
            state,
            desired,
            activity: activity.map(str::to_owned),
            ..samples::instance("demo/hello/i-00000001")
        };
        assert!(!is_active(&view(State::Stopped, DesiredState::Stopped, None)));
        assert!(!is_active(&view(State::Created, DesiredState::Stopped, None)));
        assert!(is_active(&view(State::Running, DesiredState::Stopped, Some("stopping"))));
        assert!(is_active(&view(State::Failed, DesiredState::Running, None)));
        assert!(is_active(&view(State::Stopped, DesiredState::Destroyed, Some("destroying"))));
    }
}
