//! [`Region`]: memory that a peer may read or write at any moment, by RDMA, or because its process has mapped it too.
//!
//! No `&[u8]` of a region ever exists: the compiler may assume that bytes behind one don't change. Its bytes are
//! reached by copies made of relaxed atomic accesses (plain moves to the processor, but accesses the compiler may
//! neither invent nor repeat), or by system calls on its address. What is copied out while the peer writes may be torn;
//! it is never undefined.
//!
//! Every range is checked; a range outside gives an error and touches nothing.

use std::io;
use std::ops::Deref;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use super::nowait::{Nowait, file_offset, nowait_result, once};
use super::{Memory, OutOfRange, check_range, memfd, span};

/// Memory shared with a peer. Made once, registered once, kept: see the module documentation for how it is touched.
#[derive(Debug)]
pub struct Region {
    memory: Arc<Memory>,
    /// The memory file, if it is one's.
    file: Option<OwnedFd>,
}

const WORD: usize = size_of::<u64>();

impl Region {
    /// A zeroed region of `len` bytes (at least one), page-aligned.
    pub fn new(len: usize) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { memory: Memory::anonymous(len)?, file: None }))
    }

    /// As [`Region::new`], of memory that another process can be given by its [`Region::file`]: all of it is allocated at
    /// once, and its length is sealed.
    pub fn shareable(len: usize) -> io::Result<Arc<Self>> {
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "memory of zero bytes asked for"));
        }
        let file = memfd::create("holdfast", len)?;
        Ok(Arc::new(Self { memory: Memory::of_file(file.as_fd(), len)?, file: Some(file) }))
    }

    /// The `len` bytes of a [`Region::shareable`] that another process made and gave this one's descriptor of. From now on it is
    /// [frozen](Region::is_frozen).
    ///
    /// # Errors
    /// `InvalidInput` if it is not such a one, or not as long; the kernel's.
    pub fn adopt(file: OwnedFd, len: usize) -> io::Result<Arc<Self>> {
        if len == 0 || memfd::sealed_len(file.as_fd())? != len as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a memory file of another length"));
        }
        let memory = Memory::of_file(file.as_fd(), len)?;
        memfd::freeze(&file)?;
        if !memfd::is_frozen(&file, len)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a memory file with a hole"));
        }
        Ok(Arc::new(Self { memory, file: None }))
    }

    /// The memory file, to be given to another process; `None` if it is none.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// The same memory without its file, which is closed when nobody else has it: it can't be given to another process any more.
    pub fn without_file(&self) -> Arc<Self> {
        Arc::new(Self { memory: Arc::clone(&self.memory), file: None })
    }

    /// True if nobody who has its file can change more of it than the bytes that they have mapped: no page can be taken away
    /// under who touches it. So it is when the one it was given to has adopted it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_frozen(&self) -> io::Result<bool> {
        self.file.as_ref().map_or(Ok(false), |file| memfd::is_frozen(file, self.len()))
    }

    /// The number in the 8 bytes from `offset` on, which must be a multiple of 8.
    ///
    /// # Errors
    /// If they do not lie inside, or so.
    pub fn word(self: &Arc<Self>, offset: usize) -> Result<SharedWord, OutOfRange> {
        let range = span(offset, WORD, self.len())?;
        if offset % WORD != 0 {
            return Err(OutOfRange { start: range.start, end: range.end, len: self.len() });
        }
        Ok(SharedWord { region: Arc::clone(self), offset })
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Virtual address of the first byte: what a peer names in its RDMA requests.
    pub fn addr(&self) -> u64 {
        self.memory.addr()
    }

    /// The mapping underneath, to be registered.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Copies `data` to the bytes from `offset` on.
    pub fn copy_in(&self, offset: usize, data: &[u8]) -> Result<(), OutOfRange> {
        let (head, words, tail) = self.split(span(offset, data.len(), self.len())?);
        let (data_head, rest) = data.split_at(head.len());
        let (data_words, data_tail) = rest.split_at(words.len() * WORD);
        for (to, from) in head.iter().zip(data_head).chain(tail.iter().zip(data_tail)) {
            to.store(*from, Relaxed);
        }
        for (to, from) in words.iter().zip(data_words.chunks_exact(WORD)) {
            let mut word = [0; WORD];
            word.copy_from_slice(from);
            to.store(u64::from_ne_bytes(word), Relaxed);
        }
        Ok(())
    }

    /// Copies the bytes from `offset` on to `data`, filling it.
    pub fn copy_out(&self, offset: usize, data: &mut [u8]) -> Result<(), OutOfRange> {
        let (head, words, tail) = self.split(span(offset, data.len(), self.len())?);
        let (data_head, rest) = data.split_at_mut(head.len());
        let (data_words, data_tail) = rest.split_at_mut(words.len() * WORD);
        for (from, to) in head.iter().zip(data_head).chain(tail.iter().zip(data_tail)) {
            *to = from.load(Relaxed);
        }
        for (from, to) in words.iter().zip(data_words.chunks_exact_mut(WORD)) {
            to.copy_from_slice(&from.load(Relaxed).to_ne_bytes());
        }
        Ok(())
    }

    /// Zeroes the bytes of `range`.
    pub fn zero(&self, range: Range<usize>) -> Result<(), OutOfRange> {
        check_range(&range, self.len())?;
        let (head, words, tail) = self.split(range);
        head.iter().chain(tail).for_each(|byte| byte.store(0, Relaxed));
        words.iter().for_each(|word| word.store(0, Relaxed));
        Ok(())
    }

    /// The bytes of `range` as atomics: a view without a copy that stays true while the peer writes.
    pub fn as_atomics(&self, range: Range<usize>) -> Option<&[AtomicU8]> {
        check_range(&range, self.len()).ok()?;
        Some(self.atomics(range))
    }

    /// Reads from `fd` at `file_offset` straight into the bytes of `range`. Returns the number of bytes read, which
    /// may be less than asked for; 0 is the end of the file (or an empty range). Blocks as `pread` does.
    pub fn read_file(
        &self,
        fd: BorrowedFd<'_>,
        file_offset_bytes: u64,
        range: Range<usize>,
    ) -> io::Result<usize> {
        let (start, len) = self.raw(range)?;
        let offset = file_offset(file_offset_bytes)?;
        // SAFETY: `raw` checked that the mapping, alive through self, holds `len` bytes from `start`. The kernel writes
        // them; nobody holds a reference to them but atomics.
        once(|| unsafe { libc::pread(fd.as_raw_fd(), start.cast(), len, offset) })
    }

    /// Writes the bytes of `range` to `fd` at `file_offset`. Returns the number of bytes written, which may be less
    /// than asked for. Blocks as `pwrite` does.
    pub fn write_file(
        &self,
        fd: BorrowedFd<'_>,
        file_offset_bytes: u64,
        range: Range<usize>,
    ) -> io::Result<usize> {
        let (start, len) = self.raw(range)?;
        let offset = file_offset(file_offset_bytes)?;
        // SAFETY: as in `read_file`; the kernel only reads them.
        once(|| unsafe { libc::pwrite(fd.as_raw_fd(), start.cast(), len, offset) })
    }

    /// As [`Region::read_file`], but only what the page cache holds: never waits for the disk.
    pub fn read_file_nowait(&self, fd: BorrowedFd<'_>, at: u64, range: Range<usize>) -> io::Result<Nowait> {
        let (start, len) = self.raw(range)?;
        let offset = file_offset(at)?;
        let iov = libc::iovec { iov_base: start.cast(), iov_len: len };
        // SAFETY: as in `read_file`; `iov` lives across the call.
        nowait_result(once(|| unsafe {
            libc::preadv2(fd.as_raw_fd(), &raw const iov, 1, offset, libc::RWF_NOWAIT)
        }))
    }

    /// As [`Region::write_file`], but never waits: not for a lock, nor for memory, nor for the disk.
    pub fn write_file_nowait(&self, fd: BorrowedFd<'_>, at: u64, range: Range<usize>) -> io::Result<Nowait> {
        let (start, len) = self.raw(range)?;
        let offset = file_offset(at)?;
        let iov = libc::iovec { iov_base: start.cast(), iov_len: len };
        // SAFETY: as in `write_file`; `iov` lives across the call.
        nowait_result(once(|| unsafe {
            libc::pwritev2(fd.as_raw_fd(), &raw const iov, 1, offset, libc::RWF_NOWAIT)
        }))
    }

    /// Address and length of `range`, for the kernel or the device.
    pub(super) fn raw(&self, range: Range<usize>) -> Result<(*mut u8, usize), OutOfRange> {
        check_range(&range, self.len())?;
        // SAFETY: start <= end <= len, so the result lies within, or one past, the mapping.
        let start = unsafe { self.memory.as_mut_ptr().add(range.start) };
        Ok((start, range.end - range.start))
    }

    /// The bytes of `range`, which the caller has checked.
    fn atomics(&self, range: Range<usize>) -> &[AtomicU8] {
        debug_assert!(check_range(&range, self.len()).is_ok());
        // SAFETY: the range lies within the mapping, which is initialised (zeroed by the kernel) and alive as long as
        // self; AtomicU8 has the layout of u8, and may change behind a shared reference. In this process the bytes
        // are touched by atomics and system calls only.
        unsafe {
            std::slice::from_raw_parts(
                self.memory.as_mut_ptr().add(range.start).cast::<AtomicU8>().cast_const(),
                range.end - range.start,
            )
        }
    }

    /// `range`, which the caller has checked, as bytes up to a word boundary, words, and the bytes left over.
    fn split(&self, range: Range<usize>) -> (&[AtomicU8], &[AtomicU64], &[AtomicU8]) {
        // SAFETY: `align_to` gives a middle that is aligned for AtomicU64 and lies within the same initialised bytes;
        // every bit pattern is a valid AtomicU64, and interior mutability holds for both types. Accesses of mixed size
        // to one place can meet only if two threads of this process copy to and from the same bytes at once; on the
        // processors we build for those are plain moves, torn at worst.
        unsafe { self.atomics(range).align_to::<AtomicU64>() }
    }
}

/// A number in a region, which it keeps alive. Whoever else has the memory may change it at any moment.
#[derive(Clone, Debug)]
pub struct SharedWord {
    region: Arc<Region>,
    /// A multiple of its size, with room for it in the region.
    offset: usize,
}

impl Deref for SharedWord {
    type Target = AtomicU64;

    fn deref(&self) -> &AtomicU64 {
        // SAFETY: `Region::word` checked that the 8 bytes lie within the mapping, which is page-aligned and lives as long as
        // `self.region`, at a multiple of 8. They are reached by atomics and system calls only, and every value is a valid number.
        unsafe { AtomicU64::from_ptr(self.region.memory.as_mut_ptr().add(self.offset).cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    fn temporary_file() -> std::fs::File {
        std::fs::File::from(rustix::fs::memfd_create("region-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
    }

    #[test]
    fn copies_round_trip_at_every_alignment() {
        let region = Region::new(256).unwrap();
        for offset in 0..20 {
            for len in 0..40u8 {
                region.zero(0..256).unwrap();
                let data: Vec<u8> = (1..=len).collect();
                region.copy_in(offset, &data).unwrap();
                let mut all = [0xEE; 256];
                region.copy_out(0, &mut all).unwrap();
                assert_eq!(&all[offset..offset + data.len()], &data[..]);
                assert_eq!(
                    all.iter().filter(|byte| **byte != 0).count(),
                    data.len(),
                    "a byte outside was touched"
                );
            }
        }
    }

    #[test]
    #[allow(clippy::reversed_empty_ranges)] // that is the point
    fn ranges_outside_are_refused_and_touch_nothing() {
        let region = Region::new(16).unwrap();
        let file = temporary_file();
        assert!(region.copy_in(9, &[1; 8]).is_err());
        assert!(region.copy_in(usize::MAX, &[1]).is_err());
        assert!(region.copy_out(usize::MAX - 1, &mut [0; 4]).is_err());
        assert!(region.zero(8..17).is_err());
        assert!(region.zero(9..8).is_err());
        assert!(region.as_atomics(0..17).is_none());
        assert!(region.read_file(file.as_fd(), 0, 0..17).is_err());
        assert!(region.write_file(file.as_fd(), 0, 16..17).is_err());
        assert!(region.write_file(file.as_fd(), u64::MAX, 0..16).is_err());
        assert!(region.as_atomics(0..16).unwrap().iter().all(|byte| byte.load(Relaxed) == 0));
        assert_eq!(file.metadata().unwrap().len(), 0);
        region.copy_in(16, &[]).unwrap();
    }

    #[test]
    fn zero_leaves_the_neighbours_alone() {
        let region = Region::new(64).unwrap();
        region.copy_in(0, &[0xFF; 64]).unwrap();
        region.zero(3..41).unwrap();
        let mut all = [0; 64];
        region.copy_out(0, &mut all).unwrap();
        assert_eq!(all.iter().filter(|byte| **byte == 0).count(), 38);
        assert_eq!((all[2], all[3], all[40], all[41]), (0xFF, 0, 0, 0xFF));
    }

    #[test]
    fn a_region_of_two_mappings_is_one() {
        let ours = Region::shareable(9000).unwrap();
        assert!(!ours.is_frozen().unwrap());
        let given = || ours.file().unwrap().try_clone_to_owned().unwrap();
        assert!(Region::adopt(given(), 9001).is_err());
        let theirs = Region::adopt(given(), 9000).unwrap();
        assert!(ours.is_frozen().unwrap());
        assert_ne!(ours.addr(), theirs.addr());
        ours.copy_in(8990, b"both ways ").unwrap();
        let mut bytes = [0; 10];
        theirs.copy_out(8990, &mut bytes).unwrap();
        assert_eq!(&bytes, b"both ways ");
        let (one, other) = (ours.word(64).unwrap(), theirs.word(64).unwrap());
        one.store(77, Relaxed);
        assert_eq!(other.fetch_add(1, Relaxed), 77);
        assert_eq!(one.load(Relaxed), 78);
        drop(ours);
        assert_eq!(one.load(Relaxed), 78, "a word keeps its memory");
        for wrong in [1, 60, 8996, 9000, usize::MAX - 7] {
            assert!(theirs.word(wrong).is_err(), "{wrong}");
        }
        assert!(Region::adopt(given_of(&Region::shareable(4096).unwrap()), 0).is_err());
        assert!(Region::new(5).unwrap().file().is_none());
    }

    fn given_of(region: &Region) -> OwnedFd {
        region.file().unwrap().try_clone_to_owned().unwrap()
    }

    #[test]
    fn files_are_read_and_written_in_place() {
        let mut file = temporary_file();
        file.write_all(b"hello, region").unwrap();
        let region = Region::new(64).unwrap();
        assert_eq!(region.read_file(file.as_fd(), 7, 1..64).unwrap(), 6);
        let mut text = [0; 6];
        region.copy_out(1, &mut text).unwrap();
        assert_eq!(&text, b"region");
        assert_eq!(region.read_file(file.as_fd(), 13, 0..64).unwrap(), 0, "end of file");

        assert_eq!(region.write_file(file.as_fd(), 0, 1..7).unwrap(), 6);
        let mut content = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut content).unwrap();
        assert_eq!(content, "region region");
    }
}
