//! Why a guest ended, out of the last lines that its kernel wrote on the console.
//!
//! Firecracker has neither a power switch nor a port for panics: every end is a reset. A guest
//! agent that powers off says so first, in the words that a kernel with a switch would use.

use mvm_core::guest::POWER_OFF_WORDS;
use mvm_core::vmm::ShutdownReason;

use crate::console;
use crate::state_dir::InstanceDir;

/// Lines of the console in which the reason is looked for: a panic's own report is in between.
const LINES: usize = 200;

/// What the console of this directory says.
pub(super) fn of(dir: &InstanceDir) -> Option<ShutdownReason> {
    let path = dir.console_log();
    match console::tail(&path, LINES) {
        Ok(lines) => in_lines(&lines),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot read a console");
            None
        }
    }
}

fn in_lines(lines: &[String]) -> Option<ShutdownReason> {
    let says = |words: &str| lines.iter().any(|line| is_kernel_line(line, words));
    if says("Kernel panic - not syncing") {
        // A panic is followed by the reset that it causes.
        return Some(ShutdownReason::GuestPanic);
    }
    if says(POWER_OFF_WORDS) {
        return Some(ShutdownReason::GuestShutdown);
    }
    says("reboot: Restarting system").then_some(ShutdownReason::GuestReset)
}

/// Whether the words begin a line of the kernel's log: behind its time, if there is one.
fn is_kernel_line(line: &str, words: &str) -> bool {
    let text = match line.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((_time, text)) => text,
        None => line,
    };
    text.starts_with(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(console: &str) -> Option<ShutdownReason> {
        let dir = tempfile::tempdir().unwrap();
        let dir = InstanceDir::from(dir.path());
        std::fs::write(dir.console_log(), console).unwrap();
        of(&dir)
    }

    #[test]
    fn each_end_is_told_by_the_kernel_s_last_lines() {
        let reset = "[    3.1] reboot: Restarting system\n[    3.1] reboot: machine restart\n";
        assert_eq!(reason(reset), Some(ShutdownReason::GuestReset));
        let off = format!("[    3.0] {POWER_OFF_WORDS}\n{reset}");
        assert_eq!(reason(&off), Some(ShutdownReason::GuestShutdown));
        let panic = format!(
            "[    2.0] Kernel panic - not syncing: sysrq\n{}[    2.9] Rebooting\n{reset}",
            "[    2.0]  trace\n".repeat(60)
        );
        assert_eq!(reason(&panic), Some(ShutdownReason::GuestPanic));
        assert_eq!(reason("[    1.0] Linux version 6.1\nlogin: "), None);
        assert_eq!(of(&"/no/such/directory".into()), None);
    }

    #[test]
    fn a_program_that_prints_a_kernel_s_words_within_a_line_is_not_believed() {
        assert_eq!(reason("app: reboot: Restarting system\n"), None);
    }
}
