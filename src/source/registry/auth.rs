//! Authorization at one repository of a registry: anonymous until the registry sends a challenge, then as the challenge requires.
//!
//! Basic (RFC 7617), and tokens by the specification of Docker's token service, with its OAuth2 form for refresh tokens.

mod answer;
pub(super) mod challenge;
mod credentials;
mod docker_config;
mod image_pattern;
mod plugin_config;
mod plugins;
pub(crate) mod pull_credentials;
pub(super) mod renewals;

use std::sync::Arc;

use base64::Engine as _;
use reqwest::{Method, Request, header, header::HeaderValue};
use tokio::sync::Mutex;
use url::Url;

use self::{
    answer::AnswerNumber, challenge::Challenge, credentials::Found, docker_config::Credentials,
};
use super::{
    refusal::{Refusal, host_of},
    retry::Failure,
    transport::{DOCUMENT, Transport},
};
use crate::{
    error::{Error, Kind},
    source::{Access, hosts::RegistryHost},
};

const MAX_TOKEN_ANSWER: usize = 1 << 20;

/// The purpose of a client of a repository, and so the scope of its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::source) enum Purpose {
    /// Reading.
    Pull,
    /// Writing too.
    Push,
}

/// The authorization of a request, and its number among all authorizations so far.
#[derive(Clone, Default)]
pub(super) struct Authorization {
    /// `None` is anonymous.
    pub(super) header: Option<HeaderValue>,
    generation: u64,
}

/// The authorization of one repository, shared by all its requests.
pub(super) struct Authenticator {
    at: RegistryHost,
    /// The host for which credentials are looked up.
    host: String,
    repository: String,
    access: Access,
    transport: Arc<Transport>,
    purpose: Purpose,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    current: Authorization,
    /// The last challenge of the registry.
    challenges: Vec<Challenge>,
    /// The source of the credentials.
    place: Option<String>,
    /// The answer of a plugin that has them, or the number of the credentials of a pull.
    answer: Option<AnswerNumber>,
    /// Whether they are those of a pull.
    is_of_pull: bool,
    /// Why a credential helper or plugin gave none.
    trouble: Option<Error>,
    /// Other repositories of this registry that a token must let one read.
    also_from: Vec<String>,
}

struct TokenService {
    realm: Url,
    service: Option<String>,
    scopes: Vec<String>,
}

#[derive(serde::Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl Authenticator {
    pub(super) fn new(
        at: RegistryHost,
        repository: &str,
        access: &Access,
        transport: &Arc<Transport>,
        purpose: Purpose,
    ) -> Self {
        Self {
            host: at.login.clone(),
            at,
            repository: repository.to_owned(),
            access: access.clone(),
            transport: Arc::clone(transport),
            purpose,
            state: Mutex::default(),
        }
    }

    /// The current authorization. The expiry of a token is not tracked: the registry reports it with 401.
    pub(super) async fn current(&self) -> Authorization {
        self.state.lock().await.current.clone()
    }

    /// Lets the tokens from now on read another repository of the same registry.
    pub(super) async fn also_pull_from(&self, repository: &str) {
        let mut state = self.state.lock().await;
        if repository != self.repository && !state.also_from.iter().any(|one| one == repository) {
            state.also_from.push(repository.to_owned());
        }
    }

    /// Handles a 401 for a request that was sent with `shown`, or, without a challenge, a refusal of credentials that have expired. Of many
    /// requests at once, the first renews the authorization and the others use the result: then this is false. `is_again`: it was renewed
    /// for this request, so a token that has not expired was refused.
    pub(super) async fn answer(
        &self,
        challenges: Option<&[Challenge]>,
        shown: &Authorization,
        is_again: bool,
    ) -> Result<bool, Failure> {
        let mut state = self.state.lock().await;
        if state.current.generation != shown.generation {
            return Ok(false);
        }
        if let Some(challenges) = challenges {
            state.challenges = challenges.to_vec();
        }
        let refused = state.answer.filter(|_| shown.header.is_some());
        self.obey(&mut state, refused, is_again).await?;
        Ok(true)
    }

    /// Whether there may be others if the current credentials are refused.
    pub(super) async fn may_have_others(&self) -> bool {
        self.state.lock().await.is_of_pull
    }

    /// Forgets that there were no credentials for `shown`, which was refused: the next request looks for them again.
    pub(super) async fn forget_anonymous(&self, shown: &Authorization) {
        let mut state = self.state.lock().await;
        if state.current.generation == shown.generation && state.place.is_none() {
            state.current = Authorization {
                header: None,
                generation: shown.generation + 1,
            };
        }
    }

    /// `refused`: the answer whose credentials, or a token for them, were shown.
    async fn obey(
        &self,
        state: &mut State,
        refused: Option<AnswerNumber>,
        is_again: bool,
    ) -> Result<(), Failure> {
        let challenges = state.challenges.clone();
        let with = |scheme: &str| challenges.iter().find(|one| one.scheme == scheme);
        if let Some(bearer) = with("bearer") {
            let service = self.token_service(bearer, &state.also_from)?;
            return self
                .renew(state, service, refused.filter(|_| is_again))
                .await;
        }
        if with("basic").is_some() {
            return self.show_password(state, refused).await;
        }
        let schemes: Vec<&str> = challenges.iter().map(|one| one.scheme.as_str()).collect();
        Err(self.unauthorized(match schemes.is_empty() {
            true => "it answered 401 without a WWW-Authenticate challenge".to_owned(),
            false => format!(
                "it requires {}, which is not supported",
                schemes.join(" or ")
            ),
        }))
    }

    /// The kind of an error about a registry that keeps refusing, and advice.
    pub(super) async fn advice(&self) -> (Kind, String) {
        let state = self.state.lock().await;
        let advice = match &state.place {
            Some(place) => format!(
                "{} refused the credentials of {place} for {}",
                self.host, self.repository
            ),
            None => format!(
                "{} refused anonymous access to {} ({}): check the name, or log in (docker login {})",
                self.host,
                self.repository,
                self.places(&state),
                self.host
            ),
        };
        (state.refusal_kind(), advice)
    }

    fn unauthorized(&self, why: String) -> Failure {
        Failure::Final(Error::new(
            Kind::Unauthorized,
            format!("{}: {why}", self.host),
        ))
    }

    async fn find(
        &self,
        state: &mut State,
        refused: Option<AnswerNumber>,
    ) -> Result<Option<Found>, Failure> {
        let lookup = credentials::find(&self.access, &self.host, &self.repository, refused)
            .await
            .map_err(Failure::Final)?;
        state.trouble = lookup.trouble;
        state.place = lookup.found.as_ref().map(|found| found.place.clone());
        state.answer = lookup.found.as_ref().and_then(|found| found.answer);
        state.is_of_pull = lookup.found.as_ref().is_some_and(|it| it.is_of_pull);
        Ok(lookup.found)
    }

    /// The places where credentials were looked for in vain.
    fn places(&self, state: &State) -> String {
        let places = credentials::places(&self.access);
        match &state.trouble {
            Some(trouble) => format!("{places}; {}", trouble.report()),
            None => places,
        }
    }

    async fn show_password(
        &self,
        state: &mut State,
        refused: Option<AnswerNumber>,
    ) -> Result<(), Failure> {
        let found = self.find(state, refused).await?;
        let shown = match found.map(|found| found.credentials) {
            Some(Credentials::Password { user, password }) => self.basic(&user, &password)?,
            Some(Credentials::RegistryToken(token)) => self.bearer(&token)?,
            Some(Credentials::IdentityToken(_)) => {
                return Err(self.unauthorized(
                    "it requires a user name and password, but the credentials have a token"
                        .to_owned(),
                ));
            }
            None => {
                return Err(Failure::Final(Error::new(
                    state.refusal_kind(),
                    format!(
                        "{}: it requires a user name and password ({}): log in (docker login {})",
                        self.host,
                        self.places(state),
                        self.host
                    ),
                )));
            }
        };
        state.show(shown);
        Ok(())
    }

    fn token_service(
        &self,
        bearer: &Challenge,
        also_from: &[String],
    ) -> Result<TokenService, Failure> {
        let realm = bearer.parameter("realm").unwrap_or("");
        let realm: Url = realm.parse().map_err(|_| {
            self.unauthorized("it names no token service with a valid URL".to_owned())
        })?;
        // a registry that uses TLS must not have the password sent in clear text
        let is_safe = realm.scheme() == "https"
            || realm.scheme() == "http" && self.at.root.scheme() != "https";
        if !is_safe || realm.host_str().is_none() {
            return Err(self.unauthorized(format!(
                "its token service {} does not use https",
                host_of(&realm)
            )));
        }
        let given = |name: &str| bearer.parameter(name).filter(|value| !value.is_empty());
        Ok(TokenService {
            realm,
            service: given("service").map(str::to_owned),
            scopes: self.scopes(given("scope"), also_from),
        })
    }

    /// The scope of a token: what the registry asks for, and what the client is going to do.
    fn scopes(&self, given: Option<&str>, also_from: &[String]) -> Vec<String> {
        let own = match self.purpose {
            Purpose::Pull => format!("repository:{}:pull", self.repository),
            Purpose::Push => format!("repository:{}:pull,push", self.repository),
        };
        let mut scopes = match (self.purpose, given) {
            (Purpose::Pull, Some(given)) => vec![given.to_owned()],
            (Purpose::Pull, None) => vec![own],
            // a first GET is challenged for `pull` alone, and `push` comes with the next request
            (Purpose::Push, given) => std::iter::once(own.clone())
                .chain(
                    given
                        .filter(|given| !own.starts_with(given))
                        .map(str::to_owned),
                )
                .collect(),
        };
        scopes.extend(
            also_from
                .iter()
                .map(|repository| format!("repository:{repository}:pull")),
        );
        scopes
    }

    /// Gets a token and shows it from now on. `refused`: credentials for which a token was refused.
    async fn renew(
        &self,
        state: &mut State,
        service: TokenService,
        refused: Option<AnswerNumber>,
    ) -> Result<(), Failure> {
        let mut found = self.find(state, refused).await?;
        let host = host_of(&service.realm);
        let (mut may_renew, mut others) = (true, pull_credentials::MAX_LOGINS);
        let mut body = loop {
            let credentials = found.as_ref().map(|found| &found.credentials);
            if let Some(Credentials::RegistryToken(token)) = credentials {
                let shown = self.bearer(token)?;
                state.show(shown);
                return Ok(());
            }
            let mut request = self.token_request(&service, credentials)?;
            // the configured headers are for this host alone
            if service.realm.origin() == self.at.root.origin() {
                for (name, value) in &self.at.headers {
                    request
                        .headers_mut()
                        .entry(name)
                        .or_insert_with(|| value.clone());
                }
            }
            let body = self.transport.send(request, DOCUMENT).await?;
            if body.head().status().is_success() {
                break body;
            }
            let refusal = Refusal::read(body.into_response()).await;
            let kept = found.filter(|found| found.is_kept && refusal.is_about_credentials());
            let may_find = match kept.as_ref().is_some_and(|found| found.is_of_pull) {
                true if others > 0 => {
                    others -= 1;
                    true
                }
                true => false,
                false => std::mem::take(&mut may_renew),
            };
            if let Some(refused) = kept.and_then(|found| found.answer)
                && may_find
            {
                found = self.find(state, Some(refused)).await?;
                continue;
            }
            return Err(self.no_token(state, &host, &refusal));
        };
        let mut bytes = Vec::new();
        while let Some(piece) = body.next().await? {
            if bytes.len() + piece.len() > MAX_TOKEN_ANSWER {
                return Err(self.unauthorized(format!(
                    "{host} answered a token request with more than 1 MiB"
                )));
            }
            bytes.extend_from_slice(&piece);
        }
        // serde's error would quote the token
        let answer: TokenAnswer = serde_json::from_slice(&bytes).map_err(|_| {
            self.unauthorized(format!(
                "{host} answered a token request with an invalid token response"
            ))
        })?;
        let token = answer
            .token
            .filter(|token| !token.is_empty())
            .or(answer.access_token)
            .filter(|token| !token.is_empty())
            .ok_or_else(|| {
                self.unauthorized(format!("{host} answered a token request without a token"))
            })?;
        let shown = self.bearer(&token)?;
        state.show(shown);
        Ok(())
    }

    fn no_token(&self, state: &State, host: &str, refusal: &Refusal) -> Failure {
        match refusal.failure() {
            Failure::Final(error) => {
                let place = state.place.as_deref().map_or_else(
                    || self.places(state),
                    |place| format!("with the credentials of {place}"),
                );
                Failure::Final(Error::with_source(
                    state.refusal_kind(),
                    format!(
                        "{host} refused a token for {}/{} ({place})",
                        self.host, self.repository
                    ),
                    error,
                ))
            }
            passing => passing,
        }
    }

    /// A GET with name and password, or none; with a refresh token the POST of the OAuth2 form.
    fn token_request(
        &self,
        service: &TokenService,
        credentials: Option<&Credentials>,
    ) -> Result<Request, Failure> {
        if let Some(Credentials::IdentityToken(token)) = credentials {
            let mut form = url::form_urlencoded::Serializer::new(String::new());
            form.append_pair("grant_type", "refresh_token");
            form.append_pair("service", service.service.as_deref().unwrap_or(""));
            form.append_pair("client_id", "socinbd");
            form.append_pair("scope", &service.scopes.join(" "));
            form.append_pair("refresh_token", token);
            let mut request = Request::new(Method::POST, service.realm.clone());
            let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
            request.headers_mut().insert(header::CONTENT_TYPE, kind);
            *request.body_mut() = Some(form.finish().into());
            return Ok(request);
        }
        let mut url = service.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &service.service {
                query.append_pair("service", service);
            }
            for scope in &service.scopes {
                query.append_pair("scope", scope);
            }
            if let Some(Credentials::Password { user, .. }) = credentials {
                query.append_pair("account", user);
            }
        }
        let mut request = Request::new(Method::GET, url);
        if let Some(Credentials::Password { user, password }) = credentials {
            let value = self.basic(user, password)?;
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        Ok(request)
    }

    fn basic(&self, user: &str, password: &str) -> Result<HeaderValue, Failure> {
        let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        self.secret(format!("Basic {text}"))
    }

    fn bearer(&self, token: &str) -> Result<HeaderValue, Failure> {
        self.secret(format!("Bearer {token}"))
    }

    fn secret(&self, text: String) -> Result<HeaderValue, Failure> {
        let mut value = HeaderValue::try_from(text).map_err(|_| {
            self.unauthorized("a token with characters that are not valid in a header".to_owned())
        })?;
        value.set_sensitive(true);
        Ok(value)
    }
}

impl State {
    /// The kind of an error about refused access. If a helper or plugin has failed, a later request may work.
    fn refusal_kind(&self) -> Kind {
        match (&self.place, &self.trouble) {
            (None, Some(trouble)) => trouble.kind(),
            _ => Kind::Unauthorized,
        }
    }

    fn show(&mut self, header: HeaderValue) {
        self.current = Authorization {
            header: Some(header),
            generation: self.current.generation + 1,
        };
    }
}
