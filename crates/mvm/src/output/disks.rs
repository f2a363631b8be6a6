//! Data disks for people.

use mvm_core::lifecycle::State;
use mvm_wire::view::{DiskUserView, DiskView};

use super::table::{fields, or_dash, table};
use crate::units::{kib_text, mib_text, utc_text};

/// A list of data disks.
pub(crate) fn list(views: &[DiskView]) -> String {
    let header = ["DISK", "SIZE", "ON HOST", "STATE", "WRITER", "READERS"];
    let row = |view: &DiskView| {
        let holding = view.instances.iter().filter(|user| holds(user));
        let (readers, writers): (Vec<_>, Vec<_>) = holding.partition(|user| user.read_only);
        [
            view.path.to_string(),
            mib_text(view.size_mib),
            kib_text(view.host_kib),
            state(view).to_owned(),
            or_dash(writers.first().map(|user| &user.instance)),
            readers.len().to_string(),
        ]
    };
    table(header, views.iter().map(row))
}

/// Whether an instance keeps others from a disk: one that sleeps has not written everything to it.
fn holds(user: &DiskUserView) -> bool {
    matches!(user.state, State::Running | State::Warm | State::Sleeping)
}

fn state(view: &DiskView) -> &'static str {
    match (view.removing, view.ready, &view.error) {
        (true, ..) => "being removed",
        (false, _, Some(_)) => "failed",
        (false, true, None) => "ready",
        (false, false, None) => "being made",
    }
}

/// One data disk in full.
pub(crate) fn info(view: &DiskView) -> String {
    let mut rows = vec![
        ("disk", view.path.to_string()),
        ("size", mib_text(view.size_mib)),
        ("on host", kib_text(view.host_kib)),
        ("state", state(view).to_owned()),
        ("file", view.file.display().to_string()),
        ("created", utc_text(view.created_unix_ms)),
    ];
    if let Some(error) = &view.error {
        rows.insert(4, ("error", error.clone()));
    }
    rows.extend(view.pools.iter().map(|pool| ("pool", pool.to_string())));
    rows.extend(view.instances.iter().map(|user| {
        let how = if user.read_only { ", read only" } else { "" };
        ("instance", format!("{} ({}), on {}{how}", user.instance, user.state, user.path))
    }));
    fields(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_tells_who_has_it() {
        let user = |id: &str, read_only, state| DiskUserView {
            instance: format!("demo/web/{id}").parse().unwrap(),
            path: "/data".parse().unwrap(),
            read_only,
            state,
        };
        let view = DiskView {
            path: "demo/data".parse().unwrap(),
            size_mib: 1024,
            ready: true,
            error: None,
            host_kib: 4400,
            file: "/state/disks/demo/data.ext4".into(),
            instances: vec![
                user("i-00000001", false, State::Sleeping),
                user("i-00000002", true, State::Stopped),
            ],
            pools: vec!["demo/web".parse().unwrap()],
            created_unix_ms: 0,
            removing: false,
        };
        let expected = "\
DISK        SIZE    ON HOST   STATE   WRITER                READERS
demo/data   1 GiB   4.3 MiB   ready   demo/web/i-00000001   0";
        assert_eq!(list(std::slice::from_ref(&view)), expected);
        let text = info(&view);
        assert!(text.contains("instance:   demo/web/i-00000002 (stopped), on /data, read only"));
        assert!(!text.contains("error:"), "{text}");
        let failed = DiskView { error: Some("no space".into()), ready: false, ..view };
        assert!(info(&failed).contains("error:      no space"));
    }
}
