//! A hung or hostile guest costs the host a typed error, and never more than its credit.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod guest_support;

use std::time::Duration;

use guest_support::{LIMIT, command, noise};
use mvm_core::accept::{Accepted, Acceptor, answer};
use mvm_core::frame::{self, Frame, FrameError, KIND_MESSAGE, KIND_STDOUT};
use mvm_core::guest::{GuestMessage, Hello, INITIAL_CREDIT, MAX_BODY, Preamble};
use mvm_host::guest::{ExecEvent, Session, SessionError, SessionMode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

/// What is long enough to see that nothing comes; no test waits for it when all is well.
const SHORT: Duration = Duration::from_millis(50);

/// A guest by hand.
struct Rogue {
    stream: DuplexStream,
    acceptor: Acceptor,
    tag: u32,
}

impl Rogue {
    async fn next_item(&mut self) -> Accepted {
        loop {
            if let Some(item) = self.acceptor.next_item() {
                return item;
            }
            let mut bytes = [0; 4096];
            let len = self.stream.read(&mut bytes).await.unwrap();
            assert!(len > 0, "the host closed the stream");
            self.acceptor.push(&bytes[..len]);
        }
    }

    async fn preamble(&mut self) -> Preamble {
        loop {
            if let Accepted::Session(preamble) = self.next_item().await {
                self.tag = preamble.tag();
                return preamble;
            }
        }
    }

    async fn frame(&mut self) -> Frame {
        match self.next_item().await {
            Accepted::Frame(frame) => frame,
            other => panic!("{other:?}"),
        }
    }

    async fn send_frame(&mut self, stream: u32, kind: u8, body: &[u8]) {
        let mut bytes = Vec::new();
        frame::encode(self.tag, stream, kind, body, &mut bytes);
        // The host may have ended the session for what was sent before.
        let _ = self.stream.write_all(&bytes).await;
    }

    async fn send(&mut self, stream: u32, message: &GuestMessage) {
        self.send_frame(stream, KIND_MESSAGE, &serde_json::to_vec(message).unwrap()).await;
    }
}

fn pair() -> (DuplexStream, Rogue) {
    let (host, guest) = duplex(16 * 1024);
    (host, Rogue { stream: guest, acceptor: Acceptor::default(), tag: 0 })
}

/// A session with a guest that behaves until now.
async fn session() -> (Session, Rogue) {
    let (host, mut rogue) = pair();
    let greet = async {
        let preamble = rogue.preamble().await;
        rogue.stream.write_all(&answer(&preamble).encode()).await.unwrap();
        rogue.send(0, &GuestMessage::Hello(Hello::default())).await;
    };
    let open = Session::open(Box::new(host), SessionMode::Existing, LIMIT);
    let (session, ()) = tokio::join!(open, greet);
    (session.unwrap(), rogue)
}

/// Opens a session with a guest that does this.
async fn open_with(rogue_does: impl AsyncFnOnce(&mut Rogue), limit: Duration) -> SessionError {
    let (host, mut rogue) = pair();
    let open = Session::open(Box::new(host), SessionMode::Existing, limit);
    tokio::pin!(open);
    let result = tokio::select! {
        result = &mut open => result,
        () = rogue_does(&mut rogue) => open.await,
    };
    result.unwrap_err()
}

#[tokio::test]
async fn a_guest_that_says_nothing_or_only_noise_is_given_up() {
    let error = open_with(async |_| {}, SHORT).await;
    assert!(matches!(error, SessionError::Timeout { request: "hello", .. }), "{error:?}");
    let noisy = async |rogue: &mut Rogue| {
        while rogue.stream.write_all(&noise(8192)).await.is_ok() {}
    };
    let error = open_with(noisy, SHORT).await;
    assert!(matches!(error, SessionError::Timeout { .. }), "{error:?}");
}

#[tokio::test]
async fn a_guest_that_hangs_up_or_knows_no_common_version_is_told_apart() {
    let error = open_with(async |rogue| rogue.stream.shutdown().await.unwrap(), LIMIT).await;
    assert!(matches!(error, SessionError::Closed), "{error:?}");
    for version in [0, 7] {
        let newer = async |rogue: &mut Rogue| {
            let reply = answer(&rogue.preamble().await);
            let reply = Preamble { version, max_version: 9, ..reply };
            rogue.stream.write_all(&reply.encode()).await.unwrap();
        };
        let error = open_with(newer, LIMIT).await;
        assert!(matches!(error, SessionError::Version { guest_max: 9 }), "{error:?}");
    }
}

#[tokio::test]
async fn a_guest_whose_first_frame_is_no_hello_is_refused() {
    let replies: [&[u8]; 3] = [b"{}", br#"{"type":"done"}"#, b"\xff"];
    for body in replies {
        let rude = async |rogue: &mut Rogue| {
            let reply = answer(&rogue.preamble().await);
            rogue.stream.write_all(&reply.encode()).await.unwrap();
            rogue.send_frame(0, KIND_MESSAGE, body).await;
        };
        let error = open_with(rude, LIMIT).await;
        assert!(matches!(error, SessionError::Protocol { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_guest_that_hangs_costs_a_request_its_time_and_nothing_else() {
    let (session, mut rogue) = session().await;
    let error = session.health(SHORT).await.unwrap_err();
    assert!(matches!(error, SessionError::Timeout { request: "health", .. }), "{error:?}");
    let mut exec = session.exec(command(&["x"]), SHORT).await.unwrap();
    assert!(matches!(exec.next().await, Some(Err(SessionError::Timeout { .. }))));
    assert!(exec.next().await.is_none());
    // It wakes up: late answers are dropped, cancellations have come, and the next request works.
    let late = rogue.frame().await.stream;
    rogue.send(late, &GuestMessage::Health(Default::default())).await;
    let asked = tokio::spawn({
        let session = session.clone();
        async move { session.health(LIMIT).await }
    });
    loop {
        let frame = rogue.frame().await;
        if frame.body == br#"{"type":"health"}"# {
            break rogue.send(frame.stream, &GuestMessage::Health(Default::default())).await;
        }
    }
    asked.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_guest_that_does_not_read_is_written_to_up_to_a_limit() {
    let (session, _rogue) = session().await;
    let mut execs = Vec::new();
    let error = loop {
        let words = vec!["x".repeat(1000); 60];
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match session.exec(command(&words), SHORT).await {
            Ok(exec) => execs.push(exec),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SessionError::Timeout { .. }), "{error:?}");
    assert!(execs.len() <= 20, "{} requests of 60 KB were taken", execs.len());
    let large = "x".repeat(MAX_BODY as usize);
    let error = session.exec(command(&[&large]), LIMIT).await.unwrap_err();
    assert!(matches!(error, SessionError::TooLarge { .. }), "{error:?}");
}

#[tokio::test]
async fn data_beyond_the_credit_ends_the_session() {
    let (session, mut rogue) = session().await;
    let mut exec = session.exec(command(&["x"]), LIMIT).await.unwrap();
    let id = rogue.frame().await.stream;
    rogue.send(id, &GuestMessage::Started { pid: 2 }).await;
    for _ in 0..=INITIAL_CREDIT / MAX_BODY {
        rogue.send_frame(id, KIND_STDOUT, &vec![0; MAX_BODY as usize]).await;
    }
    assert!(matches!(session.closed().await, SessionError::Credit { .. }));
    // What came within the credit is still there, and then the reason.
    assert!(matches!(exec.next().await, Some(Ok(ExecEvent::Started { pid: 2 }))));
    let mut received = 0;
    let error = loop {
        match exec.next().await.unwrap() {
            Ok(ExecEvent::Stdout(data)) => received += data.len(),
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(received, INITIAL_CREDIT as usize);
    assert!(matches!(error, SessionError::Credit { .. }), "{error:?}");
}

#[tokio::test]
async fn broken_frames_end_the_session_with_the_reason() {
    let (session, mut rogue) = session().await;
    rogue.send_frame(1, KIND_STDOUT, &vec![0; MAX_BODY as usize + 1]).await;
    let error = session.closed().await;
    assert!(matches!(error, SessionError::Frame(FrameError::TooLarge { .. })), "{error:?}");
    let error = session.health(LIMIT).await.unwrap_err();
    assert!(matches!(error, SessionError::Frame(_)), "{error:?}");

    let (session, mut rogue) = self::session().await;
    let waiting = tokio::spawn({
        let session = session.clone();
        async move { session.health(LIMIT).await.unwrap_err() }
    });
    rogue.frame().await;
    rogue.stream.write_all(&noise(10_000)).await.unwrap();
    assert!(matches!(waiting.await.unwrap(), SessionError::Frame(FrameError::OutOfSync { .. })));
}

#[tokio::test]
async fn answers_that_make_no_sense_fail_their_request_only() {
    let (session, mut rogue) = session().await;
    let asked = tokio::spawn({
        let session = session.clone();
        async move { session.health(LIMIT).await }
    });
    let id = rogue.frame().await.stream;
    rogue.send_frame(id + 100, KIND_STDOUT, b"for nobody").await;
    rogue.send_frame(id, KIND_MESSAGE, br#"{"type":"from_the_future"}"#).await;
    rogue.send(id, &GuestMessage::Done).await;
    assert!(matches!(asked.await.unwrap(), Err(SessionError::Protocol { .. })));

    let mut exec = session.exec(command(&["x"]), LIMIT).await.unwrap();
    let id = rogue.frame().await.stream;
    rogue.send(id, &GuestMessage::Health(Default::default())).await;
    assert!(matches!(exec.next().await, Some(Err(SessionError::Protocol { .. }))));
    assert!(exec.next().await.is_none());
}
