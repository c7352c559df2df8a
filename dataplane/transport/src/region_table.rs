//! The registered memory of one channel's peer, for transports without a device that would keep such a table.
//!
//! ```text
//!   Registrar::register ──► entry{rkey, base, access, region} ◄── find(what the peer named) ──► Target
//!   drop(Registration)  ──► removed, then waits for whoever holds Target::lock
//! ```
//!
//! Keys and base addresses are random: a peer can name only what it was told of, and learns no address of this
//! process. A withdrawal takes effect before the drop returns, as with a device: no byte moves after it.

use crate::channel::{Registrar, Registration, RemoteAccess};
use holdfast_shared::types::RegionDescriptor;
use holdfast_verbs::memory::Region;
use parking_lot::{RwLock, RwLockReadGuard};
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Bases look like user addresses, and base + length never wraps.
const BASE_MASK: u64 = 0x0000_7FFF_FFFF_F000;

/// All registrations for one channel's peer.
#[derive(Default)]
pub(crate) struct RegionTable {
    entries: RwLock<HashMap<u32, Arc<Entry>>>,
}

struct Entry {
    base: u64,
    access: RemoteAccess,
    region: Arc<Region>,
    /// False once withdrawn. Read-locked while bytes of the region move.
    live: RwLock<bool>,
}

/// What the peer wants to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wanted {
    /// Write into the region.
    Place,
    /// Read from it.
    Fetch,
}

impl RemoteAccess {
    pub(crate) fn allows(self, wanted: Wanted) -> bool {
        match self {
            Self::FetchAndPlace => true,
            Self::Fetch => wanted == Wanted::Fetch,
            Self::Place => wanted == Wanted::Place,
        }
    }
}

/// A part of a region that the peer named and may reach.
pub(crate) struct Target {
    entry: Arc<Entry>,
    start: usize,
    length: usize,
}

/// Proof that the registration is there, and stays while this is held.
pub(crate) struct Live<'a> {
    _guard: RwLockReadGuard<'a, bool>,
}

impl RegionTable {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The part of a region that `remote` names, if all of it may be reached so.
    pub(crate) fn find(&self, remote: RegionDescriptor, wanted: Wanted) -> Option<Target> {
        let entry = Arc::clone(self.entries.read().get(&remote.rkey())?);
        let start = usize::try_from(remote.address().checked_sub(entry.base)?).ok()?;
        let length = usize::try_from(remote.length()).ok()?;
        let inside = start.checked_add(length)? <= entry.region.len();
        (inside && entry.access.allows(wanted)).then_some(Target { entry, start, length })
    }

    fn add(self: &Arc<Self>, region: Arc<Region>, access: RemoteAccess) -> io::Result<Registration> {
        let length = u32::try_from(region.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a region of 4 GiB or more"))?;
        let mut entries = self.entries.write();
        let (rkey, base) = loop {
            let (rkey, base) = random_name()?;
            if rkey != 0 && base != 0 && !entries.contains_key(&rkey) {
                break (rkey, base);
            }
        };
        let entry = Arc::new(Entry { base, access, region: Arc::clone(&region), live: RwLock::new(true) });
        entries.insert(rkey, Arc::clone(&entry));
        drop(entries);
        let held = Held { table: Arc::clone(self), rkey, entry };
        Ok(Registration::new(RegionDescriptor::new(base, rkey, length), region, Box::new(held)))
    }
}

/// A key and a base address from the kernel's random numbers.
fn random_name() -> io::Result<(u32, u64)> {
    let (mut rkey, mut base) = ([0; 4], [0; 8]);
    for bytes in [&mut rkey[..], &mut base[..]] {
        // Requests of up to 256 bytes are answered whole.
        if rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty())? != bytes.len() {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "random numbers came short"));
        }
    }
    Ok((u32::from_ne_bytes(rkey), u64::from_ne_bytes(base) & BASE_MASK))
}

impl Target {
    /// Keeps the registration from being withdrawn while bytes move; `None` if it has been. One thread may hold several
    /// of these for the same registration.
    pub(crate) fn lock(&self) -> Option<Live<'_>> {
        // A plain read waits behind a withdrawal, which waits for the reads that this thread may hold already.
        let guard = self.entry.live.read_recursive();
        guard.then_some(())?;
        Some(Live { _guard: guard })
    }

    pub(crate) fn region(&self) -> &Region {
        &self.entry.region
    }

    pub(crate) fn length(&self) -> usize {
        self.length
    }

    /// The bytes from `done` on, as a range of the region.
    pub(crate) fn rest(&self, done: usize) -> Range<usize> {
        self.start + done.min(self.length)..self.start + self.length
    }
}

/// Withdraws on drop.
struct Held {
    table: Arc<RegionTable>,
    rkey: u32,
    entry: Arc<Entry>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.table.entries.write().remove(&self.rkey);
        *self.entry.live.write() = false;
    }
}

/// Registers in a table.
pub(crate) struct TableRegistrar(pub(crate) Arc<RegionTable>);

impl Registrar for TableRegistrar {
    fn register(&self, region: Arc<Region>, access: RemoteAccess) -> io::Result<Registration> {
        self.0.add(region, access)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(d: RegionDescriptor, by: u64, rkey: u32, length: u32) -> RegionDescriptor {
        RegionDescriptor::new(d.address().wrapping_add(by), rkey, length)
    }

    #[test]
    fn only_what_was_registered_is_found_and_only_while_it_is() {
        let table = RegionTable::new();
        let registrar = TableRegistrar(Arc::clone(&table));
        let registration = registrar.register(Region::new(100).unwrap(), RemoteAccess::Place).unwrap();
        let d = registration.descriptor();
        let key = d.rkey();
        assert_eq!(table.find(d, Wanted::Place).unwrap().rest(0), 0..100);
        assert_eq!(table.find(named(d, 40, key, 60), Wanted::Place).unwrap().rest(10), 50..100);
        assert!(table.find(d, Wanted::Fetch).is_none());
        assert!(table.find(named(d, 0, key ^ 1, 100), Wanted::Place).is_none());
        assert!(table.find(named(d, 0, key, 101), Wanted::Place).is_none());
        assert!(table.find(named(d, 41, key, 60), Wanted::Place).is_none());
        assert!(table.find(named(d, u64::MAX, key, 1), Wanted::Place).is_none());
        assert!(table.find(RegionDescriptor::new(u64::MAX, key, u32::MAX), Wanted::Place).is_none());
        let target = table.find(d, Wanted::Place).unwrap();
        assert!(target.lock().is_some());
        drop(registration);
        assert!(target.lock().is_none(), "withdrawn under a target that was found before");
        assert!(table.find(d, Wanted::Place).is_none());
    }

    #[test]
    fn names_differ_from_registration_to_registration() {
        let registrar = TableRegistrar(RegionTable::new());
        let region = Region::new(8).unwrap();
        let all: Vec<_> = (0..64)
            .map(|_| registrar.register(Arc::clone(&region), RemoteAccess::FetchAndPlace).unwrap())
            .collect();
        let keys: std::collections::HashSet<u32> = all.iter().map(|r| r.descriptor().rkey()).collect();
        let bases: std::collections::HashSet<u64> = all.iter().map(|r| r.descriptor().address()).collect();
        assert_eq!((keys.len(), bases.len()), (64, 64));
        assert!(!bases.contains(&region.addr()));
    }

    #[test]
    fn a_withdrawal_waits_for_bytes_that_move() {
        let registrar = TableRegistrar(RegionTable::new());
        let registration = registrar.register(Region::new(8).unwrap(), RemoteAccess::Place).unwrap();
        let target = registrar.0.find(registration.descriptor(), Wanted::Place).unwrap();
        let live = target.lock().unwrap();
        let thread = std::thread::spawn(move || drop(registration));
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert!(!thread.is_finished());
        drop(live);
        thread.join().unwrap();
        assert!(target.lock().is_none());
    }

    #[test]
    fn a_withdrawal_that_waits_does_not_hold_up_who_has_the_lock_already() {
        let registrar = TableRegistrar(RegionTable::new());
        let registration = registrar.register(Region::new(8).unwrap(), RemoteAccess::Fetch).unwrap();
        let target = registrar.0.find(registration.descriptor(), Wanted::Fetch).unwrap();
        std::thread::scope(|scope| {
            let live = target.lock().unwrap();
            let withdrawal = scope.spawn(move || drop(registration));
            std::thread::sleep(std::time::Duration::from_millis(30));
            assert!(!withdrawal.is_finished());
            // The lock does not know threads: a second one stands for the same one, and can be waited for with a limit.
            let (sender, receiver) = std::sync::mpsc::channel();
            let target = &target;
            scope.spawn(move || sender.send(target.lock().is_some()));
            let again = receiver.recv_timeout(std::time::Duration::from_secs(5));
            drop(live);
            assert_eq!(again, Ok(true), "the second lock waited behind the withdrawal");
        });
        assert!(target.lock().is_none());
    }
}
