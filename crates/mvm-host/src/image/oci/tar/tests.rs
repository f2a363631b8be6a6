//! What tools write, and what nobody should.

use proptest::prelude::*;

use super::*;

fn header(kind: u8, path: &str, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
    header.as_mut_bytes()[156] = kind;
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    header
}

fn archive(entries: &[(u8, &str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, path, content) in entries {
        bytes.extend_from_slice(header(*kind, path, content.len() as u64).as_bytes());
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    }
    bytes
}

fn read(bytes: &[u8]) -> Result<Vec<Header>, TarError> {
    let mut reader = TarReader::new(bytes);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next()? {
        entries.push(entry);
    }
    Ok(entries)
}

fn error(bytes: &[u8]) -> String {
    read(bytes).unwrap_err().to_string()
}

#[test]
fn records_apply_to_the_next_entry_only_and_global_ones_to_all() {
    let long = "n".repeat(300);
    let record = format!("310 path={long}\n");
    let bytes = archive(&[
        (b'g', "global", b"14 mtime=12.5\n"),
        (b'x', "pax", record.as_bytes()),
        (b'0', "short", b"one"),
        (b'0', "second", b"two"),
        (b'L', "gnu", long.as_bytes()),
        (b'0', "short", b""),
    ]);
    let entries = read(&bytes).unwrap();
    let names: Vec<_> = entries.iter().map(Header::name).collect();
    assert_eq!(names, [long.as_str(), "second", &long]);
    for entry in &entries {
        assert_eq!((entry.mtime_s, entry.mtime_ns), (12, 500_000_000));
    }
}

#[test]
fn times_before_1970_keep_their_fraction() {
    assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
    assert_eq!(time(b"-3"), Some((-3, 0)));
    assert_eq!(time(b"7.123456789123"), Some((7, 123_456_789)));
    assert_eq!(time(b"soon"), None);
}

#[test]
fn attributes_of_the_building_machine_are_left_out() {
    let record = |name: &str| {
        let rest = format!(" SCHILY.xattr.{name}=v\n");
        format!("{}{rest}", rest.len() + 2)
    };
    let names = ["user.a", "security.selinux", "trusted.overlay.opaque", "trusted.b"];
    let records: String = names.iter().map(|name| record(name)).collect();
    let bytes = archive(&[(b'x', "pax", records.as_bytes()), (b'0', "f", b"")]);
    let entry = &read(&bytes).unwrap()[0];
    let kept: Vec<_> = entry.xattrs.keys().map(|name| String::from_utf8_lossy(name)).collect();
    assert_eq!(kept, ["trusted.b", "user.a"]);
}

#[test]
fn a_header_larger_than_any_image_needs_is_not_read() {
    for kind in [b'x', b'g', b'L', b'K'] {
        let bytes = header(kind, "bomb", 1 << 40);
        assert!(error(bytes.as_bytes()).contains("longer header"), "{}", char::from(kind));
    }
}

#[test]
fn damage_is_named() {
    let sound = archive(&[(b'0', "file", b"content")]);
    let mut flipped = sound.clone();
    flipped[0] ^= 1;
    assert!(error(&flipped).contains("wrong checksum"));
    assert!(error(&sound[..100]).contains("ends too early"));
    assert!(error(&sound[..BLOCK + 3]).contains("ends too early"));
    assert_eq!(read(&sound[..BLOCK + 7]).unwrap().len(), 1, "padding may be left out");
    assert!(error(&archive(&[(b'?', "odd", b"")])).contains("`odd` is of an unknown type"));
    for records in ["7 path=a\n", "x path=a\n", "8 path=a", "99999999999999999999 a=b\n"] {
        let bytes = archive(&[(b'x', "pax", records.as_bytes()), (b'0', "f", b"")]);
        assert!(error(&bytes).contains("malformed extended header"), "{records:?}");
    }
}

#[test]
fn maps_of_holes_are_checked() {
    let sparse = |map: &str, size: &str, content: &[u8]| {
        let record = |rest: String| format!("{}{rest}", rest.len() + 2);
        let records = [
            record(format!(" GNU.sparse.map={map}\n")),
            record(format!(" GNU.sparse.size={size}\n")),
        ];
        archive(&[(b'x', "pax", records.concat().as_bytes()), (b'0', "f", content)])
    };
    let good = read(&sparse("4,2,9,1", "12", b"abc")).unwrap();
    assert_eq!((good[0].size, good[0].parts.as_deref()), (12, Some(&[(4, 2), (9, 1)][..])));
    for (map, size, content) in [
        ("4,2,5,1", "12", &b"abc"[..]),
        ("4,2,9,9", "12", b"abcdefghijk"),
        ("4,2", "12", b"abc"),
        ("4,2,9", "12", b"abc"),
        ("18446744073709551615,2", "12", b"ab"),
    ] {
        assert!(error(&sparse(map, size, content)).contains("map of holes"), "{map}");
    }
}

proptest! {
    #[test]
    fn no_bytes_whatever_make_the_reader_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..4096),
        kinds in prop::collection::vec(any::<u8>(), 0..4),
    ) {
        for (at, kind) in kinds.into_iter().enumerate() {
            let start = at * 2 * BLOCK;
            if let Some(block) = bytes.get_mut(start..start + BLOCK) {
                let size = u64::from(block[0]) * 4;
                let name = "name";
                block.copy_from_slice(header(kind, name, size).as_bytes());
            }
        }
        let _ = read(&bytes);
    }
}
