//! Reads the `.modinfo` section of a kernel module: the names of the modules that it needs.
//!
//! A distribution writes `modules.dep` only when a kernel is installed, so the modules themselves
//! are asked.

/// What a module says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ModInfo {
    /// Modules whose symbols it uses.
    pub(crate) depends: Vec<String>,
    /// Modules or aliases that it wants loaded before it.
    pub(crate) pre: Vec<String>,
    /// Modules or aliases that it wants loaded after it.
    pub(crate) post: Vec<String>,
    /// Other names that it answers to.
    pub(crate) aliases: Vec<String>,
}

/// A module's name as the kernel spells it: file names use `-` and `_` alike.
pub(crate) fn module_name(text: &str) -> String {
    text.replace('-', "_")
}

impl ModInfo {
    /// Parses a module, an uncompressed relocatable ELF file.
    pub(crate) fn parse(elf: &[u8]) -> Result<Self, String> {
        let section = elf_section(elf, b".modinfo")?;
        Ok(Self::from_section(&String::from_utf8_lossy(section)))
    }

    fn from_section(text: &str) -> Self {
        let mut info = Self::default();
        let pairs = text.split('\0').filter_map(|field| field.split_once('='));
        for (key, value) in pairs {
            match key {
                "depends" => {
                    let names = value.split(',').filter(|name| !name.is_empty());
                    info.depends.extend(names.map(module_name));
                }
                "softdep" => info.add_softdep(value),
                "alias" => info.aliases.push(module_name(value)),
                _ => {}
            }
        }
        info
    }

    /// `pre: a b post: c`
    fn add_softdep(&mut self, value: &str) {
        let mut list = None;
        for word in value.split_whitespace() {
            match word {
                "pre:" => list = Some(&mut self.pre),
                "post:" => list = Some(&mut self.post),
                _ => {
                    if let Some(list) = &mut list {
                        list.push(module_name(word));
                    }
                }
            }
        }
    }
}

/// The content of a section of a little-endian 64-bit ELF file.
fn elf_section<'a>(elf: &'a [u8], wanted: &[u8]) -> Result<&'a [u8], String> {
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return Err("it is not a little-endian 64-bit ELF file".to_owned());
    }
    let truncated = || "it is truncated".to_owned();
    let table = read_u64(elf, 0x28).ok_or_else(truncated)?;
    let entry_size = read_u16(elf, 0x3a).ok_or_else(truncated)?;
    let count = read_u16(elf, 0x3c).ok_or_else(truncated)?;
    let names_index = read_u16(elf, 0x3e).ok_or_else(truncated)?;
    let header = |index: u16| {
        let at = usize::try_from(table)
            .ok()?
            .checked_add(usize::from(index).checked_mul(usize::from(entry_size))?)?;
        elf.get(at..at.checked_add(64)?)
    };
    let content = |header: &[u8]| {
        let start = usize::try_from(read_u64(header, 0x18)?).ok()?;
        let size = usize::try_from(read_u64(header, 0x20)?).ok()?;
        elf.get(start..start.checked_add(size)?)
    };
    let names = header(names_index).and_then(content).ok_or_else(truncated)?;
    for index in 0..count {
        let header = header(index).ok_or_else(truncated)?;
        let name_at = read_u32(header, 0).ok_or_else(truncated)? as usize;
        let name = names.get(name_at..).and_then(|rest| rest.split(|byte| *byte == 0).next());
        if name == Some(wanted) {
            return content(header).ok_or_else(truncated);
        }
    }
    Err(format!("it has no {} section", String::from_utf8_lossy(wanted)))
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|chunk| u16::from_le_bytes(*chunk))
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}

/// A minimal module for tests: an ELF file whose only content is a `.modinfo` section.
#[cfg(test)]
pub(crate) fn fake_module(modinfo: &str) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let mut elf = vec![0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf.extend(modinfo.as_bytes());
    elf.extend(names);
    let table = elf.len() as u64;
    let info_len = modinfo.len() as u64;
    let sections = [(0u32, 0, 0), (1, 64, info_len), (10, 64 + info_len, names.len() as u64)];
    for (name, start, size) in sections {
        let mut header = [0; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[0x18..0x20].copy_from_slice(&u64::to_le_bytes(start));
        header[0x20..0x28].copy_from_slice(&u64::to_le_bytes(size));
        elf.extend(header);
    }
    elf[0x28..0x30].copy_from_slice(&table.to_le_bytes());
    elf[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
    elf[0x3c..0x3e].copy_from_slice(&3u16.to_le_bytes());
    elf[0x3e..0x40].copy_from_slice(&2u16.to_le_bytes());
    elf
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "license=GPL\0softdep=pre: crypto-crc32c a post: late\0alias=fs-ext4\0\
                        depends=mbcache,jbd2,virtio-ring\0name=ext4\0softdep=post: later\0";

    #[test]
    fn dependencies_are_read_from_a_module() {
        let info = ModInfo::parse(&fake_module(INFO)).unwrap();
        assert_eq!(info.depends, ["mbcache", "jbd2", "virtio_ring"]);
        assert_eq!(info.pre, ["crypto_crc32c", "a"]);
        assert_eq!(info.post, ["late", "later"]);
        assert_eq!(info.aliases, ["fs_ext4"]);
    }

    #[test]
    fn an_empty_dependency_list_has_no_names() {
        let info = ModInfo::parse(&fake_module("depends=\0name=x\0")).unwrap();
        assert_eq!(info, ModInfo::default());
    }

    #[test]
    fn a_module_cut_anywhere_is_an_error_and_not_a_panic() {
        let elf = fake_module(INFO);
        for length in 0..elf.len() {
            assert!(ModInfo::parse(&elf[..length]).is_err(), "{length} bytes were accepted");
        }
    }
}
