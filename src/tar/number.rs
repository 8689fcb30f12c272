//! The fields of header blocks: strings that end at a NUL, octal and base-256 numbers; and the decimal ones of PAX.

use super::Timestamp;

/// A field up to its first NUL.
pub(super) fn string(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number in octal, or (first bit set) in big-endian two's complement. `None` where it is neither, or over 63 bits.
pub(super) fn numeric(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base_256(field),
        _ => octal(field),
    }
}

/// An octal number between blanks and NULs; none at all is 0.
pub(super) fn octal(field: &[u8]) -> Option<i64> {
    let padding = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(start) = field.iter().position(|byte| !padding(byte)) else {
        return Some(0);
    };
    let end = field.iter().rposition(|byte| !padding(byte))?;
    string(field.get(start..=end)?)
        .iter()
        .try_fold(0_i64, |number, digit| match digit {
            b'0'..=b'7' => number
                .checked_mul(8)?
                .checked_add(i64::from(digit.wrapping_sub(b'0'))),
            _ => None,
        })
}

fn base_256(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    let negative = first & 0x40 != 0;
    let flip = if negative { 0xff } else { 0 };
    let magnitude = rest
        .iter()
        .try_fold(i64::from((first ^ flip) & 0x7f), |number, byte| {
            number.checked_mul(256)?.checked_add(i64::from(byte ^ flip))
        })?;
    Some(if negative { !magnitude } else { magnitude })
}

/// A signed decimal number, as in PAX records.
pub(super) fn decimal(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A PAX time: seconds with any number of digits behind a dot, of which nine count.
pub(super) fn time(text: &[u8]) -> Option<Timestamp> {
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let whole = parts.next()?;
    let seconds = decimal(whole)?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanoseconds = fraction
        .iter()
        .chain(std::iter::repeat(&b'0'))
        .take(9)
        .fold(0_u32, |number, digit| {
            // nine digits: below 2^32
            number
                .wrapping_mul(10)
                .wrapping_add(u32::from(digit.wrapping_sub(b'0')))
        });
    if whole.starts_with(b"-") && nanoseconds != 0 {
        return Some(Timestamp {
            seconds: seconds.checked_sub(1)?,
            nanoseconds: 1_000_000_000_u32.wrapping_sub(nanoseconds),
        });
    }
    Some(Timestamp {
        seconds,
        nanoseconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_fields_are_trimmed_and_end_at_a_nul() {
        assert_eq!(octal(b"0000644\0"), Some(0o644));
        assert_eq!(octal(b"   644 \0"), Some(0o644));
        assert_eq!(octal(b"\0\0\0\0"), Some(0));
        assert_eq!(octal(b"12\x0034"), Some(0o12));
        assert_eq!(octal(b"128"), None);
        assert_eq!(octal(b"-1"), None);
    }

    #[test]
    fn base_256_numbers_have_a_sign_and_63_bits() {
        assert_eq!(numeric(&[0x80, 0, 0, 1]), Some(1));
        assert_eq!(numeric(&[0xff; 12]), Some(-1));
        assert_eq!(numeric(&[0xff, 0xff, 0xfe]), Some(-2));
        assert_eq!(
            numeric(&[0x80, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            Some(i64::MAX)
        );
        assert_eq!(numeric(&[0x80, 0x80, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(numeric(&[0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn times_before_1970_round_down() {
        let time_of = |text: &str| time(text.as_bytes()).map(|t| (t.seconds, t.nanoseconds));
        assert_eq!(time_of("12"), Some((12, 0)));
        assert_eq!(time_of("12."), Some((12, 0)));
        assert_eq!(time_of("1.0000000019"), Some((1, 1)));
        assert_eq!(time_of("-0.5"), Some((-1, 500_000_000)));
        assert_eq!(time_of("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time_of("1.x"), None);
        assert_eq!(time_of(""), None);
        assert_eq!(time_of(".5"), None);
    }
}
