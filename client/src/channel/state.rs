//! [`State`]: what the channel's lock guards.

use super::Facts;
use super::gather::Gather;
use super::prompt::Prompt;
use super::request::{Done, Failure, Granted, Purpose, Request};
use crate::bind::BindingCore;
use crate::error::{Ended, Error, Result};
use holdfast_transport::{Armed, Channel, Completion, Kind, Operation, SubmitError};
use holdfast_verbs::memory::Pool;
use slab::Slab;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::Waker;
use tokio::sync::Semaphore;

/// Token of every send; receives have numbers below it, which nobody looks at either.
const SEND: u64 = u64::MAX;

/// A request in flight, or answered and not collected yet.
pub(super) struct Slot {
    /// The request's number in frames: serial << 16 | index.
    pub(super) number: u32,
    pub(super) binding: Option<Arc<BindingCore>>,
    /// Taken when the reply comes: registrations are held until then, whoever has gone.
    pub(super) purpose: Option<Purpose>,
    pub(super) outcome: Option<std::result::Result<Done, Failure>>,
    pub(super) waker: Option<Waker>,
    /// The caller has gone: the reply frees the slot.
    pub(super) abandoned: bool,
}

/// What has no owner any more: a binding, or one mapping of it.
#[derive(Clone)]
pub(super) struct GivenBack {
    pub(super) binding: Arc<BindingCore>,
    pub(super) mapping: Option<u32>,
}

pub(super) enum Sent {
    Number(u32),
    /// All send buffers are at the device.
    NoRoom,
}

pub(crate) struct State {
    pub(super) channel: Box<dyn Channel>,
    frames: Pool,
    done: Vec<Completion>,
    pub(super) slots: Slab<Slot>,
    serial: u16,
    sent: u64,
    pub(super) received: u64,
    /// Those that the server may send notices for.
    pub(super) bindings: HashMap<u32, Arc<BindingCore>>,
    pub(super) hello: Option<(Facts, usize)>,
    pub(super) nonce: [u8; 32],
    pub(super) credits_total: usize,
    pub(super) credits_max: usize,
    /// Callers that wait for a send buffer.
    pub(super) room: Vec<Waker>,
    /// First come, first given back: a mapping's owner keeps its binding, so that comes after it.
    pub(super) given_back: VecDeque<GivenBack>,
    pub(super) scratch: Vec<u8>,
    pub(super) prompt: Prompt,
    pub(super) gather: Gather,
    /// The next event makes an edge.
    armed: bool,
    pub(super) ended: Option<Ended>,
}

impl State {
    pub(super) fn new(channel: Box<dyn Channel>, frames: Pool, credits_max: usize) -> Self {
        let can = channel.capabilities();
        let prompt = Prompt::new(can);
        Self {
            channel,
            frames,
            prompt,
            gather: Gather::new(can.cheap_poll),
            armed: false,
            done: Vec::with_capacity(credits_max),
            slots: Slab::with_capacity(credits_max),
            serial: 0,
            sent: 0,
            received: 0,
            bindings: HashMap::new(),
            hello: None,
            nonce: [0; 32],
            credits_total: 0,
            credits_max,
            room: Vec::new(),
            given_back: VecDeque::new(),
            scratch: Vec::new(),
            ended: None,
        }
    }

    pub(super) fn credits_total(&self) -> usize {
        self.credits_total
    }

    /// Builds a frame and submits it. The purpose is taken only if that succeeds.
    pub(super) fn send(
        &mut self,
        binding: Option<&Arc<BindingCore>>,
        request: &Request<'_>,
        purpose: &mut Option<Purpose>,
    ) -> Result<Sent> {
        if let Some(why) = &self.ended {
            return Err(Error::channel(why.clone()));
        }
        let Some(mut buffer) = self.frames.take() else { return Ok(Sent::NoRoom) };
        let index = u16::try_from(self.slots.vacant_key())
            .map_err(|_| Error::Internal("more requests in flight than can be numbered"))?;
        let number = u32::from(self.serial) << 16 | u32::from(index);
        let binding_ref = binding.map(AsRef::as_ref);
        let length = request.encode(&mut buffer, number, self.sent, binding_ref, &mut self.scratch)?;
        match self.channel.submit(SEND, Operation::Send { buffer, length }) {
            Ok(()) => {}
            Err(rejected) => {
                return match rejected.error {
                    SubmitError::Full => Ok(Sent::NoRoom),
                    SubmitError::Closed => {
                        Err(Error::channel(self.channel.ended().map_or(Ended::Disconnected, Ended::from)))
                    }
                    SubmitError::Invalid => Err(Error::Internal("the transport does not take a frame")),
                };
            }
        }
        self.sent += 1;
        self.serial = self.serial.wrapping_add(1);
        self.slots.insert(Slot {
            number,
            binding: binding.cloned(),
            purpose: purpose.take(),
            outcome: None,
            waker: None,
            abandoned: false,
        });
        Ok(Sent::Number(number))
    }

    /// Collects all there is and leaves the transport armed. See the module's text on why this loses no wake-up.
    pub(super) fn drain(&mut self, credits: &Semaphore) {
        if self.ended.is_some() {
            return;
        }
        loop {
            self.collect(credits);
            if let (None, Some(why)) = (&self.ended, self.channel.ended()) {
                self.fail(why.into(), credits);
            }
            if self.ended.is_some() {
                return;
            }
            if !self.send_given_back(credits) && self.channel.arm() == Armed::Idle {
                self.armed = true;
                return;
            }
        }
    }

    /// Pushes out what was submitted; leaves the transport armed. Cheaper than [`State::drain`] while it is.
    pub(super) fn push(&mut self, credits: &Semaphore) {
        // Who waits for room waits for completions, which are not looked for here.
        let pushed = self.armed
            && self.ended.is_none()
            && self.room.is_empty()
            && !self.gives_back()
            && self.channel.push();
        if !pushed {
            self.drain(credits);
        }
    }

    /// Pushes out what was submitted, and takes what has come.
    pub(super) fn collect(&mut self, credits: &Semaphore) {
        let mut done = std::mem::take(&mut self.done);
        while self.channel.poll(&mut done) > 0 {
            self.armed = false;
            for completion in done.drain(..) {
                self.complete(completion, credits);
            }
        }
        self.done = done;
    }

    fn complete(&mut self, completion: Completion, credits: &Semaphore) {
        match completion.kind {
            Kind::Send => {
                drop(completion.buffer);
                self.room.drain(..).for_each(Waker::wake);
            }
            // After the end nothing that still arrives counts.
            Kind::Recv if self.ended.is_none() => {
                let buffer = completion.buffer;
                // Why a receive failed, the channel itself says.
                let Ok(length) = completion.outcome else { return };
                let message = &buffer[..length.min(buffer.len())];
                if let Err(why) = self.receive(message, completion.descriptor, credits) {
                    return self.fail(why, credits);
                }
                let again = self.channel.submit(completion.token, Operation::Recv { buffer });
                if again.is_err_and(|rejected| rejected.error != SubmitError::Closed) {
                    self.fail(Ended::Transport("a receive could not be posted again".into()), credits);
                }
            }
            _ => {}
        }
    }

    /// Ends the channel: the device is cut off first, then everybody is told.
    pub(super) fn fail(&mut self, why: Ended, credits: &Semaphore) {
        if self.ended.is_some() {
            return;
        }
        match &why {
            Ended::Closed | Ended::Disconnected => tracing::debug!(%why, "the data channel has ended"),
            _ => tracing::warn!(peer = %self.channel.peer(), %why, "the data channel has ended"),
        }
        self.ended = Some(why.clone());
        self.channel.close();
        let mut done = std::mem::take(&mut self.done);
        while self.channel.poll(&mut done) > 0 {
            done.clear();
        }
        credits.close();
        self.slots.retain(|_, slot| {
            // Also one whose caller has gone.
            if let (None, Some(Purpose::Write { .. }), Some(binding)) =
                (&slot.outcome, &slot.purpose, &slot.binding)
            {
                binding.write_is_unanswered();
            }
            // From here on the device cannot reach what the purpose holds.
            slot.purpose = None;
            slot.outcome.get_or_insert_with(|| Err(Failure::Ended(why.clone())));
            slot.waker.take().into_iter().for_each(Waker::wake);
            !slot.abandoned
        });
        self.bindings.drain().for_each(|(_, binding)| binding.end());
        self.given_back.clear();
        self.room.drain(..).for_each(Waker::wake);
    }

    /// Gives back what has no owner any more, as far as credits go. True if it sent something.
    fn send_given_back(&mut self, credits: &Semaphore) -> bool {
        let mut sent = false;
        while let Some(GivenBack { binding, mapping }) = self.given_back.front().cloned() {
            let Ok(credit) = credits.try_acquire() else { break };
            let (request, purpose) = match mapping {
                None => (Request::Unbind, Purpose::Unbind),
                Some(mapping) => (Request::Unmap { mapping }, Purpose::Unmap),
            };
            match self.send(Some(&binding), &request, &mut Some(purpose)) {
                Ok(Sent::Number(number)) => {
                    credit.forget();
                    self.given_back.pop_front();
                    self.abandon(number);
                    sent = true;
                }
                Ok(Sent::NoRoom) => break,
                Err(error) => {
                    tracing::debug!(%error, ?mapping, "a binding, or a mapping of it, could not be given back");
                    self.given_back.pop_front();
                }
            }
        }
        sent
    }

    /// True if there is something to be given back to the server.
    pub(super) fn gives_back(&self) -> bool {
        !self.given_back.is_empty()
    }

    pub(super) fn slot(&mut self, number: u32) -> Option<&mut Slot> {
        self.slots.get_mut(index(number)).filter(|slot| slot.number == number)
    }

    /// The caller of a request has gone.
    pub(super) fn abandon(&mut self, number: u32) {
        let Some(slot) = self.slot(number) else { return };
        if slot.outcome.is_none() {
            slot.abandoned = true;
            slot.waker = None;
            return;
        }
        let slot = self.slots.remove(index(number));
        match (slot.outcome, slot.binding) {
            (Some(Ok(Done::Bound(binding))), _) => {
                self.given_back.push_back(GivenBack { binding, mapping: None });
            }
            (Some(Ok(Done::Mapped(Granted { mapping, .. }))), Some(binding)) => {
                self.given_back.push_back(GivenBack { binding, mapping: Some(mapping) });
            }
            _ => {}
        }
    }

    /// Stores what a request came to, and tells its caller; frees the slot if that has gone.
    pub(super) fn settle(&mut self, number: u32, outcome: std::result::Result<Done, Failure>) {
        self.gather.answered();
        let Some(slot) = self.slot(number) else { return };
        slot.outcome = Some(outcome);
        if let Some(waker) = slot.waker.take() {
            waker.wake();
        }
        if slot.abandoned {
            slot.abandoned = false;
            self.abandon(number);
        }
    }
}

pub(super) fn index(number: u32) -> usize {
    (number & 0xffff) as usize
}
