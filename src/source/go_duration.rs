//! Durations as Go writes them, in files of the kubelet and of containerd.

use std::time::Duration;

use serde::Deserialize;

/// A duration as Go writes it: `12h`, `1h30m`, `0s`, `1.5s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GoDuration(pub(super) Duration);

impl GoDuration {
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text == "0" {
            return Some(Self(Duration::ZERO));
        }
        let mut rest = text;
        let mut sum = 0.0;
        while !rest.is_empty() {
            let number = rest.find(|it: char| !it.is_ascii_digit() && it != '.')?;
            let (value, tail) = rest.split_at(number);
            let unit = tail
                .find(|it: char| it.is_ascii_digit() || it == '.')
                .unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit);
            let seconds = match unit {
                "ns" => 1e-9,
                "us" | "µs" | "μs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
            sum += value.parse::<f64>().ok()? * seconds;
            rest = tail;
        }
        let is_given = !text.is_empty();
        Duration::try_from_secs_f64(sum)
            .ok()
            .filter(|_| is_given)
            .map(Self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("a duration is malformed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_of_go() {
        for (text, expected) in [
            ("12h", Some(43_200_000)),
            ("1h30m", Some(5_400_000)),
            ("5m0s", Some(300_000)),
            ("0s", Some(0)),
            ("0", Some(0)),
            ("1.5s", Some(1500)),
            ("300ms", Some(300)),
            ("", None),
            ("12", None),
            ("h", None),
            ("-1h", None),
            ("1d", None),
            ("1h ", None),
            ("1..5s", None),
            ("99999999999999999999999999h", None),
        ] {
            let parsed = GoDuration::parse(text).map(|it| it.0.as_millis());
            assert_eq!(parsed, expected, "{text:?}");
        }
    }
}
