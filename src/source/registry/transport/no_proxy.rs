//! The entries of `NO_PROXY` with a port, as `registry.example:5000`. The HTTP library handles the others.

use std::net::IpAddr;

use reqwest::Url;

/// Whether an entry with a port matches the URL, which is then reached without a proxy. As in Go, a name matches its subdomains too; with a
/// leading dot (or `*.`) it matches its subdomains only.
pub(crate) fn names(exceptions: &str, url: &Url) -> bool {
    let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
        return false;
    };
    let host = bare(host).to_ascii_lowercase();
    exceptions.split(',').any(|entry| {
        let entry = entry.trim().to_ascii_lowercase();
        entry
            .rsplit_once(':')
            .is_some_and(|(name, its_port)| its_port.parse() == Ok(port) && is_meant(name, &host))
    })
}

fn is_meant(name: &str, host: &str) -> bool {
    let address = |text: &str| bare(text).parse::<IpAddr>().ok();
    if let Some(host) = address(host) {
        // an IPv6 address with a port has brackets; without them its end is not a port
        return address(name) == Some(host) && (host.is_ipv4() || name.starts_with('['));
    }
    let is_below = |suffix: &str| {
        let above = host.strip_suffix(suffix);
        above.is_some_and(|above| above.ends_with('.') && above.len() > 1)
    };
    match name.strip_prefix("*.").or(name.strip_prefix('.')) {
        Some("") => false,
        Some(suffix) => is_below(suffix),
        None => !name.is_empty() && (name == host || is_below(name)),
    }
}

fn bare(host: &str) -> &str {
    let inside = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    inside.unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_with_a_port_count_for_that_port() {
        let is_direct = |exceptions, url: &str| names(exceptions, &url.parse().unwrap());
        for (exceptions, url, meant) in [
            ("r.example:5000", "http://r.example:5000/v2/", true),
            ("other, R.example:5000 ", "http://r.Example:5000/v2/", true),
            ("r.example:5000", "http://r.example:5001/v2/", false),
            ("r.example:443", "https://r.example/v2/", true),
            ("r.example:443", "http://r.example/v2/", false),
            ("example:80", "http://r.example/", true),
            (".example:80", "http://r.example/", true),
            ("*.example:80", "http://r.example/", true),
            (".r.example:80", "http://r.example/", false),
            ("ample:80", "http://r.example/", false),
            ("10.1.2.3:5000", "http://10.1.2.3:5000/", true),
            ("10.1.2.3:5000", "http://110.1.2.3:5000/", false),
            ("[fd00::5]:80", "http://[fd00::5]/", true),
            ("[fd00::5]:81", "http://[fd00::5]/", false),
            ("fd00::5:80", "http://[fd00::5]/", false),
            ("fd00::80", "http://[fd00::]/", false),
            (":80", "http://r.example/", false),
            (".:80", "http://r.example/", false),
            ("r.example", "http://r.example/", false),
            ("", "http://r.example/", false),
        ] {
            assert_eq!(is_direct(exceptions, url), meant, "{exceptions} {url}");
        }
    }
}
