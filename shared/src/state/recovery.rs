//! From the journal's records to an authority.

use super::rules::VolumeRules;
use super::{Authority, Limits, Reopen};
use crate::auth::Keyring;
use crate::journal::record::{Record, Started};

/// Records that cannot follow one another: the journal is not ours, or not whole.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the journal's {record} cannot be: {reason}")]
pub struct RecoveryError {
    /// Which record, in words.
    pub record: String,
    /// Why.
    pub reason: String,
}

/// Takes the journal's records in their order.
#[derive(Debug)]
pub struct Recovery {
    authority: Authority,
    started: Option<Started>,
}

impl Recovery {
    /// Before the first record. `generation` counts this start of control, and is higher than any before.
    pub fn new(limits: Limits, volumes: Vec<VolumeRules>, keyring: Keyring, generation: u64) -> Self {
        let _ = generation;
        Self { authority: Authority::new(limits, volumes, keyring), started: None }
    }

    /// Takes one record. `inside_checkpoint` is true for all records of a file that begins with a checkpoint, up to the
    /// checkpoint's end.
    ///
    /// # Errors
    /// [`RecoveryError`] if it cannot follow those before.
    pub fn apply(&mut self, record: Record, inside_checkpoint: bool) -> Result<(), RecoveryError> {
        let _ = inside_checkpoint;
        if let Record::Started(started) = record {
            self.started = Some(started);
        }
        Ok(())
    }

    /// The latest start that the journal tells of.
    pub fn started(&self) -> Option<Started> {
        self.started
    }

    /// The authority, and the files that are to be opened again, each to be answered with
    /// [`Input::Reopened`](super::Input::Reopened) before anything else. `last_sequence` is the highest number of a record in the
    /// journal (0 if there is none): the authority numbers on from there.
    pub fn finish(self, last_sequence: u64) -> (Authority, Vec<Reopen>) {
        let _ = last_sequence;
        (self.authority, Vec::new())
    }
}
