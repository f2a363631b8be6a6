use super::*;

#[test]
fn a_preamble_is_found_behind_and_between_garbage() {
    let preamble = Preamble { magic: GUEST_MAGIC, nonce: [9; 16], version: 1, max_version: 3 };
    let other = Preamble { nonce: [8; 16], ..preamble };
    let mut buffer = vec![0, 77, 86];
    buffer.extend(other.encode());
    buffer.extend([0; 100]);
    buffer.extend(preamble.encode());
    buffer.extend(b"after");
    assert_eq!(Preamble::scan(&mut buffer, GUEST_MAGIC, Some([9; 16])), Some(preamble));
    assert_eq!(buffer, b"after");
}

#[test]
fn a_preamble_in_pieces_is_found_and_garbage_does_not_pile_up() {
    let preamble = Preamble { magic: HOST_MAGIC, nonce: [3; 16], version: 1, max_version: 1 };
    let mut bytes = vec![0; 1000];
    bytes.extend(preamble.encode());
    let mut buffer = Vec::new();
    let mut found = None;
    for piece in bytes.chunks(7) {
        buffer.extend(piece);
        found = found.or(Preamble::scan(&mut buffer, HOST_MAGIC, None));
        assert!(buffer.len() < PREAMBLE_LEN + 7);
    }
    assert_eq!(found, Some(preamble));
}

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
