//! `Link` (RFC 8288), as far as pagination needs it: the target of `rel="next"`.

/// Longer than any honest header.
const MAX_HEADER: usize = 16 << 10;

/// The header does not follow the grammar, so it is not known whether there is a next page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unreadable;

/// The target of the first link with the relation `next`, unchanged: it may be relative.
pub(super) fn next_target(header: &str) -> Result<Option<&str>, Unreadable> {
    if header.len() > MAX_HEADER {
        return Err(Unreadable);
    }
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return Ok(None);
        }
        let (target, after) = rest
            .strip_prefix('<')
            .and_then(|link| link.split_once('>'))
            .ok_or(Unreadable)?;
        let (is_next, after) = parameters(after)?;
        if is_next {
            return Ok(Some(target));
        }
        rest = after;
    }
}

/// Reads the parameters up to the comma that ends a link. Returns whether `next` is among its relations, and the rest after the link.
fn parameters(mut rest: &str) -> Result<(bool, &str), Unreadable> {
    let mut is_next = false;
    let mut has_relation = false;
    loop {
        rest = rest.trim_start();
        if rest.is_empty() || rest.starts_with(',') {
            return Ok((is_next, rest));
        }
        let after = rest.strip_prefix(';').ok_or(Unreadable)?.trim_start();
        let name_end = after.find(['=', ';', ',']).unwrap_or(after.len());
        let (name, after) = after.split_at(name_end);
        let (value, after) = match after.strip_prefix('=') {
            Some(after) => value(after.trim_start())?,
            None => ("", after),
        };
        // of several, the first is used (RFC 8288, section 3.3)
        if name.trim().eq_ignore_ascii_case("rel") && !has_relation {
            has_relation = true;
            is_next = value
                .split_ascii_whitespace()
                .any(|relation| relation.eq_ignore_ascii_case("next"));
        }
        rest = after;
    }
}

/// A token or a quoted string, and the rest after it. A backslash in a string is kept: no relation has one.
fn value(text: &str) -> Result<(&str, &str), Unreadable> {
    match text.strip_prefix('"') {
        Some(quoted) => {
            let mut escaped = false;
            for (at, byte) in quoted.bytes().enumerate() {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' => escaped = true,
                    b'"' => return Ok((&quoted[..at], &quoted[at + 1..])),
                    _ => {}
                }
            }
            Err(Unreadable)
        }
        None => {
            let end = text.find([';', ',']).unwrap_or(text.len());
            let (value, rest) = text.split_at(end);
            Ok((value.trim_end(), rest))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_next_link_among_others() {
        for (header, target) in [
            (
                r#"</v2/a/referrers/x?n=2>; rel="next""#,
                "/v2/a/referrers/x?n=2",
            ),
            (r#"<x>;rel=next"#, "x"),
            (r#"<x> ; REL = "prev next""#, "x"),
            (r#"<a>; rel="prev", <b,c;d>; rel="next""#, "b,c;d"),
            (
                r#"<a>; title="x, <y>; rel=\"next\""; rel="up", <b>; rel=next"#,
                "b",
            ),
            (r#"<a>; rel=prev; rel=next, <b>; rel=next"#, "b"),
            (r#", <x>; rel=next"#, "x"),
        ] {
            assert_eq!(next_target(header), Ok(Some(target)), "{header}");
        }
    }

    #[test]
    fn no_next_link() {
        for header in [
            "",
            " , ",
            "<x>",
            "<x>; rel=prev",
            "<x>; rel",
            "<x>; nextrel=next",
            "<x>;;, <y>",
        ] {
            assert_eq!(next_target(header), Ok(None), "{header}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_not_the_last_page() {
        for header in [
            "<",
            "<x",
            "x; rel=next",
            "/v2/a/tags/list?next_page=x; rel=\"next\"",
            ";;;",
            "<x>; rel=\"",
            "<x>; title=\"; rel=next",
            "<x> rel=next",
            "<x>; rel=prev, y; rel=next",
            "rel=\"next\"; <x>",
        ] {
            assert_eq!(next_target(header), Err(Unreadable), "{header}");
        }
        let long = format!("<{}>; rel=next", "x".repeat(MAX_HEADER));
        assert_eq!(next_target(&long), Err(Unreadable));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[<>;,=\"\\\\a-z \u{e9}]{0,60}") {
            let _ = next_target(&text);
        }
    }
}
