//! What the server sends: form, sequence and MAC are checked before anything of it is believed.

use super::request::{Done, Failure, Granted, Purpose};
use super::state::State;
use super::{COVERED_TRANSFER_MAX, Facts, TRANSFER_MAX};
use crate::error::Ended;
use holdfast_shared::auth::FrameKey;
use holdfast_shared::types::Status;
use holdfast_shared::wire::data::{BindReply, Body, Frame, Hello, Mapped, Notice, Reply};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::sync::Semaphore;

type Checked<T = ()> = Result<T, Ended>;

fn status(number: u16) -> Checked<Status> {
    Status::from_number(number).ok_or(Ended::Misbehaved("an unknown status"))
}

impl State {
    /// Takes one frame, and the descriptor that came with it; an error ends the channel.
    pub(super) fn receive(
        &mut self,
        bytes: &[u8],
        descriptor: Option<OwnedFd>,
        credits: &Semaphore,
    ) -> Checked {
        let frame = Frame::parse(bytes).map_err(|_| Ended::Misbehaved("a frame that cannot be read"))?;
        if frame.header.sequence.get() != self.received {
            return Err(Ended::BadMac);
        }
        self.received += 1;
        match frame.body {
            Body::Hello(hello) => self.hello(&frame, hello),
            _ if self.hello.is_none() => Err(Ended::Misbehaved("a frame before the hello")),
            Body::BindReply(reply) => self.bind_reply(&frame, reply, credits),
            Body::Reply(reply) => self.reply(&frame, reply, descriptor, credits),
            Body::Mapped(mapped) => self.mapped(&frame, mapped, credits),
            Body::Notice(notice) => self.notice(&frame, notice),
            _ => Err(Ended::Misbehaved("a request from the server")),
        }
    }

    fn hello(&mut self, frame: &Frame<'_>, hello: &Hello) -> Checked {
        if self.hello.is_some() || frame.header.binding.get() != 0 || !FrameKey::unkeyed().verify(frame) {
            return Err(Ended::Misbehaved("a hello out of place"));
        }
        let (transfer_max, sealed_transfer_max) = (hello.transfer_max.get(), hello.sealed_transfer_max.get());
        if hello.credits.get() == 0 || transfer_max == 0 || sealed_transfer_max == 0 {
            return Err(Ended::Misbehaved("a hello that allows nothing"));
        }
        let facts = Facts {
            instance: hello.instance,
            inline_max: hello.inline_max.get() as usize,
            transfer_max: transfer_max.min(TRANSFER_MAX),
            sealed_transfer_max: sealed_transfer_max.min(COVERED_TRANSFER_MAX),
            bindings_max: hello.bindings_max.get(),
            mappings_max: hello.mappings_max.get(),
        };
        self.nonce = hello.nonce;
        self.credits_total = usize::from(hello.credits.get()).min(self.credits_max);
        self.hello = Some((facts, self.credits_total));
        Ok(())
    }

    /// Takes the purpose of the request a reply is for.
    fn purpose(&mut self, frame: &Frame<'_>) -> Checked<Purpose> {
        self.slot(frame.header.request.get())
            .and_then(|slot| slot.purpose.take())
            .ok_or(Ended::Misbehaved("a reply to a request that was not made"))
    }

    fn bind_reply(&mut self, frame: &Frame<'_>, reply: &BindReply, credits: &Semaphore) -> Checked {
        let Purpose::Bind(wait) = self.purpose(frame)? else {
            return Err(Ended::Misbehaved("a bind reply to another request"));
        };
        let outcome = match status(reply.status.get())? {
            Status::Ok => {
                let binding = Arc::new(wait.answer(frame.header.binding.get(), reply)?);
                // The proof gave the key, and the key vouches for what the proof does not cover.
                if !binding.to_client.verify(frame) {
                    return Err(Ended::BadMac);
                }
                if self.bindings.insert(binding.number, Arc::clone(&binding)).is_some() {
                    return Err(Ended::Misbehaved("a binding's number given twice"));
                }
                self.credits_are(usize::from(reply.credits.get()), credits);
                Ok(Done::Bound(binding))
            }
            _ if !FrameKey::unkeyed().verify(frame) => return Err(Ended::BadMac),
            refused => {
                self.credits_are(self.credits_total, credits);
                Err(Failure::Refused { status: refused, count: 0 })
            }
        };
        self.nonce = reply.nonce;
        drop(wait); // the next bind may begin: it finds the new nonce
        self.settle(frame.header.request.get(), outcome);
        Ok(())
    }

    /// A request was answered; from now on `total` may be in flight.
    fn credits_are(&mut self, total: usize, credits: &Semaphore) {
        let total = total.clamp(1, self.credits_max);
        // The answered request's own credit was used up, so one fewer than the old total is in use or waiting.
        let had = self.credits_total.saturating_sub(1);
        self.credits_total = total;
        if total >= had {
            credits.add_permits(total - had);
        } else {
            // What cannot be taken back now is in flight; the server sees to it that nothing goes wrong.
            let taken = credits.forget_permits(had - total);
            self.credits_total += had - total - taken;
        }
    }

    fn reply(
        &mut self,
        frame: &Frame<'_>,
        reply: &Reply,
        descriptor: Option<OwnedFd>,
        credits: &Semaphore,
    ) -> Checked {
        let number = frame.header.request.get();
        let status = status(reply.status.get())?;
        let binding = self.slot(number).and_then(|slot| slot.binding.clone());
        let binding = binding.ok_or(Ended::Misbehaved("a reply to a request that was not made"))?;
        if frame.header.binding.get() == binding.number {
            if !binding.to_client.verify(frame) {
                return Err(Ended::BadMac);
            }
        } else if frame.header.binding.get() != 0
            || status != Status::NotBound
            || !FrameKey::unkeyed().verify(frame)
        {
            // Only "there is no such binding" comes without the binding's key.
            return Err(Ended::BadMac);
        }
        let purpose = self.purpose(frame)?;
        let count = reply.count.get();
        let mut outcome = match status {
            Status::Ok => Ok(Done::Counted(count)),
            status => Err(Failure::Refused { status, count }),
        };
        match &purpose {
            Purpose::Bind(_) => return Err(Ended::Misbehaved("a bind answered as a read")),
            Purpose::Map { .. } if outcome.is_ok() => {
                return Err(Ended::Misbehaved("a mapping that is granted without saying which"));
            }
            Purpose::Read { length, .. } | Purpose::Write { length, .. } if count > *length => {
                return Err(Ended::Misbehaved("more bytes than were asked for"));
            }
            Purpose::Read { region, start, .. } => {
                if let (Ok(_), true) = (&outcome, binding.payload_to_client.is_on() && count > 0) {
                    // Looked at, and decrypted, in a private copy: the region's own bytes may still change.
                    self.scratch.resize(count as usize, 0);
                    let ours = |_| Ended::Misbehaved("a count outside of the region");
                    region.copy_out(*start, &mut self.scratch).map_err(ours)?;
                    let sequence = frame.header.sequence.get();
                    match binding.payload_to_client.check(sequence, &mut self.scratch, frame.digest) {
                        Ok(()) => region.copy_in(*start, &self.scratch).map_err(ours)?,
                        Err(_) => outcome = Err(Failure::Refused { status: Status::Integrity, count: 0 }),
                    }
                }
            }
            Purpose::Flush if status == Status::Ok && reply.verifier.get() != binding.verifier => {
                outcome = Err(Failure::WritesLost);
            }
            Purpose::Unbind => {
                // Also for who still has a clone of it.
                binding.end();
                self.bindings.remove(&binding.number);
            }
            Purpose::Descriptor if outcome.is_ok() => outcome = Ok(Done::Descriptor(descriptor)),
            _ => {}
        }
        if status == Status::Fenced {
            binding.fence(status);
        }
        // Registrations may go now; a bounce region goes back.
        drop(purpose);
        let total = (self.credits_total - 1).saturating_add(usize::from(reply.credits.get()));
        self.credits_are(total, credits);
        self.settle(number, outcome);
        Ok(())
    }

    fn mapped(&mut self, frame: &Frame<'_>, mapped: &Mapped, credits: &Semaphore) -> Checked {
        let number = frame.header.request.get();
        let binding = self.slot(number).and_then(|slot| slot.binding.clone());
        let binding = binding.ok_or(Ended::Misbehaved("a reply to a request that was not made"))?;
        if frame.header.binding.get() != binding.number || !binding.to_client.verify(frame) {
            return Err(Ended::BadMac);
        }
        let Purpose::Map { length: asked } = self.purpose(frame)? else {
            return Err(Ended::Misbehaved("a mapping that was not asked for"));
        };
        let (address, length) = (mapped.address.get(), mapped.length.get());
        if length == 0 || length > asked || address.checked_add(length).is_none() {
            return Err(Ended::Misbehaved("a mapping of other bytes than were asked for"));
        }
        let granted = Granted { mapping: mapped.mapping.get(), address, length, rkey: mapped.rkey.get() };
        let total = (self.credits_total - 1).saturating_add(usize::from(mapped.credits.get()));
        self.credits_are(total, credits);
        self.settle(number, Ok(Done::Mapped(granted)));
        Ok(())
    }

    fn notice(&mut self, frame: &Frame<'_>, notice: &Notice) -> Checked {
        let status = status(notice.status.get())?;
        let number = frame.header.binding.get();
        if number == 0 {
            return Err(if FrameKey::unkeyed().verify(frame) {
                Ended::Notice(status)
            } else {
                Ended::BadMac
            });
        }
        // One that was unbound meanwhile needs no news.
        let Some(binding) = self.bindings.get(&number) else { return Ok(()) };
        if !binding.to_client.verify(frame) {
            return Err(Ended::BadMac);
        }
        binding.fence(if status == Status::Ok { Status::Fenced } else { status });
        Ok(())
    }
}
