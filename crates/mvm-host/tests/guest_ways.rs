//! Terminals, programs that outlive their host, and forwarded connections: on the real agent.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod guest_support;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, TcpListener, UdpSocket};
use std::time::Duration;

use guest_support::{Guest, LIMIT, command, eventually, noise, runs, script};
use mvm_core::guest::{
    ErrorKind, ExecRequest, ExitStatus, Feature, ForwardTarget, INITIAL_CREDIT, MAX_PUBLISHED,
    TerminalSize,
};
use mvm_host::guest::{
    Exec, ExecEvent, ExecInput, ForwardEvent, ForwardEvents, Session, SessionError, SessionMode,
};

const SIZE: TerminalSize = TerminalSize { rows: 33, columns: 101 };

fn in_terminal(request: ExecRequest) -> ExecRequest {
    ExecRequest { terminal: Some(SIZE), stdin: true, ..request }
}

/// Takes output until it contains some text.
async fn until_output(exec: &mut Exec, text: &str) -> String {
    let mut output = String::new();
    while !output.contains(text) {
        match exec.next().await {
            Some(Ok(ExecEvent::Started { .. })) => {}
            Some(Ok(ExecEvent::Stdout(data))) => output.push_str(&String::from_utf8_lossy(&data)),
            other => panic!("{other:?} after {output:?}"),
        }
    }
    output
}

async fn pid_of(exec: &mut Exec) -> u32 {
    let Some(Ok(ExecEvent::Started { pid })) = exec.next().await else { panic!() };
    pid
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_a_size_that_can_change_while_a_program_watches() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let text =
        "stty size; trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.02; done";
    let mut exec = session.exec(in_terminal(script(text)), LIMIT).await.unwrap();
    let output = until_output(&mut exec, "ready").await;
    assert!(output.contains("33 101"), "{output:?}");
    exec.input().resize(TerminalSize { rows: 44, columns: 80 }).await.unwrap();
    until_output(&mut exec, "44 80").await;
    let status = exec.output(1 << 16).await.unwrap().status;
    assert_eq!(status, ExitStatus::Exited { code: 3 });
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_reach_a_terminal_as_signals_and_as_an_end() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let mut exec = session.exec(in_terminal(command(&["sleep", "1000"])), LIMIT).await.unwrap();
    pid_of(&mut exec).await;
    exec.input().write_stdin(b"\x03").await.unwrap();
    let status = exec.output(1 << 16).await.unwrap().status;
    assert_eq!(status, ExitStatus::Signaled { signal: 2, out_of_memory: false });
    // The end of the input is what Ctrl-D is.
    let mut exec = session.exec(in_terminal(command(&["cat"])), LIMIT).await.unwrap();
    exec.input().write_stdin(b"line\n").await.unwrap();
    let output = exec.output(1 << 16).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(
        (text.as_str(), output.status),
        ("line\r\nline\r\n", ExitStatus::Exited { code: 0 })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_is_the_programs_own_and_carries_its_errors() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let text = "test -t 0 && test -t 1 && test -t 2 && tty && echo said >/dev/tty && echo bad >&2";
    let exec = session.exec(in_terminal(script(text)), LIMIT).await.unwrap();
    let output = exec.output(1 << 16).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status, ExitStatus::Exited { code: 0 }, "{text}");
    assert!(text.starts_with("/dev/pts/") && text.ends_with("said\r\nbad\r\n"), "{text:?}");
    assert_eq!(output.stderr, b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_goes_away_ends_the_jobs_of_a_terminal() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    // A job of an interactive shell has a process group of its own.
    let text = "set -m; sh -c 'echo job $$; trap \"\" HUP; while :; do sleep 0.05; done'";
    let mut exec = session.exec(in_terminal(script(text)), LIMIT).await.unwrap();
    let output = until_output(&mut exec, "\n").await;
    let job: u32 = output.trim().strip_prefix("job ").unwrap().parse().unwrap();
    drop(exec);
    eventually("the job is gone", async || !runs(job)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_program_outlives_its_host() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let request = ExecRequest { detach: true, ..script("echo unread; exec sleep 1000") };
    let mut exec = session.exec(request, LIMIT).await.unwrap();
    let pid = pid_of(&mut exec).await;
    assert_eq!(exec.next().await.unwrap().unwrap(), ExecEvent::Detached);
    assert!(exec.next().await.is_none());
    drop((exec, session));
    let session = guest.session(SessionMode::Existing).await;
    assert_eq!(session.health(LIMIT).await.unwrap().execs, 1);
    assert!(runs(pid));
    drop((session, guest));
    end(pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_detached_later_is_not_held_up_by_its_output() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark");
    let text = format!("echo ready; sleep 0.2; seq 1 100000; echo done >{}", mark.display());
    for request in [script(&text), in_terminal(script(&text))] {
        let mut exec = session.exec(request, LIMIT).await.unwrap();
        until_output(&mut exec, "ready").await;
        exec.input().detach().await.unwrap();
        loop {
            match exec.next().await.unwrap().unwrap() {
                ExecEvent::Stdout(_) => {}
                event => break assert_eq!(event, ExecEvent::Detached),
            }
        }
        eventually("it has written everything", async || mark.exists()).await;
        eventually("it has ended", async || session.health(LIMIT).await.unwrap().execs == 0).await;
        std::fs::remove_file(&mark).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_program_that_does_not_exist_is_an_error_and_a_time_limit_holds() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let request = ExecRequest { detach: true, ..command(&["no-such-program"]) };
    let mut exec = session.exec(request, LIMIT).await.unwrap();
    let Some(Err(SessionError::Guest { error, .. })) = exec.next().await else { panic!() };
    assert_eq!(error.kind, ErrorKind::NotFound);
    let sleep = command(&["sleep", "1000"]);
    let request = ExecRequest { detach: true, timeout_ms: Some(50), ..sleep };
    let mut exec = session.exec(request, LIMIT).await.unwrap();
    let pid = pid_of(&mut exec).await;
    eventually("the time limit ends it", async || !runs(pid)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_older_than_a_request_is_not_asked() {
    let (guest, _sim) = Guest::simulated();
    let session = guest.session(SessionMode::Fresh).await;
    let request = in_terminal(command(&["cat"]));
    let error = session.exec(request, LIMIT).await.unwrap_err();
    assert!(matches!(error, SessionError::Missing { feature: Feature::Terminal, .. }), "{error}");
}

/// Ends a process that outlives its agent.
async fn end(pid: u32) {
    let pid_of_kernel = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid_of_kernel, rustix::process::Signal::KILL).unwrap();
    eventually("it is gone", async || !runs(pid)).await;
}

fn port(port: u16) -> ForwardTarget {
    ForwardTarget::Tcp { address: "127.0.0.1".parse().unwrap(), port }
}

async fn forward(session: &Session, target: ForwardTarget) -> (ForwardEvents, ExecInput) {
    let (mut events, input) = session.forward(target, LIMIT).await.unwrap().split();
    assert_eq!(events.next().await.unwrap().unwrap(), ForwardEvent::Connected);
    (events, input)
}

async fn read_all(events: &mut ForwardEvents) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        match events.next().await.unwrap().unwrap() {
            ForwardEvent::Data(data) => all.extend(data),
            ForwardEvent::Eof => return all,
            other => panic!("{other:?} after {} bytes", all.len()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forwarded_connection_carries_both_ways_and_ends_each_by_itself() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let number = listener.local_addr().unwrap().port();
    // It answers only when it has everything: the end of one direction must come through alone.
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
        all.len()
    });
    let (mut events, mut input) = forward(&session, port(number)).await;
    let sent = noise(3 << 20);
    let copy = sent.clone();
    let writer = tokio::spawn(async move {
        input.write_stdin(&copy).await.unwrap();
        input.close_stdin();
        input
    });
    assert!(read_all(&mut events).await == sent);
    assert_eq!(events.next().await.unwrap().unwrap(), ForwardEvent::Closed);
    assert_eq!(server.join().unwrap(), sent.len());
    writer.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_before_somebody_accepts_arrives() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let target = ForwardTarget::Unix { path: path.to_str().unwrap().into() };
    let (mut events, mut input) = session.forward(target, LIMIT).await.unwrap().split();
    input.write_stdin(b"early").await.unwrap();
    input.close_stdin();
    let (mut stream, _) = listener.accept().unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"early");
    drop(stream);
    assert_eq!(events.next().await.unwrap().unwrap(), ForwardEvent::Connected);
    assert_eq!(read_all(&mut events).await, b"");
    assert_eq!(events.next().await.unwrap().unwrap(), ForwardEvent::Closed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_nobody_listens_on_is_refused() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let missing = ForwardTarget::Unix { path: "/no/such/socket".into() };
    let long = ForwardTarget::Unix { path: "/x".repeat(100) };
    let cases = [
        (port(free), ErrorKind::NotFound, "Connection refused"),
        (missing, ErrorKind::NotFound, "cannot connect to /no/such/socket"),
        (port(0), ErrorKind::Invalid, "port 0"),
        (long, ErrorKind::Invalid, "too long"),
        (ForwardTarget::Unknown, ErrorKind::Unsupported, "does not know"),
    ];
    for (target, kind, text) in cases {
        let (mut events, _input) = session.forward(target, LIMIT).await.unwrap().split();
        let Some(Err(SessionError::Guest { error, .. })) = events.next().await else { panic!() };
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(text), "{error}");
        assert!(events.next().await.is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_reset_or_dropped_leaves_nothing() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = || port(listener.local_addr().unwrap().port());
    // Dropped by the host: the socket in the guest is closed.
    let (events, input) = forward(&session, target()).await;
    let (mut stream, _) = listener.accept().unwrap();
    drop((events, input));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    // Reset by the guest: with unread data, a close is a reset.
    let (mut events, mut input) = forward(&session, target()).await;
    let (mut stream, _) = listener.accept().unwrap();
    input.write_stdin(b"xy").await.unwrap();
    stream.read_exact(&mut [0]).unwrap();
    eventually("the second byte has come", async || {
        stream.set_nonblocking(true).unwrap();
        stream.peek(&mut [0]).is_ok()
    })
    .await;
    drop(stream);
    while let Some(event) = events.next().await {
        if event.unwrap() == ForwardEvent::Closed {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_holds_up_its_connection_only() {
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = port(listener.local_addr().unwrap().port());
    let (mut events, _input) = forward(&session, target.clone()).await;
    let (mut flood, _) = listener.accept().unwrap();
    let sent = noise(32 << 20);
    let copy = sent.clone();
    let writer = std::thread::spawn(move || {
        flood.write_all(&copy).unwrap();
        flood.shutdown(Shutdown::Write).unwrap();
        flood
    });
    for _ in 0..20 {
        let (mut events, mut input) = forward(&session, target.clone()).await;
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"other").unwrap();
        drop(stream);
        input.close_stdin();
        assert_eq!(read_all(&mut events).await, b"other");
    }
    assert!(!writer.is_finished() && sent.len() > INITIAL_CREDIT as usize);
    assert!(read_all(&mut events).await == sent);
    drop(writer.join().unwrap());
}

/// The machine's address that is not loopback, if it has one.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Nothing is sent: it is only asked which way it would go.
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().unwrap().ip())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_port_does_not_look_local_whatever_address_its_program_listens_on() {
    let Some(own) = own_address() else { return };
    let guest = Guest::real();
    let session = guest.session(SessionMode::Fresh).await;
    let loopback: IpAddr = "127.0.0.1".parse().unwrap();
    for address in ["0.0.0.0".parse().unwrap(), "::".parse().unwrap(), loopback, own] {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let number = listener.local_addr().unwrap().port();
        let forward = session.publish(number, loopback, LIMIT).await.unwrap();
        let (mut events, mut input) = forward.split();
        // What comes before the right address is found is not lost.
        input.write_stdin(b"early").await.unwrap();
        input.close_stdin();
        let connected = events.next().await.unwrap().unwrap();
        assert_eq!(connected, ForwardEvent::Connected, "{address}");
        let (mut stream, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip().to_canonical(), own, "{address}");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"early");
        stream.write_all(b"late").unwrap();
        drop(stream);
        assert_eq!(read_all(&mut events).await, b"late");
    }
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for (number, kind, text) in
        [(free, ErrorKind::NotFound, "cannot connect to port"), (0, ErrorKind::Invalid, "port 0")]
    {
        let forward = session.publish(number, loopback, LIMIT).await.unwrap();
        let (mut events, _input) = forward.split();
        let Some(Err(SessionError::Guest { error, .. })) = events.next().await else { panic!() };
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(text), "{error}");
    }
}

#[tokio::test]
async fn an_older_guest_is_asked_for_the_address_that_is_not_loopback() {
    let at: IpAddr = "10.240.1.2".parse().unwrap();
    for (is_older, target) in [
        (false, ForwardTarget::Published { port: 80 }),
        (true, ForwardTarget::Tcp { address: at, port: 80 }),
    ] {
        let (guest, sim) = Guest::simulated();
        if is_older {
            drop(sim.clone().older_than(Feature::Published));
        }
        let session = guest.session(SessionMode::Fresh).await;
        let (mut events, _input) = session.publish(80, at, LIMIT).await.unwrap().split();
        assert_eq!(events.next().await.unwrap().unwrap(), ForwardEvent::Connected);
        assert_eq!(sim.targets(), [target]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_strangers_as_there_may_be_leave_room_for_the_operator() {
    let guests = [Guest::real(), Guest::simulated().0];
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let number = listener.local_addr().unwrap().port();
    // It takes each and says nothing.
    std::thread::spawn(move || listener.incoming().collect::<Vec<_>>());
    for guest in guests {
        let session = guest.session(SessionMode::Fresh).await;
        let mut strangers = Vec::new();
        let loopback = "127.0.0.1".parse().unwrap();
        let refused = loop {
            match session.publish(number, loopback, LIMIT).await {
                Ok(forward) => {
                    let (mut events, input) = forward.split();
                    // One for whose socket there is no address ends, and so does the test.
                    let event = events.next().await.unwrap().unwrap();
                    assert_eq!(event, ForwardEvent::Connected);
                    strangers.push((events, input));
                }
                Err(error) => break error,
            }
        };
        assert!(matches!(refused, SessionError::Limit { .. }), "{refused}");
        assert_eq!(strangers.len(), MAX_PUBLISHED);
        let health = session.health(LIMIT).await.unwrap();
        assert_eq!(health.connections as usize, MAX_PUBLISHED);
        let echo = session.exec(command(&["echo", "room"]), LIMIT).await.unwrap();
        assert_eq!(echo.output(1 << 16).await.unwrap().stdout, b"room\n");
        session.shutdown(Duration::ZERO, LIMIT).await.unwrap();
    }
}
