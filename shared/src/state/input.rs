//! What comes into the authority.

use super::effect::Located;
use super::operation::OperationId;
use super::table::FileId;
use crate::auth::SessionKey;
use crate::types::{Access, Evidence, OpenId, ProcessId, SessionId};
use crate::wire::control::{Attributes, Refusal, Reply, Request};
use crate::wire::link::{Fence, Held, LinkBinding, Redeem, Restricted, Wrote};

/// One event. The shell gives them one at a time, in the order in which they happened.
#[derive(Debug)]
pub enum Input {
    /// A peer is authenticated and has said hello.
    SessionBegan(Box<SessionBegan>),
    /// The session's connection is gone. Nothing more comes from it.
    SessionLost(SessionId),
    /// A session asks. Requests of a session that is not (or no longer) there are dropped.
    Request {
        /// Which session.
        session: SessionId,
        /// The request's number, echoed in its one answer.
        id: u64,
        /// What is asked.
        request: Request,
        /// Randomness and wall clock for this request.
        fresh: Box<Fresh>,
    },
    /// Answer to [`Effect::OpenFile`](super::Effect::OpenFile).
    FileOpened {
        /// Which operation.
        operation: OperationId,
        /// The file, or why not.
        result: Result<FileOpened, Refusal>,
    },
    /// Answer to [`Effect::Resolve`](super::Effect::Resolve).
    Resolved {
        /// Which operation.
        operation: OperationId,
        /// What stands at each name, in the order asked; `None` where nothing does.
        result: Result<Vec<Option<FileIdentity>>, Refusal>,
    },
    /// Answer to [`Effect::Perform`](super::Effect::Perform).
    Performed {
        /// Which operation.
        operation: OperationId,
        /// The answer for the client, or why not.
        result: Result<Reply, Refusal>,
    },
    /// At the start only: a dataplane of an earlier control may live and hold bindings that this authority does not
    /// know. Until [`Input::LinkUp`] or [`Input::LinkLost`] nothing is granted that they could conflict with.
    DataplaneMayLive,
    /// What bindings that are gone wrote, as a dataplane tells that is about to register.
    Wrote(Vec<Wrote>),
    /// A dataplane registered. By the link's contract every binding that it does not tell of is gone.
    LinkUp {
        /// As registered; handed on unread.
        service_blob: Vec<u8>,
        /// The bindings that live.
        held: Vec<Held>,
    },
    /// The link has closed. Dataplane may live, and its bindings with it: all of them stay.
    LinkDown,
    /// Every record up to and including this number is durable.
    Persisted(u64),
    /// Whether the journal has room for more than the ends of things. While it has none, opens and locks are refused
    /// `NoSpace`; everything can still be closed.
    JournalRoom(bool),
    /// The rules of that version are in force, and all I/O of the open begun before has ended.
    Restricted(Restricted),
    /// Answer to [`Effect::Inspect`](super::Effect::Inspect) and [`Effect::InspectLost`](super::Effect::InspectLost).
    Inspected {
        /// Which operation.
        operation: OperationId,
        /// How the file looks; `None` if it is not there any more.
        result: Result<Option<Inspected>, Refusal>,
    },
    /// After [`Recovery::finish`](super::Recovery::finish), before anything else: a recorded file is open again, or can't
    /// be. One for each [`Reopen`]. When all are told, [`Input::LinkUp`] or [`Input::LinkLost`] says which bindings live;
    /// before that nothing is granted.
    Reopened {
        /// Which open.
        open: OpenId,
        /// How the file looks; or why it is lost, in words for the operator.
        result: Result<Inspected, String>,
    },
    /// The operator closes an open. Its owner learns `ForceClosed`.
    ForceClose(OpenId),
    /// The dataplane is proven dead, and with it every descriptor and queue pair it held. Opens stay.
    LinkLost,
    /// Dataplane carries a client's bind request.
    Redeem {
        /// The request.
        redeem: Box<Redeem>,
        /// Randomness for the new handle.
        fresh: Box<Fresh>,
    },
    /// Dataplane says that a binding's I/O has ended for good.
    Fenced(Fence),
    /// Dataplane says that a binding ended by itself.
    Released(LinkBinding),
}

/// See [`Input::SessionBegan`].
#[derive(Debug)]
pub struct SessionBegan {
    /// Fresh, 128 random bits.
    pub session: SessionId,
    /// Number of the hello request.
    pub request: u64,
    /// From the client's certificate.
    pub principal: String,
    /// K1, from the TLS exporter.
    pub key: SessionKey,
    /// The client's process, from its hello.
    pub process: ProcessId,
}

/// Fresh randomness and the wall clock: the authority has neither. Part of it becomes secret, so Debug is silent.
#[derive(Clone)]
pub struct Fresh {
    /// For an open id.
    pub open: [u8; 16],
    /// For a handle id.
    pub handle: [u8; 16],
    /// For an open's challenge.
    pub challenge: [u8; 32],
    /// For sealing a resume key.
    pub nonce: [u8; 12],
    /// For sealing a bind secret in the journal.
    pub secret_nonce: [u8; 12],
    /// Milliseconds since 1970.
    pub wall_ms: u64,
}

impl std::fmt::Debug for Fresh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fresh").field("wall_ms", &self.wall_ms).finish_non_exhaustive()
    }
}

/// Which file it is, whatever its name. While any open of it lasts, no other file can have the same identity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, minicbor::Encode, minicbor::Decode)]
pub struct FileIdentity {
    /// Device number of its file system.
    #[n(0)]
    pub device: u64,
    /// Inode number.
    #[n(1)]
    pub inode: u64,
    /// Tells an inode number's later uses apart: the time of the inode's birth, nanoseconds (0 if the file
    /// system does not keep it).
    #[n(2)]
    pub generation: u64,
}

/// A file that the shell has opened. It holds the descriptor until [`Effect::CloseFile`](super::Effect::CloseFile).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileOpened {
    /// Which file.
    pub identity: FileIdentity,
    /// Its attributes.
    pub attributes: Attributes,
    /// True if it was made just now.
    pub created: bool,
    /// The kernel's own name of the file, opaque here; empty if it has none.
    pub file_handle: Vec<u8>,
    /// How it looks.
    pub evidence: Evidence,
}

/// How a file looks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inspected {
    /// Its attributes.
    pub attributes: Attributes,
    /// What tells a change.
    pub evidence: Evidence,
}

/// A recorded file that the shell is to open again before anybody is let in, under the name `file`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reopen {
    /// The open.
    pub open: OpenId,
    /// The name under which to keep the descriptor.
    pub file: FileId,
    /// Where it was; a rename may have moved it since.
    pub at: Located,
    /// See [`FileOpened::file_handle`]. If it is empty or of no use, the path is tried, and must lead to `identity`.
    pub file_handle: Vec<u8>,
    /// The file it must be.
    pub identity: FileIdentity,
    /// Decides the descriptor's access mode.
    pub access: Access,
}
