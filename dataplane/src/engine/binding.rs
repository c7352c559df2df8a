//! The bindings of one channel.
//!
//! ```text
//!            granted               fence, unbind                   drained
//!  (free) ─────────► Active ─────────────────────────────► Draining ───────► Gone(status): keeps keys and number, so that
//!    ▲                                                                         │  late requests get a true answer
//!    └──────────────────────── slot needed for a new binding ──────────────────┘
//! ```
//!
//! A binding's number in frames is `generation << 8 | slot`, generations from 1 up: never 0, never used twice on a channel.

use super::ConnKey;
use super::backend::FileIo;
use super::channel::Cx;
use super::latch::Latch;
use super::pinned::FileKey;
use super::restrict::Rules;
use holdfast_shared::auth::{FrameKey, MacPolicy, PayloadKey};
use holdfast_shared::types::{Access, HandleId, OpenId, Status};
use holdfast_shared::wire::link::{Fence, Grant, Held, LinkBinding};
use std::sync::Arc;
use std::time::Instant;

/// Names a binding of a channel, by its number in frames. A slot's next binding has another number, so what was said of
/// the old one never reaches the new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BindingRef(pub(crate) u32);

impl BindingRef {
    fn slot(self) -> usize {
        (self.0 & 0xff) as usize
    }
}

/// Why a binding drains, and who is told when it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// Control fences it: `Fenced` on the link, a Notice to the client.
    Fence(Fence),
    /// The client unbinds: a Reply to the request in this slot, `Released` on the link.
    Unbind { request: u32 },
}

impl Drain {
    /// What requests are answered from now on.
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Fence(_) => Status::Fenced,
            Self::Unbind { .. } => Status::Closed,
        }
    }
}

/// Whether long reads of a binding's file may be placed from its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FromPages {
    /// Nothing long was read yet.
    Unknown,
    Never,
    /// From pinned ones, once it is hot.
    Watched(FileKey),
    /// From mapped ones.
    Viewed,
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
    pub(crate) open: OpenId,
    pub(crate) handle: HandleId,
    pub(crate) epoch: u64,
    /// Of the transcript it was granted for.
    pub(crate) transcript: [u8; 32],
    pub(crate) access: Access,
    pub(crate) policy: MacPolicy,
    /// A client of a local channel may have the descriptor.
    pub(crate) gives_descriptor: bool,
    /// Its volume is one of direct I/O, which takes pages away from whoever has them pinned.
    pub(crate) direct: bool,
    pub(crate) from_client: FrameKey,
    pub(crate) to_client: FrameKey,
    pub(crate) payload_in: PayloadKey,
    pub(crate) payload_out: PayloadKey,
    pub(crate) state: State,
    /// `None` once gone.
    pub(crate) file: Option<Arc<dyn FileIo>>,
    pub(crate) from_pages: FromPages,
    /// Of the open: whether a flush has failed.
    pub(crate) latch: Arc<Latch>,
    /// What its I/O may not touch, and the version of that.
    pub(crate) rules: Rules,
    /// When the turn was over in which it last wrote, or tried to; see [`crate::last_write`].
    pub(crate) last_write_ns: u64,
    /// Places and fetches in flight.
    pub(crate) transport_ops: u32,
    /// Jobs at storage threads.
    pub(crate) storage_ops: u32,
}

impl Binding {
    pub(crate) fn new(
        name: BindingRef,
        grant: &Grant,
        file: Arc<dyn FileIo>,
        latch: Arc<Latch>,
        rules: Rules,
    ) -> Self {
        let (keys, policy) = (&grant.keys, grant.policy);
        Self {
            number: name.0,
            link: grant.binding,
            open: grant.open,
            handle: grant.handle,
            epoch: grant.epoch,
            transcript: grant.transcript,
            access: grant.access,
            policy,
            gives_descriptor: grant.descriptor,
            direct: grant.direct,
            from_client: FrameKey::new(&keys.to_server, policy),
            to_client: FrameKey::new(&keys.to_client, policy),
            payload_in: PayloadKey::new(&keys.to_server, policy),
            payload_out: PayloadKey::new(&keys.to_client, policy),
            state: State::Active,
            file: Some(file),
            from_pages: if grant.direct { FromPages::Never } else { FromPages::Unknown },
            latch,
            rules,
            last_write_ns: 0,
            transport_ops: 0,
            storage_ops: 0,
        }
    }

    pub(crate) fn name(&self) -> BindingRef {
        BindingRef(self.number)
    }

    /// `Ok` while requests are served; else what they are answered.
    pub(crate) fn serves(&self) -> Result<(), Status> {
        match &self.state {
            State::Active => Ok(()),
            State::Draining { drain, .. } => Err(drain.status()),
            State::Gone(status) => Err(*status),
        }
    }

    /// What a control that did not grant it is told. `cut` if its channel has ended.
    pub(crate) fn held(&self, cut: bool) -> Held {
        Held {
            binding: self.link,
            open: self.open,
            handle: self.handle,
            epoch: self.epoch,
            access: self.access,
            ending: cut || self.serves().is_err(),
            last_write_ns: self.last_write_ns,
            rules_version: self.rules.version,
            transcript: self.transcript,
        }
    }

    /// It needs its file no more.
    pub(crate) fn let_file_go(&mut self, conn: ConnKey, cx: &mut Cx) {
        self.file = None;
        match (std::mem::replace(&mut self.from_pages, FromPages::Never), &mut cx.pinned, &mut cx.views) {
            (FromPages::Watched(key), Some(pinned), _) => pinned.leave(key),
            (FromPages::Viewed, _, Some(views)) => views.leave(conn, self.name()),
            _ => {}
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

    /// What a new binding will be called; `None` if all slots are in use. `named` says whether a request or a notice still
    /// speaks of a binding: that one keeps its slot, so that they are answered with its key. Who is answered slowly
    /// thus uses more slots than it has live bindings, at most one for each request in flight.
    pub(crate) fn vacancy(&mut self, max: usize, named: impl Fn(BindingRef) -> bool) -> Option<BindingRef> {
        let free = self.slots.iter().position(Option::is_none);
        let slot = free.or_else(|| (self.slots.len() < max).then_some(self.slots.len())).or_else(|| {
            // All slots were used: the binding that went first gives way. Its number is never used again.
            let gone = self.slots.iter().enumerate().filter_map(|(n, b)| Some((n, b.as_ref()?)));
            gone.filter(|(_, b)| b.is_gone() && b.is_idle() && !named(b.name()))
                .min_by_key(|(_, b)| b.number >> 8)
                .map(|(n, _)| n)
        });
        let slot = slot.or_else(|| (self.live() < max).then_some(self.slots.len()))?;
        let slot = u8::try_from(slot).ok()?;
        // After 16 million binds a channel takes no more; the client opens another.
        let generation = self.generation.checked_add(1).filter(|g| *g < 1 << 24)?;
        self.generation = generation;
        Some(BindingRef(generation << 8 | u32::from(slot)))
    }

    /// Puts a binding where [`Bindings::vacancy`] said.
    pub(crate) fn put(&mut self, binding: Binding) {
        let slot = binding.name().slot();
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(binding);
        }
    }

    /// By name; `None` once another has its slot.
    pub(crate) fn get(&self, name: BindingRef) -> Option<&Binding> {
        self.slots.get(name.slot())?.as_ref().filter(|binding| binding.number == name.0)
    }

    pub(crate) fn get_mut(&mut self, name: BindingRef) -> Option<&mut Binding> {
        self.slots.get_mut(name.slot())?.as_mut().filter(|binding| binding.number == name.0)
    }

    /// By slot, to go through all.
    pub(crate) fn at_mut(&mut self, slot: u8) -> Option<&mut Binding> {
        self.slots.get_mut(usize::from(slot))?.as_mut()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Binding> {
        self.slots.iter().flatten()
    }

    /// How many are not gone.
    pub(crate) fn live(&self) -> usize {
        self.iter().filter(|binding| !binding.is_gone()).count()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::KernelFile;
    use super::*;
    use holdfast_shared::auth::{BindAnswer, BindSecret, Secret};

    fn binding(name: BindingRef) -> Binding {
        let (access, policy) = (Access::ALL, MacPolicy::Header);
        let answer = BindAnswer { handle: HandleId([1; 16]), epoch: 1, access, policy }.digest(&[0; 32]);
        let grant = Grant {
            binding: LinkBinding(1),
            open: OpenId([1; 16]),
            handle: HandleId([1; 16]),
            epoch: 1,
            access,
            policy,
            proof: [0; 32],
            keys: BindSecret::new(Secret::new([1; 32])).channel_keys(&answer),
            rules: Vec::new(),
            rules_version: 0,
            transcript: [0; 32],
            descriptor: false,
            direct: false,
        };
        let fd = rustix::fs::memfd_create("binding", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        Binding::new(name, &grant, Arc::new(KernelFile::new(fd)), Arc::default(), Rules::default())
    }

    #[test]
    fn a_name_never_means_another_binding() {
        let mut bindings = Bindings::new();
        let first = bindings.vacancy(1, |_| false).unwrap();
        bindings.put(binding(first));
        assert!(bindings.vacancy(1, |_| false).is_none(), "it is in use");
        bindings.get_mut(first).unwrap().state = State::Gone(Status::Closed);
        let second = bindings.vacancy(1, |_| false).unwrap();
        assert_eq!(first.slot(), second.slot());
        bindings.put(binding(second));
        assert!(bindings.get(first).is_none() && bindings.get_mut(first).is_none());
        assert!(bindings.get(second).is_some());
    }

    #[test]
    fn what_is_still_spoken_of_keeps_its_slot() {
        let mut bindings = Bindings::new();
        let first = bindings.vacancy(1, |_| false).unwrap();
        bindings.put(binding(first));
        bindings.get_mut(first).unwrap().state = State::Gone(Status::Closed);
        let second = bindings.vacancy(1, |name| name == first).unwrap();
        bindings.put(binding(second));
        assert!(bindings.get(first).is_some() && bindings.get(second).is_some());
        assert!(bindings.vacancy(1, |name| name == first).is_none(), "one may live, and does");
    }
}
