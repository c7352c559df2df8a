//! What a client makes of answers, and of connections that break.

use super::{Asked, Bound, Change, Stands, Told};
use crate::net::{self, ConnNo};
use crate::oracle::MS;
use crate::plane::{ChannelNo, Io, Say};
use crate::shell::session_key;
use crate::world::{Event, World};
use holdfast_shared::auth::BindAnswer;
use holdfast_shared::types::Status;
use holdfast_shared::wire::control::{Opened, Reply};

fn instance(blob: &[u8]) -> u64 {
    blob.try_into().map(u64::from_le_bytes).unwrap_or(0)
}

impl World {
    /// An answer on a session's connection.
    pub(crate) fn hear(&mut self, client: usize, conn: ConnNo, id: u64, reply: Reply) {
        let Some(there) = self.clients.get_mut(client).filter(|there| there.conn == Some(conn)) else {
            return;
        };
        let Some(asked) = there.pending.remove(&id) else {
            return self.oracle.fail(|| {
                format!("client {client} hears an answer to {id}, which it never asked: {reply:?}")
            });
        };
        there.refused = match &reply {
            Reply::Refused(refusal) => Some(refusal.status),
            _ => None,
        };
        match asked {
            Asked::Hello => match reply {
                Reply::Welcome(welcome) => there.session = Some(welcome.session),
                _ => self.cut_conn(conn, true),
            },
            Asked::Open(uid) => match reply {
                Reply::Opened(opened) => self.got_open(client, uid, &opened),
                Reply::Refused(refusal) => {
                    // A create id is used again only where the answer was lost.
                    let lost = World::passes(refusal.status)
                        && !self.healing
                        && there.open_mut(uid).is_some_and(|open| open.tries > 0);
                    if let Some(open) = there.open_mut(uid) {
                        open.stands = if lost { Stands::Opening } else { Stands::Dead };
                    }
                }
                _ => {}
            },
            Asked::Close(uid) => {
                let closed = matches!(&reply, Reply::Done)
                    || matches!(&reply, Reply::Refused(refusal) if refusal.status != Status::NoSpace);
                if let Some(open) = there.open_mut(uid) {
                    open.stands = if closed { Stands::Dead } else { Stands::Live };
                }
            }
            Asked::Lock(uid, sequence) => self.lock_answered(client, uid, sequence, &reply),
            Asked::Unlock(uid, sequence) => self.unlock_answered(client, uid, sequence, &reply),
            Asked::Resume(uid) => self.resume_answered(client, conn, uid, reply),
            Asked::Logoff => {
                for open in &mut there.opens {
                    open.stands = Stands::Dead;
                }
                self.cut_conn(conn, true);
            }
            Asked::Other => {}
        }
        self.tidy(client);
    }

    fn got_open(&mut self, client: usize, uid: u64, opened: &Opened) {
        let Some(there) = self.clients.get_mut(client) else { return };
        let Some(session) = there.session else { return };
        let Some(open) = there.open_mut(uid) else { return };
        if opened.open.0 == [0; 16] {
            return self.oracle.fail(|| "an open without an id".to_owned());
        }
        open.told = Some(Told {
            open: opened.open,
            key: opened.key.resume_key.clone(),
            challenge: opened.key.challenge,
            volume: opened.key.volume,
            policy: opened.key.policy,
            secret: session_key(session).bind_secret(opened.open),
            instance: instance(&opened.key.service_blob),
            epoch: opened.epoch,
        });
        open.session = Some(session);
        if open.stands != Stands::Dead {
            open.stands = Stands::Live;
        }
        open.tries = 0;
        let key = opened.key.resume_key.clone();
        // Somebody else gets hold of a key now and then.
        if !self.scripted && self.rng.once_in(10) {
            let thief = self.rng.index(self.clients.len());
            if let Some(thief) = self.clients.get_mut(thief).filter(|thief| thief.number != client) {
                thief.loot.push(key);
            }
        }
    }

    fn lock_answered(&mut self, client: usize, uid: u64, sequence: u64, reply: &Reply) {
        let Some(open) = self.clients.get_mut(client).and_then(|there| there.open_mut(uid)) else { return };
        let Some(Change::Lock(lock)) = open.change.clone().filter(|_| open.sequence == sequence) else {
            return;
        };
        match reply {
            Reply::Done => {
                open.locks.extend(lock.locks.iter().map(|item| (lock.owner, *item)));
                open.change = None;
            }
            Reply::Refused(refusal) if refusal.status == Status::Unavailable => {}
            _ => open.change = None,
        }
    }

    fn unlock_answered(&mut self, client: usize, uid: u64, sequence: u64, reply: &Reply) {
        let Some(open) = self.clients.get_mut(client).and_then(|there| there.open_mut(uid)) else { return };
        let Some(Change::Unlock(unlock)) = open.change.clone().filter(|_| open.sequence == sequence) else {
            return;
        };
        match reply {
            Reply::Done => {
                for range in &unlock.ranges {
                    let at = open
                        .locks
                        .iter()
                        .position(|(owner, item)| *owner == unlock.owner && item.range == *range);
                    if let Some(at) = at {
                        open.locks.swap_remove(at);
                    }
                }
                open.change = None;
            }
            Reply::Refused(refusal) if refusal.status == Status::NotLocked => {
                let lost = open.stands == Stands::Live;
                let words = format!("client {client} holds locks that the server says it does not: {open:?}");
                open.change = None;
                if lost {
                    self.oracle.fail(|| words);
                }
            }
            Reply::Refused(refusal) if refusal.status == Status::Unavailable => {}
            _ => open.change = None,
        }
    }

    fn resume_answered(&mut self, client: usize, conn: ConnNo, uid: u64, reply: Reply) {
        let Some(open) = self.clients.get_mut(client).and_then(|there| there.open_mut(uid)) else { return };
        match reply {
            Reply::Resumed(resumed) => {
                let kept = resumed.kept.clone();
                let dropped: Vec<ChannelNo> = open
                    .bound
                    .iter()
                    .filter(|bound| bound.handle.is_none_or(|handle| !kept.contains(&handle)))
                    .map(|bound| bound.channel)
                    .collect();
                let lower =
                    resumed.lock_sequence < open.sequence && open.change.is_none() && !open.locks.is_empty();
                let sequence = (resumed.lock_sequence, open.sequence);
                if lower && resumed.lock_sequence == 0 {
                    self.oracle.fail(|| {
                        format!("client {client} was told locks, and their number is forgotten: {sequence:?}")
                    });
                }
                self.got_open(client, uid, &resumed.opened);
                self.oracle.heard(net::session_of(conn), resumed.opened.open);
                for channel in dropped {
                    self.cut_channel(channel);
                }
                self.repeat_change(client, uid);
            }
            Reply::Gone(_) => open.stands = Stands::Dead,
            Reply::Refused(refusal) => {
                open.tries += 1;
                // A key that is bad stays bad; anything else may pass.
                let dead = refusal.status == Status::BadKey;
                open.stands = if dead { Stands::Dead } else { Stands::Lost };
            }
            _ => {}
        }
    }

    /// The connection has ended.
    pub(crate) fn lost(&mut self, client: usize, conn: ConnNo) {
        let Some(there) = self.clients.get_mut(client).filter(|there| there.conn == Some(conn)) else {
            return;
        };
        there.conn = None;
        there.session = None;
        there.pending.clear();
        for open in &mut there.opens {
            open.stands = match open.stands {
                Stands::Live | Stands::Resuming | Stands::Lost | Stands::Closing if open.told.is_some() => {
                    Stands::Lost
                }
                Stands::Opening => {
                    open.tries += 1;
                    Stands::Opening
                }
                _ => Stands::Dead,
            };
        }
        self.tidy(client);
    }

    // ---- channels

    pub(crate) fn hear_plane(&mut self, client: usize, channel: ChannelNo, say: Say) {
        if self.scripted {
            self.after(0, Event::Act(client));
        }
        let Some(there) = self.clients.get_mut(client) else { return };
        let Some((open, at)) = there.of_channel(channel) else { return };
        match say {
            Say::Bound { handle, epoch, proof, policy, access, instance } => {
                let right = open.told.as_ref().is_some_and(|told| {
                    let answered =
                        BindAnswer { handle, epoch, access, policy }.digest(&open.bound[at].transcript);
                    told.secret.server_proof_is_right(&answered, &proof)
                });
                if right {
                    open.bound[at].handle = Some(handle);
                    open.bound[at].instance = instance;
                } else {
                    // The open was resumed while the bind was under way.
                    self.cut_channel(channel);
                }
            }
            Say::BindRefused(_) | Say::Ended(_) => self.cut_channel(channel),
            Say::Done { number, status } => {
                let Bound { instance, .. } = open.bound[at];
                let io = open.bound[at].under_way.remove(&number);
                let covered = open.bound[at].flushing.remove(&number);
                match io {
                    Some(Io::Write { block, tag }) if status == Status::Ok => {
                        open.unflushed.insert(block, (tag, instance));
                    }
                    Some(Io::Flush) if status == Status::Ok => {
                        let covered = covered.unwrap_or_default();
                        let flushed: Vec<(u64, u64)> = covered
                            .iter()
                            .filter(|(_, (_, by))| *by == instance)
                            .map(|(block, (tag, _))| (*block, *tag))
                            .collect();
                        open.unflushed
                            .retain(|block, told| covered.get(block) != Some(told) || told.1 != instance);
                        let file = open.told.as_ref().map(|told| told.open);
                        for (block, tag) in flushed {
                            self.flushed(client, file, block, tag);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    pub(crate) fn lost_channel(&mut self, client: usize, channel: ChannelNo) {
        if let Some(there) = self.clients.get_mut(client) {
            if let Some((open, at)) = there.of_channel(channel) {
                open.bound.swap_remove(at);
            }
        }
    }

    /// Forgets opens that are over, and cuts their channels.
    pub(crate) fn tidy(&mut self, client: usize) {
        let Some(there) = self.clients.get_mut(client) else { return };
        let mut channels = Vec::new();
        there.opens.retain(|open| {
            if open.stands == Stands::Dead {
                channels.extend(open.bound.iter().map(|bound| bound.channel));
            }
            open.stands != Stands::Dead
        });
        for channel in channels {
            self.cut_channel(channel);
        }
        if self.healing {
            self.after(5 * MS, Event::Act(client));
        } else if self.scripted {
            self.after(0, Event::Act(client));
        }
    }
}
