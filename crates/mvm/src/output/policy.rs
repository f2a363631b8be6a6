//! Sleep policies for people, what they did, and what instances are used for.

use mvm_core::sleep_policy::{Activity, Rest, Rested, SleepPolicy};

use crate::units::{Seconds, duration_text};

/// A policy in one line.
pub(crate) fn line(policy: &SleepPolicy) -> String {
    let SleepPolicy { warm_after_s, sleep_after_s, min_running_s, critical, .. } = policy;
    let time = |seconds: &u32| Seconds((*seconds).into());
    let steps: Vec<String> = [
        warm_after_s.as_ref().map(|after| format!("warm after {}", time(after))),
        sleep_after_s.as_ref().map(|after| format!("asleep after {}", time(after))),
    ]
    .into_iter()
    .flatten()
    .collect();
    let mut line = match (critical, steps.is_empty()) {
        (true, _) => "critical: never put to rest".to_owned(),
        (false, true) => "none: never put to rest".to_owned(),
        (false, false) => {
            format!("{} without use, runs at least {}", steps.join(", "), time(min_running_s))
        }
    };
    if policy.compress {
        line.push_str("; snapshots are compressed");
    }
    if policy.ignore_neighbours {
        line.push_str("; neighbours do not wake it");
    }
    line
}

/// How long an instance has been idle, in a narrow column.
pub(super) fn idle(activity: &Activity) -> String {
    match activity.idle_since_unix_ms {
        Some(since) => duration_text(activity.measured_unix_ms.saturating_sub(since)),
        None => "in use".to_owned(),
    }
}

/// What an instance is used for, in a sentence.
pub(super) fn usage(activity: &Activity, now: u64) -> String {
    match (activity.idle_since_unix_ms, activity.used_by) {
        (Some(since), _) => {
            format!("Nobody has used it for {}.", duration_text(now.saturating_sub(since)))
        }
        (None, Some(by)) => format!("It is in use: {by}."),
        (None, None) => "It is in use.".to_owned(),
    }
}

/// What the policy did, in a sentence.
pub(super) fn rested(rested: &Rested, now: u64) -> String {
    let at = duration_text(now.saturating_sub(rested.at_unix_ms));
    let done = match rested.rest {
        Rest::Warm => "stopped its vCPUs",
        Rest::Sleep => "put it to sleep",
    };
    format!("Its pool's sleep policy {done} {at} ago: {}.", rested.reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_one_line() {
        let none = SleepPolicy::default();
        assert_eq!(line(&none), "none: never put to rest");
        let some = SleepPolicy { sleep_after_s: Some(1800), ..none };
        assert_eq!(line(&some), "asleep after 30m without use, runs at least 30s");
        let both = SleepPolicy { warm_after_s: Some(90), min_running_s: 0, ..some };
        let expected = "warm after 90s, asleep after 30m without use, runs at least 0s";
        assert_eq!(line(&both), expected);
        let critical = SleepPolicy { critical: true, ..both };
        assert_eq!(line(&critical), "critical: never put to rest");
        let compress = SleepPolicy { compress: true, ..SleepPolicy::default() };
        assert_eq!(line(&compress), "none: never put to rest; snapshots are compressed");
    }
}
