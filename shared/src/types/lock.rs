//! Byte-range locks as they travel: what is locked, how, and what that means for reads and writes.
//!
//! A zero-length lock lies *between* two bytes (MS-FSA 2.1.5.8). It conflicts with a lock that has bytes on both
//! sides of that place, and with nothing else:
//!
//! ```text
//!   bytes      8   9  10  11  12
//!   0@10               |             the zero-length lock: between byte 9 and byte 10
//!   2@9            [-------)         conflicts: 9 < 10 < 11
//!   1@9            [---)             does not
//!   2@10               [-------)     does not
//!   0@10               |             does not: two zero-length locks never conflict
//! ```

use super::{Access, ByteRange};
use minicbor::{Decode, Encode};

/// An (offset, length) pair that ends beyond 2^64.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("offset {offset} + length {length} is beyond 2^64")]
pub struct LockRangeError {
    /// The offset asked for, bytes.
    pub offset: u64,
    /// The length asked for, bytes.
    pub length: u64,
}

/// The bytes `[offset, offset + length)`, where `offset + length` is at most 2^64: locks may lie beyond what a file
/// can hold ([`ByteRange::END_MAX`]), as databases use such places as names. So offset 2^64 - 1 with length 1 is a
/// range, and with length 2 it is none. On the wire: an array of offset and length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Encode)]
pub struct LockRange {
    #[n(0)]
    offset: u64,
    #[n(1)]
    length: u64,
}

impl LockRange {
    /// Checks that the range ends at 2^64 or before.
    ///
    /// # Errors
    /// [`LockRangeError`] if it does not.
    pub const fn new(offset: u64, length: u64) -> Result<Self, LockRangeError> {
        // The last byte is at offset + (length - 1), which must not wrap. A range without bytes has none.
        match length.checked_sub(1) {
            Some(more) if offset.checked_add(more).is_none() => Err(LockRangeError { offset, length }),
            _ => Ok(Self { offset, length }),
        }
    }

    /// The zero-length range before the byte at `offset`.
    pub const fn before(offset: u64) -> Self {
        Self { offset, length: 0 }
    }

    /// First byte; of a zero-length range, the byte that it lies before.
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Number of bytes.
    pub const fn length(self) -> u64 {
        self.length
    }

    /// One past the last byte: up to 2^64, hence the wide type.
    pub const fn end(self) -> u128 {
        self.offset as u128 + self.length as u128
    }

    /// True if the range has no byte.
    pub const fn is_empty(self) -> bool {
        self.length == 0
    }

    /// True if `inner` lies inside: every byte of it, or, if it has none, a byte on each side of it.
    pub const fn contains(self, inner: Self) -> bool {
        if inner.is_empty() {
            self.offset < inner.offset && (inner.offset as u128) < self.end()
        } else {
            self.offset <= inner.offset && inner.end() <= self.end()
        }
    }

    /// True if locks on the two ranges can conflict: they share a byte, or one has no byte and lies inside the other.
    pub const fn overlaps(self, other: Self) -> bool {
        match (self.is_empty(), other.is_empty()) {
            (true, true) => false,
            (true, false) => other.contains(self),
            (false, true) => self.contains(other),
            (false, false) => (self.offset as u128) < other.end() && (other.offset as u128) < self.end(),
        }
    }

    /// The part that a file can hold; `None` if there is none.
    pub fn bytes(self) -> Option<ByteRange> {
        let end = u64::try_from(self.end()).unwrap_or(u64::MAX).min(ByteRange::END_MAX);
        let length = end.checked_sub(self.offset).filter(|length| *length > 0)?;
        ByteRange::new(self.offset, length).ok()
    }
}

/// By hand, so that a range that ends nowhere is refused and never carried on.
impl<'b, C> Decode<'b, C> for LockRange {
    fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
        let at = d.position();
        let wrong = |words: &str| minicbor::decode::Error::message(words).at(at);
        if d.array()? != Some(2) {
            return Err(wrong("a lock range is an array of offset and length"));
        }
        Self::new(d.u64()?, d.u64()?).map_err(|_| wrong("a lock range ends beyond 2^64"))
    }
}

/// How a range is locked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Encode, Decode)]
#[cbor(index_only)]
pub enum LockKind {
    /// Others may lock it shared, nobody may lock it exclusive.
    #[n(0)]
    Shared,
    /// Nobody else may lock it.
    #[n(1)]
    Exclusive,
}

/// One element of a lock request: a range and how it is locked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Encode, Decode)]
pub struct LockItem {
    /// What is locked.
    #[n(0)]
    pub range: LockRange,
    /// How.
    #[n(1)]
    pub kind: LockKind,
}

impl LockItem {
    /// True if the two cannot stand beside each other when different owners hold them.
    pub fn conflicts(self, other: Self) -> bool {
        (self.kind == LockKind::Exclusive || other.kind == LockKind::Exclusive)
            && self.range.overlaps(other.range)
    }
}

/// What the locks of a file forbid the I/O of one open: dataplane refuses an access in `deny` that touches a byte of
/// `range`. Travels on the link as an array of offset, length and rights; a list of them is ordered and disjoint
/// ([`io_rules_ordered`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IoRule {
    /// Where; never empty.
    pub range: ByteRange,
    /// What is refused there.
    pub deny: Access,
}

impl<C> Encode<C> for IoRule {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.array(3)?.u64(self.range.offset())?.u64(self.range.length())?.encode(self.deny)?.ok()
    }
}

impl<'b, C> Decode<'b, C> for IoRule {
    fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
        let at = d.position();
        let wrong = |words: &str| minicbor::decode::Error::message(words).at(at);
        if d.array()? != Some(3) {
            return Err(wrong("an I/O rule is an array of offset, length and rights"));
        }
        let range =
            ByteRange::new(d.u64()?, d.u64()?).map_err(|_| wrong("an I/O rule ends beyond a file"))?;
        if range.length() == 0 {
            return Err(wrong("an I/O rule without a byte"));
        }
        Ok(Self { range, deny: d.decode()? })
    }
}

/// True if the rules are sorted by offset and no two share a byte: what [`io_conflict`] relies on. For whoever
/// received them.
pub fn io_rules_ordered(rules: &[IoRule]) -> bool {
    rules.iter().zip(rules.iter().skip(1)).all(|(rule, next)| rule.range.end() <= next.range.offset())
}

/// True if the rules, ordered as [`io_rules_ordered`] says, refuse `access` to a byte of `range`. A request for zero
/// bytes touches none and is never refused. Costs a binary search and a look at each rule inside the range.
pub fn io_conflict(rules: &[IoRule], range: ByteRange, access: Access) -> bool {
    let first = rules.partition_point(|rule| rule.range.end() <= range.offset());
    range.length() > 0
        && rules
            .iter()
            .skip(first)
            .take_while(|rule| rule.range.offset() < range.end())
            .any(|rule| !rule.deny.intersection(access).is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(length: u64, offset: u64) -> LockRange {
        LockRange::new(offset, length).unwrap()
    }

    #[test]
    fn lck_05_ends_are_checked_and_never_wrap() {
        let last = u64::MAX;
        assert_eq!(at(1, 1 << 63).end(), (1 << 63) + 1);
        assert_eq!(at(1, last).end(), 1 << 64, "the very last byte");
        assert_eq!(at(0, last).end(), u128::from(last));
        assert_eq!(at(last, 0).end(), u128::from(last));
        assert_eq!(at(last, 1).end(), 1 << 64);
        for (offset, length) in [(last, 2), (2, last), (last, last), (1 << 63, (1 << 63) + 1)] {
            assert_eq!(LockRange::new(offset, length), Err(LockRangeError { offset, length }));
        }
        assert!(at(1, last).overlaps(at(last, 1)));
        assert!(!at(1, last).overlaps(at(last, 0)), "neighbours at the end");
        assert!(at(last, 1).contains(at(0, last)), "between the last two bytes");
        assert!(!at(last, 0).contains(at(0, last)));
    }

    #[test]
    fn lck_05_only_what_a_file_can_hold_restricts_io() {
        let end = ByteRange::END_MAX;
        assert_eq!(at(u64::MAX, 0).bytes(), ByteRange::new(0, end).ok());
        assert_eq!(at(u64::MAX, 1).bytes(), ByteRange::new(1, end - 1).ok());
        assert_eq!(at(1, end - 1).bytes(), ByteRange::new(end - 1, 1).ok());
        assert_eq!(at(1, end).bytes(), None);
        assert_eq!(at(1, u64::MAX).bytes(), None);
        assert_eq!(at(0, 5).bytes(), None);
    }

    #[test]
    fn lck_04_a_zero_length_lock_lies_between_two_bytes() {
        let zero = at(0, 10);
        let others = [
            (at(0, 10), false),
            (at(1, 9), false),
            (at(1, 10), false),
            (at(1, 11), false),
            (at(2, 9), true),
            (at(2, 10), false),
            (at(3, 9), true),
        ];
        for (other, wanted) in others {
            assert_eq!(zero.overlaps(other), wanted, "{other:?}");
            assert_eq!(other.overlaps(zero), wanted, "{other:?}, the other way round");
        }
        assert!(!at(0, 0).overlaps(at(u64::MAX, 0)), "nothing lies before byte 0");
    }

    #[test]
    fn lck_04_a_zero_byte_request_is_never_refused() {
        let rule = |offset, length, deny| IoRule { range: ByteRange::new(offset, length).unwrap(), deny };
        let both = Access::READ | Access::WRITE;
        let rules = [rule(10, 5, both), rule(15, 5, Access::WRITE), rule(30, 1, both)];
        assert!(io_rules_ordered(&rules) && !io_rules_ordered(&[rules[1], rules[0]]));
        let refused =
            |offset, length, access| io_conflict(&rules, ByteRange::new(offset, length).unwrap(), access);
        for offset in 0..40 {
            assert!(!refused(offset, 0, both), "0 bytes at {offset}");
        }
        assert!(
            refused(14, 1, Access::READ) && refused(0, 11, Access::READ) && refused(0, 100, Access::READ)
        );
        assert!(!refused(15, 5, Access::READ) && refused(15, 1, Access::WRITE));
        assert!(!refused(0, 10, both) && !refused(20, 10, both) && !refused(31, 100, both));
        assert!(refused(15, 16, Access::READ), "the second rule allows it, the third does not");
        assert!(!io_conflict(&[], ByteRange::new(0, 10).unwrap(), both));
    }

    #[test]
    fn what_arrives_is_checked() {
        let item = LockItem { range: at(1, u64::MAX), kind: LockKind::Exclusive };
        let bytes = minicbor::to_vec(item).unwrap();
        assert_eq!(bytes, [0x82, 0x82, 0x1b, 255, 255, 255, 255, 255, 255, 255, 255, 1, 1], "golden");
        assert_eq!(minicbor::decode::<LockItem>(&bytes).unwrap(), item);
        let refused = |pair: &[u64]| minicbor::decode::<LockRange>(&minicbor::to_vec(pair).unwrap()).is_err();
        assert!(!refused(&[u64::MAX, 1]));
        assert!(refused(&[u64::MAX, 2]) && refused(&[1]) && refused(&[1, 2, 3]));

        let rule = IoRule { range: ByteRange::new(7, 9).unwrap(), deny: Access::WRITE };
        let bytes = minicbor::to_vec(rule).unwrap();
        assert_eq!(bytes, [0x83, 7, 9, 2], "golden");
        assert_eq!(minicbor::decode::<IoRule>(&bytes).unwrap(), rule);
        for wrong in [[0x83, 7, 0, 2], [0x83, 7, 9, 8], [0x82, 7, 9, 2]] {
            assert!(minicbor::decode::<IoRule>(&wrong).is_err(), "{wrong:?}");
        }
        let wrong = minicbor::to_vec((ByteRange::END_MAX, 1u64, 2u8)).unwrap();
        assert!(minicbor::decode::<IoRule>(&wrong).is_err(), "beyond a file");
    }
}
