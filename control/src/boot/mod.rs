//! The start: from the state directory to an authority that knows every open of before, while nobody is let in yet.
//!
//! ```text
//!   generation ─► journal ─► state::Recovery ─► Authority + files to reopen        (replay)
//!                                                   │
//!   dataplane of before, if it lives: registers with its descriptors ──┐
//!   descriptors that the supervisor kept ──────────────────────────────┤
//!   the rest: by handle, or path, on a few threads ────────────────────┴─► Recovered ─► Driver ─► accept
//! ```
//!
//! No file that is missing or unreadable ends the start: its open is lost, and its client is told so. A journal that is damaged, lost
//! or older than it was does end it, because clients rely on what is no longer known.

mod dataplane;
mod guard;
mod reopen;
mod replay;

pub use dataplane::{Registered, living};
pub use reopen::{Found, Sources, reopen};

use crate::config::Config;
use crate::driver::wall_ms;
use crate::gauges::Gauges;
use crate::generation::{self, Known};
use crate::journal::{self, Journal, JournalEvent, Kind, OpenError};
use crate::secrets::StateDir;
use crate::volume::Volume;
use anyhow::Context;
use holdfast_shared::journal::RecoverError;
use holdfast_shared::journal::record::{Record, Started};
use holdfast_shared::state::{Authority, Recovery, Reopen, VolumeRules};
use holdfast_shared::types::{ClusterId, VolumeId};
use holdfast_shared::wire::to_cbor;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// How often a start that takes long says how far it is.
const PROGRESS: Duration = Duration::from_secs(5);

/// What the start works with.
pub struct Plan {
    /// The config.
    pub config: Config,
    /// Held as long as the server runs.
    pub state: StateDir,
    /// The volumes.
    pub volumes: HashMap<VolumeId, Arc<Volume>>,
    /// Their rules.
    pub rules: Vec<VolumeRules>,
    /// Counters.
    pub gauges: Arc<Gauges>,
    /// The operator accepts that a journal is lost.
    pub accept_journal_loss: bool,
    /// The operator accepts that volumes are lost of which opens are recorded.
    pub accept_lost_volumes: bool,
}

/// What the journal said, and the journal, ready for more.
pub struct Journalled {
    /// With every recorded open in it; their files are not open yet.
    pub authority: Authority,
    /// These.
    pub reopens: Vec<Reopen>,
    /// Counts the starts.
    pub generation: u64,
    /// The journal, and the number of its last record.
    pub journal: (Journal, u64),
    /// What it has told already, beside what this start waited for.
    pub early: Vec<JournalEvent>,
    /// What it tells.
    pub events: UnboundedReceiver<JournalEvent>,
}

impl Plan {
    fn named(&self) -> impl Iterator<Item = (&str, &Volume)> {
        let volume = |rule: &VolumeRules| self.volumes.get(&rule.id).map(Arc::as_ref);
        self.rules.iter().filter_map(move |rule| Some((rule.name.as_str(), volume(rule)?)))
    }

    /// Reads the journal and begins this start's part of it. Blocks.
    ///
    /// # Errors
    /// If the journal can't be relied on, or not be written; in words for the operator.
    pub fn read_journal(&self) -> anyhow::Result<Journalled> {
        let directory = self.config.journal_directory();
        let settings = self.config.journal.settings();
        let cluster = self.state.keyring()?.cluster();
        let known = Known::read(&self.state, cluster, self.named())?;
        let (mut generation, mut anew, mut ahead) = (known.next(0), false, true);
        loop {
            let mut recovery = Recovery::new(
                self.config.limits.authority(),
                self.rules.clone(),
                self.state.keyring()?,
                generation,
            );
            let read = if ahead {
                let Some(read) = replay::read_ahead(&directory, cluster, &settings, &mut recovery) else {
                    ahead = false;
                    continue;
                };
                read
            } else {
                replay::in_step(&directory, cluster, &settings, &mut recovery)
            };
            let read = match read {
                Err(OpenError::Journal { source: source @ RecoverError::Corrupt { .. }, .. })
                    if self.accept_journal_loss =>
                {
                    tracing::warn!("{source}");
                    anew = true;
                    set_aside(&directory)?;
                    continue;
                }
                // Its words hold those of its cause already.
                read => read.map_err(|error| anyhow::anyhow!("{error}"))?,
            };
            let summary = read.summary().clone();
            if !anew && let Err(behind) = known.check(summary.generation, &directory) {
                if !self.accept_journal_loss {
                    return Err(behind.into());
                }
                tracing::warn!("{behind}");
                anew = true;
                set_aside(&directory)?;
                continue;
            }
            if summary.generation >= generation {
                // Nothing else knew of the journal's latest start. What was read so far was read under a number that is used.
                generation = known.next(summary.generation);
                continue;
            }
            if self.accept_journal_loss && !anew {
                tracing::info!("--accept-journal-loss was not needed: the journal is whole");
            }
            let started = summary.last_sequence.saturating_add(1);
            let (mut authority, reopens) = recovery.finish(started);
            // Before anything is written: a root that is not the volume must not bear this start.
            self.guard(&reopens, summary.generation, cluster)?;
            known.claim(&self.state, generation)?;
            let (teller, mut events) = unbounded_channel();
            let journal = journal::start(read, generation, &settings, teller)?;
            let record = to_cbor(&Record::Started(Started { generation, wall_ms: wall_ms() }));
            journal.append(started, record, Kind::Releasing).context("the journal")?;
            let early = durable(&mut events, started)?;
            generation::confirm(&self.state, cluster, generation, self.named())?;
            self.gauges.journal_bytes.store(summary.bytes, Relaxed);
            self.gauges.journal_segments.store(summary.segments as u64 + 1, Relaxed);
            authority.set_last_write(self.state.last_write_ns());
            tracing::info!(
                generation,
                records = summary.records,
                opens = reopens.len(),
                "the journal is read"
            );
            return Ok(Journalled {
                authority,
                reopens,
                generation,
                journal: (journal, started),
                early,
                events,
            });
        }
    }
}

impl Plan {
    /// Ends the start if volumes are missing of which opens are recorded.
    fn guard(&self, reopens: &[Reopen], journal: u64, cluster: ClusterId) -> anyhow::Result<()> {
        let missing = guard::missing(reopens, journal, |id| {
            let name = &self.rules.iter().find(|rule| rule.id == id)?.name;
            let volume = self.volumes.get(&id)?;
            Some(guard::Candidate { name, volume, mark: generation::on_root(volume, cluster) })
        });
        if missing.is_empty() {
            return Ok(());
        }
        let missing = missing.join("; ");
        if self.accept_lost_volumes {
            tracing::warn!("{missing}");
            return Ok(());
        }
        anyhow::bail!(
            "{missing}. Or start holdfast-control once, by hand, with --accept-lost-volumes: what is not found is then lost \
             for good, and its clients are told so"
        )
    }
}

/// Waits until a record is durable. Gives back what else was told meanwhile.
fn durable(events: &mut UnboundedReceiver<JournalEvent>, sequence: u64) -> anyhow::Result<Vec<JournalEvent>> {
    let mut others = Vec::new();
    loop {
        match events.blocking_recv() {
            Some(JournalEvent::Persisted(through)) if through >= sequence => return Ok(others),
            Some(JournalEvent::Failed(words)) => anyhow::bail!("the journal: {words}"),
            Some(full @ JournalEvent::Room(false)) => {
                tracing::error!(
                    "the journal's disk is full: if not even this start's record fits, it waits for room"
                );
                others.push(full);
            }
            Some(other) => others.push(other),
            None => anyhow::bail!("the journal has ended"),
        }
    }
}

/// Moves a journal away that is not to be relied on; nothing is removed.
fn set_aside(directory: &Path) -> anyhow::Result<()> {
    let Some(name) = directory.file_name() else { anyhow::bail!("{} has no name", directory.display()) };
    let aside = directory.with_file_name(format!("{}.lost-{}", name.to_string_lossy(), wall_ms()));
    match std::fs::rename(directory, &aside) {
        Ok(()) => {
            tracing::warn!(
                "the old journal is set aside as {}; a new one begins, and older resume keys are dead",
                aside.display()
            );
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot set {} aside", directory.display())),
    }
}

/// Says now and then how far something is.
struct Progress {
    said: Instant,
    done: u64,
}

impl Progress {
    fn new() -> Self {
        Self { said: Instant::now(), done: 0 }
    }

    fn step(&mut self, what: &str) {
        self.done += 1;
        if self.done % 4096 == 0 && self.said.elapsed() >= PROGRESS {
            self.said = Instant::now();
            tracing::info!("recovering: {} {what}", self.done);
        }
    }
}
