//! Patterns of images, as the kubelet matches them (`matchImages`, and the keys of `auth`).
//!
//! A pattern has a host, perhaps with a port and a path. In the host `*` and `?` stand for text within one label. An image matches if the
//! hosts have as many labels and each matches, the ports are the same, and its path starts with that of the pattern.

use crate::oci::pattern;

/// Whether a repository matches.
pub(super) fn matches(wanted: &str, host: &str, repository: &str) -> bool {
    let wanted = wanted
        .strip_prefix("https://")
        .or_else(|| wanted.strip_prefix("http://"))
        .unwrap_or(wanted);
    let (wanted_host, wanted_path) = wanted.split_once('/').unwrap_or((wanted, ""));
    let (wanted_name, wanted_port) = split_port(wanted_host);
    let (name, port) = split_port(host);
    let labels = |name: &str| name.split('.').map(str::to_owned).collect::<Vec<_>>();
    let (wanted_labels, labels) = (labels(wanted_name), labels(name));
    wanted_port == port
        && wanted_labels.len() == labels.len()
        && repository.starts_with(wanted_path)
        && wanted_labels
            .iter()
            .zip(&labels)
            .all(|(wanted, label)| pattern::matches(wanted, label))
}

/// The name and the port of a host.
fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        // not within the brackets of an IPv6 address
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (host, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_match_as_the_kubelet_documents_it() {
        for (wanted, host, repository, expected) in [
            (
                "123.dkr.ecr.us-east-1.amazonaws.com",
                "123.dkr.ecr.us-east-1.amazonaws.com",
                "app",
                true,
            ),
            (
                "*.dkr.ecr.*.amazonaws.com",
                "123.dkr.ecr.us-east-1.amazonaws.com",
                "a/b",
                true,
            ),
            (
                "*.dkr.ecr.*.amazonaws.com",
                "123.dkr.ecr.us-east-1.amazonaws.com.cn",
                "a",
                false,
            ),
            ("*.azurecr.io", "team.azurecr.io", "app", true),
            ("*.azurecr.io", "azurecr.io", "app", false),
            ("*.io", "team.azurecr.io", "app", false),
            ("app*.k8s.io", "app-1.k8s.io", "x", true),
            ("k8s.*", "k8s.io", "x", true),
            ("gcr.io", "gcr.io", "project/app", true),
            ("gcr.io", "eu.gcr.io", "project/app", false),
            ("*.*.registry.io", "a.b.registry.io", "app", true),
            (
                "registry.io:8080/path",
                "registry.io:8080",
                "path/app",
                true,
            ),
            (
                "registry.io:8080/path",
                "registry.io:8081",
                "path/app",
                false,
            ),
            (
                "registry.io:8080/path",
                "registry.io:8080",
                "other/path",
                false,
            ),
            ("registry.io:8080/path", "registry.io", "path/app", false),
            ("registry.io", "registry.io:8080", "path/app", false),
            ("registry.io/", "registry.io", "app", true),
            ("https://registry.io/team", "registry.io", "team/app", true),
            ("registry.io/te*m", "registry.io", "team/app", false),
            ("registry.io:*", "registry.io:5000", "app", false),
            ("[::1]:5000", "[::1]:5000", "app", true),
            ("[::1]", "[::1]:5000", "app", false),
            ("127.0.0.*:5000", "127.0.0.1:5000", "app", true),
            ("", "registry.io", "app", false),
        ] {
            assert_eq!(
                matches(wanted, host, repository),
                expected,
                "{wanted} {host}/{repository}"
            );
        }
    }
}
