//! `mvm up`.

use std::path::PathBuf;

use clap::Args;
use mvm_core::admit::Request;
use mvm_core::name::{PoolPath, Selector};
use mvm_core::spec::Document;
use mvm_core::vmm::VmmKind;
use mvm_wire::view::InstanceView;

use super::bootstrap;
use crate::cli::Context;
use crate::document;
use crate::error::Result;
use crate::output::instances;
use crate::request::{WaitArgs, carry_out};
use crate::wait::{Goal, now_unix_ms};

/// Make the node agree with a document.
///
/// The document (TOML, YAML or JSON) describes a tenant, its limits, its pools and how many
/// instances of each run. What is there already stays; a second `up` changes nothing. If this
/// machine lacks a tool or the guest kernel, it offers to fetch them first, as `mvm bootstrap`
/// does.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm up examples/hello.toml
  mvm up fleet.yaml --yes --no-wait
  cat fleet.toml | mvm up -")]
pub(crate) struct Up {
    /// The document; - is standard input.
    file: PathBuf,
    /// Fetch what this machine lacks without asking.
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

impl Up {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let document = document::read(&self.file)?;
        if !is_simulated(context).await? {
            let images = document.pools.values().map(|pool| &pool.spec.image);
            bootstrap::ensure_ready(context, self.yes, images).await?;
        }
        let request = Request::Apply { document: document.clone() };
        let outcome = carry_out(context, request, Goal::Settled, &self.wait).await?;
        let selector = Selector::Tenant(document.tenant.clone());
        let mut views = context.client.instances(selector).await?;
        views.retain(|view| document.pools.contains_key(&view.path.pool.pool));
        context.ui.data(&outcome, || instances::list(&views, now_unix_ms()))?;
        for line in what_next(&document, &views, &self.file.display().to_string()) {
            context.ui.remark(&line);
        }
        Ok(())
    }
}

/// Whether the agent runs no real microVMs and so needs nothing of the machine.
pub(crate) async fn is_simulated(context: &Context) -> Result<bool> {
    let vmm = match context.client.running_agent().await? {
        Some(node) => node.vmm.known().copied(),
        None => context.client.wanted().vmm,
    };
    Ok(vmm == Some(VmmKind::Sim))
}

/// What a newcomer may want to type after a first success.
fn what_next(document: &Document, views: &[InstanceView], file: &str) -> Vec<String> {
    let Some((name, _)) = document.pools.iter().find(|(_, pool)| pool.running > 0) else {
        return Vec::new();
    };
    let pool = PoolPath { tenant: document.tenant.clone(), pool: name.clone() };
    let Some(first) = views.iter().find(|view| view.path.pool == pool) else { return Vec::new() };
    let mut lines = vec![
        String::new(),
        "What next:".to_owned(),
        format!("  mvm exec {pool} -- uname -sr"),
        format!("  mvm logs {}", first.path),
    ];
    if file != "-" {
        lines.push(format!("  mvm down {file}"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn the_next_commands_name_what_was_made() {
        let text = "tenant = \"demo\"\n[pools.a]\nrunning = 0\n[pools.hello]\n";
        let document: Document = toml::from_str(text).unwrap();
        let views = [samples::instance("demo/hello/i-00000001")];
        let lines = what_next(&document, &views, "hello.toml");
        assert_eq!(
            lines[2..],
            [
                "  mvm exec demo/hello -- uname -sr",
                "  mvm logs demo/hello/i-00000001",
                "  mvm down hello.toml",
            ]
        );
        assert!(what_next(&document, &[], "hello.toml").is_empty());
        assert_eq!(what_next(&document, &views, "-").len(), 4);
    }
}
