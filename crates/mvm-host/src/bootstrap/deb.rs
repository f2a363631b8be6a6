//! Reads Debian packages: an `ar` archive whose `data.tar.*` member holds the files.
//!
//! It only hands out regular files and never writes anything itself.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use super::BootstrapError;

const AR_MAGIC: &[u8; 8] = b"!<arch>\n";
const AR_HEADER: usize = 60;

/// Calls `visit` with the relative path and the content of each regular file in the package.
pub(crate) fn for_each_file<E: From<BootstrapError>>(
    package: &Path,
    mut visit: impl FnMut(&Path, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let bad = |error: io::Error| BootstrapError::BadPackage {
        path: package.to_owned(),
        problem: error.to_string(),
    };
    let file = File::open(package).map_err(bad)?;
    let (name, data) = data_member(BufReader::new(file)).map_err(bad)?;
    let mut archive = tar::Archive::new(decompress(&name, data).map_err(bad)?);
    let mut content = Vec::new();
    for entry in archive.entries().map_err(bad)? {
        let mut entry = entry.map_err(bad)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = inside(&entry.path().map_err(bad)?).map_err(bad)?;
        content.clear();
        entry.read_to_end(&mut content).map_err(bad)?;
        if content.len() as u64 != entry.size() {
            return Err(bad(invalid("it is truncated")).into());
        }
        visit(&path, &content)?;
    }
    Ok(())
}

/// Finds the member `data.tar` or `data.tar.*` of an `ar` archive.
fn data_member<R: Read + Seek>(mut ar: R) -> io::Result<(String, io::Take<R>)> {
    let mut magic = [0; AR_MAGIC.len()];
    ar.read_exact(&mut magic)?;
    if &magic != AR_MAGIC {
        return Err(invalid("it does not start like an `ar` archive"));
    }
    loop {
        let mut header = [0; AR_HEADER];
        ar.read_exact(&mut header).map_err(|_| invalid("it has no `data.tar` member"))?;
        if header[58..] != *b"`\n" {
            return Err(invalid("a member's header is damaged"));
        }
        let text = |field: &[u8]| String::from_utf8_lossy(field).trim_end().to_owned();
        let size: u64 =
            text(&header[48..58]).parse().map_err(|_| invalid("a member's size is damaged"))?;
        let name = text(&header[..16]).trim_end_matches('/').to_owned();
        if name.starts_with("data.tar") {
            return Ok((name, ar.take(size)));
        }
        let skip = i64::try_from(size.next_multiple_of(2)).map_err(io::Error::other)?;
        ar.seek(SeekFrom::Current(skip))?;
    }
}

/// Undoes the compression that a file name's ending tells; other names are passed through.
pub(crate) fn decompress<'a>(name: &str, data: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match name.rsplit('.').next() {
        Some("xz") => Box::new(lzma_rust2::XzReader::new(data, true)),
        Some("zst") => Box::new(
            ruzstd::decoding::StreamingDecoder::new(data).map_err(|e| invalid(&e.to_string()))?,
        ),
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(data)),
        _ => Box::new(data),
    })
}

/// A path without a leading `./`, refused if it leads outside.
fn inside(path: &Path) -> io::Result<PathBuf> {
    let parts = path.components().filter(|part| !matches!(part, Component::CurDir));
    parts
        .map(|part| match part {
            Component::Normal(name) => Ok(name),
            _ => Err(invalid(&format!("the member {} leads outside", path.display()))),
        })
        .collect()
}

fn invalid(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn tar_with(name: &str, content: &[u8]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, content).unwrap();
        builder.into_inner().unwrap()
    }

    fn deb(members: &[(&str, &[u8])]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(AR_MAGIC).unwrap();
        for (name, content) in members {
            writeln!(file, "{name:<16}0           0     0     100644  {:<10}`", content.len())
                .unwrap();
            file.write_all(content).unwrap();
            file.write_all(&b"\n"[..content.len() % 2]).unwrap();
        }
        file
    }

    fn files(package: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, BootstrapError> {
        let mut found = Vec::new();
        for_each_file(package, |path, content| {
            found.push((path.to_owned(), content.to_vec()));
            Ok::<_, BootstrapError>(())
        })?;
        Ok(found)
    }

    #[test]
    fn files_are_found_behind_members_of_odd_size() {
        let tar = tar_with("./bin/tool", b"content");
        let expected = [(PathBuf::from("bin/tool"), b"content".to_vec())];
        for name in ["data.tar", "data.tar/"] {
            let deb = deb(&[("debian-binary", b"2.0"), ("control.tar", b"xx"), (name, &tar)]);
            assert_eq!(files(deb.path()).unwrap(), expected);
        }
    }

    #[test]
    fn each_compression_of_the_distributions_is_read() {
        let tar = tar_with("./bin/tool", &b"content ".repeat(1000));
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), Default::default()).unwrap();
        xz.write_all(&tar).unwrap();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), Default::default());
        gz.write_all(&tar).unwrap();
        let zst = ruzstd::encoding::compress_to_vec(
            tar.as_slice(),
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        let packed = [("xz", xz.finish().unwrap()), ("gz", gz.finish().unwrap()), ("zst", zst)];
        for (ending, data) in packed {
            assert!(data.len() < tar.len() / 4);
            let deb = deb(&[(&format!("data.tar.{ending}"), &data)]);
            let found = files(deb.path()).unwrap();
            assert_eq!(found[0].1.len(), 8000, "{ending}");
        }
    }

    #[test]
    fn a_damaged_package_is_named() {
        let tar = tar_with("./bin/tool", &[7; 3000]);
        let truncated = deb(&[("data.tar", &tar[..600])]);
        let no_data = deb(&[("debian-binary", b"2.0\n")]);
        let mut not_ar = tempfile::NamedTempFile::new().unwrap();
        not_ar.write_all(b"<html>not found</html>").unwrap();
        let outside = deb(&[("data.tar", &tar_with("../../etc/passwd", b"evil"))]);
        let cases = [
            (not_ar, "like an `ar`"),
            (no_data, "no `data.tar`"),
            (outside, "outside"),
            (truncated, "truncated"),
        ];
        for (file, problem) in cases {
            let error = files(file.path()).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
            assert!(error.contains(file.path().to_str().unwrap()), "{error}");
        }
    }
}
