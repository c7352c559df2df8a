//! The data plane, as its contract says it behaves: bindings, I/O in flight that lands later, fences that are confirmed
//! when it has, rules on byte ranges.
//!
//! ```text
//!  channel ─ ask ─► admitted? ─► in flight ─► lands in the file ─► answered
//!                     │ rules, binding alive      │
//!                     └► refused                  └► drained: Fenced, Released, Restricted to control
//! ```
//!
//! It moves no time and no message by itself: the world does, with what is returned.

use crate::files::Node;
use crate::setting::Broken;
use holdfast_shared::types::{
    Access, ByteRange, HandleId, IoRule, OpenId, Status, io_conflict, io_rules_ordered,
};
use holdfast_shared::wire::link::{Fence, Grant, Held, LinkBinding, Redeem, Restrict, Restricted};
use std::collections::{BTreeMap, BTreeSet};

/// A data channel; never used twice.
pub(crate) type ChannelNo = u64;
/// An I/O in flight; never used twice.
pub(crate) type IoNo = u64;

/// What a client asks on a channel.
#[derive(Clone, Debug)]
pub(crate) enum Ask {
    Bind(Box<Redeem>),
    Io { number: u64, io: Io },
    Unbind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Io {
    Write { block: u64, tag: u64 },
    Read { block: u64 },
    Flush,
}

/// What the data plane says on a channel.
#[derive(Clone, Debug)]
#[expect(dead_code, reason = "why a binding is over is for those who read a trace")]
pub(crate) enum Say {
    Bound {
        handle: HandleId,
        epoch: u64,
        proof: [u8; 32],
        policy: holdfast_shared::auth::MacPolicy,
        access: Access,
        instance: u64,
    },
    BindRefused(Status),
    Done {
        number: u64,
        status: Status,
    },
    /// The binding is over.
    Ended(Status),
}

/// From the data plane to control.
#[derive(Clone, Debug)]
pub(crate) enum Up {
    Register { instance: u64, held: Vec<(Held, Node)> },
    Redeem(Box<Redeem>),
    Fenced(Fence),
    Released(LinkBinding),
    Restricted(Restricted),
}

/// From control to the data plane.
#[derive(Clone, Debug)]
pub(crate) enum Down {
    Registered,
    Grant { id: u64, node: Node, grant: Box<Grant> },
    Refuse { id: u64, status: Status },
    Fence(Fence),
    Restrict(Restrict),
}

/// What the world is to do after the plane has taken something.
#[derive(Debug)]
pub(crate) enum Todo {
    Up(Up),
    Say(ChannelNo, Say),
    /// I/O that will land.
    InFlight(IoNo),
    /// If I/O is still in flight by the fence time, the channel is cut off.
    CutOff(LinkBinding),
    /// The descriptor of a binding is closed.
    LetGo(Node),
}

#[derive(Debug)]
pub(crate) struct Binding {
    pub(crate) open: OpenId,
    handle: HandleId,
    epoch: u64,
    access: Access,
    pub(crate) node: Node,
    channel: ChannelNo,
    /// The fence that ends it; `Some(None)` if the client or its channel did.
    ending: Option<Option<Fence>>,
    last_write_ns: u64,
    transcript: [u8; 32],
}

#[derive(Clone, Debug)]
pub(crate) struct InFlight {
    pub(crate) binding: LinkBinding,
    pub(crate) open: OpenId,
    pub(crate) node: Node,
    pub(crate) channel: ChannelNo,
    pub(crate) number: u64,
    pub(crate) io: Io,
}

#[derive(Debug, Default)]
struct Rules {
    version: u64,
    rules: Vec<IoRule>,
}

#[derive(Debug)]
pub(crate) struct Plane {
    pub(crate) instance: u64,
    pub(crate) bindings: BTreeMap<LinkBinding, Binding>,
    rules: BTreeMap<OpenId, Rules>,
    /// Restrictions that wait for I/O begun before.
    barriers: Vec<(Restricted, BTreeSet<IoNo>)>,
    pub(crate) in_flight: BTreeMap<IoNo, InFlight>,
    last_io: IoNo,
    channels: BTreeMap<ChannelNo, Option<LinkBinding>>,
    redeems: BTreeMap<u64, ChannelNo>,
    last_redeem: u64,
    pub(crate) registered: bool,
    pub(crate) broken: Option<Broken>,
}

impl Plane {
    pub(crate) fn new(instance: u64, broken: Option<Broken>) -> Self {
        Self {
            instance,
            bindings: BTreeMap::new(),
            rules: BTreeMap::new(),
            barriers: Vec::new(),
            in_flight: BTreeMap::new(),
            last_io: 0,
            channels: BTreeMap::new(),
            redeems: BTreeMap::new(),
            last_redeem: 0,
            registered: false,
            broken,
        }
    }

    /// What it tells a control that it registers with.
    pub(crate) fn register(&mut self) -> Up {
        let held = self.bindings.iter().map(|(number, binding)| {
            let rules_version = self.rules.get(&binding.open).map_or(0, |rules| rules.version);
            let held = Held {
                binding: *number,
                open: binding.open,
                handle: binding.handle,
                epoch: binding.epoch,
                access: binding.access,
                ending: binding.ending.is_some(),
                last_write_ns: binding.last_write_ns,
                rules_version,
                transcript: binding.transcript,
            };
            (held, binding.node)
        });
        Up::Register { instance: self.instance, held: held.collect() }
    }

    /// The link has ended: binds under way are refused, restrictions are asked for again by whoever wants them.
    pub(crate) fn link_ended(&mut self) -> Vec<Todo> {
        self.registered = false;
        self.barriers.clear();
        let redeems = std::mem::take(&mut self.redeems);
        redeems
            .into_values()
            .map(|channel| Todo::Say(channel, Say::BindRefused(Status::Unavailable)))
            .collect()
    }

    pub(crate) fn asked(&mut self, channel: ChannelNo, ask: Ask) -> Vec<Todo> {
        match ask {
            Ask::Bind(mut redeem) => {
                self.channels.entry(channel).or_insert(None);
                if !self.registered {
                    return vec![Todo::Say(channel, Say::BindRefused(Status::Unavailable))];
                }
                self.last_redeem += 1;
                redeem.id = self.last_redeem;
                self.redeems.insert(redeem.id, channel);
                vec![Todo::Up(Up::Redeem(redeem))]
            }
            Ask::Io { number, io } => self.admit(channel, number, io),
            Ask::Unbind => match self.channels.get(&channel).copied().flatten() {
                Some(binding) => self.end(binding, None),
                None => Vec::new(),
            },
        }
    }

    fn admit(&mut self, channel: ChannelNo, number: u64, io: Io) -> Vec<Todo> {
        let refuse = |status| vec![Todo::Say(channel, Say::Done { number, status })];
        let Some(id) = self.channels.get(&channel).copied().flatten() else {
            return refuse(Status::NotBound);
        };
        let Some(binding) = self.bindings.get(&id) else { return refuse(Status::NotBound) };
        if binding.ending.is_some() {
            return refuse(Status::Fenced);
        }
        let (block, access) = match io {
            Io::Write { block, .. } => (block, Access::WRITE),
            Io::Read { block } => (block, Access::READ),
            Io::Flush => (0, Access::NONE),
        };
        if !binding.access.contains(access) {
            return refuse(Status::AccessDenied);
        }
        let range = ByteRange::new(block * crate::files::BLOCK, crate::files::BLOCK);
        if let (Some(rules), Ok(range)) = (self.rules.get(&binding.open), range) {
            if self.broken != Some(Broken::RulesIgnored) && io_conflict(&rules.rules, range, access) {
                return refuse(Status::LockConflict);
            }
        }
        self.last_io += 1;
        let (open, node) = (binding.open, binding.node);
        let flight = InFlight { binding: id, open, node, channel, number, io };
        self.in_flight.insert(self.last_io, flight);
        vec![Todo::InFlight(self.last_io)]
    }

    /// I/O has landed: `None` if it was cut off before.
    pub(crate) fn land(&mut self, io: IoNo, wall_ns: u64) -> Option<(InFlight, Vec<Todo>)> {
        let flight = self.in_flight.remove(&io)?;
        if let Some(binding) = self.bindings.get_mut(&flight.binding) {
            if matches!(flight.io, Io::Write { .. }) {
                binding.last_write_ns = wall_ns;
            }
        }
        let mut todo =
            vec![Todo::Say(flight.channel, Say::Done { number: flight.number, status: Status::Ok })];
        todo.extend(self.ended([io].into()));
        todo.extend(self.drained(flight.binding));
        Some((flight, todo))
    }

    /// Restrictions that waited for these I/Os go on.
    fn ended(&mut self, ios: BTreeSet<IoNo>) -> Vec<Todo> {
        let mut todo = Vec::new();
        self.barriers.retain_mut(|(restricted, waits)| {
            waits.retain(|io| !ios.contains(io));
            if waits.is_empty() {
                todo.push(Todo::Up(Up::Restricted(*restricted)));
            }
            !waits.is_empty()
        });
        todo
    }

    /// Control's answers and wishes.
    pub(crate) fn told(&mut self, down: Down) -> Vec<Todo> {
        match down {
            Down::Registered => {
                self.registered = true;
                Vec::new()
            }
            Down::Refuse { id, status } => {
                let channel = self.redeems.remove(&id);
                channel.map(|channel| Todo::Say(channel, Say::BindRefused(status))).into_iter().collect()
            }
            Down::Grant { id, node, grant } => self.grant(id, node, *grant),
            Down::Fence(fence) => {
                if self.bindings.contains_key(&fence.binding) {
                    self.end(fence.binding, Some(fence))
                } else {
                    vec![Todo::Up(Up::Fenced(fence))]
                }
            }
            Down::Restrict(restrict) => self.restrict(restrict),
        }
    }

    fn grant(&mut self, id: u64, node: Node, grant: Grant) -> Vec<Todo> {
        let channel = self.redeems.remove(&id).filter(|channel| self.channels.contains_key(channel));
        let Some(channel) = channel else {
            return vec![Todo::Up(Up::Released(grant.binding)), Todo::LetGo(node)];
        };
        let rules = self.rules.entry(grant.open).or_default();
        if grant.rules_version >= rules.version {
            *rules = Rules { version: grant.rules_version, rules: grant.rules };
        }
        let binding = Binding {
            open: grant.open,
            handle: grant.handle,
            epoch: grant.epoch,
            access: grant.access,
            node,
            channel,
            ending: None,
            last_write_ns: 0,
            transcript: grant.transcript,
        };
        self.bindings.insert(grant.binding, binding);
        self.channels.insert(channel, Some(grant.binding));
        let Grant { handle, epoch, proof, policy, access, .. } = grant;
        let instance = self.instance;
        vec![Todo::Say(channel, Say::Bound { handle, epoch, proof, policy, access, instance })]
    }

    fn restrict(&mut self, restrict: Restrict) -> Vec<Todo> {
        assert!(io_rules_ordered(&restrict.rules), "rules are not ordered: {restrict:?}");
        let Restrict { open, version, rules } = restrict;
        let restricted = Restricted { open, version };
        if !self.bindings.values().any(|binding| binding.open == open) {
            return vec![Todo::Up(Up::Restricted(restricted))];
        }
        let there = self.rules.entry(open).or_default();
        if version >= there.version {
            *there = Rules { version, rules };
        }
        let waits: BTreeSet<IoNo> =
            self.in_flight.iter().filter(|(_, flight)| flight.open == open).map(|(io, _)| *io).collect();
        if waits.is_empty() || self.broken == Some(Broken::BarrierEarly) {
            return vec![Todo::Up(Up::Restricted(restricted))];
        }
        let stuck: BTreeSet<LinkBinding> =
            waits.iter().filter_map(|io| self.in_flight.get(io).map(|flight| flight.binding)).collect();
        self.barriers.push((restricted, waits));
        stuck.into_iter().map(Todo::CutOff).collect()
    }

    /// A binding ends: nothing new begins.
    fn end(&mut self, id: LinkBinding, fence: Option<Fence>) -> Vec<Todo> {
        let Some(binding) = self.bindings.get_mut(&id) else { return Vec::new() };
        // A fence says more than an end by itself.
        if binding.ending.is_none() || fence.is_some() {
            binding.ending = Some(fence);
        }
        if let (Some(fence), Some(Broken::FenceEarly)) = (fence, self.broken) {
            // The mistake that the oracle must find: confirmed, while I/O is still in flight.
            let node = binding.node;
            self.bindings.remove(&id);
            return vec![Todo::Up(Up::Fenced(fence)), Todo::LetGo(node)];
        }
        let mut todo = self.drained(id);
        if todo.is_empty() {
            todo.push(Todo::CutOff(id));
        }
        todo
    }

    /// If a binding has ended and nothing of it is in flight: it is gone.
    fn drained(&mut self, id: LinkBinding) -> Vec<Todo> {
        let ending = self.bindings.get(&id).and_then(|binding| binding.ending);
        let Some(ending) = ending else { return Vec::new() };
        if self.in_flight.values().any(|flight| flight.binding == id) {
            return Vec::new();
        }
        let Some(binding) = self.bindings.remove(&id) else { return Vec::new() };
        if !self.bindings.values().any(|other| other.open == binding.open) {
            self.rules.remove(&binding.open);
        }
        let (up, status) = match ending {
            Some(fence) => (Up::Fenced(fence), fence.reason),
            None => (Up::Released(id), Status::NotBound),
        };
        if let Some(bound) = self.channels.get_mut(&binding.channel) {
            *bound = None;
        }
        vec![Todo::LetGo(binding.node), Todo::Up(up), Todo::Say(binding.channel, Say::Ended(status))]
    }

    /// The transport is stuck: what is in flight of a binding is ended by force.
    pub(crate) fn cut_off(&mut self, id: LinkBinding) -> Vec<Todo> {
        let stuck: BTreeSet<IoNo> =
            self.in_flight.iter().filter(|(_, flight)| flight.binding == id).map(|(io, _)| *io).collect();
        if stuck.is_empty() {
            return Vec::new();
        }
        self.in_flight.retain(|io, _| !stuck.contains(io));
        let mut todo = self.ended(stuck);
        todo.extend(self.end(id, None));
        todo.retain(|todo| !matches!(todo, Todo::CutOff(_)));
        todo
    }

    /// A channel has ended.
    pub(crate) fn channel_ended(&mut self, channel: ChannelNo) -> Vec<Todo> {
        match self.channels.remove(&channel).flatten() {
            Some(binding) => self.end(binding, None),
            None => Vec::new(),
        }
    }

    /// The bindings of an open that could still land something.
    pub(crate) fn of(&self, open: OpenId) -> impl Iterator<Item = LinkBinding> {
        self.bindings.iter().filter(move |(_, binding)| binding.open == open).map(|(number, _)| *number)
    }
}
