//! `Content-Range` (RFC 9110, section 14.4).

/// The content of a `Content-Range`, with an exclusive end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ContentRange {
    /// `bytes 0-99/1000`, `bytes 0-99/*`.
    Bytes {
        start: u64,
        end: u64,
        total: Option<u64>,
    },
    /// `bytes */1000`, of a 416.
    Unsatisfied { total: u64 },
}

impl ContentRange {
    /// `None` for everything that the grammar does not allow, and for ranges that contradict themselves.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (unit, rest) = text.trim().split_once(' ')?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        let (range, total) = rest.trim_start().split_once('/')?;
        let total = match total {
            "*" => None,
            total => Some(number(total)?),
        };
        if range == "*" {
            return Some(Self::Unsatisfied { total: total? });
        }
        let (first, last) = range.split_once('-')?;
        let (start, end) = (number(first)?, number(last)?.checked_add(1)?);
        (start < end && total.is_none_or(|total| end <= total)).then_some(Self::Bytes {
            start,
            end,
            total,
        })
    }
}

/// Digits only: `u64::from_str` would take a plus sign too.
fn number(text: &str) -> Option<u64> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_as_servers_write_them() {
        let bytes = |start, end, total| Some(ContentRange::Bytes { start, end, total });
        assert_eq!(
            ContentRange::parse("bytes 0-99/1000"),
            bytes(0, 100, Some(1000))
        );
        assert_eq!(ContentRange::parse("bytes 5-5/*"), bytes(5, 6, None));
        assert_eq!(ContentRange::parse("Bytes 0-0/1"), bytes(0, 1, Some(1)));
        assert_eq!(
            ContentRange::parse("bytes */1000"),
            Some(ContentRange::Unsatisfied { total: 1000 })
        );
    }

    #[test]
    fn what_is_none_or_contradicts_itself() {
        for text in [
            "",
            "bytes",
            "bytes ",
            "bytes=0-1/2",
            "octets 0-1/2",
            "bytes 0-1",
            "bytes 1-0/2",
            "bytes 0-2/2",
            "bytes +0-1/2",
            "bytes 0--1/2",
            "bytes -1/2",
            "bytes 0-/2",
            "bytes */*",
            "bytes 0-18446744073709551615/*",
            "bytes 0-18446744073709551616/*",
            "bytes 0-1/2/3",
            "bytes 0-1/",
            "bytes 0 - 1/2",
        ] {
            assert_eq!(ContentRange::parse(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC{0,40}") {
            let _ = ContentRange::parse(&text);
        }

        #[test]
        fn a_changed_byte_gives_no_range_that_contradicts_itself(
            start in 0..u64::MAX, length in 1..u64::MAX, at in 0..40_usize, byte in b' '..b'\x7f',
        ) {
            let mut text = format!("bytes {start}-{}/*", start.saturating_add(length - 1)).into_bytes();
            if let Some(place) = text.get_mut(at) {
                *place = byte;
            }
            if let Some(ContentRange::Bytes { start, end, total }) =
                ContentRange::parse(&String::from_utf8(text).expect("ASCII"))
            {
                prop_assert!(start < end && total.is_none_or(|total| end <= total));
            }
        }
    }
}
