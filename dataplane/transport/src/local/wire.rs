//! [`LocalWire`]: the rings, the bell, and the peer's regions, behind the trait by which streams are carried.
//!
//! ```text
//!   server   makes the area ── Area + descriptor ──►  waits ◄── Ready ── maps and freezes it   client
//!               │                                       │
//!               └── until Ready nothing of it is touched, and nothing sent: what is submitted waits
//!
//!   bytes     rings; no system call while both sides look
//!   bell      a note on the socket, for who has said in the area that it sleeps
//!   the end   the socket's: the kernel closes it with the process, whatever that was doing
//! ```

use super::area::{AREA_BYTES, Area, DATA, ROOM, SLOTS};
use super::foreign::Foreign;
use super::note::{Found, Inbox, Note};
use super::reach::{Budget, Reach};
use super::ring::{CAPACITY, RING_BYTES};
use super::share::{Allowed, Shares, SharingRegistrar};
use crate::channel::{Armed, Registrar};
use crate::region_table::{RegionTable, Wanted};
use crate::stream::{Ending, Piece, Room, Wire};
use holdfast_shared::types::RegionDescriptor;
use holdfast_verbs::memory::{PeerBytes, PeerRegion, Region};
use rustix::event::epoll;
use rustix::net::{Shutdown, shutdown};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Receives that find nothing, after which the socket is looked at: that the peer has gone is told there alone, and one that is looked
/// for all the time is never armed.
const LOOK_ROUNDS: u32 = 64;
/// Batches of notes that one look takes: a peer has fewer regions to share.
const LOOKS_MAX: usize = 16;
/// Descriptors that may wait for their messages.
const DESCRIPTORS_MAX: usize = 256;

/// Which end this is, and what only that end has.
enum Side {
    Client(Arc<Shares>),
    Server(Reach),
}

/// One end of a local channel.
pub(crate) struct LocalWire {
    socket: Arc<OwnedFd>,
    /// What is slept on: readable when the socket is. (The socket itself would also have an edge when the peer takes a note.)
    epoll: OwnedFd,
    side: Side,
    /// The server's, until the client is ready.
    made: Option<Arc<Region>>,
    area: Option<Area>,
    inbox: Inbox,
    descriptors: VecDeque<Option<OwnedFd>>,
    /// This side said that it sleeps until something comes.
    armed: bool,
    /// The peer has closed the socket; what it wrote before is still read.
    gone: bool,
    rounds: u32,
    /// The peer has proven who it is.
    is_bound: bool,
    /// There was no room: who waits for it.
    wants_room: bool,
}

impl LocalWire {
    pub(super) fn client(socket: OwnedFd) -> io::Result<Self> {
        let socket = Arc::new(socket);
        let shares = Shares::new(Arc::clone(&socket));
        Self::new(socket, Side::Client(shares), None)
    }

    /// Makes the area, and hands it over.
    pub(super) fn server(socket: OwnedFd, budget: &Arc<Budget>, bytes_max: u64) -> io::Result<Self> {
        let area = Region::shareable(AREA_BYTES)?;
        // Where the kernel may not copy for us, nothing is shared.
        let regions_max = if PeerRegion::is_possible() { u32::from(SLOTS) } else { 0 };
        let note = Note::Area { ring_bytes: RING_BYTES, regions_max, bytes_max };
        note.send(socket.as_fd(), area.file())?;
        let reach = Reach::new(area.without_file(), Arc::clone(budget), Allowed { regions_max, bytes_max });
        Self::new(Arc::new(socket), Side::Server(reach), Some(area))
    }

    fn new(socket: Arc<OwnedFd>, side: Side, made: Option<Arc<Region>>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        epoll::add(&epoll, &*socket, epoll::EventData::new_u64(0), flags)?;
        Ok(Self {
            socket,
            epoll,
            side,
            made,
            area: None,
            inbox: Inbox::default(),
            descriptors: VecDeque::new(),
            armed: false,
            gone: false,
            rounds: 0,
            is_bound: true,
            wants_room: false,
        })
    }

    /// Takes the notes that have come. True if there may be more: a peer that sends them without end does not keep its owner from
    /// other channels.
    fn look(&mut self) -> Result<bool, Ending> {
        self.rounds = 0;
        for _ in 0..LOOKS_MAX {
            if self.gone {
                return Ok(false);
            }
            match self.inbox.look((*self.socket).as_fd()).map_err(Ending::Io)? {
                Found::Nothing => return Ok(false),
                Found::Gone => self.gone = true,
                Found::Notes => {
                    while let Some(note) = self.inbox.next() {
                        let (note, descriptor) = note.map_err(Ending::Misbehaved)?;
                        self.noted(note, descriptor)?;
                    }
                }
            }
        }
        Ok(true)
    }

    fn noted(&mut self, note: Note, descriptor: Option<OwnedFd>) -> Result<(), Ending> {
        let descriptor = descriptor.map(Foreign::new);
        match (note, &mut self.side) {
            (Note::Bell, _) => {}
            (Note::Area { ring_bytes, regions_max, bytes_max }, Side::Client(shares))
                if self.area.is_none() =>
            {
                if ring_bytes != RING_BYTES {
                    return Err(Ending::Misbehaved("its rings have another length"));
                }
                let descriptor = descriptor.ok_or_else(|| {
                    Ending::Io(io::Error::other("no room for the area's descriptor: too many files are open"))
                })?;
                let unsealed = Ending::Misbehaved("its area is no sealed memory file");
                let descriptor = descriptor.memory().ok_or(unsealed)?;
                let memory = Region::adopt(descriptor, AREA_BYTES).map_err(|error| match error.kind() {
                    io::ErrorKind::InvalidInput => Ending::Misbehaved("its area is no sealed memory file"),
                    _ => Ending::Io(error),
                })?;
                self.area = Some(Area::new(&memory, true).map_err(|error| Ending::Io(error.into()))?);
                Note::Ready.send((*self.socket).as_fd(), None).map_err(Ending::Io)?;
                shares.open(memory, Allowed { regions_max, bytes_max });
            }
            (Note::Ready, Side::Server(_)) => {
                let unasked = Ending::Misbehaved("it says that it is ready again");
                let memory = self.made.take().ok_or(unasked)?;
                if !memory.is_frozen().map_err(Ending::Io)? {
                    return Err(Ending::Misbehaved("it says that it is ready, and the area is not frozen"));
                }
                let memory = memory.without_file();
                self.area = Some(Area::new(&memory, false).map_err(|error| Ending::Io(error.into()))?);
            }
            (Note::Region { .. }, Side::Server(_)) if !self.is_bound => {
                // Nobody has proven anything yet: it takes no place, and is reached by frames.
                tracing::debug!("a region that was shared before the bind is not mapped");
            }
            (Note::Region { slot, access, region }, Side::Server(reach)) => {
                let lost = descriptor.is_none();
                let file = descriptor.and_then(Foreign::memory);
                if file.is_none() && !lost {
                    return Err(Ending::Misbehaved(
                        "it shares what is no sealed memory file, or a shorter one",
                    ));
                }
                reach.add(slot, access, region, file)?;
            }
            (Note::Withdrawn { slot, rkey }, Side::Server(reach)) => reach.remove(slot, rkey),
            (Note::Descriptor, Side::Client(_)) if self.descriptors.len() < DESCRIPTORS_MAX => {
                self.descriptors.push_back(descriptor.and_then(Foreign::any));
            }
            _ => return Err(Ending::Misbehaved("a note that is not for this end, or one too many")),
        }
        Ok(())
    }

    /// Wakes the peer, if it sleeps until that.
    fn ring(&mut self, what: u64) -> Result<(), Ending> {
        if !self.area.as_ref().is_some_and(|area| area.rings(what)) {
            return Ok(());
        }
        match Note::Bell.send((*self.socket).as_fd(), None) {
            Ok(()) => Ok(()),
            // So much lies there unread that it has an edge already; or it is gone, which receiving tells.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(Ending::Io(error)),
        }
    }
}

impl Wire for LocalWire {
    const IS_CHEAP: bool = true;
    const STAGING_BYTES: usize = crate::stream::framing::HEADER_BYTES;

    fn send(&mut self, pieces: &[Piece<'_>]) -> Result<Option<usize>, Ending> {
        let Some(area) = &mut self.area else { return Ok(None) };
        let mut count = area.writer.write(pieces)?;
        if count == 0 {
            area.sleep_until(ROOM);
            // What was read meanwhile is not told.
            count = area.writer.write(pieces)?;
        }
        self.wants_room = count == 0;
        if count == 0 {
            return Ok(None);
        }
        self.ring(DATA)?;
        Ok(Some(count))
    }

    fn recv(&mut self, rooms: &mut [Room<'_>]) -> Result<Option<usize>, Ending> {
        if self.area.is_none() && !self.gone {
            self.look()?;
        }
        let mut count = match &mut self.area {
            Some(area) => area.reader.read(rooms)?,
            None => 0,
        };
        if count == 0 {
            self.rounds += 1;
            if self.rounds >= LOOK_ROUNDS && !self.gone {
                self.look()?;
            }
            if !self.gone {
                return Ok(None);
            }
            // It may have written before it went, after we looked.
            count = match &mut self.area {
                Some(area) => area.reader.read(rooms)?,
                None => 0,
            };
            if count == 0 {
                return Err(Ending::Disconnected);
            }
        }
        if let Some(area) = &self.area {
            if self.armed {
                self.armed = false;
                area.awake(DATA);
            }
            if area.reader.known()? <= CAPACITY / 2 {
                self.ring(ROOM)?;
            }
        }
        Ok(Some(count))
    }

    fn send_descriptor(&mut self, descriptor: OwnedFd) -> bool {
        Note::Descriptor.send((*self.socket).as_fd(), Some(descriptor.as_fd())).is_ok()
    }

    fn take_descriptor(&mut self) -> Result<Option<OwnedFd>, Ending> {
        if self.descriptors.is_empty() {
            self.look()?;
        }
        // It was sent before the message.
        self.descriptors.pop_front().ok_or(Ending::Misbehaved("its message has no descriptor"))
    }

    fn reach(
        &mut self,
        remote: RegionDescriptor,
        wanted: Wanted,
        act: &mut dyn FnMut(PeerBytes<'_>),
    ) -> Result<bool, Ending> {
        match &self.side {
            Side::Client(_) => return Ok(false),
            Side::Server(reach) if reach.knows(remote.rkey()) => {}
            // It was shared before it was named.
            Side::Server(_) => {
                self.look()?;
            }
        }
        match &self.side {
            Side::Server(reach) => Ok(reach.reach(remote, wanted, act)),
            Side::Client(_) => Ok(false),
        }
    }

    fn arm(&mut self, _was_empty: bool, is_stalled: bool) -> Result<Armed, Ending> {
        let waited = self.area.is_none();
        // Here, too, edges go by that came while the owner was awake.
        let more = self.look()?;
        if more || self.gone || waited != self.area.is_none() {
            // What a stalled one still has to read comes first: then the end is told.
            return Ok(if is_stalled && self.gone && !more { Armed::Idle } else { Armed::Pending });
        }
        let Some(area) = &mut self.area else { return Ok(Armed::Idle) };
        if self.wants_room {
            // The look above may have taken the bell that told of it.
            area.sleep_until(ROOM);
            if area.writer.room()? > 0 {
                return Ok(Armed::Pending);
            }
        }
        if !is_stalled {
            area.sleep_until(DATA);
            self.armed = true;
            if area.reader.available()? > 0 {
                return Ok(Armed::Pending);
            }
        }
        Ok(Armed::Idle)
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    fn bound(&mut self, is_bound: bool) {
        self.is_bound = is_bound;
    }

    fn cut(&mut self, how: Shutdown) {
        match &mut self.side {
            // Before the socket is shut: by that who waits for the peer would take it for gone.
            Side::Client(shares) => shares.close(),
            Side::Server(reach) => reach.clear(),
        }
        let _ = shutdown(&*self.socket, how);
    }

    fn registrar(&self, table: &Arc<RegionTable>) -> Arc<dyn Registrar> {
        match &self.side {
            Side::Client(shares) => {
                Arc::new(SharingRegistrar { table: Arc::clone(table), shares: Arc::clone(shares) })
            }
            Side::Server(_) => Arc::new(crate::region_table::TableRegistrar(Arc::clone(table))),
        }
    }
}

impl Drop for LocalWire {
    fn drop(&mut self) {
        // Whoever still holds a registration must not hold the peer.
        self.cut(Shutdown::Both);
    }
}
