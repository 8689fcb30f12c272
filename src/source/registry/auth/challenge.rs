//! `WWW-Authenticate` (RFC 9110, section 11.6.1): the challenges of a registry.

/// Longer than any honest header.
const MAX_HEADER: usize = 16 << 10;
const MAX_CHALLENGES: usize = 16;
const MAX_PARAMETERS: usize = 32;

/// One challenge. Names of schemes and parameters are in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Challenge {
    pub(crate) scheme: String,
    parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The parameter's first value.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, value)| value.as_str())
    }

    /// All challenges of a header. A malformed part ends the list: the challenges before it are used.
    pub(crate) fn parse(header: &str) -> Vec<Self> {
        let mut challenges: Vec<Self> = Vec::new();
        if header.len() > MAX_HEADER {
            return challenges;
        }
        let mut rest = Cursor(header);
        loop {
            rest.skip_separators();
            let Some(word) = rest.token() else {
                return challenges;
            };
            // a word with an equals sign belongs to the challenge before it; any other begins a new one
            match rest.parameter_value() {
                Some(value) => match challenges.last_mut() {
                    Some(challenge) if challenge.parameters.len() < MAX_PARAMETERS => {
                        challenge
                            .parameters
                            .push((word.to_ascii_lowercase(), value));
                    }
                    Some(_) => {}
                    None => return challenges,
                },
                None if challenges.len() < MAX_CHALLENGES => challenges.push(Self {
                    scheme: word.to_ascii_lowercase(),
                    parameters: Vec::new(),
                }),
                None => return challenges,
            }
        }
    }
}

struct Cursor<'a>(&'a str);

impl<'a> Cursor<'a> {
    fn skip_separators(&mut self) {
        self.0 = self.0.trim_start_matches([' ', '\t', ',']);
    }

    /// A token, not empty (RFC 9110, section 5.6.2).
    fn token(&mut self) -> Option<&'a str> {
        let end = self
            .0
            .find(|letter: char| {
                !letter.is_ascii_alphanumeric() && !"!#$%&'*+-.^_`|~".contains(letter)
            })
            .unwrap_or(self.0.len());
        let (token, rest) = self.0.split_at(end);
        self.0 = rest;
        (!token.is_empty()).then_some(token)
    }

    /// `= value`, where an equals sign follows; blanks around it are bad style and allowed.
    fn parameter_value(&mut self) -> Option<String> {
        let after = self.0.trim_start_matches([' ', '\t']).strip_prefix('=')?;
        self.0 = after.trim_start_matches([' ', '\t']);
        let Some(quoted) = self.0.strip_prefix('"') else {
            // some write URLs without quotes: all up to the next separator
            let end = self.0.find([' ', '\t', ',']).unwrap_or(self.0.len());
            let (value, rest) = self.0.split_at(end);
            self.0 = rest;
            return Some(value.to_owned());
        };
        let mut value = String::new();
        let mut letters = quoted.char_indices();
        while let Some((at, letter)) = letters.next() {
            match letter {
                '"' => {
                    self.0 = &quoted[at + 1..];
                    return Some(value);
                }
                '\\' => value.extend(letters.next().map(|(_, escaped)| escaped)),
                letter => value.push(letter),
            }
        }
        self.0 = "";
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn challenges_of_real_registries() {
        let header = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/nginx:pull,push""#;
        let challenges = Challenge::parse(header);
        assert_eq!(challenges.len(), 1);
        assert_eq!(challenges[0].scheme, "bearer");
        assert_eq!(
            challenges[0].parameter("realm"),
            Some("https://auth.docker.io/token")
        );
        assert_eq!(
            challenges[0].parameter("service"),
            Some("registry.docker.io")
        );
        assert_eq!(
            challenges[0].parameter("scope"),
            Some("repository:library/nginx:pull,push")
        );
        assert_eq!(challenges[0].parameter("error"), None);
    }

    #[test]
    fn several_in_one_header() {
        let header = r#"Negotiate, BASIC Realm = "a \"b\" c" , charset=UTF-8, bearer realm=https://x/y,service=z"#;
        let challenges = Challenge::parse(header);
        let schemes: Vec<_> = challenges.iter().map(|one| one.scheme.as_str()).collect();
        assert_eq!(schemes, ["negotiate", "basic", "bearer"]);
        assert_eq!(challenges[1].parameter("realm"), Some("a \"b\" c"));
        assert_eq!(challenges[1].parameter("charset"), Some("UTF-8"));
        assert_eq!(challenges[2].parameter("realm"), Some("https://x/y"));
        assert_eq!(challenges[2].parameter("service"), Some("z"));
    }

    #[test]
    fn broken_ones_end_early() {
        for (header, schemes) in [
            ("", 0),
            ("=", 0),
            ("realm=\"x\"", 0),
            ("Basic realm=\"x", 1),
            ("Basic realm=\"x\\", 1),
            ("Basic \u{e9}", 1),
            ("Basic realm=\"x\" (", 1),
        ] {
            assert_eq!(Challenge::parse(header).len(), schemes, "{header:?}");
        }
        assert!(Challenge::parse(&"a ".repeat(MAX_HEADER)).is_empty());
        assert_eq!(Challenge::parse(&"a,".repeat(1000)).len(), MAX_CHALLENGES);
        let many = format!("Basic {}", "a=b,".repeat(1000));
        assert_eq!(Challenge::parse(&many)[0].parameters.len(), MAX_PARAMETERS);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[a-zA-Z=\", \\\\\t\u{e9}]{0,80}") {
            let _ = Challenge::parse(&text);
        }

        #[test]
        fn a_changed_byte_is_survived(at in 0..70_usize, letter in proptest::char::any()) {
            let header = r#"Bearer realm="https://a.example/t",service="s",scope="repository:a:pull""#;
            let mut letters: Vec<char> = header.chars().collect();
            letters[at] = letter;
            let challenges = Challenge::parse(&letters.iter().collect::<String>());
            prop_assert!(challenges.len() <= 3);
        }
    }
}
