//! Sizes, shares and times as arguments and in tables.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::layer::DiskReserve;

/// Factors of the units of a size.
const SIZES: [(&str, u64); 9] = [
    ("", 1),
    ("k", 1000),
    ("m", 1_000_000),
    ("g", 1_000_000_000),
    ("t", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

/// Seconds of the units of a time.
const TIMES: [(&str, u64); 5] = [
    ("s", 1),
    ("m", 60),
    ("h", 3600),
    ("d", 86_400),
    ("w", 604_800),
];

/// Reads a size: bytes, or a number with one of the units k, M, G, T, KiB, MiB, GiB, TiB.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    read(text, &SIZES)
        .ok_or_else(|| "a size is a number of bytes, or a number with k, M, G, T, KiB, MiB, GiB or TiB, e.g. 50GiB".to_owned())
}

/// Reads a reserve: a size as [`bytes`], or a share of the whole, e.g. 10%.
pub(super) fn reserve(text: &str) -> Result<DiskReserve, String> {
    let share = text.strip_suffix('%').map(str::parse::<u8>);
    match share {
        Some(Ok(share @ 0..=100)) => Ok(DiskReserve::Percent(share)),
        Some(_) => Err("a share is a whole number from 0 to 100 with %, e.g. 10%".to_owned()),
        None => bytes(text).map(DiskReserve::Bytes),
    }
}

/// Reads a time: a whole number with one of the units s, m, h, d, w.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    read(text, &TIMES)
        .map(Duration::from_secs)
        .ok_or_else(|| "a time is a whole number with s, m, h, d or w, e.g. 12h".to_owned())
}

fn read(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let end = text.find(|letter: char| !letter.is_ascii_digit());
    let (number, unit) = text.split_at(end.unwrap_or(text.len()));
    let unit = unit.trim().to_ascii_lowercase();
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

/// The time since a moment in seconds since 1970, as one number and its unit.
pub(super) fn ago(moment: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let passed = now.map_or(0, |now| now.as_secs()).saturating_sub(moment);
    let (unit, seconds) = TIMES[..4]
        .iter()
        .rev()
        .find(|(_, seconds)| passed >= *seconds)
        .unwrap_or(&TIMES[0]);
    format!("{}{unit} ago", passed / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_decimal_and_binary_units() {
        let read = |text: &str| bytes(text).ok();
        assert_eq!(read("0"), Some(0));
        assert_eq!(read("4096"), Some(4096));
        assert_eq!(read("50GiB"), Some(50 << 30));
        assert_eq!(read("3 m"), Some(3_000_000));
        assert_eq!(read("2TiB"), Some(2 << 40));
        for wrong in [
            "",
            "GiB",
            "-1",
            "1.5G",
            "1 G B",
            "5x",
            "99999999999T",
            "1e9",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_reserve_is_a_size_or_a_share() {
        assert_eq!(reserve("10%"), Ok(DiskReserve::Percent(10)));
        assert_eq!(reserve("1GiB"), Ok(DiskReserve::Bytes(1 << 30)));
        for wrong in ["%", "101%", "1.5%", "x", "-1%"] {
            reserve(wrong).unwrap_err();
        }
    }

    #[test]
    fn times_have_a_unit() {
        let read = |text: &str| duration(text).ok().map(|time| time.as_secs());
        assert_eq!(read("90s"), Some(90));
        assert_eq!(read("7d"), Some(604_800));
        assert_eq!(read("2w"), read("14d"));
        for wrong in ["", "7", "d", "-1d", "1y", "99999999999999999999s"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_moment_is_some_time_ago() {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        assert_eq!(ago(now - 3 * 86_400 - 7), "3d ago");
        assert_eq!(ago(now - 7300), "2h ago");
        assert_eq!(ago(now + 100), "0s ago");
    }
}
