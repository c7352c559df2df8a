//! What a client does next: by chance while faults are on, and what brings things to an end afterwards.

use super::{Asked, Bound, Change, Client, ClientOpen, Stands, Uid};
use crate::files::{BLOCK, BLOCKS};
use crate::oracle::MS;
use crate::plane::{Ask, ChannelNo, Io};
use crate::world::{Event, World};
use holdfast_shared::auth::{BindTranscript, ChannelIdentity};
use holdfast_shared::types::{
    Access, CreateId, Disposition, HandleId, HoldClass, LockItem, LockKind, LockRange, OpenId, ProcessId,
    SessionId, ShareMode,
};
use holdfast_shared::wire::control::{
    self, CancelLock, Hello, Lock, Place, Rename, Request, Resume, SetAttributes, Target, Unlock,
};
use holdfast_shared::wire::link::Redeem;
use holdfast_shared::wire::service::TransportKind;
use std::collections::BTreeMap;

/// Opens that a client has at once.
const OPENS: usize = 3;

fn place(file: u64) -> Place {
    Place { volume: "data".into(), path: format!("f{file}") }
}

impl World {
    /// A client takes its turn.
    pub(crate) fn act(&mut self, client: usize) {
        let Some(there) = self.clients.get_mut(client) else { return };
        if there.scripted {
            return self.turn(client);
        }
        if self.healing {
            return self.finish(client);
        }
        let pause = self.rng.between(MS / 2, 12 * MS);
        self.after(pause, Event::Act(client));
        let Some(there) = self.clients.get_mut(client) else { return };
        match (there.conn, there.session) {
            (None, _) if there.gone && !self.rng.once_in(5) => {}
            (None, _) => self.connect(client),
            (Some(_), None) => {}
            (Some(_), Some(_)) => {
                if !(self.rng.once_in(2) && self.get_back(client)) {
                    self.do_something(client);
                }
            }
        }
    }

    pub(crate) fn connect(&mut self, client: usize) {
        let conn = self.net.connect(client);
        let Some(there) = self.clients.get_mut(client) else { return };
        there.gone = false;
        there.conn = Some(conn);
        there.pending.insert(0, Asked::Hello);
        let hello = Hello {
            version_min: control::VERSION,
            version_max: control::VERSION,
            client: String::new(),
            process: ProcessId(client as u64),
        };
        self.send(conn, 0, Request::Hello(hello));
    }

    /// Asks something in the client's session.
    pub(crate) fn ask(&mut self, client: usize, asked: Asked, request: Request) {
        let Some(there) = self.clients.get_mut(client) else { return };
        let Some(conn) = there.conn else { return };
        there.last_request += 1;
        let id = there.last_request;
        there.pending.insert(id, asked);
        self.send(conn, id, request);
    }

    /// Goes on with an open that a lost connection has left in between; true if there was one.
    fn get_back(&mut self, client: usize) -> bool {
        let (keep, supersede) = (!self.rng.once_in(3), !self.rng.once_in(4));
        let Some(there) = self.clients.get(client) else { return false };
        let lost = there.opens.iter().find(|open| open.stands == Stands::Lost).map(|open| open.uid);
        if let Some(uid) = lost {
            self.resume(client, uid, keep, supersede);
            return true;
        }
        let asks_for = |open: &&ClientOpen| {
            open.stands == Stands::Opening
                && !there.pending.values().any(|asked| matches!(asked, Asked::Open(uid) if *uid == open.uid))
        };
        let opening = there.opens.iter().find(asks_for).map(|open| (open.uid, open.request.clone()));
        match opening {
            Some((uid, request)) => {
                self.ask(client, Asked::Open(uid), Request::Open(request));
                true
            }
            None => false,
        }
    }

    pub(crate) fn resume(&mut self, client: usize, uid: Uid, keep: bool, supersede: bool) {
        let Some(open) = self.clients.get_mut(client).and_then(|there| there.open_mut(uid)) else { return };
        let Some(told) = &open.told else { return };
        let handles: Vec<HandleId> = open.bound.iter().filter_map(|bound| bound.handle).collect();
        let resume = Resume {
            resume_key: told.key.clone(),
            supersede: open.session.filter(|_| supersede),
            keep: if keep { handles } else { Vec::new() },
        };
        open.stands = Stands::Resuming;
        self.ask(client, Asked::Resume(uid), Request::Resume(resume));
    }

    fn random_open(&mut self) -> control::Open {
        let rng = &mut self.rng;
        let rw = Access::READ | Access::WRITE;
        let accesses = [Access::READ, rw, rw, rw, Access::WRITE, rw | Access::DELETE, Access::NONE];
        let shares = [ShareMode::ALL, ShareMode::ALL, ShareMode::ALL, ShareMode::READ, ShareMode::NONE];
        let holds = [None, Some(0), Some(50), Some(500), Some(500), Some(5000), Some(u64::MAX)];
        let mut access = accesses[rng.index(accesses.len())];
        let share = shares[rng.index(shares.len())];
        let delete_on_close = self.setting.names && rng.once_in(8);
        if delete_on_close {
            access = access | Access::DELETE;
        }
        let truncates = self.setting.names && access.contains(Access::WRITE) && rng.once_in(6);
        control::Open {
            create_id: CreateId(rng.bytes()),
            place: place(rng.below(self.setting.files as u64)),
            access,
            share,
            disposition: if truncates { Disposition::OverwriteOrCreate } else { Disposition::OpenOrCreate },
            mode: 0o600,
            hold_ms: holds[rng.index(holds.len())],
            class: if rng.once_in(4) { HoldClass::Yield } else { HoldClass::Hold },
            wait_ms: if rng.once_in(3) { Some(rng.below(3000)) } else { None },
            delete_on_close,
            process: None,
        }
    }

    pub(crate) fn open_with(&mut self, client: usize, request: control::Open) -> Uid {
        let Some(there) = self.clients.get_mut(client) else { return 0 };
        there.last_uid += 1;
        let uid = there.last_uid;
        there.opens.push(ClientOpen {
            uid,
            request: request.clone(),
            stands: Stands::Opening,
            told: None,
            session: None,
            bound: Vec::new(),
            sequence: 0,
            locks: Vec::new(),
            change: None,
            unflushed: BTreeMap::new(),
            tries: 0,
        });
        self.ask(client, Asked::Open(uid), Request::Open(request));
        uid
    }

    fn do_something(&mut self, client: usize) {
        let Some(there) = self.clients.get(client) else { return };
        let live: Vec<(Uid, OpenId)> = there
            .opens
            .iter()
            .filter(|open| open.stands == Stands::Live)
            .filter_map(|open| Some((open.uid, open.told.as_ref()?.open)))
            .collect();
        let (count, conn) = (there.opens.len(), there.conn);
        let Some((uid, open)) = self.rng.pick(&live).copied() else {
            if count < OPENS {
                let request = self.random_open();
                self.open_with(client, request);
            }
            return;
        };
        match self.rng.below(65) {
            0..=5 if count < OPENS => {
                let request = self.random_open();
                self.open_with(client, request);
            }
            6..=12 => self.lock_something(client, uid),
            13..=17 => self.unlock_something(client, uid),
            18 => {
                let sequence =
                    self.clients.get_mut(client).and_then(|there| there.open_mut(uid)).map(|o| o.sequence);
                let cancel = CancelLock { open, sequence: sequence.unwrap_or(0) };
                self.ask(client, Asked::Other, Request::CancelLock(cancel));
            }
            19..=24 => self.bind(client, uid),
            25..=38 => self.write_something(client, uid),
            39..=42 => {
                let block = self.rng.below(BLOCKS);
                self.io(client, uid, Io::Read { block });
            }
            43..=46 => self.io(client, uid, Io::Flush),
            47..=50 => self.close(client, uid),
            51 => {
                let size = Some(self.rng.below(BLOCKS) * BLOCK);
                self.resize(client, Target::Open(open), size);
            }
            52 if self.setting.names => {
                let size = Some(self.rng.below(BLOCKS) * BLOCK);
                let file = self.rng.below(self.setting.files as u64);
                self.resize(client, Target::Path(place(file)), size);
            }
            53 if self.setting.names => {
                let file = self.rng.below(self.setting.files as u64);
                self.ask(client, Asked::Other, Request::Remove(place(file)));
            }
            54 if self.setting.names => {
                let (from, to) = (self.rng.below(2), self.rng.below(2));
                let rename = Rename { from: place(from), to: place(to), no_replace: false };
                self.ask(client, Asked::Other, Request::Rename(rename));
            }
            55 => self.steal(client),
            56 => {
                let resume = self.key_of(client, uid).map(|resume_key| Resume {
                    resume_key,
                    supersede: None,
                    keep: vec![],
                });
                if let Some(resume) = resume {
                    self.ask(client, Asked::Other, Request::Resume(resume));
                }
            }
            57 if self.rng.once_in(3) => self.ask(client, Asked::Logoff, Request::Logoff),
            58 | 59 => {
                if let Some(conn) = conn {
                    self.cut_conn(conn, true);
                }
            }
            60 if self.rng.once_in(4) => self.crash_client(client),
            61 => self.ask(client, Asked::Other, Request::Ping),
            62 => self.ask(client, Asked::Other, Request::QueryKey(open)),
            63 => self.unbind(client, uid),
            64 => {
                // The same lock request again, though its answer has come or is on its way.
                let change =
                    self.clients.get_mut(client).and_then(|there| there.open_mut(uid)?.change.clone());
                if let Some(Change::Lock(lock)) = change {
                    self.ask(client, Asked::Lock(uid, lock.sequence), Request::Lock(lock));
                }
            }
            _ => {}
        }
    }

    fn key_of(&mut self, client: usize, uid: Uid) -> Option<Vec<u8>> {
        self.clients.get_mut(client)?.open_mut(uid)?.told.as_ref().map(|told| told.key.clone())
    }

    /// A resume with a key that is another's, or nobody's.
    fn steal(&mut self, client: usize) {
        let Some(there) = self.clients.get(client) else { return };
        let mut resume_key = self.rng.pick(&there.loot).cloned().unwrap_or_else(|| vec![0; 102]);
        if self.rng.once_in(3) {
            let at = self.rng.index(resume_key.len());
            resume_key[at] ^= 1 << self.rng.below(8);
        }
        let supersede = if self.rng.once_in(2) { Some(SessionId(self.rng.bytes())) } else { None };
        self.ask(client, Asked::Other, Request::Resume(Resume { resume_key, supersede, keep: Vec::new() }));
    }

    pub(crate) fn crash_client(&mut self, client: usize) {
        let Some(there) = self.clients.get_mut(client) else { return };
        let conn = there.conn;
        let channels: Vec<ChannelNo> =
            there.opens.iter().flat_map(|open| open.bound.iter().map(|bound| bound.channel)).collect();
        there.forget();
        if let Some(conn) = conn {
            self.cut_conn(conn, true);
        }
        for channel in channels {
            self.cut_channel(channel);
        }
    }

    pub(crate) fn close(&mut self, client: usize, uid: Uid) {
        let Some(open) = self.clients.get_mut(client).and_then(|there| there.open_mut(uid)) else { return };
        let Some(told) = &open.told else { return };
        let request = Request::Close(told.open);
        open.stands = Stands::Closing;
        self.ask(client, Asked::Close(uid), request);
    }

    fn resize(&mut self, client: usize, target: Target, size: Option<u64>) {
        let set = SetAttributes { target, size, mode: None, accessed: None, modified: None };
        self.ask(client, Asked::Other, Request::SetAttributes(set));
    }

    // ---- locks

    fn random_range(&mut self) -> LockRange {
        let (block, length) = (self.rng.below(BLOCKS), self.rng.below(3));
        LockRange::new(block * BLOCK, length * BLOCK).unwrap_or(LockRange::before(0))
    }

    fn lock_something(&mut self, client: usize, uid: Uid) {
        let locks = (0..=self.rng.below(2)).map(|_| {
            let kind = if self.rng.once_in(3) { LockKind::Shared } else { LockKind::Exclusive };
            LockItem { range: self.random_range(), kind }
        });
        let locks: Vec<LockItem> = locks.collect();
        let wait_ms = if self.rng.once_in(2) { Some(self.rng.below(4000)) } else { None };
        self.lock(client, uid, locks, wait_ms);
    }

    pub(crate) fn lock(&mut self, client: usize, uid: Uid, locks: Vec<LockItem>, wait_ms: Option<u64>) {
        let owner = if self.scripted { 0 } else { self.rng.below(2) };
        let Some(open) = self.clients.get_mut(client).and_then(|there| there.open_mut(uid)) else { return };
        let (Some(told), None) = (&open.told, &open.change) else { return };
        open.sequence += 1;
        let lock = Lock { open: told.open, sequence: open.sequence, owner, locks, wait_ms };
        open.change = Some(Change::Lock(lock.clone()));
        self.ask(client, Asked::Lock(uid, lock.sequence), Request::Lock(lock));
    }

    pub(crate) fn unlock_something(&mut self, client: usize, uid: Uid) {
        let Some(open) =
            self.clients.get(client).and_then(|there| there.opens.iter().find(|open| open.uid == uid))
        else {
            return;
        };
        let (Some(told), None) = (&open.told, &open.change) else { return };
        let first = open.locks.first().filter(|_| self.scripted).copied();
        let Some((owner, item)) = first.or_else(|| self.rng.pick(&open.locks).copied()) else { return };
        let sequence = open.sequence + 1;
        let unlock = Unlock { open: told.open, sequence, owner, ranges: vec![item.range] };
        if let Some(open) = self.clients.get_mut(client).and_then(|there| there.open_mut(uid)) {
            open.sequence = sequence;
            open.change = Some(Change::Unlock(unlock.clone()));
        }
        self.ask(client, Asked::Unlock(uid, sequence), Request::Unlock(unlock));
    }

    /// After a resume: a change of locks whose answer was lost is asked for again, with its number.
    pub(crate) fn repeat_change(&mut self, client: usize, uid: Uid) {
        let change = self.clients.get_mut(client).and_then(|there| there.open_mut(uid)?.change.clone());
        match change {
            Some(Change::Lock(lock)) => {
                self.ask(client, Asked::Lock(uid, lock.sequence), Request::Lock(lock))
            }
            Some(Change::Unlock(unlock)) => {
                self.ask(client, Asked::Unlock(uid, unlock.sequence), Request::Unlock(unlock));
            }
            None => {}
        }
    }

    // ---- data

    pub(crate) fn bind(&mut self, client: usize, uid: Uid) {
        let Some(there) = self.clients.get_mut(client) else { return };
        let Some(open) =
            there.open_mut(uid).filter(|open| open.stands == Stands::Live && open.bound.len() < 3)
        else {
            return;
        };
        let access = open.request.access.intersection(Access::READ | Access::WRITE);
        let Some(told) = open.told.clone() else { return };
        if access.is_empty() {
            return;
        }
        let number = self.open_channel(client);
        let mut nonce = [0; 32];
        nonce[..8].copy_from_slice(&number.to_le_bytes());
        let channel = ChannelIdentity { transport: TransportKind::Memory, client: [1; 20], server: [2; 20] };
        let transcript = BindTranscript {
            channel: &channel,
            server_nonce: &nonce,
            open_challenge: &told.challenge,
            client_challenge: &[9; 32],
            resume_key: &told.key,
            volume: told.volume,
            access,
            policy: told.policy,
        }
        .digest();
        let redeem = Redeem {
            id: 0,
            resume_key: told.key.clone(),
            client_challenge: [9; 32],
            server_nonce: nonce,
            proof: told.secret.client_proof(&transcript),
            channel,
            access,
            policy: told.policy,
            peer: String::new(),
        };
        if let Some(open) = self.clients.get_mut(client).and_then(|there| there.open_mut(uid)) {
            open.bound.push(Bound {
                channel: number,
                handle: None,
                instance: told.instance,
                transcript,
                under_way: BTreeMap::new(),
                flushing: BTreeMap::new(),
            });
        }
        self.ask_plane(number, Ask::Bind(Box::new(redeem)));
    }

    pub(crate) fn write_something(&mut self, client: usize, uid: Uid) {
        let block = self.rng.below(BLOCKS);
        let Some(there) = self.clients.get_mut(client) else { return };
        there.last_tag += 1;
        let tag = ((there.number as u64 + 1) << 48) | there.last_tag;
        self.io(client, uid, Io::Write { block, tag });
    }

    /// Gives a channel's binding back, with whatever is in flight on it.
    fn unbind(&mut self, client: usize, uid: Uid) {
        let open = self.clients.get_mut(client).and_then(|there| there.open_mut(uid));
        let bound = open.and_then(|open| open.bound.iter().find(|bound| bound.handle.is_some()));
        if let Some(channel) = bound.map(|bound| bound.channel) {
            self.ask_plane(channel, Ask::Unbind);
        }
    }

    /// Issues I/O on one of the open's channels; binds one if it has none.
    pub(crate) fn io(&mut self, client: usize, uid: Uid, io: Io) {
        let Some(there) = self.clients.get_mut(client) else { return };
        there.last_io += 1;
        let number = there.last_io;
        let Some(open) = there.open_mut(uid) else { return };
        let needed = match io {
            Io::Write { .. } => Access::WRITE,
            Io::Read { .. } => Access::READ,
            Io::Flush => Access::NONE,
        };
        if !open.request.access.contains(needed) {
            return;
        }
        let unflushed = open.unflushed.clone();
        let Some(bound) = open.bound.iter_mut().rev().find(|bound| bound.handle.is_some()) else {
            if open.bound.is_empty() {
                self.bind(client, uid);
            }
            return;
        };
        bound.under_way.insert(number, io);
        if io == Io::Flush {
            bound.flushing.insert(number, unflushed);
        }
        let channel = bound.channel;
        self.ask_plane(channel, Ask::Io { number, io });
    }

    /// A flush is answered: these bytes must survive anything now.
    pub(crate) fn flushed(&mut self, client: usize, open: Option<OpenId>, block: u64, tag: u64) {
        let node = open.and_then(|open| self.oracle.node_of(open));
        if let Some(node) = node {
            if !self.files.is_durable(node, block, tag) {
                self.oracle
                    .fail(|| format!("client {client} was told that block {block} ({tag:#x}) is flushed"));
            }
        }
    }

    // ---- the end

    /// Brings one thing to an end.
    fn finish(&mut self, client: usize) {
        let Some(there) = self.clients.get_mut(client) else { return };
        if there.is_done() {
            return;
        }
        match (there.conn, there.session) {
            (None, _) if there.gone => {}
            (None, _) => {
                self.connect(client);
                self.after(100 * MS, Event::Act(client));
            }
            (Some(_), None) => {}
            (Some(conn), Some(_)) if there.gone => self.cut_conn(conn, true),
            (Some(_), Some(_)) => {
                if there.pending.is_empty() {
                    self.finish_open(client);
                }
            }
        }
    }

    fn finish_open(&mut self, client: usize) {
        if self.get_back(client) {
            return self.after(200 * MS, Event::Act(client));
        }
        let Some(there) = self.clients.get_mut(client) else { return };
        let Some(open) = there.opens.first_mut() else {
            there.gone = true;
            return self.ask(client, Asked::Logoff, Request::Logoff);
        };
        let uid = open.uid;
        open.tries += 1;
        let unflushed =
            open.unflushed.iter().next().map(|(block, (tag, instance))| (*block, *tag, *instance));
        let bound = open.bound.iter().rev().find(|bound| bound.handle.is_some()).map(|bound| bound.instance);
        let may_write = open.request.access.contains(Access::WRITE) && open.tries < 20;
        match (unflushed, bound) {
            (Some(_), None) if may_write => self.bind(client, uid),
            // What another data plane acknowledged may be lost: it is written again.
            (Some((block, tag, by)), Some(now)) if may_write && by != now => {
                self.io(client, uid, Io::Write { block, tag })
            }
            (Some(_), Some(_)) if may_write => self.io(client, uid, Io::Flush),
            _ => self.close(client, uid),
        }
        self.after(20 * MS, Event::Act(client));
    }
}

impl Client {
    /// What is not finished, in words.
    pub(crate) fn left(&self) -> String {
        let opens = self.opens.iter().map(|open| {
            let told = open.told.as_ref().map(|told| told.open);
            format!(
                "{told:?} {:?}, change {:?}, {} channels, unflushed {:?}",
                open.stands,
                open.change,
                open.bound.len(),
                open.unflushed
            )
        });
        let opens: Vec<String> = opens.collect();
        format!("client {} (gone: {}) awaits {:?}, has {opens:?}", self.number, self.gone, self.pending)
    }
}
