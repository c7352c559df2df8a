//! Generations: which start of the server this is, and whether the journal at hand is the newest one.
//!
//! The journal says which start it is from. Two copies of that number lie elsewhere, so that a journal which was lost, or
//! replaced by an older copy, is noticed:
//!
//! | where | what | written |
//! |---|---|---|
//! | `generation` in the state directory | the number claimed last, and the number that the journal reached | before the journal is begun; after |
//! | `user.holdfast.generation` on each volume's root | cluster, and the number that the journal reached | after |
//!
//! ```text
//!   claim n ──► journal begins n, durable ──► confirm n: file, roots
//! ```
//!
//! So the journal is never behind what is confirmed, unless it is not the one that was written. File systems
//! without extended attributes only have the file.

use crate::secrets::{StateDir, StateError};
use crate::volume::Volume;
use holdfast_shared::types::ClusterId;
use rustix::fs::XattrFlags;
use std::path::PathBuf;

const FILE: &str = "generation";
const ATTRIBUTE: &str = "user.holdfast.generation";

/// Why a server must not start.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The file cannot be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The file says something else than two numbers.
    #[error("{path} does not hold two numbers; remove it if the journal is known to be the newest one")]
    Form {
        /// The file.
        path: PathBuf,
    },
    /// The journal is older than something that was written after it, or not there at all.
    #[error(
        "the journal in {journal} {found}, but {witness} knows start {known}. Opens, locks and resume keys of since then \
         are not in it, and somebody may still rely on them. Put the newest journal back; or start \
         holdfast-control once, by hand, with --accept-journal-loss, which begins a new one: every older resume key is then BadKey, and nobody is told \
         which files had been kept for whom"
    )]
    Behind {
        /// The journal's directory.
        journal: PathBuf,
        /// What it holds.
        found: String,
        /// Who knows better.
        witness: String,
        /// The start it knows.
        known: u64,
    },
}

/// What is known of earlier starts, beside the journal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The highest number that was ever claimed.
    claimed: u64,
    /// The highest number that a journal reached, and who says so.
    confirmed: Option<(u64, String)>,
}

impl Known {
    /// Asks the state directory and the volumes.
    ///
    /// # Errors
    /// [`GenerationError::State`], [`GenerationError::Form`].
    pub fn read<'v>(
        state: &StateDir,
        cluster: ClusterId,
        volumes: impl Iterator<Item = (&'v str, &'v Volume)>,
    ) -> Result<Self, GenerationError> {
        let path = state.file(FILE);
        let mut known = Self::default();
        if let Some(text) = state.read(FILE)? {
            let mut numbers = text.split_ascii_whitespace().map(str::parse::<u64>);
            match (numbers.next(), numbers.next(), numbers.next()) {
                (Some(Ok(claimed)), Some(Ok(reached)), None) => {
                    known.claimed = claimed;
                    known.saw(reached, || path.display().to_string());
                }
                _ => return Err(GenerationError::Form { path }),
            }
        }
        for (name, volume) in volumes {
            if let Mark::Start(reached) = on_root(volume, cluster) {
                known.saw(reached, || format!("volume {name:?}"));
            }
        }
        Ok(known)
    }

    fn saw(&mut self, reached: u64, witness: impl FnOnce() -> String) {
        self.claimed = self.claimed.max(reached);
        if reached > self.confirmed.as_ref().map_or(0, |(known, _)| *known) {
            self.confirmed = Some((reached, witness()));
        }
    }

    /// The number for this start, above all that is known and above `journal`, the journal's last.
    pub fn next(&self, journal: u64) -> u64 {
        self.claimed.max(journal).saturating_add(1)
    }

    /// True if `journal`, the journal's last number (0 if there is none), is not behind anything.
    ///
    /// # Errors
    /// [`GenerationError::Behind`].
    pub fn check(&self, journal: u64, directory: &std::path::Path) -> Result<(), GenerationError> {
        match &self.confirmed {
            Some((known, witness)) if *known > journal => Err(GenerationError::Behind {
                journal: directory.to_owned(),
                found: if journal == 0 { "is missing".into() } else { format!("ends with start {journal}") },
                witness: witness.clone(),
                known: *known,
            }),
            _ => Ok(()),
        }
    }

    /// Claims a number, durably, before anything is written under it.
    ///
    /// # Errors
    /// [`GenerationError::State`].
    pub fn claim(&self, state: &StateDir, generation: u64) -> Result<(), GenerationError> {
        let reached = self.confirmed.as_ref().map_or(0, |(known, _)| *known);
        Ok(state.write(FILE, format!("{generation} {reached}\n").as_bytes())?)
    }
}

/// Confirms that the journal has durably reached a number.
///
/// # Errors
/// [`GenerationError::State`].
pub fn confirm<'v>(
    state: &StateDir,
    cluster: ClusterId,
    generation: u64,
    volumes: impl Iterator<Item = (&'v str, &'v Volume)>,
) -> Result<(), GenerationError> {
    let value = format!("{cluster} {generation}");
    for (name, volume) in volumes {
        let Some(root) = volume.readable_root() else { continue };
        if let Err(error) = rustix::fs::fsetxattr(root, ATTRIBUTE, value.as_bytes(), XattrFlags::empty()) {
            tracing::debug!(volume = name, %error, "no generation on the root; the state directory has it");
        }
    }
    Ok(state.write(FILE, format!("{generation} {generation}\n").as_bytes())?)
}

/// What a volume's root bears.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mark {
    /// This start of this cluster.
    Start(u64),
    /// Nothing of this cluster.
    None,
    /// It cannot bear anything, or not to our knowledge.
    Impossible,
}

/// What a volume's root says of this cluster.
pub fn on_root(volume: &Volume, cluster: ClusterId) -> Mark {
    let Some(root) = volume.readable_root() else { return Mark::Impossible };
    let mut value = [0; 64];
    let length = match rustix::fs::fgetxattr(root, ATTRIBUTE, &mut value) {
        Ok(length) => length,
        Err(rustix::io::Errno::NODATA) => return Mark::None,
        Err(_) => return Mark::Impossible,
    };
    let text = value.get(..length).and_then(|value| std::str::from_utf8(value).ok());
    let start = text
        .and_then(|text| text.split_once(' '))
        .and_then(|(whose, start)| (whose == cluster.to_string()).then(|| start.parse().ok()).flatten());
    start.map_or(Mark::None, Mark::Start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const CLUSTER: ClusterId = ClusterId([7; 16]);

    #[test]
    fn crs_08_a_journal_behind_any_witness_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("state")).unwrap();
        let read = |state: &StateDir| Known::read(state, CLUSTER, std::iter::empty()).unwrap();
        let first = read(&state);
        assert_eq!((first.next(0), first.check(0, Path::new("j")).is_ok()), (1, true));
        first.claim(&state, 1).unwrap();
        // Claimed and never reached: the next start takes another number, and misses no journal.
        let second = read(&state);
        assert_eq!((second.next(0), second.check(0, Path::new("j")).is_ok()), (2, true));
        second.claim(&state, 2).unwrap();
        confirm(&state, CLUSTER, 2, std::iter::empty()).unwrap();
        let third = read(&state);
        assert_eq!(third.next(2), 3);
        assert!(third.check(2, Path::new("j")).is_ok());
        for (journal, words) in [(0, "is missing"), (1, "ends with start 1")] {
            let error = third.check(journal, Path::new("j")).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("--accept-journal-loss"), "{error}");
        }
        assert_eq!(third.next(9), 10, "the journal knows of more starts than the file");
        std::fs::write(state.file(FILE), "rubbish").unwrap();
        assert!(matches!(
            Known::read(&state, CLUSTER, std::iter::empty()),
            Err(GenerationError::Form { .. })
        ));
    }

    #[test]
    fn crs_08_a_volume_witnesses_for_its_own_cluster_only() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("state")).unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        let volume = Volume::open(&dir.path().join("data")).unwrap();
        let volumes = || [("data", &volume)].into_iter();
        confirm(&state, CLUSTER, 5, volumes()).unwrap();
        std::fs::remove_file(state.file(FILE)).unwrap();
        let root = volume.readable_root().unwrap();
        if rustix::fs::fgetxattr(root, ATTRIBUTE, &mut [0; 64]).is_err() {
            println!("the file system of {} has no extended attributes", dir.path().display());
            return;
        }
        let known = Known::read(&state, CLUSTER, volumes()).unwrap();
        let error = known.check(4, Path::new("j")).unwrap_err().to_string();
        assert!(error.contains("volume \"data\" knows start 5"), "{error}");
        let other = Known::read(&state, ClusterId([8; 16]), volumes()).unwrap();
        assert_eq!(other, Known::default());
    }
}
