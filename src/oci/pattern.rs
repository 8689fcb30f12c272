//! Patterns of tags and repositories, as in shells: `*` matches any text, `?` one character, all other characters themselves.

/// Whether the whole text matches. In time at most the product of the lengths.
pub fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut position) = (0, 0);
    // the position of the last `*`, and the end of the text that it matches so far
    let mut star: Option<(usize, usize)> = None;
    while position < text.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at, position));
                at += 1;
            }
            Some(wanted) if *wanted == '?' || *wanted == text[position] => {
                at += 1;
                position += 1;
            }
            _ => match star {
                Some((from, end)) => {
                    star = Some((from, end + 1));
                    (at, position) = (from + 1, end + 1);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|rest| *rest == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_texts() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("*", "any", true),
            ("v*", "v1.2", true),
            ("v*", "1.v", false),
            ("v?.?", "v1.2", true),
            ("v?.?", "v1.20", false),
            ("*-a*b", "x-a-ab-b", true),
            ("*-a*b", "x-a-ab-c", false),
            ("a**b", "ab", true),
            ("?", "ü", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern:?} {text:?}");
        }
        assert!(!matches(&"*a".repeat(50), &"a".repeat(49)));
    }
}
