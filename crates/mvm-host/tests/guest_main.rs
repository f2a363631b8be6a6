//! A guest's main process: one suite on the simulated guest and the real agent, and what only the
//! real agent does.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::print_stderr, reason = "a skipped test says why")]

mod guest_support;

use std::os::unix::fs::PermissionsExt as _;

use guest_support::{Guest, LIMIT, command, eventually, on_every_guest, runs};
use mvm_core::guest::{
    ErrorKind, ExecRequest, ExitStatus, GuestError, MainProgram, MainRequest, MainState,
};
use mvm_host::guest::{MainEvent, MainEvents, MainInput, Session, SessionError, SessionMode};

on_every_guest! {
    the_main_process_is_started_once_and_its_end_is_told_to_every_session
    standard_input_reaches_the_main_process_of_an_earlier_session
    a_signal_ends_the_main_process
    a_main_process_that_cannot_start_is_refused_in_every_session
}

const EXITED: ExitStatus = ExitStatus::Exited { code: 0 };

fn program(argv: &[&str]) -> MainProgram {
    MainProgram {
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        cwd: "/".into(),
        stop_signal: 15,
        ..MainProgram::default()
    }
}

fn request(program: MainProgram) -> MainRequest {
    MainRequest { program: Some(program), ..MainRequest::default() }
}

async fn attach(session: &Session, wanted: MainRequest) -> (MainState, MainEvents, MainInput) {
    session.main_process(wanted, LIMIT).await.unwrap()
}

async fn refusal(session: &Session, wanted: MainRequest) -> GuestError {
    match session.main_process(wanted, LIMIT).await {
        Err(SessionError::Guest { error, .. }) => error,
        other => panic!("{other:?}"),
    }
}

/// Takes events to the end.
async fn finish(mut events: MainEvents) -> (Vec<u8>, Vec<u8>, ExitStatus) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match events.next().await.unwrap().unwrap() {
            MainEvent::Stdout(data) => stdout.extend(data),
            MainEvent::Stderr(data) => stderr.extend(data),
            MainEvent::Exit(status) => {
                assert!(events.next().await.is_none());
                return (stdout, stderr, status);
            }
        }
    }
}

async fn the_main_process_is_started_once_and_its_end_is_told_to_every_session(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let wanted = || request(program(&["echo", "hello"]));
    let (first, events, _) = attach(&session, wanted()).await;
    assert!(first.pid > 1 && first.stdout == 0);
    assert_eq!(finish(events).await, (b"hello\n".to_vec(), vec![], EXITED));
    drop(session);
    let again = request(program(&["sh", "-c", "exit 3"]));
    for (from, rest) in [(0, "hello\n"), (4, "o\n"), (6, ""), (600, "")] {
        let session = guest.session(SessionMode::Existing).await;
        let (state, events, input) =
            attach(&session, MainRequest { stdout_from: from, ..again.clone() }).await;
        assert_eq!((state.pid, state.stdout), (first.pid, from.min(6)));
        assert_eq!(finish(events).await, (rest.into(), vec![], EXITED), "from {from}");
        input.signal(15).await.unwrap();
    }
}

async fn standard_input_reaches_the_main_process_of_an_earlier_session(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let wanted = request(MainProgram { stdin: true, ..program(&["cat"]) });
    let (_, mut events, input) = attach(&session, wanted.clone()).await;
    input.write_stdin(b"one\n").await.unwrap();
    assert_eq!(events.next().await.unwrap().unwrap(), MainEvent::Stdout(b"one\n".to_vec()));
    drop((events, input, session));
    let session = guest.session(SessionMode::Existing).await;
    let (state, events, input) = attach(&session, MainRequest { stdout_from: 4, ..wanted }).await;
    assert_eq!(state.stdout, 4);
    let large = vec![b'x'; 700_000];
    let copy = large.clone();
    let writer = tokio::spawn(async move {
        input.write_stdin(&copy).await.unwrap();
        input.close_stdin().await.unwrap();
        input
    });
    let (stdout, _, status) = finish(events).await;
    assert!(stdout == large && status == EXITED, "{} bytes, {status:?}", stdout.len());
    writer.await.unwrap();
}

async fn a_signal_ends_the_main_process(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let (_, events, input) = attach(&session, request(program(&["sleep", "4003"]))).await;
    input.signal(9).await.unwrap();
    assert_eq!(finish(events).await.2, ExitStatus::Signaled { signal: 9, out_of_memory: false });
}

async fn a_main_process_that_cannot_start_is_refused_in_every_session(guest: Guest) {
    for mode in [SessionMode::Fresh, SessionMode::Existing] {
        let session = guest.session(mode).await;
        let error = refusal(&session, request(program(&["no-such"]))).await;
        assert_eq!(error.kind, ErrorKind::NotFound);
        assert!(error.message.starts_with("`no-such` was not found in PATH ("), "{error}");
    }
}

#[tokio::test]
async fn what_the_main_process_is_given_is_what_was_asked_for() {
    let guest = Guest::real();
    let dir = tempfile::tempdir().unwrap();
    let cwd = dir.path().join("made/on/the/way").to_str().unwrap().to_owned();
    let session = guest.session(SessionMode::Fresh).await;
    let script = "pwd; echo $A; read line || echo no input; echo err >&2; exit 7";
    let wanted = MainProgram {
        env: vec![("A".into(), "b c".into())],
        cwd: cwd.clone(),
        ..program(&["sh", "-c", script])
    };
    let (_, events, _) = attach(&session, request(wanted)).await;
    let (stdout, stderr, status) = finish(events).await;
    assert_eq!(String::from_utf8(stdout).unwrap(), format!("{cwd}\nb c\nno input\n"));
    assert_eq!((stderr.as_slice(), status), (&b"err\n"[..], ExitStatus::Exited { code: 7 }));
}

#[tokio::test]
async fn a_first_process_is_process_1_for_itself_and_for_those_who_join_it() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can make a namespace");
        return;
    }
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let script = "[ $$ = 1 ] || exit 100; echo first; read line; exit 5";
    let program = MainProgram { stdin: true, is_first: true, ..program(&["sh", "-c", script]) };
    let (state, mut events, input) = attach(&session, request(program)).await;
    assert_eq!(state.pid, 1);
    assert_eq!(events.next().await.unwrap().unwrap(), MainEvent::Stdout(b"first\n".to_vec()));
    let run = async |text: &str| {
        let request = command(&["sh", "-c", text]);
        let output = session.exec(request, LIMIT).await.unwrap().output(1 << 16).await.unwrap();
        (String::from_utf8(output.stdout).unwrap(), output.status)
    };
    let (words, status) = run("tr '\\0' ' ' </proc/1/cmdline; ls -d /proc/[0-9]* | wc -l").await;
    assert!(words.starts_with("sh -c [ $$ = 1 ]") && status == EXITED, "{words}");
    let count: usize = words.rsplit(' ').next().unwrap().trim().parse().unwrap();
    assert!(count < 10, "{count} processes are seen");
    // One that ends is reaped, whoever is its parent there.
    assert_eq!(run("exit 3").await.1, ExitStatus::Exited { code: 3 });
    assert_eq!(run("kill -9 $$").await.1, ExitStatus::Signaled { signal: 9, out_of_memory: false });
    // Its own default is to mind no signal; the machine's end is another matter.
    input.signal(15).await.unwrap();
    input.write_stdin(b"go\n").await.unwrap();
    assert_eq!(finish(events).await.2, ExitStatus::Exited { code: 5 });
    assert!(!run("cat /proc/1/cmdline").await.0.contains("= 1 ]"), "the namespace is over");
}

#[tokio::test]
async fn a_user_or_directory_that_cannot_be_is_a_refusal() {
    for (wanted, part) in [
        (MainProgram { user: Some("ghost".into()), ..program(&["true"]) }, "user `ghost`"),
        (MainProgram { user: Some("0:ghosts".into()), ..program(&["true"]) }, "group `ghosts`"),
        (
            MainProgram { cwd: "/proc/none".into(), ..program(&["true"]) },
            "cannot make working directory `/proc/none`",
        ),
        (program(&["/no/such"]), "`/no/such` does not exist"),
        (program(&["/etc/passwd"]), "`/etc/passwd` cannot be executed"),
    ] {
        let guest = Guest::real();
        let session = guest.session(SessionMode::Fresh).await;
        let error = refusal(&session, request(wanted)).await;
        assert!(error.message.contains(part), "{error}");
    }
}

/// A program of which the kernel reads no more than the name of its loader.
fn program_with_loader(loader: &[u8]) -> Vec<u8> {
    let mut elf = vec![0; 120];
    elf[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    // An executable for x86-64 with one program header, which is behind this one.
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(32, &64_u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 1, 0]);
    put(64, &3_u32.to_le_bytes());
    put(72, &120_u64.to_le_bytes());
    put(96, &(loader.len() as u64).to_le_bytes());
    elf.extend(loader);
    elf
}

#[tokio::test]
async fn a_program_without_its_interpreter_is_refused_with_the_interpreters_name() {
    let guest = Guest::real();
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let script = file("script", b"#! /no/python3 -u\n");
    let dos = file("dos", b"#!/bin/sh\r\necho\r\n");
    let elf = file("elf", &program_with_loader(b"/lib/ld-none.so.1\0"));
    let behind = file("behind", format!("#!{elf}\n").as_bytes());
    let session = guest.session(SessionMode::Fresh).await;
    let path = vec![("PATH".to_owned(), dir.path().to_str().unwrap().to_owned())];
    for (name, shown, interpreter) in [
        (script.as_str(), &script, "/no/python3"),
        ("script", &script, "/no/python3"),
        ("./script", &format!("{}/./script", dir.path().display()), "/no/python3"),
        (&dos, &dos, "/bin/sh\\r"),
        (&elf, &elf, "/lib/ld-none.so.1"),
        (&behind, &elf, "/lib/ld-none.so.1"),
    ] {
        let cwd = Some(dir.path().to_str().unwrap().to_owned());
        let request = ExecRequest { env: path.clone(), cwd, ..command(&[name]) };
        let exec = session.exec(request, LIMIT).await.unwrap();
        let Err(SessionError::Guest { error, .. }) = exec.output(1 << 10).await else {
            panic!("{name} was started");
        };
        let expected = format!("`{shown}` is there, but its interpreter `{interpreter}` is not");
        assert_eq!((error.kind, error.message), (ErrorKind::NotFound, expected));
    }
    // Only who asks for a shell hears of shells.
    for (name, says_more) in [("zsh", true), ("/no/bash", true), ("nosuch", false)] {
        let request = ExecRequest { env: path.clone(), ..command(&[name]) };
        let exec = session.exec(request, LIMIT).await.unwrap();
        let Err(SessionError::Guest { error, .. }) = exec.output(1 << 10).await else {
            panic!("{name} was started");
        };
        assert_eq!(error.message.ends_with("; the image has /bin/sh"), says_more, "{error}");
    }
}

#[tokio::test]
async fn a_host_that_does_not_read_stops_the_process_and_loses_nothing() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let bytes = 3_000_000;
    let script = format!("yes 0123456789 | head -c {bytes}; echo end >&2");
    let wanted = request(program(&["sh", "-c", &script]));
    let (state, mut events, _) = attach(&session, wanted.clone()).await;
    let MainEvent::Stdout(first) = events.next().await.unwrap().unwrap() else { panic!() };
    assert!(runs(state.pid));
    session.health(LIMIT).await.unwrap();
    drop((events, session));
    // The next host goes on behind what the one before has kept.
    let session = guest.session(SessionMode::Existing).await;
    let kept = first.len() as u64;
    let (state, events, _) = attach(&session, MainRequest { stdout_from: kept, ..wanted }).await;
    assert_eq!(state.stdout, kept);
    let (rest, stderr, status) = finish(events).await;
    let all = [first, rest].concat();
    let expected: Vec<u8> = b"0123456789\n".iter().copied().cycle().take(bytes).collect();
    assert!(all == expected, "{} bytes", all.len());
    assert_eq!((stderr.as_slice(), status), (&b"end\n"[..], EXITED));
}

#[tokio::test]
async fn a_shutdown_asks_the_main_process_first_and_tells_its_last_words() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let script = "trap 'echo bye; exit 5' INT; echo ready; while :; do sleep 0.05; done";
    let wanted = MainProgram { stop_signal: 2, ..program(&["sh", "-c", script]) };
    let (_, mut events, _) = attach(&session, request(wanted)).await;
    assert_eq!(events.next().await.unwrap().unwrap(), MainEvent::Stdout(b"ready\n".to_vec()));
    session.shutdown(LIMIT, LIMIT).await.unwrap();
    let (stdout, _, status) = finish(events).await;
    assert_eq!((stdout.as_slice(), status), (&b"bye\n"[..], ExitStatus::Exited { code: 5 }));
}

#[tokio::test]
async fn a_main_process_that_does_not_end_in_its_time_goes_with_the_machine() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let script = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let (state, mut events, _) = attach(&session, request(program(&["sh", "-c", script]))).await;
    assert_eq!(events.next().await.unwrap().unwrap(), MainEvent::Stdout(b"ready\n".to_vec()));
    session.shutdown(std::time::Duration::from_millis(50), LIMIT).await.unwrap();
    session.closed().await;
    eventually("the process is gone", async || !runs(state.pid)).await;
}
