//! The kubelet's credential plugins: programs that print short-lived credentials for an image (credential provider protocol, version 1).
//!
//! An answer is kept in memory for as long as it says, and shared by all repositories that it is for. A plugin runs once at a time: who needs
//! the same answer waits for it.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use lru::LruCache;
use serde::Deserialize;
use tokio::time::Instant;

use super::{
    answer::AnswerNumber,
    docker_config::Credentials,
    image_pattern,
    plugin_config::{self, PluginConfig},
};
use crate::{
    blocking::broken_off,
    error::{Error, Kind, Result},
    program::Program,
    source::{Access, CredentialPlugins, go_duration::GoDuration},
};

const TIME_LIMIT: Duration = Duration::from_secs(30);
/// Plugins that are known at the same time: each configuration of a plugin, in each environment.
const MAX_PLUGINS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(63);
/// Answers of one plugin that are kept.
const MAX_ANSWERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1023);

/// The credentials of an answer.
pub(super) struct PluginCredentials {
    pub(super) credentials: Credentials,
    /// The name of the plugin.
    pub(super) place: String,
    pub(super) answer: AnswerNumber,
    /// Whether the plugin has run for this lookup.
    pub(super) is_new: bool,
}

/// A plugin, and the environment that it runs in.
#[derive(Clone, PartialEq, Eq, Hash)]
struct PluginKey {
    plugins: CredentialPlugins,
    config: PluginConfig,
    environment: BTreeMap<String, String>,
}

/// What is known from a plugin.
struct Plugin {
    /// Held while the plugin runs.
    run: Arc<tokio::sync::Mutex<()>>,
    state: Mutex<PluginState>,
}

struct PluginState {
    answers: LruCache<Scope, Answer>,
    /// The last run, if it has failed.
    failure: Option<Failure>,
}

/// The images that an answer is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Scope {
    Image(String),
    Registry(String),
    Global,
}

struct Answer {
    number: AnswerNumber,
    until: Instant,
    /// Patterns of images with name and password, in the order in which they are tried.
    auth: Vec<(String, Login)>,
}

struct Failure {
    image: String,
    ended: Instant,
    error: Arc<Error>,
}

/// The plugin's answer. It has no `Debug`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    api_version: String,
    kind: String,
    cache_key_type: String,
    #[serde(default)]
    cache_duration: Option<GoDuration>,
    #[serde(default)]
    auth: Option<BTreeMap<String, Login>>,
}

#[derive(Clone, Deserialize)]
struct Login {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

static PLUGINS: LazyLock<Mutex<LruCache<PluginKey, Arc<Plugin>>>> =
    LazyLock::new(|| Mutex::new(LruCache::new(MAX_PLUGINS)));

/// Asks the plugins for a repository, in their order. `None`: no plugin has credentials for it. `refused` is an answer whose credentials the
/// registry does not accept any more: it is forgotten.
pub(super) async fn find(
    access: &Access,
    host: &str,
    repository: &str,
    refused: Option<AnswerNumber>,
) -> Result<Option<PluginCredentials>> {
    let Some(plugins) = &access.credential_plugins else {
        return Ok(None);
    };
    for config in plugin_config::read(&plugins.config).await? {
        if !config.matches(host, repository) {
            continue;
        }
        let key = PluginKey {
            plugins: plugins.clone(),
            config,
            environment: access.helper_environment.clone(),
        };
        let found = ask(key, host, repository, refused).await?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

async fn ask(
    key: PluginKey,
    host: &str,
    repository: &str,
    refused: Option<AnswerNumber>,
) -> Result<Option<PluginCredentials>> {
    let plugin = Plugin::of(&key);
    let name = key.config.name.clone();
    let kept = || {
        let mut state = locked(&plugin.state);
        let answer = state.usable(host, repository, refused)?;
        Some(answer.credentials(&name, host, repository, false))
    };
    if let Some(found) = kept() {
        return Ok(found);
    }
    let image = format!("{host}/{repository}");
    let asked = Instant::now();
    let running = Arc::clone(&plugin.run).lock_owned().await;
    // the run that was waited for
    if let Some(found) = kept() {
        return Ok(found);
    }
    if let Some(failure) = &locked(&plugin.state).failure
        && failure.image == image
        && failure.ended >= asked
    {
        return Err(Error::new(failure.error.kind(), failure.error.report()));
    }
    // a task of its own: a reader that gives up does not end it, because the answer is for others too
    let (host, repository) = (host.to_owned(), repository.to_owned());
    let plugin = Arc::clone(&plugin);
    let run = tokio::spawn(async move {
        let _running = running;
        let answered = run(&key, &image).await;
        let mut state = locked(&plugin.state);
        let (response, number) = answered.inspect_err(|error| {
            state.failure = Some(Failure {
                image: image.clone(),
                ended: Instant::now(),
                error: error.to_shared(),
            });
        })?;
        let (answer, scope) = response.into_answer(&key.config, number, &image, &host);
        let found = answer.credentials(&key.config.name, &host, &repository, true);
        if answer.until > Instant::now() && !answer.auth.is_empty() {
            state.answers.put(scope, answer);
        }
        Ok(found)
    });
    run.await
        .map_err(|error| broken_off("a credential plugin", error))?
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // no panic can leave what is in it half changed
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Plugin {
    /// What is known from a plugin, shared by all that ask it.
    fn of(key: &PluginKey) -> Arc<Self> {
        let mut plugins = locked(&PLUGINS);
        let plugin = plugins.get_or_insert(key.clone(), || {
            Arc::new(Self {
                run: Arc::default(),
                state: Mutex::new(PluginState {
                    answers: LruCache::new(MAX_ANSWERS),
                    failure: None,
                }),
            })
        });
        Arc::clone(plugin)
    }
}

impl PluginState {
    /// The answer that is kept for a repository. One whose time is over, or that is refused, is forgotten.
    fn usable(
        &mut self,
        host: &str,
        repository: &str,
        refused: Option<AnswerNumber>,
    ) -> Option<&Answer> {
        let scopes = [
            Scope::Image(format!("{host}/{repository}")),
            Scope::Registry(host.to_owned()),
            Scope::Global,
        ];
        let now = Instant::now();
        for scope in &scopes {
            let is_over = self
                .answers
                .peek(scope)
                .is_some_and(|answer| answer.until <= now || Some(answer.number) == refused);
            if is_over {
                self.answers.pop(scope);
            }
        }
        let found = scopes.iter().find(|scope| self.answers.contains(scope))?;
        self.answers.get(found)
    }
}

impl Answer {
    /// The credentials for a repository: those of the last pattern in the order of characters that matches, as with the kubelet.
    fn credentials(
        &self,
        plugin: &str,
        host: &str,
        repository: &str,
        is_new: bool,
    ) -> Option<PluginCredentials> {
        let mut logins = self.auth.iter().rev();
        let (_, login) = logins.find(|it| image_pattern::matches(&it.0, host, repository))?;
        Some(PluginCredentials {
            credentials: Credentials::Password {
                user: login.username.clone(),
                password: login.password.clone(),
            },
            place: format!("the credential plugin {plugin}"),
            answer: self.number,
            is_new,
        })
    }
}

impl Response {
    fn into_answer(
        self,
        config: &PluginConfig,
        number: AnswerNumber,
        image: &str,
        host: &str,
    ) -> (Answer, Scope) {
        let duration = self
            .cache_duration
            .map_or(config.default_cache_duration(), |given| given.0);
        let now = Instant::now();
        let answer = Answer {
            number,
            // longer than a clock can tell is not kept
            until: now.checked_add(duration).unwrap_or(now),
            auth: self.auth.into_iter().flatten().collect(),
        };
        let scope = match self.cache_key_type.as_str() {
            "Global" => Scope::Global,
            "Registry" => Scope::Registry(host.to_owned()),
            _ => Scope::Image(image.to_owned()),
        };
        (answer, scope)
    }
}

/// Runs a plugin.
async fn run(key: &PluginKey, image: &str) -> Result<(Response, AnswerNumber)> {
    let PluginKey {
        plugins, config, ..
    } = key;
    let name = &config.name;
    let path = plugins.bin_dir.join(name);
    let mut environment = key.environment.clone();
    let own = config.variables();
    environment.extend(own.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let request = serde_json::json!({
        "kind": "CredentialProviderRequest",
        "apiVersion": config.protocol,
        "image": image,
    })
    .to_string();
    let program = Program {
        name: &format!("the credential plugin {name}"),
        path: &path,
        arguments: config.arguments(),
        environment: &environment,
        input: request.as_bytes(),
    };
    let exited = program.run(TIME_LIMIT).await;
    let exited = exited.map_err(|error| match error.kind() {
        Kind::NotFound => Error::new(
            Kind::Unauthorized,
            format!(
                "there is no program {}, which {} names",
                path.display(),
                plugins.config.display()
            ),
        ),
        _ => error,
    })?;
    let secrets: Vec<&str> = config.variables().map(|(_, value)| value).collect();
    let words = exited.words(&secrets);
    if !exited.status.success() {
        return Err(Error::new(
            Kind::Unavailable,
            format!(
                "the credential plugin {name} failed for {image} ({}){words}",
                exited.status
            ),
        ));
    }
    let unusable = |what: &str| {
        Error::new(
            Kind::Unavailable,
            format!("the answer of the credential plugin {name} for {image} {what}{words}"),
        )
    };
    // serde's error would quote the answer
    let response: Response = serde_json::from_slice(&exited.output)
        .map_err(|_| unusable("is not a CredentialProviderResponse"))?;
    if response.kind != "CredentialProviderResponse" {
        return Err(unusable("is not a CredentialProviderResponse"));
    }
    if response.api_version != config.protocol {
        return Err(unusable("has another version than the request"));
    }
    if !matches!(
        response.cache_key_type.as_str(),
        "Image" | "Registry" | "Global"
    ) {
        return Err(unusable("has no valid cacheKeyType"));
    }
    Ok((response, AnswerNumber::next()))
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::PermissionsExt,
        path::{Path, PathBuf},
    };

    use super::*;

    /// A plugin that counts its runs in the file `runs`, and what it is asked in `asked`.
    struct Plugin {
        folder: tempfile::TempDir,
        access: Access,
    }

    impl Plugin {
        fn new(script: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let at = |name: &str| folder.path().join(name);
            let plugin = format!(
                "#!/bin/sh\ncd {}\necho run >> runs\ncat > asked\nnumber=$(wc -l < runs)\n{script}\n",
                folder.path().display()
            );
            std::fs::write(at("plugin"), plugin).unwrap();
            std::fs::set_permissions(at("plugin"), PermissionsExt::from_mode(0o755)).unwrap();
            let config = serde_json::json!({
                "apiVersion": "kubelet.config.k8s.io/v1",
                "kind": "CredentialProviderConfig",
                "providers": [{
                    "name": "plugin",
                    "matchImages": ["*.example"],
                    "defaultCacheDuration": "1h",
                    "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                    "env": [{"name": "KEY", "value": "top-secret"}],
                }],
            });
            std::fs::write(at("config"), config.to_string()).unwrap();
            let path = std::env::var("PATH").unwrap();
            let access = Access {
                credential_plugins: Some(CredentialPlugins {
                    config: at("config"),
                    bin_dir: folder.path().to_owned(),
                }),
                helper_environment: [("PATH".to_owned(), path)].into(),
                ..Access::default()
            };
            Self { folder, access }
        }

        fn answering(rest: &str) -> Self {
            Self::new(&format!(
                r#"echo '{{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1",'"{}"'}}'"#,
                rest.replace('"', "\\\"")
            ))
        }

        fn file(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn runs(&self) -> usize {
            lines(&self.file("runs"))
        }

        async fn find(&self, host: &str, repository: &str) -> Option<(String, AnswerNumber)> {
            self.find_unless(host, repository, None).await
        }

        async fn find_unless(
            &self,
            host: &str,
            repository: &str,
            refused: Option<AnswerNumber>,
        ) -> Option<(String, AnswerNumber)> {
            let found = find(&self.access, host, repository, refused).await;
            let found = found.unwrap_or_else(|error| panic!("{}", error.report()))?;
            let Credentials::Password { user, password } = found.credentials else {
                panic!("a password");
            };
            Some((format!("{user}:{password}"), found.answer))
        }

        async fn error(&self) -> Error {
            match find(&self.access, "a.example", "app", None).await {
                Err(error) => error,
                Ok(_) => panic!("credentials"),
            }
        }
    }

    fn lines(path: &Path) -> usize {
        std::fs::read_to_string(path)
            .unwrap_or_default()
            .lines()
            .count()
    }

    const AUTH: &str = r#""auth":{"*.example":{"username":"u","password":"p-$number"}}"#;

    #[tokio::test]
    async fn a_plugin_is_asked_in_the_form_of_its_protocol() {
        let plugin = Plugin::answering(&format!(r#""cacheKeyType":"Image",{AUTH}"#));
        let (login, _) = plugin.find("a.example", "team/app").await.unwrap();
        assert_eq!(login, "u:p-1");
        let asked = std::fs::read(plugin.file("asked")).unwrap();
        let asked: serde_json::Value = serde_json::from_slice(&asked).unwrap();
        assert_eq!(
            asked,
            serde_json::json!({
                "kind": "CredentialProviderRequest",
                "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                "image": "a.example/team/app",
            })
        );
        // not one of its images
        assert!(plugin.find("a.other", "team/app").await.is_none());
        assert_eq!(plugin.runs(), 1);
    }

    #[tokio::test]
    async fn an_answer_is_kept_for_its_images_and_its_time() {
        let images = [
            ("a.example", "one"),
            ("a.example", "one"),
            ("a.example", "two"),
            ("b.example", "one"),
        ];
        for (rest, runs) in [
            (r#""cacheKeyType":"Image""#, 3),
            (r#""cacheKeyType":"Registry""#, 2),
            (r#""cacheKeyType":"Global""#, 1),
            (r#""cacheKeyType":"Global","cacheDuration":"10m""#, 1),
            (r#""cacheKeyType":"Global","cacheDuration":"0s""#, 4),
        ] {
            let plugin = Plugin::answering(&format!("{rest},{AUTH}"));
            for (host, repository) in images {
                plugin.find(host, repository).await.unwrap();
            }
            assert_eq!(plugin.runs(), runs, "{rest}");
        }
        let rest = r#""cacheKeyType":"Global","cacheDuration":"50ms""#;
        let plugin = Plugin::answering(&format!("{rest},{AUTH}"));
        plugin.find("a.example", "one").await.unwrap();
        tokio::time::sleep(Duration::from_millis(60)).await;
        let (login, _) = plugin.find("a.example", "one").await.unwrap();
        assert_eq!(login, "u:p-2");
    }

    #[tokio::test]
    async fn an_answer_that_is_refused_is_asked_for_once_more_for_all() {
        let plugin = Plugin::answering(&format!(r#""cacheKeyType":"Registry",{AUTH}"#));
        let (_, first) = plugin.find("a.example", "one").await.unwrap();
        let again = (0..8).map(|_| plugin.find_unless("a.example", "two", Some(first)));
        for found in futures_util::future::join_all(again).await {
            assert_eq!(found.unwrap().0, "u:p-2");
        }
        assert_eq!(plugin.runs(), 2);
    }

    #[tokio::test]
    async fn the_longest_of_equal_patterns_counts_and_none_is_no_credentials() {
        let auth = r#""cacheKeyType":"Image","auth":{"a.example":{"username":"host","password":""},"a.example/team":{"username":"path","password":""}}"#;
        let plugin = Plugin::answering(auth);
        assert_eq!(
            plugin.find("a.example", "team/app").await.unwrap().0,
            "path:"
        );
        assert_eq!(plugin.find("a.example", "other").await.unwrap().0, "host:");
        assert!(plugin.find("b.example", "other").await.is_none());
        for none in [r#""auth":null,"#, ""] {
            let plugin = Plugin::answering(&format!(r#"{none}"cacheKeyType":"Image""#));
            assert!(plugin.find("a.example", "app").await.is_none());
            assert!(plugin.find("a.example", "app").await.is_none());
            assert_eq!(plugin.runs(), 2, "an empty answer is not kept");
        }
    }

    #[tokio::test]
    async fn plugins_that_fail_are_named_with_their_words_and_without_secrets() {
        let kind = r#""kind":"CredentialProviderResponse""#;
        let version = r#""apiVersion":"credentialprovider.kubelet.k8s.io/v1""#;
        for (script, said) in [
            (
                "echo my-password; echo no my-password at top-secret >&2; exit 3",
                "(no ... at ...)",
            ),
            ("echo my-password", "is not a CredentialProviderResponse"),
            (
                &format!("echo '{{{kind}}}'"),
                "is not a CredentialProviderResponse",
            ),
            (
                &format!(r#"echo '{{"kind":"my-password",{version},"cacheKeyType":"Image"}}'"#),
                "is not a CredentialProviderResponse",
            ),
            (
                &format!(r#"echo '{{{kind},"apiVersion":"my-password","cacheKeyType":"Image"}}'"#),
                "another version",
            ),
            (
                &format!(r#"echo '{{{kind},{version},"cacheKeyType":"my-password"}}'"#),
                "no valid cacheKeyType",
            ),
            ("head -c 1000000 /dev/zero", "more than 65536 bytes"),
        ] {
            let plugin = Plugin::new(script);
            let error = plugin.error().await;
            assert_eq!(error.kind(), Kind::Unavailable, "{script}");
            let report = error.report();
            assert!(
                report.contains(said) && report.contains("plugin"),
                "{report}"
            );
            assert!(
                !report.contains("my-password") && !report.contains("top-secret"),
                "{report}"
            );
        }
        let plugin = Plugin::new("");
        std::fs::remove_file(plugin.file("plugin")).unwrap();
        let error = plugin.error().await;
        assert_eq!(error.kind(), Kind::Unauthorized);
        assert!(error.report().contains("there is no program"), "{error:?}");
    }

    #[tokio::test]
    async fn who_waits_for_a_run_that_fails_gets_its_error() {
        let plugin = Plugin::new("sleep 0.3; exit 1");
        let errors = futures_util::future::join_all((0..5).map(|_| plugin.error())).await;
        assert!(errors.iter().all(|it| it.report().contains("failed")));
        assert_eq!(plugin.runs(), 1);
        plugin.error().await;
        assert_eq!(plugin.runs(), 2);
    }

    #[tokio::test]
    async fn a_plugin_that_hangs_for_one_image_does_not_hold_up_a_kept_answer() {
        let plugin = Plugin::answering(&format!(r#""cacheKeyType":"Image",{AUTH}"#));
        plugin.find("a.example", "one").await.unwrap();
        let script = std::fs::read_to_string(plugin.file("plugin")).unwrap();
        std::fs::write(
            plugin.file("plugin"),
            script.replace("number=", "sleep 20\nnumber="),
        )
        .unwrap();
        let hangs = plugin.find("a.example", "two");
        let kept = async {
            while plugin.runs() < 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            plugin.find("a.example", "one").await.unwrap();
        };
        tokio::select! {
            _ = hangs => panic!("it answered"),
            () = kept => {}
        }
    }

    #[tokio::test]
    async fn a_run_that_nobody_waits_for_any_more_answers_the_next() {
        let script = format!(
            r#"sleep 0.3; echo '{{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image",'"{}"'}}'"#,
            AUTH.replace('"', "\\\"")
        );
        let plugin = Plugin::new(&script);
        let given_up = tokio::time::timeout(
            Duration::from_millis(50),
            find(&plugin.access, "a.example", "app", None),
        );
        assert!(given_up.await.is_err());
        let (login, _) = plugin.find("a.example", "app").await.unwrap();
        assert_eq!(login, "u:p-1");
        assert_eq!(plugin.runs(), 1);
    }
}
