//! The documented examples of `docs/schema` have exactly the fields of the views.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::path::PathBuf;

use mvm_wire::view::{
    CollectedView, DiskView, ImageView, InstanceView, NodeView, PoolView, RecordView, StatsView,
    TenantView, VerifyView, WhyView,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn schema() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/schema")
}

/// An example is read as the view and written again: a field that is missing, new or renamed on
/// either side makes a difference.
fn assert_documented<V: DeserializeOwned + Serialize>(name: &str) {
    let file = schema().join(format!("{name}.json"));
    let text = std::fs::read_to_string(&file).unwrap();
    let example: Value = serde_json::from_str(&text).unwrap();
    let view: V = serde_json::from_value(example.clone())
        .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let written = serde_json::to_value(&view).unwrap();
    assert_eq!(written, example, "left: the view, right: {}", file.display());
    assert_whole::<V>(name, &example);
}

/// A field without a value is written as such, never left out.
fn assert_whole<V: DeserializeOwned + Serialize>(name: &str, example: &Value) {
    for path in fields(example, "") {
        for nothing in [Value::Null, json!([]), json!({}), json!(false), json!(0)] {
            let mut without = example.clone();
            *without.pointer_mut(&path).unwrap() = nothing.clone();
            let Ok(view) = serde_json::from_value::<V>(without) else { continue };
            let written = serde_json::to_value(&view).unwrap();
            assert!(written.pointer(&path).is_some(), "{name}: {path} is left out if {nothing}");
        }
    }
}

/// The JSON pointers of all fields, those of objects within lists left out.
fn fields(value: &Value, prefix: &str) -> Vec<String> {
    let Value::Object(object) = value else { return Vec::new() };
    let mut found = Vec::new();
    for (key, value) in object {
        let path = format!("{prefix}/{}", key.replace('~', "~0").replace('/', "~1"));
        found.extend(fields(value, &path));
        found.push(path);
    }
    found
}

#[test]
fn the_documented_fields_are_those_that_programs_get() {
    assert_documented::<TenantView>("tenant");
    assert_documented::<PoolView>("pool");
    assert_documented::<InstanceView>("instance");
    assert_documented::<DiskView>("disk");
    assert_documented::<ImageView>("image");
    assert_documented::<CollectedView>("collected");
    assert_documented::<NodeView>("node");
    assert_documented::<StatsView>("stats");
    assert_documented::<WhyView>("why");
    assert_documented::<VerifyView>("verify");
    assert_documented::<RecordView>("record");
}

#[test]
fn every_example_is_in_the_table() {
    let table = std::fs::read_to_string(schema().join("README.md")).unwrap();
    for entry in std::fs::read_dir(schema()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name == "README.md" || table.contains(&format!("({name})")), "{name}");
    }
}
