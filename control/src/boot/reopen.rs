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

/// A descriptor's file and access mode.
type Kind = (FileIdentity, Access);

/// Finds all recorded files. Blocks.
///
/// # Errors
/// If the process has no descriptor left even to look at files.
pub fn reopen(reopens: Vec<Reopen>, mut sources: Sources<'_>) -> anyhow::Result<Found> {
    let inherited = std::mem::take(&mut sources.inherited);
    let search = Search {
        held: Mutex::new(std::mem::take(&mut sources.held)),
        kept: Mutex::new(by_kind(inherited, sources.store)),
        room: AtomicI64::new(i64::try_from(sources.descriptors_max).unwrap_or(i64::MAX)),
        next: AtomicUsize::new(0),
        found: Mutex::new(Found::default()),
        sources,
    };
    let total = reopens.len();
    let slots: Vec<Mutex<Option<Reopen>>> =
        reopens.into_iter().map(|reopen| Mutex::new(Some(reopen))).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS.min(total)).map(|_| scope.spawn(|| search.run(&slots))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(done) => done,
            Err(_) => Err(anyhow::anyhow!("a thread that reopens files has died")),
        })
    })?;
    let Search { found, kept, sources, .. } = search;
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
    next: AtomicUsize,
    found: Mutex<Found>,
}

impl Search<'_> {
    fn run(&self, slots: &[Mutex<Option<Reopen>>]) -> anyhow::Result<()> {
        let mut said = Instant::now();
        loop {
            let index = self.next.fetch_add(1, Relaxed);
            let Some(reopen) = slots.get(index).map(|slot| slot.lock().take()) else { return Ok(()) };
            let Some(reopen) = reopen else { continue };
            if said.elapsed() >= PROGRESS {
                said = Instant::now();
                tracing::info!("recovering: {index} of {} files found again", slots.len());
            }
            self.one(reopen)?;
        }
    }

    fn one(&self, reopen: Reopen) -> anyhow::Result<()> {
        let (open, file) = (reopen.open, reopen.file);
        let gauges = self.sources.gauges;
        let (result, held) = match self.find(&reopen) {
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
        let mut found = self.found.lock();
        found.reopened.push((open, result));
        found.files.extend(held.map(|held| (file, held)));
        Ok(())
    }

    /// The file's descriptor, unless there are too many already, and how it looks.
    fn find(&self, reopen: &Reopen) -> Result<(Option<OpenFile>, Inspected), Unopened> {
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
        Ok((None, volume.look(reopen)?))
    }
}

/// The part of access that decides a descriptor's mode; an open without either can read.
fn data(access: Access) -> Access {
    let data = access.intersection(Access::READ | Access::WRITE);
    if data.is_empty() { Access::READ } else { data }
}
