//! Rules of the configuration: how the layers of an image are pulled. Pure.

use std::fmt;

use crate::oci::{Reference, pattern};

/// Maximum size of a layer without a table, in bytes, that is pulled into a disk where no rule decides. Larger ones would rarely be there in
/// the time for which containerd may be held up.
const MAX_UNASKED_BYTES: u64 = 32 << 20;

/// Maximum size of all layers of an image with an index, in bytes, that are pulled into disks where no rule decides. Up to here a pull into
/// disks is not slower than a lazy start, and such disks do not need the daemon (`docs/performance.md`, "Small images").
const SMALL_IMAGE_BYTES: u64 = 16 << 20;

/// The label that chooses how an image is pulled: the name of a [`Pull`]. It is above the rules.
pub const PULL_LABEL: &str = "containerd.io/snapshot/socinbd.pull";

/// How a layer is pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Pull {
    /// Its disk is laid out from its table in an index, and reads fetch its spans. A layer without a table cannot be pulled so.
    Lazy,
    /// All of it is fetched to its disk and verified before containerd goes on.
    Disks,
    /// containerd fetches and unpacks it.
    Containerd,
}

impl Pull {
    /// As it is written in a rule and in a label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lazy => "lazy",
            Self::Disks => "disks",
            Self::Containerd => "containerd",
        }
    }

    /// The one of this name.
    pub(super) fn named(name: &str) -> Option<Self> {
        let all = [Self::Lazy, Self::Disks, Self::Containerd];
        all.into_iter().find(|pull| pull.name() == name)
    }
}

/// A rule. It applies to a layer if all of its conditions hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What it chooses.
    pub pull: Pull,
    /// Pattern (`*` and `?`) of the image, with or without its tag: `HOST/REPOSITORY` or `HOST/REPOSITORY:TAG`.
    pub image: Option<String>,
    /// Maximum size of all layers of the image together, in bytes of their blobs.
    pub max_image_size: Option<u64>,
    /// Maximum size of the layer, in bytes of its blob.
    pub max_layer_size: Option<u64>,
}

/// What rules look at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layer<'a> {
    /// The image.
    pub(super) image: &'a Reference,
    /// Size of all layers of the image together, in bytes.
    pub(super) image_size: u64,
    /// Whether a layer of the image has a table, or is to be treated as if it had one.
    pub(super) image_has_index: bool,
    /// Size of the layer, in bytes.
    pub(super) size: u64,
    /// Whether an index has a table for the layer.
    pub(super) has_table: bool,
}

/// What was chosen for a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) pull: Pull,
    /// Whether a rule or a label has chosen it. Only then containerd may be held up for as long as a layer needs.
    pub(super) is_asked_for: bool,
    /// What has chosen, for people.
    pub(super) by: String,
}

impl Rule {
    fn applies(&self, layer: &Layer<'_>) -> bool {
        let is_at_most = |limit: Option<u64>, size: u64| limit.is_none_or(|limit| size <= limit);
        is_at_most(self.max_image_size, layer.image_size)
            && is_at_most(self.max_layer_size, layer.size)
            && self.image.as_ref().is_none_or(|wanted| {
                names(layer.image)
                    .iter()
                    .any(|it| pattern::matches(wanted, it))
            })
    }
}

/// The names of an image that a pattern may match: without and with its tag.
fn names(image: &Reference) -> Vec<String> {
    let place = image.place().to_string();
    match image {
        Reference::Registry { tag: Some(tag), .. } => vec![format!("{place}:{tag}"), place],
        _ => vec![place],
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.pull.name())?;
        if let Some(image) = &self.image {
            write!(f, ",image={image}")?;
        }
        for (name, limit) in [
            ("max-image-size", self.max_image_size),
            ("max-layer-size", self.max_layer_size),
        ] {
            if let Some(limit) = limit {
                write!(f, ",{name}={limit}")?;
            }
        }
        Ok(())
    }
}

/// What the label, else the first rule that applies, else the default chooses. `lazy` does not apply to a layer without a table.
pub(super) fn choose(rules: &[Rule], label: Option<Pull>, layer: &Layer<'_>) -> Choice {
    let by_label = label.map(|pull| (pull, format!("the label {PULL_LABEL}")));
    let by_rules = rules
        .iter()
        .enumerate()
        .filter(|(_, rule)| rule.applies(layer))
        .map(|(number, rule)| (rule.pull, format!("rule {} ({rule})", number + 1)));
    let chosen = by_label
        .into_iter()
        .chain(by_rules)
        .find(|(pull, _)| *pull != Pull::Lazy || layer.has_table);
    match chosen {
        Some((pull, by)) => Choice {
            pull,
            is_asked_for: true,
            by,
        },
        None => default(layer),
    }
}

fn default(layer: &Layer<'_>) -> Choice {
    let (pull, why) = if layer.image_has_index && layer.image_size <= SMALL_IMAGE_BYTES {
        (Pull::Disks, "the image is small")
    } else if layer.has_table {
        (Pull::Lazy, "it has a table")
    } else if layer.image_has_index && layer.size <= MAX_UNASKED_BYTES {
        (Pull::Disks, "it has no table, and is small")
    } else {
        (Pull::Containerd, "it has no table")
    };
    Choice {
        pull,
        is_asked_for: false,
        by: format!("no rule: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(pull: Pull, image: &str, max_image_size: u64, max_layer_size: u64) -> Rule {
        Rule {
            pull,
            image: (!image.is_empty()).then(|| image.to_owned()),
            max_image_size: (max_image_size > 0).then_some(max_image_size),
            max_layer_size: (max_layer_size > 0).then_some(max_layer_size),
        }
    }

    fn chosen(rules: &[Rule], label: Option<Pull>, layer: &Layer<'_>) -> (Pull, String) {
        let choice = choose(rules, label, layer);
        (choice.pull, choice.by)
    }

    #[test]
    fn the_first_rule_that_applies_counts() {
        let image: Reference = "registry.example/team/app:1".parse().unwrap();
        let layer = |size: u64, has_table: bool| Layer {
            image: &image,
            image_size: 1 << 30,
            image_has_index: true,
            size,
            has_table,
        };
        let rules = [
            rule(Pull::Containerd, "", (1 << 30) - 1, 0),
            rule(Pull::Containerd, "registry.example/other/*", 0, 0),
            rule(Pull::Disks, "registry.example/team/*", 1 << 30, 10),
            rule(Pull::Lazy, "registry.example/team/app", 0, 0),
            rule(Pull::Containerd, "*:1", 0, 100),
        ];
        for (size, has_table, pull, by) in [
            (
                10,
                true,
                Pull::Disks,
                "rule 3 (disks,image=registry.example/team/*,max-image-size=1073741824,max-layer-size=10)",
            ),
            (
                11,
                true,
                Pull::Lazy,
                "rule 4 (lazy,image=registry.example/team/app)",
            ),
            // lazy does not apply without a table
            (
                11,
                false,
                Pull::Containerd,
                "rule 5 (containerd,image=*:1,max-layer-size=100)",
            ),
            (
                101,
                false,
                Pull::Disks,
                "no rule: it has no table, and is small",
            ),
            (
                MAX_UNASKED_BYTES + 1,
                false,
                Pull::Containerd,
                "no rule: it has no table",
            ),
        ] {
            let found = chosen(&rules, None, &layer(size, has_table));
            assert_eq!(found, (pull, by.to_owned()), "{size} {has_table}");
        }
        let unindexed = Layer {
            image_has_index: false,
            ..layer(101, false)
        };
        assert_eq!(choose(&[], None, &unindexed).pull, Pull::Containerd);
        assert_eq!(choose(&[], None, &layer(10, true)).pull, Pull::Lazy);
    }

    #[test]
    fn a_small_image_with_an_index_is_pulled_into_disks() {
        let image: Reference = "registry.example/app:1".parse().unwrap();
        let layer = |image_size: u64, image_has_index: bool| Layer {
            image: &image,
            image_size,
            image_has_index,
            size: 10,
            has_table: image_has_index,
        };
        for (size, is_indexed, pull) in [
            (SMALL_IMAGE_BYTES, true, Pull::Disks),
            (SMALL_IMAGE_BYTES + 1, true, Pull::Lazy),
            (SMALL_IMAGE_BYTES, false, Pull::Containerd),
        ] {
            let choice = choose(&[], None, &layer(size, is_indexed));
            assert_eq!((choice.pull, choice.is_asked_for), (pull, false), "{size}");
        }
        let (pull, by) = chosen(&[], None, &layer(1000, true));
        assert_eq!(
            (pull, by.as_str()),
            (Pull::Disks, "no rule: the image is small")
        );
        // a rule is above it
        let lazy = [rule(Pull::Lazy, "", 0, 0)];
        assert_eq!(choose(&lazy, None, &layer(1000, true)).pull, Pull::Lazy);
    }

    #[test]
    fn a_label_is_above_the_rules() {
        let image: Reference = "registry.example/app:1".parse().unwrap();
        let layer = |has_table: bool| Layer {
            image: &image,
            image_size: 1 << 30,
            image_has_index: has_table,
            size: 1 << 30,
            has_table,
        };
        let rules = [rule(Pull::Containerd, "", 0, 0)];
        for (label, has_table, pull) in [
            (None, true, Pull::Containerd),
            (Some(Pull::Lazy), true, Pull::Lazy),
            (Some(Pull::Lazy), false, Pull::Containerd),
            (Some(Pull::Disks), false, Pull::Disks),
            (Some(Pull::Containerd), true, Pull::Containerd),
        ] {
            let choice = choose(&rules, label, &layer(has_table));
            assert_eq!(choice.pull, pull, "{label:?} {has_table}");
            assert!(choice.is_asked_for);
        }
        let (_, by) = chosen(&rules, Some(Pull::Disks), &layer(true));
        assert_eq!(by, "the label containerd.io/snapshot/socinbd.pull");
    }

    #[test]
    fn names_lead_to_what_they_name() {
        for pull in [Pull::Lazy, Pull::Disks, Pull::Containerd] {
            assert_eq!(Pull::named(pull.name()), Some(pull));
        }
        assert_eq!(Pull::named("Lazy"), None);
    }
}
