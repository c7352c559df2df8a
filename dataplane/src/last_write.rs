//! When this data plane last changed any file: a number that outlives the process.
//!
//! ```text
//!   write returned ──► clock ──► binding's own time (told to control in `Held`)
//!                        └─────► the file `last-write` beside the link socket ──► control, when both planes have died
//!                                        │
//!                                        └ before the client is told that its write is done
//! ```
//!
//! Control compares it with a file's time of change: what was changed later was changed by somebody else. The clock is
//! the precise one, read after the write: the kernel stamps files from a coarser one, which is never ahead.

use holdfast_verbs::memory::MappedWord;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

const FILE: &str = "last-write";

/// The file beside the link socket: 8 bytes, little endian, nanoseconds since 1970; 0 if nothing was ever written.
pub fn last_write_path(link: &Path) -> PathBuf {
    link.with_file_name(FILE)
}

/// Of one data plane. Until [`LastWrite::keep_in`] it is kept nowhere.
#[derive(Debug, Default)]
pub struct LastWrite(OnceLock<MappedWord>);

impl LastWrite {
    /// From now on the file has it. A number in it that lies ahead, from before the clock was set back, becomes the time now:
    /// it would explain too much. No other data plane may be alive.
    ///
    /// # Errors
    /// The kernel's, when the file can't be made or mapped.
    pub fn keep_in(&self, path: &Path) -> io::Result<()> {
        if self.0.get().is_some() {
            return Ok(());
        }
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let word = MappedWord::map(&file)?;
        let now = wall_clock_ns();
        if word.read() > now {
            word.set(now);
        }
        let _ = self.0.set(word);
        Ok(())
    }

    /// A write has returned. The time, for its binding. No lock, no allocation, no system call.
    pub(crate) fn written(&self) -> u64 {
        let now = wall_clock_ns();
        if let Some(word) = self.0.get() {
            word.raise(now);
        }
        now
    }
}

/// Nanoseconds since 1970.
fn wall_clock_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |t| u64::try_from(t.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(path: &Path) -> u64 {
        u64::from_le_bytes(std::fs::read(path).unwrap().try_into().unwrap())
    }

    #[test]
    fn the_file_is_never_behind_a_write_and_outlives_the_process() {
        let directory = tempfile::tempdir().unwrap();
        let path = last_write_path(&directory.path().join("link.sock"));
        let last = LastWrite::default();
        let before = last.written();
        last.keep_in(&path).unwrap();
        assert_eq!(content(&path), 0);
        let written = last.written();
        assert!(written >= before && content(&path) == written);
        drop(last);
        let next = LastWrite::default();
        next.keep_in(&path).unwrap();
        assert_eq!(content(&path), written, "kept until something is written");
    }

    #[test]
    fn a_time_ahead_of_the_clock_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("last-write");
        std::fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        let last = LastWrite::default();
        last.keep_in(&path).unwrap();
        assert!(content(&path) <= wall_clock_ns());
    }
}
