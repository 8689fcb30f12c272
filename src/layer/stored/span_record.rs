//! The records of the file `spans`: for each span whether its data is on the disk, and the checksums of that data. A record has 16 bytes,
//! each field little-endian: kind, CRC-32 of the data on the disk, CRC-32 of the bytes in `rest`, and CRC-32 of the record itself with the
//! span's number. A record of zeros: the span is absent.

use super::seal::crc32;
use crate::units::SpanId;

/// Size of a record.
pub(crate) const RECORD_BYTES: usize = 16;

const PRESENT: u32 = 1;
const PRESENT_WITH_LAST: u32 = 2;
const UNCHECKED: u32 = 3;

/// The checksums of a span that is on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpanCheck {
    /// CRC-32 of the span's file data.
    pub data: u32,
    /// CRC-32 of its other bytes, and of the tail after the last span.
    pub rest: u32,
    /// This is the last span, and its tail is in `last`.
    pub has_last: bool,
}

/// A record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SpanRecord {
    /// The span has to be fetched.
    Absent,
    /// The span is on the disk, without a checksum.
    Unchecked,
    /// The span is on the disk, with its checksums.
    Present(SpanCheck),
}

/// Size of the file for this many spans.
pub(crate) fn file_size(count: u32) -> u64 {
    u64::from(count) * RECORD_BYTES as u64
}

/// Offset of a span's record.
pub(crate) fn place(span: SpanId) -> u64 {
    file_size(span.get())
}

impl SpanRecord {
    /// Whether the span need not be fetched.
    pub(crate) fn is_present(self) -> bool {
        self != Self::Absent
    }

    pub(crate) fn encode(self, span: SpanId) -> [u8; RECORD_BYTES] {
        let (kind, check) = match self {
            Self::Absent => return [0; RECORD_BYTES],
            Self::Unchecked => (UNCHECKED, SpanCheck::default()),
            Self::Present(check) if check.has_last => (PRESENT_WITH_LAST, check),
            Self::Present(check) => (PRESENT, check),
        };
        let mut bytes = [0; RECORD_BYTES];
        for (field, number) in bytes
            .chunks_exact_mut(4)
            .zip([kind, check.data, check.rest])
        {
            field.copy_from_slice(&number.to_le_bytes());
        }
        let own = own_check(&bytes, span);
        bytes[12..].copy_from_slice(&own.to_le_bytes());
        bytes
    }

    /// `None`: the record is damaged.
    pub(crate) fn decode(bytes: &[u8; RECORD_BYTES], span: SpanId) -> Option<Self> {
        if *bytes == [0; RECORD_BYTES] {
            return Some(Self::Absent);
        }
        let ([kind, data, rest, own], []) = bytes.as_chunks::<4>() else {
            return None;
        };
        if u32::from_le_bytes(*own) != own_check(bytes, span) {
            return None;
        }
        let check = |has_last| SpanCheck {
            data: u32::from_le_bytes(*data),
            rest: u32::from_le_bytes(*rest),
            has_last,
        };
        match u32::from_le_bytes(*kind) {
            PRESENT => Some(Self::Present(check(false))),
            PRESENT_WITH_LAST => Some(Self::Present(check(true))),
            UNCHECKED => Some(Self::Unchecked),
            _ => None,
        }
    }
}

/// The records of a file, in order; `None` for damaged and missing ones.
pub(crate) fn decode_all(bytes: &[u8], count: u32) -> impl Iterator<Item = Option<SpanRecord>> {
    let (records, _) = bytes.as_chunks::<RECORD_BYTES>();
    (0..count).map(|number| SpanRecord::decode(records.get(number as usize)?, SpanId(number)))
}

/// How many of the spans are on the disk, by the records of a file.
pub(crate) fn count_present(bytes: &[u8], count: u32) -> u32 {
    let present = decode_all(bytes, count)
        .flatten()
        .filter(|record| record.is_present());
    present.map(|_| 1).sum()
}

fn own_check(bytes: &[u8; RECORD_BYTES], span: SpanId) -> u32 {
    let mut checked = *bytes;
    checked[12..].copy_from_slice(&span.get().to_le_bytes());
    crc32(&checked)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_record_is_its_spans_and_whole_or_none(
            data: u32,
            rest: u32,
            has_last: bool,
            number: u32,
            at in 0..RECORD_BYTES,
            flip in 1_u8..,
        ) {
            let span = SpanId(number);
            let present = SpanRecord::Present(SpanCheck { data, rest, has_last });
            for record in [present, SpanRecord::Unchecked] {
                let mut bytes = record.encode(span);
                prop_assert_eq!(SpanRecord::decode(&bytes, span), Some(record));
                prop_assert_eq!(SpanRecord::decode(&bytes, SpanId(number ^ 1)), None);
                bytes[at] ^= flip;
                prop_assert_eq!(SpanRecord::decode(&bytes, span), None);
            }
        }

        #[test]
        fn any_file_has_a_record_or_none_for_each_span(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            count in 0..20_u32,
        ) {
            prop_assert_eq!(decode_all(&bytes, count).count(), count as usize);
        }
    }

    #[test]
    fn an_empty_file_of_the_right_length_has_nothing() {
        let zeros = vec![0; file_size(3) as usize];
        assert!(decode_all(&zeros, 3).all(|record| record == Some(SpanRecord::Absent)));
        let absent = SpanRecord::Absent.encode(SpanId(2));
        assert_eq!(absent, [0; RECORD_BYTES]);
        // in a truncated file the last record is damaged
        assert_eq!(decode_all(&zeros[..20], 3).flatten().count(), 1);
    }
}
