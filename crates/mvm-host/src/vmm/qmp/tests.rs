use serde::Deserialize;
use tokio::io::DuplexStream;

use super::*;

const LIMIT: Duration = Duration::from_secs(5);
const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"], "new": 1}}"#;

/// The far end: reads commands, answers with what the test says.
struct Peer {
    stream: BufReader<DuplexStream>,
}

impl Peer {
    async fn say(&mut self, text: &str) {
        self.stream.get_mut().write_all(format!("{text}\r\n").as_bytes()).await.unwrap();
    }

    async fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Hears a command and answers it with this member (`"return":…` or `"error":…`).
    async fn answer(&mut self, command: &str, member: &str) {
        let heard = self.hear().await;
        assert_eq!(heard["execute"], command);
        self.say(&format!(r#"{{{member}, "id": {}}}"#, heard["id"])).await;
    }
}

fn pair() -> (DuplexStream, Peer) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    (near, Peer { stream: BufReader::new(far) })
}

async fn connected() -> (QmpClient, Peer) {
    let (near, mut peer) = pair();
    let greet = async {
        peer.say(GREETING).await;
        peer.answer("qmp_capabilities", r#""return": {}"#).await;
    };
    let (client, ()) = tokio::join!(QmpClient::connect(near, LIMIT), greet);
    (client.unwrap(), peer)
}

#[derive(Debug, PartialEq, Deserialize)]
struct Status {
    status: String,
}

#[tokio::test]
async fn the_greeting_is_read_and_a_query_takes_only_what_it_needs() {
    let (client, mut peer) = connected().await;
    assert_eq!(client.greeting().version.to_string(), "7.2.22");
    let (status, ()) = tokio::join!(
        client.query::<Status>("query-status", LIMIT),
        peer.answer("query-status", r#""return": {"status": "running", "singlestep": false}"#),
    );
    assert_eq!(status.unwrap(), Status { status: "running".into() });
}

#[tokio::test]
async fn events_between_command_and_answer_are_delivered_and_answers_may_be_out_of_order() {
    let (client, mut peer) = connected().await;
    let mut events = client.events();
    let script = async {
        let (one, two) = (peer.hear().await, peer.hear().await);
        peer.say(r#"{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}"#).await;
        peer.say(&format!(r#"{{"return": 2, "id": {}}}"#, two["id"])).await;
        peer.say(r#"{"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}}"#).await;
        peer.say(&format!(r#"{{"return": 1, "id": {}}}"#, one["id"])).await;
    };
    let (one, two, ()) =
        tokio::join!(client.query::<u32>("one", LIMIT), client.query::<u32>("two", LIMIT), script,);
    assert_eq!((one.unwrap(), two.unwrap()), (1, 2));
    assert_eq!(events.recv().await.unwrap().name, "STOP");
    assert_eq!(events.recv().await.unwrap().data["reason"], "guest-shutdown");
}

#[tokio::test]
async fn a_refusal_names_the_command_and_keeps_the_text() {
    let (client, mut peer) = connected().await;
    let error = r#""error": {"class": "GenericError", "desc": "No space"}"#;
    let (result, ()) =
        tokio::join!(client.execute("stop", json!({}), LIMIT), peer.answer("stop", error));
    assert_eq!(result.unwrap_err().to_string(), "QEMU refused `stop`: No space");
    // The connection goes on.
    let (result, ()) = tokio::join!(
        client.execute("cont", json!({}), LIMIT),
        peer.answer("cont", r#""return": {}"#)
    );
    assert_eq!(result.unwrap(), json!({}));
}

#[tokio::test(start_paused = true)]
async fn silence_ends_in_time_and_a_late_answer_does_not_confuse_the_next() {
    let (client, mut peer) = connected().await;
    let error = client.execute("stop", json!({}), LIMIT).await.unwrap_err();
    assert_eq!(error, QmpError::TimedOut { command: "stop".into(), limit: LIMIT });
    peer.answer("stop", r#""return": "late""#).await;
    let (result, ()) = tokio::join!(
        client.query::<String>("cont", LIMIT),
        peer.answer("cont", r#""return": "own""#)
    );
    assert_eq!(result.unwrap(), "own");
}

#[tokio::test(start_paused = true)]
async fn a_silent_or_foreign_peer_is_refused_at_the_greeting() {
    let (near, _peer) = pair();
    let error = QmpClient::connect(near, LIMIT).await.unwrap_err();
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");

    for greeting in ["HTTP/1.1 400 Bad Request", "{}", r#"{"QMP": 7}"#, "\u{1}\u{2}"] {
        let (near, mut peer) = pair();
        peer.say(greeting).await;
        let error = QmpClient::connect(near, LIMIT).await.unwrap_err();
        assert!(matches!(error, QmpError::Unexpected { .. }), "{greeting}: {error}");
    }
}

#[tokio::test]
async fn garbage_and_an_end_fail_everything_that_waits_and_all_that_comes() {
    let (client, mut peer) = connected().await;
    let garbage = async {
        peer.hear().await;
        peer.say("garbage").await;
    };
    let (result, ()) = tokio::join!(client.execute("stop", json!({}), LIMIT), garbage);
    let error = result.unwrap_err().to_string();
    assert!(error.contains("`stop`") && error.contains("not QMP"), "{error}");
    let error = client.execute("cont", json!({}), LIMIT).await.unwrap_err();
    assert!(matches!(error, QmpError::Closed { .. }), "{error}");

    let (client, mut peer) = connected().await;
    let (result, ()) = tokio::join!(client.execute("stop", json!({}), LIMIT), async {
        peer.hear().await;
        drop(peer);
    });
    assert!(matches!(result.unwrap_err(), QmpError::Closed { .. }));
}

#[tokio::test]
async fn a_line_without_end_is_not_kept() {
    let (client, mut peer) = connected().await;
    let flood = async {
        peer.hear().await;
        let piece = [b'x'; 8192];
        // Ends with an error as soon as the client has hung up.
        while peer.stream.get_mut().write_all(&piece).await.is_ok() {}
    };
    let work = async {
        let error = client.execute("stop", json!({}), LIMIT).await.unwrap_err();
        drop(client);
        error
    };
    let (error, ()) = tokio::join!(work, flood);
    assert!(error.to_string().contains("longer than"), "{error}");
}
