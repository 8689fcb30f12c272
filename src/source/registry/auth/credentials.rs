//! Credentials, from a command line, pulls through the CRI image service, the kubelet's credential plugins, Docker's `config.json`, Podman's `auth.json` and the helpers that these name.
//!
//! They are looked up for each token: `docker login` and short-lived passwords take effect without a restart.

use std::{path::Path, time::Duration};

use tokio::io::AsyncReadExt as _;

use super::{
    answer::AnswerNumber,
    docker_config::{Config, Credentials, is_host},
    plugins, pull_credentials,
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::reference::DOCKER_HUB,
    program::{self, Program},
    source::{Access, access::GivenLogin},
};

const MAX_FILE: u64 = 4 << 20;
const HELPER_TIME: Duration = Duration::from_secs(30);
/// How Docker names Docker Hub in its file, for historical reasons.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// The user name with which a helper marks the secret as an identity token.
const TOKEN_USER: &str = "<token>";

/// Credentials, and where they were found.
pub(super) struct Found {
    pub(super) credentials: Credentials,
    /// A file, a helper or a plugin, for errors.
    pub(super) place: String,
    /// The number of a plugin's answer, or of the credentials of a pull.
    pub(super) answer: Option<AnswerNumber>,
    /// Whether the answer was kept from an earlier lookup.
    pub(super) is_kept: bool,
    /// Whether they are those of a pull. If they are refused, there may be others.
    pub(super) is_of_pull: bool,
}

/// The result of a search for credentials.
#[derive(Default)]
pub(super) struct Lookup {
    /// `None` if there are no credentials: then the registry is accessed anonymously.
    pub(super) found: Option<Found>,
    /// Why a helper or plugin that should have them gave no answer: for the error, if the registry then refuses.
    pub(super) trouble: Option<Error>,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    secret: String,
}

/// The credentials for a repository. A helper or plugin that is not installed or fails is logged; as with Docker, this is not an error yet,
/// because the image may be public. `refused`: an answer that is not used any more.
pub(super) async fn find(
    access: &Access,
    host: &str,
    repository: &str,
    refused: Option<AnswerNumber>,
) -> Result<Lookup> {
    let mut lookup = Lookup::default();
    let given = access.given_credentials.as_ref();
    if let Some(given) = given.filter(|given| given.host == host) {
        let credentials = match given.login.clone() {
            GivenLogin::Password { user, password } => Credentials::Password { user, password },
            GivenLogin::RefreshToken(token) => Credentials::IdentityToken(token),
        };
        lookup.found = Some(Found::new(credentials, "the command line".to_owned()));
        return Ok(lookup);
    }
    if access.pull_credentials
        && let Some((credentials, number)) = pull_credentials::find(host, repository, refused)
    {
        lookup.found = Some(Found {
            credentials,
            place: "a pull by the CRI image service".to_owned(),
            answer: Some(number),
            is_kept: true,
            is_of_pull: true,
        });
        return Ok(lookup);
    }
    match plugins::find(access, host, repository, refused).await {
        Ok(Some(found)) => {
            lookup.found = Some(Found {
                credentials: found.credentials,
                place: found.place,
                answer: Some(found.answer),
                is_kept: !found.is_new,
                is_of_pull: false,
            });
            return Ok(lookup);
        }
        Ok(None) => {}
        Err(error) if error.kind() == Kind::InvalidArgument => return Err(error),
        Err(error) => lookup.fails(host, error),
    }
    for path in [&access.docker_config, &access.podman_auth]
        .into_iter()
        .flatten()
    {
        let Some(config) = read(path).await? else {
            continue;
        };
        lookup.found = find_in(&config, path, access, host, repository, &mut lookup).await?;
        if lookup.found.is_some() {
            break;
        }
    }
    Ok(lookup)
}

impl Lookup {
    fn fails(&mut self, host: &str, error: Error) {
        tracing::warn!(
            "{host}: no credentials from a helper or plugin: {}",
            error.report()
        );
        self.trouble = Some(error);
    }
}

impl Found {
    fn new(credentials: Credentials, place: String) -> Self {
        Self {
            credentials,
            place,
            answer: None,
            is_kept: false,
            is_of_pull: false,
        }
    }
}

/// The places where credentials are looked for.
pub(super) fn places(access: &Access) -> String {
    let plugins = access.credential_plugins.as_ref();
    let places: Vec<String> = [&access.docker_config, &access.podman_auth]
        .into_iter()
        .flatten()
        .chain(plugins.map(|plugins| &plugins.config))
        .map(|path| path.display().to_string())
        .collect();
    match places.is_empty() {
        true => "no credentials file".to_owned(),
        false => format!("none in {}", places.join(" and ")),
    }
}

async fn read(path: &Path) -> Result<Option<Config>> {
    let unreadable = || format!("reading the credentials of {}", path.display());
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).or_kind(Kind::Io, unreadable),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .await
        .or_kind(Kind::Io, unreadable)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "{}: the credentials file is longer than {MAX_FILE} bytes",
                path.display()
            ),
        ));
    }
    Config::parse(&bytes).map(Some).map_err(|why| {
        Error::new(
            Kind::InvalidArgument,
            format!(
                "{}: not a Docker configuration file ({why})",
                path.display()
            ),
        )
    })
}

async fn find_in(
    config: &Config,
    path: &Path,
    access: &Access,
    host: &str,
    repository: &str,
    lookup: &mut Lookup,
) -> Result<Option<Found>> {
    let key = match host {
        DOCKER_HUB => DOCKER_HUB_KEY,
        host => host,
    };
    let special = config
        .cred_helpers
        .iter()
        .find(|(name, _)| is_host(name, host))
        .map(|(_, helper)| helper);
    let helper = special.unwrap_or(&config.creds_store);
    if !helper.is_empty() {
        let name = helper_name(helper)?;
        match ask_helper(&name, key, access, HELPER_TIME).await {
            Ok(None) if special.is_none() => {}
            Ok(answer) => {
                return Ok(answer.map(|credentials| Found::new(credentials, name)));
            }
            Err(error) => lookup.fails(host, error),
        }
    }
    let Some(name) = best_match(config, host, repository) else {
        return Ok(None);
    };
    let credentials = config.credentials(name).map_err(|why| {
        Error::new(
            Kind::InvalidArgument,
            format!("{}: {name}: {why}", path.display()),
        )
    })?;
    let place = path.display().to_string();
    Ok(credentials.map(|credentials| Found::new(credentials, place)))
}

/// The entry for this repository: the longest prefix of `host/repository` (Podman's namespaces), then the host in Docker's forms.
fn best_match<'a>(config: &'a Config, host: &str, repository: &str) -> Option<&'a str> {
    let whole = format!("{host}/{repository}");
    let mut prefix = whole.as_str();
    loop {
        if let Some(found) = config.names().find(|name| *name == prefix) {
            return Some(found);
        }
        match prefix.rsplit_once('/') {
            Some((shorter, _)) => prefix = shorter,
            None => break,
        }
    }
    config.names().find(|name| is_host(name, host))
}

/// The program of a helper.
fn helper_name(helper: &str) -> Result<String> {
    let name = format!("docker-credential-{helper}");
    let is_plain = helper
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    match is_plain {
        true => Ok(name),
        false => Err(Error::new(
            Kind::InvalidArgument,
            format!("{name:?} is not the name of a credential helper"),
        )),
    }
}

/// Runs `docker-credential-HELPER get`. `None` where it knows nothing of this server.
async fn ask_helper(
    name: &str,
    server: &str,
    access: &Access,
    limit: Duration,
) -> Result<Option<Credentials>> {
    let not_there = || {
        Error::new(
            Kind::Unauthorized,
            format!("{name} is not in PATH, but the credentials file names it: install it"),
        )
    };
    let path = access.helper_environment.get("PATH");
    let path = program::in_path(name, path.map(String::as_str)).ok_or_else(not_there)?;
    let program = Program {
        name,
        path: &path,
        arguments: &["get".to_owned()],
        environment: &access.helper_environment,
        input: server.as_bytes(),
    };
    let exited = program.run(limit).await;
    let exited = exited.map_err(|error| match error.kind() {
        Kind::NotFound => not_there(),
        _ => error,
    })?;
    if !exited.status.success() {
        // the only way of the protocol to report "none": this text on standard output
        let text = String::from_utf8_lossy(&exited.output);
        if text.contains("credentials not found") {
            return Ok(None);
        }
        return Err(Error::new(
            Kind::Unavailable,
            format!(
                "{name} get failed ({}){}: to see why, run it with {server:?} on its standard input",
                exited.status,
                exited.words(&[])
            ),
        ));
    }
    let answer: HelperAnswer = serde_json::from_slice(&exited.output).map_err(|_| {
        // the answer is secret, and is not quoted
        Error::new(
            Kind::Unavailable,
            format!("{name} get: the answer is not JSON"),
        )
    })?;
    Ok(Some(match answer.username.as_str() {
        TOKEN_USER => Credentials::IdentityToken(answer.secret),
        _ => Credentials::Password {
            user: answer.username,
            password: answer.secret,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(auths: &[&str], host: &str, repository: &str) -> Option<String> {
        let auths: serde_json::Map<_, _> = auths
            .iter()
            .map(|name| ((*name).to_owned(), serde_json::json!({})))
            .collect();
        let file = serde_json::json!({ "auths": auths }).to_string();
        let config = Config::parse(file.as_bytes()).expect("a file");
        best_match(&config, host, repository).map(str::to_owned)
    }

    #[test]
    fn entries_are_found_in_all_their_forms() {
        for (auths, host, found) in [
            (&["a.b:5000"] as &[_], "a.b:5000", Some("a.b:5000")),
            (&["https://a.b"], "a.b", Some("https://a.b")),
            (&["https://a.b/v1/"], "a.b", Some("https://a.b/v1/")),
            (&["http://a.b/v2/"], "a.b", Some("http://a.b/v2/")),
            (
                &["https://index.docker.io/v1/"],
                "docker.io",
                Some("https://index.docker.io/v1/"),
            ),
            (&["docker.io"], "docker.io", Some("docker.io")),
            (&["a.b/org", "a.b"], "a.b", Some("a.b/org")),
            (&["a.b/org/repo", "a.b/org"], "a.b", Some("a.b/org/repo")),
            (&["a.b/or", "a.b/org/other"], "a.b", None),
            (&["b", "xa.b", "a.b.c", "a.b:5000"], "a.b", None),
            (&["https://index.docker.io/v1/"], "a.b", None),
        ] {
            assert_eq!(
                lookup(auths, host, "org/repo").as_deref(),
                found,
                "{auths:?} {host}"
            );
        }
    }

    #[tokio::test]
    async fn a_helper_that_hangs_is_left() {
        use std::os::unix::fs::PermissionsExt as _;

        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("docker-credential-slow");
        std::fs::write(&file, "#!/bin/sh\nexec sleep 600\n").expect("write the helper");
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&file, mode).expect("make it run");
        let path = format!("{}:/usr/bin:/bin", folder.path().display());
        let access = Access {
            helper_environment: [("PATH".to_owned(), path)].into(),
            ..Access::default()
        };
        let limit = Duration::from_millis(200);
        let Err(error) = ask_helper("docker-credential-slow", "a.b", &access, limit).await else {
            panic!("it answered");
        };
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(
            error.report().contains("did not answer within"),
            "{error:?}"
        );
    }
}
