//! What a pool sets in its guests' kernels: sysctls, limits of processes, and `/dev/shm`.
//!
//! It is checked here as far as it can be without a kernel. Whether a kernel has a sysctl, and takes
//! a value, only the guest can tell, and a start that fails for it names the sysctl.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

/// Most sysctls, and most limits, of one pool.
const ENTRIES_MAX: usize = 256;
/// Longest name of a sysctl, in bytes.
const NAME_MAX: usize = 256;
/// Longest value of a sysctl, in bytes: the kernel takes a page at most.
const VALUE_MAX: usize = 4095;
/// The limits that Linux has, by the names that people know, with their numbers.
const LIMITS: [(&str, u32); 16] = [
    ("cpu", 0),
    ("fsize", 1),
    ("data", 2),
    ("stack", 3),
    ("core", 4),
    ("rss", 5),
    ("nproc", 6),
    ("nofile", 7),
    ("memlock", 8),
    ("as", 9),
    ("locks", 10),
    ("sigpending", 11),
    ("msgqueue", 12),
    ("nice", 13),
    ("rtprio", 14),
    ("rttime", 15),
];
/// The kernel's highest number of open files (`fs.nr_open`), unless somebody raises it.
const NR_OPEN: u64 = 1024 * 1024;

/// What is set before any program of the image runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Values of the guest kernel's parameters, by name.
    #[serde(deserialize_with = "sysctls")]
    pub sysctl: BTreeMap<String, String>,
    /// Limits of each program that mvm starts in the guest, by name.
    pub ulimit: BTreeMap<String, Ulimit>,
    /// The size of `/dev/shm` in MiB; half of the guest's memory if absent.
    pub shm_mib: Option<u32>,
}

/// A limit that a program starts with, and the highest to which it may raise it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ulimit {
    /// The limit; `None` for none.
    pub soft: Option<u64>,
    /// The highest; `None` for none.
    pub hard: Option<u64>,
}

/// A setting that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// A name that is no sysctl's.
    #[error("`{name}` cannot name a sysctl: expected a name such as net.core.somaxconn")]
    SysctlName {
        /// What was given.
        name: String,
    },
    /// A value that no sysctl takes.
    #[error(
        "the value of sysctl {name} cannot be set: expected at most {VALUE_MAX} bytes in one line"
    )]
    SysctlValue {
        /// Whose.
        name: String,
    },
    /// A limit that Linux does not have.
    #[error("there is no ulimit `{name}`: expected one of {}", names())]
    UlimitName {
        /// What was given.
        name: String,
    },
    /// A soft limit over its hard limit.
    #[error("ulimit {name} is {value}, but its soft limit must not be over its hard limit")]
    UlimitOrder {
        /// Which.
        name: String,
        /// What was given.
        value: Ulimit,
    },
    /// More open files than a kernel allows.
    #[error("ulimit nofile is {value}, but must be at most {NR_OPEN}")]
    TooManyFiles {
        /// What was given.
        value: Ulimit,
    },
    /// `/dev/shm` of no size.
    #[error("shm_mib is 0, but must be at least 1")]
    NoShm,
    /// More than anybody needs.
    #[error("there are more than {ENTRIES_MAX} {what}s")]
    TooMany {
        /// Of what.
        what: &'static str,
    },
}

fn names() -> String {
    LIMITS.map(|(name, _)| name).join(", ")
}

impl Settings {
    /// Whether it leaves everything as it is.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Adds what `change` sets.
    pub fn merge(&mut self, change: &Self) {
        self.sysctl.extend(change.sysctl.clone());
        self.ulimit.extend(change.ulimit.clone());
        self.shm_mib = change.shm_mib.or(self.shm_mib);
    }

    /// Checks names and values.
    ///
    /// # Errors
    /// Names the first that makes no sense.
    pub fn check(&self) -> Result<(), SettingsError> {
        for (what, count) in [("sysctl", self.sysctl.len()), ("ulimit", self.ulimit.len())] {
            if count > ENTRIES_MAX {
                return Err(SettingsError::TooMany { what });
            }
        }
        for (name, value) in &self.sysctl {
            if sysctl_file(name).is_none() {
                return Err(SettingsError::SysctlName { name: name.clone() });
            }
            if value.len() > VALUE_MAX || value.chars().any(|c| c.is_control() && c != '\t') {
                return Err(SettingsError::SysctlValue { name: name.clone() });
            }
        }
        for (name, &value) in &self.ulimit {
            if limit_number(name).is_none() {
                return Err(SettingsError::UlimitName { name: name.clone() });
            }
            let Ulimit { soft, hard } = value;
            if soft.unwrap_or(u64::MAX) > hard.unwrap_or(u64::MAX) {
                return Err(SettingsError::UlimitOrder { name: name.clone(), value });
            }
            if name == "nofile" && hard.is_none_or(|hard| hard > NR_OPEN) {
                return Err(SettingsError::TooManyFiles { value });
            }
        }
        match self.shm_mib {
            Some(0) => Err(SettingsError::NoShm),
            _ => Ok(()),
        }
    }
}

/// The file of a sysctl below `/proc/sys`. As with sysctl(8), a name whose first separator is a
/// slash has dots in its parts: `net/ipv4/conf/eth0.1/forwarding`.
pub fn sysctl_file(name: &str) -> Option<String> {
    let is_dotted = match (name.find('.'), name.find('/')) {
        (Some(dot), Some(slash)) => dot < slash,
        (_, slash) => slash.is_none(),
    };
    let swap = |c| match c {
        '.' if is_dotted => '/',
        '/' if is_dotted => '.',
        other => other,
    };
    let file: String = name.chars().map(swap).collect();
    let is_part = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-@:+".contains(&byte))
    };
    let is_file = name.len() <= NAME_MAX && file.contains('/') && file.split('/').all(is_part);
    is_file.then_some(file)
}

/// Reads sysctls as people write them: a value may be a number, and a name whose dots TOML takes for
/// tables (`net.core.somaxconn = 4096`) is put together again.
pub(crate) fn sysctls<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    let Part::Table(found) = Part::deserialize(from)? else {
        return Err(serde::de::Error::custom("sysctls are a table of names and values"));
    };
    Ok(found)
}

/// A sysctl's value, or those of all whose names begin in the same way.
enum Part {
    Value(String),
    Table(BTreeMap<String, String>),
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Part;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text or a number")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Part, E> {
                Ok(Part::Value(text.to_owned()))
            }
            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Part, E> {
                Ok(Part::Value(number.to_string()))
            }
            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Part, E> {
                Ok(Part::Value(number.to_string()))
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Part, A::Error> {
                let mut all = BTreeMap::new();
                while let Some((name, part)) = map.next_entry::<String, Part>()? {
                    match part {
                        Part::Value(value) => drop(all.insert(name, value)),
                        Part::Table(below) if below.is_empty() => {
                            let text = format!("sysctl `{name}` has no value");
                            return Err(serde::de::Error::custom(text));
                        }
                        Part::Table(below) => all.extend(
                            below
                                .into_iter()
                                .map(|(rest, value)| (format!("{name}.{rest}"), value)),
                        ),
                    }
                }
                Ok(Part::Table(all))
            }
        }
        from.deserialize_any(Visitor)
    }
}

/// The number of a limit on Linux.
pub fn limit_number(name: &str) -> Option<u32> {
    LIMITS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

impl FromStr for Ulimit {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is not a limit: expected a number or unlimited, or two of them as SOFT:HARD"
            )
        };
        let one = |word: &str| match word {
            "unlimited" | "infinity" | "-1" => Ok(None),
            number if number.bytes().all(|byte| byte.is_ascii_digit()) => {
                number.parse().map(Some).map_err(|_| wrong())
            }
            _ => Err(wrong()),
        };
        let (soft, hard) = text.split_once(':').unwrap_or((text, text));
        Ok(Self { soft: one(soft)?, hard: one(hard)? })
    }
}

impl fmt::Display for Ulimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |limit: Option<u64>| match limit {
            Some(limit) => limit.to_string(),
            None => "unlimited".to_owned(),
        };
        match self.soft == self.hard {
            true => f.pad(&word(self.soft)),
            false => f.pad(&format!("{}:{}", word(self.soft), word(self.hard))),
        }
    }
}

impl Serialize for Ulimit {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ulimit {
    /// Takes a number, too: it is both limits.
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Limits;
        impl serde::de::Visitor<'_> for Limits {
            type Value = Ulimit;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, or text such as 1024:2048")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Ulimit, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Ulimit, E> {
                Ok(Ulimit { soft: Some(number), hard: Some(number) })
            }
            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Ulimit, E> {
                self.visit_str(&number.to_string())
            }
        }
        from.deserialize_any(Limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysctl(name: &str, value: &str) -> Settings {
        let sysctl = [(name.to_owned(), value.to_owned())].into();
        Settings { sysctl, ..Settings::default() }
    }

    fn ulimit(name: &str, value: &str) -> Settings {
        let ulimit = [(name.to_owned(), value.parse().unwrap())].into();
        Settings { ulimit, ..Settings::default() }
    }

    #[test]
    fn a_sysctl_is_a_file_below_its_directory_and_nowhere_else() {
        for (name, file) in [
            ("vm.max_map_count", Some("vm/max_map_count")),
            ("net.ipv4.conf.eth0/1.forwarding", Some("net/ipv4/conf/eth0.1/forwarding")),
            ("net/ipv4/conf/eth0.1/forwarding", Some("net/ipv4/conf/eth0.1/forwarding")),
            ("kernel.shm_rmid_forced", Some("kernel/shm_rmid_forced")),
            ("vm", None),
            ("", None),
            (".vm.x", None),
            ("vm..x", None),
            ("../../etc/passwd", None),
            ("net/../../x", None),
            ("/etc/passwd", None),
            ("vm.a b", None),
            ("vm.a\nb", None),
            ("vm.é", None),
            ("vm/./x", None),
        ] {
            assert_eq!(sysctl_file(name).as_deref(), file, "{name:?}");
            assert_eq!(sysctl(name, "1").check().is_ok(), file.is_some(), "{name:?}");
        }
        assert!(sysctl("net.ipv4.ping_group_range", "0\t2147483647").check().is_ok());
        for value in ["a\nb", "a\0b", &"1".repeat(5000)] {
            let error = sysctl("vm.x", value).check().unwrap_err().to_string();
            assert!(error.contains("the value of sysctl vm.x"), "{error}");
        }
    }

    #[test]
    fn sysctls_are_read_as_people_write_them() {
        let text = r#"{"sysctl":{"vm.a":"1","net":{"core":{"b":2},"c":-3},"kernel.d":"4 5"}}"#;
        let settings: Settings = serde_json::from_str(text).unwrap();
        let found: Vec<String> =
            settings.sysctl.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(found, ["kernel.d=4 5", "net.c=-3", "net.core.b=2", "vm.a=1"]);
        assert!(serde_json::from_str::<Settings>(r#"{"sysctl":"vm.a=1"}"#).is_err());
        assert!(serde_json::from_str::<Settings>(r#"{"sysctl":{"vm.a":[1]}}"#).is_err());
        assert!(serde_json::from_str::<Settings>(r#"{"sysctl":{"vm.a":{}}}"#).is_err());
        assert!(serde_json::from_str::<Settings>(r#"{"sysctl":{}}"#).unwrap().is_default());
    }

    #[test]
    fn a_limit_is_one_number_or_two_and_survives_being_written() {
        for (text, soft, hard, written) in [
            ("1024:2048", Some(1024), Some(2048), "1024:2048"),
            ("1024", Some(1024), Some(1024), "1024"),
            ("-1", None, None, "unlimited"),
            ("0:unlimited", Some(0), None, "0:unlimited"),
        ] {
            let limit: Ulimit = text.parse().unwrap();
            assert_eq!((limit.soft, limit.hard, limit.to_string().as_str()), (soft, hard, written));
            let json = serde_json::to_string(&limit).unwrap();
            assert_eq!(serde_json::from_str::<Ulimit>(&json).unwrap(), limit);
        }
        assert_eq!(serde_json::from_str::<Ulimit>("65536").unwrap().hard, Some(65536));
        assert_eq!(serde_json::from_str::<Ulimit>("-1").unwrap().hard, None);
        for text in ["", ":", "1:", "a", "+1", "1:2:3", "-2", "99999999999999999999"] {
            assert!(text.parse::<Ulimit>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn limits_that_no_kernel_has_or_takes_are_named() {
        let error = |settings: Settings| settings.check().unwrap_err().to_string();
        assert!(
            error(ulimit("files", "1")).starts_with("there is no ulimit `files`: expected one")
        );
        assert!(error(ulimit("nproc", "2:1")).contains("nproc is 2:1"));
        assert!(error(ulimit("nproc", "unlimited:1")).contains("nproc is unlimited:1"));
        assert!(error(ulimit("nofile", "unlimited")).contains("at most 1048576"));
        assert!(error(Settings { shm_mib: Some(0), ..Settings::default() }).contains("shm_mib"));
        ulimit("memlock", "unlimited").check().unwrap();
        ulimit("nofile", "1024:1048576").check().unwrap();
    }
}
