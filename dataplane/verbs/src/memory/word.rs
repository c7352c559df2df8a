//! [`MappedWord`]: one number in a file, raised without a system call.
//!
//! ```text
//!   threads ──raise(n)──► one word of a shared mapping ── page cache ──► the file: whoever reads it finds the highest n,
//!                                                                        also after this process was killed
//! ```

use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

const BYTES: usize = size_of::<u64>();

/// A number in the first 8 bytes of a file, little endian. The file must not be cut shorter while this lives: reaching a
/// page that is no more ends the process, so it belongs into a directory of ours.
#[derive(Debug)]
pub struct MappedWord {
    map: MmapRaw,
}

impl MappedWord {
    /// Maps the file, which must be open for reading and writing; one shorter than 8 bytes becomes 8 zero bytes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn map(file: &File) -> io::Result<Self> {
        if file.metadata()?.len() < BYTES as u64 {
            // Written, not only lengthened: a page of a hole could find the disk full when it is first touched.
            file.write_all_at(&[0; BYTES], 0)?;
        }
        Ok(Self { map: MmapOptions::new().len(BYTES).map_raw(file)? })
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: the mapping is readable and writable, at least 8 bytes long, page-aligned, and lives as long as the
        // borrow of `self`. Nothing but this reference reaches its bytes in this process, always atomically; other
        // processes may map the file too, and what they store are some 8 bytes: every value is a valid number.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().cast()) }
    }

    /// The number now. Whoever reads one sees what the thread that wrote it did before.
    pub fn read(&self) -> u64 {
        u64::from_le(self.word().load(Ordering::Acquire))
    }

    /// Makes it `number`, if it is lower.
    pub fn raise(&self, number: u64) {
        let higher = |old: u64| (u64::from_le(old) < number).then_some(number.to_le());
        // Refused if it is as high already.
        let _ = self.word().fetch_update(Ordering::AcqRel, Ordering::Acquire, higher);
    }

    /// Makes it `number`, or one more than it is if that is as high already: afterwards it is another in any case, which whoever has read
    /// it before [does not replace](Self::replace).
    pub fn raise_anew(&self, number: u64) {
        let higher = |old: u64| Some(u64::from_le(old).saturating_add(1).max(number).to_le());
        let _ = self.word().fetch_update(Ordering::AcqRel, Ordering::Acquire, higher);
    }

    /// Makes it `number`, if it still is `old`. True if so.
    pub fn replace(&self, old: u64, number: u64) -> bool {
        self.word().compare_exchange(old.to_le(), number.to_le(), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Makes it `number`.
    pub fn set(&self, number: u64) {
        self.word().store(number.to_le(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        rustix::fs::memfd_create("word-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
    }

    fn content(file: &File) -> u64 {
        let mut bytes = [0; BYTES];
        file.read_exact_at(&mut bytes, 0).unwrap();
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn the_file_has_the_highest_number() {
        let file = file();
        let word = MappedWord::map(&file).unwrap();
        assert_eq!((word.read(), content(&file)), (0, 0));
        word.raise(0x0102_0304_0506_0708);
        word.raise(5);
        assert_eq!(content(&file), 0x0102_0304_0506_0708);
        assert!(!word.replace(5, 6), "it is another by now");
        word.raise_anew(9);
        assert_eq!(content(&file), 0x0102_0304_0506_0709, "another, though it was higher");
        word.set(0x0102_0304_0506_0708);
        assert!(word.replace(0x0102_0304_0506_0708, 7) && content(&file) == 7);
        word.set(5);
        assert_eq!(content(&file), 5);
        let again = MappedWord::map(&file).unwrap();
        again.raise(6);
        assert_eq!((word.read(), content(&file)), (6, 6), "one number, however often it is mapped");
    }

    #[test]
    fn threads_lose_no_higher_number() {
        let file = file();
        let word = MappedWord::map(&file).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let word = &word;
                scope.spawn(move || (0..10_000).for_each(|n| word.raise(n * 4 + thread)));
            }
        });
        assert_eq!(content(&file), 39_999);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_an_error() {
        let null = File::open("/dev/null").unwrap();
        assert!(MappedWord::map(&null).is_err());
    }
}
