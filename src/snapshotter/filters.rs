//! Filters of a list, in containerd's syntax (`pkg/filters` of containerd 2.4): `field==value,labels."a.b"~=/regex/`.
//!
//! The selectors of one filter must all match; one of several filters must.

use std::str::Chars;

use regex::bytes::{Regex, RegexBuilder};

use super::errors::SnapshotError;

/// Maximum size of a compiled regular expression, in bytes.
const MAX_REGEX_BYTES: usize = 1 << 20;
/// Maximum size of all filters of a list, in bytes.
const MAX_FILTER_BYTES: usize = 64 << 10;

/// Filters, one of which must match. None matches all.
#[derive(Debug, Default)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<Vec<u8>>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(Vec<u8>),
    NotEqual(Vec<u8>),
    /// `None`: the expression is not one, and nothing matches it.
    Matches(Option<Regex>),
}

impl Filters {
    /// Parses filters. An empty one matches all.
    pub fn parse<T: AsRef<str>>(filters: &[T]) -> Result<Self, SnapshotError> {
        let bytes: usize = filters.iter().map(|filter| filter.as_ref().len()).sum();
        if bytes > MAX_FILTER_BYTES {
            return Err(SnapshotError::InvalidArgument(format!(
                "the filters have {bytes} bytes, more than {MAX_FILTER_BYTES}"
            )));
        }
        let parse = |filter: &T| {
            let text = filter.as_ref();
            if text.is_empty() {
                return Ok(Vec::new());
            }
            Parser::new(text).selectors().map_err(|error| {
                SnapshotError::InvalidArgument(format!(
                    "filter {text:?}, at byte {}: {}",
                    error.at, error.why
                ))
            })
        };
        Ok(Self(filters.iter().map(parse).collect::<Result<_, _>>()?))
    }

    /// Whether something matches, whose fields `field` returns by their paths.
    pub fn matches<'a>(&self, field: impl Fn(&[Vec<u8>]) -> Option<&'a [u8]>) -> bool {
        let matches = |selector: &Selector| {
            let value = field(&selector.path);
            match &selector.test {
                Test::Present => value.is_some(),
                Test::Equal(wanted) => value == Some(wanted),
                Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
                Test::Matches(regex) => regex
                    .as_ref()
                    .is_some_and(|regex| regex.is_match(value.unwrap_or_default())),
            }
        };
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(matches))
    }
}

/// Why a filter is not one.
struct SyntaxError {
    at: usize,
    why: &'static str,
}

/// A token, with its text as it stands in the filter.
enum Token<'a> {
    Field(&'a str),
    Value(&'a str),
    Quoted(&'a str),
    Separator,
    Operator(&'a str),
    Other,
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    /// Whether the next token may be a value.
    is_value: bool,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            at: 0,
            is_value: false,
        }
    }

    fn selectors(mut self) -> Result<Vec<Selector>, SyntaxError> {
        let mut selectors = vec![self.selector()?];
        loop {
            match self.peek() {
                None => return Ok(selectors),
                Some(',') => {
                    self.scan()?;
                    selectors.push(self.selector()?);
                }
                Some(_) => return Err(self.error("unexpected text")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, SyntaxError> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.scan()?;
            path.push(self.field()?);
        }
        if matches!(self.peek(), None | Some(',')) {
            let test = Test::Present;
            return Ok(Selector { path, test });
        }
        let operator = match self.scan()? {
            Token::Operator(operator @ ("==" | "!=" | "~=")) => operator,
            _ => return Err(self.error("expected ==, != or ~=")),
        };
        let value = match self.scan()? {
            Token::Value(text) | Token::Field(text) => text.as_bytes().to_owned(),
            Token::Quoted(text) if operator == "~=" || text.starts_with('"') => {
                self.unquoted(text)?
            }
            _ => return Err(self.error("expected a value")),
        };
        let test = match operator {
            "==" => Test::Equal(value),
            "!=" => Test::NotEqual(value),
            _ => Test::Matches(compile(&value)),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<Vec<u8>, SyntaxError> {
        match self.scan()? {
            Token::Field(text) => Ok(text.as_bytes().to_owned()),
            Token::Quoted(text) if text.starts_with('"') => self.unquoted(text),
            _ => Err(self.error("expected a field")),
        }
    }

    fn error(&self, why: &'static str) -> SyntaxError {
        SyntaxError { at: self.at, why }
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    /// Goes on while characters are of a kind.
    fn skip(&mut self, is_one: impl Fn(char) -> bool) {
        while self.peek().is_some_and(&is_one) {
            self.next();
        }
    }

    fn scan(&mut self) -> Result<Token<'a>, SyntaxError> {
        self.skip(char::is_whitespace);
        let (text, start) = (self.text, self.at);
        let Some(first) = self.next() else {
            return Ok(Token::Other);
        };
        Ok(match first {
            '\0' | char::REPLACEMENT_CHARACTER => return Err(self.error("unexpected character")),
            '"' | '/' | '|' => {
                self.quoted(first)?;
                Token::Quoted(&text[start..self.at])
            }
            ',' | '.' => {
                self.is_value = false;
                Token::Separator
            }
            '=' | '!' | '~' => {
                self.skip(|c| "=!~".contains(c));
                self.is_value = true;
                Token::Operator(&text[start..self.at])
            }
            _ if self.is_value => {
                self.skip(|c| c != ',' && !c.is_whitespace() && !c.is_control());
                self.is_value = false;
                Token::Value(&text[start..self.at])
            }
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' => {
                self.skip(|c| c.is_ascii_alphanumeric() || c == '_');
                Token::Field(&text[start..self.at])
            }
            _ => Token::Other,
        })
    }

    /// Goes behind the closing quote.
    fn quoted(&mut self, quote: char) -> Result<(), SyntaxError> {
        loop {
            match self.next() {
                Some(c) if c == quote => return Ok(()),
                Some('\\') => {
                    self.next();
                }
                None | Some('\n' | '\0' | char::REPLACEMENT_CHARACTER) => {
                    return Err(self.error("the quotes are not closed"));
                }
                Some(_) => {}
            }
        }
    }

    /// The text within quotes, with Go's escapes.
    fn unquoted(&self, quoted: &str) -> Result<Vec<u8>, SyntaxError> {
        unquote(quoted).ok_or_else(|| self.error("unknown escape in quotes"))
    }
}

fn compile(expression: &[u8]) -> Option<Regex> {
    let expression = std::str::from_utf8(expression).ok()?;
    RegexBuilder::new(expression)
        .size_limit(MAX_REGEX_BYTES)
        .build()
        .ok()
}

/// The text within quotes, with Go's escapes. It may be other than UTF-8.
fn unquote(quoted: &str) -> Option<Vec<u8>> {
    let mut characters = quoted.chars();
    let quote = characters.next()?;
    characters.next_back()?;
    let mut text = Vec::with_capacity(quoted.len());
    while let Some(c) = characters.next() {
        let c = match c {
            '\\' => match characters.next()? {
                'a' => '\x07',
                'b' => '\x08',
                'f' => '\x0c',
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                'v' => '\x0b',
                '\\' => '\\',
                'u' => char::from_u32(number(&mut characters, 0, 4, 16)?)?,
                'U' => char::from_u32(number(&mut characters, 0, 8, 16)?)?,
                'x' => {
                    text.push(u8::try_from(number(&mut characters, 0, 2, 16)?).ok()?);
                    continue;
                }
                digit @ '0'..='7' => {
                    let first = digit.to_digit(8)?;
                    text.push(u8::try_from(number(&mut characters, first, 2, 8)?).ok()?);
                    continue;
                }
                c if c == quote => c,
                _ => return None,
            },
            c => c,
        };
        text.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
    }
    Some(text)
}

/// So many more digits behind the value of the first ones.
fn number(characters: &mut Chars<'_>, first: u32, digits: usize, radix: u32) -> Option<u32> {
    (0..digits).try_fold(first, |value, _| {
        Some(value * radix + characters.next()?.to_digit(radix)?)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Whether a snapshot with these fields matches: `parent` is `a`, the label `b.c` is `d e`.
    fn matches(filters: &[&str]) -> Option<bool> {
        let filters = Filters::parse(filters).ok()?;
        Some(filters.matches(|path| {
            let path: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
            match path.as_slice() {
                [b"parent"] => Some(&b"a"[..]),
                [b"labels", rest @ ..] if rest.join(&b'.') == b"b.c" => Some(b"d e"),
                _ => None,
            }
        }))
    }

    #[test]
    fn selectors_match_as_in_containerd() {
        for (filter, expected) in [
            ("", Some(true)),
            ("parent", Some(true)),
            ("parent==a", Some(true)),
            ("parent == a", Some(true)),
            ("parent==\"a\"", Some(true)),
            ("parent==\"\\x61\"", Some(true)),
            ("parent==\"\\141\"", Some(true)),
            ("parent==\"\\u0061\"", Some(true)),
            ("parent==b", Some(false)),
            ("parent!=b", Some(true)),
            ("parent!=a", Some(false)),
            ("absent!=a", Some(true)),
            ("absent", Some(false)),
            ("absent==\"\"", Some(false)),
            ("parent~=^A$", Some(false)),
            ("parent~=^[a-b]$", Some(true)),
            ("parent~=/^a$/", Some(true)),
            ("parent~=|a|", Some(true)),
            ("parent~=\"(\"", Some(false)),
            ("labels.b.c", Some(true)),
            ("labels.\"b.c\"==\"d e\"", Some(true)),
            ("labels.\"b.c\"==\"d e\",parent==a", Some(true)),
            ("labels.\"b.c\"==\"d e\",parent==b", Some(false)),
            ("labels.\"b.c\"==\"\"", Some(false)),
            // these are no filters
            ("parent=", None),
            ("parent=a", None),
            ("parent===a", None),
            ("parent==", None),
            ("==a", None),
            ("parent==/a/", None),
            ("parent==\"a", None),
            ("parent==\"\\q\"", None),
            ("parent==\"\\400\"", None),
            ("parent==a b", None),
            ("parent,", None),
            ("parent.", None),
            (",", None),
            ("parent\0", None),
            ("@", None),
        ] {
            assert_eq!(matches(&[filter]), expected, "{filter:?}");
        }
        assert_eq!(matches(&[]), Some(true));
        assert_eq!(matches(&["parent==b", "parent==a"]), Some(true));
        assert_eq!(matches(&["parent==b", "parent==c"]), Some(false));
        assert_eq!(matches(&["parent==a", "parent=="]), None);
    }

    /// As containerd quotes a value (Go's `%q`), for printable ASCII.
    fn quoted(text: &str) -> String {
        format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
    }

    proptest! {
        #[test]
        fn a_quoted_value_matches_itself_only(value in "[ -~]{0,24}", other in "[ -~]{0,24}") {
            let filters = Filters::parse(&[format!("name=={}", quoted(&value))]).unwrap();
            prop_assert!(filters.matches(|_| Some(value.as_bytes())));
            prop_assert_eq!(filters.matches(|_| Some(other.as_bytes())), value == other);
        }

        #[test]
        fn any_text_is_parsed_without_a_panic(text in any::<String>(), near in "[a-c.,=!~\"/|\\\\x0-9 ]{0,32}") {
            for text in [text, near] {
                if let Ok(filters) = Filters::parse(&[text]) {
                    filters.matches(|_| Some(b"a"));
                }
            }
        }
    }
}
