//! Times as a zTOC holds them: RFC 3339 text, as Go's `time.Time` writes and reads it.

use crate::tar::Timestamp;

const SECONDS_PER_DAY: i64 = 86_400;

/// `2023-11-14T22:13:20.5Z`: UTC, without trailing zeros. Empty for years that four digits cannot say, as AWS's tool does.
pub fn format(time: Timestamp) -> String {
    let days = time.seconds.div_euclid(SECONDS_PER_DAY);
    let second = time.seconds.rem_euclid(SECONDS_PER_DAY);
    let Some((year, month, day)) = civil(days) else {
        return String::new();
    };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if time.nanoseconds != 0 {
        let fraction = format!(".{:09}", time.nanoseconds);
        text.push_str(fraction.trim_end_matches('0'));
    }
    text.push('Z');
    text
}

/// Whether [`format`] has a text for it.
pub(super) fn has_text(time: Timestamp) -> bool {
    civil(time.seconds.div_euclid(SECONDS_PER_DAY)).is_some()
}

/// Any zone. `None` where Go's reader has none either.
pub(super) fn parse(text: &[u8]) -> Option<Timestamp> {
    let (start, mut rest) = text.split_first_chunk::<19>()?;
    #[rustfmt::skip]
    let &[y0, y1, y2, y3, b'-', m0, m1, b'-', d0, d1, b'T', h0, h1, b':', n0, n1, b':', s0, s1] = start
    else {
        return None;
    };
    let (year, month, day) = (
        number([y0, y1, y2, y3])?,
        number([m0, m1])?,
        number([d0, d1])?,
    );
    let (hour, minute, second) = (number([h0, h1])?, number([n0, n1])?, number([s0, s1])?);
    let nanoseconds = fraction(&mut rest)?;
    let east = zone(rest)?;
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let seconds = days(year, month, day)?
        .checked_mul(SECONDS_PER_DAY)?
        .checked_add(of_day(hour, minute)?)?
        .checked_add(second)?
        .checked_sub(east)?;
    Some(Timestamp {
        seconds,
        nanoseconds,
    })
}

fn of_day(hours: i64, minutes: i64) -> Option<i64> {
    hours
        .checked_mul(3600)?
        .checked_add(minutes.checked_mul(60)?)
}

/// A few digits.
fn number<const N: usize>(digits: [u8; N]) -> Option<i64> {
    digits.iter().try_fold(0_i64, |number, digit| {
        let digit = i64::from(char::from(*digit).to_digit(10)?);
        number.checked_mul(10)?.checked_add(digit)
    })
}

/// Nanoseconds; further digits are dropped.
fn fraction(rest: &mut &[u8]) -> Option<u32> {
    let Some(tail) = rest.strip_prefix(b".") else {
        return Some(0);
    };
    let count = tail.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (text, tail) = tail.split_at_checked(count)?;
    *rest = tail;
    let text: String = text.iter().copied().map(char::from).take(9).collect();
    format!("{text:0<9}").parse().ok().filter(|_| count != 0)
}

/// Seconds east of UTC.
fn zone(text: &[u8]) -> Option<i64> {
    if text == b"Z" {
        return Some(0);
    }
    let &[sign, h0, h1, b':', m0, m1] = text else {
        return None;
    };
    let (hours, minutes) = (number([h0, h1])?, number([m0, m1])?);
    if hours > 23 || minutes > 59 {
        return None;
    }
    let seconds = of_day(hours, minutes)?;
    match sign {
        b'+' => Some(seconds),
        b'-' => seconds.checked_neg(),
        _ => None,
    }
}

// The two ways between days since 1970 and the proleptic Gregorian calendar, with years that start in March and eras of 400 years
// (146,097 days). Years are within 0 to 9999, so nothing here overflows.

#[allow(clippy::arithmetic_side_effects, reason = "four-digit years")]
fn days(year: i64, month: i64, day: i64) -> Option<i64> {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if !(1..=length).contains(&day) {
        return None;
    }
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    Some(era * 146_097 + day_of_era - 719_468)
}

#[allow(clippy::arithmetic_side_effects, reason = "four-digit years")]
fn civil(days: i64) -> Option<(i64, i64, i64)> {
    const YEAR_0: i64 = -719_528;
    const YEAR_10000: i64 = 2_932_897;
    if !(YEAR_0..YEAR_10000).contains(&days) {
        return None;
    }
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    Some((year, month, day))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(seconds: i64, nanoseconds: u32) -> Timestamp {
        Timestamp {
            seconds,
            nanoseconds,
        }
    }

    #[test]
    fn known_times_both_ways() {
        for (text, known) in [
            ("1970-01-01T00:00:00Z", time(0, 0)),
            ("2023-11-14T22:13:20Z", time(1_700_000_000, 0)),
            ("2023-11-14T22:13:20.000000001Z", time(1_700_000_000, 1)),
            ("1969-12-31T23:59:59.5Z", time(-1, 500_000_000)),
            ("0000-01-01T00:00:00Z", time(-62_167_219_200, 0)),
            ("0001-01-01T00:00:00Z", time(-62_135_596_800, 0)),
            ("9999-12-31T23:59:59Z", time(253_402_300_799, 0)),
            ("2000-02-29T12:00:00Z", time(951_825_600, 0)),
        ] {
            assert_eq!(parse(text.as_bytes()), Some(known), "{text}");
            assert_eq!(format(known), text);
        }
        assert_eq!(format(time(253_402_300_800, 0)), "");
        assert_eq!(format(time(-62_167_219_201, 0)), "");
        assert_eq!(format(time(i64::MIN, 0)), "");
        assert_eq!(format(time(i64::MAX, 0)), "");
    }

    #[test]
    fn each_day_of_four_hundred_years_comes_back() {
        for day in -80_000..80_000 {
            let known = time(day * SECONDS_PER_DAY, 0);
            assert_eq!(parse(format(known).as_bytes()), Some(known));
        }
    }

    #[test]
    fn what_has_a_text_comes_back_and_nothing_else_has_one() {
        let edges = [i64::MIN, -62_167_219_200, 0, 253_402_300_800, i64::MAX];
        for seconds in edges.into_iter().flat_map(|edge| {
            (-2..=2).map(move |near| edge.saturating_add(near * SECONDS_PER_DAY / 2))
        }) {
            for nanoseconds in [0, 1, 999_999_999] {
                let known = time(seconds, nanoseconds);
                let back = parse(format(known).as_bytes());
                assert_eq!(back, has_text(known).then_some(known));
            }
        }
    }

    #[test]
    fn zones_and_what_is_no_time() {
        let known = Some(time(1_700_000_000, 0));
        assert_eq!(parse(b"2023-11-14T17:13:20-05:00"), known);
        assert_eq!(parse(b"2023-11-15T03:43:20+05:30"), known);
        for text in [
            "",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "2023-11-14T22:13:20.Z",
            "2023-11-14T22:13:60Z",
            "2023-11-14T24:13:00Z",
            "2023-02-29T00:00:00Z",
            "2023-13-01T00:00:00Z",
            "2023-00-01T00:00:00Z",
            "10000-01-01T00:00:00Z",
            "2023-11-14T22:13:20+0530",
            "2023-11-14T22:13:20Zx",
            "2023-11-14t22:13:20Z",
            "+023-11-14T22:13:20Z",
        ] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }
}
