//! What every guest does: one suite, on the simulated guest and on the real agent.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod guest_support;

use std::time::Duration;

use guest_support::{Guest, LIMIT, command, eventually, noise, on_every_guest, script};
use mvm_core::guest::{
    ClockCorrection, Configuration, ErrorKind, ExecRequest, ExitStatus, FLUSH_LEN, GuestMessage,
    HostMessage, INITIAL_CREDIT, LogSource, MAX_BODY, MAX_STREAMS,
};
use mvm_host::guest::{ExecEvent, Session, SessionError, SessionMode};

on_every_guest! {
    a_guest_says_hello_and_counts_its_sessions
    an_identity_makes_a_guest_ready
    programs_write_and_exit
    a_missing_program_is_named
    a_megabytes_large_round_trip_is_binary_clean
    a_request_longer_than_a_frame_arrives_whole
    a_time_limit_and_a_signal_end_a_program
    a_dropped_exec_is_cancelled
    a_new_session_ends_the_programs_of_the_old_one
    a_session_cut_in_the_middle_of_a_frame_is_followed_by_another
    a_program_that_does_not_read_stops_the_writer_and_nobody_else
    a_reader_that_does_not_read_stops_the_program_and_nobody_else
    a_shutdown_is_answered_and_ends_the_stream
    many_programs_run_at_once
    what_a_guest_does_not_know_it_does_not_support
    what_makes_no_sense_is_refused_on_its_stream_only
    data_without_credit_ends_its_stream_only
    an_oversized_frame_ends_the_session_and_not_the_guest
    garbage_before_a_session_is_skipped
    peers_without_a_common_version_part_politely
    streams_are_limited
    a_clock_that_is_right_is_left_alone
}

async fn run(session: &Session, request: ExecRequest) -> (String, ExitStatus) {
    let exec = session.exec(request, LIMIT).await.unwrap();
    let output = exec.output(1 << 20).await.unwrap();
    (String::from_utf8(output.stdout).unwrap(), output.status)
}

async fn a_request_longer_than_a_frame_arrives_whole(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let words = ["a", "b", "c"].map(|word| word.repeat(100_000));
    let argv = [&["echo"], &words.each_ref().map(String::as_str)[..]].concat();
    let done = ExitStatus::Exited { code: 0 };
    let (shown, status) = run(&session, command(&argv)).await;
    assert!(shown == format!("{}\n", words.join(" ")) && status == done, "{}", shown.len());
    // One that is given up on the way leaves nothing for the next.
    let exec = session.exec(command(&argv), LIMIT).await.unwrap();
    drop(exec);
    until_idle(&session).await;
    assert_eq!(run(&session, command(&["echo", "short"])).await.0, "short\n");
}

async fn until_idle(session: &Session) {
    eventually("no program runs", async || session.health(LIMIT).await.unwrap().execs == 0).await;
}

async fn a_guest_says_hello_and_counts_its_sessions(guest: Guest) {
    let first = guest.session(SessionMode::Fresh).await.hello().clone();
    assert_eq!(first.session, 1);
    assert!(!first.configured && !first.kernel.is_empty() && !first.agent_version.is_empty());
    let second = guest.session(SessionMode::Existing).await.hello().clone();
    assert_eq!((second.session, second.boot_id), (2, first.boot_id));
}

async fn an_identity_makes_a_guest_ready(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    assert!(!session.health(LIMIT).await.unwrap().ready);
    let identity = Configuration { hostname: "web-1".into(), ..Default::default() };
    for _ in 0..2 {
        session.configure(identity.clone(), LIMIT).await.unwrap();
    }
    let health = session.health(LIMIT).await.unwrap();
    assert!(health.ready && health.mem_total_kib > health.mem_available_kib);
    drop(session);
    assert!(guest.session(SessionMode::Existing).await.hello().configured);
}

async fn programs_write_and_exit(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let exited = |code| ExitStatus::Exited { code };
    assert_eq!(run(&session, command(&["echo", "a", "b"])).await, ("a b\n".into(), exited(0)));
    let release = format!("Linux {}\n", session.hello().kernel);
    assert_eq!(run(&session, command(&["uname", "-sr"])).await, (release, exited(0)));
    assert_eq!(run(&session, command(&["false"])).await.1, exited(1));
    assert_eq!(run(&session, script("exit 7")).await.1, exited(7));
    assert_eq!(run(&session, command(&["cat"])).await, (String::new(), exited(0)));
    assert_eq!(run(&session, command(&["sleep", "0"])).await.1, exited(0));
}

async fn a_missing_program_is_named(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let mut exec = session.exec(command(&["no-such-program", "-x"]), LIMIT).await.unwrap();
    let Some(Err(SessionError::Guest { error, .. })) = exec.next().await else { panic!() };
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert!(error.message.starts_with("`no-such-program` was not found in PATH ("), "{error}");
    assert!(exec.next().await.is_none());
}

async fn a_megabytes_large_round_trip_is_binary_clean(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let request = ExecRequest { stdin: true, ..command(&["cat"]) };
    let (mut events, mut input) = session.exec(request, LIMIT).await.unwrap().split();
    let sent = noise(3 * 1024 * 1024 + 7);
    let copy = sent.clone();
    let writer = tokio::spawn(async move {
        for piece in copy.chunks(100_003) {
            input.write_stdin(piece).await.unwrap();
        }
        input.close_stdin();
        assert!(matches!(input.write_stdin(b"x").await, Err(SessionError::InputClosed)));
    });
    let mut received = Vec::new();
    let status = loop {
        match events.next().await.unwrap().unwrap() {
            ExecEvent::Started { .. } => {}
            ExecEvent::Stdout(data) => received.extend(data),
            ExecEvent::Stderr(data) => panic!("{data:?}"),
            ExecEvent::Exit(status) => break status,
            ExecEvent::Detached => panic!("nobody asked for it"),
        }
    };
    writer.await.unwrap();
    assert_eq!(status, ExitStatus::Exited { code: 0 });
    assert!(received == sent, "{} bytes came back for {}", received.len(), sent.len());
}

async fn a_time_limit_and_a_signal_end_a_program(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let limited = ExecRequest { timeout_ms: Some(20), ..command(&["sleep", "1000"]) };
    assert_eq!(run(&session, limited).await.1, ExitStatus::TimedOut);
    let unlimited = ExecRequest { timeout_ms: Some(u64::MAX), ..command(&["sleep", "1000"]) };
    let mut exec = session.exec(unlimited, LIMIT).await.unwrap();
    assert!(matches!(exec.next().await, Some(Ok(ExecEvent::Started { .. }))));
    exec.input().signal(0).await.unwrap();
    exec.input().signal(15).await.unwrap();
    let status = exec.output(0).await.unwrap().status;
    assert_eq!(status, ExitStatus::Signaled { signal: 15, out_of_memory: false });
}

async fn a_dropped_exec_is_cancelled(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let mut exec = session.exec(command(&["sleep", "1000"]), LIMIT).await.unwrap();
    exec.next().await.unwrap().unwrap();
    assert_eq!(session.health(LIMIT).await.unwrap().execs, 1);
    drop(exec);
    until_idle(&session).await;
}

async fn a_new_session_ends_the_programs_of_the_old_one(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let mut exec = session.exec(command(&["sleep", "1000"]), LIMIT).await.unwrap();
    exec.next().await.unwrap().unwrap();
    drop((exec, session));
    let session = guest.session(SessionMode::Existing).await;
    assert_eq!(session.health(LIMIT).await.unwrap().execs, 0);
    assert_eq!(run(&session, command(&["echo", "x"])).await.0, "x\n");
}

async fn a_session_cut_in_the_middle_of_a_frame_is_followed_by_another(guest: Guest) {
    tokio::task::spawn_blocking(move || {
        let mut host = guest.raw(1);
        host.open();
        let mut bytes = Vec::new();
        mvm_core::frame::encode(0x0101_0101, 1, 0, &vec![b' '; MAX_BODY as usize], &mut bytes);
        host.send_bytes(&bytes[..bytes.len() / 2]);
        let mut next = guest.raw(2);
        next.send_bytes(&vec![0; FLUSH_LEN]);
        let GuestMessage::Hello(hello) = next.open() else { panic!() };
        assert_eq!(hello.session, 2);
    })
    .await
    .unwrap();
}

async fn a_program_that_does_not_read_stops_the_writer_and_nobody_else(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let request = ExecRequest { stdin: true, ..command(&["sleep", "1000"]) };
    let (mut events, mut input) = session.exec(request, LIMIT).await.unwrap().split();
    events.next().await.unwrap().unwrap();
    let writer = tokio::spawn(async move { input.write_stdin(&noise(4 << 20)).await });
    for _ in 0..20 {
        session.health(LIMIT).await.unwrap();
    }
    assert!(!writer.is_finished());
    drop(events);
    assert!(matches!(writer.await.unwrap(), Err(SessionError::InputClosed)));
    until_idle(&session).await;
}

async fn a_reader_that_does_not_read_stops_the_program_and_nobody_else(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let request = ExecRequest { stdin: true, ..command(&["cat"]) };
    let (mut events, mut input) = session.exec(request, LIMIT).await.unwrap().split();
    events.next().await.unwrap().unwrap();
    let sent = noise(4 << 20);
    let copy = sent.clone();
    let writer = tokio::spawn(async move { input.write_stdin(&copy).await });
    for _ in 0..20 {
        assert_eq!(session.health(LIMIT).await.unwrap().execs, 1);
        assert_eq!(run(&session, command(&["echo", "x"])).await.0, "x\n");
    }
    assert!(!writer.is_finished());
    let mut received = Vec::new();
    while received.len() < sent.len() {
        let Some(Ok(ExecEvent::Stdout(data))) = events.next().await else { panic!() };
        received.extend(data);
    }
    assert!(received == sent);
    writer.await.unwrap().unwrap();
}

async fn a_shutdown_is_answered_and_ends_the_stream(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let mut exec = session.exec(command(&["sleep", "1000"]), LIMIT).await.unwrap();
    exec.next().await.unwrap().unwrap();
    session.shutdown(Duration::ZERO, LIMIT).await.unwrap();
    assert!(matches!(session.closed().await, SessionError::Closed));
    assert!(matches!(exec.next().await, Some(Err(SessionError::Closed))));
    assert!(matches!(session.health(LIMIT).await, Err(SessionError::Closed)));
}

async fn many_programs_run_at_once(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    let mut runs = tokio::task::JoinSet::new();
    for number in 0..200 {
        let session = session.clone();
        runs.spawn(async move {
            let word = format!("number-{number}");
            assert_eq!(run(&session, command(&["echo", &word])).await.0, word + "\n");
        });
    }
    while let Some(result) = runs.join_next().await {
        result.unwrap();
    }
    until_idle(&session).await;
}

async fn what_a_guest_does_not_know_it_does_not_support(guest: Guest) {
    tokio::task::spawn_blocking(move || {
        let mut host = guest.raw(3);
        host.open();
        host.send_frame(5, 0, br#"{"type":"teleport","to":"mars"}"#);
        host.send_frame(6, 77, b"a kind from the future");
        host.send(7, &HostMessage::Logs { source: LogSource::Unknown, follow: false });
        for stream in [5, 7] {
            let GuestMessage::Error(error) = host.last_message(stream) else { panic!() };
            assert_eq!(error.kind, ErrorKind::Unsupported);
        }
        host.send(8, &HostMessage::Health);
        assert!(matches!(host.last_message(8), GuestMessage::Health(_)));
    })
    .await
    .unwrap();
}

async fn what_makes_no_sense_is_refused_on_its_stream_only(guest: Guest) {
    tokio::task::spawn_blocking(move || {
        let mut host = guest.raw(4);
        host.open();
        let bodies: [&[u8]; 5] = [b"", b"{", b"\xff\xfe", b"[1,2]", br#"{"type":"exec","argv":5}"#];
        for (stream, body) in (10..).zip(bodies) {
            host.send_frame(stream, 0, body);
        }
        host.send(20, &HostMessage::Exec(ExecRequest::default()));
        host.send(21, &HostMessage::Exec(command(&["sleep", "1000"])));
        host.send(21, &HostMessage::Exec(command(&["sleep", "1000"])));
        host.send(22, &HostMessage::Exec(command(&["sleep", "1000"])));
        host.send(22, &HostMessage::Credit { kind: 2, bytes: 1 });
        for stream in [10, 11, 12, 13, 14, 20, 21, 22] {
            let GuestMessage::Error(error) = host.last_message(stream) else { panic!() };
            assert_eq!(error.kind, ErrorKind::Invalid, "stream {stream}");
        }
        // What may have crossed a stream's end on its way is no offence.
        host.send(30, &HostMessage::Credit { kind: 2, bytes: u32::MAX });
        host.send(30, &HostMessage::Signal { signal: i32::MIN });
        host.send(30, &HostMessage::Eof { kind: 1 });
        host.send(30, &HostMessage::Cancel);
        host.send_frame(30, 1, b"data");
        host.send(31, &HostMessage::Health);
        let (stream, message) = host.message();
        let GuestMessage::Health(health) = message else { panic!("{message:?}") };
        assert_eq!((stream, health.execs), (31, 0));
    })
    .await
    .unwrap();
}

async fn data_without_credit_ends_its_stream_only(guest: Guest) {
    tokio::task::spawn_blocking(move || {
        let mut host = guest.raw(5);
        host.open();
        let request = ExecRequest { stdin: true, ..command(&["sleep", "1000"]) };
        host.send(1, &HostMessage::Exec(request));
        // The pipe takes 64 KiB, for which credit is returned.
        for _ in 0..(INITIAL_CREDIT + 128 * 1024) / MAX_BODY + 1 {
            host.send_frame(1, 1, &vec![0; MAX_BODY as usize]);
        }
        let GuestMessage::Error(error) = host.last_message(1) else { panic!() };
        assert_eq!(error.kind, ErrorKind::Invalid);
        host.send(2, &HostMessage::Health);
        let GuestMessage::Health(health) = host.last_message(2) else { panic!() };
        assert_eq!(health.execs, 0);
    })
    .await
    .unwrap();
}

async fn an_oversized_frame_ends_the_session_and_not_the_guest(guest: Guest) {
    tokio::task::spawn_blocking(move || {
        let mut host = guest.raw(6);
        host.open();
        host.send(1, &HostMessage::Exec(command(&["sleep", "1000"])));
        host.send_frame(2, 0, &vec![b' '; MAX_BODY as usize + 1]);
        let GuestMessage::Error(error) = host.last_message(0) else { panic!() };
        assert_eq!(error.kind, ErrorKind::Invalid);
        let mut next = guest.raw(7);
        next.open();
        next.send(1, &HostMessage::Health);
        let GuestMessage::Health(health) = next.last_message(1) else { panic!() };
        assert_eq!(health.execs, 0);
    })
    .await
    .unwrap();
}

async fn garbage_before_a_session_is_skipped(guest: Guest) {
    tokio::task::spawn_blocking(move || {
        let mut host = guest.raw(8);
        host.send_bytes(&noise(300_000));
        assert!(matches!(host.open(), GuestMessage::Hello(_)));
        host.send_bytes(&noise(300_000));
        let mut next = guest.raw(9);
        assert!(matches!(next.open(), GuestMessage::Hello(_)));
    })
    .await
    .unwrap();
}

async fn peers_without_a_common_version_part_politely(guest: Guest) {
    tokio::task::spawn_blocking(move || {
        let mut host = guest.raw(10);
        let future = mvm_core::guest::Preamble {
            magic: mvm_core::guest::HOST_MAGIC,
            nonce: [10; 16],
            version: 900,
            max_version: 901,
        };
        host.send_bytes(&future.encode());
        assert_eq!(host.answer().version, 0);
        assert!(matches!(guest.raw(11).open(), GuestMessage::Hello(_)));
    })
    .await
    .unwrap();
}

async fn streams_are_limited(guest: Guest) {
    tokio::task::spawn_blocking(move || {
        let mut host = guest.raw(12);
        host.open();
        for stream in 1..=MAX_STREAMS as u32 {
            host.send(stream, &HostMessage::Exec(command(&["sleep", "1000"])));
            assert!(matches!(host.message(), (_, GuestMessage::Started { .. })));
        }
        host.send(5000, &HostMessage::Exec(command(&["sleep", "1000"])));
        let GuestMessage::Error(error) = host.last_message(5000) else { panic!() };
        assert_eq!(error.kind, ErrorKind::Limit);
        host.send(1, &HostMessage::Cancel);
        host.send(5001, &HostMessage::Exec(command(&["sleep", "0"])));
        assert!(matches!(host.last_message(5001), GuestMessage::Exit(_)));
    })
    .await
    .unwrap();
}

async fn a_clock_that_is_right_is_left_alone(guest: Guest) {
    let session = guest.session(SessionMode::Fresh).await;
    assert_eq!(session.check_clock(false, LIMIT).await.unwrap(), ClockCorrection::None);
}
