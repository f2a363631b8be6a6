//! `mvm image`.

use clap::{Args, Subcommand};
use mvm_core::name::RevisionId;
use mvm_wire::view::ImageView;
use mvm_wire::{ApiError, ErrorCode};

use crate::cli::Context;
use crate::error::Result;
use crate::output::images;

/// Work with built images: what instances boot from.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm image list
  mvm image gc --dry-run")]
pub(crate) struct Image {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    List(List),
    Info(Info),
    Rm(Remove),
    Gc(Collect),
}

/// List built images.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm image list
  mvm image list -o json")]
struct List {}

/// Show one built image in full: its source, its size, how it is run, and what uses it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm image info r-3f2a
  mvm image info r-3f2a -o json")]
struct Info {
    /// The revision, or the beginning of it.
    revision: String,
}

/// Remove built images that nothing uses.
///
/// An image that a pool or an instance uses, or that a pool can go back to, is refused.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm image rm r-3f2a")]
struct Remove {
    /// The revisions, or the beginnings of them.
    #[arg(required = true)]
    revisions: Vec<String>,
}

/// Remove everything of images that nothing uses.
///
/// These are built images without a pool or instance, layers that no built image is made of,
/// downloads that were not finished, and archives that came over standard input. No image is
/// built meanwhile.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mvm image gc --dry-run
  mvm image gc")]
struct Collect {
    /// Only say what would be removed.
    #[arg(long)]
    dry_run: bool,
}

impl Image {
    /// Runs the verb.
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        match self.verb {
            Verb::List(List {}) => {
                let views = context.client.images().await?;
                context.ui.data(&views, || images::list(&views))?;
                if views.is_empty() {
                    context.ui.remark("there are no images: `mvm pool build POOL` builds one");
                }
                Ok(())
            }
            Verb::Info(Info { revision }) => {
                let views = context.client.images().await?;
                let view = one(&views, &revision)?;
                context.ui.data(view, || images::info(view))
            }
            Verb::Rm(Remove { revisions }) => {
                let views = context.client.images().await?;
                let ids: Vec<RevisionId> = revisions
                    .iter()
                    .map(|text| one(&views, text).map(|view| view.revision.clone()))
                    .collect::<Result<_>>()?;
                let mut removed = Vec::new();
                for id in ids {
                    removed.push(context.client.image_remove(id).await?);
                }
                let names = removed.iter().flat_map(|view| &view.items).map(|i| i.name.as_str());
                let names = names.collect::<Vec<_>>().join("\n");
                context.ui.data(&removed, || names)
            }
            Verb::Gc(Collect { dry_run }) => {
                let view = context.client.image_collect(dry_run).await?;
                context.ui.data(&view, || images::collected(&view))?;
                context.ui.remark(&images::collected_summary(&view));
                Ok(())
            }
        }
    }
}

/// The one image whose revision begins like this.
fn one<'a>(views: &'a [ImageView], text: &str) -> Result<&'a ImageView> {
    // Every name begins with nothing, such as a variable that is not set.
    if text.is_empty() {
        return Err(ApiError::new(ErrorCode::Invalid, "the name of an image is empty")
            .hint("see `mvm image list`")
            .into());
    }
    let matching: Vec<&ImageView> =
        views.iter().filter(|view| view.revision.as_str().starts_with(text)).collect();
    match matching.as_slice() {
        [only] => Ok(only),
        [] => Err(ApiError::new(ErrorCode::NotFound, format!("there is no image {text}"))
            .hint("see `mvm image list`")
            .into()),
        several => {
            let names: Vec<_> = several.iter().map(|view| view.revision.as_str()).collect();
            let message =
                format!("{text} is the beginning of several images: {}", names.join(", "));
            Err(ApiError::new(ErrorCode::Invalid, message).hint("write more of it").into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_name_is_no_image_even_if_there_is_only_one() {
        let view = ImageView {
            revision: RevisionId::from_digest([1; 8]),
            source: String::new(),
            bytes: 0,
            built_unix_ms: 0,
            kernel: String::new(),
            config: Default::default(),
            layers: vec![],
            used_by: vec![],
            damage: None,
        };
        let views = [view];
        assert!(one(&views, "r-0").is_ok());
        let error = one(&views, "").unwrap_err().to_string();
        assert!(error.contains("empty"), "{error}");
    }
}
