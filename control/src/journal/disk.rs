//! A directory of a file system as the journal's disk.

use holdfast_shared::journal::{Disk, DiskError};
use rustix::fs::{
    FallocateFlags, FlockOperation, Mode, OFlags, fallocate, fdatasync, flock, fsync, openat, unlinkat,
};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

/// Zeros written at once where the file system cannot allocate.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// The journal's directory. Files have mode 0600, the directory 0700 if it is made here.
#[derive(Debug)]
pub struct FileDisk {
    path: PathBuf,
    directory: OwnedFd,
    sync: bool,
}

impl Drop for FileDisk {
    fn drop(&mut self) {
        // Closing is not enough: a process that is being spawned at this moment has a copy of the descriptor until it runs its
        // program, and the lock would live on with it.
        let _ = flock(&self.directory, FlockOperation::Unlock);
    }
}

fn failed(error: impl Into<std::io::Error>) -> DiskError {
    let error = error.into();
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOSPC | Errno::DQUOT) => DiskError::NoSpace,
        _ => DiskError::Failed(error.to_string()),
    }
}

fn write_zeros(file: &File, offset: u64, length: u64) -> std::io::Result<()> {
    let end = offset.saturating_add(length);
    let mut at = offset;
    while at < end {
        let some = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
        file.write_all_at(&ZEROS[..some], at)?;
        at += some as u64;
    }
    Ok(())
}

/// Once more for as long as a signal comes between.
fn uninterrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

impl FileDisk {
    /// Opens the directory, or makes it, and keeps other processes out of it: it may lie elsewhere than the state
    /// directory, whose lock then does not cover it. Without `sync` nothing is ever waited for: for measurements.
    ///
    /// # Errors
    /// If the directory cannot be made or opened, or is in use.
    pub fn open(path: &Path, sync: bool) -> std::io::Result<Self> {
        match std::fs::DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {
                let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let directory = openat(rustix::fs::CWD, path, flags, Mode::empty())?;
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(std::io::Error::other("another process uses this journal")),
            locked => locked?,
        }
        Ok(Self { path: path.to_owned(), directory, sync })
    }

    fn at(&self, name: &str, more: OFlags) -> Result<File, DiskError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | more;
        let opened = uninterrupted(|| openat(&self.directory, name, flags, Mode::from_raw_mode(0o600)));
        opened.map(File::from).map_err(failed)
    }
}

impl Disk for FileDisk {
    type File = File;

    fn list(&self) -> Result<Vec<String>, DiskError> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            // A name that is no text is none of ours.
            names.extend(entry.map_err(failed)?.file_name().into_string());
        }
        Ok(names)
    }

    fn create(&self, name: &str) -> Result<File, DiskError> {
        self.at(name, OFlags::CREATE | OFlags::EXCL)
    }

    fn open(&self, name: &str) -> Result<File, DiskError> {
        self.at(name, OFlags::empty())
    }

    fn length(&self, file: &File) -> Result<u64, DiskError> {
        file.metadata().map(|metadata| metadata.len()).map_err(failed)
    }

    fn read_at(&self, file: &File, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
        loop {
            match file.read_at(into, offset) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                done => return done.map_err(failed),
            }
        }
    }

    fn write_at(&self, file: &File, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        file.write_all_at(bytes, offset).map_err(failed)
    }

    fn allocate(&self, file: &File, offset: u64, length: u64) -> Result<(), DiskError> {
        match uninterrupted(|| fallocate(file, FallocateFlags::empty(), offset, length)) {
            // Writing zeros takes the space as well, where file systems know no other way.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => write_zeros(file, offset, length).map_err(failed),
            done => done.map_err(failed),
        }
    }

    fn truncate(&self, file: &File, length: u64) -> Result<(), DiskError> {
        file.set_len(length).map_err(failed)
    }

    fn sync_data(&self, file: &File) -> Result<(), DiskError> {
        if self.sync { uninterrupted(|| fdatasync(file)).map_err(failed) } else { Ok(()) }
    }

    fn sync_directory(&self) -> Result<(), DiskError> {
        if self.sync { uninterrupted(|| fsync(&self.directory)).map_err(failed) } else { Ok(()) }
    }

    fn remove(&self, name: &str) -> Result<(), DiskError> {
        unlinkat(&self.directory, name, rustix::fs::AtFlags::empty()).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_lock_ends_with_the_journal_even_if_a_child_has_a_copy_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let disk = FileDisk::open(&path, true).unwrap();
        assert!(FileDisk::open(&path, true).is_err(), "it is in use");
        let copy = disk.directory.try_clone().unwrap();
        drop(disk);
        FileDisk::open(&path, true).unwrap();
        drop(copy);
    }

    #[test]
    fn files_are_private_and_their_space_is_taken_either_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let disk = FileDisk::open(&path, true).unwrap();
        let file = disk.create("a").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(disk.create("a").is_err(), "a file is never made twice");
        assert!(FileDisk::open(&path, true).is_err(), "one journal has one writer");
        disk.write_at(&file, 0, b"head").unwrap();
        disk.allocate(&file, 4, 100_000).unwrap();
        write_zeros(&file, 100_004, 150_000).unwrap();
        assert_eq!(disk.length(&file).unwrap(), 250_004);
        let mut bytes = vec![1; 300_000];
        let mut got = 0;
        while let some @ 1.. = disk.read_at(&file, got as u64, &mut bytes[got..]).unwrap() {
            got += some;
        }
        assert_eq!((got, &bytes[..4]), (250_004, &b"head"[..]));
        assert!(bytes[4..got].iter().all(|byte| *byte == 0));
        std::os::unix::fs::symlink("a", path.join("link")).unwrap();
        assert!(disk.open("link").is_err(), "links are not followed");
        disk.remove("a").unwrap();
        assert_eq!(disk.list().unwrap(), ["link"]);
    }

    /// Whether the kernel is asked at all: of a pipe, which has no disk, it refuses it.
    #[test]
    fn a_sync_asks_the_kernel_unless_it_is_switched_off() {
        for (sync, refused) in [(true, true), (false, false)] {
            let (reader, writer) = std::io::pipe().unwrap();
            let disk = FileDisk { path: PathBuf::new(), directory: reader.into(), sync };
            assert_eq!(disk.sync_data(&File::from(OwnedFd::from(writer))).is_err(), refused);
            assert_eq!(disk.sync_directory().is_err(), refused);
        }
    }
}
