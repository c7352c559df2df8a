//! Recorded files, opened again: on a few threads, and never more descriptors than there may be.

use super::PROGRESS;
use crate::driver::{HeldFile, OpenFile};
use crate::gauges::Gauges;
use crate::notify::Store;
use crate::volume::{Unopened, Volume, inspect, opened_for};
use holdfast_shared::state::{FileId, FileIdentity, Inspected, Reopen};
use holdfast_shared::types::{Access, OpenId, VolumeId};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

/// Threads that look for files.
const THREADS: usize = 4;

/// Opens that a thread takes at once.
const BATCH: usize = 256;

/// Where files come from.
pub struct Sources<'b> {
    /// The volumes.
    pub volumes: &'b HashMap<VolumeId, Arc<Volume>>,
    /// From the dataplane that lives.
    pub held: HashMap<OpenId, OwnedFd>,
    /// From the supervisor, with the names under which it keeps them.
    pub inherited: Vec<(String, OwnedFd)>,
    /// The supervisor.
    pub store: Option<&'b Store>,
    /// Descriptors that there may be.
    pub descriptors_max: usize,
    /// Counters.
    pub gauges: &'b Arc<Gauges>,
}

/// What became of the recorded files.
#[derive(Default)]
pub struct Found {
    /// How each looks, or why it is lost.
    pub reopened: Vec<(OpenId, Result<Inspected, String>)>,
    /// Those that are there.
    pub files: HashMap<FileId, HeldFile>,
}

/// A file that was looked at a moment ago.
struct Seen {
    of: Reopen,
    inspected: Inspected,
}

impl Seen {
    /// True if the search for another open's file could not but end at the same one.
    fn is_of(&self, other: &Reopen) -> bool {
        let Reopen { at, identity, file_handle, .. } = &self.of;
        *at == other.at && *identity == other.identity && *file_handle == other.file_handle
    }
}

/// A descriptor's file and access mode.
type Kind = (FileIdentity, Access);

/// Finds all recorded files. Blocks.
///
/// # Errors
/// If the process has no descriptor left even to look at files.
pub fn reopen(mut reopens: Vec<Reopen>, mut sources: Sources<'_>) -> anyhow::Result<Found> {
    let (begin, total) = (Instant::now(), reopens.len());
    let inherited = std::mem::take(&mut sources.inherited);
    let search = Search {
        held: Mutex::new(std::mem::take(&mut sources.held)),
        kept: Mutex::new(by_kind(inherited, sources.store)),
        room: AtomicI64::new(i64::try_from(sources.descriptors_max).unwrap_or(i64::MAX)),
        begun: AtomicUsize::new(0),
        total,
        found: Mutex::new(Found {
            reopened: Vec::with_capacity(total),
            files: HashMap::with_capacity(total),
        }),
        sources,
    };
    // Opens of one file follow one another: it is looked at once for all of them.
    reopens.sort_unstable_by_key(|reopen| (reopen.at.volume, reopen.identity, reopen.open));
    let work = Mutex::new(reopens.into_iter());
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS.min(total)).map(|_| scope.spawn(|| search.run(&work))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(done) => done,
            Err(_) => Err(anyhow::anyhow!("a thread that reopens files has died")),
        })
    })?;
    let Search { found, kept, sources, .. } = search;
    tracing::info!(files = total, seconds = begin.elapsed().as_secs_f64(), "recorded files are looked for");
    if let Some(store) = sources.store {
        // Nobody's any more: the supervisor may let go of them.
        kept.into_inner().into_values().flatten().for_each(|(name, _)| drop(store.kept(name)));
    }
    Ok(found.into_inner())
}

fn by_kind(
    inherited: Vec<(String, OwnedFd)>,
    store: Option<&Store>,
) -> HashMap<Kind, Vec<(String, OwnedFd)>> {
    let mut kept: HashMap<Kind, Vec<_>> = HashMap::new();
    for (name, fd) in inherited {
        match (inspect(&fd), opened_for(&fd)) {
            (Ok((identity, _)), Some(access)) => kept.entry((identity, access)).or_default().push((name, fd)),
            _ => drop(store.map(|store| store.kept(name))),
        }
    }
    kept
}

struct Search<'b> {
    sources: Sources<'b>,
    held: Mutex<HashMap<OpenId, OwnedFd>>,
    kept: Mutex<HashMap<Kind, Vec<(String, OwnedFd)>>>,
    /// Descriptors that may still be opened.
    room: AtomicI64,
    /// Opens whose search has begun.
    begun: AtomicUsize,
    /// Of how many.
    total: usize,
    found: Mutex<Found>,
}

impl Search<'_> {
    fn run(&self, work: &Mutex<std::vec::IntoIter<Reopen>>) -> anyhow::Result<()> {
        let mut said = Instant::now();
        loop {
            let batch: Vec<Reopen> = work.lock().by_ref().take(BATCH).collect();
            if batch.is_empty() {
                return Ok(());
            }
            let begun = self.begun.fetch_add(batch.len(), Relaxed);
            if said.elapsed() >= PROGRESS {
                said = Instant::now();
                tracing::info!("recovering: {begun} of {} files found again", self.total);
            }
            let (mut found, mut seen) = (Found::default(), None);
            for reopen in batch {
                self.one(reopen, &mut seen, &mut found)?;
            }
            let mut all = self.found.lock();
            all.reopened.append(&mut found.reopened);
            all.files.extend(found.files);
        }
    }

    fn one(&self, reopen: Reopen, seen: &mut Option<Seen>, found: &mut Found) -> anyhow::Result<()> {
        let (open, file) = (reopen.open, reopen.file);
        let gauges = self.sources.gauges;
        let (result, held) = match self.find(&reopen, seen) {
            Ok((Some(held), inspected)) => (Ok(inspected), Some(HeldFile::Open(held))),
            Ok((None, inspected)) => {
                gauges.recovered_by_name.fetch_add(1, Relaxed);
                (Ok(inspected), Some(HeldFile::Named(Box::new(reopen))))
            }
            Err(Unopened::Lost(words)) => {
                tracing::warn!(%open, path = reopen.at.path.as_str(), words, "an open is lost: its file");
                gauges.recovered_lost.fetch_add(1, Relaxed);
                (Err(words), None)
            }
            Err(Unopened::NoRoom) => {
                anyhow::bail!(
                    "no descriptor is left to look at files; raise the limit (ulimit -n, LimitNOFILE=)"
                )
            }
        };
        if result.is_ok() {
            gauges.recovered_opens.fetch_add(1, Relaxed);
        }
        found.reopened.push((open, result));
        found.files.extend(held.map(|held| (file, held)));
        Ok(())
    }

    /// The file's descriptor, unless there are too many already, and how it looks.
    fn find(
        &self,
        reopen: &Reopen,
        seen: &mut Option<Seen>,
    ) -> Result<(Option<OpenFile>, Inspected), Unopened> {
        let Sources { volumes, store, gauges, .. } = &self.sources;
        // Those that were open all the time come first: they are the file, whatever has become of its name.
        let held = self.held.lock().remove(&reopen.open);
        if let Some(fd) = held
            && let Ok((identity, inspected)) = inspect(&fd)
            && identity == reopen.identity
            && opened_for(&fd) == Some(data(reopen.access))
        {
            self.room.fetch_sub(1, Relaxed);
            let stored = store.and_then(|store| store.keep(&fd));
            return Ok((Some(OpenFile::new(fd, stored, gauges)), inspected));
        }
        let kept = self.kept.lock().get_mut(&(reopen.identity, data(reopen.access))).and_then(Vec::pop);
        if let Some((name, fd)) = kept
            && let Ok((_, inspected)) = inspect(&fd)
        {
            self.room.fetch_sub(1, Relaxed);
            let stored = store.map(|store| store.kept(name));
            return Ok((Some(OpenFile::new(fd, stored, gauges)), inspected));
        }
        let volume = volumes
            .get(&reopen.at.volume)
            .ok_or_else(|| Unopened::Lost("its volume is not configured any more".into()))?;
        if self.room.fetch_sub(1, Relaxed) > 0 {
            match volume.reopen(reopen) {
                Ok((fd, inspected)) => {
                    let stored = store.and_then(|store| store.keep(&fd));
                    return Ok((Some(OpenFile::new(fd, stored, gauges)), inspected));
                }
                Err(Unopened::NoRoom) => self.room.store(0, Relaxed),
                Err(lost) => return Err(lost),
            }
        }
        if let Some(seen) = seen.as_ref().filter(|seen| seen.is_of(reopen)) {
            return Ok((None, seen.inspected.clone()));
        }
        let inspected = volume.look(reopen)?;
        *seen = Some(Seen { of: reopen.clone(), inspected: inspected.clone() });
        Ok((None, inspected))
    }
}

/// The part of access that decides a descriptor's mode; an open without either can read.
fn data(access: Access) -> Access {
    let data = access.intersection(Access::READ | Access::WRITE);
    if data.is_empty() { Access::READ } else { data }
}
