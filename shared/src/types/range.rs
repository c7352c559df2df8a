//! Byte ranges of a file. All arithmetic is checked here, once.

/// Why an (offset, length) pair is not a range of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("offset {offset} + length {length} is beyond the last possible byte of a file (2^63 - 1)")]
pub struct RangeError {
    /// The offset asked for, bytes.
    pub offset: u64,
    /// The length asked for, bytes.
    pub length: u64,
}

/// The bytes `[offset, offset + length)` of a file; the end is at most 2^63 - 1, the kernel's own limit
/// (`loff_t`). A length of zero is a range that holds no byte.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ByteRange {
    offset: u64,
    length: u64,
}

impl ByteRange {
    /// The largest end a range may have.
    pub const END_MAX: u64 = i64::MAX as u64;

    /// Checks that the range ends within what a file can hold.
    ///
    /// # Errors
    /// [`RangeError`] if `offset + length` overflows or exceeds [`ByteRange::END_MAX`].
    pub const fn new(offset: u64, length: u64) -> Result<Self, RangeError> {
        match offset.checked_add(length) {
            Some(end) if end <= Self::END_MAX => Ok(Self { offset, length }),
            _ => Err(RangeError { offset, length }),
        }
    }

    /// First byte.
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Number of bytes.
    pub const fn length(self) -> u64 {
        self.length
    }

    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.offset + self.length
    }

    /// True if the ranges share at least one byte.
    pub const fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end() && self.length > 0 && other.length > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_checked() {
        assert!(ByteRange::new(u64::MAX, 1).is_err());
        assert!(ByteRange::new(1, u64::MAX).is_err());
        assert!(ByteRange::new(ByteRange::END_MAX, 1).is_err());
        assert_eq!(ByteRange::new(ByteRange::END_MAX, 0).unwrap().end(), ByteRange::END_MAX);
    }

    #[test]
    fn neighbours_and_empty_ranges_do_not_overlap() {
        let r = |o, l| ByteRange::new(o, l).unwrap();
        assert!(r(0, 2).overlaps(r(1, 1)));
        assert!(!r(0, 2).overlaps(r(2, 1)));
        assert!(!r(0, 2).overlaps(r(1, 0)));
    }
}
