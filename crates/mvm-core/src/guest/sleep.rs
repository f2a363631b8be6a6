//! Sleep and wake as the guest takes part in them: its programs' hooks before and after.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ExitStatus, GuestMessage, MAX_BODY};

/// Most hooks that are run for one event.
pub const MOST_HOOKS: usize = 64;
/// Most that is kept of a hook's output, in bytes.
pub const LONGEST_HOOK_OUTPUT: usize = 1024;

/// Prepares a guest for its sleep: runs its hooks, then writes what its filesystems hold back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SleepRequest {
    /// How long all hooks together may take, in milliseconds.
    pub hooks_ms: u64,
}

/// Tells a guest that it was asleep, after it was configured again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WakeRequest {
    /// How long all hooks together may take, in milliseconds.
    pub hooks_ms: u64,
    /// What woke it.
    pub reason: WakeReason,
}

/// How a guest came to run again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WakeReason {
    /// Its processors were held for a while; nothing else changed.
    Resumed,
    /// It was restored from its own snapshot.
    Restored,
    /// It was restored from another instance's snapshot, and has another identity since.
    Forked,
    /// A reason of a newer peer.
    #[default]
    #[serde(other)]
    Unknown,
}

impl fmt::Display for WakeReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Resumed => "resumed",
            Self::Restored => "restored",
            Self::Forked => "forked",
            Self::Unknown => "unknown",
        })
    }
}

/// What became of the hooks of one event.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HookReport {
    /// Those that were run, in this order.
    pub runs: Vec<HookRun>,
    /// The names of those that were not: the time was over, there are too many, or a name is
    /// not text.
    pub skipped: Vec<String>,
}

/// One hook that was run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookRun {
    /// The file's name.
    pub name: String,
    /// How it ended; one that was cut off by the time limit has timed out, and one that cannot be
    /// executed has exited with 126 or 127, as a shell would say.
    pub status: ExitStatus,
    /// How long it ran, in milliseconds.
    #[serde(default)]
    pub took_ms: u64,
    /// The end of what it wrote on standard output and error.
    #[serde(default)]
    pub output: String,
}

impl HookRun {
    /// What a report holds of the bytes that a hook wrote last. `is_whole` tells whether there were
    /// no others before.
    pub fn output_of(bytes: &[u8], is_whole: bool) -> String {
        let is_inside = |byte: &&u8| !is_whole && **byte & 0b1100_0000 == 0b1000_0000;
        let cut = bytes.iter().take(3).take_while(is_inside).count();
        let mut text = String::from_utf8_lossy(&bytes[cut..]).into_owned();
        keep_end(&mut text, LONGEST_HOOK_OUTPUT);
        text
    }

    /// Whether the hook did what it was made for.
    pub fn is_success(&self) -> bool {
        self.status == ExitStatus::Exited { code: 0 }
    }
}

impl HookReport {
    /// Shortens outputs until the report fits into a frame. Those of hooks that went well go
    /// first.
    #[must_use]
    pub fn fitted(mut self) -> Self {
        let mut longest = LONGEST_HOOK_OUTPUT;
        while longest > 0 && !self.fits() {
            longest /= 2;
            for goes_first in [true, false] {
                let shortened = self.runs.iter_mut().filter(|run| run.is_success() == goes_first);
                shortened.for_each(|run| keep_end(&mut run.output, longest));
                if self.fits() {
                    break;
                }
            }
        }
        self
    }

    fn fits(&self) -> bool {
        let message = GuestMessage::Hooks(self.clone());
        serde_json::to_vec(&message).is_ok_and(|body| body.len() <= MAX_BODY as usize)
    }
}

/// Drops a text's beginning, so that at most so many bytes are left.
fn keep_end(text: &mut String, longest: usize) {
    let mut from = text.len().saturating_sub(longest);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text.drain(..from);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::HostMessage;

    fn run(code: i32, output: &str) -> HookRun {
        let status = ExitStatus::Exited { code };
        HookRun { name: "\"".repeat(255), status, took_ms: u64::MAX, output: output.into() }
    }

    #[test]
    fn the_largest_report_fits_into_a_frame_and_failures_are_told_best() {
        let loud = "\u{1}".repeat(LONGEST_HOOK_OUTPUT);
        let mut runs = vec![run(0, &loud); MOST_HOOKS];
        runs[40] = run(3, "what went wrong");
        let report = HookReport { runs, skipped: vec![] }.fitted();
        assert!(report.fits());
        assert_eq!(report.runs[40].output, "what went wrong");
        assert!(report.runs[0].output.len() < LONGEST_HOOK_OUTPUT);

        let nameless = vec!["\u{fffd}".repeat(255); MOST_HOOKS];
        assert!(HookReport { runs: vec![], skipped: nameless }.fits());
        let all_fail = HookReport { runs: vec![run(1, &loud); MOST_HOOKS], skipped: vec![] };
        assert!(all_fail.fitted().fits());
    }

    #[test]
    fn a_report_that_fits_is_left_alone_and_text_is_cut_between_characters() {
        let report = HookReport { runs: vec![run(0, "fine")], skipped: vec!["b".into()] };
        assert_eq!(report.clone().fitted(), report);
        let mut text = "aéé".to_owned();
        keep_end(&mut text, 3);
        assert_eq!(text, "é");
        assert_eq!(HookRun::output_of(&"é!".as_bytes()[1..], false), "!");
        assert_eq!(HookRun::output_of(b"\xa9!", true), "\u{fffd}!");
        let noise = HookRun::output_of(&[0xff; LONGEST_HOOK_OUTPUT], true);
        assert!(noise.len() <= LONGEST_HOOK_OUTPUT && noise.starts_with('\u{fffd}'));
    }

    #[test]
    fn a_reason_of_a_newer_host_is_known_as_unknown() {
        let newer = r#"{"type":"woken","reason":"teleported","hooks_ms":5}"#;
        let HostMessage::Woken(request) = serde_json::from_str(newer).unwrap() else { panic!() };
        assert_eq!(request, WakeRequest { hooks_ms: 5, reason: WakeReason::Unknown });
        assert_eq!(WakeReason::Forked.to_string(), "forked");
    }
}
