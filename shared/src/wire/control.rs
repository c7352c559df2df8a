//! Control messages: what a client and control say to each other inside TLS.
//!
//! Each message is a u32 little-endian length (at most [`CONTROL_MESSAGE_BYTES_MAX`]) and one CBOR array. A client
//! may have several requests under way; the id pairs answers with them. The first request of a session is
//! [`Request::Hello`].

use crate::auth::MacPolicy;
use crate::types::{
    Access, ByteRange, CreateId, Disposition, FileTime, GoneReason, HandleId, HoldClass, LockItem, LockRange,
    OpenId, ProcessId, SessionId, ShareMode, Status, Verdict, VolumeId,
};
use minicbor::{Decode, Encode};

pub use crate::types::CONTROL_MESSAGE_BYTES_MAX;

/// The version of these messages.
pub const VERSION: u8 = 1;

/// A request and its number.
#[derive(Clone, PartialEq, Debug, Encode, Decode)]
pub struct RequestMessage {
    /// Chosen by the client; echoed in the answer.
    #[n(0)]
    pub id: u64,
    /// What is asked.
    #[n(1)]
    pub request: Request,
}

/// An answer and the number of its request.
#[derive(Clone, PartialEq, Debug, Encode, Decode)]
pub struct ReplyMessage {
    /// The request's number.
    #[n(0)]
    pub id: u64,
    /// The answer.
    #[n(1)]
    pub reply: Reply,
}

/// A file, by an open of this session or by its place in a volume.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub enum Target {
    /// An open of this session.
    #[n(0)]
    Open(#[n(0)] OpenId),
    /// A path. A symbolic link at its end is not followed.
    #[n(1)]
    Path(#[n(0)] Place),
}

/// A path in a volume.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Place {
    /// The volume's name.
    #[n(0)]
    pub volume: String,
    /// The path inside it, from its root; empty for the root.
    #[n(1)]
    pub path: String,
}

/// What a client asks of control.
#[derive(Clone, PartialEq, Debug, Encode, Decode)]
pub enum Request {
    /// First request of a session.
    #[n(0)]
    Hello(#[n(0)] Hello),
    /// Open a file.
    #[n(1)]
    Open(#[n(0)] Open),
    /// Ask again for the resume key of an open.
    #[n(2)]
    QueryKey(#[n(0)] OpenId),
    /// Close an open and all its handles.
    #[n(3)]
    Close(#[n(0)] OpenId),
    /// Read attributes.
    #[n(4)]
    GetAttributes(#[n(0)] Target),
    /// Change attributes; those absent stay.
    #[n(5)]
    SetAttributes(#[n(0)] SetAttributes),
    /// List a directory, a page at a time.
    #[n(6)]
    List(#[n(0)] List),
    /// Make a directory.
    #[n(7)]
    MakeDirectory(#[n(0)] MakeDirectory),
    /// Remove a file, symbolic link or empty directory.
    #[n(8)]
    Remove(#[n(0)] Place),
    /// Rename within one volume; an existing file at the new place is replaced.
    #[n(9)]
    Rename(#[n(0)] Rename),
    /// Size and room of a volume.
    #[n(10)]
    VolumeStatus(#[n(0)] VolumeName),
    /// The volumes this principal may use.
    #[n(11)]
    Volumes,
    /// Make a symbolic link. Its text is kept as given; where it leads out of the volume, using it is refused.
    #[n(12)]
    MakeSymlink(#[n(0)] MakeSymlink),
    /// Read a symbolic link's text.
    #[n(13)]
    ReadSymlink(#[n(0)] Place),
    /// Nothing: keeps the connection alive and measures it.
    #[n(14)]
    Ping,
    /// Take a detached open over, into this session.
    #[n(15)]
    Resume(#[n(0)] Resume),
    /// Lock byte ranges: all of them, or none.
    #[n(16)]
    Lock(#[n(0)] Lock),
    /// Unlock byte ranges: all of them, or none.
    #[n(17)]
    Unlock(#[n(0)] Unlock),
    /// Stop waiting for locks. The waiting request is answered `Cancelled`, or was granted just before.
    #[n(18)]
    CancelLock(#[n(0)] CancelLock),
    /// End the session and close its opens: nothing is held for it.
    #[n(19)]
    Logoff,
}

/// See [`Request::Hello`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Hello {
    /// Lowest version of these messages the client speaks.
    #[n(0)]
    pub version_min: u8,
    /// Highest.
    #[n(1)]
    pub version_max: u8,
    /// Words for the operator: program, host.
    #[n(2)]
    pub client: String,
    /// The process id that the session's opens carry unless they say otherwise.
    #[n(3)]
    pub process: ProcessId,
}

/// See [`Request::Open`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Open {
    /// Fresh for each new open; the same again when a request is repeated because its answer was lost.
    #[n(0)]
    pub create_id: CreateId,
    /// Where.
    #[n(1)]
    pub place: Place,
    /// What the client wants.
    #[n(2)]
    pub access: Access,
    /// What it lets others have.
    #[n(3)]
    pub share: ShareMode,
    /// What to do when the file exists, or not.
    #[n(4)]
    pub disposition: Disposition,
    /// Permission bits of a created file (`mode & 0o7777`), without set-id bits.
    #[n(5)]
    pub mode: u32,
    /// Hold time asked for, milliseconds; `None` for the volume's default.
    #[n(6)]
    pub hold_ms: Option<u64>,
    /// What protects the open while it is detached.
    #[n(7)]
    pub class: HoldClass,
    /// How long to wait for a detached open that is in the way, milliseconds; `None` to be refused at once.
    #[n(8)]
    pub wait_ms: Option<u64>,
    /// Remove the name when the last open of the file that asked for this, and every other, is closed. Needs delete access.
    #[n(9)]
    pub delete_on_close: bool,
    /// The process that opens; `None` for the session's.
    #[n(10)]
    pub process: Option<ProcessId>,
}

/// See [`Request::Resume`]. Access, share mode and file are those of the open, whatever the client believes.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct Resume {
    /// As it was issued with the open.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub resume_key: Vec<u8>,
    /// The session that had the open, if the open may still be live there: that session ends first. Without it, a live
    /// open is `Busy`.
    #[n(1)]
    pub supersede: Option<SessionId>,
    /// Handles of bindings which this client still holds and uses: they stay. Every other binding is fenced before the
    /// answer.
    #[n(2)]
    pub keep: Vec<HandleId>,
}

/// Silent about the resume key.
impl std::fmt::Debug for Resume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resume")
            .field("supersede", &self.supersede)
            .field("keep", &self.keep)
            .finish_non_exhaustive()
    }
}

/// See [`Request::Lock`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Lock {
    /// The open.
    #[n(0)]
    pub open: OpenId,
    /// Number of this change of the open's locks, from 1, each one higher than the last; the same again when the request
    /// is repeated because its answer was lost.
    #[n(1)]
    pub sequence: u64,
    /// The owner number; with the open's process it names the lock owner.
    #[n(2)]
    pub owner: u64,
    /// What to lock. At least one.
    #[n(3)]
    pub locks: Vec<LockItem>,
    /// How long to wait for locks in the way, milliseconds; `None` to be refused at once.
    #[n(4)]
    pub wait_ms: Option<u64>,
}

/// See [`Request::Unlock`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Unlock {
    /// The open.
    #[n(0)]
    pub open: OpenId,
    /// As in [`Lock`]; one row of numbers for both.
    #[n(1)]
    pub sequence: u64,
    /// The owner number.
    #[n(2)]
    pub owner: u64,
    /// What to unlock. At least one.
    #[n(3)]
    pub ranges: Vec<LockRange>,
}

/// See [`Request::CancelLock`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct CancelLock {
    /// The open.
    #[n(0)]
    pub open: OpenId,
    /// Number of the waiting lock request.
    #[n(1)]
    pub sequence: u64,
}

/// See [`Request::SetAttributes`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct SetAttributes {
    /// Of which file.
    #[n(0)]
    pub target: Target,
    /// New size, bytes. Needs write access.
    #[n(1)]
    pub size: Option<u64>,
    /// New permission bits.
    #[n(2)]
    pub mode: Option<u32>,
    /// New access time.
    #[n(3)]
    pub accessed: Option<FileTime>,
    /// New modification time.
    #[n(4)]
    pub modified: Option<FileTime>,
}

/// See [`Request::List`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct List {
    /// The directory.
    #[n(0)]
    pub place: Place,
    /// Empty for the first page, then the last answer's `next`.
    #[n(1)]
    pub after: String,
}

/// See [`Request::MakeDirectory`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct MakeDirectory {
    /// Where.
    #[n(0)]
    pub place: Place,
    /// Permission bits.
    #[n(1)]
    pub mode: u32,
}

/// See [`Request::Rename`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Rename {
    /// What.
    #[n(0)]
    pub from: Place,
    /// To where, in the same volume.
    #[n(1)]
    pub to: Place,
    /// Refuse instead of replacing.
    #[n(2)]
    pub no_replace: bool,
}

/// See [`Request::VolumeStatus`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct VolumeName {
    /// The volume.
    #[n(0)]
    pub volume: String,
}

/// See [`Request::MakeSymlink`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct MakeSymlink {
    /// Where the link stands.
    #[n(0)]
    pub place: Place,
    /// Its text.
    #[n(1)]
    pub text: String,
}

/// What control answers.
#[derive(Clone, PartialEq, Debug, Encode, Decode)]
pub enum Reply {
    /// Refused.
    #[n(0)]
    Refused(#[n(0)] Refusal),
    /// Done, and there is nothing to tell.
    #[n(1)]
    Done,
    /// To `Hello`.
    #[n(2)]
    Welcome(#[n(0)] Welcome),
    /// To `Open`.
    #[n(3)]
    Opened(#[n(0)] Opened),
    /// To `QueryKey`.
    #[n(4)]
    Key(#[n(0)] KeyGrant),
    /// To `GetAttributes` and `SetAttributes`.
    #[n(5)]
    Attributes(#[n(0)] Attributes),
    /// To `List`.
    #[n(6)]
    Entries(#[n(0)] Entries),
    /// To `VolumeStatus`.
    #[n(7)]
    VolumeStatus(#[n(0)] VolumeStatus),
    /// To `Volumes`.
    #[n(8)]
    Volumes(#[n(0)] Vec<VolumeInfo>),
    /// To `ReadSymlink`.
    #[n(9)]
    Symlink(#[n(0)] String),
    /// To `Resume`: the open was kept.
    #[n(10)]
    Resumed(#[n(0)] Resumed),
    /// To `Resume`: the open is gone, and its key is dead.
    #[n(11)]
    Gone(#[n(0)] Gone),
}

/// Why a request was refused.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Refusal {
    /// The reason, from the closed set.
    #[n(0)]
    pub status: Status,
    /// Words for a person; no secret, no path outside the volume.
    #[n(1)]
    pub detail: String,
    /// When trying again may help, milliseconds.
    #[n(2)]
    pub retry_ms: Option<u64>,
}

/// See [`Reply::Welcome`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Welcome {
    /// The version spoken from now on.
    #[n(0)]
    pub version: u8,
    /// This session.
    #[n(1)]
    pub session: SessionId,
    /// The principal as the server read it from the certificate.
    #[n(2)]
    pub principal: String,
    /// Opens one session may have.
    #[n(3)]
    pub opens_max: u32,
}

/// See [`Reply::Opened`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Opened {
    /// The open.
    #[n(0)]
    pub open: OpenId,
    /// The control handle of it.
    #[n(1)]
    pub handle: HandleId,
    /// Access granted: what was asked.
    #[n(2)]
    pub access: Access,
    /// True if this request (or the one it repeats) created the file.
    #[n(3)]
    pub created: bool,
    /// Hold time granted, milliseconds.
    #[n(4)]
    pub hold_ms: u64,
    /// The file's attributes.
    #[n(5)]
    pub attributes: Attributes,
    /// What a data channel needs.
    #[n(6)]
    pub key: KeyGrant,
    /// Its class.
    #[n(7)]
    pub class: HoldClass,
    /// Its epoch: rises with every resume.
    #[n(8)]
    pub epoch: u64,
}

/// See [`Reply::Resumed`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Resumed {
    /// The open: id, access, hold time and all else as they were stored; the handle and the key grant are new, and the bind
    /// secret is now the one of this session.
    #[n(0)]
    pub opened: Opened,
    /// Whether the file is unchanged.
    #[n(1)]
    pub verdict: Verdict,
    /// True if the open's locks, if it had any, protected it all the while: false once the hold time was over.
    #[n(2)]
    pub locks_kept: bool,
    /// The bindings that stay, of those the client wanted to keep.
    #[n(3)]
    pub kept: Vec<HandleId>,
    /// The highest number of a change of locks that was executed; 0 if none.
    #[n(4)]
    pub lock_sequence: u64,
    /// Its share mode.
    #[n(5)]
    pub share: ShareMode,
}

/// See [`Reply::Gone`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Gone {
    /// Why.
    #[n(0)]
    pub reason: GoneReason,
    /// True if the file was changed since the open was detached, or if that can't be known.
    #[n(1)]
    pub changed: bool,
}

/// What a client needs to bind: resume key, service blob, challenge.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct KeyGrant {
    /// Opaque. Travels inside TLS only.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub resume_key: Vec<u8>,
    /// See [`crate::wire::service::ServiceBlob`]; empty while no data plane is registered.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub service_blob: Vec<u8>,
    /// Control's challenge for this open; part of every bind's transcript.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub challenge: [u8; 32],
    /// The volume; part of the transcript.
    #[n(3)]
    pub volume: VolumeId,
    /// The volume's MAC policy; part of the transcript, so that it cannot be lowered on the way.
    #[n(4)]
    pub policy: MacPolicy,
}

/// Silent about the resume key: whoever has it needs only the session's secret to bind.
impl std::fmt::Debug for KeyGrant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyGrant")
            .field("volume", &self.volume)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

/// What kind of thing a name stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
#[cbor(index_only)]
pub enum FileKind {
    /// A regular file.
    #[n(0)]
    File,
    /// A directory.
    #[n(1)]
    Directory,
    /// A symbolic link.
    #[n(2)]
    Symlink,
    /// Anything else: listed, never opened.
    #[n(3)]
    Other,
}

/// Attributes of a file.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Attributes {
    /// What it is.
    #[n(0)]
    pub kind: FileKind,
    /// Size, bytes.
    #[n(1)]
    pub size: u64,
    /// Bytes allocated on disk.
    #[n(2)]
    pub allocated: u64,
    /// Permission bits.
    #[n(3)]
    pub mode: u32,
    /// Inode number in the volume's file system.
    #[n(4)]
    pub inode: u64,
    /// Hard links.
    #[n(5)]
    pub links: u64,
    /// Last access.
    #[n(6)]
    pub accessed: FileTime,
    /// Last change of content.
    #[n(7)]
    pub modified: FileTime,
    /// Last change of attributes.
    #[n(8)]
    pub changed: FileTime,
    /// Owner on the server.
    #[n(9)]
    pub uid: u32,
    /// Group on the server.
    #[n(10)]
    pub gid: u32,
}

/// A page of a directory.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Entries {
    /// In byte order of their names.
    #[n(0)]
    pub entries: Vec<Entry>,
    /// Where the next page begins; `None` at the end.
    #[n(1)]
    pub next: Option<String>,
}

/// One name in a directory.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Entry {
    /// The name.
    #[n(0)]
    pub name: String,
    /// Its attributes.
    #[n(1)]
    pub attributes: Attributes,
}

/// Size and room of a volume's file system.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct VolumeStatus {
    /// Bytes in all.
    #[n(0)]
    pub bytes_total: u64,
    /// Bytes an ordinary writer may still use.
    #[n(1)]
    pub bytes_available: u64,
    /// Files in all (0 if the file system has no such limit).
    #[n(2)]
    pub files_total: u64,
    /// Files that may still be made.
    #[n(3)]
    pub files_available: u64,
    /// Preferred block size, bytes.
    #[n(4)]
    pub block_size: u32,
}

/// A volume as one principal sees it.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct VolumeInfo {
    /// Its name.
    #[n(0)]
    pub name: String,
    /// True if this principal may write.
    #[n(1)]
    pub writable: bool,
    /// Its MAC policy.
    #[n(2)]
    pub policy: MacPolicy,
}

/// True if a size is one a file can have.
pub fn size_is_valid(size: u64) -> bool {
    ByteRange::new(0, size).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{from_cbor, to_cbor};

    #[test]
    fn a_resume_key_is_not_shown() {
        let grant = KeyGrant {
            resume_key: vec![0xAB; 102],
            service_blob: Vec::new(),
            challenge: [0xAC; 32],
            volume: VolumeId([1; 16]),
            policy: MacPolicy::Header,
        };
        let shown = format!("{grant:?}");
        assert!(shown.contains("Header") && !shown.contains("171") && !shown.contains("172"), "{shown}");
    }

    #[test]
    fn requests_survive_the_wire_and_keep_their_numbers() {
        let request = RequestMessage {
            id: 5,
            request: Request::Open(Open {
                create_id: CreateId([1; 16]),
                place: Place { volume: "data".into(), path: "a/b".into() },
                access: Access::READ,
                share: ShareMode::ALL,
                disposition: Disposition::CreateNew,
                mode: 0o644,
                hold_ms: None,
                class: HoldClass::Hold,
                wait_ms: None,
                delete_on_close: false,
                process: None,
            }),
        };
        let bytes = to_cbor(&request);
        assert_eq!(from_cbor::<RequestMessage>(&bytes, 1000).unwrap(), request);
        // Golden: array of [id, [1, [open fields]]].
        assert_eq!(&bytes[..6], &[0x82, 0x05, 0x82, 0x01, 0x81, 0x8a], "{bytes:02x?}");
        assert!(
            from_cbor::<RequestMessage>(&[bytes.as_slice(), &[0]].concat(), 1000).is_err(),
            "bytes after the end"
        );
        assert!(from_cbor::<RequestMessage>(&bytes, 10).is_err(), "too long");
    }
}
