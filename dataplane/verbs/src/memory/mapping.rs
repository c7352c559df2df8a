//! [`Memory`]: one mapping, anonymous or of a memory file. Everything that is registered with a device is a `Memory` underneath.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

use crate::gauges::MAPPED_BYTES;

/// From this size on, the kernel is asked for huge pages: fewer faults, faster pinning, fewer TLB misses.
const HUGE_PAGE_BYTES: usize = 1 << HUGE_PAGE_BITS;
const HUGE_PAGE_BITS: u8 = 21;

/// Page-aligned memory, zeroed at first: private and anonymous, or a memory file's, shared with whoever has that. Its address stays the
/// same until the last owner drops it.
///
/// A `Memory` gives no access to its bytes: that is for [`super::Pool`] and [`super::Region`], which each have
/// their own rule for who may touch them.
pub struct Memory {
    map: MmapRaw,
    /// Bytes asked for; with pages from the kernel's reserve the mapping is longer.
    len: usize,
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

    /// As [`Memory::exclusive`], of huge pages that the operator has set aside (`vm.nr_hugepages`). They are taken now, so that none
    /// is missing later.
    pub(super) fn exclusive_reserved(len: usize) -> io::Result<Arc<Self>> {
        let too_big = || io::Error::new(io::ErrorKind::InvalidInput, "size exceeds the address space");
        // Such a mapping is unmapped in whole pages.
        let whole = len.max(1).checked_next_multiple_of(HUGE_PAGE_BYTES).ok_or_else(too_big)?;
        let map = MmapOptions::new().len(whole).huge(Some(HUGE_PAGE_BITS)).map_anon()?;
        // Set aside is not had: a control group may have less, and what lacks when it is touched ends the process.
        map.advise(memmap2::Advice::PopulateWrite)?;
        MAPPED_BYTES.add(len as u64);
        Ok(Arc::new(Self { map: MmapRaw::from(map), len, exclusive: true }))
    }

    /// Maps the first `len` bytes (at least one) of a memory file that is as long.
    pub(super) fn of_file(file: BorrowedFd<'_>, len: usize) -> io::Result<Arc<Self>> {
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        if len >= HUGE_PAGE_BYTES {
            // As for anonymous memory.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        MAPPED_BYTES.add(len as u64);
        Ok(Arc::new(Self { map, len, exclusive: false }))
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
        Ok(Arc::new(Self { map: MmapRaw::from(map), len, exclusive }))
    }

    /// Length in bytes, as asked for.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.len
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
        MAPPED_BYTES.sub(self.len as u64);
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
    fn reserved_pages_are_used_where_there_are_some() {
        match Memory::exclusive_reserved(5 << 20) {
            Ok(memory) => {
                assert_eq!((memory.len(), memory.addr() % (2 << 20)), (5 << 20, 0));
            }
            Err(error) => eprintln!("skipped: no huge pages are set aside: {error}"),
        }
    }

    #[test]
    fn more_than_the_address_space_is_an_error() {
        assert!(Memory::anonymous(usize::MAX / 4).is_err());
    }
}
