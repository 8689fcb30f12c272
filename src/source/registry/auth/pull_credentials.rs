//! The credentials of pulls: those that a client of the CRI image service, as the kubelet is one, has sent with the pull of an image.
//!
//! They are in memory only, for the registry that the pull has named and the repository of its image, because registries authorize for
//! repositories. Those of a pull that has succeeded are used before those of a pull that still runs, so a pull with wrong credentials does
//! not disturb the containers that read the same repository. Newer ones are used before older ones, which follow if they are refused.

use std::{
    num::NonZeroUsize,
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use lru::LruCache;
use tokio::time::Instant;

use super::{
    answer::AnswerNumber,
    docker_config::{Credentials, decode, is_host},
};
use crate::{
    error::{Error, Kind, Result},
    oci::{Reference, reference::DOCKER_HUB},
};

/// Maximum number of repositories with credentials. Those that were not used for the longest time are forgotten.
const MAX_REPOSITORIES: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1023);
/// Maximum number of credentials of one repository.
pub(super) const MAX_LOGINS: usize = 4;
/// Maximum size of all fields of credentials together, in bytes.
const MAX_BYTES: usize = 16 << 10;
/// How long credentials are kept after the last pull or the last use.
const KEEP_TIME: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long credentials that were refused are not used: the registry may have been in trouble.
const REFUSED_TIME: Duration = Duration::from_secs(30);
/// Credentials that are refused twice within this time are forgotten.
const REFUSED_TWICE_TIME: Duration = Duration::from_secs(600);

static SHARED: LazyLock<PullCredentials> = LazyLock::new(PullCredentials::default);

/// What a pull sends, as `AuthConfig` of the CRI. It has no `Debug`.
#[derive(Clone, Default)]
pub(crate) struct PullAuth {
    /// The user name.
    pub(crate) username: String,
    /// The password.
    pub(crate) password: String,
    /// `USER:PASSWORD` in base64.
    pub(crate) auth: String,
    /// The host that the credentials are for, or a URL of it; empty: the registry of the image.
    pub(crate) server_address: String,
    /// A refresh token of the registry's token service.
    pub(crate) identity_token: String,
    /// A token for the registry itself.
    pub(crate) registry_token: String,
}

/// A pull that runs, and whose credentials may be used. When it is dropped without success, they are forgotten.
pub(crate) struct Pull {
    all: &'static PullCredentials,
    place: Place,
    number: AnswerNumber,
}

/// Notes the credentials of a pull that begins; `None`: it has none.
pub(crate) fn begin(image: &Reference, auth: PullAuth) -> Result<Option<Pull>> {
    begin_in(&SHARED, image, auth)
}

/// The credentials to use for a repository, and their number. `refused`: those with this number were refused.
pub(super) fn find(
    host: &str,
    repository: &str,
    refused: Option<AnswerNumber>,
) -> Option<(Credentials, AnswerNumber)> {
    SHARED.find(&Place::new(host, repository), refused)
}

/// The credentials of pulls that have succeeded, for the next daemon. They are secret: for memory alone.
pub(crate) fn kept_bytes() -> Vec<u8> {
    SHARED.kept_bytes()
}

/// Takes over the credentials that the daemon before has kept.
pub(crate) fn take_over(kept: &[u8]) {
    SHARED.take_over(kept);
}

/// Maximum length of [`kept_bytes`].
pub(crate) const MAX_KEPT_BYTES: u64 = 256 << 20;

/// What is kept for the next daemon of a repository: the credentials in their order, with the time that they are kept, in seconds.
#[derive(serde::Serialize, serde::Deserialize)]
struct Kept {
    place: Place,
    logins: Vec<(Credentials, u64)>,
}

/// A repository at a host.
#[derive(Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
struct Place {
    host: String,
    repository: String,
}

impl Place {
    fn new(host: &str, repository: &str) -> Self {
        Self {
            host: host.to_owned(),
            repository: repository.to_owned(),
        }
    }
}

/// Credentials of a repository.
struct Login {
    number: AnswerNumber,
    credentials: Credentials,
    /// Pulls with them that run.
    running: usize,
    /// Whether a pull with them has succeeded.
    is_proven: bool,
    until: Instant,
    refused: Option<Instant>,
}

/// All credentials of pulls.
struct PullCredentials(Mutex<LruCache<Place, Vec<Login>>>);

impl Default for PullCredentials {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(MAX_REPOSITORIES)))
    }
}

fn begin_in(
    all: &'static PullCredentials,
    image: &Reference,
    auth: PullAuth,
) -> Result<Option<Pull>> {
    let Reference::Registry {
        host, repository, ..
    } = image
    else {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!("{image} is not in a registry"),
        ));
    };
    let host = match auth.server_address.as_str() {
        "" => host.clone(),
        address => host_of_address(address),
    };
    let place = Place {
        host,
        repository: repository.clone(),
    };
    Ok(credentials_of(auth)?.map(|credentials| Pull {
        all,
        number: all.begin(&place, credentials),
        place,
    }))
}

/// The host of `serverAddress`, as references name it.
fn host_of_address(address: &str) -> String {
    let bare = address
        .strip_prefix("https://")
        .or_else(|| address.strip_prefix("http://"))
        .unwrap_or(address);
    let host = bare.split('/').next().unwrap_or(bare);
    match is_host(host, DOCKER_HUB) {
        true => DOCKER_HUB.to_owned(),
        false => host.to_owned(),
    }
}

/// The credentials that are used, in the order of containerd; `None`: the pull is anonymous.
fn credentials_of(auth: PullAuth) -> Result<Option<Credentials>> {
    let fields = [
        &auth.username,
        &auth.password,
        &auth.auth,
        &auth.identity_token,
        &auth.registry_token,
    ];
    let size: usize = fields.iter().map(|field| field.len()).sum();
    if size > MAX_BYTES {
        return Err(Error::new(
            Kind::Unsupported,
            format!("the credentials of the pull have {size} bytes, over the limit of {MAX_BYTES}"),
        ));
    }
    Ok(if !auth.username.is_empty() {
        Some(Credentials::Password {
            user: auth.username,
            password: auth.password,
        })
    } else if !auth.identity_token.is_empty() {
        Some(Credentials::IdentityToken(auth.identity_token))
    } else if !auth.auth.is_empty() {
        let decoded = decode(&auth.auth).map_err(|why| {
            Error::new(
                Kind::InvalidArgument,
                format!("the credentials of the pull: {why}"),
            )
        })?;
        Some(decoded)
    } else if !auth.registry_token.is_empty() {
        Some(Credentials::RegistryToken(auth.registry_token))
    } else {
        None
    })
}

impl Pull {
    /// The image was pulled: its credentials are kept.
    pub(crate) fn succeeded(self) {
        self.all.change(&self.place, self.number, |login| {
            login.is_proven = true;
            login.refused = None;
            login.until = Instant::now() + KEEP_TIME;
        });
        // the newest are first
        let mut all = self.all.lock();
        if let Some(logins) = all.get_mut(&self.place)
            && let Some(position) = logins.iter().position(|it| it.number == self.number)
        {
            logins[..=position].rotate_right(1);
        }
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        let change = |login: &mut Login| login.running = login.running.saturating_sub(1);
        self.all.change(&self.place, self.number, change);
        self.all.tidy(&self.place);
    }
}

impl PullCredentials {
    fn lock(&self) -> MutexGuard<'_, LruCache<Place, Vec<Login>>> {
        // no panic can leave what is in it half changed
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the credentials of a pull that begins, behind the others. Equal ones are not added twice.
    fn begin(&self, place: &Place, credentials: Credentials) -> AnswerNumber {
        let mut all = self.lock();
        let logins = all.get_or_insert_mut(place.clone(), Vec::new);
        let until = Instant::now() + KEEP_TIME;
        if let Some(known) = logins.iter_mut().find(|it| it.credentials == credentials) {
            known.running += 1;
            known.until = until;
            return known.number;
        }
        if logins.len() >= MAX_LOGINS {
            // one of a pull that has not succeeded, else the oldest
            let unproven = logins.iter().position(|login| !login.is_proven);
            logins.remove(unproven.unwrap_or(logins.len() - 1));
        }
        let number = AnswerNumber::next();
        logins.push(Login {
            number,
            credentials,
            running: 1,
            is_proven: false,
            until,
            refused: None,
        });
        number
    }

    fn change(&self, place: &Place, number: AnswerNumber, change: impl FnOnce(&mut Login)) {
        let mut all = self.lock();
        let logins = all.peek_mut(place);
        let mut logins = logins.into_iter().flatten();
        if let Some(login) = logins.find(|login| login.number == number) {
            change(login);
        }
    }

    /// Forgets what is not needed any more of a repository.
    fn tidy(&self, place: &Place) {
        let now = Instant::now();
        let mut all = self.lock();
        let Some(logins) = all.peek_mut(place) else {
            return;
        };
        logins.retain(|login| login.running > 0 || login.is_proven && login.until > now);
        if logins.is_empty() {
            all.pop(place);
        }
    }

    fn kept_bytes(&self) -> Vec<u8> {
        let now = Instant::now();
        let all = self.lock();
        // the least recently used first
        let kept: Vec<Kept> = all
            .iter()
            .rev()
            .map(|(place, logins)| Kept {
                place: place.clone(),
                logins: logins
                    .iter()
                    .filter(|login| login.is_proven && login.until > now)
                    .map(|login| {
                        let left = login.until.duration_since(now).as_secs();
                        (login.credentials.clone(), left)
                    })
                    .collect(),
            })
            .collect();
        // the types have nothing that JSON has not
        serde_json::to_vec(&kept).unwrap_or_default()
    }

    fn take_over(&self, kept: &[u8]) {
        // an error would quote secrets
        let Ok(kept) = serde_json::from_slice::<Vec<Kept>>(kept) else {
            tracing::warn!("the credentials of pulls that the daemon before has kept are not read");
            return;
        };
        let now = Instant::now();
        let mut all = self.lock();
        for Kept { place, logins } in kept {
            let logins = logins.into_iter().take(MAX_LOGINS);
            let logins: Vec<Login> = logins
                .map(|(credentials, left)| Login {
                    number: AnswerNumber::next(),
                    credentials,
                    running: 0,
                    is_proven: true,
                    until: now + Duration::from_secs(left).min(KEEP_TIME),
                    refused: None,
                })
                .collect();
            if !logins.is_empty() {
                all.put(place, logins);
            }
        }
    }

    fn find(
        &self,
        place: &Place,
        refused: Option<AnswerNumber>,
    ) -> Option<(Credentials, AnswerNumber)> {
        let now = Instant::now();
        if let Some(refused) = refused {
            self.change(place, refused, |login| {
                let before = login.refused.replace(now);
                let is_second = before.is_some_and(|before| {
                    (REFUSED_TIME..REFUSED_TWICE_TIME).contains(&now.duration_since(before))
                });
                if is_second {
                    login.until = now;
                }
            });
        }
        self.tidy(place);
        let mut all = self.lock();
        let logins = all.get_mut(place)?;
        let is_usable = |login: &Login| {
            login
                .refused
                .is_none_or(|refused| now.duration_since(refused) >= REFUSED_TIME)
        };
        let proven = logins.iter().position(|it| it.is_proven && is_usable(it));
        // the newest of those that are not proven is the last
        let found = proven.or_else(|| logins.iter().rposition(is_usable))?;
        let login = &mut logins[found];
        login.until = login.until.max(now + KEEP_TIME);
        Some((login.credentials.clone(), login.number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A memory of the test's own.
    fn memory() -> &'static PullCredentials {
        Box::leak(Box::default())
    }

    fn pull(all: &'static PullCredentials, image: &str, user: &str) -> Pull {
        let auth = PullAuth {
            username: user.to_owned(),
            password: "secret".to_owned(),
            ..PullAuth::default()
        };
        let pull = begin_in(all, &image.parse().unwrap(), auth).unwrap();
        pull.unwrap()
    }

    fn user(all: &PullCredentials, host: &str, repository: &str) -> Option<(String, AnswerNumber)> {
        found(all, host, repository, None)
    }

    fn found(
        all: &PullCredentials,
        host: &str,
        repository: &str,
        refused: Option<AnswerNumber>,
    ) -> Option<(String, AnswerNumber)> {
        let (credentials, number) = all.find(&Place::new(host, repository), refused)?;
        let Credentials::Password { user, .. } = credentials else {
            panic!("no password");
        };
        Some((user, number))
    }

    const HOST: &str = "registry.example";

    #[tokio::test(start_paused = true)]
    async fn credentials_are_for_the_host_and_the_repository_of_the_pull() {
        let all = memory();
        pull(all, "registry.example/team/app:1", "a").succeeded();
        assert_eq!(user(all, HOST, "team/app").unwrap().0, "a");
        for (host, repository) in [
            (HOST, "team"),
            (HOST, "team/app2"),
            (HOST, "team/app/x"),
            ("registry.example:443", "team/app"),
            ("mirror.example", "team/app"),
            ("docker.io", "team/app"),
        ] {
            assert!(user(all, host, repository).is_none(), "{host} {repository}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_address_of_the_server_names_the_host() {
        let all = memory();
        for (address, host) in [
            ("mirror.example:5000", "mirror.example:5000"),
            ("https://mirror.example/v2/", "mirror.example"),
            ("https://index.docker.io/v1/", "docker.io"),
        ] {
            let auth = PullAuth {
                auth: "dTpw".to_owned(),
                server_address: address.to_owned(),
                ..PullAuth::default()
            };
            let image = "registry.example/app".parse().unwrap();
            begin_in(all, &image, auth).unwrap().unwrap().succeeded();
            assert_eq!(user(all, host, "app").unwrap().0, "u", "{address}");
        }
        assert!(user(all, HOST, "app").is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pull_that_fails_leaves_nothing_and_disturbs_nobody() {
        let all = memory();
        let first = pull(all, "registry.example/app:1", "right");
        // while it runs, its layers are read with them
        assert_eq!(user(all, HOST, "app").unwrap().0, "right");
        first.succeeded();
        let wrong = pull(all, "registry.example/app:2", "wrong");
        assert_eq!(user(all, HOST, "app").unwrap().0, "right");
        drop(wrong);
        assert_eq!(user(all, HOST, "app").unwrap().0, "right");
        drop(pull(all, "registry.example/other:1", "wrong"));
        assert!(user(all, HOST, "other").is_none());
        assert_eq!(all.lock().len(), 1);
        // a pull with known ones that fails, for another reason, does not remove them
        drop(pull(all, "registry.example/app:1", "right"));
        assert_eq!(user(all, HOST, "app").unwrap().0, "right");
    }

    #[tokio::test(start_paused = true)]
    async fn newer_ones_are_first_and_refused_ones_are_followed() {
        let all = memory();
        pull(all, "registry.example/app:1", "old").succeeded();
        pull(all, "registry.example/app:1", "new").succeeded();
        let (name, new) = user(all, HOST, "app").unwrap();
        assert_eq!(name, "new");
        let (name, old) = found(all, HOST, "app", Some(new)).unwrap();
        assert_eq!(name, "old");
        assert!(found(all, HOST, "app", Some(old)).is_none());
        // one that has begun replaces them
        let third = pull(all, "registry.example/app:2", "third");
        assert_eq!(user(all, HOST, "app").unwrap().0, "third");
        third.succeeded();
        assert_eq!(user(all, HOST, "app").unwrap().0, "third");
        // a pull with the old ones shows that they are good
        pull(all, "registry.example/app:1", "old").succeeded();
        assert_eq!(user(all, HOST, "app").unwrap().0, "old");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_refused_once_is_tried_again_and_twice_is_forgotten() {
        let all = memory();
        pull(all, "registry.example/app:1", "a").succeeded();
        let (_, number) = user(all, HOST, "app").unwrap();
        assert!(found(all, HOST, "app", Some(number)).is_none());
        // another request with the same ones
        assert!(found(all, HOST, "app", Some(number)).is_none());
        tokio::time::advance(REFUSED_TIME).await;
        assert!(user(all, HOST, "app").is_some());
        assert!(found(all, HOST, "app", Some(number)).is_none());
        tokio::time::advance(REFUSED_TIME).await;
        assert!(user(all, HOST, "app").is_none());
        assert_eq!(all.lock().len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn they_are_kept_for_a_time_and_their_number_is_bounded() {
        let all = memory();
        pull(all, "registry.example/app:1", "a").succeeded();
        tokio::time::advance(KEEP_TIME - Duration::from_secs(1)).await;
        assert!(user(all, HOST, "app").is_some(), "a use keeps them");
        tokio::time::advance(KEEP_TIME - Duration::from_secs(1)).await;
        assert!(user(all, HOST, "app").is_some());
        tokio::time::advance(KEEP_TIME).await;
        assert!(user(all, HOST, "app").is_none());
        let running: Vec<Pull> = (0..100)
            .map(|number| pull(all, "registry.example/app:1", &number.to_string()))
            .collect();
        assert_eq!(all.lock().iter().next().unwrap().1.len(), MAX_LOGINS);
        drop(running);
        assert_eq!(all.lock().len(), 0);
        for number in 0..2000 {
            pull(all, &format!("registry.example/app{number}"), "a").succeeded();
        }
        assert_eq!(all.lock().len(), MAX_REPOSITORIES.get());
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_daemon_takes_over_what_has_succeeded() {
        let all = memory();
        pull(all, "registry.example/app:1", "old").succeeded();
        pull(all, "registry.example/app:1", "new").succeeded();
        let running = pull(all, "registry.example/other:1", "running");
        let kept = all.kept_bytes();
        drop(running);
        tokio::time::advance(Duration::from_secs(60)).await;
        let next = memory();
        next.take_over(&kept);
        let (name, new) = user(next, HOST, "app").unwrap();
        assert_eq!(name, "new");
        assert_eq!(found(next, HOST, "app", Some(new)).unwrap().0, "old");
        assert!(user(next, HOST, "other").is_none());
        next.take_over(b"[{");
        assert_eq!(next.lock().len(), 1);
    }

    #[test]
    fn what_a_pull_sends_is_checked() {
        let begin =
            |auth: PullAuth| begin_in(memory(), &"registry.example/app".parse().unwrap(), auth);
        assert!(begin(PullAuth::default()).unwrap().is_none(), "anonymous");
        let wrong = PullAuth {
            auth: "%secret%".to_owned(),
            ..PullAuth::default()
        };
        let error = begin(wrong).err().unwrap();
        assert!(!error.report().contains("secret"), "{}", error.report());
        let long = PullAuth {
            username: "u".to_owned(),
            password: "p".repeat(MAX_BYTES),
            ..PullAuth::default()
        };
        assert_eq!(begin(long).err().unwrap().kind(), Kind::Unsupported);
        let of = |auth| credentials_of(auth).unwrap().unwrap();
        let token = of(PullAuth {
            identity_token: "t".to_owned(),
            registry_token: "r".to_owned(),
            ..PullAuth::default()
        });
        assert!(matches!(token, Credentials::IdentityToken(token) if token == "t"));
        let token = of(PullAuth {
            registry_token: "r".to_owned(),
            ..PullAuth::default()
        });
        assert!(matches!(token, Credentials::RegistryToken(token) if token == "r"));
    }
}
