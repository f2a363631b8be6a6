use mvm_wire::{ApiError, ErrorCode};
use tokio::io::duplex;

use super::*;

struct Bench {
    agent: Connection,
    stdin: Option<mpsc::Sender<Vec<u8>>>,
    signals: mpsc::Sender<i32>,
    command: tokio::task::JoinHandle<(Result<ExitStatus>, Vec<u8>, Vec<u8>)>,
}

/// A command attached to an agent that the test plays.
fn bench() -> Bench {
    let (ours, theirs) = duplex(1024);
    let (stdin, stdin_receiver) = mpsc::channel(1);
    let (signals, signals_receiver) = mpsc::channel(4);
    let command = tokio::spawn(async move {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let streams = Streams {
            stdin: Some(stdin_receiver),
            signals: signals_receiver,
            stdout: &mut out,
            stderr: &mut err,
        };
        let status = attach(Connection::new(ours), streams).await;
        (status, out, err)
    });
    Bench { agent: Connection::new(theirs), stdin: Some(stdin), signals, command }
}

/// Says that the program runs, and sees to it that the command knows.
async fn started(bench: &mut Bench) {
    let instance = "demo/hello/i-00000001".parse().unwrap();
    bench.agent.write.message(&Reply::ExecStarted { instance, pid: 3 }).await.unwrap();
    // What the command sends after that, it sends in the same turn in which it reads.
    bench.stdin.as_ref().unwrap().send(b"x".to_vec()).await.unwrap();
    bench.agent.read.next().await.unwrap();
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
    assert_eq!(status.unwrap().shell_code(), 3);
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
    assert_eq!(bench.command.await.unwrap().0.unwrap().shell_code(), 0);
}

#[tokio::test]
async fn signals_are_forwarded_and_a_second_interrupt_hangs_up() {
    let mut bench = bench();
    started(&mut bench).await;
    for signal in [SIGTERM, SIGINT] {
        bench.signals.send(signal).await.unwrap();
        let call: Call = bench.agent.read.message().await.unwrap();
        assert_eq!(call, Call::Signal { signal });
    }
    bench.signals.send(SIGINT).await.unwrap();
    let error = bench.command.await.unwrap().0.unwrap_err();
    assert_eq!(error.exit_code(), 130);
    assert_eq!(bench.agent.read.next().await.unwrap(), None);
}

#[tokio::test]
async fn an_interrupt_before_the_program_runs_hangs_up_at_once() {
    let mut bench = bench();
    bench.signals.send(SIGINT).await.unwrap();
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
    let (_keep, signals) = mpsc::channel(1);
    let streams = Streams { stdin: None, signals, stdout: Closed, stderr: Closed };
    assert!(attach(Connection::new(ours), streams).await.unwrap_err().is_silent());
}
