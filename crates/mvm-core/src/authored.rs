//! What people and programs write, documents and requests, is read strictly: a field that is not known
//! is refused by name, because to ignore it would be to do something else than was asked.
//!
//! Strictness belongs to the reading and not to the types: a [`PoolSpec`](crate::spec::PoolSpec) in a
//! document is the one of a record, which a newer release may have written with more in it, and is read
//! tolerantly there. `Document` and the specs of a [`Request`](crate::admit::Request) are read through
//! here; nothing else is.

use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, VariantAccess, Visitor,
};
use serde::{Deserialize, Serialize, Serializer, forward_to_deserialize_any};
use serde_json::Value;

/// Reads what somebody wrote; `with = "authored"` of a field.
///
/// # Errors
/// It has a field that is not known, at any depth, or does not parse.
pub(crate) fn deserialize<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(Strict(from))
}

/// Writes what somebody asked for, to be read with [`deserialize`]: a field that asks for nothing (it is
/// empty, and so is its default) is left out, so that an agent that does not know it refuses only those
/// who use it.
pub(crate) fn serialize<S, T>(value: &T, to: S) -> Result<S::Ok, S::Error>
where
    S: Serializer,
    T: Serialize + Default,
{
    let text = |value: &T| serde_json::to_value(value).map_err(serde::ser::Error::custom);
    let mut written = text(value)?;
    leave_out_empty(&mut written, &text(&T::default())?);
    written.serialize(to)
}

fn leave_out_empty(value: &mut Value, default: &Value) {
    let (Value::Object(fields), Value::Object(defaults)) = (value, default) else { return };
    fields.retain(|name, field| defaults.get(name) != Some(field) || !is_empty(field));
    for (name, field) in fields {
        leave_out_empty(field, defaults.get(name).unwrap_or(&Value::Null));
    }
}

/// Leaves out what is not said, in a document.
pub(crate) fn leave_out_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(leave_out_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(leave_out_nulls),
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(is_set) => !is_set,
        Value::Number(number) => number.as_u64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// Reads the same as what it wraps, and refuses fields that a struct does not have.
pub(crate) struct Strict<D>(pub(crate) D);

macro_rules! forward_to_inner {
    ($($method:ident),+ $(,)?) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
            self.0.$method(Within { visitor, fields: None })
        }
    )+};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Strict<D> {
    type Error = D::Error;

    forward_to_inner!(
        deserialize_any,
        deserialize_bool,
        deserialize_i8,
        deserialize_i16,
        deserialize_i32,
        deserialize_i64,
        deserialize_i128,
        deserialize_u8,
        deserialize_u16,
        deserialize_u32,
        deserialize_u64,
        deserialize_u128,
        deserialize_f32,
        deserialize_f64,
        deserialize_char,
        deserialize_str,
        deserialize_string,
        deserialize_bytes,
        deserialize_byte_buf,
        deserialize_option,
        deserialize_unit,
        deserialize_seq,
        deserialize_map,
        deserialize_identifier,
        deserialize_ignored_any,
    );

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_unit_struct(name, Within { visitor, fields: None })
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_newtype_struct(name, Within { visitor, fields: None })
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_tuple(len, Within { visitor, fields: None })
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_tuple_struct(name, len, Within { visitor, fields: None })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_struct(name, fields, Within { visitor, fields: Some(fields) })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_enum(name, variants, Within { visitor, fields: None })
    }

    fn is_human_readable(&self) -> bool {
        self.0.is_human_readable()
    }
}

/// What is inside a value; of a struct, with its fields.
struct Within<T> {
    visitor: T,
    fields: Option<&'static [&'static str]>,
}

macro_rules! forward_to_visitor {
    ($($method:ident: $type:ty),+ $(,)?) => {$(
        fn $method<E: Error>(self, value: $type) -> Result<V::Value, E> {
            self.visitor.$method(value)
        }
    )+};
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Within<V> {
    type Value = V::Value;

    forward_to_visitor!(
        visit_bool: bool,
        visit_i8: i8,
        visit_i16: i16,
        visit_i32: i32,
        visit_i64: i64,
        visit_i128: i128,
        visit_u8: u8,
        visit_u16: u16,
        visit_u32: u32,
        visit_u64: u64,
        visit_u128: u128,
        visit_f32: f32,
        visit_f64: f64,
        visit_char: char,
        visit_str: &str,
        visit_borrowed_str: &'de str,
        visit_string: String,
        visit_bytes: &[u8],
        visit_borrowed_bytes: &'de [u8],
        visit_byte_buf: Vec<u8>,
    );

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.visitor.expecting(f)
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.visitor.visit_none()
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.visitor.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_some(Strict(from))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, from: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_newtype_struct(Strict(from))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_seq(Parts { parts: items, fields: None })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_map(Parts { parts: map, fields: self.fields })
    }

    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_enum(Parts { parts: variant, fields: None })
    }
}

/// The parts of a value.
struct Parts<T> {
    parts: T,
    fields: Option<&'static [&'static str]>,
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Parts<A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        self.parts.next_element_seed(Part(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.parts.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Parts<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        match self.fields {
            Some(fields) => self.parts.next_key_seed(FieldName { of: seed, fields }),
            None => self.parts.next_key_seed(seed),
        }
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.parts.next_value_seed(Part(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.parts.size_hint()
    }
}

impl<'de, A: EnumAccess<'de>> EnumAccess<'de> for Parts<A> {
    type Error = A::Error;
    type Variant = Parts<A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Self::Variant), A::Error> {
        let (name, variant) = self.parts.variant_seed(seed)?;
        Ok((name, Parts { parts: variant, fields: None }))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Parts<A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.parts.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        self.parts.newtype_variant_seed(Part(seed))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        self.parts.tuple_variant(len, Within { visitor, fields: None })
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        self.parts.struct_variant(fields, Within { visitor, fields: Some(fields) })
    }
}

struct Part<S>(S);

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Part<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(Strict(from))
    }
}

/// The name of a field of a struct that has these. The parser knows the place of what is refused here.
struct FieldName<T> {
    of: T,
    fields: &'static [&'static str],
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for FieldName<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<S::Value, D::Error> {
        self.of.deserialize(FieldName { of: from, fields: self.fields })
    }
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for FieldName<D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.of.deserialize_identifier(FieldName { of: visitor, fields: self.fields })
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<T> FieldName<T> {
    fn check<E: Error>(&self, name: &str) -> Result<(), E> {
        match self.fields.contains(&name) {
            true => Ok(()),
            false => Err(E::unknown_field(name, self.fields)),
        }
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for FieldName<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.of.expecting(f)
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<V::Value, E> {
        self.check(name)?;
        self.of.visit_str(name)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<V::Value, E> {
        self.of.visit_u64(number)
    }

    fn visit_bytes<E: Error>(self, name: &[u8]) -> Result<V::Value, E> {
        self.check(&String::from_utf8_lossy(name))?;
        self.of.visit_bytes(name)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    struct Inner {
        #[serde(alias = "numbers")]
        number: u32,
        seconds: Option<u32>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Kind {
        Plain,
        With(Inner),
        Fields { inner: Inner },
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    struct Outer {
        list: Vec<Inner>,
        map: BTreeMap<String, Inner>,
        maybe: Option<Box<Inner>>,
        kind: Option<Kind>,
    }

    fn strictly(text: &str) -> Result<Outer, serde_json::Error> {
        deserialize(&mut serde_json::Deserializer::from_str(text))
    }

    #[test]
    fn an_unknown_field_is_refused_at_any_depth_and_ignored_elsewhere() {
        for text in [
            r#"{"new":1}"#,
            r#"{"list":[{"number":1},{"new":1}]}"#,
            r#"{"map":{"a":{"new":1}}}"#,
            r#"{"maybe":{"new":1}}"#,
            r#"{"kind":{"with":{"new":1}}}"#,
            r#"{"kind":{"fields":{"inner":{"new":1}}}}"#,
            r#"{"kind":{"fields":{"new":1,"inner":{}}}}"#,
        ] {
            let error = strictly(text).unwrap_err().to_string();
            assert!(error.starts_with("unknown field `new`, expected"), "{text}: {error}");
            assert!(serde_json::from_str::<Outer>(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn what_is_known_is_read_as_ever() {
        for text in [
            "{}",
            r#"{"list":[{"numbers":1,"seconds":2}],"map":{"new":{"number":3}},"maybe":null}"#,
            r#"{"maybe":{"number":1},"kind":"plain"}"#,
            r#"{"kind":{"with":{"number":1}}}"#,
        ] {
            let expected: Outer = serde_json::from_str(text).unwrap();
            assert_eq!(strictly(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn only_what_asks_for_nothing_is_left_out() {
        #[derive(Serialize)]
        struct Sent(#[serde(serialize_with = "serialize")] Asked);
        #[derive(Clone, Serialize)]
        struct Asked {
            count: u32,
            fresh: Option<u32>,
            inner: BTreeMap<String, u32>,
        }
        impl Default for Asked {
            fn default() -> Self {
                Self { count: 1, fresh: None, inner: [("zero".to_owned(), 0)].into() }
            }
        }
        let sent = |asked: &Asked| serde_json::to_string(&Sent(asked.clone())).unwrap();
        assert_eq!(sent(&Asked::default()), r#"{"count":1,"inner":{}}"#);
        let asked = Asked { count: 0, fresh: Some(0), inner: BTreeMap::default() };
        assert_eq!(sent(&asked), r#"{"count":0,"fresh":0,"inner":{}}"#, "0 was asked for");
    }
}
