//! What one side of the contract makes of the other side's newer words: `docs/versions.md` names these tests.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::path::PathBuf;

use mvm_wire::view::{
    CollectedView, DiskView, ImageView, InstanceView, NodeView, PoolView, RecordView, StatsView,
    TenantView, VerifyView, WhyView,
};
use mvm_wire::{ApiError, Call, ErrorCode, Reply};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// What no program knows yet.
const NEWER: &str = "from-the-future";
/// Fields whose values have a form that is part of the contract: paths, ids, addresses and numbers.
const OF_A_FORM: [&str; 8] =
    ["path", "id", "revision", "address", "mac", "gateway", "instance", "pools"];

/// Whether a view is read, from JSON.
type Reads = fn(Value) -> bool;

fn reads<V: DeserializeOwned>(view: Value) -> bool {
    serde_json::from_value::<V>(view).is_ok()
}

fn examples() -> Vec<(&'static str, Value, Reads)> {
    let schema = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/schema");
    let views: [(&str, Reads); 11] = [
        ("tenant", reads::<TenantView>),
        ("pool", reads::<PoolView>),
        ("instance", reads::<InstanceView>),
        ("disk", reads::<DiskView>),
        ("image", reads::<ImageView>),
        ("collected", reads::<CollectedView>),
        ("node", reads::<NodeView>),
        ("stats", reads::<StatsView>),
        ("why", reads::<WhyView>),
        ("verify", reads::<VerifyView>),
        ("record", reads::<RecordView>),
    ];
    let example = |(name, reads)| {
        let text = std::fs::read_to_string(schema.join(format!("{name}.json"))).unwrap();
        (name, serde_json::from_str(&text).unwrap(), reads)
    };
    views.map(example).into()
}

/// The JSON pointers of everything within a value, itself included.
fn pointers(value: &Value, pointer: &str, found: &mut Vec<String>) {
    found.push(pointer.to_owned());
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let name = name.replace('~', "~0").replace('/', "~1");
                pointers(field, &format!("{pointer}/{name}"), found);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                pointers(item, &format!("{pointer}/{index}"), found);
            }
        }
        _ => {}
    }
}

fn all_pointers(value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    pointers(value, "", &mut found);
    found
}

#[test]
fn a_view_with_more_fields_is_read_wherever_they_are() {
    let mut unreadable = Vec::new();
    // Their fields are names that people gave, each with a value of the same kind.
    let maps = ["/env", "/sysctl", "/ulimit", "/vmm_counters", "/init_links"];
    for (name, example, reads) in examples() {
        for pointer in all_pointers(&example) {
            let mut newer = example.clone();
            let Some(Value::Object(fields)) = newer.pointer_mut(&pointer) else { continue };
            fields.insert("from_the_future".to_owned(), json!({"a": [1]}));
            let is_map = maps.iter().any(|map| pointer.ends_with(map));
            if !is_map && !reads(newer) {
                unreadable.push(format!("{name}{pointer}"));
            }
        }
    }
    assert!(unreadable.is_empty(), "{unreadable:#?}");
}

#[test]
fn a_word_that_is_not_known_never_makes_a_view_unreadable() {
    let mut unreadable = Vec::new();
    for (name, example, reads) in examples() {
        for pointer in all_pointers(&example) {
            let mut newer = example.clone();
            let word = newer.pointer_mut(&pointer).unwrap();
            if !word.is_string() {
                continue;
            }
            *word = NEWER.into();
            let is_of_a_form =
                pointer.split('/').rev().take(2).any(|part| OF_A_FORM.contains(&part));
            if !is_of_a_form && !reads(newer) {
                unreadable.push(format!("{name}{pointer}"));
            }
        }
    }
    assert!(unreadable.is_empty(), "{unreadable:#?}");
}

#[test]
fn every_kind_of_reply_may_have_more_in_it() {
    for reply in [
        json!({"reply": "done", "took_ms": 1}),
        json!({"reply": "accepted", "body": {"revision": 1, "instances": [], "pools": [],
            "notes": [], "trace": "x"}}),
        json!({"reply": "instances", "body": {"instances": [], "more": false, "total": 0}}),
        json!({"reply": "connected", "body": {"instance": "a/b/i-00000001", "node": "n"}}),
        json!({"reply": "exec_exit", "body": {"how": "exited", "code": 1, "took_ms": 3}}),
        json!({"reply": "error", "body": {"code": "over_heated", "message": "m", "trace": "x"}}),
    ] {
        let text = reply.to_string();
        assert!(serde_json::from_str::<Reply>(&text).is_ok(), "{text}");
    }
    let error = json!({"code": "over_heated", "message": "too hot"});
    assert_eq!(serde_json::from_value::<ApiError>(error).unwrap().code, ErrorCode::Unknown);
}

#[test]
fn a_call_of_a_newer_caller_is_known_as_such_and_one_with_more_in_it_is_read() {
    for newer in [json!({"call": "teleport"}), json!({"call": "teleport", "to": {"planet": 4}})] {
        assert_eq!(serde_json::from_value::<Call>(newer).unwrap(), Call::Unknown);
    }
    for call in [
        json!({"call": "node", "verbose": true}),
        json!({"call": "instances", "selector": "all", "sort": "name"}),
        json!({"call": "watch", "instances": [], "pools": [], "tenant": null, "images": []}),
    ] {
        let text = call.to_string();
        assert_ne!(serde_json::from_value::<Call>(call).unwrap(), Call::Unknown, "{text}");
    }
}

#[test]
fn what_is_asked_for_and_not_known_is_refused_by_name() {
    for (request, unknown) in [
        (json!({"request": "pool_build", "path": "a/b", "when": "now"}), "field `when`"),
        (json!({"request": "pool_create", "path": "a/b", "spec": {"numa": 1}}), "field `numa`"),
        (json!({"request": "pool_hibernate", "path": "a/b"}), "variant `pool_hibernate`"),
    ] {
        let mut call = request;
        call["call"] = "submit".into();
        let error = serde_json::from_value::<Call>(call).unwrap_err().to_string();
        assert!(error.starts_with(&format!("unknown {unknown}")), "{error}");
    }
}

/// The requests of the first release, one a line. They are read, and written as they were: a field that
/// comes later is left out when it asks for nothing, so that an older agent refuses only who uses it.
#[test]
fn the_requests_of_the_first_release_are_read_and_written_as_they_were() {
    let text = include_str!("requests.jsonl");
    for line in text.lines() {
        let written: Value = serde_json::from_str(line).unwrap();
        let call: Call = serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        assert_eq!(serde_json::to_value(&call).unwrap(), written, "left: written today");
    }
}
