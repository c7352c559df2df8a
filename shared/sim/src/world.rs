//! The world: one queue of events in virtual time, and everything that they happen to.
//!
//! ```text
//!  clients ══ connections ══► shell + authority ══► journal ══► faulty disk
//!     ║                            ║ link
//!     ╚═════ channels ═══════► data plane ══► files ◄── writers beside the server
//! ```
//!
//! There is no thread, no clock and no order that depends on anything but the seed. Messages of one connection stay in
//! their order, everything else overtakes everything else.

use crate::client::Client;
use crate::files::{EPOCH_NS, Files, Node};
use crate::net::{ConnNo, Net};
use crate::oracle::{Listed, MS, Oracle, Sight};
use crate::plane::{Ask, ChannelNo, Down, Io, IoNo, Plane, Say, Todo, Up};
use crate::rng::Rng;
use crate::setting::{Broken, Setting};
use crate::shell::{Control, cut, session_key};
use crate::trace::Trace;
use holdfast_shared::auth::{Keyring, MacPolicy, Secret};
use holdfast_shared::journal::record::{Record, Started};
use holdfast_shared::journal::sim::{Fault, MemoryDisk};
use holdfast_shared::journal::{self, Options};
use holdfast_shared::state::{
    Counts, Input, Limits, LockMode, OperationId, Recovery, Right, SessionBegan, VolumeRules,
};
use holdfast_shared::types::{Access, ClusterId, OpenId, ProcessId, SessionId, Status, VolumeId};
use holdfast_shared::wire::control::Request;
use holdfast_shared::wire::link::{Held, LinkBinding};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

const CLUSTER: ClusterId = ClusterId([7; 16]);
/// How long the data plane waits for I/O of a fenced binding before it ends it by force.
const FENCE_NS: u64 = 2000 * MS;

/// Something that is going to happen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Event {
    Act(usize),
    ToServer(ConnNo),
    ToClient(ConnNo),
    ServerSees(ConnNo),
    ClientSees(ConnNo),
    Execute { life: u64, operation: OperationId },
    Answer { life: u64, operation: OperationId },
    Commit { life: u64 },
    Durable { life: u64, through: u64 },
    Timer { life: u64 },
    LinkUp(u64),
    LinkDown(u64),
    Connect,
    ChannelUp(ChannelNo),
    ChannelDown(ChannelNo),
    ChannelEnds(ChannelNo),
    Land { instance: u64, io: IoNo },
    CutOff { instance: u64, binding: LinkBinding },
    Fault,
    StartControl,
    StartPlane,
}

/// The socket between control and the data plane.
#[derive(Debug, Default)]
struct Link {
    number: u64,
    up: VecDeque<Up>,
    down: VecDeque<Down>,
}

#[derive(Debug, Default)]
struct Channel {
    client: usize,
    up: VecDeque<Ask>,
    down: VecDeque<Say>,
    cut: bool,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) setting: Setting,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    pub(crate) step: u64,
    queue: BTreeMap<(u64, u64), Event>,
    serial: u64,
    pub(crate) files: Files,
    pub(crate) disk: MemoryDisk,
    pub(crate) control: Option<Control>,
    lives: u64,
    pub(crate) plane: Option<Plane>,
    instances: u64,
    link: Option<Link>,
    links: u64,
    channels: BTreeMap<ChannelNo, Channel>,
    last_channel: ChannelNo,
    pub(crate) net: Net,
    pub(crate) clients: Vec<Client>,
    pub(crate) oracle: Oracle,
    pub(crate) trace: Trace,
    /// Faults are over, and everybody brings things to an end.
    pub(crate) healing: bool,
    /// Delays are zero, and the caller chooses what happens next.
    pub(crate) scripted: bool,
    /// Clients with a script take back what they have lost before they go on with it.
    pub(crate) returning: bool,
    /// The authority's invariants are checked after one input in so many.
    pub(crate) check_every: u64,
    inputs: u64,
    /// The most effects that one call for a timeout had.
    pub(crate) timeout_effects: usize,
    outside: u64,
}

impl World {
    pub(crate) fn new(seed: u64, setting: Setting, traced: bool) -> Self {
        let mut world = Self {
            rng: Rng::new(seed),
            now: MS,
            step: 0,
            queue: BTreeMap::new(),
            serial: 0,
            files: Files::new(setting.tick_ns),
            disk: MemoryDisk::new(seed),
            control: None,
            lives: 0,
            plane: None,
            instances: 0,
            link: None,
            links: 0,
            channels: BTreeMap::new(),
            last_channel: 0,
            net: Net::default(),
            clients: Vec::new(),
            oracle: Oracle::default(),
            trace: Trace::new(traced),
            healing: false,
            scripted: false,
            returning: false,
            check_every: 1,
            inputs: 0,
            timeout_effects: 0,
            outside: 0,
            setting,
        };
        for file in 0..world.setting.files {
            let node = world.files.create(0, &format!("f{file}"));
            world.files.sync(node);
        }
        world.start_control();
        world.start_plane();
        for client in 0..world.setting.clients {
            world.clients.push(Client::new(client));
            world.after(world.now, Event::Act(client));
        }
        if world.setting.fault_every > 0 {
            let delay = world.delay(0, 200 * MS);
            world.after(delay, Event::Fault);
        }
        world
    }

    // ---- time

    pub(crate) fn at(&mut self, time: u64, event: Event) {
        self.serial += 1;
        self.queue.insert((time.max(self.now), self.serial), event);
    }

    pub(crate) fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    /// A delay in `[from, to)`, now and then a much longer one.
    pub(crate) fn delay(&mut self, from: u64, to: u64) -> u64 {
        if self.scripted {
            return 0;
        }
        let delay = self.rng.between(from, to);
        if self.rng.once_in(30) && !self.healing { delay * 50 } else { delay }
    }

    pub(crate) fn sight(&mut self) -> (Sight<'_>, &mut Oracle) {
        (Sight { now: self.now, files: &self.files, plane: self.plane.as_ref() }, &mut self.oracle)
    }

    /// What may happen next: one entry for each kind of thing, the earliest of it.
    pub(crate) fn pending(&self) -> Vec<(u64, u64)> {
        let mut seen = Vec::new();
        let mut pending = Vec::new();
        for (key, event) in &self.queue {
            if !seen.contains(event) {
                seen.push(*event);
                pending.push(*key);
            }
        }
        pending
    }

    /// When this event happens.
    pub(crate) fn when(&self, event: Event) -> Option<u64> {
        self.key_of_event(event).map(|(at, _)| at)
    }

    pub(crate) fn key_of_event(&self, event: Event) -> Option<(u64, u64)> {
        self.queue.iter().find(|(_, there)| **there == event).map(|(key, _)| *key)
    }

    /// Everything that decides how it goes on, in words.
    pub(crate) fn describe(&self) -> String {
        let mut queue: Vec<(u64, Event)> = self.queue.iter().map(|((at, _), event)| (*at, *event)).collect();
        let control = self.control.as_ref().map(crate::shell::Control::describe);
        queue.sort_unstable();
        format!(
            "{:?} {queue:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?}",
            self.now, control, self.plane, self.files, self.link, self.channels, self.net, self.clients
        )
    }

    /// When the next thing happens.
    pub(crate) fn next_at(&self) -> Option<u64> {
        self.queue.first_key_value().map(|((at, _), _)| *at)
    }

    /// Both processes are there, and clients are let in.
    pub(crate) fn is_up(&self) -> bool {
        self.control.as_ref().is_some_and(|control| control.accepting)
            && self.plane.as_ref().is_some_and(|plane| plane.registered)
    }

    pub(crate) fn kill_plane(&mut self) {
        self.plane_dies();
    }

    /// The client gives a connection up, and the server does not learn of it.
    pub(crate) fn client_forgets(&mut self, conn: ConnNo) {
        if let Some(there) = self.net.get_mut(conn) {
            there.cut = true;
        }
        self.client_sees(conn);
    }

    pub(crate) fn event(&self, key: (u64, u64)) -> Option<Event> {
        self.queue.get(&key).copied()
    }

    /// The next thing happens; false if there is nothing left, or a promise is broken.
    pub(crate) fn step(&mut self) -> bool {
        match self.queue.first_key_value().map(|(key, _)| *key) {
            Some(key) => self.fire(key),
            None => false,
        }
    }

    pub(crate) fn fire(&mut self, key: (u64, u64)) -> bool {
        let Some(event) = self.queue.remove(&key) else { return false };
        self.now = self.now.max(key.0);
        self.step += 1;
        self.trace.note(self.now, || format!("{event:?}"));
        self.happen(event);
        self.oracle.broken().is_none()
    }

    /// True if the invariants are to be checked now.
    pub(crate) fn is_check_due(&mut self) -> bool {
        self.inputs += 1;
        self.inputs % self.check_every == 0
    }

    fn lives(&self, life: u64) -> bool {
        self.control.as_ref().is_some_and(|control| control.life == life)
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Act(client) => self.act(client),
            Event::ToServer(conn) => self.server_hears(conn),
            Event::ToClient(conn) => self.client_hears(conn),
            Event::ServerSees(conn) => self.server_sees(conn),
            Event::ClientSees(conn) => self.client_sees(conn),
            Event::Execute { life, operation } if self.lives(life) => self.execute(operation),
            Event::Answer { life, operation } if self.lives(life) => self.answer(operation),
            Event::Commit { life } if self.lives(life) => self.commit(),
            Event::Durable { life, through } if self.lives(life) => self.durable(through),
            Event::Timer { life } if self.lives(life) => self.timer(),
            Event::LinkUp(link) => self.link_up(link),
            Event::LinkDown(link) => self.link_down(link),
            Event::Connect => self.connect_link(),
            Event::ChannelUp(channel) => self.channel_up(channel),
            Event::ChannelDown(channel) => self.channel_down(channel),
            Event::ChannelEnds(channel) => {
                if let Some(plane) = &mut self.plane {
                    let todo = plane.channel_ended(channel);
                    self.plane_does(todo);
                }
            }
            Event::Land { instance, io } => self.land(instance, io),
            Event::CutOff { instance, binding } => {
                if let Some(plane) = self.plane.as_mut().filter(|plane| plane.instance == instance) {
                    let todo = plane.cut_off(binding);
                    self.plane_does(todo);
                }
            }
            Event::Fault => self.fault(),
            Event::StartControl => self.start_control(),
            Event::StartPlane => self.start_plane(),
            // Of a control that has died.
            Event::Execute { .. }
            | Event::Answer { .. }
            | Event::Commit { .. }
            | Event::Durable { .. }
            | Event::Timer { .. } => {}
        }
    }

    // ---- connections

    pub(crate) fn send(&mut self, conn: ConnNo, id: u64, request: Request) {
        if let Some(there) = self.net.get_mut(conn).filter(|there| !there.cut) {
            there.up.push_back((id, request));
            let delay = self.delay(0, 2 * MS);
            self.after(delay, Event::ToServer(conn));
        }
    }

    pub(crate) fn principal_of(&mut self, session: SessionId) -> String {
        let conn = self.net.by_session(session);
        let client = conn.and_then(|conn| self.net.get_mut(conn)).map(|conn| conn.client);
        client
            .and_then(|client| self.clients.get(client))
            .map(|client| client.principal.to_owned())
            .unwrap_or_default()
    }

    fn server_hears(&mut self, number: ConnNo) {
        let accepting = self.control.as_ref().is_some_and(|control| control.accepting);
        let Some(conn) = self.net.get_mut(number).filter(|conn| conn.server_end) else { return };
        if !accepting {
            return self.server_closes(number);
        }
        let session = conn.session;
        let Some((id, request)) = conn.up.pop_front() else { return };
        self.trace.note(self.now, || format!("  asks {id} {}", cut(format!("{request:?}"))));
        if !conn.begun {
            conn.begun = true;
            let client = conn.client;
            let principal = self.principal_of(session);
            self.oracle.session_began(session, &principal);
            return self.give(Input::SessionBegan(Box::new(SessionBegan {
                session,
                request: id,
                principal,
                key: session_key(session),
                process: ProcessId(client as u64),
            })));
        }
        self.request(session, id, request);
    }

    fn client_hears(&mut self, number: ConnNo) {
        let Some(conn) = self.net.get_mut(number).filter(|conn| conn.client_end) else { return };
        let client = conn.client;
        if let Some((id, reply)) = conn.down.pop_front() {
            self.trace.note(self.now, || format!("  c{client} hears {id} {}", cut(format!("{reply:?}"))));
            self.hear(client, number, id, reply);
        }
    }

    fn server_sees(&mut self, number: ConnNo) {
        let Some(conn) = self.net.get_mut(number).filter(|conn| conn.server_end) else { return };
        conn.server_end = false;
        let (session, begun) = (conn.session, conn.begun);
        self.net.sweep(number);
        if begun && self.control.as_ref().is_some_and(|control| control.accepting) {
            let (sight, oracle) = self.sight();
            oracle.session_lost(&sight, session);
            self.give(Input::SessionLost(session));
        }
    }

    fn client_sees(&mut self, number: ConnNo) {
        let Some(conn) = self.net.get_mut(number).filter(|conn| conn.client_end) else { return };
        conn.client_end = false;
        let client = conn.client;
        conn.down.clear();
        self.net.sweep(number);
        self.lost(client, number);
    }

    /// The connection is cut. What was sent may still arrive at the server, or not.
    pub(crate) fn cut_conn(&mut self, number: ConnNo, client_knows: bool) {
        let arrives = !self.scripted && self.rng.once_in(2);
        let Some(conn) = self.net.get_mut(number).filter(|conn| !conn.cut) else { return };
        conn.cut = true;
        conn.down.clear();
        if !arrives {
            conn.up.clear();
        }
        let (slow, quick) = (self.rng.between(0, 20_000 * MS), self.rng.between(0, 20 * MS));
        let late = self.rng.once_in(4) && !self.healing;
        let (seen, quick) = match (self.scripted, late) {
            (true, _) => (0, 0),
            (false, true) => (slow, quick),
            (false, false) => (20 * MS + quick, quick),
        };
        self.after(seen, Event::ServerSees(number));
        if client_knows {
            self.client_sees(number);
        } else {
            self.after(quick, Event::ClientSees(number));
        }
    }

    // ---- channels

    pub(crate) fn open_channel(&mut self, client: usize) -> ChannelNo {
        self.last_channel += 1;
        self.channels.insert(self.last_channel, Channel { client, ..Channel::default() });
        self.last_channel
    }

    pub(crate) fn ask_plane(&mut self, number: ChannelNo, ask: Ask) {
        if let Some(channel) = self.channels.get_mut(&number).filter(|channel| !channel.cut) {
            channel.up.push_back(ask);
            let delay = self.delay(0, MS);
            self.after(delay, Event::ChannelUp(number));
        }
    }

    fn channel_up(&mut self, number: ChannelNo) {
        let Some(channel) = self.channels.get_mut(&number) else { return };
        let Some(ask) = channel.up.pop_front() else { return };
        match &mut self.plane {
            Some(plane) => {
                let todo = plane.asked(number, ask);
                self.plane_does(todo);
            }
            None => self.cut_channel(number),
        }
    }

    fn channel_down(&mut self, number: ChannelNo) {
        let Some(channel) = self.channels.get_mut(&number) else { return };
        let client = channel.client;
        if let Some(say) = channel.down.pop_front() {
            self.trace
                .note(self.now, || format!("  c{client} hears on {number}: {}", cut(format!("{say:?}"))));
            self.hear_plane(client, number, say);
        }
    }

    /// The channel is cut: its client learns of it at once, the data plane later. What was asked may still arrive.
    pub(crate) fn cut_channel(&mut self, number: ChannelNo) {
        let Some(channel) = self.channels.get_mut(&number) else { return };
        let client = channel.client;
        channel.cut = true;
        channel.down.clear();
        if self.scripted || self.rng.once_in(2) || self.healing {
            channel.up.clear();
        }
        let delay = self.delay(5 * MS, 30 * MS);
        self.after(delay, Event::ChannelEnds(number));
        self.lost_channel(client, number);
    }

    // ---- the data plane

    fn plane_does(&mut self, todo: Vec<Todo>) {
        for todo in todo {
            let instance = self.plane.as_ref().map_or(0, |plane| plane.instance);
            match todo {
                Todo::Up(up) => {
                    if let Some(link) = &mut self.link {
                        link.up.push_back(up);
                        let number = link.number;
                        let delay = self.delay(0, MS);
                        self.after(delay, Event::LinkUp(number));
                    }
                }
                Todo::Say(number, say) => {
                    if let Some(channel) = self.channels.get_mut(&number).filter(|channel| !channel.cut) {
                        channel.down.push_back(say);
                        let delay = self.delay(0, MS);
                        self.after(delay, Event::ChannelDown(number));
                    }
                }
                Todo::InFlight(io) => {
                    // Now and then a transfer is stuck in the fabric for long.
                    let held = self.rng.once_in(12) && !self.healing && !self.scripted;
                    let delay = if held { self.rng.between(0, 6_000 * MS) } else { self.delay(0, 2 * MS) };
                    self.after(delay, Event::Land { instance, io });
                }
                Todo::CutOff(binding) => self.after(FENCE_NS, Event::CutOff { instance, binding }),
                Todo::LetGo(node) => self.files.let_go(node),
            }
        }
    }

    fn land(&mut self, instance: u64, io: IoNo) {
        let wall = EPOCH_NS + self.now;
        let Some(plane) = self.plane.as_mut().filter(|plane| plane.instance == instance) else { return };
        let Some(flight) = plane.in_flight.get(&io).cloned() else { return };
        let (sight, oracle) = self.sight();
        match flight.io {
            Io::Write { block, .. } => {
                oracle.landed(&sight, flight.open, flight.binding, flight.node, block, Access::WRITE);
            }
            Io::Read { block } => {
                oracle.landed(&sight, flight.open, flight.binding, flight.node, block, Access::READ);
            }
            Io::Flush => {}
        }
        match flight.io {
            Io::Write { block, tag } => {
                let by = crate::files::Actor::Binding(flight.open, flight.binding);
                self.files.write(self.now, flight.node, by, block, tag);
            }
            Io::Read { block } => {
                self.files.read(flight.node, block);
            }
            Io::Flush if self.setting.broken == Some(Broken::FlushNothing) => {}
            Io::Flush => self.files.sync(flight.node),
        }
        let landed = self.plane.as_mut().and_then(|plane| plane.land(io, wall));
        if let Some((_, todo)) = landed {
            self.plane_does(todo);
        }
    }

    // ---- the link

    pub(crate) fn tell_plane(&mut self, down: Down) -> bool {
        let Some(link) = &mut self.link else { return false };
        link.down.push_back(down);
        let number = link.number;
        let delay = self.delay(0, MS);
        self.after(delay, Event::LinkDown(number));
        true
    }

    fn link_up(&mut self, number: u64) {
        let Some(link) = self.link.as_mut().filter(|link| link.number == number) else { return };
        let Some(up) = link.up.pop_front() else { return };
        self.trace.note(self.now, || format!("  control hears {}", cut(format!("{up:?}"))));
        match up {
            Up::Register { instance, held } => self.registered(instance, held),
            Up::Redeem(redeem) => self.redeem(redeem),
            Up::Fenced(fence) => self.give(Input::Fenced(fence)),
            Up::Released(binding) => self.give(Input::Released(binding)),
            Up::Restricted(restricted) => self.give(Input::Restricted(restricted)),
        }
    }

    fn registered(&mut self, instance: u64, held: Vec<(Held, Node)>) {
        let nodes: BTreeMap<OpenId, Node> = held.iter().map(|(held, node)| (held.open, *node)).collect();
        self.reopen(&nodes);
        self.tell_plane(Down::Registered);
        let held = held.into_iter().map(|(held, _)| held).collect();
        self.give(Input::LinkUp { service_blob: instance.to_le_bytes().to_vec(), held });
        self.accept();
    }

    fn link_down(&mut self, number: u64) {
        let Some(link) = self.link.as_mut().filter(|link| link.number == number) else { return };
        let Some(down) = link.down.pop_front() else { return };
        self.trace.note(self.now, || format!("  plane hears {}", cut(format!("{down:?}"))));
        if let Some(plane) = &mut self.plane {
            let todo = plane.told(down);
            self.plane_does(todo);
        }
    }

    /// The socket breaks: messages under way are lost, both sides live on, and the plane comes back.
    fn link_ends(&mut self) {
        let Some(link) = self.link.take() else { return };
        for down in link.down {
            if let Down::Grant { node, .. } = down {
                self.files.let_go(node);
            }
        }
        if let Some(plane) = &mut self.plane {
            let todo = plane.link_ended();
            self.plane_does(todo);
            let delay = self.delay(MS, 50 * MS);
            self.after(delay, Event::Connect);
        }
        if self.control.as_ref().is_some_and(|control| control.accepting) {
            self.give(Input::LinkDown);
        }
    }

    fn connect_link(&mut self) {
        if self.link.is_some() {
            return;
        }
        let Some(plane) = &mut self.plane else { return };
        if self.control.is_none() {
            let delay = self.delay(20 * MS, 250 * MS);
            return self.after(delay, Event::Connect);
        }
        self.links += 1;
        let register = plane.register();
        self.link = Some(Link { number: self.links, ..Link::default() });
        self.plane_does(vec![Todo::Up(register)]);
    }

    pub(crate) fn start_plane(&mut self) {
        if self.plane.is_none() {
            self.instances += 1;
            self.plane = Some(Plane::new(self.instances, self.setting.broken));
            self.after(MS, Event::Connect);
        }
    }

    /// The data plane's process ends, and all its descriptors and channels with it.
    fn plane_dies(&mut self) {
        let Some(plane) = self.plane.take() else { return };
        for binding in plane.bindings.values() {
            self.files.let_go(binding.node);
        }
        let channels: Vec<ChannelNo> = self.channels.keys().copied().collect();
        for channel in channels {
            self.cut_channel(channel);
        }
        self.link_ends();
        // Its lock is free: control knows that it is dead.
        match &self.control {
            Some(control) if control.accepting => self.give(Input::LinkLost),
            Some(_) => {
                self.reopen(&BTreeMap::new());
                self.give(Input::LinkLost);
                self.accept();
            }
            None => {}
        }
        let delay = self.delay(5 * MS, 300 * MS);
        self.after(delay, Event::StartPlane);
    }

    // ---- control

    fn volumes(&self) -> Vec<VolumeRules> {
        let grants = [("u1", Right::ReadWrite), ("u2", Right::ReadWrite)];
        vec![VolumeRules {
            id: VolumeId([1; 16]),
            name: "data".into(),
            policy: MacPolicy::Header,
            grants: grants.iter().map(|(principal, right)| ((*principal).to_owned(), *right)).collect(),
            lock_mode: LockMode::Mandatory,
            hold_default_ms: 10_000,
            hold_max_ms: 60_000,
            local_descriptors: false,
            direct: false,
        }]
    }

    fn start_control(&mut self) {
        if self.control.is_some() {
            return;
        }
        self.lives += 1;
        let life = self.lives;
        let limits = Limits {
            opens_per_principal: self.setting.opens_per_principal,
            linger: Duration::from_millis(500),
            ..Limits::default()
        };
        let keyring = Keyring::new(CLUSTER, 1, &Secret::new([9; 32]));
        let mut recovery = Some(Recovery::new(limits, self.volumes(), keyring, life));
        let mut records = 0;
        let read = journal::recover(self.disk.clone(), CLUSTER, &mut |recovered| {
            let record: Record = minicbor::decode(recovered.payload).map_err(|error| error.to_string())?;
            records += 1;
            let recovery = recovery.as_mut().ok_or("no recovery")?;
            recovery.apply(record, recovered.in_checkpoint).map_err(|error| error.to_string())
        });
        let read = match read {
            Ok(read) => read,
            Err(error) => return self.oracle.fail(|| format!("the journal is not read again: {error}")),
        };
        let last = read.summary().last_sequence;
        let options = Options { step_bytes: 16 * 1024, reserve_bytes: 0, checkpoint_bytes: 24 * 1024 };
        let mut journal = match read.start(life, options) {
            Ok(journal) => journal,
            Err(error) => return self.starts_later(&error.to_string()),
        };
        let started = Record::Started(Started { generation: life, wall_ms: (EPOCH_NS + self.now) / MS });
        let written = minicbor::to_vec(&started).map_err(|error| error.to_string()).and_then(|bytes| {
            journal
                .append(last + 1, &bytes)
                .and_then(|()| journal.commit())
                .map_err(|error| error.to_string())
        });
        if let Err(error) = written {
            return self.starts_later(&error);
        }
        let Some(recovery) = recovery.take() else { return };
        let (authority, reopen) = recovery.finish(last + 1);
        self.trace.note(self.now, || {
            format!("control {life} starts with {records} records, {} opens", reopen.len())
        });
        self.control = Some(Control::new(life, authority, journal, reopen));
        if self.plane.is_none() {
            self.reopen(&BTreeMap::new());
            // None lives, so nothing of before is under way.
            self.give(Input::LinkLost);
            self.accept();
        }
    }

    /// The disk failed under the start: the machine loses its power, or the operator makes room.
    fn starts_later(&mut self, why: &str) {
        self.trace.note(self.now, || format!("control cannot start: {why}"));
        self.disk.set_capacity(u64::MAX);
        self.power_cut();
        self.after(100 * MS, Event::StartControl);
    }

    /// Opens every recorded file again: by the data plane's descriptors, else by the kernel's handle.
    fn reopen(&mut self, nodes: &BTreeMap<OpenId, Node>) {
        let Some(control) = self.control.as_mut().filter(|control| !control.accepting) else { return };
        let reopen = std::mem::take(&mut control.reopen);
        let lives = self.plane.is_some();
        for file in reopen {
            let node = nodes.get(&file.open).copied().or_else(|| self.files.identified(file.identity));
            let found = node.and_then(|node| Some((node, self.files.get(node)?)));
            let result = match found {
                Some((node, there)) => {
                    let seen = holdfast_shared::state::Inspected {
                        attributes: there.attributes(),
                        evidence: there.evidence(),
                    };
                    self.files.hold(node);
                    if let Some(control) = &mut self.control {
                        control.keep(file.file, node);
                    }
                    Ok(seen)
                }
                None => {
                    self.oracle.file_lost(file.open);
                    Err("it is not there".to_owned())
                }
            };
            self.give(Input::Reopened { open: file.open, result });
        }
        if lives {
            self.give(Input::DataplaneMayLive);
        }
    }

    /// Everything is as it was: clients may come.
    fn accept(&mut self) {
        let now = self.clock();
        let Some(control) = self.control.as_mut().filter(|control| !control.accepting) else { return };
        control.accepting = true;
        let mut listed = Vec::new();
        let mut after = None;
        loop {
            let page = control.authority.list_opens(now, after, 100);
            let Some(last) = page.last() else { break };
            after = Some(last.open);
            listed.extend(page.iter().map(|view| Listed { open: view.open, locks: view.locks.len() }));
        }
        let (sight, oracle) = self.sight();
        oracle.recovered(&sight, &listed);
        if self.scripted {
            for client in 0..self.clients.len() {
                self.after(0, Event::Act(client));
            }
        }
    }

    /// Control's process ends: its memory and descriptors are gone, its connections break.
    pub(crate) fn control_dies(&mut self) {
        let Some(control) = self.control.take() else { return };
        for node in control.descriptors() {
            self.files.let_go(node);
        }
        drop(control);
        self.oracle.control_died();
        for conn in self.net.at_server() {
            self.server_closes(conn);
        }
        self.link_ends();
        let delay = self.delay(5 * MS, 500 * MS);
        self.after(delay, Event::StartControl);
    }

    /// Both processes end with the machine, and what was not synced is lost in part.
    pub(crate) fn power_cut(&mut self) {
        self.trace.note(self.now, || "power cut".to_owned());
        self.control_dies();
        self.plane_dies();
        self.disk.power_on();
        let torn = self.setting.torn_times;
        self.files.power_cut(&mut self.rng, torn);
    }

    /// The machine stands, control alone is killed: what it wrote is in the system's cache.
    pub(crate) fn kill_control(&mut self) {
        if self.setting.broken == Some(Broken::SyncForgets) {
            self.forget_synced();
        }
        self.control_dies();
    }

    /// The mistake that the oracle must find: the end of what was synced is lost.
    fn forget_synced(&mut self) {
        for name in holdfast_shared::journal::Disk::list(&self.disk).unwrap_or_default() {
            if let Some(mut bytes) = self.disk.bytes(&name) {
                let end = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0);
                let from = end.saturating_sub(300).max(holdfast_shared::journal::layout::HEADER_BYTES);
                if from < end {
                    bytes[from..=end].fill(0);
                    self.disk.put(&name, &bytes);
                }
            }
        }
    }

    // ---- faults

    fn fault(&mut self) {
        if self.healing || self.setting.fault_every == 0 {
            return;
        }
        let gap = self.setting.fault_every * MS;
        let delay = self.rng.between(gap / 2, gap * 4);
        self.after(delay, Event::Fault);
        let s = self.setting.clone();
        match self.rng.below(10) {
            0 if s.crash_control => self.kill_control(),
            1 if s.crash_plane => self.plane_dies(),
            2 => self.link_ends(),
            3 if s.power_cut => {
                if self.rng.once_in(2) {
                    self.power_cut();
                } else {
                    // In the middle of what the journal does next.
                    let next = self.disk.operations() + 1 + self.rng.below(4);
                    self.disk.fault_at(next, Fault::PowerCut);
                }
            }
            4 if s.outside => self.write_outside(),
            5 if s.full_disk => {
                let room = self.rng.below(64 * 1024);
                let space = if self.rng.once_in(2) { u64::MAX } else { self.disk.used() + room };
                self.disk.set_capacity(space);
            }
            6 if s.jumps => {
                let jump = self.rng.between(100 * MS, 15_000 * MS);
                self.trace.note(self.now, || format!("time jumps by {} ms", jump / MS));
                self.now += jump;
            }
            7 if s.force_close => self.force_close_one(),
            8 => {
                let conns = self.net.at_server();
                if let Some(conn) = self.rng.pick(&conns).copied() {
                    self.cut_conn(conn, false);
                }
            }
            9 => {
                let channels: Vec<ChannelNo> = self
                    .channels
                    .iter()
                    .filter(|(_, channel)| !channel.cut)
                    .map(|(number, _)| *number)
                    .collect();
                if let Some(channel) = self.rng.pick(&channels).copied() {
                    self.cut_channel(channel);
                }
            }
            _ => {}
        }
    }

    pub(crate) fn write_outside(&mut self) {
        let nodes: Vec<Node> = self.files.names().map(|(_, node)| *node).collect();
        let Some(node) = self.rng.pick(&nodes).copied() else { return };
        self.outside += 1;
        let (block, tag) = (self.rng.below(crate::files::BLOCKS), (0xffff << 48) | self.outside);
        self.trace.note(self.now, || format!("somebody beside the server writes block {block} of {node}"));
        self.oracle.touched(node);
        self.files.write_outside(self.now, node, block, tag);
    }

    fn force_close_one(&mut self) {
        let opens = self.listed();
        if let Some(open) = self.rng.pick(&opens).copied() {
            self.force_close(open);
        }
    }

    pub(crate) fn force_close(&mut self, open: OpenId) {
        if self.control.as_ref().is_some_and(|control| control.accepting) {
            self.trace.note(self.now, || format!("the operator closes {open}"));
            self.oracle.force_close(open);
            self.give(Input::ForceClose(open));
        }
    }

    pub(crate) fn was_forced(&self, open: OpenId) -> bool {
        self.oracle.was_forced(open)
    }

    /// All opens that the authority lists.
    pub(crate) fn listed(&self) -> Vec<OpenId> {
        let now = self.clock();
        let listed = self.control.as_ref().map(|control| control.authority.list_opens(now, None, 10_000));
        listed.unwrap_or_default().into_iter().map(|view| view.open).collect()
    }

    pub(crate) fn counts(&self) -> Option<Counts> {
        self.control.as_ref().map(|control| control.authority.counts())
    }

    /// The end of faults: whatever is down starts again, whatever is full has room.
    pub(crate) fn heal(&mut self) {
        self.healing = true;
        self.disk.set_capacity(u64::MAX);
        self.after(0, Event::StartControl);
        self.after(MS, Event::StartPlane);
        self.after(2 * MS, Event::Connect);
        for client in 0..self.clients.len() {
            self.after(10 * MS, Event::Act(client));
        }
    }

    /// True if a status says that trying again helps.
    pub(crate) fn passes(status: Status) -> bool {
        matches!(
            status,
            Status::Busy | Status::Unavailable | Status::TooMany | Status::NoSpace | Status::ShareConflict
        )
    }
}
