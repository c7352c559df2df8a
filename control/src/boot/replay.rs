//! The journal's records, applied one after another: read and decoded on one thread, applied on another, because a journal of
//! a million opens keeps both of them busy.
//!
//! ```text
//!   file ─► frames ─► records ──batches──► state::Recovery
//!   └──── a thread ────────┘                └─ the caller ─┘
//! ```
//!
//! Where a record that cannot be applied stands, only the reader knows, who is ahead by then: the journal is then read once
//! more in step, for the error's words.

use super::Progress;
use crate::journal::{self, FileDisk, OpenError, Settings};
use holdfast_shared::journal::record::Record;
use holdfast_shared::journal::{PAYLOAD_BYTES_MAX, Recovered, Recovery as Read};
use holdfast_shared::state::Recovery;
use holdfast_shared::types::ClusterId;
use holdfast_shared::wire::from_cbor;
use std::path::Path;
use std::sync::mpsc::sync_channel;

/// Records that are handed over at once.
const BATCH: usize = 256;
/// Batches that may wait.
const BATCHES: usize = 16;

fn decoded(recovered: &Recovered<'_>) -> Result<(Record, bool), String> {
    let record = from_cbor(recovered.payload, PAYLOAD_BYTES_MAX).map_err(|error| error.to_string())?;
    Ok((record, recovered.in_checkpoint))
}

/// Reads ahead of what is applied. `None` if a record cannot follow those before it: [`in_step`] says which.
///
/// # Errors
/// See [`journal::recover`].
pub(super) fn read_ahead(
    directory: &Path,
    cluster: ClusterId,
    settings: &Settings,
    recovery: &mut Recovery,
) -> Option<Result<Read<FileDisk>, OpenError>> {
    let (sender, batches) = sync_channel::<Vec<(Record, bool)>>(BATCHES);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut batch = Vec::with_capacity(BATCH);
            let mut visit = |recovered: Recovered<'_>| {
                batch.push(decoded(&recovered)?);
                if batch.len() == BATCH {
                    let full = std::mem::replace(&mut batch, Vec::with_capacity(BATCH));
                    return sender.send(full).map_err(|_| "an earlier record cannot be applied".to_owned());
                }
                Ok(())
            };
            let read = journal::recover(directory, cluster, settings, &mut visit);
            // Nobody takes the rest if an earlier record could not be applied.
            let _ = sender.send(batch);
            read
        });
        let mut progress = Progress::new();
        let applied = batches.into_iter().flatten().try_for_each(|(record, in_checkpoint)| {
            progress.step("records of the journal read");
            recovery.apply(record, in_checkpoint)
        });
        let read = reader.join().ok()?;
        applied.is_ok().then_some(read)
    })
}

/// Applies each record before the next one is read.
///
/// # Errors
/// See [`journal::recover`].
pub(super) fn in_step(
    directory: &Path,
    cluster: ClusterId,
    settings: &Settings,
    recovery: &mut Recovery,
) -> Result<Read<FileDisk>, OpenError> {
    let mut progress = Progress::new();
    journal::recover(directory, cluster, settings, &mut |recovered| {
        progress.step("records of the journal read");
        let (record, in_checkpoint) = decoded(&recovered)?;
        recovery.apply(record, in_checkpoint).map_err(|error| error.to_string())
    })
}
