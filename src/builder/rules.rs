//! Rules: which pushed images get an index, and under what tag. Pure.

use super::{event::Push, queue::Job};
use crate::{
    engine::open::platforms::Platforms,
    oci::{Reference, pattern},
    soci::index::Version,
};

/// The tag of a version 2 image. (A version 1 index needs none: it refers to the existing image.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The image with its index gets the tag with this suffix.
    Suffix(String),
    /// The image with its index takes the tag's place.
    Replace,
}

/// What is built, and from which images.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The only registry to read from and push to, e.g. `registry.example:5000`; an event cannot name another.
    pub registry: String,
    /// Patterns of repositories (`*` and `?`), one of which must match; if there are none, all repositories are accepted.
    pub repositories: Vec<String>,
    /// Patterns of tags, one of which must match; if there are none, all tags are accepted.
    pub tags: Vec<String>,
    /// The platforms that get an index. If there are several, those that an image has are taken, at least one.
    pub platforms: Platforms,
    /// The version of the indexes.
    pub version: Version,
    /// The tag of a version 2 image.
    pub target: Target,
}

/// The decision about a push, with its reason.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// An index is built.
    Wanted(Job),
    /// Nothing is done, for this reason.
    Ignored(&'static str),
}

/// Why a push cannot be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is about another registry.
    #[error("the event is of registry {found:?}; this builder accepts only {ours:?}")]
    OtherRegistry {
        /// The event's.
        found: String,
        /// Ours.
        ours: String,
    },
    /// Repository or tag do not follow their grammar.
    #[error("the event has no valid image name")]
    NoImage(#[source] crate::error::Error),
}

impl Rules {
    /// The decision about a push.
    pub fn judge(&self, push: &Push) -> Result<Verdict, Error> {
        if let Some(found) = push
            .registry
            .as_ref()
            .filter(|found| **found != self.registry)
        {
            return Err(Error::OtherRegistry {
                found: found.chars().take(255).collect(),
                ours: self.registry.clone(),
            });
        }
        let job = Job {
            repository: push.repository.clone(),
            tag: push.tag.clone(),
        };
        let reference = self.source(&job).map_err(Error::NoImage)?;
        let Reference::Registry {
            repository,
            tag: Some(tag),
            digest: None,
            ..
        } = reference
        else {
            return Ok(Verdict::Ignored("it has no tag"));
        };
        let fits = |patterns: &[String], text: &str| {
            patterns.is_empty() || patterns.iter().any(|wanted| pattern::matches(wanted, text))
        };
        Ok(if is_fallback(&tag) {
            Verdict::Ignored("the tag is of the referrers tag schema")
        } else if self.version == Version::V2
            && matches!(&self.target, Target::Suffix(suffix) if tag.ends_with(suffix.as_str()))
        {
            Verdict::Ignored("the tag has the suffix of converted images")
        } else if !fits(&self.repositories, &repository) {
            Verdict::Ignored("no --repository pattern matches")
        } else if !fits(&self.tags, &tag) {
            Verdict::Ignored("no --tag pattern matches")
        } else {
            Verdict::Wanted(job)
        })
    }

    /// Refuses rules that cannot name an image: a registry with a path, a suffix that is not valid in a tag, or an empty suffix.
    pub fn check(&self) -> Result<(), crate::error::Error> {
        use crate::error::{Error, Kind};
        let job = Job {
            repository: "team/app".to_owned(),
            tag: "v1".to_owned(),
        };
        let wrong = |what: String| Err(Error::new(Kind::InvalidArgument, what));
        match (self.source(&job)?, &self.target) {
            (Reference::Registry { repository, .. }, _) if repository != job.repository => wrong(
                format!("--registry {}: expected HOST or HOST:PORT", self.registry),
            ),
            (_, Target::Suffix(suffix)) if suffix.is_empty() => wrong(
                "--suffix is empty; to move the tag to the new image, use --replace".to_owned(),
            ),
            _ => self.destination(&job).map(drop),
        }
    }

    /// The image of a job.
    pub fn source(&self, job: &Job) -> Result<Reference, crate::error::Error> {
        self.reference(&job.repository, &job.tag)
    }

    /// The reference of the version 2 image of a job.
    pub fn destination(&self, job: &Job) -> Result<Reference, crate::error::Error> {
        match &self.target {
            Target::Suffix(suffix) => {
                self.reference(&job.repository, &format!("{}{suffix}", job.tag))
            }
            Target::Replace => self.source(job),
        }
    }

    fn reference(&self, repository: &str, tag: &str) -> Result<Reference, crate::error::Error> {
        format!("{}/{repository}:{tag}", self.registry).parse()
    }
}

/// Whether a tag is one under which registries without the referrers API keep a list of referrers (`sha256-HEX`).
fn is_fallback(tag: &str) -> bool {
    tag.split_once('-').is_some_and(|(algorithm, hex)| {
        ["sha256", "sha512"].contains(&algorithm)
            && hex.len() >= 64
            && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            registry: "registry.example:5000".to_owned(),
            repositories: vec!["team/*".to_owned()],
            tags: vec!["v*".to_owned(), "latest*".to_owned()],
            platforms: Platforms::Host,
            version: Version::V2,
            target: Target::Suffix("-soci".to_owned()),
        }
    }

    fn push(repository: &str, tag: &str) -> Push {
        Push {
            registry: None,
            repository: repository.to_owned(),
            tag: tag.to_owned(),
        }
    }

    #[test]
    fn repositories_and_tags_are_chosen_by_pattern() {
        let wanted = |repository: &str, tag: &str| {
            matches!(
                rules().judge(&push(repository, tag)).unwrap(),
                Verdict::Wanted(_)
            )
        };
        assert!(wanted("team/app", "v1"));
        assert!(wanted("team/a/b", "latest"));
        assert!(!wanted("other/app", "v1"));
        assert!(!wanted("team/app", "dev"));
        let all = Rules {
            repositories: vec![],
            tags: vec![],
            ..rules()
        };
        assert!(matches!(
            all.judge(&push("other/app", "dev")).unwrap(),
            Verdict::Wanted(_)
        ));
    }

    #[test]
    fn what_it_pushes_itself_starts_nothing() {
        let ignored = |rules: &Rules, tag: &str| {
            matches!(
                rules.judge(&push("team/app", tag)).unwrap(),
                Verdict::Ignored(_)
            )
        };
        assert!(ignored(&rules(), "v1-soci"));
        let list = format!("sha256-{}", "0".repeat(64));
        let all = Rules {
            tags: vec![],
            ..rules()
        };
        assert!(ignored(&all, &list));
        let first = Rules {
            version: Version::V1,
            ..all
        };
        assert!(ignored(&first, &list));
        assert!(!ignored(&first, "v1-soci"), "version 1 makes no tags");
    }

    #[test]
    fn an_event_leads_to_no_other_registry_and_to_no_odd_name() {
        let mut other = push("team/app", "v1");
        other.registry = Some("elsewhere.example".to_owned());
        assert!(matches!(
            rules().judge(&other),
            Err(Error::OtherRegistry { .. })
        ));
        for (repository, tag) in [
            ("../app", "v1"),
            ("team/app", "v1@x"),
            ("team/app:1", "v1"),
            ("", "v1"),
            ("team/app", ""),
        ] {
            assert!(
                !matches!(
                    rules().judge(&push(repository, tag)),
                    Ok(Verdict::Wanted(_))
                ),
                "{repository} {tag}"
            );
        }
    }

    #[test]
    fn a_version_2_image_goes_beside_or_in_place() {
        let job = Job {
            repository: "team/app".to_owned(),
            tag: "v1".to_owned(),
        };
        assert_eq!(
            rules().destination(&job).unwrap().to_string(),
            "registry.example:5000/team/app:v1-soci"
        );
        let replace = Rules {
            target: Target::Replace,
            ..rules()
        };
        assert_eq!(
            replace.destination(&job).unwrap(),
            replace.source(&job).unwrap()
        );
    }
}
