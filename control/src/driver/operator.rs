//! What the operator sees of opens and sessions, as JSON (see [`crate::admin`]).

use super::{Connection, Driver};
use holdfast_shared::state::{OpenState, OpenView};
use holdfast_shared::types::{Access, HoldClass, LockKind, OpenId, SessionId};
use serde_json::{Value, json};

impl Driver {
    pub(super) fn show_opens(&self, after: Option<OpenId>, max: usize) -> Value {
        let page = self.authority.list_opens(self.now(), after, max);
        let next = page.last().filter(|_| page.len() >= max).map(|last| last.open.to_string());
        json!({ "opens": page.iter().map(open).collect::<Vec<_>>(), "next": next })
    }

    pub(super) fn show_sessions(&self, after: Option<SessionId>, max: usize) -> Value {
        let sessions = self.authority.list_sessions();
        let behind = |session: SessionId| after.is_none_or(|after| session > after);
        let page: Vec<_> = sessions.iter().filter(|view| behind(view.session)).take(max).collect();
        let next = page.last().filter(|_| page.len() >= max).map(|last| last.session.to_string());
        let show = |view: &&holdfast_shared::state::SessionView| {
            let address =
                self.sessions.get(&view.session).map(|Connection { address, .. }| address.to_string());
            json!({
                "session": view.session.to_string(),
                "principal": view.principal,
                "process": view.process.0,
                "opens": view.opens,
                "address": address,
            })
        };
        json!({ "sessions": page.iter().map(show).collect::<Vec<_>>(), "next": next })
    }

    /// An open by its id.
    pub(super) fn find_open(&self, wanted: OpenId) -> Option<OpenView> {
        // The list begins behind an id; the one before this is where it begins with this.
        let before = u128::from_be_bytes(wanted.0).checked_sub(1).map(|id| OpenId(id.to_be_bytes()));
        self.authority.list_opens(self.now(), before, 1).into_iter().find(|view| view.open == wanted)
    }
}

fn open(view: &OpenView) -> Value {
    let state = match view.state {
        OpenState::Active => "active",
        OpenState::Detached => "detached",
        OpenState::Expired => "expired",
        OpenState::Closing => "closing",
    };
    let class = match view.class {
        HoldClass::Hold => "hold",
        HoldClass::Yield => "yield",
    };
    json!({
        "open": view.open.to_string(),
        "principal": view.principal,
        "process": view.process.0,
        "volume": view.volume_name,
        "path": view.path,
        "access": letters(view.access),
        "share": Access::from_bits(view.share.bits()).map(letters),
        "state": state,
        "session": view.session.map(|session| session.to_string()),
        "hold_ms": view.hold_ms,
        "hold_left_ms": view.hold_left_ms,
        "class": class,
        "bindings": view.bindings.len(),
        "fencing": view.bindings.iter().filter(|binding| binding.fencing).count(),
        "locks": view.locks.len(),
        "locks_exclusive": view.locks.iter().filter(|(_, item)| item.kind == LockKind::Exclusive).count(),
        "epoch": view.epoch,
        "opened_ms": view.opened_ms,
        "marked": view.marked,
    })
}

fn letters(access: Access) -> String {
    let all = [(Access::READ, 'r'), (Access::WRITE, 'w'), (Access::DELETE, 'd')];
    all.iter().filter(|(right, _)| access.contains(*right)).map(|(_, letter)| letter).collect()
}
