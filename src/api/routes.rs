//! The routes of the API: all that the server answers, and all that `docs/api.md` describes.

use hyper::Method;

use crate::error::{Error, Kind, Result};

/// A route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// The identity of the daemon.
    Daemon,
    /// The description of the API.
    OpenApi,
    /// The metrics.
    Metrics,
    /// The daemon is replaced.
    HandOver,
    /// All attachments.
    List,
    /// All layers in use.
    Layers,
    /// All snapshots of containerd.
    Snapshots,
    /// A new attachment.
    Attach,
    /// Its client has mounted an attachment.
    Mounted,
    /// The end of an attachment.
    Release,
    /// The explanation of an attachment.
    Why,
    /// What was fetched for an attachment.
    Fetches,
    /// A check of disks.
    Check,
    /// Kept attachments are attached.
    Restore,
    /// What the root holds.
    Space,
    /// Unused disks are removed.
    Prune,
    /// An image is pinned or unpinned.
    Pin,
    /// The configuration file is read again.
    Reload,
    /// The filter of the log.
    LogFilter,
    /// Another filter of the log.
    SetLogFilter,
}

/// Each route with its method and its path. `{id}` is the ID of an attachment.
pub const ROUTES: [(Method, &str, Route); 20] = [
    (Method::GET, "/v1/daemon", Route::Daemon),
    (Method::GET, "/v1/openapi.json", Route::OpenApi),
    (Method::GET, "/metrics", Route::Metrics),
    (Method::POST, "/v1/hand-over", Route::HandOver),
    (Method::GET, "/v1/attachments", Route::List),
    (Method::GET, "/v1/layers", Route::Layers),
    (Method::GET, "/v1/snapshots", Route::Snapshots),
    (Method::POST, "/v1/attachments", Route::Attach),
    (Method::DELETE, "/v1/attachments/{id}", Route::Release),
    (Method::GET, "/v1/attachments/{id}/why", Route::Why),
    (Method::GET, "/v1/attachments/{id}/fetches", Route::Fetches),
    (Method::POST, "/v1/attachments/{id}/mounted", Route::Mounted),
    (Method::POST, "/v1/disks/check", Route::Check),
    (Method::POST, "/v1/restore", Route::Restore),
    (Method::GET, "/v1/disks", Route::Space),
    (Method::POST, "/v1/disks/prune", Route::Prune),
    (Method::POST, "/v1/images/pin", Route::Pin),
    (Method::POST, "/v1/config/reload", Route::Reload),
    (Method::GET, "/v1/log", Route::LogFilter),
    (Method::POST, "/v1/log", Route::SetLogFilter),
];

/// The route of a request, and the ID in its path, which is empty if the route has none.
pub(super) fn find(method: &Method, path: &str) -> Result<(Route, String)> {
    let is_here = |(wanted, pattern, route): &(Method, &str, Route)| {
        let id = (wanted == method).then(|| matches(pattern, path))??;
        Some((*route, id.to_owned()))
    };
    ROUTES.iter().find_map(is_here).ok_or_else(|| {
        let what = format!("{method} {path} is not part of this API; docs/api.md describes it");
        Error::new(Kind::NotFound, what)
    })
}

/// The ID in a path that matches a pattern.
fn matches<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    let Some((before, after)) = pattern.split_once("{id}") else {
        return (pattern == path).then_some("");
    };
    let id = path.strip_prefix(before)?.strip_suffix(after)?;
    (!id.is_empty() && !id.contains('/')).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_route_of_their_method_and_path() {
        let find = |method: Method, path| find(&method, path).ok();
        let with = |route, id: &str| Some((route, id.to_owned()));
        assert_eq!(find(Method::GET, "/v1/daemon"), with(Route::Daemon, ""));
        assert_eq!(find(Method::GET, "/v1/attachments"), with(Route::List, ""));
        assert_eq!(
            find(Method::POST, "/v1/attachments"),
            with(Route::Attach, "")
        );
        let path = "/v1/attachments/ab/why";
        assert_eq!(find(Method::GET, path), with(Route::Why, "ab"));
        for (method, path) in [
            (Method::PUT, "/v1/attachments"),
            (Method::GET, "/v1/attachments/"),
            (Method::DELETE, "/v1/attachments/a/b"),
            (Method::GET, "/v1/attachments//why"),
            (Method::GET, "v1/daemon"),
            (Method::GET, "/v1/daemon/"),
            (Method::GET, "/v2/daemon"),
        ] {
            assert_eq!(find(method, path), None, "{path}");
        }
    }
}
