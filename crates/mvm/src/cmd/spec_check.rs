//! What a pool's spec is refused for, in the words of the command line: options instead of fields.

use mvm_core::spec::{PoolSpec, SpecError};

use crate::error::{Error, Result};
use crate::units::Mib;

/// The fields of a document, and the options that set them.
const OPTIONS: [(&str, &str); 12] = [
    ("vcpus", "--vcpus"),
    ("mem_mib", "--mem"),
    ("disk_mib", "--disk"),
    ("boot_timeout_s", "--boot-timeout"),
    ("ready", "--ready"),
    ("net_mbit_s", "--net-rate"),
    ("disk_mib_s", "--disk-rate"),
    ("disk_ops_s", "--disk-ops"),
    ("warm_after_s", "--warm-after"),
    ("sleep_after_s", "--sleep-after"),
    ("min_running_s", "--min-running"),
    ("shm_mib", "--shm-size"),
];

/// Refuses a spec that makes no sense before anything is asked of an agent.
///
/// # Errors
/// Names the option that is wrong, and what it may be.
pub(crate) fn check(spec: &PoolSpec) -> Result<()> {
    spec.check().map_err(|error| Error::Usage {
        message: in_options(&error),
        hint: "see the command's --help".to_owned(),
    })
}

fn in_options(error: &SpecError) -> String {
    let text = match error {
        SpecError::Range { field, value, expected } if field.ends_with("_mib") => {
            format!("{field} is {}, but must be {}", size(value), in_sizes(expected))
        }
        SpecError::Rates(error) => error.to_string(),
        SpecError::SleepPolicy(error) => error.to_string(),
        other => other.to_string(),
    };
    with_options(&text)
}

/// The text with the fields of a document replaced by the options of the command line.
pub(crate) fn with_options(text: &str) -> String {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut words = String::new();
    for piece in text.split_inclusive(|c| !is_name(c)) {
        let word = piece.trim_end_matches(|c| !is_name(c));
        match OPTIONS.iter().find(|(field, _)| *field == word) {
            Some((_, option)) => {
                words.push_str(option);
                words.push_str(&piece[word.len()..]);
            }
            None => words.push_str(piece),
        }
    }
    words
}

fn size(mib: &str) -> String {
    mib.parse().map_or_else(|_| mib.to_owned(), |mib| Mib(mib).to_string())
}

fn in_sizes(expected: &str) -> String {
    expected.split(' ').map(size).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use mvm_core::rates::Rates;
    use mvm_core::sleep_policy::SleepPolicy;

    use super::*;

    #[test]
    fn what_is_wrong_is_named_by_the_option_that_was_typed() {
        let spec = PoolSpec::default;
        let rates = Rates { disk_mib_s: Some(0), ..Rates::default() };
        let sleep_policy = SleepPolicy { warm_after_s: Some(0), ..SleepPolicy::default() };
        for (spec, expected) in [
            (PoolSpec { mem_mib: 64, ..spec() }, "--mem is 64M, but must be at least 96M"),
            (PoolSpec { mem_mib: 4000 << 20, ..spec() }, "--mem is 4000T, but must be at most 4T"),
            (PoolSpec { disk_mib: 1, ..spec() }, "--disk is 1M, but must be at least 16M"),
            (PoolSpec { vcpus: 0, ..spec() }, "--vcpus is 0, but must be 1 to 32"),
            (PoolSpec { rates, ..spec() }, "--disk-rate is 0, but must be 1 to 100000"),
            (
                PoolSpec { sleep_policy, ..spec() },
                "--warm-after is 0, but must be at least 1 second",
            ),
        ] {
            assert_eq!(check(&spec).unwrap_err().to_string(), expected);
        }
        assert!(check(&spec()).is_ok());
    }
}
