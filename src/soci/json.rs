//! JSON as Go's `encoding/json` reads and writes it, the basis of SOCI's documents.
//!
//! Reading is more lenient than serde's: keys match in any case, a repeated key is applied over the first one, `null` changes nothing, and
//! bytes that are not UTF-8 are replaced. Writing escapes more: `<`, `>`, `&` and the two Unicode line separators.

use std::{collections::BTreeMap, fmt, io};

use serde::{
    Deserialize, Serialize,
    de::{Deserializer, MapAccess, SeqAccess, Visitor},
};
use serde_json::ser::{CompactFormatter, Formatter};

/// A JSON value whose objects keep their keys in order, repeated ones too.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Null,
    Bool,
    /// A value that fits a Go `int64`.
    Integer(i64),
    /// Any other number.
    Number,
    Text(String),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

/// A value of the wrong type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found} at {field:?}, expected {expected}")]
pub struct TypeError {
    field: &'static str,
    found: &'static str,
    expected: &'static str,
}

/// Parses a document. Its depth is bounded by serde_json, its size by the caller.
pub(super) fn parse(bytes: &[u8]) -> Result<Node, serde_json::Error> {
    serde_json::from_str(&String::from_utf8_lossy(bytes))
}

impl Node {
    fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "a boolean",
            Self::Integer(_) => "a number",
            Self::Number => "a number that is not a 64-bit integer",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }

    fn mismatch(&self, field: &'static str, expected: &'static str) -> TypeError {
        TypeError {
            field,
            found: self.kind(),
            expected,
        }
    }

    /// The fields of an object; none for `null`.
    pub(super) fn fields(&self, field: &'static str) -> Result<&[(String, Node)], TypeError> {
        match self {
            Self::Null => Ok(&[]),
            Self::Object(fields) => Ok(fields),
            other => Err(other.mismatch(field, "an object")),
        }
    }

    /// Sets a string, unless this is `null`.
    pub(super) fn read_text(
        &self,
        field: &'static str,
        into: &mut String,
    ) -> Result<(), TypeError> {
        match self {
            Self::Null => {}
            Self::Text(text) => into.clone_from(text),
            other => return Err(other.mismatch(field, "a string")),
        }
        Ok(())
    }

    /// Sets an integer, unless this is `null`.
    pub(super) fn read_integer(
        &self,
        field: &'static str,
        into: &mut i64,
    ) -> Result<(), TypeError> {
        match self {
            Self::Null => {}
            Self::Integer(number) => *into = *number,
            other => return Err(other.mismatch(field, "a 64-bit integer")),
        }
        Ok(())
    }

    /// The elements of a list; none for `null`.
    pub(super) fn elements(&self, field: &'static str) -> Result<&[Node], TypeError> {
        match self {
            Self::Null => Ok(&[]),
            Self::List(elements) => Ok(elements),
            other => Err(other.mismatch(field, "a list")),
        }
    }

    /// Adds the entries of a map of strings; `null` empties it.
    pub(super) fn read_map(
        &self,
        field: &'static str,
        into: &mut BTreeMap<String, String>,
    ) -> Result<(), TypeError> {
        if matches!(self, Self::Null) {
            into.clear();
        }
        for (key, value) in self.fields(field)? {
            let mut text = String::new();
            value.read_text(field, &mut text)?;
            into.insert(key.clone(), text);
        }
        Ok(())
    }
}

/// Whether this key is for this field. Go folds all of Unicode here; the names of SOCI are ASCII.
pub(super) fn names(key: &str, field: &str) -> bool {
    key.eq_ignore_ascii_case(field)
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Nodes;

        impl<'de> Visitor<'de> for Nodes {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }

            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
                Ok(Node::Bool)
            }

            fn visit_i64<E>(self, number: i64) -> Result<Node, E> {
                Ok(Node::Integer(number))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Node, E> {
                Ok(i64::try_from(number).map_or(Node::Number, Node::Integer))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
                Ok(Node::Number)
            }

            fn visit_str<E>(self, text: &str) -> Result<Node, E> {
                Ok(Node::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = list.next_element()? {
                    elements.push(element);
                }
                Ok(Node::List(elements))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Node::Object(fields))
            }
        }

        deserializer.deserialize_any(Nodes)
    }
}

/// Writes a document as Go's `json.Marshal` does: compact, with its escapes. Field order is that of the structure.
pub(super) fn to_vec(document: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, GoFormatter);
    document.serialize(&mut serializer)?;
    Ok(bytes)
}

/// Go's escapes on top of serde_json's.
struct GoFormatter;

impl Formatter for GoFormatter {
    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let escaped = |c: char| matches!(c, '<' | '>' | '&' | '\u{2028}' | '\u{2029}');
        let mut rest = fragment;
        while let Some(position) = rest.find(escaped) {
            let (plain, from) = rest.split_at(position);
            CompactFormatter.write_string_fragment(writer, plain)?;
            let mut characters = from.chars();
            if let Some(c) = characters.next() {
                write!(writer, "\\u{:04x}", u32::from(c))?;
            }
            rest = characters.as_str();
        }
        CompactFormatter.write_string_fragment(writer, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_written_as_go_writes_them() {
        let text = "a<b>&\u{2028}\u{2029}\"\\/\u{8}\u{c}\n\r\t\u{1}\u{7f}ü";
        assert_eq!(
            String::from_utf8(to_vec(&text).unwrap()).unwrap(),
            "\"a\\u003cb\\u003e\\u0026\\u2028\\u2029\\\"\\\\/\\b\\f\\n\\r\\t\\u0001\u{7f}ü\""
        );
        assert_eq!(
            to_vec(&BTreeMap::from([("<", 1)])).unwrap(),
            br#"{"\u003c":1}"#
        );
    }

    #[test]
    fn numbers_are_integers_of_64_bits_or_not() {
        for (text, expected) in [
            ("9223372036854775807", Some(i64::MAX)),
            ("-9223372036854775808", Some(i64::MIN)),
            ("9223372036854775808", None),
            ("1.0", None),
            ("1e2", None),
            ("null", Some(7)),
        ] {
            let mut number = 7;
            let read = parse(text.as_bytes())
                .unwrap()
                .read_integer("n", &mut number);
            assert_eq!(read.ok().map(|()| number), expected, "{text}");
        }
    }

    #[test]
    fn depth_is_bounded() {
        assert!(parse("[".repeat(1_000_000).as_bytes()).is_err());
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse(deep.as_bytes()).is_err());
    }
}
