//! Who may pull and push.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use base64::Engine as _;
use hyper::{Method, Response, header};
use serde_json::json;

use super::{
    State,
    reply::{Body, base64, refusal, whole},
    request::Asked,
};

/// Who may pull and push.
#[derive(Clone, Debug, Default)]
pub enum Auth {
    /// Everybody.
    #[default]
    Open,
    /// Name and password with each request.
    Basic {
        /// The name.
        user: String,
        /// The password.
        password: String,
    },
    /// As Amazon's registry: name and password with each request, and the password lasts for a short time. The password says when it was
    /// made: [`DATED_PASSWORD`].
    Dated {
        /// How long a password lasts. Then it is refused with 403.
        lifetime: Duration,
    },
    /// A token of the token service.
    Bearer {
        /// Who gets a token: name and password, or everybody.
        user: Option<(String, String)>,
        /// Also who shows this refresh token.
        refresh_token: Option<String>,
        /// How long a token lasts; it is told with `expires_in`.
        lifetime: Duration,
    },
}

impl State {
    pub(super) fn is_authorized(&self, asked: &Asked) -> bool {
        let shown = asked.authorization.as_deref().unwrap_or("");
        match &self.auth {
            Auth::Open => true,
            Auth::Basic { user, password } => shown == basic(user, password),
            Auth::Dated { lifetime } => age(shown).is_some_and(|age| age < *lifetime),
            Auth::Bearer { .. } => shown
                .strip_prefix("Bearer ")
                .and_then(|token| self.tokens.get(token))
                .is_some_and(|expiry| *expiry > Instant::now()),
        }
    }

    pub(super) fn unauthorized(
        &self,
        asked: &Asked,
        address: SocketAddr,
    ) -> Option<Response<Body>> {
        if self.is_authorized(asked) {
            return None;
        }
        let challenge = match &self.auth {
            Auth::Dated { .. } if age(asked.authorization.as_deref().unwrap_or("")).is_some() => {
                let why = "Your authorization token has expired. Reauthenticate and try again.";
                return Some(refusal(403, "DENIED", why));
            }
            Auth::Open | Auth::Basic { .. } | Auth::Dated { .. } => {
                "Basic realm=\"tests\"".to_owned()
            }
            Auth::Bearer { .. } => format!(
                "Bearer realm=\"http://{address}/token\",service=\"tests\",scope=\"repository:{}:pull\"",
                asked.repository
            ),
        };
        let mut reply = refusal(401, "UNAUTHORIZED", "who are you?");
        if let Ok(value) = challenge.parse() {
            reply.headers_mut().insert(header::WWW_AUTHENTICATE, value);
        }
        Some(reply)
    }

    pub(super) fn token(&mut self, asked: &Asked, body: &[u8]) -> Response<Body> {
        let Auth::Bearer {
            user,
            refresh_token,
            lifetime,
        } = self.auth.clone()
        else {
            return refusal(404, "UNSUPPORTED", "no tokens here");
        };
        let form: HashMap<String, String> =
            url::form_urlencoded::parse(body).into_owned().collect();
        let refreshed = form.get("grant_type").map(String::as_str) == Some("refresh_token")
            && refresh_token.is_some()
            && form.get("refresh_token") == refresh_token.as_ref();
        let named = match &user {
            None => asked.method == Method::GET,
            Some((user, password)) => {
                asked.authorization.as_deref() == Some(basic(user, password).as_str())
            }
        };
        if !refreshed && !named {
            return refusal(401, "UNAUTHORIZED", "wrong name or password");
        }
        let scope = asked.query.get("scope").or_else(|| form.get("scope"));
        if !scope.is_some_and(|scope| scope.starts_with("repository:")) {
            return refusal(400, "DENIED", "a token for what?");
        }
        self.next_number += 1;
        let token = format!("token-{}", self.next_number);
        self.tokens.insert(token.clone(), Instant::now() + lifetime);
        let answer = json!({ "token": token, "expires_in": lifetime.as_secs().max(1) });
        whole(200, "application/json", &answer.to_string())
    }
}

/// A program for a shell that prints a password of [`Auth::Dated`].
pub const DATED_PASSWORD: &str = "echo made-at-$(date +%s%3N)";

/// The age of a password of [`Auth::Dated`].
fn age(shown: &str) -> Option<Duration> {
    let text = base64::engine::general_purpose::STANDARD.decode(shown.strip_prefix("Basic ")?);
    let text = String::from_utf8(text.ok()?).ok()?;
    let made = text.strip_prefix("AWS:made-at-")?.parse().ok()?;
    let made = SystemTime::UNIX_EPOCH + Duration::from_millis(made);
    Some(made.elapsed().unwrap_or_default())
}

pub(super) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64(format!("{user}:{password}").as_bytes()))
}
