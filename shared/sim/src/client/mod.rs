//! Clients: what each was told, and what it makes of it.
//!
//! ```text
//!  nothing ─► connecting ─► session ─► opens ─► channels
//!     ▲                        │ lost            │ lost
//!     └────────────────────────┘                 └► bind again
//! ```
//!
//! A client that crashes forgets all of it; one that only loses its connection resumes.

mod act;
mod hear;

use crate::net::ConnNo;
use crate::plane::{ChannelNo, Io};
use holdfast_shared::auth::{BindSecret, MacPolicy};
use holdfast_shared::types::{HandleId, LockItem, OpenId, SessionId, VolumeId};
use holdfast_shared::wire::control::{self, Lock, Unlock};
use std::collections::BTreeMap;

/// Names one of a client's opens; never used twice by it.
pub(crate) type Uid = u64;

/// A request whose answer is awaited.
#[derive(Clone, Debug)]
pub(crate) enum Asked {
    Hello,
    Open(Uid),
    Close(Uid),
    Lock(Uid, u64),
    Unlock(Uid, u64),
    Resume(Uid),
    /// Something whose answer changes nothing.
    Other,
    Logoff,
}

/// Where one of its opens stands, as far as the client knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stands {
    /// Asked for, not answered.
    Opening,
    Live,
    /// Its session is lost.
    Lost,
    Resuming,
    Closing,
    /// Over.
    Dead,
}

/// What the server told of an open.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) open: OpenId,
    pub(crate) key: Vec<u8>,
    pub(crate) challenge: [u8; 32],
    pub(crate) volume: VolumeId,
    pub(crate) policy: MacPolicy,
    pub(crate) secret: BindSecret,
    /// Which data plane it is told of.
    pub(crate) instance: u64,
    pub(crate) epoch: u64,
}

/// A channel of an open.
#[derive(Clone, Debug)]
pub(crate) struct Bound {
    pub(crate) channel: ChannelNo,
    /// None while the bind is under way.
    pub(crate) handle: Option<HandleId>,
    pub(crate) instance: u64,
    /// The transcript's digest, for the server's proof.
    pub(crate) transcript: [u8; 32],
    pub(crate) under_way: BTreeMap<u64, Io>,
    /// What had been acknowledged when a flush was asked for.
    pub(crate) flushing: BTreeMap<u64, BTreeMap<u64, (u64, u64)>>,
}

/// A change of locks that is not settled.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Lock(Lock),
    Unlock(Unlock),
}

#[derive(Clone, Debug)]
pub(crate) struct ClientOpen {
    pub(crate) uid: Uid,
    pub(crate) request: control::Open,
    pub(crate) stands: Stands,
    pub(crate) told: Option<Told>,
    pub(crate) session: Option<SessionId>,
    pub(crate) bound: Vec<Bound>,
    pub(crate) sequence: u64,
    pub(crate) locks: Vec<(u64, LockItem)>,
    /// The change of locks that is under way, or whose answer was lost.
    pub(crate) change: Option<Change>,
    /// Block to (tag, data plane that acknowledged it): written, acknowledged, not flushed.
    pub(crate) unflushed: BTreeMap<u64, (u64, u64)>,
    /// How often it was tried to get it back.
    pub(crate) tries: u32,
}

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) number: usize,
    pub(crate) principal: &'static str,
    pub(crate) conn: Option<ConnNo>,
    /// Once welcomed.
    pub(crate) session: Option<SessionId>,
    pub(crate) last_request: u64,
    pub(crate) pending: BTreeMap<u64, Asked>,
    pub(crate) opens: Vec<ClientOpen>,
    pub(crate) last_uid: Uid,
    pub(crate) last_tag: u64,
    pub(crate) last_io: u64,
    /// Keys of others that it got hold of.
    pub(crate) loot: Vec<Vec<u8>>,
    /// It has ended its session for good.
    pub(crate) gone: bool,
    /// What it does is said by a script.
    pub(crate) scripted: bool,
    /// What it still does, the next at the end; where all orders are tried.
    pub(crate) script: Vec<crate::explore::Do>,
    /// The last refusal of an open, a lock or a resume, for scripts.
    pub(crate) refused: Option<holdfast_shared::types::Status>,
}

impl Client {
    pub(crate) fn new(number: usize) -> Self {
        Self {
            number,
            principal: if number % 2 == 0 { "u1" } else { "u2" },
            conn: None,
            session: None,
            last_request: 0,
            pending: BTreeMap::new(),
            opens: Vec::new(),
            last_uid: 0,
            last_tag: 0,
            last_io: 0,
            loot: Vec::new(),
            gone: false,
            scripted: false,
            script: Vec::new(),
            refused: None,
        }
    }

    pub(crate) fn open_mut(&mut self, uid: Uid) -> Option<&mut ClientOpen> {
        self.opens.iter_mut().find(|open| open.uid == uid)
    }

    fn of_channel(&mut self, channel: ChannelNo) -> Option<(&mut ClientOpen, usize)> {
        self.opens.iter_mut().find_map(|open| {
            let at = open.bound.iter().position(|bound| bound.channel == channel)?;
            Some((open, at))
        })
    }

    /// Nothing is left to be done at the end.
    pub(crate) fn is_done(&self) -> bool {
        self.gone && self.conn.is_none()
    }

    /// Forgets everything, as a process does that is killed.
    pub(crate) fn forget(&mut self) {
        self.conn = None;
        self.session = None;
        self.pending.clear();
        self.opens.clear();
    }
}
