//! The bindings of one channel.
//!
//! ```text
//!            granted            fence, unbind, new control          drained
//!  (free) ─────────► Active ─────────────────────────────► Draining ───────► Gone(status): keeps keys and number, so that
//!    ▲                                                                         │  late requests get a true answer
//!    └──────────────────────── slot needed for a new binding ──────────────────┘
//! ```
//!
//! A binding's number in frames is `generation << 8 | slot`, generations from 1 up: never 0, never used twice on a channel.

use super::backend::FileIo;
use holdfast_shared::auth::{FrameKey, MacPolicy, PayloadKey};
use holdfast_shared::types::{Access, OpenId, Status};
use holdfast_shared::wire::link::{Fence, Grant, LinkBinding};
use std::sync::Arc;
use std::time::Instant;

/// Why a binding drains, and who is told when it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// Control fences it: `Fenced` on the link, a Notice to the client.
    Fence(Fence),
    /// The client unbinds: a Reply to the request in this slot, `Released` on the link.
    Unbind { request: u32 },
    /// Control that knew it is gone: a Notice to the client.
    NewControl,
}

impl Drain {
    /// What requests are answered from now on.
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Fence(_) | Self::NewControl => Status::Fenced,
            Self::Unbind { .. } => Status::Closed,
        }
    }
}

pub(crate) enum State {
    Active,
    Draining { drain: Drain, by: Instant },
    Gone(Status),
}

/// One binding.
pub(crate) struct Binding {
    pub(crate) number: u32,
    pub(crate) link: LinkBinding,
    pub(crate) registration: u64,
    pub(crate) open: OpenId,
    pub(crate) epoch: u64,
    pub(crate) access: Access,
    pub(crate) policy: MacPolicy,
    pub(crate) from_client: FrameKey,
    pub(crate) to_client: FrameKey,
    pub(crate) payload_in: PayloadKey,
    pub(crate) payload_out: PayloadKey,
    pub(crate) state: State,
    /// `None` once gone.
    pub(crate) file: Option<Arc<dyn FileIo>>,
    /// Places and fetches in flight.
    pub(crate) transport_ops: u32,
    /// Jobs at storage threads.
    pub(crate) storage_ops: u32,
}

impl Binding {
    pub(crate) fn new(number: u32, registration: u64, grant: &Grant, file: Arc<dyn FileIo>) -> Self {
        let (keys, policy) = (&grant.keys, grant.policy);
        Self {
            number,
            link: grant.binding,
            registration,
            open: grant.open,
            epoch: grant.epoch,
            access: grant.access,
            policy,
            from_client: FrameKey::new(&keys.to_server, policy),
            to_client: FrameKey::new(&keys.to_client, policy),
            payload_in: PayloadKey::new(&keys.to_server, policy),
            payload_out: PayloadKey::new(&keys.to_client, policy),
            state: State::Active,
            file: Some(file),
            transport_ops: 0,
            storage_ops: 0,
        }
    }

    /// `Ok` while requests are served; else what they are answered.
    pub(crate) fn serves(&self) -> Result<(), Status> {
        match &self.state {
            State::Active => Ok(()),
            State::Draining { drain, .. } => Err(drain.status()),
            State::Gone(status) => Err(*status),
        }
    }

    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.state, State::Gone(_))
    }

    /// True if nothing of it is under way at the transport or the storage.
    pub(crate) fn is_idle(&self) -> bool {
        self.transport_ops == 0 && self.storage_ops == 0
    }
}

/// The bindings of a channel, by slot.
pub(crate) struct Bindings {
    slots: Vec<Option<Binding>>,
    generation: u32,
}

impl Bindings {
    /// Room for `max` bindings; allocated once, when the first is granted.
    pub(crate) fn new() -> Self {
        Self { slots: Vec::new(), generation: 0 }
    }

    /// The slot a new binding would get, and its number; `None` if all are in use.
    pub(crate) fn vacancy(&mut self, max: usize) -> Option<(u8, u32)> {
        let free = self.slots.iter().position(Option::is_none);
        let slot = free.or_else(|| (self.slots.len() < max).then_some(self.slots.len())).or_else(|| {
            // All slots were used: the binding that went first gives way. Its number is never used again.
            let gone = self.slots.iter().enumerate().filter_map(|(n, b)| Some((n, b.as_ref()?)));
            gone.filter(|(_, b)| b.is_gone() && b.is_idle())
                .min_by_key(|(_, b)| b.number >> 8)
                .map(|(n, _)| n)
        })?;
        let slot = u8::try_from(slot).ok()?;
        // After 16 million binds a channel takes no more; the client opens another.
        let generation = self.generation.checked_add(1).filter(|g| *g < 1 << 24)?;
        self.generation = generation;
        Some((slot, generation << 8 | u32::from(slot)))
    }

    /// Puts a binding where [`Bindings::vacancy`] said.
    pub(crate) fn put(&mut self, slot: u8, binding: Binding) {
        let slot = usize::from(slot);
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some(binding);
    }

    /// By the number in a frame.
    pub(crate) fn by_number(&self, number: u32) -> Option<(u8, &Binding)> {
        let slot = (number & 0xff) as u8;
        let binding = self.slots.get(usize::from(slot))?.as_ref()?;
        (binding.number == number).then_some((slot, binding))
    }

    pub(crate) fn at(&self, slot: u8) -> Option<&Binding> {
        self.slots.get(usize::from(slot))?.as_ref()
    }

    pub(crate) fn at_mut(&mut self, slot: u8) -> Option<&mut Binding> {
        self.slots.get_mut(usize::from(slot))?.as_mut()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u8, &Binding)> {
        let all = self.slots.iter().enumerate();
        all.filter_map(|(n, binding)| Some((u8::try_from(n).ok()?, binding.as_ref()?)))
    }

    /// How many are not gone.
    pub(crate) fn live(&self) -> usize {
        self.iter().filter(|(_, binding)| !binding.is_gone()).count()
    }
}
