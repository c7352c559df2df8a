//! What the journal says: one record for each change of an open's life that a reply may depend on.
//!
//! ```text
//!  Started ─ Settled ─ Opened ─ Locked ─ Unlocked ─ Detached ─ Baseline ─ Marked ─ Resumed ─ Closed
//!                                              │                    └── Heard
//!                                              └──── Tombstone ─ Forgotten
//! ```
//!
//! [`Record::Opened`] carries the whole state of an open: it begins one, and in a checkpoint it replaces whatever was said
//! of that open before. So records of opens that are not known (yet) are passed over when a checkpoint is read.
//!
//! No record holds a secret in clear: the bind secret is sealed under the server's key-encryption key, so a copy of the
//! journal alone authenticates nobody.

use crate::auth::MacPolicy;
use crate::state::{FileIdentity, LockMode};
use crate::types::{
    Evidence, GoneReason, HandleId, HoldClass, LockItem, LockRange, OpenId, ProcessId, VolumeId,
};
use crate::wire::control;
use minicbor::{Decode, Encode};

/// One record. Encoded as CBOR with fixed indexes; at most 64 KiB.
#[derive(Clone, PartialEq, Debug, Encode, Decode)]
pub enum Record {
    /// The server has started: the first record of each of its lives.
    #[n(0)]
    Started(#[n(0)] Started),
    /// An open was granted; or, in a checkpoint, this is how it stands.
    #[n(1)]
    Opened(#[n(0)] Box<OpenRecord>),
    /// An open ended, and nothing is kept of it.
    #[n(2)]
    Closed(#[n(0)] OpenId),
    /// Its session was lost.
    #[n(3)]
    Detached(#[n(0)] OpenId),
    /// How the file looked when the last binding of a detached open was gone.
    #[n(4)]
    Baseline(#[n(0)] OpenId, #[n(1)] Evidence),
    /// Somebody else may have changed the file since the open was detached: durable before that somebody is let in.
    #[n(5)]
    Marked(#[n(0)] OpenId),
    /// It was resumed: it is no longer detached, has a new epoch and a new secret.
    #[n(6)]
    Resumed(#[n(0)] ResumedRecord),
    /// Locks were granted.
    #[n(7)]
    Locked(#[n(0)] LockedRecord),
    /// Locks were given up.
    #[n(8)]
    Unlocked(#[n(0)] UnlockedRecord),
    /// An open ended without its client's wish: what a late resume is told.
    #[n(9)]
    Tombstone(#[n(0)] Box<TombstoneRecord>),
    /// A tombstone's time is over.
    #[n(10)]
    Forgotten(#[n(0)] OpenId),
    /// The client of a resumed open has shown that it knows the answer: what was changed before concerns it no more.
    #[n(11)]
    Heard(#[n(0)] OpenId),
    /// A start knows of every recovered open how its file looked. Those that were live for all that the journal says are
    /// detached from here on; what they are compared with is a baseline, unless somebody else may have changed it.
    #[n(12)]
    Settled,
}

/// See [`Record::Started`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Started {
    /// Counts the starts, from 1.
    #[n(0)]
    pub generation: u64,
    /// Wall clock, milliseconds since 1970; for people.
    #[n(1)]
    pub wall_ms: u64,
}

/// See [`Record::Opened`].
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct OpenRecord {
    /// The open.
    #[n(0)]
    pub open: OpenId,
    /// Whose.
    #[n(1)]
    pub principal: String,
    /// The process that opened it.
    #[n(2)]
    pub process: ProcessId,
    /// The request, for a repeated one to be compared with; holds access, share mode and path.
    #[n(3)]
    pub request: control::Open,
    /// On which volume.
    #[n(4)]
    pub volume: VolumeId,
    /// The policy it was opened under.
    #[n(5)]
    pub policy: MacPolicy,
    /// Which file.
    #[n(6)]
    pub identity: FileIdentity,
    /// The kernel's own name of the file (type and bytes of `name_to_handle_at`), opaque here; empty if it has none.
    #[cbor(n(7), with = "minicbor::bytes")]
    pub file_handle: Vec<u8>,
    /// True if the open created the file.
    #[n(8)]
    pub created: bool,
    /// When, milliseconds since 1970; part of the resume key.
    #[n(9)]
    pub opened_ms: u64,
    /// Control's challenge.
    #[cbor(n(10), with = "minicbor::bytes")]
    pub challenge: [u8; 32],
    /// The bind secret, sealed.
    #[cbor(n(11), with = "minicbor::bytes")]
    pub sealed_secret: Vec<u8>,
    /// Its epoch.
    #[n(12)]
    pub epoch: u64,
    /// Hold time granted, milliseconds.
    #[n(13)]
    pub hold_ms: u64,
    /// Its class.
    #[n(14)]
    pub class: HoldClass,
    /// How the file looked when it was last known that nobody else had changed it unseen.
    #[n(15)]
    pub evidence: Evidence,
    /// True while it is detached.
    #[n(16)]
    pub detached: bool,
    /// True if `evidence` was taken after the open's last binding was gone: then any difference is another's doing.
    #[n(17)]
    pub baseline: bool,
    /// See [`Record::Marked`].
    #[n(18)]
    pub marked: bool,
    /// Its locks: owner number and lock.
    #[n(19)]
    pub locks: Vec<(u64, LockItem)>,
    /// Numbers of the latest changes of its locks that were executed.
    #[n(20)]
    pub sequences: Vec<u64>,
    /// Handles of bindings that outlived a resume: they count as current, whatever their epoch.
    #[n(21)]
    pub kept: Vec<HandleId>,
    /// True if it was resumed and its client may not know of that yet: `evidence`, `baseline` and `marked` are those of
    /// the time when it was detached, and go on.
    #[cbor(n(22), default)]
    pub unheard: bool,
    /// True while the file's old content is still to be discarded, as the request wants. Nobody has been answered yet: after a
    /// crash the open never was.
    #[cbor(n(23), default)]
    pub truncating: bool,
    /// What its locks mean, whatever the configuration says later; `None` if that is to be asked.
    #[n(24)]
    pub lock_mode: Option<LockMode>,
    /// The name that goes with the last open of the file: an earlier one, which is closed, asked for that.
    #[n(25)]
    pub remove: Option<(VolumeId, String)>,
    /// True if its hold time was over once, and its client may not know of that yet.
    #[cbor(n(26), default)]
    pub lapsed: bool,
}

/// Silent about challenge and sealed secret.
impl std::fmt::Debug for OpenRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenRecord")
            .field("open", &self.open)
            .field("principal", &self.principal)
            .field("identity", &self.identity)
            .field("epoch", &self.epoch)
            .field("detached", &self.detached)
            .finish_non_exhaustive()
    }
}

/// See [`Record::Resumed`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct ResumedRecord {
    /// The open.
    #[n(0)]
    pub open: OpenId,
    /// Its new epoch.
    #[n(1)]
    pub epoch: u64,
    /// Its new bind secret, sealed.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub sealed_secret: Vec<u8>,
    /// How the file looks now.
    #[n(3)]
    pub evidence: Evidence,
    /// See [`OpenRecord::kept`].
    #[n(4)]
    pub kept: Vec<HandleId>,
    /// Whether the answer says that the file was changed; `None` if it says nothing of that. Until [`Record::Heard`] the
    /// answer may be lost, and the next one must say no less.
    #[n(5)]
    pub changed: Option<bool>,
    /// Whether the answer says that the hold time was over. Until [`Record::Heard`] the next one must say it too.
    #[cbor(n(6), default)]
    pub lapsed: bool,
}

/// See [`Record::Locked`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct LockedRecord {
    /// The open.
    #[n(0)]
    pub open: OpenId,
    /// The request's number.
    #[n(1)]
    pub sequence: u64,
    /// The owner number.
    #[n(2)]
    pub owner: u64,
    /// The locks.
    #[n(3)]
    pub locks: Vec<LockItem>,
}

/// See [`Record::Unlocked`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct UnlockedRecord {
    /// The open.
    #[n(0)]
    pub open: OpenId,
    /// The request's number.
    #[n(1)]
    pub sequence: u64,
    /// The owner number.
    #[n(2)]
    pub owner: u64,
    /// The ranges.
    #[n(3)]
    pub ranges: Vec<LockRange>,
}

/// See [`Record::Tombstone`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct TombstoneRecord {
    /// The open that was.
    #[n(0)]
    pub open: OpenId,
    /// Who may ask.
    #[n(1)]
    pub principal: String,
    /// Why it is gone.
    #[n(2)]
    pub reason: GoneReason,
    /// On which volume.
    #[n(3)]
    pub volume: VolumeId,
    /// Which file.
    #[n(4)]
    pub identity: FileIdentity,
    /// See [`OpenRecord::file_handle`].
    #[cbor(n(5), with = "minicbor::bytes")]
    pub file_handle: Vec<u8>,
    /// Where it was.
    #[n(6)]
    pub path: String,
    /// How the file looked when nobody else had changed it yet; `None` if somebody may have.
    #[n(7)]
    pub evidence: Option<Evidence>,
}
