//! [`Memory`]: one anonymous mapping. Everything that is registered with a device is a `Memory` underneath.

use std::io;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

use crate::gauges::MAPPED_BYTES;

/// From this size on, the kernel is asked for huge pages: fewer faults, faster pinning, fewer TLB misses.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Page-aligned, zeroed, private anonymous memory. Its address stays the same until the last owner drops it.
///
/// A `Memory` gives no access to its bytes: that is for [`super::Pool`] and [`super::Region`], which each have
/// their own rule for who may touch them.
pub struct Memory {
    map: MmapRaw,
    /// True if slices of this memory are handed out (a pool's): it must then never be exposed to a peer.
    exclusive: bool,
}

impl Memory {
    /// Maps `len` bytes (at least one; the kernel rounds up to whole pages). Pages are allocated when first touched.
    pub fn anonymous(len: usize) -> io::Result<Arc<Self>> {
        Self::map(len, false)
    }

    /// As [`Memory::anonymous`], for memory of which slices are handed out.
    pub(super) fn exclusive(len: usize) -> io::Result<Arc<Self>> {
        Self::map(len, true)
    }

    fn map(len: usize, exclusive: bool) -> io::Result<Arc<Self>> {
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "memory of zero bytes asked for"));
        }
        let map = MmapOptions::new().len(len).map_anon()?;
        if len >= HUGE_PAGE_BYTES {
            // Advice only: a kernel without transparent huge pages refuses it, and nothing is lost but speed.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        MAPPED_BYTES.add(len as u64);
        Ok(Arc::new(Self { map: MmapRaw::from(map), exclusive }))
    }

    /// Length in bytes, as asked for.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Virtual address of the first byte.
    pub fn addr(&self) -> u64 {
        self.map.as_ptr() as u64
    }

    /// True if this memory must not be exposed to a peer, because slices of it are handed out.
    pub(crate) fn is_exclusive(&self) -> bool {
        self.exclusive
    }

    /// First byte. Whoever dereferences it must know who else may touch those bytes.
    pub(super) fn as_mut_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        MAPPED_BYTES.sub(self.map.len() as u64);
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("len", &self.len()).field("exclusive", &self.exclusive).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapping_is_page_aligned_and_keeps_its_length() {
        let memory = Memory::anonymous(5000).unwrap();
        assert_eq!(memory.len(), 5000);
        assert_eq!(memory.addr() % 4096, 0);
        assert!(!memory.is_exclusive());
    }

    #[test]
    fn zero_bytes_are_refused() {
        assert_eq!(Memory::anonymous(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn more_than_the_address_space_is_an_error() {
        assert!(Memory::anonymous(usize::MAX / 4).is_err());
    }
}
