//! The authority with a shell of paper: file system and dataplane are what the test says.

use crate::auth::{BindTranscript, ChannelIdentity, Keyring, MacPolicy, Secret, SessionKey};
use crate::state::rules::{Right, VolumeRules};
use crate::state::{
    Authority, Effect, FileIdentity, FileOpened, Fresh, Input, Limits, OperationId, SessionBegan, Work,
};
use crate::types::{
    Access, ClusterId, CreateId, Disposition, FileTime, OpenId, ProcessId, SessionId, ShareMode, Status,
    Timestamp, VolumeId,
};
use crate::wire::control::{Attributes, FileKind, Open, Opened, Place, Reply, Request};
use crate::wire::link::{Fence, Grant, LinkBinding, Redeem};
use crate::wire::service::TransportKind;

pub(super) const RW: Access = Access::READ.union(Access::WRITE);

pub(super) struct World {
    pub(super) authority: Authority,
    pub(super) now: Timestamp,
    pub(super) effects: Vec<Effect>,
    random: u64,
    pub(super) last_request: u64,
}

pub(super) fn volume(name: &str, id: u8, grants: &[(&str, Right)]) -> VolumeRules {
    let grants = grants.iter().map(|(principal, right)| ((*principal).to_owned(), *right)).collect();
    VolumeRules { id: VolumeId([id; 16]), name: name.into(), policy: MacPolicy::Header, grants }
}

pub(super) fn identity(inode: u64) -> FileIdentity {
    FileIdentity { device: 1, inode, generation: 0 }
}

pub(super) fn attributes(inode: u64) -> Attributes {
    let zero = FileTime { seconds: 0, nanos: 0 };
    Attributes {
        kind: FileKind::File,
        size: 0,
        allocated: 0,
        mode: 0o600,
        inode,
        links: 1,
        accessed: zero,
        modified: zero,
        changed: zero,
        uid: 0,
        gid: 0,
    }
}

pub(super) fn place(path: &str) -> Place {
    Place { volume: "data".into(), path: path.into() }
}

pub(super) fn open(create: u8, access: Access, share: ShareMode) -> Open {
    Open {
        create_id: CreateId([create; 16]),
        place: place("file"),
        access,
        share,
        disposition: Disposition::Open,
        mode: 0,
        hold_ms: None,
    }
}

pub(super) fn session_key(n: u8) -> SessionKey {
    SessionKey::new(Secret::new([n; 32]))
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(Limits::default(), 1)
    }

    pub(super) fn with(limits: Limits, cluster: u8) -> Self {
        let keyring = Keyring::new(ClusterId([cluster; 16]), 1, &Secret::new([cluster; 32]));
        let volumes = vec![
            volume("data", 1, &[("u1", Right::ReadWrite), ("u2", Right::ReadWrite), ("r", Right::Read)]),
            volume("other", 2, &[("u1", Right::ReadWrite)]),
        ];
        Self {
            authority: Authority::new(limits, volumes, keyring),
            now: Timestamp::default(),
            effects: Vec::new(),
            random: 0,
            last_request: 0,
        }
    }

    pub(super) fn fresh(&mut self) -> Box<Fresh> {
        self.random += 1;
        let mut open = [0; 16];
        open[..8].copy_from_slice(&self.random.to_le_bytes());
        let mut challenge = [0x55; 32];
        challenge[..8].copy_from_slice(&self.random.to_le_bytes());
        let nonce = [0; 12];
        Box::new(Fresh { open, handle: open, challenge, nonce, wall_ms: 1 })
    }

    pub(super) fn give(&mut self, input: Input) -> Vec<Effect> {
        let mut effects = std::mem::take(&mut self.effects);
        self.authority.handle(self.now, input, &mut effects);
        self.authority.check_invariants();
        effects
    }

    /// Session number `n` of a principal; its key is `session_key(n)`.
    pub(super) fn begin(&mut self, n: u8, principal: &str) -> SessionId {
        let session = SessionId([n; 16]);
        let effects = self.give(Input::SessionBegan(Box::new(SessionBegan {
            session,
            request: 0,
            principal: principal.into(),
            key: session_key(n),
            process: ProcessId(n.into()),
        })));
        assert!(matches!(&effects[..], [Effect::Reply { reply: Reply::Welcome(_), .. }]), "{effects:?}");
        session
    }

    pub(super) fn ask(&mut self, session: SessionId, request: Request) -> Vec<Effect> {
        self.last_request += 1;
        let (id, fresh) = (self.last_request, self.fresh());
        self.give(Input::Request { session, id, request, fresh })
    }

    /// The status a request is refused with at once.
    pub(super) fn refused(&mut self, session: SessionId, request: Request) -> Status {
        refusal(&self.ask(session, request))
    }

    /// Asks for an open and has the shell find the file `inode`.
    pub(super) fn try_open(&mut self, session: SessionId, request: Open, inode: u64) -> Vec<Effect> {
        let effects = self.ask(session, Request::Open(request));
        let [Effect::OpenFile { operation, .. }] = &effects[..] else { return effects };
        self.found(*operation, inode, false)
    }

    pub(super) fn found(&mut self, operation: OperationId, inode: u64, created: bool) -> Vec<Effect> {
        let opened = FileOpened { identity: identity(inode), attributes: attributes(inode), created };
        let mut effects = self.give(Input::FileOpened { operation, result: Ok(opened) });
        if let [Effect::Perform { operation, work: Work::SetAttributes(..) }] = &effects[..] {
            effects = self.performed(*operation, inode);
        }
        effects
    }

    pub(super) fn performed(&mut self, operation: OperationId, inode: u64) -> Vec<Effect> {
        self.give(Input::Performed { operation, result: Ok(Reply::Attributes(attributes(inode))) })
    }

    pub(super) fn open(&mut self, session: SessionId, request: Open, inode: u64) -> Opened {
        opened(&self.try_open(session, request, inode))
    }

    pub(super) fn redeem(&mut self, redeem: Redeem) -> Result<Grant, Status> {
        let fresh = self.fresh();
        let effects = self.give(Input::Redeem { redeem: Box::new(redeem), fresh });
        match &effects[..] {
            [Effect::Grant { grant, .. }] => Ok((**grant).clone()),
            [Effect::RefuseBind { status, .. }] => Err(*status),
            other => panic!("no answer to redeem: {other:?}"),
        }
    }

    /// A bind that is right in everything.
    pub(super) fn bind(&mut self, key: &SessionKey, opened: &Opened, nonce: u8) -> LinkBinding {
        self.redeem(right(key, opened, nonce, opened.access)).unwrap().binding
    }

    pub(super) fn confirm(&mut self, fence: Fence) -> Vec<Effect> {
        self.give(Input::Fenced(fence))
    }
}

/// What dataplane forwards for a client that does everything right.
pub(super) fn right(key: &SessionKey, opened: &Opened, nonce: u8, access: Access) -> Redeem {
    let channel = ChannelIdentity { transport: TransportKind::Memory, client: [1; 20], server: [2; 20] };
    let mut redeem = Redeem {
        id: 1,
        resume_key: opened.key.resume_key.clone(),
        client_challenge: [9; 32],
        server_nonce: [nonce; 32],
        proof: [0; 32],
        channel,
        access,
        policy: opened.key.policy,
        peer: String::new(),
    };
    prove(key, opened, &mut redeem);
    redeem
}

/// Makes the proof fit what the request says.
pub(super) fn prove(key: &SessionKey, opened: &Opened, redeem: &mut Redeem) {
    let digest = BindTranscript {
        channel: &redeem.channel,
        server_nonce: &redeem.server_nonce,
        open_challenge: &opened.key.challenge,
        client_challenge: &redeem.client_challenge,
        resume_key: &redeem.resume_key,
        volume: opened.key.volume,
        access: redeem.access,
        policy: redeem.policy,
    }
    .digest();
    redeem.proof = key.bind_secret(opened.open).client_proof(&digest);
}

pub(super) fn opened(effects: &[Effect]) -> Opened {
    match effects {
        [Effect::Reply { reply: Reply::Opened(opened), .. }] => opened.clone(),
        other => panic!("not opened: {other:?}"),
    }
}

/// The status of the only refusal among effects.
pub(super) fn refusal(effects: &[Effect]) -> Status {
    let mut refusals = effects.iter().filter_map(|effect| match effect {
        Effect::Reply { reply: Reply::Refused(refusal), .. } => Some(refusal.status),
        _ => None,
    });
    match (refusals.next(), refusals.next()) {
        (Some(status), None) => status,
        _ => panic!("not one refusal: {effects:?}"),
    }
}

pub(super) fn fences(effects: &[Effect]) -> Vec<Fence> {
    let fence = |effect: &Effect| match effect {
        Effect::Fence(fence) => Some(*fence),
        _ => None,
    };
    effects.iter().filter_map(fence).collect()
}

/// True if the effects end in closing the file and then telling that the open is closed.
pub(super) fn closes(effects: &[Effect]) -> bool {
    matches!(effects, [Effect::CloseFile(_), Effect::Reply { reply: Reply::Done, .. }])
}

pub(super) fn close(open: OpenId) -> Request {
    Request::Close(open)
}
