//! Built images for people.

use std::collections::BTreeSet;

use mvm_wire::view::{CollectedView, ImageView};

use super::printable;
use super::table::{fields, or_dash, table};
use super::tenants::ports;
use crate::units::{kib_text, utc_text};

/// A list of images.
pub(crate) fn list(views: &[ImageView]) -> String {
    let row = |view: &ImageView| {
        let source = match &view.damage {
            Some(_) => "(damaged)".to_owned(),
            None => view.source.clone(),
        };
        [
            view.revision.to_string(),
            size(view.bytes),
            utc_text(view.built_unix_ms),
            view.used_by.len().to_string(),
            source,
        ]
    };
    table(["REVISION", "SIZE", "BUILT", "USERS", "SOURCE"], views.iter().map(row))
}

/// Says that mvm does not do what an image wishes.
pub(crate) const NO_HEALTHCHECK: &str = "the image's is not run: watch it from outside";

/// The directories that an image wants kept apart, and what becomes of them.
pub(crate) fn volumes(paths: &BTreeSet<String>) -> Option<String> {
    let paths: Vec<String> = paths.iter().map(|path| printable(path)).collect();
    let ends = "directories of each instance's own disk, unless a data disk is attached there";
    (!paths.is_empty()).then(|| format!("{} ({ends})", paths.join(", ")))
}

fn size(bytes: u64) -> String {
    kib_text(bytes / 1024)
}

/// One image in full.
pub(crate) fn info(view: &ImageView) -> String {
    let words = |words: &[String]| or_dash((!words.is_empty()).then(|| words.join(" ")));
    let text = |text: &str| or_dash((!text.is_empty()).then_some(text));
    let mut rows = vec![
        ("revision", view.revision.to_string()),
        ("source", view.source.clone()),
        ("size", size(view.bytes)),
        ("built", utc_text(view.built_unix_ms)),
        ("kernel", view.kernel.clone()),
        ("layers", view.layers.len().to_string()),
    ];
    match view.config.known() {
        Some(config) => rows.extend([
            ("entrypoint", words(&config.entrypoint)),
            ("command", words(&config.cmd)),
            ("user", text(&config.user)),
            ("working directory", text(&config.working_dir)),
            ("stop signal", or_dash(config.stop_signal.as_ref())),
            ("init", or_dash(config.init.as_ref())),
            ("exposed ports", ports(&config.exposed_ports)),
            ("volumes", or_dash(volumes(&config.volumes))),
            ("health check", or_dash(config.has_healthcheck.then_some(NO_HEALTHCHECK))),
        ]),
        None => rows.push(("configuration", "unknown".to_owned())),
    }
    rows.push(("used by", or_dash((!view.used_by.is_empty()).then(|| view.used_by.join(", ")))));
    rows.extend(view.damage.clone().map(|damage| ("damage", damage)));
    fields(rows)
}

/// What was collected.
pub(crate) fn collected(view: &CollectedView) -> String {
    if view.items.is_empty() {
        return String::new();
    }
    let rows = view.items.iter().map(|i| [i.kind.clone(), size(i.bytes), i.name.clone()]);
    table(["KIND", "SIZE", "NAME"], rows)
}

/// What was collected, in one line.
pub(crate) fn collected_summary(view: &CollectedView) -> String {
    match (view.items.len(), view.dry_run) {
        (0, _) => "everything is in use: nothing to remove".to_owned(),
        (count, true) => {
            format!(
                "{count} would be removed, which frees {}; leave out --dry-run",
                size(view.bytes)
            )
        }
        (count, false) => format!("{count} removed, {} freed", size(view.bytes)),
    }
}

#[cfg(test)]
mod tests {
    use mvm_core::image::ImageConfig;
    use mvm_core::name::RevisionId;
    use mvm_wire::view::CollectedItem;

    use super::*;

    fn image() -> ImageView {
        ImageView {
            revision: RevisionId::from_digest([1; 8]),
            source: "docker.io/library/nginx:1.27 (sha256:…)".to_owned(),
            bytes: 3 * 1024 * 1024,
            built_unix_ms: 0,
            kernel: "6.1.0".to_owned(),
            config: ImageConfig { cmd: vec!["nginx".into(), "-g".into()], ..Default::default() }
                .into(),
            layers: vec!["sha256:a".into(), "sha256:b".into()],
            used_by: vec!["pool demo/web".into(), "instance demo/web/i-00000001".into()],
            damage: None,
        }
    }

    #[test]
    fn an_image_is_shown_with_what_uses_it() {
        let text = list(&[image()]);
        let row = text.lines().nth(1).unwrap();
        assert!(row.contains("3 MiB") && row.contains(" 2 "), "{row}");
        let text = info(&image());
        for part in ["pool demo/web, instance demo/web/i-00000001", "nginx -g", "layers:"] {
            assert!(text.contains(part), "{text}");
        }
        let damaged = ImageView { damage: Some("root.erofs is gone".into()), ..image() };
        assert!(list(std::slice::from_ref(&damaged)).contains("(damaged)"));
        assert!(info(&damaged).contains("root.erofs is gone"));
    }

    #[test]
    fn a_collection_tells_what_it_freed() {
        let item = CollectedItem { kind: "layer".into(), name: "sha256:a".into(), bytes: 2048 };
        let view = CollectedView { dry_run: true, bytes: 2048, items: vec![item] };
        assert!(collected(&view).contains("layer   2 KiB   sha256:a"));
        assert!(collected_summary(&view).starts_with("1 would be removed, which frees 2 KiB"));
        let nothing = CollectedView { dry_run: false, bytes: 0, items: vec![] };
        assert!(collected_summary(&nothing).contains("nothing to remove"));
    }
}
