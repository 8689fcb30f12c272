//! Docker's `config.json`, read as Go reads JSON: an empty file and nulls are empty, field names are case-insensitive, data after the
//! first value is ignored, and base64 may contain line ends.

use std::collections::BTreeMap;

use base64::Engine as _;
use serde::Deserialize as _;
use serde_json::{Map, Value};

use crate::oci::reference::DOCKER_HUB;

/// The credentials for a registry or its token service. There is no `Debug`: they must not reach a log.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum Credentials {
    /// Name and password.
    Password { user: String, password: String },
    /// A refresh token of the registry's token service.
    IdentityToken(String),
    /// A token for the registry itself.
    RegistryToken(String),
}

/// A file's content.
#[derive(Debug, Default)]
pub(crate) struct Config {
    auths: Map<String, Value>,
    /// The helper for all registries without their own; empty if there is none.
    pub(super) creds_store: String,
    /// Helpers by registry.
    pub(super) cred_helpers: BTreeMap<String, String>,
}

/// Why a file cannot be read. It contains no text of the file, which is secret.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("line {line}, column {column}")]
    NotJson { line: usize, column: usize },
    #[error("its {0} is malformed")]
    Field(&'static str),
}

impl Config {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Unreadable> {
        // Windows' editors put the mark there
        let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(Self::default());
        }
        let mut first = serde_json::Deserializer::from_slice(bytes);
        let file = match Value::deserialize(&mut first) {
            Ok(Value::Null) => return Ok(Self::default()),
            Ok(Value::Object(file)) => file,
            Ok(_) => return Err(Unreadable::NotJson { line: 1, column: 1 }),
            Err(error) => {
                return Err(Unreadable::NotJson {
                    line: error.line(),
                    column: error.column(),
                });
            }
        };
        let creds_store = text(&file, "credsStore").ok_or(Unreadable::Field("credsStore"))?;
        let auths = object(&file, "auths").ok_or(Unreadable::Field("auths"))?;
        let helpers = object(&file, "credHelpers").ok_or(Unreadable::Field("credHelpers"))?;
        let mut cred_helpers = BTreeMap::new();
        for (registry, helper) in helpers {
            let helper = match helper {
                Value::Null => String::new(),
                Value::String(helper) => helper,
                _ => return Err(Unreadable::Field("credHelpers")),
            };
            cred_helpers.insert(registry, helper);
        }
        Ok(Self {
            auths,
            creds_store,
            cred_helpers,
        })
    }

    /// Names of the entries with credentials.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.auths.keys().map(String::as_str)
    }

    /// The credentials of an entry. `None` if the entry is empty: a helper has its credentials. Other entries are not parsed.
    pub(crate) fn credentials(&self, name: &str) -> Result<Option<Credentials>, &'static str> {
        let entry = match self.auths.get(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(entry)) => entry,
            Some(_) => return Err("it is not an object"),
        };
        let given = |field| text(entry, field).ok_or("one of its fields is not text");
        let token = given("registrytoken")?;
        if !token.is_empty() {
            return Ok(Some(Credentials::RegistryToken(token)));
        }
        let token = given("identitytoken")?;
        if !token.is_empty() {
            return Ok(Some(Credentials::IdentityToken(token)));
        }
        let auth = given("auth")?;
        if !auth.is_empty() {
            return decode(&auth).map(Some);
        }
        let (user, password) = (given("username")?, given("password")?);
        Ok((!user.is_empty() && !password.is_empty())
            .then_some(Credentials::Password { user, password }))
    }
}

/// Whether a key of the file names this host: `host`, `https://host`, `https://host/v1/`.
pub(super) fn is_host(key: &str, host: &str) -> bool {
    let bare = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"));
    let name = match bare {
        Some(bare) => bare.split('/').next().unwrap_or(bare),
        None => key,
    };
    name == host || host == DOCKER_HUB && matches!(name, "index.docker.io" | "registry-1.docker.io")
}

/// Name and password of an `auth`.
pub(super) fn decode(auth: &str) -> Result<Credentials, &'static str> {
    let letters: String = auth
        .trim()
        .chars()
        .filter(|letter| !matches!(letter, '\r' | '\n'))
        .collect();
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(letters)
        .map_err(|_| "its auth is not base64")?;
    let text = String::from_utf8(bytes).map_err(|_| "its auth is not UTF-8")?;
    let (user, password) = text
        .split_once(':')
        .filter(|(user, _)| !user.is_empty())
        .ok_or("its auth is not USER:PASSWORD")?;
    Ok(Credentials::Password {
        user: user.to_owned(),
        // Docker's own files may have NUL bytes around it
        password: password.trim_matches('\0').to_owned(),
    })
}

/// A field by its name, else by its name in another case.
fn field<'a>(object: &'a Map<String, Value>, name: &str) -> &'a Value {
    object
        .get(name)
        .or_else(|| {
            let mut fields = object.iter();
            let found = fields.find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value)
        })
        .unwrap_or(&Value::Null)
}

/// A string; empty if it is missing, `None` if it has another type.
fn text(object: &Map<String, Value>, name: &str) -> Option<String> {
    match field(object, name) {
        Value::Null => Some(String::new()),
        Value::String(text) => Some(text.clone()),
        _ => None,
    }
}

/// An object; empty if it is missing, `None` if it has another type.
fn object(object: &Map<String, Value>, name: &str) -> Option<Map<String, Value>> {
    match field(object, name) {
        Value::Null => Some(Map::new()),
        Value::Object(fields) => Some(fields.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_hold_nothing_are_read() {
        for file in [
            "",
            " \r\n\t",
            "\u{feff}",
            "null",
            "{}",
            r#"{"auths":null}"#,
            r#"{"auths":{},"credHelpers":null,"credsStore":null}"#,
            r#"{"HttpHeaders":{"a":1},"psFormat":7}"#,
            "{} and more",
        ] {
            let config =
                Config::parse(file.as_bytes()).unwrap_or_else(|why| panic!("{file}: {why}"));
            assert_eq!(config.names().count(), 0, "{file}");
            assert_eq!(config.creds_store, "", "{file}");
            assert!(config.cred_helpers.is_empty(), "{file}");
        }
    }

    #[test]
    fn files_that_are_broken_are_refused() {
        for file in [
            "{",
            "[]",
            "7",
            "\u{0}",
            r#"{"auths":[]}"#,
            r#"{"credsStore":7}"#,
            r#"{"credHelpers":"x"}"#,
            r#"{"credHelpers":{"a":7}}"#,
        ] {
            Config::parse(file.as_bytes()).expect_err(file);
        }
    }

    #[test]
    fn names_of_fields_are_in_any_case_and_an_exact_one_counts() {
        let file = r#"{"Auths":{"a.b":{"AUTH":"dTpw"}},"credsstore":"x","credsStore":"y","CREDHELPERS":{"A.b":"z","c":null}}"#;
        let config = Config::parse(file.as_bytes()).expect("a file");
        assert_eq!(config.names().collect::<Vec<_>>(), ["a.b"]);
        assert!(matches!(
            config.credentials("a.b"),
            Ok(Some(Credentials::Password { user, password })) if user == "u" && password == "p"
        ));
        assert_eq!(config.creds_store, "y");
        assert_eq!(config.cred_helpers["A.b"], "z");
        assert_eq!(config.cred_helpers["c"], "");
    }

    fn parsed(entry: &str) -> Result<Option<Credentials>, &'static str> {
        let file = format!(r#"{{"auths":{{"other":7,"a.b":{entry}}}}}"#);
        Config::parse(file.as_bytes())
            .expect("a file")
            .credentials("a.b")
    }

    #[test]
    fn entries_are_read_in_all_their_forms() {
        for auth in [
            r#""dXNlcjpwYTpzcw==""#,
            r#""dXNl\ncjpw\r\nYTpz\ncw==\n""#,
            r#"" dXNlcjpwYTpzcw== ""#,
            r#""dXNlcjoAcGE6c3MA""#, // NUL bytes around the password
        ] {
            let Ok(Some(Credentials::Password { user, password })) =
                parsed(&format!(r#"{{"auth":{auth}}}"#))
            else {
                panic!("{auth}");
            };
            assert_eq!(
                (user.as_str(), password.as_str()),
                ("user", "pa:ss"),
                "{auth}"
            );
        }
        assert!(matches!(
            parsed(r#"{"username":"u","password":"p","auth":null}"#),
            Ok(Some(Credentials::Password { user, password })) if user == "u" && password == "p"
        ));
        for entry in [
            r#"{"auth":"dXNlcjo=","identitytoken":"t"}"#,
            r#"{"auth":"","IdentityToken":"t"}"#,
        ] {
            assert!(matches!(
                parsed(entry),
                Ok(Some(Credentials::IdentityToken(token))) if token == "t"
            ));
        }
        assert!(matches!(
            parsed(r#"{"registrytoken":"t"}"#),
            Ok(Some(Credentials::RegistryToken(token))) if token == "t"
        ));
        for empty in ["{}", "null", r#"{"auth":null,"email":7}"#] {
            assert!(matches!(parsed(empty), Ok(None)), "{empty}");
        }
        for broken in [
            r#"{"auth":"%"}"#,
            r#"{"auth":"dXNlcg=="}"#,
            r#"{"auth":"/////w=="}"#,
            r#"{"auth":"OnA="}"#,
            r#"{"auth":"dXNlcjpwYTpzcw"}"#,
            r#"{"auth":7}"#,
            r#""text""#,
        ] {
            assert!(parsed(broken).is_err(), "{broken}");
        }
    }
}
