//! The state directory: the server's own secrets, and proof that only one control process uses it.
//!
//! | file | bytes | what |
//! |---|---|---|
//! | `kek` | 32 | seals resume keys |
//! | `cluster` | 16 | the cluster's id, in every resume key |
//! | `lock` | 0 | locked while a control process runs |
//! | `dataplane.lock` | 0 | locked while a dataplane lives |
//! | `generation` | text | counts the starts (see [`crate::generation`]) |
//! | `last-write` | 8 | no write of dataplane returned later than this, nanoseconds since 1970, little-endian |
//! | `journal/` | | what outlives a crash, unless the config puts it elsewhere |
//!
//! Directory 0700, files 0600. A secret that others may read or write is not used.

use holdfast_shared::auth::{Keyring, Secret};
use holdfast_shared::types::ClusterId;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, openat};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The longest text that [`StateDir::read`] takes, bytes.
const TEXT_BYTES_MAX: u64 = 4096;

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An operation failed.
    #[error("{path}: {source}")]
    Io {
        /// On which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others may use it.
    #[error("{path} has mode {mode:04o}: it must not be open to group or others (chmod go= {path})")]
    Permissions {
        /// Which file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It belongs to somebody else.
    #[error("{path} belongs to another user")]
    Owner {
        /// Which file.
        path: PathBuf,
    },
    /// It does not have the right length.
    #[error(
        "{path} has {got} bytes instead of {wanted}; restore it, or remove it to start anew (resume keys are lost)"
    )]
    Length {
        /// Which file.
        path: PathBuf,
        /// Its length.
        got: usize,
        /// As it should be.
        wanted: usize,
    },
    /// Another process has it.
    #[error("{path}: another control process uses this state directory")]
    InUse {
        /// The lock file.
        path: PathBuf,
    },
}

/// The state directory, held.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// The lock lives as long as this descriptor.
    _lock: OwnedFd,
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> StateError + '_ {
    move |source| StateError::Io { path: path.to_owned(), source }
}

fn check_private(path: &Path) -> Result<(), StateError> {
    let metadata = std::fs::metadata(path).map_err(io(path))?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(StateError::Owner { path: path.to_owned() });
    }
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(StateError::Permissions { path: path.to_owned(), mode });
    }
    Ok(())
}

/// The lock of a dataplane that lives.
#[derive(Debug)]
pub struct DataplaneLock(OwnedFd);

impl DataplaneLock {
    /// Blocks until that dataplane is dead. The lock is held for no longer than it takes to see that.
    ///
    /// # Errors
    /// If the kernel cannot lock.
    pub fn wait_until_free(self) -> std::io::Result<()> {
        loop {
            match flock(&self.0, FlockOperation::LockShared) {
                Err(rustix::io::Errno::INTR) => {}
                done => return Ok(done?),
            }
        }
    }
}

impl StateDir {
    /// Makes it if it is missing, checks it, and keeps other control processes out.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn open(path: &Path) -> Result<Self, StateError> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io(path))?;
        check_private(path)?;
        let lock_path = path.join("lock");
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let lock = openat(rustix::fs::CWD, &lock_path, flags, Mode::from_raw_mode(0o600))
            .map_err(|e| io(&lock_path)(e.into()))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => StateError::InUse { path: lock_path.clone() },
            other => io(&lock_path)(other.into()),
        })?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The lock of the dataplane that lives, if one does. It takes the lock before it first registers, and the kernel
    /// frees it at its death.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn living_dataplane(&self) -> Result<Option<DataplaneLock>, StateError> {
        let path = self.file("dataplane.lock");
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let lock = openat(rustix::fs::CWD, &path, flags, Mode::from_raw_mode(0o600))
            .map_err(|e| io(&path)(e.into()))?;
        match flock(&lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(None),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(Some(DataplaneLock(lock))),
            Err(error) => Err(io(&path)(error.into())),
        }
    }

    /// The keys that seal resume keys, made at the first start.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn keyring(&self) -> Result<Keyring, StateError> {
        let cluster = ClusterId(self.secret("cluster")?);
        let mut kek = self.secret::<32>("kek")?;
        let key = Secret::new(kek);
        zeroize::Zeroize::zeroize(&mut kek);
        Ok(Keyring::new(cluster, 1, &key))
    }

    /// When dataplane last changed any file, nanoseconds since 1970: an upper bound. 0 if it is not known.
    pub fn last_write_ns(&self) -> u64 {
        let bytes = std::fs::read(self.file("last-write")).unwrap_or_default();
        bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// Reads a small text of the server's own; `None` if it is not there.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn read(&self, name: &str) -> Result<Option<String>, StateError> {
        let path = self.file(name);
        let mut text = String::new();
        match std::fs::File::open(&path) {
            Ok(file) => {
                check_private(&path)?;
                file.take(TEXT_BYTES_MAX).read_to_string(&mut text).map_err(io(&path))?;
                Ok(Some(text))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io(&path)(error)),
        }
    }

    /// Writes a file durably and in one step: written aside, flushed, and only then given its name.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let (path, aside) = (self.file(name), self.file(&format!("{name}.new")));
        let _ = std::fs::remove_file(&aside);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(rustix::fs::CWD, &aside, flags, Mode::from_raw_mode(0o600));
        let mut file = std::fs::File::from(file.map_err(|e| io(&aside)(e.into()))?);
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io(&aside))?;
        std::fs::rename(&aside, &path).map_err(io(&path))?;
        std::fs::File::open(&self.path).and_then(|dir| dir.sync_all()).map_err(io(&self.path))
    }

    /// Reads a secret, or makes it.
    fn secret<const N: usize>(&self, name: &str) -> Result<[u8; N], StateError> {
        let path = self.file(name);
        let mut secret = [0; N];
        match std::fs::File::open(&path) {
            Ok(mut file) => {
                check_private(&path)?;
                let length = file.metadata().map_err(io(&path))?.len();
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                if length != N {
                    return Err(StateError::Length { path, got: length, wanted: N });
                }
                file.read_exact(&mut secret).map_err(io(&path))?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let failed = |_| io(&path)(std::io::Error::other("the random number generator failed"));
                aws_lc_rs::rand::fill(&mut secret).map_err(failed)?;
                self.write(name, &secret)?;
            }
            Err(error) => return Err(io(&path)(error)),
        }
        Ok(secret)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_once_and_then_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let first = StateDir::open(&path).unwrap().secret::<32>("kek").unwrap();
        assert_eq!(StateDir::open(&path).unwrap().secret::<32>("kek").unwrap(), first);
        assert_ne!(first, [0; 32]);
        assert_eq!(std::fs::metadata(path.join("kek")).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn wide_permissions_short_secrets_and_second_processes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let state = StateDir::open(&path).unwrap();
        assert!(matches!(StateDir::open(&path), Err(StateError::InUse { .. })));
        state.keyring().unwrap();
        let kek = path.join("kek");
        std::fs::set_permissions(&kek, PermissionsExt::from_mode(0o640)).unwrap();
        assert!(matches!(state.keyring(), Err(StateError::Permissions { mode: 0o640, .. })));
        std::fs::set_permissions(&kek, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::write(&kek, b"short").unwrap();
        assert!(matches!(state.keyring(), Err(StateError::Length { got: 5, .. })));
        drop(state);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        assert!(matches!(StateDir::open(&path), Err(StateError::Permissions { .. })));
    }
}
