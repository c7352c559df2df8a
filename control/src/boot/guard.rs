//! Whether the volumes are there of which the journal holds opens: one that is not mounted looks like one whose files are
//! all gone, and clients would be told so.
//!
//! ```text
//!   not configured any more ─────────────────────────────────────────────► missing
//!   the root bears this journal's start ─────────────────────────────────► there
//!   else: one of the recorded files is found ────────────────────────────► there
//!         none; the root could bear it, or is on another device than they ► missing
//!         none; its file system has no extended attributes ──────────────► there, with a warning
//! ```

use crate::generation::Mark;
use crate::volume::Volume;
use holdfast_shared::state::Reopen;
use holdfast_shared::types::VolumeId;
use std::collections::BTreeMap;

/// Recorded files that are looked for in a volume that nothing else speaks for.
const LOOKS_MAX: usize = 64;

/// A configured volume.
pub(super) struct Candidate<'v> {
    /// Its name.
    pub(super) name: &'v str,
    /// Its directory.
    pub(super) volume: &'v Volume,
    /// What its root bears.
    pub(super) mark: Mark,
}

/// What is wrong, in words for the operator, a line for each volume that seems to be missing. `journal` is the last start
/// that the journal tells of. Blocks.
pub(super) fn missing<'v>(
    reopens: &[Reopen],
    journal: u64,
    candidate: impl Fn(VolumeId) -> Option<Candidate<'v>>,
) -> Vec<String> {
    let mut by_volume: BTreeMap<VolumeId, Vec<&Reopen>> = BTreeMap::new();
    for reopen in reopens {
        by_volume.entry(reopen.at.volume).or_default().push(reopen);
    }
    let mut words = Vec::new();
    for (id, opens) in by_volume {
        let (count, path) = (opens.len(), opens.first().map_or("", |open| open.at.path.as_str()));
        match candidate(id) {
            None => words.push(format!(
                "no volume with the id {id} is configured any more, and {count} opens of it are recorded \
                 (one of {path:?}): configure it again"
            )),
            Some(candidate) if is_there(&candidate, journal, &opens) => {}
            Some(Candidate { name, .. }) => words.push(format!(
                "volume {name:?} does not seem to be mounted: {count} opens of it are recorded, and its directory is \
                 not the one that was served (one of them is of {path:?}): mount it"
            )),
        }
    }
    words
}

fn is_there(candidate: &Candidate<'_>, journal: u64, opens: &[&Reopen]) -> bool {
    let Candidate { name, volume, mark } = candidate;
    if matches!(mark, Mark::Start(start) if *start >= journal) {
        return true;
    }
    if opens.iter().take(LOOKS_MAX).any(|open| volume.look(open).is_ok()) {
        return true;
    }
    let elsewhere = volume.device().is_some_and(|own| opens.iter().all(|open| open.identity.device != own));
    if *mark != Mark::Impossible || elsewhere {
        return false;
    }
    tracing::warn!(
        volume = name,
        "none of its recorded files is found, and its file system has no extended attributes to tell whether it is \
         the one that was served"
    );
    true
}
