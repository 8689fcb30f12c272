//! `hosts.toml`, as containerd's documentation of registry hosts describes it. Its values are checked here; the files that it names are
//! read when a connection needs them.

use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};
use url::Url;

use super::host::Capabilities;
use crate::source::go_duration::GoDuration;

/// Hosts of one file.
const MAX_HOSTS: usize = 32;
/// Values of one list.
const MAX_LIST: usize = 64;
/// Length of a value.
const MAX_VALUE: usize = 4096;
/// A connection that takes longer is not waited for.
const MAX_DIAL: Duration = Duration::from_secs(60);

/// A file.
#[derive(Debug)]
pub(in crate::source) struct HostsFile {
    /// The root of the API of `server`.
    pub(in crate::source) server: Option<Url>,
    /// The settings of the server, or of the registry where there is none.
    pub(in crate::source) root: HostSection,
    /// `[host."..."]`, in the order of the file.
    pub(in crate::source) hosts: Vec<(Url, HostSection)>,
    /// What is ignored, as containerd does.
    pub(in crate::source) warnings: Vec<String>,
}

/// The settings of one host.
#[derive(Clone, Debug, Default)]
pub(in crate::source) struct HostSection {
    /// `None`: all.
    pub(in crate::source) capabilities: Option<Capabilities>,
    pub(in crate::source) ca: Vec<String>,
    /// Certificate and key; without a key it is in the file of the certificate.
    pub(in crate::source) client: Vec<(String, Option<String>)>,
    pub(in crate::source) skip_verify: bool,
    pub(in crate::source) headers: HeaderMap,
    pub(in crate::source) override_path: bool,
    /// `None`: the usual limit.
    pub(in crate::source) dial_timeout: Option<Duration>,
}

/// Reads a file. An error has the line and the key, but no value: a header may be secret.
pub(in crate::source) fn parse(text: &str) -> Result<HostsFile, String> {
    let document = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        // the message names what was expected; the text of the file is not in it
        format!("line {}: {}", line(text, at), error.message())
    })?;
    let mut reader = Reader {
        text,
        warnings: Vec::new(),
    };
    let mut file = HostsFile {
        server: None,
        root: HostSection::default(),
        hosts: Vec::new(),
        warnings: Vec::new(),
    };
    let mut server = None;
    let mut hosts = Vec::new();
    for (key, value) in in_order(document.get_ref()) {
        match key.get_ref().as_ref() {
            "server" => server = Some((value, reader.string(value, "server")?)),
            "host" => {
                let mut sections = in_order(reader.table(value, "host")?);
                sections.sort_by_key(|(name, section)| first_place(name, section));
                for (name, section) in sections {
                    if hosts.len() == MAX_HOSTS {
                        return Err(reader.wrong(name, "host", &format!("more than {MAX_HOSTS}")));
                    }
                    let key = format!("host.{:?}", short(name.get_ref()));
                    let settings = reader.table(section, &key)?;
                    hosts.push((name, reader.section(settings, &key)?));
                }
            }
            _ => reader.setting(key, value, "", &mut file.root)?,
        }
    }
    if let Some((value, text)) = server.filter(|(_, text)| !text.is_empty()) {
        file.server = Some(reader.root(value, "server", text, file.root.override_path)?);
    }
    for (name, section) in hosts {
        let key = format!("host.{:?}", short(name.get_ref()));
        let root = reader.root(name, &key, name.get_ref(), section.override_path)?;
        file.hosts.push((root, section));
    }
    file.warnings = reader.warnings;
    Ok(file)
}

/// The entries of a table, as they stand in the file.
fn in_order<'t, 'i>(
    table: &'t DeTable<'i>,
) -> Vec<(
    &'t Spanned<std::borrow::Cow<'i, str>>,
    &'t Spanned<DeValue<'i>>,
)> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

/// Where a host first stands in the file: `[host."URL".header]` may come before `[host."URL"]`.
fn first_place(name: &Spanned<std::borrow::Cow<'_, str>>, section: &Spanned<DeValue<'_>>) -> usize {
    let settings = section.get_ref().as_table().into_iter().flatten();
    let places = settings.map(|(key, _)| key.span().start);
    places.chain([name.span().start]).min().unwrap_or(0)
}

/// The number of the line of a byte.
fn line(text: &str, at: usize) -> usize {
    let before = text.as_bytes().iter().take(at);
    before.filter(|byte| **byte == b'\n').count() + 1
}

/// A name from the file, shortened for a message.
fn short(name: &str) -> &str {
    match name.char_indices().nth(80) {
        Some((end, _)) => &name[..end],
        None => name,
    }
}

struct Reader<'t> {
    text: &'t str,
    warnings: Vec<String>,
}

impl Reader<'_> {
    fn wrong<T>(&self, at: &Spanned<T>, key: &str, why: &str) -> String {
        format!("line {}: {key}: {why}", line(self.text, at.span().start))
    }

    fn section(&mut self, table: &DeTable<'_>, key: &str) -> Result<HostSection, String> {
        let mut section = HostSection::default();
        for (name, value) in in_order(table) {
            self.setting(name, value, key, &mut section)?;
        }
        Ok(section)
    }

    /// One setting of a host.
    fn setting(
        &mut self,
        name: &Spanned<std::borrow::Cow<'_, str>>,
        value: &Spanned<DeValue<'_>>,
        of: &str,
        section: &mut HostSection,
    ) -> Result<(), String> {
        let key = match of.is_empty() {
            true => short(name.get_ref()).to_owned(),
            false => format!("{of}.{}", short(name.get_ref())),
        };
        match name.get_ref().as_ref() {
            "capabilities" => section.capabilities = self.capabilities(value, &key)?,
            "ca" => section.ca = self.strings(value, &key)?,
            "client" => section.client = self.clients(value, &key)?,
            "skip_verify" => section.skip_verify = self.boolean(value, &key)?,
            "header" => section.headers = self.headers(value, &key)?,
            "override_path" => section.override_path = self.boolean(value, &key)?,
            "dial_timeout" => section.dial_timeout = self.duration(value, &key)?,
            _ => self.warnings.push(self.wrong(
                name,
                &format!("{key:?}"),
                "an unknown key, which is ignored",
            )),
        }
        Ok(())
    }

    fn string<'v>(&self, value: &'v Spanned<DeValue<'_>>, key: &str) -> Result<&'v str, String> {
        let text = value
            .get_ref()
            .as_str()
            .ok_or_else(|| self.wrong(value, key, "expected a string"))?;
        match text.len() > MAX_VALUE || text.contains('\0') {
            true => Err(self.wrong(value, key, "too long, or it has a NUL")),
            false => Ok(text),
        }
    }

    fn boolean(&self, value: &Spanned<DeValue<'_>>, key: &str) -> Result<bool, String> {
        let value_of = value.get_ref().as_bool();
        value_of.ok_or_else(|| self.wrong(value, key, "expected true or false"))
    }

    fn table<'v, 'i>(
        &self,
        value: &'v Spanned<DeValue<'i>>,
        key: &str,
    ) -> Result<&'v DeTable<'i>, String> {
        let table = value.get_ref().as_table();
        table.ok_or_else(|| self.wrong(value, key, "expected a table"))
    }

    /// The entries of a list.
    fn list<'v, 'i>(
        &self,
        value: &'v Spanned<DeValue<'i>>,
        key: &str,
    ) -> Result<Option<&'v [Spanned<DeValue<'i>>]>, String> {
        let Some(array) = value.get_ref().as_array() else {
            return Ok(None);
        };
        match array.len() > MAX_LIST {
            true => Err(self.wrong(value, key, &format!("more than {MAX_LIST} values"))),
            false => Ok(Some(array)),
        }
    }

    /// A string, or a list of them.
    fn strings(&self, value: &Spanned<DeValue<'_>>, key: &str) -> Result<Vec<String>, String> {
        match self.list(value, key)? {
            None => Ok(vec![self.string(value, key)?.to_owned()]),
            Some(array) => array
                .iter()
                .map(|value| self.string(value, key).map(str::to_owned))
                .collect(),
        }
    }

    fn capabilities(
        &self,
        value: &Spanned<DeValue<'_>>,
        key: &str,
    ) -> Result<Option<Capabilities>, String> {
        let array = self
            .list(value, key)?
            .ok_or_else(|| self.wrong(value, key, "expected a list"))?;
        let mut capabilities = Capabilities::NONE;
        for value in array {
            match self.string(value, key)?.to_ascii_lowercase().as_str() {
                "pull" => capabilities.pull = true,
                "resolve" => capabilities.resolve = true,
                "push" => capabilities.push = true,
                "referrers" => capabilities.referrers = true,
                _ => {
                    let why = "expected \"pull\", \"resolve\", \"push\" or \"referrers\"";
                    return Err(self.wrong(value, key, why));
                }
            }
        }
        // as containerd: an empty list is as none
        Ok((!array.is_empty()).then_some(capabilities))
    }

    /// A file, a list of files, or a list of pairs of certificate and key.
    fn clients(
        &self,
        value: &Spanned<DeValue<'_>>,
        key: &str,
    ) -> Result<Vec<(String, Option<String>)>, String> {
        let Some(array) = self.list(value, key)? else {
            return Ok(vec![(self.string(value, key)?.to_owned(), None)]);
        };
        let pair = |value| match self.list(value, key)? {
            None => Ok((self.string(value, key)?.to_owned(), None)),
            Some([certificate, of]) => {
                let certificate = self.string(certificate, key)?.to_owned();
                let of = self.string(of, key)?;
                Ok((certificate, (!of.is_empty()).then(|| of.to_owned())))
            }
            Some(_) => Err(self.wrong(value, key, "expected a pair of certificate and key")),
        };
        array.iter().map(pair).collect()
    }

    fn headers(&self, value: &Spanned<DeValue<'_>>, key: &str) -> Result<HeaderMap, String> {
        let table = self.table(value, key)?;
        if table.len() > MAX_LIST {
            return Err(self.wrong(value, key, &format!("more than {MAX_LIST} headers")));
        }
        let mut headers = HeaderMap::new();
        for (name, value) in in_order(table) {
            let key = format!("{key}.{:?}", short(name.get_ref()));
            let known = HeaderName::from_bytes(name.get_ref().as_bytes())
                .map_err(|_| self.wrong(name, &key, "not a valid name of a header"))?;
            if IS_OURS.contains(&known.as_str()) {
                return Err(self.wrong(name, &key, "this header cannot be set"));
            }
            for text in self.strings(value, &key)? {
                let mut text = HeaderValue::try_from(text)
                    .map_err(|_| self.wrong(value, &key, "not a valid value of a header"))?;
                text.set_sensitive(true);
                headers.append(known.clone(), text);
            }
        }
        Ok(headers)
    }

    fn duration(
        &self,
        value: &Spanned<DeValue<'_>>,
        key: &str,
    ) -> Result<Option<Duration>, String> {
        let text = self.string(value, key)?;
        if text.is_empty() {
            return Ok(None);
        }
        let duration = GoDuration::parse(text)
            .ok_or_else(|| self.wrong(value, key, "expected a duration as 1s or 500ms"))?;
        Ok((!duration.0.is_zero()).then(|| duration.0.min(MAX_DIAL)))
    }

    /// The root of the API of a host.
    fn root<T>(
        &self,
        at: &Spanned<T>,
        key: &str,
        text: &str,
        override_path: bool,
    ) -> Result<Url, String> {
        if text.len() > MAX_VALUE {
            return Err(self.wrong(at, key, "too long"));
        }
        let text = match text.contains("://") {
            true => text.to_owned(),
            false => format!("https://{text}"),
        };
        let mut url: Url = text
            .parse()
            .map_err(|_| self.wrong(at, key, "not a valid URL"))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(self.wrong(at, key, "expected a URL with http or https"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            let why = "a URL with a user name; credentials are those of docker login";
            return Err(self.wrong(at, key, why));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(self.wrong(at, key, "a URL with a query or fragment"));
        }
        let path = url.path().trim_end_matches('/');
        let path = match override_path || path.ends_with("/v2") {
            true => format!("{path}/"),
            false => format!("{path}/v2/"),
        };
        url.set_path(&path);
        Ok(url)
    }
}

/// Headers that belong to the connection, or that the requests themselves have.
const IS_OURS: [&str; 8] = [
    "host",
    "connection",
    "content-length",
    "transfer-encoding",
    "upgrade",
    "range",
    "accept-encoding",
    "te",
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The examples of containerd's documentation.
    const DOCUMENTED: &str = r#"
server = "https://registry-1.docker.io"    # Exclude this to not use upstream

[host."https://mirror.registry"]
  capabilities = ["pull"]
  ca = "/etc/certs/mirror.pem"
  skip_verify = false
  [host."https://mirror.registry".header]
    x-custom-2 = ["value1", "value2"]

[host."https://mirror-bak.registry/us"]
  capabilities = ["pull"]
  skip_verify = true

[host."http://mirror.registry"]
  capabilities = ["Pull", "referrers"]
  dial_timeout = "1s"

[host."https://test-1.registry"]
  capabilities = ["pull", "resolve", "push"]
  ca = ["/etc/certs/test-1-ca.pem", "special.pem"]
  client = [["/etc/certs/client.cert", "/etc/certs/client.key"],["/etc/certs/client.pem", ""]]

[host."https://test-2.registry"]
  client = "/etc/certs/client.pem"

[host."https://test-3.registry"]
  client = ["/etc/certs/client-1.pem", "/etc/certs/client-2.pem"]

[host."https://non-compliant-mirror.registry/v2/upstream"]
  capabilities = ["pull"]
  override_path = true

[host."plain.registry:5000/v2"]
  dial_timeout = "2h"
"#;

    #[test]
    fn every_key_that_containerd_documents() {
        let file = parse(DOCUMENTED).expect("the documented file");
        assert_eq!(
            file.server.as_ref().map(Url::as_str),
            Some("https://registry-1.docker.io/v2/")
        );
        let roots: Vec<&str> = file.hosts.iter().map(|(root, _)| root.as_str()).collect();
        assert_eq!(
            roots,
            [
                "https://mirror.registry/v2/",
                "https://mirror-bak.registry/us/v2/",
                "http://mirror.registry/v2/",
                "https://test-1.registry/v2/",
                "https://test-2.registry/v2/",
                "https://test-3.registry/v2/",
                "https://non-compliant-mirror.registry/v2/upstream/",
                "https://plain.registry:5000/v2/",
            ]
        );
        assert_eq!(file.warnings, [""; 0]);
        let of = |number: usize| &file.hosts[number].1;
        let capabilities = of(0).capabilities.expect("named");
        assert!(capabilities.pull && !capabilities.resolve && !capabilities.referrers);
        assert_eq!(of(0).ca, ["/etc/certs/mirror.pem"]);
        let values: Vec<_> = of(0).headers.get_all("x-custom-2").iter().collect();
        assert_eq!(values, ["value1", "value2"]);
        assert!(values.iter().all(|value| value.is_sensitive()));
        assert!(of(1).skip_verify && !of(0).skip_verify);
        assert!(of(2).capabilities.expect("named").referrers);
        assert_eq!(of(2).dial_timeout, Some(Duration::from_secs(1)));
        assert_eq!(of(3).ca, ["/etc/certs/test-1-ca.pem", "special.pem"]);
        let pem = |name: &str| format!("/etc/certs/{name}");
        assert_eq!(
            of(3).client,
            [
                (pem("client.cert"), Some(pem("client.key"))),
                (pem("client.pem"), None)
            ]
        );
        assert_eq!(of(4).client, [(pem("client.pem"), None)]);
        assert_eq!(of(4).capabilities, None);
        assert_eq!(of(5).client.len(), 2);
        assert_eq!(of(7).dial_timeout, Some(MAX_DIAL));
    }

    #[test]
    fn the_order_of_the_hosts_is_that_of_the_file() {
        let file = parse(
            "[host.\"https://z\".header]\na = \"1\"\n[host.\"https://a\"]\n[host.\"https://z\"]\n[host.\"https://b\"]\n",
        )
        .expect("hosts");
        let roots: Vec<&str> = file.hosts.iter().map(|(root, _)| root.as_str()).collect();
        assert_eq!(roots, ["https://z/v2/", "https://a/v2/", "https://b/v2/"]);
    }

    #[test]
    fn unknown_keys_are_ignored_with_a_warning() {
        let file = parse("colour = 1\n[host.\"https://m\"]\npush = true\n").expect("read");
        assert_eq!(file.warnings.len(), 2);
        assert!(file.warnings[0].starts_with("line 1: \"colour\": "));
        assert!(file.warnings[1].contains("line 3"), "{:?}", file.warnings);
    }

    #[test]
    fn what_is_wrong_has_its_line_and_key_and_no_value() {
        for (text, expected) in [
            ("a = ", "line 1: "),
            ("\nserver = 5", "line 2: server: expected a string"),
            ("server = \"ftp://m\"", "line 1: server: expected a URL"),
            (
                "server = \"https://u:secret@m\"",
                "line 1: server: a URL with a user",
            ),
            (
                "server = \"https://m/?x=secret\"",
                "line 1: server: a URL with a query",
            ),
            ("host = 1", "line 1: host: expected a table"),
            (
                "[host]\n\"https://m\" = 1",
                "line 2: host.\"https://m\": expected a table",
            ),
            ("[host.\"\"]", "line 1: host.\"\": not a valid URL"),
            (
                "[host.\"https://m\"]\ncapabilities = [\"steal\"]",
                "line 2: host.\"https://m\".capabilities: expected \"pull\"",
            ),
            (
                "capabilities = \"pull\"",
                "line 1: capabilities: expected a list",
            ),
            ("ca = [1]", "line 1: ca: expected a string"),
            ("ca = \"\\u0000\"", "line 1: ca: too long, or"),
            ("client = [[\"a\"]]", "line 1: client: expected a pair"),
            (
                "client = [[\"a\", \"b\", \"c\"]]",
                "line 1: client: expected a pair",
            ),
            (
                "skip_verify = \"secret\"",
                "line 1: skip_verify: expected true",
            ),
            ("override_path = 1", "line 1: override_path: expected true"),
            (
                "dial_timeout = \"secret\"",
                "line 1: dial_timeout: expected a duration",
            ),
            (
                "dial_timeout = 5",
                "line 1: dial_timeout: expected a string",
            ),
            (
                "[header]\n\"a b\" = \"secret\"",
                "line 2: header.\"a b\": not a valid name",
            ),
            (
                "[header]\na = \"secret\\n\"",
                "line 2: header.\"a\": not a valid value",
            ),
            (
                "[header]\nHost = \"secret\"",
                "line 2: header.\"Host\": this header",
            ),
            ("[header]\na = 7", "line 2: header.\"a\": expected a string"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.starts_with(expected), "{text:?}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
        let mut many = String::new();
        for number in 0..=MAX_HOSTS {
            many.push_str(&format!("[host.\"https://m{number}\"]\n"));
        }
        let error = parse(&many).expect_err("too many");
        assert!(error.contains("more than 32"), "{error}");
        let error = parse(&format!("server = \"{}\"", "a".repeat(5000))).expect_err("long");
        assert!(error.contains("too long"), "{error}");
        // nested deeper than any file
        assert!(
            parse(&format!(
                "ca = {}{}",
                "[".repeat(10_000),
                "]".repeat(10_000)
            ))
            .is_err()
        );
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[\\[\\]\"'=.,#{}a-z0-9 \n\u{e9}]{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn any_values_are_survived(
            key in "capabilities|ca|client|skip_verify|header|override_path|dial_timeout|server|host|other",
            value in "true|1|1\\.5|\"[ -~]{0,20}\"|\\[(\"[a-z/:.]{0,9}\",? ?){0,3}\\]|\\{ ?a = \"[ -~]{0,9}\" ?\\}|\\[\\[\"a\", \"b\"\\]\\]|1979-05-27",
            host in "(https?://)?[a-z0-9.:/@?#%-]{0,20}",
        ) {
            let _ = parse(&format!("{key} = {value}\n"));
            let _ = parse(&format!("[host.\"{host}\"]\n{key} = {value}\n"));
            if let Ok(file) = parse(&format!("[host.\"{host}\"]\n")) {
                // requests are made below it
                let below = file.hosts[0].0.join("a/blobs/b").expect("a URL");
                prop_assert!(below.as_str().starts_with(file.hosts[0].0.as_str()));
                prop_assert_eq!(below.host_str(), file.hosts[0].0.host_str());
            }
        }
    }
}
