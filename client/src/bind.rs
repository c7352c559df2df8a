//! Binding: proving the resume key on a channel, and checking that the server is the one that issued it.
//!
//! ```text
//!   client                                             server (dataplane carries, control decides)
//!     │ ◄───────────────────────────── Hello{nonce}      │
//!     │ Bind{challenge, proof_c over transcript} ──────► │
//!     │ ◄── BindReply{handle, epoch, proof_s, next nonce}│
//!     │ checks proof_s over transcript and answer; only then derives the channel keys
//! ```
//!
//! Every attempt uses the nonce up, so binds on one channel take turns.

use crate::channel::Shared;
use crate::channel::request::{Done, Purpose, Request};
use crate::error::{Ended, Error, Result};
use crate::handed::HandedFile;
use holdfast_shared::auth::{BindAnswer, BindSecret, BindTranscript, FrameKey, MacPolicy, PayloadKey};
use holdfast_shared::types::{Access, HandleId, Status, VolumeId};
use holdfast_shared::wire::data;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::OwnedSemaphorePermit;

/// What a bind needs to know of the open.
pub(crate) struct BindRequest<'a> {
    pub(crate) resume_key: &'a [u8],
    pub(crate) open_challenge: &'a [u8; 32],
    pub(crate) volume: VolumeId,
    pub(crate) policy: MacPolicy,
    pub(crate) access: Access,
    pub(crate) secret: &'a BindSecret,
}

/// Kept with the request until its reply comes.
pub(crate) struct BindWait {
    secret: BindSecret,
    transcript: [u8; 32],
    access: Access,
    policy: MacPolicy,
    /// The right to bind: the next one may begin when this reply has brought the next nonce.
    _turn: OwnedSemaphorePermit,
}

/// A live binding as the channel knows it: its number and keys. No Debug: it holds keys.
pub(crate) struct BindingCore {
    pub(crate) number: u32,
    pub(crate) handle: HandleId,
    pub(crate) epoch: u64,
    pub(crate) access: Access,
    pub(crate) policy: MacPolicy,
    pub(crate) verifier: u64,
    pub(crate) to_server: FrameKey,
    pub(crate) to_client: FrameKey,
    pub(crate) payload_to_server: PayloadKey,
    pub(crate) payload_to_client: PayloadKey,
    /// Why it was fenced; [`Status::Ok`] while it was not.
    fenced: AtomicU16,
    /// Its channel ended while a write had no answer: that may still be carried out.
    write_unanswered: AtomicBool,
    /// Its channel has ended.
    ended: AtomicBool,
    /// The file itself, if the server gave it; see [`crate::handed`].
    pub(crate) file: OnceLock<HandedFile>,
}

impl BindingCore {
    /// Marks it as fenced; the first reason stays.
    pub(crate) fn fence(&self, reason: Status) {
        let ok = Status::Ok.number();
        let _ = self.fenced.compare_exchange(ok, reason.number(), Ordering::AcqRel, Ordering::Acquire);
    }

    /// Notes that the channel has ended before a write of this binding was answered, whoever waited for it.
    pub(crate) fn write_is_unanswered(&self) {
        self.write_unanswered.store(true, Ordering::Release);
    }

    /// True if there is such a write.
    pub(crate) fn has_unanswered_write(&self) -> bool {
        self.write_unanswered.load(Ordering::Acquire)
    }

    /// Notes that the channel has ended.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// True if the channel has ended, or the binding was given back.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// The file itself, if the server gave it and the binding is of use.
    pub(crate) fn handed(&self) -> Option<&HandedFile> {
        let file = self.file.get()?;
        let live = !self.has_ended() && self.fenced().is_none();
        live.then_some(file)
    }

    /// Why it was fenced, if it was.
    pub(crate) fn fenced(&self) -> Option<Status> {
        Status::from_number(self.fenced.load(Ordering::Acquire)).filter(|status| *status != Status::Ok)
    }
}

/// Binds, and returns the new binding. A caller that goes away leaves a binding that is given back by itself.
pub(crate) async fn bind(channel: &Arc<Shared>, request: &BindRequest<'_>) -> Result<Arc<BindingCore>> {
    let turn = Arc::clone(&channel.bind_turn).acquire_owned().await.map_err(|_| channel.ended())?;
    let challenge = crate::random()?;
    let server_nonce = channel.nonce();
    let transcript = BindTranscript {
        channel: &channel.identity,
        server_nonce: &server_nonce,
        open_challenge: request.open_challenge,
        client_challenge: &challenge,
        resume_key: request.resume_key,
        volume: request.volume,
        access: request.access,
        policy: request.policy,
    }
    .digest();
    let body = data::Bind {
        challenge,
        proof: request.secret.client_proof(&transcript),
        access: request.access.bits(),
        policy: request.policy.number(),
        reserved: [0; 6],
    };
    let wait = BindWait {
        secret: request.secret.clone(),
        transcript,
        access: request.access,
        policy: request.policy,
        _turn: turn,
    };
    let request = Request::Bind { body: &body, resume_key: request.resume_key };
    match channel.submit(None, request, Purpose::Bind(Box::new(wait))).await?.outcome().await? {
        Done::Bound(core) => Ok(core),
        Done::Counted(_) | Done::Mapped(_) | Done::Descriptor(_) => {
            Err(Error::Internal("a bind was answered as a read"))
        }
    }
}

impl BindWait {
    /// Checks the server's answer. `number` is the binding's, from the frame's header.
    pub(crate) fn answer(
        &self,
        number: u32,
        reply: &data::BindReply,
    ) -> std::result::Result<BindingCore, Ended> {
        let (Some(access), Some(policy)) =
            (Access::from_bits(reply.access), MacPolicy::from_number(reply.policy))
        else {
            return Err(Ended::Misbehaved("a bind reply with unknown rights or policy"));
        };
        let answer = BindAnswer { handle: HandleId(reply.handle), epoch: reply.epoch.get(), access, policy };
        let answered = answer.digest(&self.transcript);
        if !self.secret.server_proof_is_right(&answered, &reply.proof) {
            return Err(Ended::BadProof);
        }
        // Proven to come from control, but still not what was asked for.
        if policy != self.policy || !self.access.contains(access) || number == 0 {
            return Err(Ended::Misbehaved("a bind reply that grants something else"));
        }
        let keys = self.secret.channel_keys(&answered);
        Ok(BindingCore {
            number,
            handle: answer.handle,
            epoch: answer.epoch,
            access,
            policy,
            verifier: reply.verifier.get(),
            to_server: FrameKey::new(&keys.to_server, policy),
            to_client: FrameKey::new(&keys.to_client, policy),
            payload_to_server: PayloadKey::new(&keys.to_server, policy),
            payload_to_client: PayloadKey::new(&keys.to_client, policy),
            fenced: AtomicU16::new(Status::Ok.number()),
            write_unanswered: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            file: OnceLock::new(),
        })
    }
}
