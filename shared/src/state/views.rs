//! What the operator sees.

use super::Authority;
use super::life::left_ms;
use super::table::{Life, Open};
use crate::types::{
    Access, HandleId, HoldClass, LockItem, OpenId, ProcessId, SessionId, ShareMode, Timestamp, VolumeId,
};
use crate::wire::link::LinkBinding;

/// Where an open is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenState {
    /// Its session is there.
    Active,
    /// Its session was lost; it is held.
    Detached,
    /// Its hold time is over; it is kept until somebody wants the file.
    Expired,
    /// It ends when nothing of it is left in dataplane.
    Closing,
}

/// A binding of an open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BindingView {
    /// Its number on the link.
    pub binding: LinkBinding,
    /// The handle.
    pub handle: HandleId,
    /// The epoch it was granted in.
    pub epoch: u64,
    /// A fence was asked for.
    pub fencing: bool,
}

/// An open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenView {
    /// Which.
    pub open: OpenId,
    /// Whose.
    pub principal: String,
    /// The process that opened it.
    pub process: ProcessId,
    /// On which volume.
    pub volume: VolumeId,
    /// The volume's name when it was opened.
    pub volume_name: String,
    /// Where it was opened.
    pub path: String,
    /// What it may do.
    pub access: Access,
    /// What it lets others do.
    pub share: ShareMode,
    /// Where it is in its life.
    pub state: OpenState,
    /// Its session, if it has one.
    pub session: Option<SessionId>,
    /// Its hold time, milliseconds.
    pub hold_ms: u64,
    /// What is left of it while it is detached, milliseconds.
    pub hold_left_ms: Option<u64>,
    /// What protects it while it is detached.
    pub class: HoldClass,
    /// What dataplane holds of it.
    pub bindings: Vec<BindingView>,
    /// Its locks: owner number and lock.
    pub locks: Vec<(u64, LockItem)>,
    /// Its epoch.
    pub epoch: u64,
    /// When it was opened, milliseconds since 1970.
    pub opened_ms: u64,
    /// Somebody else may have changed the file since it was detached.
    pub marked: bool,
}

/// A session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SessionView {
    /// Which.
    pub session: SessionId,
    /// Whose.
    pub principal: String,
    /// Its process.
    pub process: ProcessId,
    /// How many opens it has.
    pub opens: usize,
}

impl Authority {
    /// Opens in the order of their ids, behind `after`, at most `max`. `now` tells what is left of hold times.
    pub fn list_opens(&self, now: Timestamp, after: Option<OpenId>, max: usize) -> Vec<OpenView> {
        self.opens.after(after).take(max).map(|(id, open)| self.view(now, *id, open)).collect()
    }

    fn view(&self, now: Timestamp, id: OpenId, open: &Open) -> OpenView {
        let (state, hold_left_ms) = match &open.life {
            Life::Active => (OpenState::Active, None),
            Life::Closing { .. } => (OpenState::Closing, None),
            Life::Detached { .. } if open.is_expired(now) => (OpenState::Expired, Some(0)),
            Life::Detached { deadline, .. } => (OpenState::Detached, Some(left_ms(now, *deadline))),
        };
        let bindings = open.bindings.iter().map(|(number, binding)| BindingView {
            binding: *number,
            handle: binding.handle,
            epoch: binding.epoch,
            fencing: binding.fencing,
        });
        OpenView {
            open: id,
            principal: open.principal.as_ref().to_owned(),
            process: open.process,
            volume: open.volume(),
            volume_name: open.request.place.volume.clone(),
            path: open.at.path.as_str().to_owned(),
            access: open.access(),
            share: open.share(),
            state,
            session: open.session,
            hold_ms: open.hold_ms,
            hold_left_ms,
            class: open.class(),
            bindings: bindings.collect(),
            locks: self.locks.locks_of(open.identity, id),
            epoch: open.epoch,
            opened_ms: open.opened_ms,
            marked: open.marked,
        }
    }

    /// All sessions, in the order of their ids.
    pub fn list_sessions(&self) -> Vec<SessionView> {
        let sessions = self.sessions.iter().map(|(id, session)| SessionView {
            session: *id,
            principal: session.principal.as_ref().to_owned(),
            process: session.process,
            opens: session.opens.len(),
        });
        sessions.collect()
    }
}
