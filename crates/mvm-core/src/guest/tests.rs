use super::*;

#[test]
fn messages_of_a_newer_peer_are_understood_as_unknown() {
    let newer = r#"{"type":"teleport","to":"mars"}"#;
    assert_eq!(serde_json::from_str::<HostMessage>(newer).unwrap(), HostMessage::Unknown);
    assert_eq!(serde_json::from_str::<GuestMessage>(newer).unwrap(), GuestMessage::Unknown);
    let extra = r#"{"type":"exec","argv":["true"],"priority":3}"#;
    let HostMessage::Exec(exec) = serde_json::from_str(extra).unwrap() else { panic!() };
    assert_eq!(exec.argv, ["true"]);
    let logs = r#"{"type":"logs","source":"journal"}"#;
    assert_eq!(
        serde_json::from_str::<HostMessage>(logs).unwrap(),
        HostMessage::Logs { source: LogSource::Unknown, follow: false }
    );
}

#[test]
fn an_older_hello_still_parses() {
    let hello: Hello = serde_json::from_str(r#"{"agent_version":"0.0.1"}"#).unwrap();
    assert_eq!(hello.agent_version, "0.0.1");
    assert!(!hello.configured);
}
