//! A pool's spec as it is shown: a newer agent's may have fields with values that this program does not
//! know, which are kept aside as they came.

use std::collections::BTreeMap;
use std::ops::Deref;

use mvm_core::spec::PoolSpec;
use serde::de::Error as _;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// A spec that is shown. It reads like a [`PoolSpec`]; what is not known of it has its default there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShownSpec {
    spec: PoolSpec,
    unknown: BTreeMap<String, Value>,
}

impl ShownSpec {
    /// The spec, without what is not known of it.
    pub fn into_known(self) -> PoolSpec {
        self.spec
    }

    /// The fields whose values are not known.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        self.unknown.keys().map(String::as_str)
    }
}

impl Deref for ShownSpec {
    type Target = PoolSpec;

    fn deref(&self) -> &PoolSpec {
        &self.spec
    }
}

impl From<PoolSpec> for ShownSpec {
    fn from(spec: PoolSpec) -> Self {
        Self { spec, unknown: BTreeMap::new() }
    }
}

impl Serialize for ShownSpec {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if self.unknown.is_empty() {
            return self.spec.serialize(to);
        }
        let mut fields = serde_json::to_value(&self.spec).map_err(S::Error::custom)?;
        for (name, value) in &self.unknown {
            fields[name] = value.clone();
        }
        fields.serialize(to)
    }
}

impl<'de> Deserialize<'de> for ShownSpec {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let fields = Map::deserialize(from)?;
        let parse = |fields: Map<String, Value>| PoolSpec::deserialize(Value::Object(fields));
        if let Ok(spec) = parse(fields.clone()) {
            return Ok(spec.into());
        }
        let is_known = |name: &str, value: &Value| {
            parse(Map::from_iter([(name.to_owned(), value.clone())])).is_ok()
        };
        let (known, unknown): (Vec<_>, Vec<_>) =
            fields.into_iter().partition(|(name, value)| is_known(name, value));
        let spec = parse(known.into_iter().collect()).map_err(D::Error::custom)?;
        Ok(Self { spec, unknown: unknown.into_iter().collect() })
    }
}

#[cfg(test)]
mod tests {
    use mvm_core::spec::RestartPolicy;

    use super::*;

    #[test]
    fn a_value_that_is_not_known_leaves_the_rest_readable_and_is_passed_on() {
        let mut sent = serde_json::to_value(PoolSpec { vcpus: 3, ..PoolSpec::default() }).unwrap();
        sent["restart"] = "on-tuesdays".into();
        sent["numa_node"] = 1.into();
        let shown: ShownSpec = serde_json::from_value(sent.clone()).unwrap();
        assert_eq!((shown.vcpus, shown.restart), (3, RestartPolicy::default()));
        assert_eq!(shown.unknown().collect::<Vec<_>>(), ["restart"]);
        sent.as_object_mut().unwrap().remove("numa_node");
        assert_eq!(serde_json::to_value(&shown).unwrap(), sent);
    }

    #[test]
    fn a_spec_is_shown_as_it_is() {
        let spec = PoolSpec { ready: 4, ..PoolSpec::default() };
        let shown: ShownSpec = spec.clone().into();
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!(json, serde_json::to_value(&spec).unwrap());
        assert_eq!(*serde_json::from_value::<ShownSpec>(json).unwrap(), spec);
    }
}
