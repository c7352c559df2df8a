//! Link messages: what dataplane and control say to each other over their Unix socket, one message a packet.
//!
//! ```text
//!   dataplane                                control
//!      │ Register(service blob, n) ────────────► │
//!      │ Held(binding, open …) + descriptor, n × │  takes its opens back (SCM_RIGHTS)
//!      │ ◄───────────────────────── Registered   │
//!      │ Redeem(resume key, challenge, proof) ─► │  checks, duplicates
//!      │ ◄────── Redeemed + descriptor (SCM_RIGHTS)
//!      │ ◄──────────────────── Fence(binding)    │
//!      │ Fenced(binding) ──────────────────────► │  only now may a conflicting request be granted
//!      │ ◄───────────────── Restrict(open, rules)│  byte ranges which the open's I/O may not touch
//!      │ Restricted(open, version) ────────────► │  in force, and all I/O begun before has ended
//!      │ Released(binding) ────────────────────► │  the client unbound, or its channel ended
//! ```
//!
//! # When the link ends
//!
//! Either process may end, or only the socket between them. What holds then, for both sides:
//!
//! * I/O does not stop: dataplane lets its bindings go on, and refuses binds (`Unavailable`).
//! * Once dataplane can reach a control again it registers and tells every binding it has ([`ToControl::Held`]), each with
//!   its descriptor. What it does not tell of is gone: no I/O of it is under way, its descriptor is closed. The bindings go
//!   on meanwhile; nothing is bound before `Registered`.
//! * A new control takes the descriptors back, so that no open was ever closed, and fences what it does not know.
//! * Control counts bindings as gone when the process is proven dead, or a registration does not tell of them; until then
//!   opens keep their claims. No time limit turns silence into absence.
//! * Dataplane holds an exclusive flock on `dataplane.lock` beside the socket, from before its first registration until its
//!   process has ended. A control that starts and finds it held waits for its registration or its end before it accepts
//!   anybody; if it is free there is none.
//! * A grant whose descriptor the kernel dropped (no room in the process) is `Released` at once; the link stays.
//! * Fences and restrictions which the old control had asked for and whose confirmation it did not get, the new one asks for
//!   again where it still wants them.
//!
//! Control names bindings on the link by a number of its own ([`LinkBinding`]); the number in data frames is
//! dataplane's affair.

use crate::auth::{ChannelIdentity, MacPolicy};
use crate::types::{Access, HandleId, IoRule, OpenId, Status};
use minicbor::{Decode, Encode};

/// The version of these messages. Both processes come from one build, so it must be equal.
pub const VERSION: u8 = 5;

/// Opens that a registration may name as written by bindings that are gone.
pub const WROTE_MAX: usize = 1024;

/// A binding's number on the link, given by control; never used twice, by no later control either:
/// the upper half counts the starts of control.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Encode, Decode)]
#[cbor(transparent)]
pub struct LinkBinding(#[n(0)] pub u64);

/// From dataplane to control.
#[derive(Clone, PartialEq, Debug, Encode, Decode)]
pub enum ToControl {
    /// First message.
    #[n(0)]
    Register(#[n(0)] Register),
    /// A client's bind request, carried unread.
    #[n(1)]
    Redeem(#[n(0)] Redeem),
    /// The binding is fenced: no I/O of it is under way, none will begin, its descriptor is closed.
    #[n(2)]
    Fenced(#[n(0)] Fence),
    /// The binding ended by the client's wish or with its channel; its descriptor is closed.
    #[n(3)]
    Released(#[n(0)] LinkBinding),
    /// Answer to `GetGauges`.
    #[n(4)]
    Gauges(#[n(0)] Gauges),
    /// After `Register` only: a binding that lives; the packet carries its descriptor.
    #[n(5)]
    Held(#[n(0)] Held),
    /// Answer to `Restrict`: the rules are in force for every binding of the open, and all I/O of them that began before has
    /// ended. An open without bindings is answered at once.
    #[n(6)]
    Restricted(#[n(0)] Restricted),
    /// Answer to `Withdraw`, with its number: no byte of the file is served one-sided any more.
    #[n(7)]
    Withdrawn(#[n(0)] u64),
}

/// From control to dataplane.
#[derive(Clone, PartialEq, Debug, Encode, Decode)]
pub enum ToDataplane {
    /// Answer to `Register`.
    #[n(0)]
    Registered(#[n(0)] Registered),
    /// Answer to `Redeem`; with status `Ok` the packet carries one descriptor.
    #[n(1)]
    Redeemed(#[n(0)] Redeemed),
    /// Stop a binding's I/O and say so.
    #[n(2)]
    Fence(#[n(0)] Fence),
    /// Ask for gauges.
    #[n(3)]
    GetGauges(#[n(0)] u64),
    /// New rules for what the I/O of an open's bindings may touch; they replace the earlier ones.
    #[n(4)]
    Restrict(#[n(0)] Restrict),
    /// Bytes are about to be taken away from a file: withdraw what is mapped of it, say so, and map nothing of it until `Mappable`.
    #[n(5)]
    Withdraw(#[n(0)] Withdraw),
    /// The change that a `Withdraw` of this number came before has ended. [`MAPPABLE_AS_SAID`] follows a registration, behind
    /// all that is asked again: what was asked on earlier links and not again has ended.
    #[n(6)]
    Mappable(#[n(0)] u64),
}

/// See [`ToDataplane::Mappable`].
pub const MAPPABLE_AS_SAID: u64 = u64::MAX;

/// See [`ToDataplane::Withdraw`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Withdraw {
    /// Names it, until `Mappable`; of no other that this or an earlier control has sent.
    #[n(0)]
    pub id: u64,
    /// The file's device number.
    #[n(1)]
    pub device: u64,
    /// The file's inode number.
    #[n(2)]
    pub inode: u64,
}

/// See [`ToControl::Register`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Register {
    /// [`VERSION`].
    #[n(0)]
    pub version: u8,
    /// See [`crate::wire::service::ServiceBlob`].
    #[cbor(n(1), with = "minicbor::bytes")]
    pub service_blob: Vec<u8>,
    /// How many [`ToControl::Held`] follow.
    #[n(2)]
    pub held: u32,
    /// True if this process has never been registered before. It holds the lock on `dataplane.lock`, so then every earlier
    /// dataplane is dead.
    #[n(3)]
    pub first: bool,
    /// Opens whose bindings wrote and are gone, each once; at most [`WROTE_MAX`], those that ended last.
    #[n(4)]
    pub wrote: Vec<Wrote>,
    /// It maps ranges of files for one-sided reads: it wants to be told before bytes are taken away from one.
    #[n(5)]
    pub maps: bool,
}

/// An open of which a binding wrote that is gone: a change of its file up to then may have been its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Wrote {
    /// Which open.
    #[n(0)]
    pub open: OpenId,
    /// When its last write had returned, nanoseconds since 1970.
    #[n(1)]
    pub last_write_ns: u64,
}

/// See [`ToControl::Held`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Held {
    /// The number which the control of that time gave it.
    #[n(0)]
    pub binding: LinkBinding,
    /// Of which open.
    #[n(1)]
    pub open: OpenId,
    /// The handle.
    #[n(2)]
    pub handle: HandleId,
    /// The epoch it was granted in.
    #[n(3)]
    pub epoch: u64,
    /// Access granted.
    #[n(4)]
    pub access: Access,
    /// True if it is ending already: nothing new begins, and `Fenced` or `Released` follows.
    #[n(5)]
    pub ending: bool,
    /// When it last changed the file: after the change had returned, nanoseconds since 1970; 0 if never.
    #[n(6)]
    pub last_write_ns: u64,
    /// Version of the rules in force for its open; 0 if there are none.
    #[n(7)]
    pub rules_version: u64,
    /// The digest of the transcript it was granted for, so that it is not granted twice.
    #[cbor(n(8), with = "minicbor::bytes")]
    pub transcript: [u8; 32],
}

/// See [`ToDataplane::Restrict`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Restrict {
    /// The open.
    #[n(0)]
    pub open: OpenId,
    /// Rises with every change of an open's rules.
    #[n(1)]
    pub version: u64,
    /// Sorted and disjoint; empty to allow everything.
    #[n(2)]
    pub rules: Vec<IoRule>,
}

/// See [`ToControl::Restricted`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Restricted {
    /// The open.
    #[n(0)]
    pub open: OpenId,
    /// The version that is in force.
    #[n(1)]
    pub version: u64,
}

/// See [`ToDataplane::Registered`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Registered {
    /// `Ok`, or why not; then control ends the link.
    #[n(0)]
    pub status: Status,
}

/// See [`ToControl::Redeem`].
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct Redeem {
    /// Pairs the answer with the request.
    #[n(0)]
    pub id: u64,
    /// As the client sent it.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub resume_key: Vec<u8>,
    /// The client's challenge.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub client_challenge: [u8; 32],
    /// The nonce dataplane gave this channel for this bind.
    #[cbor(n(3), with = "minicbor::bytes")]
    pub server_nonce: [u8; 32],
    /// The client's proof.
    #[cbor(n(4), with = "minicbor::bytes")]
    pub proof: [u8; 32],
    /// What dataplane itself sees of the channel.
    #[n(5)]
    pub channel: ChannelIdentity,
    /// Access wanted.
    #[n(6)]
    pub access: Access,
    /// Policy the client named.
    #[n(7)]
    pub policy: MacPolicy,
    /// Where the client comes from, for the operator.
    #[n(8)]
    pub peer: String,
}

/// Silent about what the client shows to prove itself.
impl std::fmt::Debug for Redeem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redeem")
            .field("id", &self.id)
            .field("channel", &self.channel)
            .field("access", &self.access)
            .field("policy", &self.policy)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

/// See [`ToDataplane::Redeemed`].
#[derive(Clone, PartialEq, Debug, Encode, Decode)]
pub struct Redeemed {
    /// The request's number.
    #[n(0)]
    pub id: u64,
    /// What was granted, or why not.
    #[n(1)]
    pub result: RedeemResult,
}

/// See [`Redeemed`].
#[derive(Clone, PartialEq, Debug, Encode, Decode)]
pub enum RedeemResult {
    /// Refused.
    #[n(0)]
    Refused(#[n(0)] Status),
    /// Granted; the descriptor comes with the packet.
    #[n(1)]
    Granted(#[n(0)] Box<Grant>),
}

/// A granted bind.
#[derive(Clone, PartialEq, Debug, Encode, Decode)]
pub struct Grant {
    /// The binding's number on the link.
    #[n(0)]
    pub binding: LinkBinding,
    /// The open, for the operator.
    #[n(1)]
    pub open: OpenId,
    /// The new handle.
    #[n(2)]
    pub handle: HandleId,
    /// Fencing epoch.
    #[n(3)]
    pub epoch: u64,
    /// Access granted.
    #[n(4)]
    pub access: Access,
    /// Policy in force.
    #[n(5)]
    pub policy: MacPolicy,
    /// Control's proof, for the client to check.
    #[cbor(n(6), with = "minicbor::bytes")]
    pub proof: [u8; 32],
    /// The channel keys; secret.
    #[n(7)]
    pub keys: crate::auth::ChannelKeys,
    /// What its I/O may not touch, and the version of these rules (see [`Restrict`]); a later `Restrict` replaces them.
    #[n(8)]
    pub rules: Vec<IoRule>,
    /// See `rules`.
    #[n(9)]
    pub rules_version: u64,
    /// The digest of the transcript that was proven; handed back in [`Held`].
    #[cbor(n(10), with = "minicbor::bytes")]
    pub transcript: [u8; 32],
    /// A client on this host may be given the descriptor itself, over a local channel.
    #[n(11)]
    pub descriptor: bool,
    /// The volume's files are read and written past the page cache where they can be. With the descriptor comes a second one,
    /// of another description of the same file with the same access, opened for that; or none, where it can't be had. Nothing
    /// of the file may be pinned, or mapped: direct writes leave pinned pages behind.
    #[n(12)]
    pub direct: bool,
}

/// See [`ToDataplane::Fence`] and [`ToControl::Fenced`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Fence {
    /// The binding.
    #[n(0)]
    pub binding: LinkBinding,
    /// The epoch that ends.
    #[n(1)]
    pub epoch: u64,
    /// What the client is told.
    #[n(2)]
    pub reason: Status,
}

/// A named value, for the operator.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Gauge {
    /// Its name, `snake_case`, unit last.
    #[n(0)]
    pub name: String,
    /// Its value.
    #[n(1)]
    pub value: u64,
}

/// See [`ToControl::Gauges`].
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Gauges {
    /// The request's number.
    #[n(0)]
    pub id: u64,
    /// All gauges.
    #[n(1)]
    pub gauges: Vec<Gauge>,
}
