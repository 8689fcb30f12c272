//! Who may pull and push.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

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
            Auth::Open | Auth::Basic { .. } => "Basic realm=\"tests\"".to_owned(),
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

pub(super) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64(format!("{user}:{password}").as_bytes()))
}
