//! Control's shell, simulated: it performs what the authority wants done, in its own time, and forgets everything when it
//! dies.
//!
//! ```text
//!  input ─► authority ─► effects ─┬─► reply on a connection, message on the link
//!                                 ├─► work in the file system: done later, answered later still
//!                                 └─► record: appended, committed later, told durable later still
//! ```

use crate::files::{Actor, EPOCH_NS, Node};
use crate::net::ConnNo;
use crate::oracle::MS;
use crate::plane::Down;
use crate::setting::Broken;
use crate::world::{Event, World};
use holdfast_shared::auth::SessionKey;
use holdfast_shared::journal::sim::MemoryDisk;
use holdfast_shared::journal::{Journal, WriteError};
use holdfast_shared::state::{
    Authority, Cursor, Effect, FileId, FileOpened, Fresh, Input, Inspected, Located, OperationId, Reopen,
    Subject, Work,
};
use holdfast_shared::types::{Access, CreateId, Disposition, SessionId, Status, Timestamp};
use holdfast_shared::wire::control::{Refusal, Reply, Request};
use std::collections::{BTreeMap, VecDeque};

/// What control has in memory.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) life: u64,
    pub(crate) authority: Authority,
    pub(crate) journal: Journal<MemoryDisk>,
    /// Records that the journal had no room for yet.
    backlog: VecDeque<(u64, Vec<u8>)>,
    /// The authority's number and the journal's, of records that are not durable yet.
    numbers: VecDeque<(u64, u64)>,
    /// The last chunk of a checkpoint under way.
    checkpoint: Option<Option<Cursor>>,
    room: bool,
    committing: bool,
    files: BTreeMap<FileId, Node>,
    /// Which open request a descriptor was opened for.
    creates: BTreeMap<FileId, (String, CreateId)>,
    /// How files looked when they were opened, for a shell that is broken on purpose.
    looks: BTreeMap<FileId, Inspected>,
    work: BTreeMap<OperationId, Todo>,
    done: BTreeMap<OperationId, Input>,
    pub(crate) reopen: Vec<Reopen>,
    pub(crate) accepting: bool,
    timer: Option<u64>,
    /// The principal and open request that is being handled.
    asking: Option<(String, CreateId)>,
}

#[derive(Debug)]
enum Todo {
    Open { file: FileId, at: Located, disposition: Disposition },
    Resolve(Vec<Located>),
    Perform(Work),
    Inspect(FileId),
    InspectLost { at: Located, identity: holdfast_shared::state::FileIdentity },
}

fn refused<T>(status: Status) -> Result<T, Refusal> {
    Err(Refusal { status, detail: String::new(), retry_ms: None })
}

impl Control {
    pub(crate) fn new(
        life: u64,
        authority: Authority,
        journal: Journal<MemoryDisk>,
        reopen: Vec<Reopen>,
    ) -> Self {
        Self {
            life,
            authority,
            journal,
            backlog: VecDeque::new(),
            numbers: VecDeque::new(),
            checkpoint: None,
            room: true,
            committing: false,
            files: BTreeMap::new(),
            creates: BTreeMap::new(),
            looks: BTreeMap::new(),
            work: BTreeMap::new(),
            done: BTreeMap::new(),
            reopen,
            accepting: false,
            timer: None,
            asking: None,
        }
    }

    /// What decides how it goes on, in words; of the journal only how far it is.
    pub(crate) fn describe(&self) -> String {
        format!(
            "{:?} {:?} {:?} {} {} {:?} {:?} {:?} {:?} {} {}",
            self.authority,
            self.backlog,
            self.numbers,
            self.journal.next_sequence(),
            self.journal.committed(),
            self.files,
            self.work,
            self.done,
            self.timer,
            self.committing,
            self.accepting,
        )
    }

    /// The descriptors that die with it.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = Node> {
        self.files.values().copied()
    }

    pub(crate) fn keep(&mut self, file: FileId, node: Node) {
        self.files.insert(file, node);
    }
}

impl World {
    pub(crate) fn clock(&self) -> Timestamp {
        let fast = if self.setting.broken == Some(Broken::FastClock) { 10 } else { 1 };
        Timestamp::from_nanos(self.now * fast)
    }

    /// Randomness for one request. Where all orders are tried it depends on who asks what, not on when, so that orders
    /// that lead to the same lead to the same ids.
    fn fresh(&mut self, of: u64) -> Box<Fresh> {
        if self.scripted {
            self.rng = crate::rng::Rng::new(of);
        }
        Box::new(Fresh {
            open: self.rng.bytes(),
            handle: self.rng.bytes(),
            challenge: self.rng.bytes(),
            nonce: self.rng.bytes(),
            secret_nonce: self.rng.bytes(),
            wall_ms: (EPOCH_NS + self.now) / MS,
        })
    }

    /// Gives the authority one input, and performs what comes of it.
    pub(crate) fn give(&mut self, input: Input) {
        let (now, check) = (self.clock(), self.is_check_due());
        let Some(control) = &mut self.control else { return };
        let mut effects = Vec::new();
        control.authority.handle(now, input, &mut effects);
        if check {
            control.authority.check_invariants();
        }
        self.perform(effects);
    }

    pub(crate) fn timer(&mut self) {
        let (now, check) = (self.clock(), self.is_check_due());
        let Some(control) = &mut self.control else { return };
        control.timer = None;
        if control.authority.poll_timeout().is_some_and(|due| due <= now) {
            let mut effects = Vec::new();
            control.authority.handle_timeout(now, &mut effects);
            if check {
                control.authority.check_invariants();
            }
            self.timeout_effects = self.timeout_effects.max(effects.len());
            self.perform(effects);
        } else {
            self.set_timer();
        }
    }

    fn set_timer(&mut self) {
        let fast = if self.setting.broken == Some(Broken::FastClock) { 10 } else { 1 };
        let now = self.now;
        let Some(control) = &mut self.control else { return };
        let Some(due) = control.authority.poll_timeout() else { return };
        let due = (due.as_nanos().div_ceil(fast)).max(now);
        if control.timer.is_none_or(|set| due < set) {
            control.timer = Some(due);
            let life = control.life;
            self.at(due, Event::Timer { life });
        }
    }

    /// A session's request arrives.
    pub(crate) fn request(&mut self, session: SessionId, id: u64, request: Request) {
        let fresh = self.fresh(self.net.by_session(session).unwrap_or(0) << 32 | id);
        self.look_for_room();
        let (sight, oracle) = self.sight();
        oracle.request(&sight, session, id, &request);
        let principal = self.principal_of(session);
        if let Some(control) = &mut self.control {
            control.asking = match &request {
                Request::Open(open) => Some((principal, open.create_id)),
                _ => None,
            };
        }
        self.give(Input::Request { session, id, request, fresh });
        if let Some(control) = &mut self.control {
            control.asking = None;
        }
    }

    pub(crate) fn redeem(&mut self, redeem: Box<holdfast_shared::wire::link::Redeem>) {
        let fresh = self.fresh(1 << 63 | redeem.id);
        self.give(Input::Redeem { redeem, fresh });
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.trace.note(self.now, || format!("  effect {}", short(&effect)));
            self.perform_one(effect);
        }
        self.set_timer();
    }

    fn work_later(&mut self, operation: OperationId, todo: Todo) {
        let delay = self.delay(0, 3 * MS);
        let Some(control) = &mut self.control else { return };
        control.work.insert(operation, todo);
        let life = control.life;
        self.after(delay, Event::Execute { life, operation });
    }

    fn perform_one(&mut self, effect: Effect) {
        match effect {
            Effect::Reply { session, id, reply } => self.send_reply(session, id, reply),
            Effect::Disconnect(session) => {
                let (sight, oracle) = self.sight();
                oracle.session_lost(&sight, session);
                if let Some(conn) = self.net.by_session(session) {
                    self.server_closes(conn);
                }
            }
            Effect::OpenFile { operation, file, at, disposition, follow, .. } => {
                if let Some(control) = &mut self.control {
                    if let (Some(asking), true) = (control.asking.clone(), follow) {
                        control.creates.insert(file, asking);
                    }
                }
                self.work_later(operation, Todo::Open { file, at, disposition });
            }
            Effect::CloseFile(file) => {
                if let Some(control) = &mut self.control {
                    control.creates.remove(&file);
                    control.looks.remove(&file);
                    match control.files.remove(&file) {
                        Some(node) => self.files.let_go(node),
                        None => self.oracle.fail(|| format!("{file:?} is closed and was not open")),
                    }
                }
            }
            Effect::Resolve { operation, names } => self.work_later(operation, Todo::Resolve(names)),
            Effect::Perform { operation, work } => self.work_later(operation, Todo::Perform(work)),
            Effect::Inspect { operation, file } => self.work_later(operation, Todo::Inspect(file)),
            Effect::InspectLost { operation, at, identity, .. } => {
                self.work_later(operation, Todo::InspectLost { at, identity });
            }
            Effect::Grant { id, file, grant } => {
                self.oracle.granted(grant.open, grant.binding, grant.handle);
                let node = self.control.as_ref().and_then(|control| control.files.get(&file).copied());
                match node {
                    Some(node) => {
                        self.files.hold(node);
                        if !self.tell_plane(Down::Grant { id, node, grant }) {
                            self.files.let_go(node);
                        }
                    }
                    None => self.oracle.fail(|| format!("a grant for {file:?}, which is not open")),
                }
            }
            Effect::RefuseBind { id, status } => {
                self.tell_plane(Down::Refuse { id, status });
            }
            Effect::Fence(fence) => {
                self.tell_plane(Down::Fence(fence));
            }
            Effect::Restrict(restrict) => {
                self.tell_plane(Down::Restrict(restrict));
            }
            Effect::Persist { sequence, record, .. } => {
                let (sight, oracle) = self.sight();
                oracle.persist(&sight, sequence, &record);
                match minicbor::to_vec(&*record) {
                    Ok(bytes) => self.append(sequence, bytes),
                    Err(error) => self.oracle.fail(|| format!("a record cannot be encoded: {error}")),
                }
            }
            Effect::FenceOverdue(_) => {}
        }
    }

    fn send_reply(&mut self, session: SessionId, id: u64, reply: Reply) {
        let Some(conn) = self.net.by_session(session) else { return };
        if !self.net.get_mut(conn).is_some_and(|conn| conn.server_end) {
            return;
        }
        if id != 0 {
            let (sight, oracle) = self.sight();
            oracle.reply(&sight, session, id, &reply);
            if self.setting.broken == Some(Broken::ReplyTwice) {
                let (sight, oracle) = self.sight();
                oracle.reply(&sight, session, id, &reply);
            }
        }
        if let Some(there) = self.net.get_mut(conn).filter(|there| !there.cut) {
            there.down.push_back((id, reply));
            let delay = self.delay(0, 2 * MS);
            self.after(delay, Event::ToClient(conn));
        }
    }

    // ---- journal

    fn append(&mut self, sequence: u64, bytes: Vec<u8>) {
        if let Some(control) = &mut self.control {
            control.backlog.push_back((sequence, bytes));
        }
        self.flush_backlog();
        if self.setting.broken == Some(Broken::PersistedEarly) {
            let life = self.control.as_ref().map_or(0, |control| control.life);
            self.after(0, Event::Durable { life, through: sequence });
        }
        self.commit_soon();
    }

    fn commit_soon(&mut self) {
        let delay = self.delay(0, 2 * MS);
        let Some(control) = self.control.as_mut().filter(|control| !control.committing) else { return };
        control.committing = true;
        let life = control.life;
        self.after(delay, Event::Commit { life });
    }

    fn flush_backlog(&mut self) {
        let Some(control) = &mut self.control else { return };
        while let Some((sequence, bytes)) = control.backlog.front() {
            let number = control.journal.next_sequence();
            match control.journal.append(number, bytes) {
                Ok(()) => {
                    control.numbers.push_back((*sequence, number));
                    control.backlog.pop_front();
                }
                Err(WriteError::Full | WriteError::CommitFirst) => break,
                Err(_) => return self.power_cut(),
            }
        }
    }

    /// The journal is committed: one write and one sync. They may meet a power cut half way.
    pub(crate) fn commit(&mut self) {
        self.flush_backlog();
        let Some(control) = &mut self.control else { return };
        control.committing = false;
        match control.journal.commit() {
            Ok(committed) => {
                let mut through = None;
                while control.numbers.front().is_some_and(|(_, number)| *number <= committed.through) {
                    through = control.numbers.pop_front().map(|(sequence, _)| sequence);
                }
                let life = control.life;
                let again = !control.backlog.is_empty();
                if let Some(through) = through {
                    let delay = self.delay(0, MS);
                    self.after(delay, Event::Durable { life, through });
                }
                if again {
                    self.after(100 * MS, Event::Commit { life });
                    if let Some(control) = &mut self.control {
                        control.committing = true;
                    }
                }
                self.go_on_with_checkpoint();
                self.look_for_room();
            }
            Err(WriteError::Full) => {
                control.committing = true;
                let life = control.life;
                self.after(100 * MS, Event::Commit { life });
                self.look_for_room();
            }
            Err(_) => self.power_cut(),
        }
    }

    /// Records up to this number are durable, says the disk.
    pub(crate) fn durable(&mut self, through: u64) {
        if self.setting.broken != Some(Broken::PersistedEarly) {
            self.oracle.persisted(through);
        }
        self.give(Input::Persisted(through));
    }

    fn look_for_room(&mut self) {
        let Some(control) = &mut self.control else { return };
        let room = match control.journal.room() {
            Ok(room) => room == holdfast_shared::journal::Room::Free && control.backlog.is_empty(),
            Err(_) => return self.power_cut(),
        };
        if room != control.room {
            control.room = room;
            self.give(Input::JournalRoom(room));
        }
    }

    /// A checkpoint is made in between everything else, a few records at a time.
    fn go_on_with_checkpoint(&mut self) {
        let Some(control) = &mut self.control else { return };
        let failed = match control.checkpoint.take() {
            None if control.journal.should_checkpoint() && control.backlog.is_empty() => {
                match control.journal.begin_checkpoint() {
                    Ok(()) => {
                        control.checkpoint = Some(None);
                        false
                    }
                    Err(error) => error != WriteError::Full,
                }
            }
            None => return,
            // What was said before a chunk stands before it.
            Some(cursor) if !control.backlog.is_empty() => {
                control.checkpoint = Some(cursor);
                return;
            }
            Some(cursor) => {
                let (records, next) = control.authority.checkpoint(cursor, 3);
                let mut failed = false;
                for record in records {
                    let number = control.journal.next_sequence();
                    let bytes = minicbor::to_vec(&record).unwrap_or_default();
                    failed |= control.journal.append(number, &bytes).is_err();
                }
                match next {
                    Some(cursor) => control.checkpoint = Some(Some(cursor)),
                    None => failed |= control.journal.end_checkpoint().is_err(),
                }
                failed
            }
        };
        if failed {
            return self.power_cut();
        }
        self.commit_soon();
    }

    // ---- files

    fn inspected(&self, node: Node) -> Option<Inspected> {
        let file = self.files.get(node)?;
        Some(Inspected { attributes: file.attributes(), evidence: file.evidence() })
    }

    /// The shell does a piece of work; its answer comes later.
    pub(crate) fn execute(&mut self, operation: OperationId) {
        let Some(control) = &mut self.control else { return };
        let life = control.life;
        let Some(todo) = control.work.remove(&operation) else { return };
        let input = match todo {
            Todo::Open { file, at, disposition } => self.open_file(operation, file, &at, disposition),
            Todo::Resolve(names) => {
                let found = names.iter().map(|at| {
                    let node = self.files.lookup(at.path.as_str())?;
                    self.files.get(node).map(|file| file.identity)
                });
                Input::Resolved { operation, result: Ok(found.collect()) }
            }
            Todo::Perform(work) => self.perform_work(operation, work),
            Todo::Inspect(file) => {
                let node = control.files.get(&file).copied();
                let looked = control.looks.get(&file).cloned();
                let seen = match (self.setting.broken, node) {
                    (Some(Broken::StaleEvidence), Some(node)) => looked.or_else(|| self.inspected(node)),
                    (_, Some(node)) => self.inspected(node),
                    (_, None) => None,
                };
                if seen.is_none() {
                    self.oracle.fail(|| format!("{file:?} is looked at, and is not open"));
                }
                Input::Inspected { operation, result: Ok(seen) }
            }
            Todo::InspectLost { at, identity } => {
                let node = self.files.identified(identity);
                let node = node.or_else(|| self.files.lookup(at.path.as_str())).and_then(|node| {
                    self.files.get(node).filter(|file| file.identity == identity).map(|_| node)
                });
                let seen = node.and_then(|node| self.inspected(node));
                Input::Inspected { operation, result: Ok(seen) }
            }
        };
        if let Some(control) = &mut self.control {
            control.done.insert(operation, input);
        }
        let delay = self.delay(0, 3 * MS);
        self.after(delay, Event::Answer { life, operation });
    }

    pub(crate) fn answer(&mut self, operation: OperationId) {
        let Some(input) = self.control.as_mut().and_then(|control| control.done.remove(&operation)) else {
            return;
        };
        self.trace.note(self.now, || format!("answer {}", cut(format!("{input:?}"))));
        self.give(input);
    }

    fn open_file(
        &mut self,
        operation: OperationId,
        file: FileId,
        at: &Located,
        disposition: Disposition,
    ) -> Input {
        let name = at.path.as_str();
        let there = self.files.lookup(name);
        let (node, created) = match there {
            Some(_) if disposition == Disposition::CreateNew => {
                return Input::FileOpened { operation, result: refused(Status::Exists) };
            }
            Some(node) => (node, false),
            None if disposition.creates() => (self.files.create(self.now, name), true),
            None => return Input::FileOpened { operation, result: refused(Status::NotFound) },
        };
        self.files.hold(node);
        let result = match (self.files.get(node), self.inspected(node), &mut self.control) {
            (Some(there), Some(seen), Some(control)) => {
                control.files.insert(file, node);
                control.looks.insert(file, seen.clone());
                self.oracle.knows_file(there.identity, node);
                Ok(FileOpened {
                    identity: there.identity,
                    attributes: seen.attributes,
                    created,
                    file_handle: there.handle(),
                    evidence: seen.evidence,
                })
            }
            _ => refused(Status::Io),
        };
        Input::FileOpened { operation, result }
    }

    /// Who changes a file through this descriptor.
    fn actor(&self, file: FileId) -> Actor {
        let Some(control) = &self.control else { return Actor::Unknown };
        match control.creates.get(&file) {
            Some((principal, create)) => self.oracle.actor_of(principal, *create).unwrap_or(Actor::Unknown),
            None => Actor::Unknown,
        }
    }

    fn perform_work(&mut self, operation: OperationId, work: Work) -> Input {
        let node_of = |world: &Self, subject: &Subject| match subject {
            Subject::File(file) => {
                world.control.as_ref().and_then(|control| control.files.get(file).copied())
            }
            Subject::Name(at) => world.files.lookup(at.path.as_str()),
        };
        let result = match work {
            Work::Attributes(subject) => {
                match node_of(self, &subject).and_then(|node| self.inspected(node)) {
                    Some(seen) => Ok(Reply::Attributes(seen.attributes)),
                    None => refused(Status::NotFound),
                }
            }
            Work::SetAttributes(subject, changes) => match node_of(self, &subject) {
                Some(node) => {
                    if let Some(size) = changes.size {
                        let actor = match &subject {
                            Subject::File(file) => self.actor(*file),
                            Subject::Name(_) => Actor::Control,
                        };
                        let open = match actor {
                            Actor::Open(open) => Some(open),
                            _ => None,
                        };
                        if actor != Actor::Unknown {
                            let (sight, oracle) = self.sight();
                            oracle.obeys_shares(&sight, open, node, Access::WRITE, "a size is changed");
                        }
                        self.oracle.touched(node);
                        self.files.resize(self.now, node, actor, size);
                    }
                    match self.inspected(node) {
                        Some(seen) => Ok(Reply::Attributes(seen.attributes)),
                        None => refused(Status::NotFound),
                    }
                }
                None => refused(Status::NotFound),
            },
            Work::Remove(at, identity) => {
                self.change_name(&at, identity, |world, name| world.files.unlink(world.now, name))
            }
            Work::Rename { from, to } => {
                let target = self.files.lookup(to.0.path.as_str());
                let expected = to.1.and_then(|identity| self.files.identified(identity));
                if target == expected {
                    if let Some(node) = target {
                        let (sight, oracle) = self.sight();
                        oracle.obeys_shares(&sight, None, node, Access::DELETE, "a name is replaced");
                        self.oracle.touched(node);
                    }
                    let new = to.0.path.as_str().to_owned();
                    self.change_name(&from.0, from.1, |world, name| world.files.rename(world.now, name, &new))
                } else {
                    refused(Status::NotFound)
                }
            }
            _ => Ok(Reply::Done),
        };
        Input::Performed { operation, result }
    }

    fn change_name(
        &mut self,
        at: &Located,
        identity: holdfast_shared::state::FileIdentity,
        act: impl FnOnce(&mut Self, &str),
    ) -> Result<Reply, Refusal> {
        let name = at.path.as_str();
        let Some(node) = self.files.lookup(name) else { return refused(Status::NotFound) };
        if self.files.get(node).map(|file| file.identity) != Some(identity) {
            return refused(Status::NotFound);
        }
        let (sight, oracle) = self.sight();
        oracle.obeys_shares(&sight, None, node, Access::DELETE, "a name is removed");
        self.oracle.touched(node);
        act(self, name);
        Ok(Reply::Done)
    }

    /// The server closes a connection: what it has sent still arrives.
    pub(crate) fn server_closes(&mut self, number: ConnNo) {
        let Some(conn) = self.net.get_mut(number).filter(|conn| conn.server_end) else { return };
        conn.server_end = false;
        conn.up.clear();
        let told = conn.client_end;
        if told {
            let delay = self.delay(0, 5 * MS);
            self.after(delay + 5 * MS, Event::ClientSees(number));
        }
        self.net.sweep(number);
    }
}

pub(crate) fn cut(mut text: String) -> String {
    if text.len() > 400 {
        let mut end = 400;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}

fn short(effect: &Effect) -> String {
    cut(format!("{effect:?}"))
}

/// The key of a session; both ends know it.
pub(crate) fn session_key(session: SessionId) -> SessionKey {
    let mut bytes = [0x4b; 32];
    bytes[..16].copy_from_slice(&session.0);
    SessionKey::new(holdfast_shared::auth::Secret::new(bytes))
}
