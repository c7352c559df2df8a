//! All orders of small worlds: two clients with a short script each, one file, one crash wherever it may come.
//!
//! ```text
//!  start ─► what may happen next? ─┬─► a ─► ...      a state that was seen before is not gone on with
//!                                  ├─► b ─► ...
//!                                  └─► crash ─► ...
//! ```
//!
//! A world cannot be copied, so a branch is reached again by repeating the choices that led to it: everything is
//! deterministic. What concerns only one client, and nothing that anybody else sees, happens at once and in one order.

use crate::client::{Client, Stands};
use crate::files::BLOCK;
use crate::oracle::MS;
use crate::plane::Io;
use crate::setting::{Broken, Setting};
use crate::world::{Event, World};
use holdfast_shared::types::{
    Access, CreateId, Disposition, HoldClass, LockItem, LockKind, LockRange, ShareMode,
};
use holdfast_shared::wire::control::{Open, Place};
use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// One thing that a client does once it has nothing else to wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Do {
    /// Opens the file, to read and write; true if it denies that to others.
    Open {
        /// Others may not open it.
        alone: bool,
        /// Hold time, milliseconds.
        hold_ms: u64,
    },
    /// Locks a block, exclusive.
    Lock(u64),
    /// Gives the lock up that it has.
    Unlock,
    /// Binds a channel.
    Bind,
    /// Writes a block.
    Write(u64),
    /// Loses its connection.
    Drop,
    /// Resumes.
    Resume,
    /// Closes.
    Close,
}

/// A small world.
#[derive(Clone, Debug)]
pub struct Small {
    /// What each client does.
    pub scripts: Vec<Vec<Do>>,
    /// Whether control dies, once, at any point. Clients then come back and take back what they had.
    pub crash: bool,
    /// Whether time passes: the next timer is one more thing that may happen. Else only what is due happens, what is asked
    /// of the file system is done at once, and what the disk has written is known at once.
    pub time: bool,
    /// What is broken on purpose.
    pub broken: Option<Broken>,
}

/// How much there was to see.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// Different states.
    pub states: u64,
    /// Steps from one to another.
    pub steps: u64,
    /// States in which nothing more happens.
    pub ends: u64,
    /// The longest way.
    pub depth: usize,
    /// False if there was more than was allowed to be looked at.
    pub complete: bool,
}

/// What may be chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Choice {
    Event(Event),
    Crash,
}

/// Goes through all orders, at most `limit` states.
///
/// # Errors
/// The promise that was broken, and the choices that led there.
pub fn explore(small: &Small, limit: u64) -> Result<Seen, String> {
    let mut explorer = Explorer { small, limit, visited: BTreeSet::new(), seen: Seen::default() };
    explorer.seen.complete = true;
    // Choices that lead to states not gone on with yet; the last is the next.
    let mut open: Vec<Vec<Choice>> = vec![Vec::new()];
    while let Some(path) = open.pop() {
        explorer.follow(path, &mut open)?;
        if explorer.seen.states >= explorer.limit {
            explorer.seen.complete = false;
            break;
        }
    }
    Ok(explorer.seen)
}

struct Explorer<'a> {
    small: &'a Small,
    limit: u64,
    visited: BTreeSet<u64>,
    seen: Seen,
}

impl Explorer<'_> {
    /// Repeats a way, then goes on to its end; what was not chosen is kept for later.
    fn follow(&mut self, mut path: Vec<Choice>, open: &mut Vec<Vec<Choice>>) -> Result<(), String> {
        let mut world = start(self.small);
        for choice in &path {
            take(&mut world, *choice, &path)?;
        }
        loop {
            let crash = self.small.crash && !path.contains(&Choice::Crash);
            let choices = choices(&world, crash, self.small.time);
            if !self.visited.insert(digest(&world, &path)) {
                return Ok(());
            }
            self.seen.states += 1;
            self.seen.depth = self.seen.depth.max(path.len());
            let Some((first, others)) = choices.split_first() else {
                self.seen.ends += 1;
                return self.ended(&world, &path);
            };
            for other in others {
                open.push(path.iter().copied().chain([*other]).collect());
            }
            self.seen.steps += choices.len() as u64;
            path.push(*first);
            take(&mut world, *first, &path)?;
            if path.len() > 400 {
                return Err(format!("no end: {path:?}"));
            }
        }
    }

    /// Nothing more happens: nobody may be left waiting.
    fn ended(&self, world: &World, path: &[Choice]) -> Result<(), String> {
        let stuck: Vec<&Client> = world.clients.iter().filter(|client| !client.pending.is_empty()).collect();
        if stuck.is_empty() {
            return Ok(());
        }
        let left: Vec<String> = stuck.iter().map(|client| client.left()).collect();
        Err(format!("nothing more happens, and {left:?}; after {path:?}"))
    }
}

fn start(small: &Small) -> World {
    let setting = Setting {
        clients: small.scripts.len(),
        files: 1,
        fault_every: 0,
        broken: small.broken,
        ..Setting::default()
    };
    let mut world = World::new(1, setting, false);
    world.scripted = true;
    world.returning = small.crash;
    for (client, script) in world.clients.iter_mut().zip(&small.scripts) {
        client.scripted = true;
        client.script = script.iter().rev().copied().collect();
    }
    // Until the planes have met and everybody has a session there is nothing to choose.
    let mut connected = false;
    while world.step() {
        if !connected && world.is_up() {
            connected = true;
            for client in 0..world.clients.len() {
                world.connect(client);
            }
        }
        if connected && world.clients.iter().all(|client| client.session.is_some()) {
            break;
        }
    }
    for client in 0..world.clients.len() {
        world.turn(client);
    }
    world
}

/// What may happen next, each kind once. What only one client sees happens first.
fn choices(world: &World, crash: bool, time: bool) -> Vec<Choice> {
    let mut all: Vec<Choice> =
        world.pending().iter().filter_map(|key| world.event(*key)).map(Choice::Event).collect();
    let private = |choice: &Choice| {
        matches!(
            choice,
            Choice::Event(Event::ToClient(_) | Event::ClientSees(_) | Event::ChannelDown(_) | Event::Act(_))
                // That a file was looked at is known as soon as it was: what comes between is seen as before or after.
                | Choice::Event(Event::Answer { .. })
        ) || !time && matches!(choice, Choice::Event(Event::Execute { .. } | Event::Durable { .. }))
    };
    if let Some(first) = all.iter().copied().find(private) {
        return vec![first];
    }
    // Cutting off is for transfers that are stuck; here none is.
    all.retain(|choice| !matches!(choice, Choice::Event(Event::CutOff { .. })));
    // Far timers (tombstones, overdue fences) are nothing to wait for.
    let far = if time { world.now + 120_000 * MS } else { world.now + 1 };
    all.retain(|choice| {
        let Choice::Event(event @ Event::Timer { .. }) = choice else { return true };
        world.when(*event).is_some_and(|at| at < far)
    });
    let over = world.clients.iter().all(|client| client.pending.is_empty() && client.script.is_empty());
    if over && all.iter().all(|choice| matches!(choice, Choice::Event(Event::Timer { .. }))) {
        return Vec::new();
    }
    if crash && world.control.as_ref().is_some_and(|control| control.accepting) && !over {
        all.push(Choice::Crash);
    }
    all
}

fn take(world: &mut World, choice: Choice, path: &[Choice]) -> Result<(), String> {
    let taken = catch_unwind(AssertUnwindSafe(|| match choice {
        Choice::Event(event) => {
            if let Some(key) = world.key_of_event(event) {
                world.fire(key);
            }
        }
        Choice::Crash => world.kill_control(),
    }));
    if taken.is_err() {
        return Err(format!("panic after {path:?}"));
    }
    match world.oracle.broken() {
        Some(words) => Err(format!("{words}; after {path:?}")),
        None => Ok(()),
    }
}

/// Two states with the same digest go on alike: it covers everything but names that only count.
fn digest(world: &World, path: &[Choice]) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.contains(&Choice::Crash).hash(&mut hasher);
    world.describe().hash(&mut hasher);
    hasher.finish()
}

impl World {
    /// The client does the next thing of its script, if it has nothing to wait for.
    pub(crate) fn turn(&mut self, client: usize) {
        if !self.scripted {
            return;
        }
        let Some(there) = self.clients.get_mut(client) else { return };
        if !there.pending.is_empty() {
            return;
        }
        if there.conn.is_none() {
            let lost = self.returning && there.opens.iter().any(|open| open.stands != Stands::Dead);
            let accepting = self.control.as_ref().is_some_and(|control| control.accepting);
            if there.script.is_empty() && !lost || !accepting {
                return;
            }
            return self.connect(client);
        }
        let busy = there
            .opens
            .iter()
            .any(|open| open.bound.iter().any(|bound| bound.handle.is_none() || !bound.under_way.is_empty()));
        if there.session.is_none() || busy {
            return;
        }
        let back = there.opens.iter().find(|open| open.stands == Stands::Lost).map(|open| open.uid);
        if let (Some(uid), true) = (back, self.returning) {
            return self.resume(client, uid, false, true);
        }
        let Some(next) = there.script.pop() else { return };
        let first = there.opens.first().map(|open| (open.uid, open.stands));
        let (uid, stands) = first.unwrap_or((0, Stands::Dead));
        let live = stands == Stands::Live;
        match next {
            Do::Open { alone, hold_ms } => {
                let mut id = [0x11; 16];
                id[0] = u8::try_from(client).unwrap_or(0);
                let request = Open {
                    create_id: CreateId(id),
                    place: Place { volume: "data".into(), path: "f0".into() },
                    access: Access::READ | Access::WRITE,
                    share: if alone { ShareMode::NONE } else { ShareMode::ALL },
                    disposition: Disposition::Open,
                    mode: 0,
                    hold_ms: Some(hold_ms),
                    class: HoldClass::Hold,
                    wait_ms: None,
                    delete_on_close: false,
                    process: None,
                };
                self.open_with(client, request);
            }
            Do::Lock(block) if live => {
                let range = LockRange::new(block * BLOCK, BLOCK).unwrap_or(LockRange::before(0));
                self.lock(client, uid, vec![LockItem { range, kind: LockKind::Exclusive }], None);
            }
            Do::Unlock if live => self.unlock_something(client, uid),
            Do::Bind if live => self.bind(client, uid),
            Do::Write(block) if live => {
                let tag = client as u64 + 1;
                self.io(client, uid, Io::Write { block, tag });
            }
            Do::Drop => {
                if let Some(conn) = self.clients.get(client).and_then(|there| there.conn) {
                    self.cut_conn(conn, true);
                }
            }
            Do::Resume if stands == Stands::Lost => self.resume(client, uid, false, true),
            Do::Close if live => self.close(client, uid),
            // It makes no sense any more.
            _ => {}
        }
        self.after(0, Event::Act(client));
    }
}
