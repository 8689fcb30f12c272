//! PAX extended headers: `<length> <key>=<value>\n` records.

use std::collections::BTreeMap;

/// Records by key; of a key that comes twice the later value counts.
pub(super) type Records = BTreeMap<Vec<u8>, Vec<u8>>;

const SPARSE_OFFSET: &[u8] = b"GNU.sparse.offset";
const SPARSE_NUMBYTES: &[u8] = b"GNU.sparse.numbytes";
/// `offset,length,...` of a sparse file's data (format 0.1; 0.0 is folded into it).
pub(super) const SPARSE_MAP: &[u8] = b"GNU.sparse.map";

/// Parses the data of an `x` or `g` header; `Err` is the position of the record at fault.
pub(super) fn parse(data: &[u8]) -> Result<Records, usize> {
    let mut records = Records::new();
    // format 0.0 repeats two keys in turn, which is against PAX's rules: they become the one record of format 0.1
    let mut sparse_map: Vec<&[u8]> = Vec::new();
    let mut rest = data;
    while !rest.is_empty() {
        let position = data.len().saturating_sub(rest.len());
        let (key, value, tail) = record(rest).ok_or(position)?;
        rest = tail;
        if key == SPARSE_OFFSET || key == SPARSE_NUMBYTES {
            let expected = if sparse_map.len().is_multiple_of(2) {
                SPARSE_OFFSET
            } else {
                SPARSE_NUMBYTES
            };
            if key != expected || value.contains(&b',') {
                return Err(position);
            }
            sparse_map.push(value);
        } else {
            records.insert(key.to_vec(), value.to_vec());
        }
    }
    if !sparse_map.is_empty() {
        records.insert(SPARSE_MAP.to_vec(), sparse_map.join(&b','));
    }
    Ok(records)
}

/// The first record's key and value, and what follows it.
fn record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = data.iter().position(|byte| *byte == b' ')?;
    let (digits, _) = data.split_at_checked(blank)?;
    let length = usize::try_from(super::number::decimal(digits)?).ok()?;
    let (whole, rest) = data.split_at_checked(length)?;
    let body = whole.get(blank.checked_add(1)?..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    let (key, value) = body.split_at_checked(equals)?;
    let value = value.get(1..)?;
    // xattr values may hold NULs; names and keys may not
    let checked = match key {
        b"path" | b"linkpath" | b"uname" | b"gname" => value,
        _ => key,
    };
    (!key.is_empty() && !checked.contains(&0)).then_some((key, value, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(data: &[u8]) -> Result<Vec<(String, String)>, usize> {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        parse(data).map(|records| {
            records
                .into_iter()
                .map(|(key, value)| (text(key), text(value)))
                .collect()
        })
    }

    #[test]
    fn a_length_counts_itself_and_the_newline() {
        let one = |key: &str, value: &str| vec![(key.to_owned(), value.to_owned())];
        assert_eq!(pairs(b"9 path=a\n"), Ok(one("path", "a")));
        assert_eq!(pairs(b"8 a=b=c\n"), Ok(one("a", "b=c")));
        assert_eq!(pairs(b"9 path=ab\n"), Err(0));
        assert_eq!(pairs(b"9 path=a\n12 path=a\n"), Err(9));
        assert_eq!(pairs(b"9 path=\0\n"), Err(0));
        assert_eq!(pairs(b"5 =a\n"), Err(0));
        assert_eq!(pairs(b"-5 a=b\n"), Err(0));
        assert_eq!(pairs(b"99999999999999999999 a=b\n"), Err(0));
    }

    #[test]
    fn sparse_0_0_becomes_the_map_of_0_1() {
        let data = b"23 GNU.sparse.offset=5\n25 GNU.sparse.numbytes=7\n";
        assert_eq!(
            pairs(data),
            Ok(vec![("GNU.sparse.map".to_owned(), "5,7".to_owned())])
        );
        assert_eq!(pairs(b"25 GNU.sparse.numbytes=7\n"), Err(0));
    }
}
