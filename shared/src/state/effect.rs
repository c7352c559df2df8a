//! What the authority wants done.

use super::input::FileIdentity;
use super::operation::OperationId;
use super::table::FileId;
use crate::journal::record::Record;
use crate::types::{Access, Disposition, FileTime, SessionId, Status, VolumeId, VolumePath};
use crate::wire::control::Reply;
use crate::wire::link::{Fence, Grant, LinkBinding, Restrict};

/// One thing to do, in the order given.
#[derive(Debug)]
pub enum Effect {
    /// Send an answer. If the session is gone, drop it.
    Reply {
        /// To whom.
        session: SessionId,
        /// To which request.
        id: u64,
        /// The answer.
        reply: Reply,
    },
    /// End a session's connection once its answers are sent.
    Disconnect(SessionId),
    /// Open a regular file beneath the volume's root, without truncating it. Answered by `FileOpened`.
    OpenFile {
        /// Pairs the answer.
        operation: OperationId,
        /// The name under which to keep the descriptor, if it works.
        file: FileId,
        /// Where.
        at: Located,
        /// Decides the descriptor's access mode.
        access: Access,
        /// Whether it may, or must, be created. Truncation is not part of it.
        disposition: Disposition,
        /// Permission bits of a created file.
        mode: u32,
        /// Whether a symbolic link at the end is followed (inside the volume), or refused.
        follow: bool,
    },
    /// Close a descriptor. Copies in dataplane are gone by then.
    CloseFile(FileId),
    /// Find out which files names stand for, without following a symbolic link at the end. Answered by `Resolved`.
    Resolve {
        /// Pairs the answer.
        operation: OperationId,
        /// The names.
        names: Vec<Located>,
    },
    /// Work in the file system. Answered by `Performed`.
    Perform {
        /// Pairs the answer.
        operation: OperationId,
        /// The work.
        work: Work,
    },
    /// Send dataplane a grant and a duplicate of the descriptor.
    Grant {
        /// The redeem request's number.
        id: u64,
        /// The open's descriptor.
        file: FileId,
        /// What is granted.
        grant: Box<Grant>,
    },
    /// Send dataplane a refusal.
    RefuseBind {
        /// The redeem request's number.
        id: u64,
        /// Why.
        status: Status,
    },
    /// Have dataplane fence a binding. Answered by `Fenced`, `Released`, `LinkUp` or `LinkLost`.
    Fence(Fence),
    /// Append a record to the journal. Answered by `Persisted` once it, and all before it, are durable.
    Persist {
        /// Its number: one more than the last.
        sequence: u64,
        /// What to write.
        record: Box<Record>,
        /// True if it ends something: then the journal's reserve may be used for it.
        releasing: bool,
    },
    /// Look at an open's file. Answered by `Inspected`.
    Inspect {
        /// Pairs the answer.
        operation: OperationId,
        /// The descriptor.
        file: FileId,
    },
    /// Look at a file of which no descriptor is kept: by its handle where the kernel allows, else by path, checked
    /// against the identity. Answered by `Inspected`.
    InspectLost {
        /// Pairs the answer.
        operation: OperationId,
        /// Where it was.
        at: Located,
        /// See [`FileOpened::file_handle`](super::FileOpened::file_handle).
        file_handle: Vec<u8>,
        /// The file it must be.
        identity: FileIdentity,
    },
    /// Have dataplane refuse I/O of an open's bindings in byte ranges. Answered by `Restricted`, `LinkUp` or `LinkLost`.
    Restrict(Restrict),
    /// Dataplane has not confirmed a fence in time. Whatever waits for it goes on waiting: tell the operator.
    FenceOverdue(LinkBinding),
}

/// A place in a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Located {
    /// The volume.
    pub volume: VolumeId,
    /// The path in it.
    pub path: VolumePath,
}

/// What some work is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Subject {
    /// An open's descriptor.
    File(FileId),
    /// A name; a symbolic link at its end is not followed.
    Name(Located),
}

/// Attributes to change; those absent stay.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Changes {
    /// Size, bytes.
    pub size: Option<u64>,
    /// Permission bits, `0o777` at most.
    pub mode: Option<u32>,
    /// Time of last access.
    pub accessed: Option<FileTime>,
    /// Time of last change.
    pub modified: Option<FileTime>,
}

/// Work in the file system that ends in one answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Work {
    /// Read attributes: `Reply::Attributes`.
    Attributes(Subject),
    /// Change attributes: `Reply::Attributes` with the new ones.
    SetAttributes(Subject, Changes),
    /// A page of a directory: `Reply::Entries`.
    List(Located, String),
    /// Make a directory with these permission bits: `Reply::Done`.
    MakeDirectory(Located, u32),
    /// Make a symbolic link with this text: `Reply::Done`.
    MakeSymlink(Located, String),
    /// Read a symbolic link: `Reply::Symlink`.
    ReadSymlink(Located),
    /// Size and room: `Reply::VolumeStatus`.
    VolumeStatus(VolumeId),
    /// Remove a name if it still stands for this file: `Reply::Done`.
    Remove(Located, FileIdentity),
    /// Rename if both names still stand for what they did: `Reply::Done`.
    Rename {
        /// The old name, and its file.
        from: (Located, FileIdentity),
        /// The new name, and the file to be replaced.
        to: (Located, Option<FileIdentity>),
    },
}
