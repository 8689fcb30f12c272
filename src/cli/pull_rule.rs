//! The rules of the snapshotter as arguments: `disks,image=registry.example/*,max-image-size=100MiB`.

use clap::ValueEnum as _;

use super::quantity;
use crate::snapshotter::{Pull, Rule};

/// The names of the conditions of a rule.
pub(super) const CONDITIONS: [&str; 3] = ["image", "max-image-size", "max-layer-size"];

/// Reads a rule: what it chooses, and its conditions.
pub(super) fn rule(text: &str) -> Result<Rule, String> {
    let mut parts = text.split(',');
    let name = parts.next().unwrap_or_default();
    let wrong_pull = |_| "a rule begins with lazy, disks or containerd".to_owned();
    let mut rule = Rule {
        pull: Pull::from_str(name, false).map_err(wrong_pull)?,
        image: None,
        max_image_size: None,
        max_layer_size: None,
    };
    for part in parts {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let size = || quantity::bytes(value).map_err(|error| format!("{name}: {error}"));
        let is_new = match name {
            "image" if value.is_empty() => {
                return Err("image: a pattern is wanted, e.g. image=registry.example/*".to_owned());
            }
            "image" => rule.image.replace(value.to_owned()).is_none(),
            "max-image-size" => rule.max_image_size.replace(size()?).is_none(),
            "max-layer-size" => rule.max_layer_size.replace(size()?).is_none(),
            _ => {
                let known = CONDITIONS.join(", ");
                return Err(format!(
                    "unknown condition {name:?}; the conditions are {known}"
                ));
            }
        };
        if !is_new {
            return Err(format!("it has {name} twice"));
        }
    }
    Ok(rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_a_choice_and_its_conditions() {
        let all =
            rule("disks,image=registry.example/team/*,max-image-size=100MiB,max-layer-size=5")
                .unwrap();
        assert_eq!(
            all,
            Rule {
                pull: Pull::Disks,
                image: Some("registry.example/team/*".to_owned()),
                max_image_size: Some(100 << 20),
                max_layer_size: Some(5),
            }
        );
        // as it is written, so it is read
        assert_eq!(rule(&all.to_string()).unwrap(), all);
        let none = rule("containerd").unwrap();
        assert_eq!((none.pull, none.image), (Pull::Containerd, None));
        for (wrong, why) in [
            ("", "a rule begins with lazy, disks or containerd"),
            ("Lazy", "a rule begins with"),
            ("image=x", "a rule begins with"),
            (
                "lazy,",
                "unknown condition \"\"; the conditions are image, max-image-size, max-layer-size",
            ),
            ("lazy,max-size=5", "unknown condition \"max-size\""),
            ("lazy,image=", "image: a pattern is wanted"),
            ("lazy,image", "image: a pattern is wanted"),
            ("lazy,max-layer-size=5x", "max-layer-size: a size is"),
            ("lazy,max-layer-size=-1", "max-layer-size: a size is"),
            ("lazy,image=a,image=b", "it has image twice"),
        ] {
            let error = rule(wrong).unwrap_err();
            assert!(error.starts_with(why), "{wrong}: {error}");
        }
    }
}
