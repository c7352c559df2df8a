//! What a peer is told of registered memory.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Registered memory as it is named to the peer: {address, rkey, length}, 16 bytes on the wire.
///
/// On verbs the three are the device's own; on tcp and in memory the transport's region table gives them the
/// same meaning.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RegionDescriptor {
    address: U64,
    rkey: U32,
    length: U32,
}

impl RegionDescriptor {
    /// Bytes on the wire.
    pub const SIZE: usize = size_of::<Self>();
    /// Names no memory: for requests that carry their payload inline.
    pub const NONE: Self = Self { address: U64::ZERO, rkey: U32::ZERO, length: U32::ZERO };

    /// Describes `length` bytes at `address` that `rkey` opens.
    pub const fn new(address: u64, rkey: u32, length: u32) -> Self {
        Self { address: U64::new(address), rkey: U32::new(rkey), length: U32::new(length) }
    }

    /// Where the region begins, in the address space its owner registered it under.
    pub const fn address(&self) -> u64 {
        self.address.get()
    }

    /// The remote key.
    pub const fn rkey(&self) -> u32 {
        self.rkey.get()
    }

    /// Bytes.
    pub const fn length(&self) -> u32 {
        self.length.get()
    }

    /// The part of it that begins `offset` bytes in and has `length` bytes; `None` if it is not inside.
    pub const fn part(&self, offset: u32, length: u32) -> Option<Self> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length() => {}
            _ => return None,
        }
        match self.address().checked_add(offset as u64) {
            Some(address) => Some(Self::new(address, self.rkey(), length)),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stay_inside() {
        let d = RegionDescriptor::new(0x1000, 7, 100);
        assert_eq!(d.part(40, 60), Some(RegionDescriptor::new(0x1028, 7, 60)));
        assert_eq!(d.part(41, 60), None);
        assert_eq!(d.part(u32::MAX, 2), None);
        assert_eq!(RegionDescriptor::new(u64::MAX, 7, 100).part(1, 1), None);
    }
}
