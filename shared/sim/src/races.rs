//! Scenes with a script: what happens is fixed, when it happens is up to the seed.
//!
//! ```text
//!  scene ─► clients do as told ─► the world runs on its own ─► who was told what?
//! ```

use crate::client::{Stands, Uid};
use crate::files::BLOCK;
use crate::oracle::MS;
use crate::run::settle;
use crate::setting::Setting;
use crate::world::World;
use holdfast_shared::journal::sim::Fault;
use holdfast_shared::types::{
    Access, CreateId, Disposition, HoldClass, LockItem, LockKind, LockRange, ShareMode, Status,
};
use holdfast_shared::wire::control::{CancelLock, Open, Place, Request};

const RW: Access = Access::READ.union(Access::WRITE);

/// A world in which only the script does anything.
struct Scene {
    world: World,
}

fn quiet(clients: usize) -> Setting {
    Setting {
        clients,
        files: 2,
        fault_every: 0,
        crash_control: false,
        crash_plane: false,
        power_cut: false,
        outside: false,
        full_disk: false,
        jumps: false,
        force_close: false,
        names: false,
        torn_times: false,
        tick_ns: 1,
        opens_per_principal: 100_000,
        broken: None,
    }
}

fn exclusive(block: u64) -> LockItem {
    let range = LockRange::new(block * BLOCK, BLOCK).unwrap_or(LockRange::before(0));
    LockItem { range, kind: LockKind::Exclusive }
}

impl Scene {
    fn new(seed: u64, clients: usize) -> Result<Self, String> {
        Self::with(seed, quiet(clients))
    }

    fn with(seed: u64, setting: Setting) -> Result<Self, String> {
        let mut world = World::new(seed, setting, false);
        for client in &mut world.clients {
            client.scripted = true;
        }
        let mut scene = Self { world };
        scene.until("a start", World::is_up)?;
        for client in 0..scene.world.clients.len() {
            scene.world.connect(client);
        }
        scene.until("sessions", |world| world.clients.iter().all(|client| client.session.is_some()))?;
        Ok(scene)
    }

    fn fine(&self) -> Result<(), String> {
        self.world.oracle.broken().map_or(Ok(()), |words| Err(words.to_owned()))
    }

    /// Lets some milliseconds pass.
    fn run(&mut self, ms: u64) -> Result<(), String> {
        self.run_ns(ms * MS)
    }

    fn run_ns(&mut self, ns: u64) -> Result<(), String> {
        let end = self.world.now + ns;
        while self.world.next_at().is_some_and(|at| at <= end) && self.world.step() {}
        self.world.now = self.world.now.max(end);
        self.fine()
    }

    fn until(&mut self, what: &str, done: impl Fn(&World) -> bool) -> Result<(), String> {
        let end = self.world.now + 120_000 * MS;
        while !done(&self.world) {
            if !self.world.step() || self.world.now > end {
                self.fine()?;
                return Err(format!("waited in vain for: {what}"));
            }
        }
        self.fine()
    }

    fn request(&mut self, file: u64, share: ShareMode, hold_ms: u64) -> Open {
        Open {
            create_id: CreateId(self.world.rng.bytes()),
            place: Place { volume: "data".into(), path: format!("f{file}") },
            access: RW,
            share,
            disposition: Disposition::Open,
            mode: 0,
            hold_ms: Some(hold_ms),
            class: HoldClass::Hold,
            wait_ms: None,
            delete_on_close: false,
            process: None,
        }
    }

    fn open(&mut self, client: usize, request: Open) -> Result<Uid, String> {
        let uid = self.world.open_with(client, request);
        self.until("an open", |world| stands(world, client, uid) == Some(Stands::Live))?;
        Ok(uid)
    }

    fn write(&mut self, client: usize, uid: Uid) -> Result<(), String> {
        self.world.bind(client, uid);
        self.until("a bind", |world| {
            let open = world.clients[client].opens.iter().find(|open| open.uid == uid);
            open.is_some_and(|open| open.bound.iter().any(|bound| bound.handle.is_some()))
        })?;
        self.world.write_something(client, uid);
        self.until("a write", |world| {
            let open = world.clients[client].opens.iter().find(|open| open.uid == uid);
            open.is_some_and(|open| !open.unflushed.is_empty())
        })
    }

    /// The client's connection breaks; both ends learn of it.
    fn lose(&mut self, client: usize) -> Result<(), String> {
        let conn = self.world.clients[client].conn.ok_or("no connection")?;
        self.world.cut_conn(conn, true);
        self.until("the loss", |world| !world.net.at_server().contains(&conn))
    }

    fn connect(&mut self, client: usize) -> Result<(), String> {
        if self.world.clients[client].conn.is_none() {
            self.world.connect(client);
        }
        self.until("a session", |world| world.clients[client].session.is_some())
    }

    fn stands(&self, client: usize, uid: Uid) -> Option<Stands> {
        stands(&self.world, client, uid)
    }

    /// Nothing is under way.
    fn idle(&mut self, clients: &[usize]) -> Result<(), String> {
        let clients = clients.to_vec();
        self.until("answers", move |world| {
            clients.iter().all(|client| world.clients[*client].pending.is_empty())
        })
    }

    fn end(mut self) -> Result<(), String> {
        for client in &mut self.world.clients {
            client.scripted = false;
        }
        settle(&mut self.world)
    }
}

fn stands(world: &World, client: usize, uid: Uid) -> Option<Stands> {
    world.clients[client].opens.iter().find(|open| open.uid == uid).map(|open| open.stands)
}

/// What became of a race between a resume and an open that conflicts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Winner {
    /// The resume came first; the other was refused.
    Resume,
    /// The other came first; the resume was told so.
    Contender,
}

/// A detached open is resumed, and another client opens its file, around the moment when its time is over.
///
/// # Errors
/// A broken promise: both, or neither.
pub fn resume_against_open(seed: u64) -> Result<Winner, String> {
    let mut scene = Scene::new(seed, 2)?;
    let request = scene.request(0, ShareMode::NONE, 200);
    let first = scene.open(0, request)?;
    let bound = scene.world.rng.once_in(2);
    if bound {
        scene.write(0, first)?;
    }
    scene.lose(0)?;
    scene.connect(0)?;
    scene.run(150)?;
    let waits = [scene.world.rng.below(100 * MS), scene.world.rng.below(100 * MS)];
    let contender = scene.request(0, ShareMode::ALL, 200);
    let mut asked = [false; 2];
    let mut second = 0;
    let start = scene.world.now;
    while asked != [true; 2] {
        let next = if asked[0] || (!asked[1] && waits[1] < waits[0]) { 1 } else { 0 };
        let due = start + waits[next];
        scene.run_ns(due.saturating_sub(scene.world.now))?;
        asked[next] = true;
        if next == 0 {
            let keep = scene.world.rng.once_in(2);
            scene.world.resume(0, first, keep, false);
        } else {
            second = scene.world.open_with(1, contender.clone());
        }
    }
    scene.idle(&[0, 1])?;
    // An open that is just being evicted is not told so yet; asking again settles it.
    for _ in 0..20 {
        if scene.stands(0, first) == Some(Stands::Lost) && scene.stands(1, second) == Some(Stands::Live) {
            scene.run(50)?;
            scene.world.resume(0, first, false, false);
            scene.idle(&[0])?;
        }
    }
    let resumed = scene.stands(0, first) == Some(Stands::Live);
    let opened = scene.stands(1, second) == Some(Stands::Live);
    let gone = scene.world.oracle.verdicts[3];
    let winner = match (resumed, opened, gone) {
        (true, false, 0) => Winner::Resume,
        (false, true, 1) => Winner::Contender,
        other => {
            return Err(format!("resumed, opened, gone: {other:?}; {:?}", scene.world.clients[0].refused));
        }
    };
    scene.end()?;
    Ok(winner)
}

/// Two connections resume the same open at once.
///
/// # Errors
/// A broken promise: both, or neither, or more than one epoch.
pub fn resume_against_resume(seed: u64) -> Result<usize, String> {
    let mut scene = Scene::new(seed, 3)?;
    let request = scene.request(0, ShareMode::NONE, 60_000);
    let uid = scene.open(0, request)?;
    if scene.world.rng.once_in(2) {
        scene.write(0, uid)?;
    }
    let supersede = scene.world.rng.once_in(2);
    let conn = scene.world.clients[0].conn;
    if !supersede || scene.world.rng.once_in(2) {
        scene.lose(0)?;
    } else if let Some(conn) = conn {
        scene.world.client_forgets(conn);
    }
    let open = scene.world.clients[0].opens[0].clone();
    let epoch = open.told.as_ref().map_or(0, |told| told.epoch);
    // The same principal's other connection knows the same key.
    let mut copy = open;
    copy.bound.clear();
    scene.world.clients[2].last_uid = uid;
    scene.world.clients[2].opens.push(copy);
    scene.connect(0)?;
    let racers = [0, 2];
    for racer in racers {
        scene.world.resume(racer, uid, false, supersede);
        let pause = scene.world.rng.below(3 * MS);
        scene.run_ns(pause)?;
    }
    scene.idle(&racers)?;
    let won: Vec<usize> =
        racers.into_iter().filter(|racer| scene.stands(*racer, uid) == Some(Stands::Live)).collect();
    let [winner] = won[..] else { return Err(format!("resumed by {won:?}")) };
    let told = scene.world.clients[winner].opens[0].told.as_ref().map_or(0, |told| told.epoch);
    if told != epoch + 1 || scene.world.oracle.resumed != 1 {
        return Err(format!("the epoch went from {epoch} to {told}"));
    }
    scene.end()?;
    Ok(winner)
}

/// What ends a wait for a lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EndOfWait {
    /// It is cancelled.
    Cancel,
    /// Its open is closed.
    Close,
    /// Its session logs off.
    Logoff,
    /// Its connection breaks.
    Drop,
}

/// One waits for a lock, another waits behind it; the first wait ends, the lock is given up, the second is granted.
///
/// # Errors
/// A broken promise, or no grant for the second.
pub fn wait_ends(seed: u64, by: EndOfWait) -> Result<(), String> {
    let mut scene = Scene::new(seed, 3)?;
    let mut opens = Vec::new();
    for client in 0..3 {
        let request = scene.request(0, ShareMode::ALL, 1000);
        opens.push(scene.open(client, request)?);
    }
    scene.world.lock(0, opens[0], vec![exclusive(1)], None);
    scene.idle(&[0])?;
    for client in [1, 2] {
        scene.world.lock(client, opens[client], vec![exclusive(1)], Some(60_000));
        scene.run(30)?;
    }
    let open = scene.world.clients[1].opens[0].told.as_ref().map(|told| told.open).ok_or("not told")?;
    match by {
        EndOfWait::Cancel => {
            let cancel = CancelLock { open, sequence: 1 };
            scene.world.ask(1, crate::client::Asked::Other, Request::CancelLock(cancel));
        }
        EndOfWait::Close => scene.world.close(1, opens[1]),
        EndOfWait::Logoff => scene.world.ask(1, crate::client::Asked::Logoff, Request::Logoff),
        EndOfWait::Drop => scene.lose(1)?,
    }
    // Both are under way at once: either may come first.
    let pause = scene.world.rng.below(4 * MS);
    scene.run_ns(pause)?;
    scene.world.unlock_something(0, opens[0]);
    scene.idle(&[0])?;
    if by == EndOfWait::Cancel {
        scene.idle(&[1])?;
        let got = !scene.world.clients[1].opens[0].locks.is_empty();
        if got {
            scene.world.unlock_something(1, opens[1]);
        }
    }
    scene.until("the second one's lock", |world| {
        world.clients[2].opens.first().is_some_and(|open| !open.locks.is_empty())
    })?;
    scene.end()
}

/// Two clients open, lock, unlock and close against each other.
///
/// # Errors
/// A broken promise, or a round that does not end.
pub fn lock_rounds(seed: u64, rounds: u64) -> Result<(), String> {
    let mut scene = Scene::new(seed, 2)?;
    scene.world.check_every = 64;
    let mut done = [0; 2];
    while done.iter().sum::<u64>() < rounds {
        for (client, done) in done.iter_mut().enumerate() {
            if !scene.world.clients[client].pending.is_empty() {
                continue;
            }
            let state = scene.world.clients[client]
                .opens
                .first()
                .map(|open| (open.uid, open.locks.len(), open.sequence));
            match state {
                None => {
                    let request = scene.request(0, ShareMode::ALL, 1000);
                    scene.world.open_with(client, request);
                }
                Some((uid, 0, 0)) => scene.world.lock(client, uid, vec![exclusive(1)], Some(60_000)),
                Some((_, 0, 1)) => return Err("a lock was not granted".to_owned()),
                Some((uid, _, 1)) if scene.world.rng.once_in(2) => scene.world.unlock_something(client, uid),
                Some((uid, ..)) => {
                    scene.world.close(client, uid);
                    *done += 1;
                }
            }
        }
        if !scene.world.step() {
            break;
        }
    }
    scene.fine()?;
    if scene.world.now > rounds * 200 * MS {
        return Err("it took too long".to_owned());
    }
    scene.end()
}

/// Many detached opens expire in one tick, while somebody else wants one file.
///
/// # Errors
/// A broken promise; an answer that came late; too much work at once.
pub fn many_expire(seed: u64, opens: u64) -> Result<(), String> {
    let mut scene = Scene::new(seed, 2)?;
    scene.world.check_every = 5000;
    let contended = scene.request(1, ShareMode::NONE, 2000);
    scene.open(0, contended)?;
    for number in 0..opens {
        let request = scene.request(0, ShareMode::ALL, 2000);
        scene.world.open_with(0, request);
        if number % 100 == 99 {
            scene.idle(&[0])?;
        }
    }
    scene.idle(&[0])?;
    let uids: Vec<Uid> = scene.world.clients[0].opens.iter().map(|open| open.uid).collect();
    for uid in uids.iter().skip(1).take(200) {
        let shared = LockItem { kind: LockKind::Shared, ..exclusive(0) };
        scene.world.lock(0, *uid, vec![shared], None);
        scene.idle(&[0])?;
    }
    scene.lose(0)?;
    let request = scene.request(1, ShareMode::ALL, 1000);
    // Before: refused at once, with the time left.
    let early = scene.world.open_with(1, request.clone());
    scene.idle(&[1])?;
    if scene.world.clients[1].refused != Some(Status::Busy) || scene.stands(1, early).is_some() {
        return Err(format!("not busy: {:?}", scene.world.clients[1].refused));
    }
    scene.run(1900)?;
    let detached = scene.world.now;
    // All are expired at one moment; the question comes at the same.
    scene.world.now = detached + 300 * MS;
    let late = scene.world.open_with(1, Open { create_id: CreateId([9; 16]), ..request });
    let (asked, steps) = (scene.world.now, scene.world.step);
    scene.until("the answer", |world| stands(world, 1, late) == Some(Stands::Live))?;
    let (took, steps) = (scene.world.now - asked, scene.world.step - steps);
    if took > 500 * MS || steps > 2000 {
        return Err(format!("the answer took {} ms and {steps} events", took / MS));
    }
    scene.run(1000)?;
    let most = scene.world.timeout_effects;
    if most > 2048 {
        return Err(format!("one call for a timeout had {most} effects"));
    }
    Ok(())
}

/// A reboot, a change by somebody else, another reboot; then the first comes back.
///
/// # Errors
/// A broken promise; above all a false "unchanged".
pub fn changed_between_reboots(seed: u64) -> Result<(), String> {
    let mut scene = Scene::new(seed, 2)?;
    let compatible = scene.world.rng.once_in(2);
    let share = if compatible { ShareMode::ALL } else { ShareMode::NONE };
    let request = scene.request(0, share, 500);
    let uid = scene.open(0, request)?;
    if scene.world.rng.once_in(2) {
        scene.write(0, uid)?;
    }
    let power = scene.world.rng.once_in(2);
    scene.reboot(power)?;
    scene.run(1000)?;
    scene.connect(1)?;
    let request = scene.request(0, ShareMode::ALL, 500);
    let other = scene.open(1, request)?;
    scene.write(1, other)?;
    // What is written is really there, or the file may look as before.
    scene.world.io(1, other, crate::plane::Io::Flush);
    scene.until("a flush", |world| {
        world.clients[1].opens.first().is_none_or(|open| open.unflushed.is_empty())
    })?;
    scene.world.close(1, other);
    scene.idle(&[1])?;
    let power = scene.world.rng.once_in(2);
    scene.reboot(power)?;
    scene.connect(0)?;
    scene.world.resume(0, uid, false, false);
    scene.idle(&[0])?;
    let [unchanged, expired, changed, gone] = scene.world.oracle.verdicts;
    if (unchanged, expired) != (0, 0) || changed + gone != 1 {
        return Err(format!(
            "verdicts: {:?}, {:?}",
            scene.world.oracle.verdicts, scene.world.clients[0].refused
        ));
    }
    scene.end()
}

impl Scene {
    /// Both processes end, or the machine loses its power; then everything starts again.
    fn reboot(&mut self, power: bool) -> Result<(), String> {
        if power {
            self.world.power_cut();
        } else {
            self.world.kill_control();
            self.world.kill_plane();
        }
        self.until("a start", World::is_up)
    }
}

/// Opens, locks, unlocks, resumes and closes, with a power cut at the `cut`-th operation of the journal's disk; then
/// everything that was told must be so. False if there were fewer operations.
///
/// # Errors
/// A broken promise.
pub fn cut_at(seed: u64, cut: u64) -> Result<bool, String> {
    let mut scene = Scene::new(seed, 2)?;
    scene.world.disk.fault_at(scene.world.disk.operations() + cut, Fault::PowerCut);
    let before = scene.world.control.as_ref().map(|control| control.life);
    // Whatever does not come to an end was cut.
    let ended = scene.life_of_an_open();
    scene.fine()?;
    let cut = scene.world.control.as_ref().map(|control| control.life) != before;
    if let (Err(words), false) = (ended, cut) {
        return Err(words);
    }
    scene.until("a start", World::is_up)?;
    scene.end()?;
    Ok(cut)
}

impl Scene {
    fn life_of_an_open(&mut self) -> Result<(), String> {
        let request = self.request(0, ShareMode::READ, 60_000);
        let uid = self.open(0, request)?;
        self.world.lock(0, uid, vec![exclusive(1), exclusive(2)], None);
        self.idle(&[0])?;
        self.world.unlock_something(0, uid);
        self.idle(&[0])?;
        self.lose(0)?;
        self.run(20)?;
        self.connect(0)?;
        self.world.resume(0, uid, false, false);
        self.idle(&[0])?;
        self.world.close(0, uid);
        self.idle(&[0])
    }
}

/// A write is acknowledged and not flushed, then the power fails. The client learns from the data plane's instance that
/// its write may be lost, and writes it again.
///
/// # Errors
/// A broken promise; a byte that was flushed in the end and is not there.
pub fn unflushed_write(seed: u64) -> Result<(), String> {
    let mut scene = Scene::new(seed, 1)?;
    let request = scene.request(0, ShareMode::NONE, 60_000);
    let uid = scene.open(0, request)?;
    scene.write(0, uid)?;
    let written = scene.world.clients[0].opens[0].unflushed.clone();
    scene.reboot(true)?;
    scene.until("the client's loss", |world| world.clients[0].conn.is_none())?;
    scene.connect(0)?;
    for _ in 0..20 {
        if scene.stands(0, uid) == Some(Stands::Lost) {
            scene.world.resume(0, uid, true, false);
            scene.idle(&[0])?;
            scene.run(100)?;
        }
    }
    let open = &scene.world.clients[0].opens[0];
    let told = open.told.as_ref().map_or(0, |told| told.instance);
    if open.unflushed.values().any(|(_, by)| *by == told) || told == 0 {
        return Err(format!("the client cannot see that its write may be lost: {open:?}"));
    }
    let node = open.told.as_ref().and_then(|told| scene.world.oracle.node_of(told.open)).ok_or("no file")?;
    for client in &mut scene.world.clients {
        client.scripted = false;
    }
    settle(&mut scene.world)?;
    for (block, (tag, _)) in written {
        if !scene.world.files.is_durable(node, block, tag) || scene.world.files.read(node, block) != tag {
            return Err(format!("block {block} is lost"));
        }
    }
    Ok(())
}
