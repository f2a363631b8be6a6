//! Instances for people: lists, details, explanations and use of resources.

use std::fmt::Write as _;

use mvm_core::death::{Cause, Death, OUTPUT_TAIL_LINES};
use mvm_core::lifecycle::State;
use mvm_core::plan::Waiting;
use mvm_core::record::{DesiredState, Purpose};
use mvm_core::shown::Shown;
use mvm_core::vmm::{ProcessEnd, VmExit};
use mvm_wire::view::{InstanceView, StatsView, WhyView};

use super::table::{fields, or_dash, table};
use super::tenants::ports;
use super::{policy, printable};
use crate::units::{duration_text, kib_short, mib_text, utc_text};
use crate::wait::progress::reason;

/// A list of instances.
pub(crate) fn list(views: &[InstanceView], now: u64) -> String {
    let header = ["INSTANCE", "STATE", "ADDRESS", "VCPUS", "MEM", "UPTIME", "RESTARTS"];
    let row = |view: &InstanceView| {
        [
            view.path.to_string(),
            state(view, now),
            or_dash(view.address),
            view.vcpus.to_string(),
            mib_text(view.mem_mib.into()),
            or_dash(uptime(view, now)),
            view.boots.saturating_sub(1).to_string(),
        ]
    };
    if views.iter().all(|view| view.outdated.is_empty()) {
        return table(header, views.iter().map(row));
    }
    let [instance, state, address, vcpus, mem, uptime, restarts] = header;
    let header = [instance, state, address, vcpus, mem, uptime, restarts, "OUTDATED"];
    let row = |view: &InstanceView| {
        let [instance, state, address, vcpus, mem, uptime, restarts] = row(view);
        [instance, state, address, vcpus, mem, uptime, restarts, or_dash(outdated(view))]
    };
    table(header, views.iter().map(row))
}

/// What of its pool's spec has changed since it was made, as the spec names it.
fn outdated(view: &InstanceView) -> Option<String> {
    let parts: Vec<String> = view.outdated.iter().map(ToString::to_string).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// Where to read how instances that differ from their pool's spec are renewed; nothing if none do.
pub(crate) fn outdated_hint(views: &[InstanceView]) -> Option<String> {
    let outdated: Vec<&InstanceView> =
        views.iter().filter(|view| !view.outdated.is_empty()).collect();
    let pool = &outdated.first()?.path.pool;
    Some(match outdated.len() {
        1 => format!(
            "1 instance differs from its pool's spec: `mvm pool info {pool}` says how to renew it"
        ),
        count => format!(
            "{count} instances differ from their pool's spec: `mvm pool info {pool}` says how to renew them"
        ),
    })
}

fn uptime(view: &InstanceView, now: u64) -> Option<String> {
    view.running_since_unix_ms.map(|since| duration_text(now.saturating_sub(since)))
}

/// The state with how the main process ended, and what the instance is in the middle of, or waits
/// for, in a few words.
fn state(view: &InstanceView, now: u64) -> String {
    let state = view.state;
    let exit = view.exit_code.filter(|_| matches!(state, State::Stopped | State::Failed));
    let more = match (&view.activity, &view.waiting) {
        (Some(activity), _) if view.lacks_space => format!("{activity}, host disk full"),
        (None, _) if view.lacks_space => "host disk full".to_owned(),
        (Some(activity), _) => activity.clone(),
        (None, Some(Waiting::Image { error: None })) => "waiting for image".to_owned(),
        (None, Some(Waiting::Image { error: Some(_) })) => "image failed".to_owned(),
        (None, Some(Waiting::Disk { error: None, .. })) => "waiting for disk".to_owned(),
        (None, Some(Waiting::Disk { error: Some(_), .. })) => "disk failed".to_owned(),
        (None, Some(Waiting::DiskHeld { .. })) => "disk in use".to_owned(),
        (None, Some(Waiting::Quota)) => "over quota".to_owned(),
        (None, Some(Waiting::Network | Waiting::StartSlot)) => "queued".to_owned(),
        (None, Some(Waiting::Backoff { until_unix_ms, .. })) => {
            format!("retry in {}", duration_text(until_unix_ms.saturating_sub(now)))
        }
        (None, Some(Waiting::Setback { step, .. })) => format!("could not be {step}"),
        (None, Some(Waiting::Unknown)) => "waiting".to_owned(),
        (None, _) if view.network_problem.is_some() => "no network".to_owned(),
        (None, _) if view.purpose == Purpose::Spare => "stands by".to_owned(),
        (None, _) if view.purpose == Purpose::Base => "for the base".to_owned(),
        (None, Some(Waiting::RestartPolicy { .. } | Waiting::Step) | None) => {
            return match exit {
                Some(code) => format!("{state} (exit {code})"),
                None => state.to_string(),
            };
        }
    };
    match exit {
        Some(code) => format!("{state} (exit {code}, {more})"),
        None => format!("{state} ({more})"),
    }
}

fn wish(desired: &Shown<DesiredState>) -> &'static str {
    match desired.known() {
        Some(DesiredState::Running) => "running",
        Some(DesiredState::Warm) => "warm",
        Some(DesiredState::Sleeping) => "sleeping",
        Some(DesiredState::Stopped) => "stopped",
        Some(DesiredState::Destroyed) => "destroyed",
        None => "unknown",
    }
}

/// One instance in full.
pub(crate) fn info(view: &InstanceView, now: u64) -> String {
    let mut rows = vec![
        ("instance", view.path.to_string()),
        ("state", state(view, now)),
        ("desired", wish(&view.desired).to_owned()),
        ("generation", view.generation.to_string()),
        ("address", or_dash(view.address)),
        ("mac", or_dash(view.mac)),
        ("tap", or_dash(view.tap.as_ref())),
        ("vcpus", view.vcpus.to_string()),
        ("memory", mib_text(view.mem_mib.into())),
        ("disk", mib_text(view.disk_mib.into())),
        ("revision", or_dash(view.revision.as_ref())),
    ];
    if let Some(parts) = outdated(view) {
        let pool = &view.path.pool;
        rows.push(("outdated", format!("{parts} (`mvm pool info {pool}` says how to renew it)")));
    }
    rows.extend([
        ("exposed ports", ports(&view.exposed_ports)),
        ("vmm", or_dash(view.vmm.as_ref())),
        ("accelerator", or_dash(view.accel.as_ref())),
        ("vmm pid", or_dash(view.pid)),
        ("uptime", or_dash(uptime(view, now))),
        ("boots", view.boots.to_string()),
        ("wakes", view.wakes.to_string()),
        ("failures in a row", view.failures.to_string()),
        ("created", moment(view.created_unix_ms, now)),
    ]);
    rows.extend(view.disks.iter().map(|mount| ("data disk", mount.to_string())));
    if let Some(death) = &view.last_death {
        let at = moment(death.at_unix_ms, now);
        rows.push(("last end", format!("{}, {at}", death.cause)));
    }
    if let Some(since) = view.resting_since_unix_ms {
        rows.push(("at rest since", moment(since, now)));
    }
    if view.pinned {
        rows.push(("pinned", "yes: its pool's sleep policy leaves it alone".to_owned()));
    }
    if let Some(cold) = &view.cold_boot {
        let at = moment(cold.at_unix_ms, now);
        rows.push(("booted cold", format!("{}, {at}", cold.reason)));
    }
    if let Some(problem) = &view.network_problem {
        rows.push(("network", problem.clone()));
    }
    if let Some(code) = view.exit_code {
        rows.push(("exit code", code.to_string()));
    }
    fields(rows)
}

fn moment(unix_ms: u64, now: u64) -> String {
    format!("{} ago ({})", duration_text(now.saturating_sub(unix_ms)), utc_text(unix_ms))
}

/// Why an instance is in its state.
pub(crate) fn why(why: &WhyView, now: u64) -> String {
    let view = &why.instance;
    let mut text = format!("{} is {}: {}.\n", view.path, state(view, now), printable(&why.summary));
    let _ = writeln!(text, "\nDesired state: {}.", wish(&view.desired));
    if let Some(reason) = view.waiting.as_ref().and_then(|waiting| reason(waiting, now)) {
        let _ = writeln!(text, "It is not there yet: {}.", printable(&reason));
    }
    if let Some(rested) = view.rested.as_ref().and_then(Shown::known) {
        let _ = writeln!(text, "{}", policy::rested(rested, now));
    }
    if let Some(activity) = &why.activity {
        let _ = writeln!(text, "{}", policy::usage(activity, now));
    }
    if view.pinned {
        let _ = writeln!(text, "It is pinned: its pool's sleep policy leaves it alone.");
    }
    if let Some(cold) = &view.cold_boot {
        let at = moment(cold.at_unix_ms, now);
        let reason = printable(&cold.reason.to_string());
        let _ = writeln!(
            text,
            "\nIt booted from its disk {at}, as its snapshot could not be restored: {reason}."
        );
    }
    if let Some(death) = &view.last_death {
        let _ = writeln!(text, "\n{}", last_end(death, now));
    }
    if !why.output_tail.is_empty() {
        let _ = writeln!(text, "\nThe last lines that its main process wrote:");
        for line in &why.output_tail {
            let _ = writeln!(text, "  | {}", printable(line));
        }
        if why.output_tail.len() >= OUTPUT_TAIL_LINES {
            let _ = writeln!(text, "More of it: `mvm logs {}`.", view.path);
        }
    }
    // How a main process ended by itself, it has said itself: the console knows nothing of it.
    let is_told = !why.output_tail.is_empty()
        && view.last_death.as_ref().is_some_and(|death| {
            matches!(death.cause, Cause::Exited { .. } | Cause::Signaled { .. })
        });
    let console = match (&view.last_death, why.console_tail.as_slice()) {
        (Some(death), []) => death.console_tail.as_slice(),
        (_, tail) => tail,
    };
    // One that runs as it is to, or has ended in order, has no use for its boot's messages.
    let is_settled = match view.state {
        State::Running => view.activity.is_none() && view.waiting.is_none(),
        State::Stopped => view.last_death.is_some(),
        _ => false,
    };
    if is_settled && view.last_death.as_ref().is_none_or(ended_well) {
        let _ = writeln!(text, "Its console: `mvm logs {} --source console`.", view.path);
    } else if !console.is_empty() && !is_told {
        let _ = writeln!(text, "\nThe last lines of its console:");
        for line in console {
            let _ = writeln!(text, "  | {}", printable(line));
        }
    }
    text
}

/// Whether nothing went wrong at the end: the main process succeeded, or an operator's stop was in order.
fn ended_well(death: &Death) -> bool {
    let is_in_order = death
        .exit
        .as_ref()
        .and_then(Shown::known)
        .is_some_and(|exit| exit.process == ProcessEnd::Exited { code: 0 });
    match death.cause {
        Cause::Exited { code } => code == 0,
        Cause::Operator => is_in_order,
        _ => false,
    }
}

fn last_end(death: &Death, now: u64) -> String {
    let Death { cause, at_unix_ms, exit, .. } = death;
    let exit = exit
        .as_ref()
        .and_then(Shown::known)
        .map_or_else(String::new, |exit| format!("; {}", vmm_end(exit)));
    let cause = printable(&cause.to_string());
    format!("Its last run ended {}: {cause}{exit}.", moment(*at_unix_ms, now))
}

fn vmm_end(exit: &VmExit) -> String {
    match exit.process {
        ProcessEnd::Exited { code } => format!("the VMM exited with code {code}"),
        ProcessEnd::Signaled { signal } => format!("signal {signal} ended the VMM"),
        ProcessEnd::Unobserved => "nobody saw the VMM end".to_owned(),
    }
}

/// What instances use.
pub(crate) fn stats(views: &[StatsView]) -> String {
    let header =
        ["INSTANCE", "CPU", "HOST MEM", "HOST DISK", "GUEST MEM", "GUEST DISK", "LOAD", "IDLE"];
    let row = |view: &StatsView| {
        let guest = view.guest.as_ref();
        let used = |total: u64, free: u64| {
            format!("{}/{}", kib_short(total.saturating_sub(free)), kib_short(total))
        };
        [
            view.path.to_string(),
            format!("{}.{}s", view.cpu_ms / 1000, view.cpu_ms % 1000 / 100),
            kib_short(view.host_rss_kib),
            kib_short(view.host_disk_kib),
            or_dash(guest.map(|g| used(g.mem_total_kib, g.mem_available_kib))),
            or_dash(guest.map(|g| used(g.disk_total_kib, g.disk_free_kib))),
            or_dash(guest.map(|g| format!("{:.2}", g.load[0]))),
            or_dash(view.activity.as_ref().map(policy::idle)),
        ]
    };
    table(header, views.iter().map(row))
}

/// What instances have read and written, sent and received.
pub(crate) fn io_stats(views: &[StatsView]) -> String {
    let header =
        ["INSTANCE", "DISK READ", "WRITTEN", "READS/WRITES", "THROTTLED", "NET SENT", "RECEIVED"];
    let row = |view: &StatsView| {
        let kib = |bytes: u64| kib_short(bytes / 1024);
        [
            view.path.to_string(),
            kib_short(view.disk_read_kib),
            kib_short(view.disk_written_kib),
            or_dash(view.disk_io.map(|io| format!("{}/{}", io.reads, io.writes))),
            or_dash(view.disk_io.and_then(|io| io.throttled)),
            or_dash(view.traffic.map(|traffic| kib(traffic.sent_bytes))),
            or_dash(view.traffic.map(|traffic| kib(traffic.received_bytes))),
        ]
    };
    table(header, views.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;
    use mvm_core::net::Traffic;
    use mvm_core::outdated::SpecPart;
    use mvm_core::vmm::DiskIo;
    use std::collections::BTreeMap;

    const NOW: u64 = 1_000_000_000;

    fn failing() -> InstanceView {
        InstanceView {
            state: State::Failed,
            waiting: Some(Waiting::Backoff {
                failures: 2,
                short_runs: 0,
                until_unix_ms: NOW + 2_000,
            }),
            last_death: Some(Death {
                cause: Cause::GuestPanic,
                at_unix_ms: NOW - 61_000,
                exit: Some(VmExit { process: ProcessEnd::Exited { code: 0 }, reason: None }.into()),
                console_tail: vec!["Kernel panic - not syncing".into()],
            }),
            address: None,
            ..samples::instance("demo/hello/i-00000002")
        }
    }

    #[test]
    fn a_list_tells_state_address_and_uptime() {
        let running = InstanceView {
            running_since_unix_ms: Some(NOW - 65_000),
            boots: 3,
            ..samples::instance("demo/hello/i-00000001")
        };
        let stopping = InstanceView {
            activity: Some("stopping".into()),
            ..samples::instance("a/b/i-00000003")
        };
        let full = |view: InstanceView| InstanceView { lacks_space: true, ..view };
        assert_eq!(state(&full(running.clone()), NOW), "running (host disk full)");
        assert_eq!(state(&full(stopping.clone()), NOW), "running (stopping, host disk full)");
        let text = list(&[running, failing(), stopping], NOW);
        let expected = "\
INSTANCE                STATE                  ADDRESS      VCPUS   MEM       UPTIME   RESTARTS
demo/hello/i-00000001   running                10.240.0.3   1       256 MiB   1m 5s    2
demo/hello/i-00000002   failed (retry in 2s)   -            1       256 MiB   -        0
a/b/i-00000003          running (stopping)     10.240.0.3   1       256 MiB   -        0";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_is_outdated_is_a_column_of_its_own_if_anything_is() {
        let new = samples::instance("demo/hello/i-00000001");
        assert_eq!(outdated_hint(std::slice::from_ref(&new)), None);
        let old = InstanceView {
            outdated: vec![SpecPart::Image, SpecPart::MemMib],
            ..samples::instance("demo/hello/i-00000002")
        };
        let text = list(&[new, old.clone()], NOW);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].ends_with("RESTARTS   OUTDATED"), "{text}");
        assert!(lines[1].ends_with("0          -"), "{text}");
        assert!(lines[2].ends_with("0          image, mem_mib"), "{text}");
        assert!(info(&old, NOW).contains("image, mem_mib (`mvm pool info demo/hello`"));
        let hint = outdated_hint(std::slice::from_ref(&old)).unwrap();
        assert!(hint.starts_with("1 instance differs from its pool's spec: `mvm pool info demo/"));
        assert!(outdated_hint(&[old.clone(), old]).unwrap().starts_with("2 instances differ"));
    }

    #[test]
    fn why_explains_wish_wait_end_and_console() {
        let view = WhyView {
            instance: failing(),
            summary: "its guest keeps panicking".into(),
            output_tail: vec![],
            activity: None,
            console_tail: vec![],
        };
        let expected = "\
demo/hello/i-00000002 is failed (retry in 2s): its guest keeps panicking.

Desired state: running.
It is not there yet: failed 2 times in a row, tried again in 2s.

Its last run ended 1m 1s ago (1970-01-12 13:45:39 UTC): guest kernel panic; the VMM exited with code 0.

The last lines of its console:
  | Kernel panic - not syncing
";
        assert_eq!(why(&view, NOW), expected);
    }

    #[test]
    fn a_main_process_that_failed_speaks_for_itself() {
        let exited = |cause| InstanceView {
            waiting: None,
            exit_code: Some(3),
            last_death: Some(Death {
                cause,
                at_unix_ms: NOW,
                exit: None,
                console_tail: vec!["reboot: Power down".into()],
            }),
            ..failing()
        };
        let why = |cause| {
            let output_tail = vec!["no configuration".into()];
            let instance = exited(cause);
            why(
                &WhyView {
                    instance,
                    summary: String::new(),
                    activity: None,
                    output_tail,
                    console_tail: vec![],
                },
                NOW,
            )
        };
        let text = why(Cause::Exited { code: 3 });
        assert!(text.starts_with("demo/hello/i-00000002 is failed (exit 3): "), "{text}");
        let words = "\nThe last lines that its main process wrote:\n  | no configuration\n";
        assert!(text.ends_with(words), "{text}");
        let text = why(Cause::GuestOom);
        assert!(text.contains(words) && text.contains("  | reboot: Power down\n"), "{text}");
    }

    #[test]
    fn why_shows_no_boot_messages_of_what_ended_in_order() {
        let why = |state, cause, process| {
            let exit = Some(VmExit { process, reason: None });
            let console_tail = vec!["Run /init as init process".to_owned()];
            let last_death =
                Some(Death { cause, at_unix_ms: NOW, exit: exit.map(Into::into), console_tail });
            let instance = InstanceView { state, waiting: None, last_death, ..failing() };
            let (summary, console_tail) = (String::new(), vec![]);
            let output_tail = vec![];
            let view = WhyView { instance, summary, activity: None, output_tail, console_tail };
            super::why(&view, NOW)
        };
        let in_order = ProcessEnd::Exited { code: 0 };
        for cause in [Cause::Operator, Cause::Exited { code: 0 }] {
            for state in [State::Stopped, State::Running] {
                let text = why(state, cause.clone(), in_order);
                assert!(text.ends_with("--source console`.\n"), "{text}");
                assert!(!text.contains("/init"), "{text}");
            }
        }
        for (cause, process) in [
            (Cause::Operator, ProcessEnd::Signaled { signal: 9 }),
            (Cause::GuestShutdown, in_order),
            (Cause::Exited { code: 1 }, in_order),
        ] {
            assert!(
                why(State::Stopped, cause, process).contains("  | Run /init as init process\n")
            );
        }
    }

    #[test]
    fn an_ended_main_processs_exit_code_is_part_of_the_state() {
        let with = |state, waiting, activity: Option<&str>| {
            let activity = activity.map(str::to_owned);
            let exit_code = Some(3);
            super::state(&InstanceView { state, waiting, activity, exit_code, ..failing() }, NOW)
        };
        let backoff = Waiting::Backoff { failures: 1, short_runs: 0, until_unix_ms: NOW + 2_000 };
        assert_eq!(with(State::Failed, Some(backoff), None), "failed (exit 3, retry in 2s)");
        assert_eq!(with(State::Stopped, None, None), "stopped (exit 3)");
        // It still ends; the code is not that of what runs.
        assert_eq!(with(State::Running, None, Some("stopping")), "running (stopping)");
    }

    #[test]
    fn stats_do_without_a_guest_that_does_not_answer() {
        let silent = StatsView {
            path: "demo/hello/i-00000001".parse().unwrap(),
            cpu_ms: 1_250,
            host_rss_kib: 2048,
            host_disk_kib: 512,
            disk_read_kib: 100,
            disk_written_kib: 3 << 10,
            disk_io: Some(DiskIo { reads: 12, writes: 3, throttled: Some(4), ..DiskIo::default() }),
            vmm_counters: BTreeMap::new(),
            traffic: Some(Traffic { sent_bytes: 5 << 20, received_bytes: 7 << 10 }),
            activity: None,
            guest: None,
            guest_error: Some("no answer".into()),
        };
        let guest = mvm_core::guest::Health {
            mem_total_kib: 4096,
            mem_available_kib: 1024,
            load: [0.5, 0.0, 0.0],
            ..Default::default()
        };
        let views = [silent.clone(), StatsView { guest: Some(guest), ..silent }];
        let text = stats(&views);
        let lines: Vec<&str> = text.lines().collect();
        let cells = |line: &str| -> Vec<String> {
            line.split("   ").map(str::trim).filter(|c| !c.is_empty()).map(str::to_owned).collect()
        };
        assert_eq!(cells(lines[1])[1..5], ["1.2s", "2M", "512K", "-"]);
        assert_eq!(cells(lines[2])[4], "3M/4M");
        let silent = StatsView { guest: None, ..views[0].clone() };
        let text =
            io_stats(&[silent.clone(), StatsView { traffic: None, disk_io: None, ..silent }]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(cells(lines[1])[1..], ["100K", "3M", "12/3", "4", "5M", "7K"]);
        assert_eq!(cells(lines[2])[3..], ["-", "-", "-", "-"]);
    }

    #[test]
    fn tables_of_ordinary_instances_fit_a_hundred_columns() {
        let guest = mvm_core::guest::Health {
            mem_total_kib: 1023 * 1024 + 900,
            mem_available_kib: 900 * 1024 + 900,
            disk_total_kib: 10 * 1024 * 1024 - 100_000,
            disk_free_kib: 9 * 1024 * 1024,
            load: [12.34, 0.0, 0.0],
            oom_kills: 2,
            ..Default::default()
        };
        let busy = StatsView {
            path: "demo/worker/i-00000001".parse().unwrap(),
            cpu_ms: 12_345_678,
            host_rss_kib: 234_567,
            host_disk_kib: 45_678_901,
            disk_read_kib: 0,
            disk_written_kib: 0,
            disk_io: None,
            vmm_counters: BTreeMap::new(),
            traffic: None,
            activity: None,
            guest: Some(guest),
            guest_error: None,
        };
        let stats = stats(std::slice::from_ref(&busy));
        let io = io_stats(&[StatsView {
            disk_read_kib: 234_567_890,
            disk_written_kib: 123_456_789,
            disk_io: Some(DiskIo {
                reads: 12_345_678,
                writes: 2_345_678,
                throttled: Some(12_345),
                ..DiskIo::default()
            }),
            traffic: Some(Traffic { sent_bytes: 123 << 30, received_bytes: 234 << 30 }),
            ..busy
        }]);
        for line in list(&[failing()], NOW).lines().chain(stats.lines()).chain(io.lines()) {
            assert!(line.len() <= 100, "{} columns: {line}", line.len());
        }
    }

    #[test]
    fn info_shows_the_last_end() {
        let text = info(&failing(), NOW);
        assert!(text.contains("last end:            guest kernel panic, 1m 1s ago"), "{text}");
    }
}
