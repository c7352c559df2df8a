//! Frames that go out: hello, bind reply, reply, notice.
//!
//! A frame gets its sequence number when it is submitted, never earlier: what is submitted goes out in that order.

use super::CREDITS_UNBOUND;
use super::binding::BindingRef;
use super::channel::{Conn, Cx, Token};
use holdfast_shared::auth::FrameKey;
use holdfast_shared::types::{Access, HandleId, INLINE_BYTES_MAX, Status};
use holdfast_shared::wire::WireError;
use holdfast_shared::wire::data::{BindReply, Hello, Notice, Opcode, Reply, TAG_BYTES, Writer};
use holdfast_transport::Operation;
use holdfast_verbs::memory::Buffer;
use std::os::fd::OwnedFd;

/// A frame that is no answer to a read, write, flush or unbind.
#[derive(Clone, Debug)]
pub(crate) enum Rare {
    Hello,
    BindReply {
        request: u32,
        answer: BindAnswered,
    },
    /// About a binding.
    Notice {
        binding: BindingRef,
        reason: Status,
    },
    /// The last frame of a channel.
    End(Status),
}

/// What a bind came to.
#[derive(Clone, Debug)]
pub(crate) enum BindAnswered {
    Refused(Status),
    Granted {
        number: u32,
        handle: HandleId,
        epoch: u64,
        access: Access,
        policy: u8,
        proof: [u8; 32],
        key: FrameKey,
    },
}

impl Conn {
    /// Sends a rare frame if there is room; false if it has to wait.
    pub(crate) fn send_rare(&mut self, cx: &mut Cx, rare: &Rare) -> bool {
        if self.ops + 1 > self.depth || self.send_buffers.is_empty() {
            return false;
        }
        let unkeyed = FrameKey::unkeyed();
        match rare {
            Rare::Hello => {
                let (limits, config) = (&cx.settings.limits, &cx.settings.engine);
                let sealed =
                    config.buffer_bytes.min(self.transfer_max).min(limits.transfer_bytes_max as usize);
                let hello = Hello {
                    nonce: self.nonce,
                    instance: cx.settings.instance,
                    credits: CREDITS_UNBOUND.into(),
                    bindings_max: limits.bindings_max.into(),
                    inline_max: u32::try_from(INLINE_BYTES_MAX).unwrap_or(u32::MAX).into(),
                    transfer_max: limits.transfer_bytes_max.into(),
                    sealed_transfer_max: u32::try_from(sealed).unwrap_or(u32::MAX).into(),
                    mappings_max: self.mappings_max(cx).into(),
                    reserved: [0; 12],
                };
                self.send_frame(cx, Token::Send, |bytes, sequence| {
                    let mut w = Writer::new(bytes, Opcode::Hello, 0, 0, 0, sequence)?;
                    w.body(&hello)?;
                    Ok(w.finish(|covered, mac| unkeyed.sign(covered, mac)))
                });
            }
            Rare::BindReply { request, answer } => {
                let mut body = BindReply {
                    status: Status::Ok.number().into(),
                    credits: 0.into(),
                    access: 0,
                    policy: 0,
                    reserved: [0; 2],
                    handle: [0; 16],
                    epoch: 0.into(),
                    proof: [0; 32],
                    nonce: self.nonce,
                    verifier: 0.into(),
                    reserved2: [0; 8],
                };
                // The frame of a granted bind names the new binding and is signed with its key: the client checks the
                // proof, derives the key from what was proven, and then knows that the rest is right too.
                let (binding, key) = match answer {
                    BindAnswered::Refused(status) => {
                        body.status.set(status.number());
                        (0, &unkeyed)
                    }
                    BindAnswered::Granted { number, handle, epoch, access, policy, proof, key } => {
                        body.credits.set(self.credits);
                        body.access = access.bits();
                        body.policy = *policy;
                        body.handle = handle.0;
                        body.epoch.set(*epoch);
                        body.proof = *proof;
                        body.verifier.set(cx.settings.verifier);
                        (*number, key)
                    }
                };
                self.send_frame(cx, Token::Send, |bytes, sequence| {
                    let mut w = Writer::new(bytes, Opcode::BindReply, 0, binding, *request, sequence)?;
                    w.body(&body)?;
                    Ok(w.finish(|covered, mac| key.sign(covered, mac)))
                });
                self.in_flight = self.in_flight.saturating_sub(1);
            }
            Rare::Notice { binding, reason } => {
                let Some(binding) = self.bindings.get(*binding) else { return true };
                let (number, key) = (binding.number, binding.to_client.clone());
                self.send_notice(cx, Token::Send, number, &key, *reason);
            }
            Rare::End(reason) => self.send_notice(cx, Token::End, 0, &unkeyed, *reason),
        }
        true
    }

    fn send_notice(&mut self, cx: &mut Cx, token: Token, binding: u32, key: &FrameKey, reason: Status) {
        self.send_frame(cx, token, |bytes, sequence| {
            let mut w = Writer::new(bytes, Opcode::Notice, 0, binding, 0, sequence)?;
            w.body(&Notice { status: reason.number().into(), reserved: [0; 6] })?;
            Ok(w.finish(|covered, mac| key.sign(covered, mac)))
        });
    }

    /// Answers a request. There must be room. A request without a known binding is answered under binding 0.
    pub(crate) fn send_reply(
        &mut self,
        cx: &mut Cx,
        binding: Option<BindingRef>,
        request: u32,
        status: Status,
        count: u32,
        digest: Option<&[u8; TAG_BYTES]>,
    ) {
        self.send_reply_with(cx, binding, request, status, count, digest, None);
    }

    /// As [`Conn::send_reply`], with a descriptor for the peer.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn send_reply_with(
        &mut self,
        cx: &mut Cx,
        binding: Option<BindingRef>,
        request: u32,
        status: Status,
        count: u32,
        digest: Option<&[u8; TAG_BYTES]>,
        descriptor: Option<OwnedFd>,
    ) {
        let body = Reply {
            status: status.number().into(),
            credits: 1.into(),
            count: count.into(),
            verifier: cx.settings.verifier.into(),
        };
        let unkeyed = FrameKey::unkeyed();
        let Some(mut buffer) = self.send_buffers.pop() else {
            self.abort(cx, "no send buffer: our own fault");
            return;
        };
        let binding = binding.and_then(|name| self.bindings.get(name));
        let (number, key) = binding.map_or((0, &unkeyed), |binding| (binding.number, &binding.to_client));
        let built = (|| {
            let mut w = Writer::new(&mut buffer, Opcode::Reply, 0, number, request, self.send_sequence)?;
            w.body(&body)?;
            if let Some(digest) = digest {
                w.digest(digest)?;
            }
            Ok(w.finish(|covered, mac| key.sign(covered, mac)))
        })();
        self.submit_frame_with(cx, Token::Send, buffer, built, descriptor);
    }

    fn send_frame(
        &mut self,
        cx: &mut Cx,
        token: Token,
        build: impl FnOnce(&mut [u8], u64) -> Result<usize, WireError>,
    ) {
        let Some(mut buffer) = self.send_buffers.pop() else {
            self.abort(cx, "no send buffer: our own fault");
            return;
        };
        let built = build(&mut buffer, self.send_sequence);
        self.submit_frame(cx, token, buffer, built);
    }

    pub(super) fn submit_frame(
        &mut self,
        cx: &mut Cx,
        token: Token,
        buffer: Buffer,
        built: Result<usize, WireError>,
    ) {
        self.submit_frame_with(cx, token, buffer, built, None);
    }

    fn submit_frame_with(
        &mut self,
        cx: &mut Cx,
        token: Token,
        buffer: Buffer,
        built: Result<usize, WireError>,
        descriptor: Option<OwnedFd>,
    ) {
        match (built, descriptor) {
            (Ok(length), None) => {
                self.send_sequence += 1;
                self.submit(cx, token, Operation::Send { buffer, length });
            }
            (Ok(length), Some(descriptor)) => {
                self.send_sequence += 1;
                self.submit_descriptor(cx, token, buffer, length, descriptor);
            }
            (Err(error), _) => {
                debug_assert!(false, "a frame of ours is not valid: {error}");
                tracing::error!(%error, "a frame of ours is not valid");
                self.send_buffers.push(buffer);
                self.abort(cx, "our own fault");
            }
        }
    }
}
