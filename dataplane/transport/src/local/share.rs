//! The client's regions that the server gets at: which they are, and how they are taken back.
//!
//! Each shared region has a word in the area, by which server and client agree on when it may be touched:
//!
//! ```text
//!   | rkey: 32 bits | withdrawn: 1 | users: 31 |
//!
//!   client   share:    word = rkey, then the region's memory file goes to the server          (Note::Region)
//!            withdraw: sets `withdrawn`, waits until there are no users, word = 0             (Note::Withdrawn)
//!   server   enters:   one user more, if the rkey is right and it is not withdrawn; leaves: one less
//! ```
//!
//! So no byte moves after a withdrawal, as with a device. A peer that keeps to it can be relied on for that; one that does not could
//! write to what it has mapped until it is gone: a server has a client's bytes in its hands anyway.
//! A region that can't be shared (it is no memory file, or there are too many) is reached by frames instead, as over tcp.

use super::area::{SLOTS, slot_word};
use super::note::Note;
use crate::channel::{Registrar, Registration, RemoteAccess};
use crate::region_table::{RegionTable, TableRegistrar};
use holdfast_shared::types::RegionDescriptor;
use holdfast_verbs::memory::{Region, SharedWord};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The client takes it back.
const WITHDRAWN: u64 = 1 << 31;
/// So many users a word counts.
const USERS: u64 = WITHDRAWN - 1;
/// Trials to enter a region whose word changes meanwhile.
const ENTERS_MAX: u32 = 64;
/// Looks at a word that is in use before the thread sleeps between them.
const LOOKS: u32 = 200;
/// How long then.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000 };
/// After so many of those it is told: the server stands still.
const PAUSES_TOLD: u32 = 5000;

fn live(rkey: u32) -> u64 {
    u64::from(rkey) << 32
}

/// One user more of the region whose word this is, if it is `rkey`'s. The peer may store anything there: then its own memory is what
/// suffers.
pub(super) fn enter(word: &SharedWord, rkey: u32) -> Option<User<'_>> {
    let mut old = word.load(Ordering::Relaxed);
    // A peer that stores there all the time is served by frames.
    for _ in 0..ENTERS_MAX {
        if old & !USERS != live(rkey) || old & USERS == USERS {
            return None;
        }
        match word.compare_exchange_weak(old, old + 1, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return Some(User(word)),
            Err(now) => old = now,
        }
    }
    None
}

/// The region is in use; not any more when this is dropped.
pub(super) struct User<'a>(&'a SharedWord);

impl Drop for User<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What may be shared, as the server says.
#[derive(Clone, Copy)]
pub(super) struct Allowed {
    pub(super) regions_max: u32,
    pub(super) bytes_max: u64,
}

/// All registrations of one channel.
pub(super) struct Shares {
    socket: Arc<OwnedFd>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Once it is there.
    area: Option<(Arc<Region>, Allowed)>,
    /// The channel has ended.
    closed: bool,
    entries: HashMap<u32, Entry>,
    /// Slots that were used and are free again, and the first that never was.
    free: Vec<u16>,
    next: u16,
    bytes: u64,
}

struct Entry {
    descriptor: RegionDescriptor,
    access: RemoteAccess,
    region: Arc<Region>,
    slot: Option<(u16, SharedWord)>,
}

impl Shares {
    pub(super) fn new(socket: Arc<OwnedFd>) -> Arc<Self> {
        Arc::new(Self { socket, inner: Mutex::default() })
    }

    /// The area has come: what was registered before is shared now.
    pub(super) fn open(&self, area: Arc<Region>, allowed: Allowed) {
        let inner = &mut *self.inner.lock();
        inner.area = Some((area, allowed));
        let waiting: Vec<u32> = inner.entries.keys().copied().collect();
        for rkey in waiting {
            inner.share(&self.socket, rkey);
        }
    }

    fn add(&self, descriptor: RegionDescriptor, access: RemoteAccess, region: Arc<Region>) {
        let inner = &mut *self.inner.lock();
        if inner.closed {
            return;
        }
        inner.entries.insert(descriptor.rkey(), Entry { descriptor, access, region, slot: None });
        inner.share(&self.socket, descriptor.rkey());
    }

    /// Waits until the server has let go of it.
    fn withdraw(&self, rkey: u32) {
        let Some(Entry { descriptor, slot: Some((slot, word)), region, .. }) =
            self.inner.lock().entries.remove(&rkey)
        else {
            return;
        };
        self.take_back(&word);
        // It keeps the mapping if this is lost, but not the right to use it.
        let _ = Note::Withdrawn { slot, rkey }.send((*self.socket).as_fd(), None);
        let mut inner = self.inner.lock();
        inner.free.push(slot);
        inner.bytes = inner.bytes.saturating_sub(descriptor.length().into());
        drop(inner);
        drop(region);
    }

    /// Takes back all of them, for good.
    pub(super) fn close(&self) {
        let words: Vec<SharedWord> = {
            let inner = &mut *self.inner.lock();
            inner.closed = true;
            // They stay where they are: who drops a registration meanwhile waits as well.
            inner.entries.values().filter_map(|entry| Some(entry.slot.as_ref()?.1.clone())).collect()
        };
        for word in &words {
            self.take_back(word);
        }
    }

    fn take_back(&self, word: &SharedWord) {
        let mut old = word.fetch_or(WITHDRAWN, Ordering::AcqRel);
        let mut rounds = 0u32;
        // A process that is gone has let go: its threads have ended before its sockets close.
        while old & USERS != 0 && !(rounds > LOOKS && self.peer_is_gone()) {
            rounds = rounds.saturating_add(1);
            if rounds == LOOKS + PAUSES_TOLD {
                tracing::warn!("a withdrawal waits: the data plane stands still in the middle of a copy");
            }
            if rounds < LOOKS / 2 {
                std::hint::spin_loop()
            } else {
                std::thread::yield_now()
            }
            old = word.load(Ordering::Acquire);
        }
        word.store(0, Ordering::Release);
    }

    /// Looks for a moment.
    fn peer_is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&*self.socket, PollFlags::empty())];
        poll(&mut fds, Some(&PAUSE)).is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}

impl Inner {
    /// Shares a registered region, if that can be.
    fn share(&mut self, socket: &OwnedFd, rkey: u32) {
        let Some((area, allowed)) = &self.area else { return };
        let Some(entry) = self.entries.get_mut(&rkey) else { return };
        let Some(file) = entry.region.file() else { return };
        let bytes = self.bytes.saturating_add(entry.descriptor.length().into());
        let slot = self.free.last().copied().unwrap_or(self.next);
        if slot >= SLOTS || u32::from(slot) >= allowed.regions_max || bytes > allowed.bytes_max {
            tracing::debug!(regions = slot, bytes, "a region is not shared: there are too many");
            return;
        }
        let Ok(word) = slot_word(area, slot) else { return };
        word.store(live(rkey), Ordering::Release);
        let note = Note::Region { slot, access: entry.access, region: entry.descriptor };
        if let Err(error) = note.send(socket.as_fd(), Some(file)) {
            tracing::debug!(%error, "a region is not shared");
            word.store(0, Ordering::Release);
            return;
        }
        if self.free.pop().is_none() {
            self.next += 1;
        }
        self.bytes = bytes;
        entry.slot = Some((slot, word));
    }
}

/// Registers in the table, and shares.
pub(super) struct SharingRegistrar {
    pub(super) table: Arc<RegionTable>,
    pub(super) shares: Arc<Shares>,
}

impl Registrar for SharingRegistrar {
    fn register(&self, region: Arc<Region>, access: RemoteAccess) -> io::Result<Registration> {
        let listed = TableRegistrar(Arc::clone(&self.table)).register(Arc::clone(&region), access)?;
        let descriptor = listed.descriptor();
        self.shares.add(descriptor, access, Arc::clone(&region));
        let held = Held { shares: Arc::clone(&self.shares), rkey: descriptor.rkey(), _listed: listed };
        Ok(Registration::new(descriptor, region, Box::new(held)))
    }
}

/// Withdraws on drop: first what is shared, then what is listed.
struct Held {
    shares: Arc<Shares>,
    rkey: u32,
    _listed: Registration,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shares.withdraw(self.rkey);
    }
}
