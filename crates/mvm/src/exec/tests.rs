use mvm_wire::{ApiError, ErrorCode};
use tokio::io::duplex;

use super::*;
use crate::detach_keys::DetachKeys;

struct Bench {
    agent: Connection,
    stdin: Option<mpsc::Sender<Vec<u8>>>,
    events: mpsc::Sender<Event>,
    command: tokio::task::JoinHandle<(Result<Outcome>, Vec<u8>, Vec<u8>)>,
}

/// A command attached to an agent that the test plays.
fn bench() -> Bench {
    bench_with(None, Signals::All)
}

/// The same with a terminal in which these keys detach, if there are any.
fn bench_with(detach_keys: Option<DetachKeys>, signals: Signals) -> Bench {
    let (ours, theirs) = duplex(1024);
    let (stdin, stdin_receiver) = mpsc::channel(1);
    let (events, events_receiver) = mpsc::channel(4);
    let command = tokio::spawn(async move {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut streams = Streams {
            stdin: Some(stdin_receiver),
            detach: detach_keys.map(DetachFilter::new),
            events: events_receiver,
            signals,
            has_started: AtomicBool::new(false),
            hung_up_by: None,
            stdout: &mut out,
            stderr: &mut err,
        };
        let status = attach(Connection::new(ours), &mut streams).await;
        (status, out, err)
    });
    Bench { agent: Connection::new(theirs), stdin: Some(stdin), events, command }
}

/// Says that the program runs, and sees to it that the command knows.
async fn started(bench: &mut Bench) {
    let instance = "demo/hello/i-00000001".parse().unwrap();
    bench.agent.write.message(&Reply::ExecStarted { instance, pid: 3 }).await.unwrap();
    // What the command sends after that, it sends in the same turn in which it reads.
    bench.stdin.as_ref().unwrap().send(b"x".to_vec()).await.unwrap();
    bench.agent.read.next().await.unwrap();
}

fn exited(code: i32) -> Outcome {
    Outcome::Exited(ExitStatus::Exited { code })
}

async fn exit(bench: &mut Bench, code: i32) {
    bench.agent.write.message(&Reply::ExecExit(ExitStatus::Exited { code })).await.unwrap();
}

#[tokio::test]
async fn output_and_errors_stay_apart_and_binary() {
    let mut bench = bench();
    let bytes: Vec<u8> = (0..=255).collect();
    bench.agent.write.data(KIND_STDOUT, &bytes).await.unwrap();
    bench.agent.write.data(KIND_STDERR, b"\xff\n").await.unwrap();
    bench.agent.write.data(77, b"of a newer agent").await.unwrap();
    bench.agent.write.data(KIND_STDOUT, &bytes).await.unwrap();
    exit(&mut bench, 3).await;
    let (status, out, err) = bench.command.await.unwrap();
    assert_eq!(status.unwrap(), exited(3));
    assert_eq!(out, [bytes.clone(), bytes].concat());
    assert_eq!(err, b"\xff\n");
}

#[tokio::test]
async fn input_is_streamed_and_ends_with_an_empty_piece() {
    let mut bench = bench();
    let stdin = bench.stdin.take().unwrap();
    stdin.send(b"abc".to_vec()).await.unwrap();
    stdin.send(vec![0; 5000]).await.unwrap();
    drop(stdin);
    for bytes in [b"abc".to_vec(), vec![0; 5000], vec![]] {
        let expected = Item::Data { kind: KIND_STDIN, bytes };
        assert_eq!(bench.agent.read.next().await.unwrap(), Some(expected));
    }
    exit(&mut bench, 0).await;
    assert_eq!(bench.command.await.unwrap().0.unwrap(), exited(0));
}

#[tokio::test]
async fn signals_are_forwarded_and_a_second_interrupt_hangs_up() {
    let mut bench = bench();
    started(&mut bench).await;
    for signal in [SIGTERM, SIGINT] {
        bench.events.send(Event::Signal(signal)).await.unwrap();
        let call: Call = bench.agent.read.message().await.unwrap();
        assert_eq!(call, Call::Signal { signal });
    }
    bench.events.send(Event::Signal(SIGINT)).await.unwrap();
    let error = bench.command.await.unwrap().0.unwrap_err();
    assert_eq!(error.exit_code(), 130);
    assert_eq!(bench.agent.read.next().await.unwrap(), None);
}

#[tokio::test]
async fn a_program_that_goes_on_gets_what_keys_send_and_any_other_signal_ends_the_command() {
    for signal in [SIGTERM, SIGHUP] {
        let mut bench = bench_with(None, Signals::Keys);
        started(&mut bench).await;
        bench.events.send(Event::Signal(SIGINT)).await.unwrap();
        let call: Call = bench.agent.read.message().await.unwrap();
        assert_eq!(call, Call::Signal { signal: SIGINT });
        bench.events.send(Event::Signal(signal)).await.unwrap();
        assert_eq!(bench.command.await.unwrap().0.unwrap_err().exit_code(), 130);
        assert_eq!(bench.agent.read.next().await.unwrap(), None, "{signal} is not for it");
    }
}

#[tokio::test]
async fn the_streams_go_on_with_another_connection() {
    let (stdin, stdin_receiver) = mpsc::channel(1);
    let (_events, events) = mpsc::channel(4);
    let mut streams = Streams {
        stdin: Some(stdin_receiver),
        detach: None,
        events,
        signals: Signals::Keys,
        has_started: AtomicBool::new(false),
        hung_up_by: None,
        stdout: Vec::new(),
        stderr: Vec::new(),
    };
    for text in ["before ", "after"] {
        let (ours, theirs) = duplex(1024);
        let mut agent = Connection::new(theirs);
        let agent = async {
            agent.write.data(KIND_STDOUT, text.as_bytes()).await.unwrap();
            stdin.send(text.as_bytes().to_vec()).await.unwrap();
            let expected = Item::Data { kind: KIND_STDIN, bytes: text.as_bytes().to_vec() };
            assert_eq!(agent.read.next().await.unwrap(), Some(expected));
            drop(agent);
        };
        let (ended, ()) = tokio::join!(attach(Connection::new(ours), &mut streams), agent);
        assert!(matches!(ended, Err(Error::Connection(_))), "{ended:?}");
    }
    assert_eq!(streams.stdout, b"before after");
}

#[tokio::test]
async fn an_interrupt_before_the_program_runs_hangs_up_at_once() {
    let mut bench = bench();
    bench.events.send(Event::Signal(SIGINT)).await.unwrap();
    let error = bench.command.await.unwrap().0.unwrap_err();
    assert_eq!(error.exit_code(), 130);
    assert_eq!(bench.agent.read.next().await.unwrap(), None);
}

#[tokio::test]
async fn an_agent_that_goes_away_is_an_error_and_not_a_success() {
    let bench = bench();
    drop(bench.agent);
    assert_eq!(bench.command.await.unwrap().0.unwrap_err().exit_code(), 7);
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_told_as_a_shell_would() {
    let mut bench = bench();
    let error = ApiError::new(ErrorCode::GuestNotFound, "there is no program `nope`");
    bench.agent.write.message(&Reply::Error(error)).await.unwrap();
    let error = bench.command.await.unwrap().0.unwrap_err();
    assert_eq!(error.exit_code(), 127);
    assert_eq!(error.to_string(), "there is no program `nope`");
}

#[tokio::test]
async fn output_that_nobody_reads_ends_the_command_silently() {
    struct Closed;
    impl AsyncWrite for Closed {
        fn poll_write(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            _: &[u8],
        ) -> std::task::Poll<std::io::Result<usize>> {
            std::task::Poll::Ready(Err(std::io::ErrorKind::BrokenPipe.into()))
        }
        fn poll_flush(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::task::Poll::Ready(Ok(()))
        }
        fn poll_shutdown(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::task::Poll::Ready(Ok(()))
        }
    }
    let (ours, theirs) = duplex(1024);
    let mut agent = Connection::new(theirs);
    agent.write.data(KIND_STDERR, b"unheard").await.unwrap();
    agent.write.data(KIND_STDOUT, b"unread").await.unwrap();
    let (_keep, events) = mpsc::channel(1);
    let mut streams = Streams {
        stdin: None,
        detach: None,
        events,
        signals: Signals::All,
        has_started: AtomicBool::new(false),
        hung_up_by: None,
        stdout: Closed,
        stderr: Closed,
    };
    assert!(attach(Connection::new(ours), &mut streams).await.unwrap_err().is_silent());
}

#[tokio::test]
async fn sizes_and_keys_reach_a_terminal_and_signals_hang_up() {
    let mut bench = bench_with(Some(DetachKeys::default()), Signals::None);
    started(&mut bench).await;
    let size = TerminalSize { rows: 40, columns: 132 };
    bench.events.send(Event::Resize(size)).await.unwrap();
    assert_eq!(bench.agent.read.message::<Call>().await.unwrap(), Call::Resize { size });
    bench.stdin.as_ref().unwrap().send(b"\x03".to_vec()).await.unwrap();
    let typed = Item::Data { kind: KIND_STDIN, bytes: b"\x03".to_vec() };
    assert_eq!(bench.agent.read.next().await.unwrap(), Some(typed));
    bench.events.send(Event::Signal(SIGTERM)).await.unwrap();
    assert_eq!(bench.command.await.unwrap().0.unwrap_err().exit_code(), 130);
}

#[tokio::test]
async fn the_keys_detach_behind_what_was_typed_before_them() {
    let mut bench = bench_with(Some(DetachKeys::default()), Signals::None);
    started(&mut bench).await;
    bench.stdin.as_ref().unwrap().send(b"last\x10\x11".to_vec()).await.unwrap();
    let typed = Item::Data { kind: KIND_STDIN, bytes: b"last".to_vec() };
    assert_eq!(bench.agent.read.next().await.unwrap(), Some(typed));
    assert_eq!(bench.agent.read.message::<Call>().await.unwrap(), Call::Detach);
    bench.agent.write.message(&Reply::ExecDetached).await.unwrap();
    assert_eq!(bench.command.await.unwrap().0.unwrap(), Outcome::Detached);
}
