//! When this data plane last changed any file: a number that outlives the process.
//!
//! ```text
//!   write begins ───► clock + AHEAD ──► the file `last-write` beside the link socket ──► control, when both planes have died
//!   write returned ─► clock ──┬──────►  the same (unless another write is under way), before its client is told
//!                             └──► binding's own time (told to control in `Held`)
//! ```
//!
//! Control compares it with a file's time of change: what was changed later was changed by somebody else. The clock is
//! the precise one, read after the write: the kernel stamps files from a coarser one, which is never ahead. A process that is
//! killed within a write leaves a time ahead of it, so that its own last write is never taken for somebody else's.
//!
//! A worker takes the writes of one turn of a channel for one, so that the clock is asked twice for all of them: where it can't be read
//! from memory (some virtual machines) each time is a system call, and three for each write were more than all others of it together.

use holdfast_verbs::memory::MappedWord;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

const FILE: &str = "last-write";

/// The file beside the link socket: 8 bytes, little endian, nanoseconds since 1970; 0 if nothing was ever written.
pub fn last_write_path(link: &Path) -> PathBuf {
    link.with_file_name(FILE)
}

/// How long after its begin a write, or a turn of them, may still change a file's times. What somebody else does within it, after a write that
/// did not return because both planes died, is not told from that write.
const AHEAD_NS: u64 = 100_000_000;
/// The same for a write past the page cache, which may wait for others at the disk before it stamps the file.
const AHEAD_DIRECT_NS: u64 = 2_000_000_000;

/// Of one data plane. Until [`LastWrite::keep_in`] it is kept nowhere.
#[derive(Debug, Default)]
pub struct LastWrite {
    word: OnceLock<MappedWord>,
    under_way: AtomicU64,
    /// The latest time at which one has returned.
    latest: AtomicU64,
}

/// A write that is about to be made, or several in a row: to be given back to [`LastWrite::returned`].
#[derive(Debug)]
#[must_use]
pub(crate) struct Writing(());

impl LastWrite {
    /// From now on the file has it. A number in it that lies ahead, from before the clock was set back, becomes the time now:
    /// it would explain too much. No other data plane may be alive.
    ///
    /// # Errors
    /// The kernel's, when the file can't be made or mapped.
    pub fn keep_in(&self, path: &Path) -> io::Result<()> {
        if self.word.get().is_some() {
            return Ok(());
        }
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let word = MappedWord::map(&file)?;
        let now = wall_clock_ns();
        if word.read() > now {
            word.set(now);
        }
        let _ = self.word.set(word);
        Ok(())
    }

    /// A write is about to be made: to be called before it, and [`LastWrite::returned`] after it.
    pub(crate) fn begin(&self) -> Writing {
        self.begin_ahead(AHEAD_NS)
    }

    /// As [`LastWrite::begin`], past the page cache.
    pub(crate) fn begin_direct(&self) -> Writing {
        self.begin_ahead(AHEAD_DIRECT_NS)
    }

    /// It has returned, and so have all that went with it. The time, for their bindings. No lock, no allocation.
    pub(crate) fn returned(&self, writing: Writing) -> u64 {
        let Writing(()) = writing;
        let now = wall_clock_ns();
        self.latest.fetch_max(now, Ordering::AcqRel);
        self.under_way.fetch_sub(1, Ordering::AcqRel);
        let Some(word) = self.word.get() else { return now };
        // The time ahead goes when no write is under way that it is for. One that begins meanwhile has raised it again, and then
        // this one's word is not taken.
        loop {
            let ahead = word.read();
            if self.under_way.load(Ordering::Acquire) != 0 {
                word.raise(now);
                return now;
            }
            // Others may have returned after this one's time; or the clock was set back.
            let time = if self.latest.load(Ordering::Acquire) > now {
                let time = wall_clock_ns();
                // Before it is in the word: who finds it there and has an earlier one must not put that in its place.
                self.latest.fetch_max(time, Ordering::AcqRel);
                time
            } else {
                now
            };
            if word.replace(ahead, time) {
                return time;
            }
        }
    }

    fn begin_ahead(&self, ns: u64) -> Writing {
        self.under_way.fetch_add(1, Ordering::AcqRel);
        if let Some(word) = self.word.get() {
            word.raise_anew(wall_clock_ns().saturating_add(ns));
        }
        Writing(())
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
        let before = last.returned(last.begin());
        last.keep_in(&path).unwrap();
        assert_eq!(content(&path), 0);
        let (first, second) = (last.begin(), last.begin());
        let ahead = content(&path);
        assert!(ahead > wall_clock_ns(), "what is under way is covered: a kill within it leaves this");
        last.returned(first);
        assert!(content(&path) >= ahead, "and stays so while another is");
        let written = last.returned(second);
        assert!(written >= before && content(&path) == written);
        drop(last);
        let next = LastWrite::default();
        next.keep_in(&path).unwrap();
        assert_eq!(content(&path), written, "kept until something is written");
    }

    #[test]
    fn no_write_takes_back_the_time_of_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = last_write_path(&directory.path().join("link.sock"));
        let last = LastWrite::default();
        last.keep_in(&path).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let written = last.returned(last.begin());
                        // A moment for another to do its worst, of another length each time.
                        (0..written % 64).for_each(|_| std::hint::spin_loop());
                        let kept = last.word.get().unwrap().read();
                        assert!(kept >= written, "{} ns behind a write that has returned", written - kept);
                    }
                });
            }
        });
        assert!(content(&path) <= wall_clock_ns(), "and nothing is ahead when all have");
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
