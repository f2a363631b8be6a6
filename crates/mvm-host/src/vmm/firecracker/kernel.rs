//! The uncompressed kernel that Firecracker boots, taken out of a distribution's `vmlinuz`.
//!
//! It is kept beside the kernel that it was taken from, so that this is done once per kernel.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::super::VmmError;

/// Added to the name of the kernel that it was taken from.
const SUFFIX: &str = ".elf";
const ELF: &[u8] = b"\x7fELF";
/// The legacy format of LZ4, in which the kernel's own build packs it.
const LZ4_LEGACY: &[u8] = b"\x02\x21\x4c\x18";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
const GZIP: &[u8] = b"\x1f\x8b";
/// The size of a block of that format, uncompressed.
const LZ4_BLOCK: usize = 8 << 20;
/// No kernel is larger, in bytes.
const KERNEL_LIMIT: u64 = 512 << 20;

/// The path of the uncompressed kernel, which is made first if need be.
///
/// # Errors
/// The kernel cannot be read, or is packed in a way that is not known.
pub(super) fn ensure_uncompressed(kernel: &Path) -> Result<PathBuf, VmmError> {
    let work = || -> io::Result<PathBuf> {
        let mut head = Vec::new();
        File::open(kernel)?.take(4).read_to_end(&mut head)?;
        if head == ELF {
            return Ok(kernel.to_owned());
        }
        let mut name = kernel.file_name().unwrap_or_default().to_owned();
        name.push(SUFFIX);
        let ready = kernel.with_file_name(name);
        if is_current(&ready, kernel) {
            return Ok(ready);
        }
        let content = uncompressed(&fs::read(kernel)?)?;
        let dir = kernel.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new().prefix(".vmlinux-").tempfile_in(dir)?;
        file.write_all(&content)?;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
        file.as_file().sync_all()?;
        file.persist(&ready).map_err(|error| error.error)?;
        Ok(ready)
    };
    work().map_err(|source| VmmError::File { path: kernel.to_owned(), source })
}

/// Whether it was made from the kernel as it is now.
fn is_current(ready: &Path, kernel: &Path) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    match (modified(ready), modified(kernel)) {
        (Some(ready), Some(kernel)) => ready >= kernel,
        _ => false,
    }
}

/// Takes the kernel out of a bzImage.
fn uncompressed(image: &[u8]) -> io::Result<Vec<u8>> {
    let payload =
        payload(image).ok_or_else(|| invalid("it is neither an ELF file nor a bzImage"))?;
    let mut kernel = Vec::new();
    match payload {
        _ if payload.starts_with(LZ4_LEGACY) => kernel = lz4(&payload[LZ4_LEGACY.len()..])?,
        _ if payload.starts_with(ZSTD) => {
            let mut decoder = ruzstd::decoding::StreamingDecoder::new(payload)
                .map_err(|error| invalid(&error.to_string()))?;
            (&mut decoder).take(KERNEL_LIMIT).read_to_end(&mut kernel)?;
        }
        _ if payload.starts_with(GZIP) => {
            flate2::read::GzDecoder::new(payload).take(KERNEL_LIMIT).read_to_end(&mut kernel)?;
        }
        _ => return Err(invalid("it is packed neither with lz4, zstd nor gzip")),
    }
    if !kernel.starts_with(ELF) {
        return Err(invalid("what is packed in it is no ELF file"));
    }
    Ok(kernel)
}

/// Linux/x86 boot protocol 2.08: the packed kernel lies `payload_offset` bytes behind the
/// real-mode code of `setup_sects` sectors and the boot sector.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let number = |at: usize| -> Option<usize> {
        usize::try_from(u32::from_le_bytes(*image.get(at..)?.first_chunk()?)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let sectors = match image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(*sectors),
    };
    let begin = ((sectors + 1) * 512).checked_add(number(0x248)?)?;
    image.get(begin..begin.checked_add(number(0x24c)?)?)
}

/// Blocks that each begin with their packed size. The build adds the whole size behind the last.
fn lz4(mut packed: &[u8]) -> io::Result<Vec<u8>> {
    let mut kernel = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    while let Some((size, rest)) = packed.split_first_chunk::<4>() {
        if rest.is_empty() {
            break;
        }
        let size = usize::try_from(u32::from_le_bytes(*size)).map_err(io::Error::other)?;
        let data = rest.get(..size).ok_or_else(|| invalid("it is cut short"))?;
        let len = lz4_flex::block::decompress_into(data, &mut block)
            .map_err(|error| invalid(&error.to_string()))?;
        kernel.extend_from_slice(&block[..len]);
        if kernel.len() as u64 > KERNEL_LIMIT {
            return Err(invalid("it is larger than any kernel"));
        }
        packed = &rest[size..];
    }
    Ok(kernel)
}

fn invalid(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> Vec<u8> {
        let mut kernel = ELF.to_vec();
        kernel.extend((0..LZ4_BLOCK + 1000).map(|at| (at / 64) as u8));
        kernel
    }

    fn bz_image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 512 * 3 + 32];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&32u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what follows");
        image
    }

    fn lz4_packed(kernel: &[u8]) -> Vec<u8> {
        let mut packed = LZ4_LEGACY.to_vec();
        for block in kernel.chunks(LZ4_BLOCK) {
            let block = lz4_flex::block::compress(block);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        packed.extend((kernel.len() as u32).to_le_bytes());
        packed
    }

    fn gzip_packed(kernel: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(kernel).unwrap();
        [encoder.finish().unwrap(), (kernel.len() as u32).to_le_bytes().to_vec()].concat()
    }

    #[test]
    fn a_packed_kernel_is_taken_out_once_and_again_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinuz");
        for packed in [lz4_packed(&kernel()), gzip_packed(&kernel())] {
            fs::write(&path, bz_image(&packed)).unwrap();
            let _ = fs::remove_file(dir.path().join("vmlinuz.elf"));
            let elf = ensure_uncompressed(&path).unwrap();
            assert_eq!(elf, dir.path().join("vmlinuz.elf"));
            assert!(fs::read(&elf).unwrap() == kernel(), "another content");
            assert_eq!(fs::metadata(&elf).unwrap().permissions().mode() & 0o777, 0o644);
            let made = fs::metadata(&elf).unwrap().modified().unwrap();
            ensure_uncompressed(&path).unwrap();
            assert_eq!(fs::metadata(&elf).unwrap().modified().unwrap(), made, "made twice");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn an_uncompressed_kernel_is_used_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        fs::write(&path, kernel()).unwrap();
        assert_eq!(ensure_uncompressed(&path).unwrap(), path);
    }

    #[test]
    fn what_cannot_be_unpacked_is_named_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinuz");
        let whole = lz4_packed(&kernel());
        for (content, why) in [
            (b"no kernel".to_vec(), "neither an ELF file nor a bzImage"),
            (bz_image(b"\xfd7zXZ\0"), "neither with lz4, zstd nor gzip"),
            (bz_image(&whole[..whole.len() / 2]), "cut short"),
            (bz_image(&lz4_packed(b"no ELF")), "no ELF file"),
        ] {
            fs::write(&path, content).unwrap();
            let VmmError::File { path: named, source } = ensure_uncompressed(&path).unwrap_err()
            else {
                panic!("another kind of error");
            };
            assert_eq!(named, path);
            assert!(source.to_string().contains(why), "{source}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
