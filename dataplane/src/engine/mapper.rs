//! The threads that map and withdraw ranges of files for one-sided reads, and what all channels together may have of them.
//!
//! ```text
//!   worker: claims the lane ─► Expose ─► mapper: pins the pages ─► Letter::Exposed ─────────► worker
//!   worker ─► Withdraw ─► withdrawer: the device lets go, the place is free ─► Letter::Withdrawn ─► worker
//! ```
//!
//! A mapping that cannot be withdrawn ends the process: a fence could never be confirmed, and nothing else takes the pages back
//! from the device.

use super::backend::FileIo;
use super::binding::BindingRef;
use super::inbox::{Inbox, Letter};
use super::pinned::FileId;
use super::{ConnKey, ControlPort};
use crate::config::MapConfig;
use crate::gauges::Gauges;
use holdfast_shared::types::{ByteRange, Status};
use holdfast_transport::verbs::{Claimed, Exposed, LaneEnd, Lanes};
use parking_lot::Mutex;
use rustix::io::Errno;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// What all workers share for it.
pub(crate) struct Maps {
    lanes: Arc<Lanes>,
    pub(crate) limits: MapConfig,
    used: Arc<Mutex<Used>>,
    gauges: Arc<Gauges>,
    bars: Arc<Mutex<Bars>>,
    pub(super) expose: Sender<Expose>,
    withdraw: Sender<WithdrawJob>,
}

/// The threads, and one reference to what they serve.
pub(crate) struct MapThreads {
    pub(crate) maps: Arc<Maps>,
    threads: Vec<JoinHandle<()>>,
}

impl MapThreads {
    /// Ends them, once the workers have ended.
    pub(crate) fn stop(self) {
        drop(self.maps);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a mapping thread had panicked");
            }
        }
    }
}

#[derive(Default)]
struct Used {
    mappings: usize,
    bytes: u64,
}

/// Files of which nothing may be mapped.
#[derive(Default)]
struct Bars {
    /// By the number of what control does to them; and whether it was a control, or a link, of before that said so.
    barred: HashMap<u64, (FileId, bool)>,
    /// What is being mapped, and whether its file has been barred since that began.
    making: HashMap<u64, (FileId, bool)>,
    last: u64,
}

/// A mapping that is being made, from the look at the file on until it is granted.
pub(super) struct Making {
    bars: Arc<Mutex<Bars>>,
    ticket: u64,
    pub(super) file: FileId,
}

impl Making {
    /// True if bytes may have been taken away from the file since: what was pinned may be of before.
    pub(super) fn is_spoiled(&self) -> bool {
        self.bars.lock().making.get(&self.ticket).is_none_or(|(_, spoiled)| *spoiled)
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        self.bars.lock().making.remove(&self.ticket);
    }
}

/// A place among the mappings of all channels; given back when the pages are unpinned.
pub(super) struct Reserved {
    used: Arc<Mutex<Used>>,
    gauges: Arc<Gauges>,
    pub(super) bytes: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut used = self.used.lock();
        used.mappings -= 1;
        used.bytes -= self.bytes;
        self.gauges.mappings.sub(1);
        self.gauges.mapping_bytes.sub(self.bytes);
    }
}

/// A range to be mapped.
pub(super) struct Expose {
    pub(super) worker: usize,
    pub(super) conn: ConnKey,
    pub(super) slot: u16,
    pub(super) file: Arc<dyn FileIo>,
    pub(super) lane: LaneEnd,
    /// The lane, if it could be claimed at once: it must not grow too old behind other jobs.
    pub(super) claimed: Option<Claimed>,
    pub(super) range: ByteRange,
    pub(super) making: Making,
    pub(super) reserved: Reserved,
}

/// What became of a Map.
pub(crate) struct ExposeDone {
    pub(crate) conn: ConnKey,
    pub(super) slot: u16,
    pub(super) range: ByteRange,
    pub(super) bytes: u64,
    pub(super) making: Making,
    pub(super) outcome: Result<(Exposed, Reserved), Status>,
}

/// A mapping to be withdrawn.
pub(super) struct Withdraw {
    pub(super) worker: usize,
    pub(super) done: WithdrawDone,
    pub(super) exposed: Exposed,
    pub(super) reserved: Reserved,
}

/// What the withdrawer is to do, one after the other.
enum WithdrawJob {
    Mapping(Box<Withdraw>),
    /// All that came before it is withdrawn now: let go of this.
    Behind(Arc<Withdrawal>),
}

/// Control waits until nothing of a file is mapped any more. Told when the last of it is dropped: each worker hands its own to
/// the withdrawer, behind its mappings of that file.
pub(crate) struct Withdrawal {
    id: u64,
    pub(super) file: FileId,
    port: Arc<dyn ControlPort>,
}

impl Withdrawal {
    pub(super) fn new(id: u64, file: FileId, port: Arc<dyn ControlPort>) -> Self {
        Self { id, file, port }
    }
}

impl Drop for Withdrawal {
    fn drop(&mut self) {
        self.port.withdrawn(self.id);
    }
}

/// A mapping was withdrawn.
#[derive(Clone, Copy)]
pub(crate) struct WithdrawDone {
    pub(crate) conn: ConnKey,
    pub(super) binding: BindingRef,
    /// The request that asked for it.
    pub(super) unmap: Option<u16>,
    pub(super) bytes: u64,
}

impl Maps {
    /// Starts the threads, one for each direction. They end when the last reference to the maps is gone.
    pub(crate) fn start(
        limits: MapConfig,
        gauges: Arc<Gauges>,
        inboxes: Vec<Arc<Inbox>>,
    ) -> io::Result<MapThreads> {
        let lanes = Arc::new(Lanes::default());
        let (expose, to_expose) = channel();
        let (withdraw, to_withdraw) = channel();
        let mut threads = Vec::new();
        let (its_lanes, its_inboxes) = (Arc::clone(&lanes), inboxes.clone());
        let run = move || map_all(&to_expose, &its_lanes, &its_inboxes);
        threads.push(std::thread::Builder::new().name("mapper".into()).spawn(run)?);
        let run = move || withdraw_all(&to_withdraw, &inboxes);
        threads.push(std::thread::Builder::new().name("withdrawer".into()).spawn(run)?);
        let used = Arc::default();
        let maps = Arc::new(Self { lanes, limits, used, gauges, bars: Arc::default(), expose, withdraw });
        Ok(MapThreads { maps, threads })
    }

    /// Where listeners leave lanes.
    pub(crate) fn lanes(&self) -> &Arc<Lanes> {
        &self.lanes
    }

    /// Nothing of the file may be mapped until [`Maps::unbar`].
    pub(super) fn bar(&self, id: u64, file: FileId) {
        let mut bars = self.bars.lock();
        bars.barred.insert(id, (file, false));
        for (making, spoiled) in bars.making.values_mut() {
            *spoiled |= *making == file;
        }
    }

    pub(super) fn unbar(&self, id: u64) {
        self.bars.lock().barred.remove(&id);
    }

    /// A control asks what there is. What it wants barred it says, and then has the rest forgotten.
    pub(super) fn bars_are_old(&self) {
        self.bars.lock().barred.values_mut().for_each(|(_, old)| *old = true);
    }

    /// See [`Maps::bars_are_old`].
    pub(super) fn forget_old_bars(&self) {
        self.bars.lock().barred.retain(|_, (_, old)| !*old);
    }

    /// Begins to map something of a file; `None` if that may not be now.
    pub(super) fn begin(&self, file: FileId) -> Option<Making> {
        let mut bars = self.bars.lock();
        if bars.barred.values().any(|(barred, _)| *barred == file) {
            return None;
        }
        bars.last += 1;
        let ticket = bars.last;
        bars.making.insert(ticket, (file, false));
        Some(Making { bars: Arc::clone(&self.bars), ticket, file })
    }

    /// Has a mapping withdrawn.
    pub(super) fn withdraw(&self, withdraw: Withdraw) {
        // The thread ends after the workers: it takes it.
        let _ = self.withdraw.send(WithdrawJob::Mapping(Box::new(withdraw)));
    }

    /// Lets go of it when all that was given to be withdrawn before is.
    pub(super) fn behind_all(&self, withdrawal: Arc<Withdrawal>) {
        let _ = self.withdraw.send(WithdrawJob::Behind(withdrawal));
    }

    /// A place for one mapping more, if the limits allow it.
    pub(super) fn reserve(&self, bytes: u64) -> Option<Reserved> {
        let mut used = self.used.lock();
        if used.mappings >= self.limits.mappings_max || used.bytes + bytes > self.limits.bytes_max {
            return None;
        }
        used.mappings += 1;
        used.bytes += bytes;
        self.gauges.mappings.add(1);
        self.gauges.mapping_bytes.add(bytes);
        Some(Reserved { used: Arc::clone(&self.used), gauges: Arc::clone(&self.gauges), bytes })
    }
}

fn map_all(jobs: &Receiver<Expose>, lanes: &Lanes, inboxes: &[Arc<Inbox>]) {
    while let Ok(Expose { worker, conn, slot, file, lane, claimed, range, making, reserved }) = jobs.recv() {
        let bytes = reserved.bytes;
        let outcome = match (claimed.or_else(|| lanes.claim(&lane)), usize::try_from(range.length())) {
            (Some(claimed), Ok(length)) => claimed
                .expose(file.descriptor(), range.offset(), length)
                .map(|exposed| (exposed, reserved))
                .map_err(|error| {
                    tracing::debug!(%error, ?range, "a range cannot be mapped");
                    // Shorter than when it was looked at: to be asked for again.
                    let shrunk = rustix::fs::fstat(file.descriptor())
                        .is_ok_and(|stat| u64::try_from(stat.st_size).unwrap_or(0) < range.end());
                    if shrunk { Status::Unavailable } else { status_of(&error) }
                }),
            // No such lane, or it has waited too long.
            _ => Err(Status::Invalid),
        };
        // The descriptor is held no longer than the job.
        drop(file);
        let done = ExposeDone { conn, slot, range, bytes, making, outcome };
        inboxes[worker].send(Letter::Exposed(Box::new(done)));
    }
}

fn withdraw_all(jobs: &Receiver<WithdrawJob>, inboxes: &[Arc<Inbox>]) {
    while let Ok(job) = jobs.recv() {
        let Withdraw { worker, done, exposed, reserved } = match job {
            WithdrawJob::Mapping(withdraw) => *withdraw,
            WithdrawJob::Behind(withdrawal) => {
                drop(withdrawal);
                continue;
            }
        };
        match exposed.withdraw() {
            Ok(spent) => {
                drop(reserved);
                inboxes[worker].send(Letter::Withdrawn(done));
                // Nobody waits for the lane's own end.
                drop(spent);
            }
            // A fence can't be confirmed, nor ever be: only the end of the process takes the pages back.
            Err(error) => crate::fault::fatal("a mapping cannot be withdrawn from the device", &error),
        }
    }
}

fn status_of(error: &io::Error) -> Status {
    match Errno::from_io_error(error) {
        // The kernel pins no file's pages for reading.
        Some(Errno::FAULT | Errno::NODEV | Errno::OPNOTSUPP) => Status::Unsupported,
        Some(Errno::NOMEM | Errno::AGAIN | Errno::PERM) => Status::TooMany,
        Some(Errno::ACCESS) => Status::AccessDenied,
        None if matches!(error.kind(), io::ErrorKind::OutOfMemory | io::ErrorKind::PermissionDenied) => {
            Status::TooMany
        }
        _ => Status::Io,
    }
}
