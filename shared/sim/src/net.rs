//! Session connections: ordered both ways, cut at any point, and each end learns of it in its own time.

use holdfast_shared::types::SessionId;
use holdfast_shared::wire::control::{Reply, Request};
use std::collections::{BTreeMap, VecDeque};

/// A connection; never used twice.
pub(crate) type ConnNo = u64;

#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) client: usize,
    /// The session it carries; named by the number of the connection.
    pub(crate) session: SessionId,
    pub(crate) up: VecDeque<(u64, Request)>,
    pub(crate) down: VecDeque<(u64, Reply)>,
    /// The client has not closed it, or does not know that it is cut.
    pub(crate) client_end: bool,
    /// The server has not closed it, or does not know that it is cut.
    pub(crate) server_end: bool,
    /// The server was told of the session.
    pub(crate) begun: bool,
    /// Nothing more comes through.
    pub(crate) cut: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Net {
    conns: BTreeMap<ConnNo, Conn>,
    last: ConnNo,
}

/// The session of a connection.
pub(crate) fn session_of(conn: ConnNo) -> SessionId {
    let mut id = [0x5e; 16];
    id[..8].copy_from_slice(&conn.to_be_bytes());
    SessionId(id)
}

impl Net {
    pub(crate) fn connect(&mut self, client: usize) -> ConnNo {
        self.last += 1;
        let conn = Conn {
            client,
            session: session_of(self.last),
            up: VecDeque::new(),
            down: VecDeque::new(),
            client_end: true,
            server_end: true,
            begun: false,
            cut: false,
        };
        self.conns.insert(self.last, conn);
        self.last
    }

    pub(crate) fn get_mut(&mut self, conn: ConnNo) -> Option<&mut Conn> {
        self.conns.get_mut(&conn)
    }

    pub(crate) fn by_session(&self, session: SessionId) -> Option<ConnNo> {
        let number = u64::from_be_bytes(session.0[..8].try_into().ok()?);
        self.conns.get(&number).filter(|conn| conn.session == session).map(|_| number)
    }

    /// Connections of which the server has an end.
    pub(crate) fn at_server(&self) -> Vec<ConnNo> {
        self.conns.iter().filter(|(_, conn)| conn.server_end).map(|(number, _)| *number).collect()
    }

    /// Forgets a connection that has no end left.
    pub(crate) fn sweep(&mut self, conn: ConnNo) {
        if self.conns.get(&conn).is_some_and(|conn| !conn.client_end && !conn.server_end) {
            self.conns.remove(&conn);
        }
    }
}
