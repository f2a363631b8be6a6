//! The file that holds the changed pages of a memory.
//!
//! ```text
//!  0    magic "MVMPAGE1", or "MVMPAGZ1" if the pages are compressed
//!  8    size of the memory in bytes
//!  16   number of runs
//!  24   for each run: its first page, and how many pages follow one another
//!  …    zeroes up to a whole page, then the pages of all runs, or of each batch of them the length
//!       of a zstd frame and the frame
//! ```
//!
//! Integers are 64 bits wide and little-endian. A reader checks every number before it uses it.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use ruzstd::decoding::StreamingDecoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::super::Packing;
use super::image::is_zero;
use crate::hole::make_hole;

/// Bytes of a page of guest memory.
pub(crate) const PAGE: usize = 4096;
const MAGIC: [u8; 8] = *b"MVMPAGE1";
const MAGIC_ZSTD: [u8; 8] = *b"MVMPAGZ1";
const HEADER: usize = 24;
/// Pages that are carried at once.
const BATCH: usize = 256;

/// Pages that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first page's number.
    pub(crate) first: u64,
    /// How many there are; never 0.
    pub(crate) count: u64,
}

impl Run {
    /// Where its pages are in the memory, in bytes.
    pub(super) fn bytes(&self) -> Range<u64> {
        let page = PAGE as u64;
        self.first * page..(self.first + self.count) * page
    }
}

/// Joins neighbouring pages, whose numbers ascend, into runs.
pub(crate) fn runs_of(pages: impl IntoIterator<Item = u64>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.first + run.count == page => run.count += 1,
            _ => runs.push(Run { first: page, count: 1 }),
        }
    }
    runs
}

/// Writes the pages of these runs, which `read` takes out of the memory at an offset in bytes.
/// Returns the file's size in bytes.
///
/// # Errors
/// Those of the file and of `read`.
pub(crate) fn write(
    file: &File,
    memory_bytes: u64,
    runs: &[Run],
    packing: Packing,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<u64> {
    let mut out = BufWriter::with_capacity(BATCH * PAGE, file);
    out.write_all(match packing {
        Packing::Plain => &MAGIC,
        Packing::Zstd => &MAGIC_ZSTD,
    })?;
    out.write_all(&memory_bytes.to_le_bytes())?;
    out.write_all(&(runs.len() as u64).to_le_bytes())?;
    for run in runs {
        out.write_all(&run.first.to_le_bytes())?;
        out.write_all(&run.count.to_le_bytes())?;
    }
    let data = data_offset(runs.len() as u64);
    let index = HEADER + runs.len() * 16;
    out.write_all(&[0; PAGE][..usize::try_from(data).map_err(io::Error::other)? - index])?;
    let mut size = data;
    let mut batch = vec![0; BATCH * PAGE];
    for (first, count) in batches(runs) {
        let batch = &mut batch[..count * PAGE];
        read(first * PAGE as u64, batch)?;
        match packing {
            Packing::Plain => {
                out.write_all(batch)?;
                size += batch.len() as u64;
            }
            Packing::Zstd => {
                let frame = compress_to_vec(&*batch, CompressionLevel::Fastest);
                out.write_all(&(frame.len() as u64).to_le_bytes())?;
                out.write_all(&frame)?;
                size += 8 + frame.len() as u64;
            }
        }
    }
    out.flush()?;
    Ok(size)
}

/// Hands every page of the file to `write`, by its offset in the memory in bytes. Returns the
/// number of pages.
///
/// # Errors
/// The file is not one of these, is incomplete, or is of a memory of another size; and those of
/// `write`.
pub(crate) fn apply(
    file: &File,
    memory_bytes: u64,
    mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<u64> {
    let size = file.metadata()?.len();
    let mut from = BufReader::with_capacity(BATCH * PAGE, file);
    let mut header = [0; HEADER];
    from.read_exact(&mut header)?;
    let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap_or_default());
    let packing = match header[..8].try_into().unwrap_or_default() {
        MAGIC => Packing::Plain,
        MAGIC_ZSTD => Packing::Zstd,
        _ => return Err(damaged("it does not begin as one")),
    };
    if number(8) != memory_bytes {
        return Err(damaged("it is of a memory of another size"));
    }
    let all_pages = memory_bytes / PAGE as u64;
    let count = number(16);
    if count > all_pages {
        return Err(damaged("it has more runs than there are pages"));
    }
    let (mut runs, mut end, mut pages) = (Vec::new(), 0, 0);
    for _ in 0..count {
        let mut entry = [0; 16];
        from.read_exact(&mut entry)?;
        let [first, count] =
            [0, 8].map(|at| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap_or_default()));
        let next = first.checked_add(count).filter(|next| *next <= all_pages);
        match next {
            Some(next) if first >= end && count > 0 => end = next,
            _ => return Err(damaged("its runs are not in order, or beyond the memory")),
        }
        runs.push(Run { first, count });
        pages += count;
    }
    let data = data_offset(count);
    if packing == Packing::Plain && size != data + pages * PAGE as u64 {
        return Err(damaged("it does not have the size that its runs need"));
    }
    let padding = data - (HEADER as u64 + count * 16);
    io::copy(&mut from.by_ref().take(padding), &mut io::sink())?;
    let mut batch = vec![0; BATCH * PAGE];
    for (first, count) in batches(&runs) {
        let batch = &mut batch[..count * PAGE];
        match packing {
            Packing::Plain => from.read_exact(batch)?,
            Packing::Zstd => unpack(&mut from, batch)?,
        }
        write(first * PAGE as u64, batch)?;
    }
    if from.read(&mut [0])? > 0 {
        return Err(damaged("it goes on behind its last page"));
    }
    Ok(pages)
}

/// Brings the pages of these runs, which `read` takes out of the memory, up to date in an image of it.
/// What is in the image already, because the VMM has written it, is not written again, and what is
/// zero takes no space.
///
/// # Errors
/// Those of the file and of `read`.
pub(super) fn write_into_image(
    image: &File,
    runs: &[Run],
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let (mut new, mut old) = (vec![0; BATCH * PAGE], vec![0; BATCH * PAGE]);
    for (first, count) in batches(runs) {
        let at = first * PAGE as u64;
        let (new, old) = (&mut new[..count * PAGE], &mut old[..count * PAGE]);
        read(at, new)?;
        image.read_exact_at(old, at)?;
        let mut at = at;
        let pages: Vec<_> = new.chunks(PAGE).zip(old.chunks(PAGE)).collect();
        for run in pages.chunk_by(|one, other| is_zero(one.0) == is_zero(other.0)) {
            let bytes = (run.len() * PAGE) as u64;
            if !is_zero(run[0].0) || !make_hole(image, at, bytes)? {
                for (page, (new, old)) in run.iter().enumerate() {
                    if new != old {
                        image.write_all_at(new, at + (page * PAGE) as u64)?;
                    }
                }
            }
            at += bytes;
        }
    }
    Ok(())
}

/// Reads one frame, which holds exactly these pages.
fn unpack(from: &mut impl Read, batch: &mut [u8]) -> io::Result<()> {
    let mut length = [0; 8];
    from.read_exact(&mut length)?;
    let bad = |_| damaged("a frame of it is damaged");
    let frame = from.take(u64::from_le_bytes(length));
    let mut pages = StreamingDecoder::new(frame).map_err(|_| damaged("a frame of it is none"))?;
    pages.read_exact(batch).map_err(bad)?;
    if pages.read(&mut [0]).map_err(bad)? > 0 || pages.into_inner().limit() > 0 {
        return Err(damaged("a frame of it is not as long as its pages"));
    }
    Ok(())
}

fn damaged(how: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a file of changed pages: {how}"))
}

/// Where the pages begin: at a multiple of their size.
fn data_offset(runs: u64) -> u64 {
    (HEADER as u64 + runs * 16).next_multiple_of(PAGE as u64)
}

/// The runs cut into pieces that fit a batch: first page and number of pages.
fn batches(runs: &[Run]) -> impl Iterator<Item = (u64, usize)> {
    runs.iter().flat_map(|run| {
        (0..run.count).step_by(BATCH).map(move |at| {
            let left = usize::try_from(run.count - at).unwrap_or(BATCH);
            (run.first + at, left.min(BATCH))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::super::image::data_of;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::io::Seek;
    use std::os::unix::fs::FileExt;

    const PAGES: u64 = 2_000;
    const MEMORY: u64 = PAGES * PAGE as u64;

    fn content(page: u64) -> Vec<u8> {
        page.to_le_bytes().repeat(PAGE / 8)
    }

    fn saved(pages: &BTreeSet<u64>) -> File {
        packed(pages, Packing::Plain)
    }

    fn packed(pages: &BTreeSet<u64>, packing: Packing) -> File {
        let mut file = tempfile::tempfile().unwrap();
        let runs = runs_of(pages.iter().copied());
        let bytes = write(&file, MEMORY, &runs, packing, |offset, out| {
            for (at, page) in out.chunks_mut(PAGE).enumerate() {
                page.copy_from_slice(&content(offset / PAGE as u64 + at as u64));
            }
            Ok(())
        });
        assert_eq!(bytes.unwrap(), file.metadata().unwrap().len());
        file.rewind().unwrap();
        file
    }

    fn applied(file: &File, memory: u64) -> io::Result<BTreeSet<u64>> {
        let mut pages = BTreeSet::new();
        let count = apply(file, memory, |offset, bytes| {
            for (at, page) in bytes.chunks(PAGE).enumerate() {
                let number = offset / PAGE as u64 + at as u64;
                assert_eq!(page, content(number));
                assert!(pages.insert(number));
            }
            Ok(())
        })?;
        assert_eq!(count, pages.len() as u64);
        Ok(pages)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_written_is_applied(pages in proptest::collection::btree_set(0..PAGES, 0..600)) {
            let (plain, small) = (saved(&pages), packed(&pages, Packing::Zstd));
            if pages.len() > 10 {
                prop_assert!(small.metadata().unwrap().len() * 2 < plain.metadata().unwrap().len());
            }
            prop_assert_eq!(&applied(&plain, MEMORY).unwrap(), &pages);
            prop_assert_eq!(applied(&small, MEMORY).unwrap(), pages);
        }

        #[test]
        fn a_compressed_file_that_is_cut_damaged_or_longer_is_refused(
            cut in 0u64..100, bit in 0u64..8, more in 1u64..9,
        ) {
            let pages: BTreeSet<u64> = (0..200).collect();
            let whole = packed(&pages, Packing::Zstd).metadata().unwrap().len();
            let data = data_offset(1);
            let file = packed(&pages, Packing::Zstd);
            file.set_len(data + (whole - data) * cut / 100).unwrap();
            prop_assert!(applied(&file, MEMORY).is_err());
            let file = packed(&pages, Packing::Zstd);
            file.set_len(whole + more).unwrap();
            prop_assert!(applied(&file, MEMORY).is_err());
            // A bit that is flipped in the frame's length, and in the word that begins it.
            for at in [data, data + 8] {
                let file = packed(&pages, Packing::Zstd);
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
                prop_assert!(applied(&file, MEMORY).is_err());
            }
        }

        #[test]
        fn a_file_that_is_cut_or_damaged_in_its_head_is_refused(cut in 0u64..20_000, bit in 0usize..40 * 8) {
            let pages: BTreeSet<u64> = [1, 2, 3, 9].into();
            let file = saved(&pages);
            let whole = file.metadata().unwrap().len();
            if cut < whole {
                file.set_len(cut).unwrap();
                prop_assert!(applied(&file, MEMORY).is_err());
            }
            let file = saved(&pages);
            let mut byte = [0];
            file.read_exact_at(&mut byte, bit as u64 / 8).unwrap();
            file.write_all_at(&[byte[0] ^ (1 << (bit % 8))], bit as u64 / 8).unwrap();
            let result = std::panic::catch_unwind(|| applied(&file, MEMORY));
            // A changed page number may name another page, never one beyond the memory.
            if let Ok(Ok(pages)) = result {
                prop_assert!(pages.iter().all(|page| *page < PAGES));
            }
        }
    }

    #[test]
    fn an_image_is_brought_up_to_date_where_it_differs() {
        let image = tempfile::tempfile().unwrap();
        let old = [vec![0; PAGE], vec![1; PAGE], vec![2; PAGE], vec![3; PAGE], vec![4; PAGE]];
        image.write_all_at(&old.concat(), 0).unwrap();
        let new = [vec![5; PAGE], vec![1; PAGE], vec![0; PAGE], vec![6; PAGE], vec![7; PAGE]];
        let runs = [Run { first: 0, count: 3 }, Run { first: 4, count: 1 }];
        write_into_image(&image, &runs, |at, into| {
            into.copy_from_slice(&new.concat()[at as usize..at as usize + into.len()]);
            Ok(())
        })
        .unwrap();
        let mut read = vec![0; 5 * PAGE];
        image.read_exact_at(&mut read, 0).unwrap();
        let expected = [&new[0], &new[1], &new[2], &old[3], &new[4]];
        assert!(read == expected.map(Vec::as_slice).concat(), "the fourth page is not changed");
        assert_eq!(data_of(&image).unwrap().len(), 2, "a page of zeroes is a hole");
    }

    #[test]
    fn a_memory_of_another_size_is_refused() {
        let file = saved(&[7].into());
        assert!(applied(&file, MEMORY * 2).unwrap_err().to_string().contains("another size"));
    }
}
