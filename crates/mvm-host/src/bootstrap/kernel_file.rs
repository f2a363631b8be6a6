//! Tells whether a file is a kernel that a VMM can boot, and whether it is all there.

use std::path::Path;

use super::BootstrapError;

/// The formats of bootable kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFormat {
    /// The compressed kernel of x86 distributions.
    BzImage,
    /// An uncompressed ELF file, `vmlinux`.
    Elf,
    /// The flat image of 64-bit ARM.
    Arm64Image,
}

/// Checks a kernel file's content.
///
/// # Errors
/// It is none of the formats, or it is shorter than its own header says.
pub fn check_kernel(path: &Path, content: &[u8]) -> Result<KernelFormat, BootstrapError> {
    inspect(content).map_err(|problem| BootstrapError::BadKernel { path: path.to_owned(), problem })
}

fn inspect(content: &[u8]) -> Result<KernelFormat, String> {
    let (format, needed) = if content.get(0x202..0x206) == Some(b"HdrS") {
        (KernelFormat::BzImage, bz_image_len(content))
    } else if content.starts_with(b"\x7fELF") {
        (KernelFormat::Elf, elf_len(content)?)
    } else if content.get(0x38..0x3c) == Some(b"ARM\x64") {
        (KernelFormat::Arm64Image, Some(64))
    } else {
        return Err("expected a bzImage, an ELF file (vmlinux) or an arm64 Image".to_owned());
    };
    match needed {
        Some(needed) if content.len() as u64 >= needed => Ok(format),
        Some(needed) => Err(format!(
            "it is truncated: {} bytes, and its header says at least {needed}",
            content.len()
        )),
        None => Err("it is truncated within its header".to_owned()),
    }
}

/// Linux/x86 boot protocol: the real-mode code of `setup_sects` sectors behind the boot sector,
/// then `syssize` units of 16 bytes.
fn bz_image_len(content: &[u8]) -> Option<u64> {
    let sectors = match content.get(0x1f1)? {
        0 => 4,
        sectors => u64::from(*sectors),
    };
    let units = u32::from_le_bytes(*content.get(0x1f4..)?.first_chunk()?);
    // The last unit may be padded only in memory.
    Some((sectors + 1) * 512 + (u64::from(units) * 16).saturating_sub(15))
}

/// The end of the last segment that is loaded.
fn elf_len(content: &[u8]) -> Result<Option<u64>, String> {
    let (Some(b"\x02\x01"), Some(kind)) = (content.get(4..6), content.get(16..18)) else {
        return Err("it is not a little-endian 64-bit ELF file".to_owned());
    };
    // ET_EXEC, or ET_DYN for a relocatable kernel.
    if !matches!(kind, [2 | 3, 0]) {
        return Err("it is an ELF file, but not an executable one".to_owned());
    }
    Ok(last_segment_end(content))
}

fn last_segment_end(content: &[u8]) -> Option<u64> {
    let u64_at = |at: usize| Some(u64::from_le_bytes(*content.get(at..)?.first_chunk()?));
    let u16_at = |at: usize| Some(u16::from_le_bytes(*content.get(at..)?.first_chunk()?));
    let table = usize::try_from(u64_at(0x20)?).ok()?;
    let size = usize::from(u16_at(0x36)?);
    let mut end = 64;
    for index in 0..usize::from(u16_at(0x38)?) {
        let at = table.checked_add(index.checked_mul(size)?)?;
        end = end.max(u64_at(at.checked_add(8)?)?.checked_add(u64_at(at.checked_add(0x20)?)?)?);
    }
    Some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bz_image(payload: usize) -> Vec<u8> {
        let mut content = vec![0; 512 * 5 + payload];
        content[0x202..0x206].copy_from_slice(b"HdrS");
        content[0x1f1] = 4;
        let units = payload.div_ceil(16) as u32;
        content[0x1f4..0x1f8].copy_from_slice(&units.to_le_bytes());
        content
    }

    fn elf() -> Vec<u8> {
        let mut content = vec![0; 64 + 56 + 1000];
        content[..6].copy_from_slice(b"\x7fELF\x02\x01");
        content[16] = 2;
        content[0x20] = 64;
        content[0x36] = 56;
        content[0x38] = 1;
        content[64 + 8] = 120;
        content[64 + 0x20..64 + 0x22].copy_from_slice(&1000u16.to_le_bytes());
        content
    }

    #[test]
    fn whole_kernels_are_recognised() {
        assert_eq!(inspect(&bz_image(1000)), Ok(KernelFormat::BzImage));
        assert_eq!(inspect(&elf()), Ok(KernelFormat::Elf));
        let mut arm = vec![0; 64];
        arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
        assert_eq!(inspect(&arm), Ok(KernelFormat::Arm64Image));
    }

    #[test]
    fn truncated_kernels_are_refused() {
        for (whole, padding) in [(bz_image(4096), 15), (elf(), 0)] {
            for length in 0..whole.len() - padding {
                assert!(inspect(&whole[..length]).is_err(), "{length} bytes were accepted");
            }
        }
        let error = inspect(&elf()[..200]).unwrap_err();
        assert_eq!(error, "it is truncated: 200 bytes, and its header says at least 1120");
    }

    #[test]
    fn other_files_are_refused_by_name() {
        let error = check_kernel(Path::new("/boot/initrd.img"), b"070701").unwrap_err();
        assert!(
            error.to_string().starts_with("/boot/initrd.img is not a usable kernel"),
            "{error}"
        );
        let mut object = elf();
        object[16] = 1;
        assert!(inspect(&object).is_err());
    }
}
