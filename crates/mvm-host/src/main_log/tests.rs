use std::fs;
use std::io::Write as _;

use super::*;
use crate::state_dir::InstanceDir;

fn record(source: LogSource, at_unix_ms: u64, text: &str) -> Record {
    Record { source, at_unix_ms, bytes: text.into() }
}

fn text(records: &[Record]) -> String {
    let bytes: Vec<u8> = records.iter().flat_map(|record| record.bytes.clone()).collect();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn what_was_written_is_read_in_order_with_its_source_and_time() {
    let temp = tempfile::tempdir().unwrap();
    let dir = InstanceDir::from(temp.path());
    assert!(!LogReader::exists(&dir));
    assert!(LogReader::new(&dir).read().unwrap().is_empty());
    let mut writer = LogWriter::open(&dir).unwrap();
    assert_eq!(writer.begin("boot-1", 1).unwrap(), ([0, 0], true));
    writer.append(LogSource::Stdout, b"a\xff\0b", 2).unwrap();
    writer.append(LogSource::Stderr, b"c", 3).unwrap();
    let mut reader = LogReader::new(&dir);
    let first = reader.read().unwrap();
    let binary = Record { source: LogSource::Stdout, at_unix_ms: 2, bytes: b"a\xff\0b".into() };
    assert_eq!(first, [binary, record(LogSource::Stderr, 3, "c")]);
    assert!(reader.read().unwrap().is_empty());
    writer.append(LogSource::Agent, b"d", 4).unwrap();
    assert_eq!(reader.read().unwrap(), [record(LogSource::Agent, 4, "d")]);
}

#[test]
fn a_new_writer_goes_on_behind_the_last_whole_record() {
    let temp = tempfile::tempdir().unwrap();
    let dir = InstanceDir::from(temp.path());
    let mut writer = LogWriter::open(&dir).unwrap();
    writer.begin("boot-1", 1).unwrap();
    writer.append(LogSource::Stdout, b"hello", 2).unwrap();
    writer.append(LogSource::Stderr, b"xyz", 2).unwrap();
    drop(writer);
    let path = dir.main_log();
    let mut torn = Vec::new();
    encode(LogSource::Stdout, 3, b"never finished", &mut torn);
    fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(&torn[..20]).unwrap();
    assert_eq!(text(&LogReader::new(&dir).read().unwrap()), "helloxyz");
    let mut writer = LogWriter::open(&dir).unwrap();
    assert_eq!(writer.begin("boot-1", 4).unwrap(), ([5, 3], false));
    writer.append(LogSource::Stdout, b"!", 5).unwrap();
    assert_eq!(text(&LogReader::new(&dir).read().unwrap()), "helloxyz!");
    assert_eq!(writer.begin("boot-2", 6).unwrap(), ([0, 0], true));
    writer.skip_to([7, 9], 6).unwrap();
    drop(writer);
    let mut writer = LogWriter::open(&dir).unwrap();
    assert_eq!(writer.begin("boot-2", 6).unwrap(), ([7, 9], false));
}

#[test]
fn a_flood_is_bounded_and_a_reader_that_keeps_up_misses_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let dir = InstanceDir::from(temp.path());
    let mut writer = LogWriter::open(&dir).unwrap();
    writer.begin("boot-1", 1).unwrap();
    let mut reader = LogReader::new(&dir);
    let (mut written, mut seen) = (0, 0);
    for round in 0..60 {
        writer.append(LogSource::Stdout, &[b'x'; 300_000], round).unwrap();
        written += 300_000;
        seen += reader.read().unwrap().iter().map(|record| record.bytes.len()).sum::<usize>();
    }
    assert_eq!(seen, written);
    let size: u64 = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    assert!(size <= 2 * (FILE_MAX + RECORD_MAX as u64), "{size}");
    let late = LogReader::new(&dir).read().unwrap();
    let late: usize = late.iter().map(|record| record.bytes.len()).sum();
    assert!(late as u64 >= FILE_MAX && late < written, "{late}");
    drop(writer);
    let mut writer = LogWriter::open(&dir).unwrap();
    assert_eq!(writer.begin("boot-1", 1).unwrap(), ([written as u64, 0], false));
}

#[test]
fn a_file_that_is_no_log_reads_as_empty() {
    let temp = tempfile::tempdir().unwrap();
    let dir = InstanceDir::from(temp.path());
    fs::write(dir.main_log(), [0xff; 100]).unwrap();
    assert!(LogReader::new(&dir).read().unwrap().is_empty());
    let mut writer = LogWriter::open(&dir).unwrap();
    assert_eq!(writer.begin("boot-1", 1).unwrap(), ([0, 0], true));
}

#[test]
fn each_line_has_the_time_at_which_it_began() {
    let stamp = |at: u64| format!("t{at}");
    let mut render = Render::new(&|_| true, 2, Some(&stamp));
    let records = [
        record(LogSource::Stdout, 1, "too old\n"),
        record(LogSource::Stdout, 2, "a\nb"),
        record(LogSource::Stderr, 3, "x\n"),
        record(LogSource::Stdout, 4, "c\n\n"),
    ];
    let shown: Vec<String> = records
        .into_iter()
        .filter_map(|record| render.is_wanted(&record).then(|| render.piece(record)))
        .map(|piece| String::from_utf8(piece.bytes).unwrap())
        .collect();
    assert_eq!(shown, ["t2 a\nt2 b", "t3 x\n", "c\nt4 \n"]);
}

#[test]
fn the_last_lines_are_found_across_records() {
    let records = || {
        vec![
            record(LogSource::Stdout, 1, "one\ntw"),
            record(LogSource::Stdout, 2, "o\nthree\nfo"),
            record(LogSource::Stdout, 3, "ur"),
        ]
    };
    for (lines, rest) in [
        (0, ""),
        (1, "four"),
        (2, "three\nfour"),
        (3, "two\nthree\nfour"),
        (4, "one\ntwo\nthree\nfour"),
        (9, "one\ntwo\nthree\nfour"),
    ] {
        assert_eq!(text(&tail(records(), lines)), rest, "{lines}");
    }
    let ended = vec![record(LogSource::Stdout, 1, "one\ntwo\n")];
    assert_eq!(text(&tail(ended, 1)), "two\n");
    assert!(tail(Vec::new(), 3).is_empty());
}

#[test]
fn the_last_words_are_those_of_the_last_boot() {
    let temp = tempfile::tempdir().unwrap();
    let dir = InstanceDir::from(temp.path());
    let words = |lines| last_words(&dir, lines).unwrap();
    assert_eq!(words(5), [""; 0], "there is no log");
    let mut log = LogWriter::open(&dir).unwrap();
    log.begin("one", 1).unwrap();
    log.append(LogSource::Stdout, b"of the first boot\n", 2).unwrap();
    log.begin("two", 3).unwrap();
    log.append(LogSource::Agent, b"mvm: a boot started\n", 3).unwrap();
    assert_eq!(words(5), [""; 0], "the last boot has said nothing");
    log.append(LogSource::Stdout, b"a line in ", 4).unwrap();
    log.append(LogSource::Stderr, b"\x1b[31mcannot open\x1b[0m\nbye", 5).unwrap();
    log.append(LogSource::Stdout, b"two parts\n\n", 6).unwrap();
    assert_eq!(words(5), ["cannot open", "bye", "a line in two parts"]);
    assert_eq!(words(1), ["a line in two parts"], "empty lines are not shown");
    // The boot goes on in the next file, whose first mark is the same.
    log.append(LogSource::Stdout, &vec![b'x'; FILE_MAX as usize], 7).unwrap();
    log.append(LogSource::Stdout, b"\nend\n", 8).unwrap();
    assert!(dir.older_main_log().exists());
    assert_eq!(words(1), ["end"]);
    assert_eq!((words(9).len(), &*words(9)[0]), (5, "cannot open"));
}
