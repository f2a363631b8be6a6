//! Commands against an agent of another version: `docs/versions.md` names these tests.

use serde_json::{Value, json};

use super::*;

/// An agent that answers with this text, whatever it is asked.
fn saying(reply: &Value) -> FakeAgent {
    let mut frame = Vec::new();
    let body = reply.to_string();
    mvm_core::frame::encode(
        mvm_wire::connection::TAG,
        0,
        mvm_core::frame::KIND_MESSAGE,
        body.as_bytes(),
        &mut frame,
    );
    FakeAgent::new(move |_| vec![Act::Bytes(frame.clone())])
}

fn instance() -> Value {
    serde_json::to_value(samples::instance(INSTANCE)).unwrap()
}

fn pool() -> Value {
    serde_json::to_value(samples::pool("demo/hello")).unwrap()
}

#[test]
fn ps_shows_what_a_newer_agent_says_as_unknown_beside_the_rest() {
    let mut newer = instance();
    newer["path"] = "demo/hello/i-00000002".into();
    newer["state"] = "hibernating".into();
    newer["purpose"] = "canary".into();
    newer["desired"] = "hibernated".into();
    newer["vmm"] = "crosvm".into();
    newer["restart"] = "on-tuesdays".into();
    newer["waiting"] = json!({"waiting": "moonlight", "phase": 3});
    newer["last_death"] = json!({"cause": "cosmic_ray", "at_unix_ms": 1});
    newer["cell"] = json!({"of": "a newer agent"});
    let body = json!({"instances": [instance(), newer], "more": false, "total": 2});
    let agent = saying(&json!({"reply": "instances", "body": body}));

    let ran = run(&agent, "ps -a");
    assert_eq!(ran.code, 0, "{}", ran.talk);
    assert!(ran.data.contains("i-00000001") && ran.data.contains("running"), "{}", ran.data);
    assert!(ran.data.contains("i-00000002") && ran.data.contains("unknown"), "{}", ran.data);

    let ran = run_with(&agent, Format::Json, "ps -a");
    let views: Value = serde_json::from_str(&ran.data).unwrap();
    assert_eq!(views[1]["vmm"], "crosvm", "programs get what the agent said: {views}");
    assert_eq!(views[1]["state"], "unknown");
}

#[test]
fn a_pool_of_a_newer_agent_is_shown_with_what_is_known_of_it() {
    let mut newer = pool();
    newer["restart"] = "on-tuesdays".into();
    newer["build"] = json!({"state": "mirroring", "from": "elsewhere"});
    newer["numa_node"] = 1.into();
    let agent = saying(&json!({"reply": "pools", "body": [newer]}));
    let ran = run(&agent, "pool info demo/hello");
    assert_eq!(ran.code, 0, "{}", ran.talk);
    let restart = ran.data.lines().find(|line| line.starts_with("restart:")).unwrap();
    assert!(restart.ends_with(" unknown"), "{restart}");
    let ran = run_with(&agent, Format::Json, "pool info demo/hello");
    assert!(ran.data.contains("on-tuesdays"), "{}", ran.data);
    assert_eq!(run(&agent, "pool list").code, 0);
}

#[test]
fn an_agent_that_does_not_know_a_call_says_what_to_do() {
    let error = ApiError::new(ErrorCode::Unsupported, "this agent does not know the call")
        .hint("the agent may be older than the command");
    let agent = FakeAgent::new(move |_| vec![Act::Reply(Reply::Error(error.clone()))]);
    let ran = run(&agent, "ps");
    assert_eq!(ran.code, 1);
    let expected =
        "error: this agent does not know the call\nhint: the agent may be older than the command";
    assert_eq!(ran.talk, expected);
}

#[test]
fn an_error_of_a_class_that_is_not_known_is_an_error_with_its_words() {
    let error = json!({"code": "over_heated", "message": "too hot", "hint": "wait", "degrees": 90});
    let agent = saying(&json!({"reply": "error", "body": error}));
    let ran = run(&agent, "ps");
    assert_eq!((ran.code, ran.talk.as_str()), (1, "error: too hot\nhint: wait"));
}

#[test]
fn a_reply_of_a_newer_kind_is_an_error_that_names_it() {
    let agent = saying(&json!({"reply": "hologram", "body": {}}));
    let ran = run(&agent, "ps");
    assert_ne!(ran.code, 0);
    assert!(ran.talk.contains("hologram"), "{}", ran.talk);
}
