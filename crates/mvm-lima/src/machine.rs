//! The Lima machine: where it is kept, and the template that it is made from.

use std::fmt;
use std::path::{Path, PathBuf};

const TEMPLATE: &str = include_str!("lima.yaml");
/// The oldest macOS with Apple's hypervisor framework as Lima uses it.
const VZ_MACOS: u32 = 13;
/// The oldest macOS, and the first generation of Apple's chips, that nest virtual machines.
const NESTING: (u32, u32) = (15, 3);

/// A processor architecture, as Lima names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arch {
    X86,
    Arm,
}

impl Arch {
    /// This computer's.
    pub(crate) fn here() -> Self {
        if cfg!(target_arch = "aarch64") { Self::Arm } else { Self::X86 }
    }

    /// What a Linux program is for, by its ELF header; `None` if it is no such program.
    pub(crate) fn of_program(header: &[u8]) -> Option<Self> {
        let machine = header.get(18..20)?;
        match (header.get(..4)? == b"\x7fELF", machine) {
            (true, [62, 0]) => Some(Self::X86),
            (true, [183, 0]) => Some(Self::Arm),
            _ => None,
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::X86 => "x86_64",
            Self::Arm => "aarch64",
        })
    }
}

/// What is known of this computer. What could not be told is taken for old.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Computer {
    pub(crate) arch: Arch,
    /// `ProductVersion`, such as `15.1`; `None` if this is no Mac.
    pub(crate) macos: Option<String>,
    /// The processor's name, such as `Apple M3 Pro`.
    pub(crate) chip: String,
}

/// The template of a machine for programs of this architecture.
pub(crate) fn template(computer: &Computer, program: Arch) -> String {
    let macos: u32 = computer.macos.as_deref().and_then(leading_number).unwrap_or(0);
    // Apple's hypervisor runs its own architecture alone; QEMU runs the other in software.
    let is_vz = macos >= VZ_MACOS && computer.arch == program;
    let chip = computer.chip.strip_prefix("Apple M").and_then(leading_number).unwrap_or(0);
    let nests = is_vz && macos >= NESTING.0 && chip >= NESTING.1;
    TEMPLATE
        .replace("{vm_type}", if is_vz { "vz" } else { "qemu" })
        .replace("{nested}", if nests { "true" } else { "false" })
        .replace("{arch}", &program.to_string())
}

fn leading_number(text: &str) -> Option<u32> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..digits].parse().ok()
}

/// Whether this can be a machine's name, and cannot be an option or a path.
pub(crate) fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Whether a machine of this name was made: Lima keeps each in a directory.
pub(crate) fn exists(name: &str) -> bool {
    let home = std::env::var_os("LIMA_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(std::env::home_dir()?.join(".lima")));
    home.is_some_and(|home| home.join(name).is_dir())
}

/// The directory in the machine in which a command runs: the present one, where the machine has it
/// too, which is the home directory and what is below.
pub(crate) fn workdir(here: Option<PathBuf>, home: Option<PathBuf>) -> PathBuf {
    match (here, home) {
        (Some(here), Some(home)) if here.starts_with(&home) => here,
        _ => Path::new("/").to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(arch: Arch, macos: &str, chip: &str) -> Computer {
        Computer { arch, macos: Some(macos.to_owned()), chip: chip.to_owned() }
    }

    fn choices(computer: &Computer, program: Arch) -> [bool; 2] {
        let text = template(computer, program);
        assert!(!text.contains('{'), "{text}");
        assert!(text.contains(&format!("\narch: {program}\n")), "{text}");
        ["vmType: vz", "nestedVirtualization: true"].map(|line| text.contains(line))
    }

    #[test]
    fn the_hypervisor_of_the_mac_is_used_where_it_can_be() {
        let intel = "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz";
        for (computer, program, expected) in [
            (mac(Arch::Arm, "15.1", "Apple M3 Pro"), Arch::Arm, [true, true]),
            (mac(Arch::Arm, "26.0", "Apple M4"), Arch::Arm, [true, true]),
            (mac(Arch::Arm, "14.6", "Apple M3"), Arch::Arm, [true, false]),
            (mac(Arch::Arm, "15.1", "Apple M2 Max"), Arch::Arm, [true, false]),
            (mac(Arch::Arm, "15.1", "Apple M3"), Arch::X86, [false, false]),
            (mac(Arch::X86, "13.0", intel), Arch::X86, [true, false]),
            (mac(Arch::X86, "12.7", intel), Arch::X86, [false, false]),
        ] {
            assert_eq!(choices(&computer, program), expected, "{computer:?} {program}");
        }
        let linux = Computer { arch: Arch::X86, macos: None, chip: String::new() };
        assert_eq!(choices(&linux, Arch::X86), [false, false]);
    }

    #[test]
    fn a_name_is_neither_an_option_nor_a_path() {
        assert!(["mvm", "lab-2", "a_b.c"].into_iter().all(is_name));
        assert!(!["", "-h", "--all", "..", "a/b", "a b", "ä"].into_iter().any(is_name));
    }

    #[test]
    fn a_program_for_linux_is_known_by_its_header() {
        let header = |machine: u8| [&b"\x7fELF\x02\x01\x01"[..], &[0; 11], &[machine, 0]].concat();
        assert_eq!(Arch::of_program(&header(62)), Some(Arch::X86));
        assert_eq!(Arch::of_program(&header(183)), Some(Arch::Arm));
        assert_eq!(Arch::of_program(&header(3)), None);
        assert_eq!(Arch::of_program(b"#!/bin/sh"), None);
        assert_eq!(Arch::of_program(&[0xcf, 0xfa, 0xed, 0xfe].repeat(8)), None, "a Mac's own");
    }

    #[test]
    fn a_command_runs_where_it_was_typed_if_the_machine_has_that() {
        let dir = |here: &str| workdir(Some(here.into()), Some("/Users/ada".into()));
        assert_eq!(dir("/Users/ada/src"), Path::new("/Users/ada/src"));
        assert_eq!(dir("/Users/adam"), Path::new("/"));
        assert_eq!(dir("/opt"), Path::new("/"));
        assert_eq!(workdir(None, None), Path::new("/"));
    }
}
